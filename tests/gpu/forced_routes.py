"""Mixtures with the experts of another runner: what is left is the error of the arithmetic.

Where two experts' scores are nearly equal, rounding tips which of them a token gets, and from there
on the two answers have nothing to do with each other. So the tokens of one runner get the experts
that they have in another, and what they would have got is counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from baton.kernels import reference_experts
from baton.kernels.reference import AttentionPlan
from baton.kernels.reference_experts import Routes
from baton.kernels.routing import RoutingRule
from baton.kernels.state_plan import DeviceStatePlan, StatePlan
from baton.shared.engine.model_runner import ModelRunner

_SURE = 1e4
"""Above all scores: experts that have it are chosen."""
Token = tuple[int, int] | None
"""Its id and its position, which tell the tokens of a step apart; None: padding, which keeps the
experts that it has."""


@dataclass
class Choice:
    """A token's experts in a layer of the reference, and all scores that they were chosen by."""

    experts: Tensor
    scores: Tensor


@dataclass
class ForcedRoutes:
    """What tokens were given other experts than they would have had.

    Steps are computed by the reference first, then by the other runner.
    """

    num_routes: int = 0
    """A token's in a layer, each."""
    margins: list[float] = field(default_factory=list)
    """Of those that would have been others, by how much the reference's scores differ."""
    _choices: dict[tuple[int, Token], Choice] = field(default_factory=dict)

    def listen_to(self, reference: ModelRunner) -> None:
        def route(
            layer: int, tokens: list[Token], logits: Tensor, rule: RoutingRule, *more: Tensor | None
        ) -> Routes:
            routes = reference_experts.route(logits, rule, *more)
            scores = _scores(logits, rule, *more)
            for token, *choice in zip(tokens, routes.experts, scores, strict=True):
                if token is not None:
                    self._choices[layer, token] = Choice(*choice)
            return routes

        _watch(reference, route, self._choices.clear)

    def impose_on(self, runner: ModelRunner) -> None:
        choose = runner._ops.route

        def route(
            layer: int, tokens: list[Token], logits: Tensor, rule: RoutingRule, *more: Tensor | None
        ) -> Routes:
            own = choose(logits, rule, *more)
            experts = own.experts.long().cpu()
            for place, token in enumerate(tokens):
                choice = self._choices.get((layer, token))
                if choice is not None:
                    self._compare(experts[place], choice)
                    experts[place] = choice.experts
            weights = _weights_of(experts, logits.cpu(), rule, *more)
            return Routes(
                experts.to(own.experts.device, own.experts.dtype), weights.to(logits.device)
            )

        _watch(runner, route, lambda: None)

    def _compare(self, own: Tensor, choice: Choice) -> None:
        self.num_routes += 1
        gained = set(own.tolist()) - set(choice.experts.tolist())
        lost = set(choice.experts.tolist()) - set(own.tolist())
        if gained:
            scores = choice.scores
            self.margins.append(float(max(scores[list(lost)]) - min(scores[list(gained)])))


def _scores(
    logits: Tensor, rule: RoutingRule, bias: Tensor | None = None, _: Tensor | None = None
) -> Tensor:
    scores = reference_experts._scores(logits, rule)
    return scores if bias is None else scores + bias


def _weights_of(
    experts: Tensor,
    logits: Tensor,
    rule: RoutingRule,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Of experts that are given, in their order."""
    sure = torch.zeros_like(logits)
    places = torch.arange(rule.top_k, 0, -1, dtype=torch.float32)
    sure.scatter_(1, experts, (places * _SURE).expand(len(logits), -1))
    routes = reference_experts.route(logits, rule, sure, None if scale is None else scale.cpu())
    assert torch.equal(routes.experts, experts)
    return routes.weights


def _without_padding(tokens: list[Token], is_real: Tensor) -> list[Token]:
    return [token if is_it else None for token, is_it in zip(tokens, is_real.tolist(), strict=True)]


def _are_stored(plans: Any, num_tokens: int) -> Tensor:
    """Which tokens of a step some group stores; others are padding."""
    if isinstance(plans[0], AttentionPlan):
        return torch.arange(num_tokens) < plans[0].num_tokens
    if isinstance(plans[0], StatePlan):
        return torch.arange(num_tokens) < int(plans[0].query_start[-1])
    if isinstance(plans[0], DeviceStatePlan):
        own = plans[0]
        are_stored = torch.arange(num_tokens) < num_tokens - own.num_padding
        are_stored[: own.num_singles] = (own.slots[: own.num_singles] >= 0).cpu()
        return are_stored
    return torch.stack([plan.slots[:num_tokens] >= 0 for plan in plans]).any(0)


def _have_rows(plans: Any, num_tokens: int) -> Tensor:
    """The same of tokens that are wanted: each is a row of its own."""
    if isinstance(plans[0], AttentionPlan):
        return torch.arange(num_tokens) < plans[0].num_tokens
    if isinstance(plans[0], StatePlan):
        return torch.arange(num_tokens) < len(plans[0].slots)
    if isinstance(plans[0], DeviceStatePlan):
        # Of these it says nothing; what pads them is some token of the step.
        return torch.ones(num_tokens, dtype=torch.bool)
    rows: Tensor = plans[0].rows
    return rows >= 0


def _watch(runner: ModelRunner, route: Any, begin: Any) -> None:
    """Has `route` choose, told of the layer and the tokens; `begin` is called before each step."""
    model: Any = runner._model
    mixture = runner.model_config.mixture
    assert mixture is not None
    layers = [index for index, has_experts in enumerate(mixture.layers) if has_experts]
    compute = model.hidden_states
    coming: list[tuple[int, list[Token]]] = []

    def hidden_states(
        input_ids: Tensor, positions: Tensor, caches: Any, plans: Any, wanted: Any = None
    ) -> Tensor:
        begin()
        tokens: list[Token] = list(zip(input_ids.tolist(), positions.tolist(), strict=True))
        tokens = left = _without_padding(tokens, _are_stored(plans, len(tokens)))
        if wanted is not None and len(wanted[0]):
            left = [tokens[place] for place in wanted[0].tolist()]
            left = _without_padding(left, _have_rows(wanted[1], len(left)))
        coming[:] = [(index, left if index >= model.last_to_store else tokens) for index in layers]
        hidden: Tensor = compute(input_ids, positions, caches, plans, wanted)
        return hidden

    def choose(logits: Tensor, rule: RoutingRule, *more: Tensor | None) -> Routes:
        layer, tokens = coming.pop(0)
        routes: Routes = route(layer, tokens, logits, rule, *more)
        return routes

    model.hidden_states = hidden_states
    ops: Any = runner._ops
    ops.route = choose
