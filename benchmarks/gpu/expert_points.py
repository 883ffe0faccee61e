"""The points of kernel_points.py about mixtures of experts."""

# A point is measured before the next one is made, so functions may refer to loop variables.
# ruff: noqa: B023

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from baton.kernels.expert_order import Order
from baton.kernels.experts import ExpertWeights, SmallExpertWeights
from baton.kernels.experts_table import UNSORTED_TOKENS
from baton.kernels.reference_experts import ExpertActivation, Routes
from baton.kernels.routing import ClampedSwiglu, RoutingRule
from baton.kernels.small_experts import SmallExperts, powers_of_two
from benchmarks.gpu.gpu_timing import Call, Point

_BF16 = torch.bfloat16
TOKENS = (1, 8, 32, 128, 512, 8192)
_FEW_PAIRS = 1024
"""With so many, several sets of routes are used in turn: they choose other experts."""


@dataclass(frozen=True)
class Mixture:
    """A layer's mixture of a well-known shape."""

    name: str
    hidden: int
    size: int
    rule: RoutingRule
    activation: ExpertActivation = "silu"
    has_bias: bool = False

    def weights(self) -> ExpertWeights:
        """1.1 to 1.6 GB."""
        count, device = self.rule.num_experts, torch.device("cuda")

        def draw(*shape: int) -> Tensor:
            return torch.randn(count, *shape, dtype=_BF16, device=device).mul_(shape[-1] ** -0.5)

        return ExpertWeights(
            draw(2 * self.size, self.hidden),
            draw(self.hidden, self.size),
            draw(2 * self.size) if self.has_bias else None,
            draw(self.hidden) if self.has_bias else None,
        )

    def routes(self, num_tokens: int) -> Routes:
        """Of random logits: all experts are equally popular."""
        from baton.kernels.expert_routes import route

        logits = torch.randn(num_tokens, self.rule.num_experts, device="cuda")
        return route(logits, self.rule)


