"""A mixture of experts in plain torch: the CPU path, and the oracle of kernels/experts.py.

A token's bits must not depend on its company (see reference.py). So each expert's products have
enough rows, and a token's results are added in the order of the experts' numbers, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from baton.kernels.reference import Activation, activate, activate_and_mul, linear
from baton.kernels.routing import ClampedSwiglu, RoutingRule

ExpertActivation = Activation | ClampedSwiglu | Literal["relu2"]
"""`relu2` is that of experts without a gate: relu(up)²."""


class Routes(NamedTuple):
    """Which experts the tokens of a step have, highest score first."""

    experts: Tensor
    """int64 [T, top_k]; of a GPU int32"""
    weights: Tensor
    """float32 [T, top_k]"""


class ExpertWeights(NamedTuple):
    """Of all experts of a layer, by their number; each in a form that `linear` takes."""

    gate_up: Sequence[Tensor]
    """[2 · size, hidden]: the gate's rows, then up's; without a gate [size, hidden]."""
    down: Sequence[Tensor]
    """[hidden, size]"""
    gate_up_bias: Sequence[Tensor | None]
    """[2 · size]"""
    down_bias: Sequence[Tensor | None]
    """[hidden]"""


def route(
    logits: Tensor,
    rule: RoutingRule,
    choice_bias: Tensor | None = None,
    expert_scale: Tensor | None = None,
) -> Routes:
    """The experts of each token.

    Args:
        logits: float32 [T, num_experts]; rows may be strided.
        choice_bias: float32 [num_experts]: added to the scores where experts are chosen, but not to
            their weights.
        expert_scale: float32 [num_experts]: what weights are multiplied by, at last.
    """
    scores = _scores(logits, rule)
    choice = scores if choice_bias is None else scores + choice_bias
    if rule.num_groups > 1:
        choice = _within_groups(choice, rule)
    experts = _highest(choice, rule.top_k)
    weights = scores.gather(1, experts)
    if rule.scoring == "softmax_of_chosen":
        weights = _softmax(weights)
    elif rule.is_normalised:
        weights = weights / (weights.sum(-1, keepdim=True) + rule.floor)
    if rule.scale != 1:
        weights = weights * rule.scale
    if expert_scale is not None:
        weights = weights * expert_scale[experts]
    return Routes(experts, weights)


def experts(
    x: Tensor,
    routes: Routes,
    weights: ExpertWeights,
    activation: ExpertActivation,
    *,
    min_rows: int,
) -> Tensor:
    """Each token's experts of x [T, hidden], weighted and added up → float32 [T, hidden].

    min_rows: products get at least as many rows.
    """
    out = x.new_zeros(x.shape, dtype=torch.float32)
    top_k = routes.experts.shape[1]
    chosen = routes.experts.reshape(-1)
    order = chosen.argsort(stable=True)
    tokens, shares = order // top_k, routes.weights.reshape(-1)[order, None]
    start = 0
    for expert, count in enumerate(chosen.bincount(minlength=len(weights.down)).tolist()):
        if not count:
            continue
        own = tokens[start : start + count]
        rows = torch.cat((own, own[:1].expand(max(0, min_rows - count))))
        hidden = linear(
            x.index_select(0, rows), weights.gate_up[expert], weights.gate_up_bias[expert]
        )
        hidden = gated(hidden, activation)
        y = linear(hidden, weights.down[expert], weights.down_bias[expert])[:count]
        out.index_add_(0, own, y.float() * shares[start : start + count])
        start += count
    return out


def gated(gate_up: Tensor, activation: ExpertActivation) -> Tensor:
    """What experts make of (gate, up) [T, 2 · size], or of up [T, size] alone → [T, size]."""
    if activation == "relu2":
        return activate(gate_up, "relu").mul_(gate_up)
    if not isinstance(activation, ClampedSwiglu):
        return activate_and_mul(gate_up, activation)
    gate, up = gate_up.chunk(2, -1)
    gate = gate.clamp(max=activation.limit)
    up = up.clamp(-activation.limit, activation.limit)
    return _sigmoid(gate * activation.slope).mul_(gate).mul_(up + 1)


def gated_add(x: Tensor, gate: Tensor, residual: Tensor | None) -> Tensor:
    """sigmoid(gate) · x + residual: x and residual [T, hidden], gate float32 [T, 1]."""
    y = x.float() * _sigmoid(gate)
    return y.to(x.dtype) if residual is None else residual.add_(y)


def _scores(logits: Tensor, rule: RoutingRule) -> Tensor:
    match rule.scoring:
        case "softmax":
            return _softmax(logits)
        case "sigmoid":
            return _sigmoid(logits)
    return logits


def _within_groups(choice: Tensor, rule: RoutingRule) -> Tensor:
    by_group = choice.view(len(choice), rule.num_groups, -1)
    best = by_group.sort(-1, descending=True).values[..., : rule.group_best].sum(-1)
    is_left = torch.zeros_like(best, dtype=torch.bool)
    is_left.scatter_(1, _highest(best, rule.top_groups), value=True)
    return by_group.masked_fill(~is_left[..., None], float("-inf")).view(choice.shape)


def _highest(scores: Tensor, k: int) -> Tensor:
    """Where the k highest of each row are, highest first; of equal ones the first."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def _softmax(x: Tensor) -> Tensor:
    """torch.softmax, of `exp`, whose bits are measured to be stable."""
    exponentials = (x - x.amax(-1, keepdim=True)).exp_()
    return exponentials / exponentials.sum(-1, keepdim=True)


def _sigmoid(x: Tensor) -> Tensor:
    return torch.neg(x).exp_().add_(1).reciprocal_()