MIXTURES = (
    Mixture(
        "qwen3-30b-a3b", 2048, 768, RoutingRule(num_experts=128, top_k=8, is_normalised=True)
    ),
    Mixture(
        "gpt-oss-20b", 2880, 2880,
        RoutingRule(num_experts=32, top_k=4, scoring="softmax_of_chosen"),
        ClampedSwiglu(1.702, 7.0), has_bias=True,
    ),
    Mixture("deepseek-v2-lite", 2048, 1408, RoutingRule(num_experts=64, top_k=6)),
    Mixture(
        "qwen3.5-35b-a3b", 2048, 512, RoutingRule(num_experts=256, top_k=8, is_normalised=True)
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """Some steps' tokens of a mixture, in turn: with other experts each, so that no cache helps."""

    mixture: Mixture
    weights: ExpertWeights
    num_tokens: int
    x: Tensor
    routes: list[Routes]
    orders: list[Order | None]

    @classmethod
    def of(cls, mixture: Mixture, weights: ExpertWeights, num_tokens: int) -> Work:
        from baton.kernels.expert_order import order_of

        num_sets = 8 if num_tokens * mixture.rule.top_k <= _FEW_PAIRS else 2
        x = torch.randn(num_tokens, mixture.hidden, dtype=_BF16, device="cuda")
        routes = [mixture.routes(num_tokens) for _ in range(num_sets)]
        orders = [order_of(each, mixture.rule.num_experts) for each in routes]
        return cls(mixture, weights, num_tokens, x, routes, orders)

    @property
    def num_pairs(self) -> int:
        return self.num_tokens * self.mixture.rule.top_k

    @property
    def num_hit(self) -> float:
        """Experts that a set reads, the mean of all."""
        return sum(len(torch.unique(each.experts)) for each in self.routes) / len(self.routes)

    def num_bytes(self, *, is_up: bool) -> float:
        """Of the first product, or of the second: weights of experts that are hit, rows in and
        out."""
        mixture, pairs = self.mixture, self.num_pairs
        weights = self.num_hit * mixture.size * mixture.hidden * (2 if is_up else 1)
        rows = self.num_tokens * mixture.hidden if is_up else pairs * mixture.hidden
        return 2 * (weights + rows + pairs * mixture.size)

    def flop(self, *, is_up: bool) -> float:
        return 2.0 * self.num_pairs * self.mixture.size * self.mixture.hidden * (2 if is_up else 1)


def experts_product() -> Iterator[Point]:
    """Both products, each by itself; then the whole: sorted, both products, added up.

    Libraries get rows that are sorted already, and do nothing but the products: no activation, no
    bias.
    """
    for mixture in MIXTURES:
        weights = mixture.weights()
        for num_tokens in TOKENS:
            yield from _products(Work.of(mixture, weights, num_tokens))


def _products(work: Work) -> Iterator[Point]:
    from baton.kernels import experts as own

    mixture, orders = work.mixture, work.orders
    shape = (work.num_pairs, mixture.size)
    inner = torch.randn(shape, dtype=_BF16, device="cuda")
    rows = torch.empty(work.num_pairs, mixture.hidden, dtype=_BF16, device="cuda")
    label = f"{mixture.name} {work.num_tokens}"

    def up(i: int) -> None:
        own.multiply_up(inner, work.x, work.weights, work.routes[i], orders[i], mixture.activation)

    def down(i: int) -> None:
        own.multiply_down(rows, inner, work.weights, work.routes[i], orders[i])

    def whole(i: int) -> None:
        own.experts(work.x, work.routes[i], work.weights, mixture.activation)

    for name, call, is_up in (("gate, up", up, True), ("down", down, False)):
        yield Point(
            f"{label} {name}",
            call,
            work.num_bytes(is_up=is_up),
            work.flop(is_up=is_up),
            num_sets=len(work.routes),
            library=_libraries(work, is_up=is_up),
        )
    yield Point(
        f"{label} all",
        whole,
        work.num_bytes(is_up=True) + work.num_bytes(is_up=False),
        work.flop(is_up=True) + work.flop(is_up=False),
        num_sets=len(work.routes),
        library=_libraries(work, is_up=None),
    )


_SMALL = (
    ("gpt-oss-20b", "fp4", 32), ("gpt-oss-20b", "float8", 0), ("qwen3-30b-a3b", "int4", 128),
    ("qwen3-30b-a3b", "float8", 128), ("qwen3-30b-a3b", "float8", 0),
)  # fmt: skip
"""Mixtures whose weights are small, the kind of their codes, and how long runs are; 0: a row."""
_SMALL_TOKENS = (1, 8, 32, 128, 2048)


def small_experts_product() -> Iterator[Point]:
    """Both products with weights as they are stored, beside ours in bfloat16. MXFP4's scales are
    powers of two, the others' are not."""
    mixtures = {each.name: each for each in MIXTURES}
    for name, kind, run in _SMALL:
        yield from _small_products(mixtures[name], kind, run)


def _small_products(mixture: Mixture, kind: str, run: int) -> Iterator[Point]:
    from baton.kernels import experts as own

    plain = mixture.weights()
    small = [_small_weights(mixture, kind, run) for _ in range(2)]
    label = f"{mixture.name} {kind} {f'g{run} ' if run else ''}"
    for num_tokens in _SMALL_TOKENS:
        work = Work.of(mixture, plain, num_tokens)
        inner = torch.randn(work.num_pairs, mixture.size, dtype=_BF16, device="cuda")
        rows = torch.empty(work.num_pairs, mixture.hidden, dtype=_BF16, device="cuda")

        def up(i: int, weights: Any) -> None:
            routes, order = work.routes[i // 2], work.orders[i // 2]
            own.multiply_up(inner, work.x, weights, routes, order, mixture.activation)

        def down(i: int, weights: Any) -> None:
            own.multiply_down(rows, inner, weights, work.routes[i // 2], work.orders[i // 2])

        for what, call, is_up in (("gate, up", up, True), ("down", down, False)):
            weight = small[0].gate_up if is_up else small[0].down
            num_less = 2 * math.prod(weight.shape) - weight.nbytes
            yield Point(
                f"{label}{num_tokens} {what}",
                lambda i: call(i, small[i % 2]),
                work.num_bytes(is_up=is_up) - work.num_hit / len(weight) * num_less,
                work.flop(is_up=is_up),
                num_sets=2 * len(work.routes),
                library={"bfloat16": lambda i: call(i, plain)},
            )


def _small_weights(mixture: Mixture, kind: str, run: int) -> SmallExpertWeights:
    count = mixture.rule.num_experts

    def draw(num_out: int, num_in: int) -> SmallExperts:
        width = num_in // 2 if kind in ("int4", "fp4") else num_in
        # All bytes that are numbers.
        codes = torch.randint(0, 127, (count, num_out, width), device="cuda").to(torch.uint8)
        scale = torch.rand(count, num_out, num_in // run if run else 1, device="cuda") / 64
        if kind == "fp4":
            scale = torch.exp2(scale.log2().round().clamp_min(-12))
        if kind == "float8":
            codes = codes.view(torch.float8_e4m3fn)
        powers = powers_of_two(scale)
        return SmallExperts(codes, scale, None, num_in, kind == "fp4", powers)

    up = draw(2 * mixture.size, mixture.hidden)
    return SmallExpertWeights(up, draw(mixture.hidden, mixture.size), None, None)


def experts_around() -> Iterator[Point]:
    """What is around the products: the router, for few tokens with the norm before it; routing,
    sorting, adding up."""
    from baton.kernels.expert_order import order_of
    from baton.kernels.expert_routes import norm_scores, route
    from baton.kernels.experts import combine

    for mixture in MIXTURES:
        rule = mixture.rule
        for num_tokens in TOKENS:
            label = f"{mixture.name} {num_tokens}"
            pairs = num_tokens * rule.top_k
            logits = torch.randn(num_tokens, rule.num_experts, device="cuda")
            routes = route(logits, rule)
            rows = torch.randn(pairs, mixture.hidden, dtype=_BF16, device="cuda")
            hidden = torch.randn(num_tokens, mixture.hidden, dtype=_BF16, device="cuda")

            if num_tokens <= UNSORTED_TOKENS:
                router = torch.randn(rule.num_experts, mixture.hidden, device="cuda")
                gain = torch.ones(mixture.hidden, dtype=_BF16, device="cuda")

                def torch_scores(_: int) -> object:
                    x = torch.nn.functional.rms_norm(hidden, (mixture.hidden,), gain, 1e-6)
                    return torch.mm(x.float(), router.t())

                yield Point(
                    f"norm, router {label}",
                    lambda _: norm_scores(hidden, gain, 1e-6, router, None),
                    num_bytes=4 * router.numel(),
                    library={"rms_norm, mm": torch_scores},
                    note="weights in the cache",
                )

            def torch_route(_: int) -> object:
                return logits.softmax(-1).topk(rule.top_k)

            def torch_sort(_: int) -> object:
                return routes.experts.view(-1).sort(stable=True)

            def torch_combine(_: int) -> object:
                shares = routes.weights[:, :, None]
                return (rows.view(num_tokens, rule.top_k, -1) * shares).sum(1) + hidden

            yield Point(
                f"route {label}",
                lambda _: route(logits, rule),
                num_bytes=4 * num_tokens * rule.num_experts + 8 * pairs,
                library={"softmax, topk": torch_route},
            )
            if order_of(routes, rule.num_experts) is not None:
                yield Point(
                    f"sort {label}",
                    lambda _: order_of(routes, rule.num_experts),
                    num_bytes=8 * pairs,
                    library={"sort": torch_sort},
                )
            yield Point(
                f"combine {label}",
                lambda _: combine(rows, routes, hidden),
                num_bytes=2 * mixture.hidden * (pairs + 2 * num_tokens),
                library={"torch": torch_combine},
            )


def _libraries(work: Work, *, is_up: bool | None) -> dict[str, Call]:
    """The best that torch has for sorted rows; `is_up` None: both products."""
    weights = {True: work.weights.gate_up, False: work.weights.down}
    wanted = [True, False] if is_up is None else [is_up]
    counts = [
        each.experts.view(-1).long().bincount(minlength=work.mixture.rule.num_experts)
        for each in work.routes
    ]
    ends = [each.cumsum(0).int() for each in counts]
    known = [each.tolist() for each in counts]
    width = {True: work.mixture.hidden, False: work.mixture.size}
    rows = {up: torch.randn(work.num_pairs, width[up], dtype=_BF16, device="cuda") for up in wanted}
    grouped_mm: Any = torch._grouped_mm

    def grouped(i: int) -> None:
        for up in wanted:
            grouped_mm(rows[up], weights[up].transpose(-2, -1), offs=ends[i])

    def one_by_one(i: int) -> None:
        """The host knows how many rows each has, which in an engine it does not."""
        for up in wanted:
            parts = torch.split(rows[up], known[i])
            for expert, part in enumerate(parts):
                if len(part):
                    torch.mm(part, weights[up][expert].t())

    return {"grouped_mm": grouped, "mm each": one_by_one}
