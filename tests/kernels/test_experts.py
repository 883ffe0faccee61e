"""Kernels of mixtures of experts against float64: routing, and products over sorted tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from baton.kernels import expert_order, experts_table, reference_experts
from baton.kernels import experts as kernels
from baton.kernels.expert_order import order_of
from baton.kernels.expert_routes import norm_scores, route
from baton.kernels.experts import (
    ExpertWeights,
    SharedWeights,
    SmallExpertWeights,
    experts,
    gated_add,
    takes_shared,
)
from baton.kernels.experts_table import Tiles
from baton.kernels.reference_experts import ExpertActivation, Routes
from baton.kernels.routing import ClampedSwiglu, RoutingRule
from baton.kernels.small_experts import SmallExperts, powers_of_two
from baton.kernels.small_linear import SmallWeight

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
Check = Callable[[Tensor, Tensor], None]

RULES = {
    "softmax": RoutingRule(num_experts=13, top_k=3),
    "normalised": RoutingRule(num_experts=8, top_k=8, is_normalised=True, scale=2.5),
    "one": RoutingRule(num_experts=1, top_k=1, is_normalised=True),
    "of chosen": RoutingRule(num_experts=32, top_k=4, scoring="softmax_of_chosen"),
    "groups": RoutingRule(
        num_experts=24,
        top_k=5,
        scoring="sigmoid",
        is_normalised=True,
        floor=1e-20,
        scale=1.5,
        num_groups=6,
        top_groups=2,
    ),
    "groups by their best": RoutingRule(
        num_experts=20, top_k=3, scale=16.0, num_groups=5, top_groups=2, group_best=1
    ),
}


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_routes_are_those_of_the_reference(name: str, extras: bool, device: torch.device) -> None:
    rule = RULES[name]
    # Of a wider product, whose last column is another layer's; some logits are equal.
    logits = (torch.randn(9, rule.num_experts + 1) * 3).round(decimals=1).to(device)
    logits = logits[:, : rule.num_experts]
    logits[4] = 1.0
    bias, scale = (torch.rand(rule.num_experts).to(device) if extras else None for _ in range(2))
    got, expected = (each(logits, rule, bias, scale) for each in (route, reference_experts.route))
    # `exp` is not the same there: of scores that are equal here, one may be higher.
    if rule.scoring == "softmax_of_chosen" or not extras:
        assert got.experts.tolist() == expected.experts.tolist()
    torch.testing.assert_close(got.weights, expected.weights, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("has_bias", [False, True])
def test_scores_of_a_norm(
    has_bias: bool, device: torch.device, dtype: torch.dtype, assert_close: Check
) -> None:
    """Rows of a larger tensor, of a length that is no power of two."""
    x = (torch.randn(3, 90) * 4).to(device, dtype)[:, :70]
    gain, weight = torch.randn(70).to(device, dtype), torch.randn(13, 70, device=device)
    bias = torch.randn(13, device=device) if has_bias else None
    normed, scores = norm_scores(x, gain, 1e-3, weight, bias)
    expected = torch.nn.functional.rms_norm(x.double(), (70,), gain.double(), 1e-3)
    assert_close(normed, expected)
    # Of what is stored, to the last bit.
    product = normed.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), product, atol=1e-4, rtol=1e-5)


def test_many_pairs_are_sorted(device: torch.device) -> None:
    """More chunks than a program looks through itself."""
    routes = random_routes(1500, 20, 2, device)
    order = order_of(routes, 20)
    assert order is not None
    chosen = routes.experts.view(-1).cpu()
    assert order.pairs.tolist() == chosen.argsort(stable=True).tolist()
    assert order.ends.tolist() == chosen.bincount(minlength=20).cumsum(0).tolist()


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_numbers_that_are_none_lead_to_some_expert(device: torch.device) -> None:
    logits = torch.full((2, 5), float("nan"), device=device)
    routes = route(logits, RoutingRule(num_experts=5, top_k=2))
    assert bool(((routes.experts >= 0) & (routes.experts < 5)).all())


def weights_of(
    num_experts: int, hidden: int, size: int, device: torch.device, dtype: torch.dtype, bias: bool
) -> ExpertWeights:
    def rand(*shape: int) -> Tensor:
        return (torch.randn(shape) * 0.3).to(device, dtype)

    return ExpertWeights(
        rand(num_experts, 2 * size, hidden),
        rand(num_experts, hidden, size),
        rand(num_experts, 2 * size) if bias else None,
        rand(num_experts, hidden) if bias else None,
    )


def random_routes(num_tokens: int, num_experts: int, top_k: int, device: torch.device) -> Routes:
    """Of unequal popularity; some experts have nobody."""
    popularity = torch.rand(num_tokens, num_experts) + torch.linspace(0, 1, num_experts)
    popularity[:, num_experts // 2] = -1
    chosen = popularity.topk(top_k).indices.int()
    return Routes(chosen.to(device), torch.rand(num_tokens, top_k).to(device))


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "hidden", "size", "activation", "bias"),
    [
        (1, 8, 2, 64, 48, "silu", False),
        (9, 5, 3, 40, 37, ClampedSwiglu(1.7, 0.8), True),
        (50, 5, 3, 24, 16, "gelu_tanh", False),
        (70, 4, 2, 24, 16, ClampedSwiglu(1.702, 7.0), True),
    ],
)
def test_experts(
    num_tokens: int,
    num_experts: int,
    top_k: int,
    hidden: int,
    size: int,
    activation: ExpertActivation,
    bias: bool,
    device: torch.device,
    dtype: torch.dtype,
    assert_close: Check,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = torch.empty

    def poisoned(*args: object, **options: object) -> Tensor:
        tensor: Tensor = made(*args, **options)  # type: ignore[call-overload]
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 0x7EADBEEF)

    weights = weights_of(num_experts, hidden, size, device, dtype, bias)
    x = torch.randn(num_tokens, hidden).to(device, dtype)
    residual = torch.randn(num_tokens, hidden).to(device, dtype)
    routes = random_routes(num_tokens, num_experts, top_k, device)
    monkeypatch.setattr(torch, "empty", poisoned)
    got = experts(x, routes, weights, activation, residual.clone())
    monkeypatch.undo()
    wide = reference_experts.ExpertWeights(
        weights.gate_up.double(),  # type: ignore[arg-type]
        weights.down.double(),  # type: ignore[arg-type]
        [None] * num_experts if weights.gate_up_bias is None else [*weights.gate_up_bias.double()],
        [None] * num_experts if weights.down_bias is None else [*weights.down_bias.double()],
    )
    expected = reference_experts.experts(
        x.double(), Routes(routes.experts.long(), routes.weights), wide, activation, min_rows=1
    )
    assert_close(got, expected + residual.double())


def small_of(
    kind: str,
    num_experts: int,
    num_out: int,
    num_in: int,
    num_runs: int,
    device: torch.device,
    *,
    has_powers: bool = False,
) -> SmallExperts:
    """Of all codes there are; int4's have offsets, but for scales that are powers of two."""
    width = num_in // 2 if kind in ("int4", "fp4") else num_in
    codes = torch.randint(0, 256, (num_experts, num_out, width), dtype=torch.uint8)
    if kind == "int8":
        codes = codes.view(torch.int8)
    elif kind == "float8":
        codes = (torch.randn(codes.shape) * 3).to(torch.float8_e4m3fn)
    scale, offset = torch.rand(2, num_experts, num_out, num_runs)
    scale *= 0.3 / (64 if kind == "int8" else 4)
    if has_powers:
        scale = torch.exp2(torch.randint(-4, 1, scale.shape))
    return SmallExperts(
        codes.to(device),
        scale.to(device),
        (offset * 0.3).to(device) if kind == "int4" and not has_powers else None,
        num_in,
        is_fp4=kind == "fp4",
        powers=powers_of_two(scale),
    )


@pytest.mark.parametrize(
    ("kind", "num_tokens", "hidden", "size", "num_runs", "activation"),
    [
        ("int4", 3, 64, 64, 2, "silu"),
        ("int4", 9, 24, 18, 1, "silu"),
        ("int4", 2, 192, 192, 6, "silu"),
        ("fp4", 2, 64, 64, 2, ClampedSwiglu(1.7, 0.8)),
        ("fp4", 2, 320, 320, 10, "silu"),
        ("fp4", 9, 192, 192, 6, "silu"),
        ("float8", 9, 64, 32, 2, "silu"),
        ("float8", 2, 576, 576, 18, "relu2"),
        ("float8", 2, 512, 512, 2, "silu"),
        ("float8", 1, 96, 96, 2, "silu"),
        ("float8", 2, 40, 37, 1, "relu2"),
        ("int8", 9, 40, 37, 1, "silu"),
    ],
)
def test_experts_of_few_bits(
    kind: str,
    num_tokens: int,
    hidden: int,
    size: int,
    num_runs: int,
    activation: ExpertActivation,
    device: torch.device,
    assert_close: Check,
) -> None:
    """Of one scale a row, and of several, as the numbers that are expanded of them."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    num_up = size if activation == "relu2" else 2 * size
    gate_up = small_of(kind, 5, num_up, hidden, num_runs, device)
    down = small_of(kind, 5, hidden, size, num_runs, device)
    x = torch.randn(num_tokens, hidden).to(device, dtype)
    routes = random_routes(num_tokens, 5, 2, device)
    got = experts(x, routes, SmallExpertWeights(gate_up, down, None, None), activation)
    wide_up, wide_down = (
        [each.expand(index).double() for index in range(5)] for each in (gate_up, down)
    )
    wide = reference_experts.ExpertWeights(wide_up, wide_down, [None] * 5, [None] * 5)
    own = Routes(routes.experts.long(), routes.weights)
    assert_close(got, reference_experts.experts(x.double(), own, wide, activation, min_rows=1))


@pytest.mark.parametrize(
    ("kind", "num_tokens", "size", "num_runs"),
    [
        ("fp4", 9, 320, 10), ("fp4", 3, 320, 10), ("fp4", 9, 192, 12), ("float8", 70, 288, 3),
        ("float8", 9, 512, 2), ("int4", 9, 256, 4), ("int8", 9, 96, 3),
    ],
)  # fmt: skip
def test_experts_whose_scales_are_powers_of_two(
    kind: str,
    num_tokens: int,
    size: int,
    num_runs: int,
    device: torch.device,
    assert_close: Check,
) -> None:
    """Their numbers have 16 bits: a product is of several runs."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    parts = [
        small_of(kind, 5, num_out, size, num_runs, device, has_powers=True)
        for num_out in (2 * size, size)
    ]
    assert all(part.has_numbers_of(dtype) for part in parts)
    x = (torch.randn(num_tokens, size) / size).to(device, dtype)
    routes = random_routes(num_tokens, 5, 2, device)
    got = experts(x, routes, SmallExpertWeights(parts[0], parts[1], None, None), "silu")
    wide_up, wide_down = ([each.expand(index).double() for index in range(5)] for each in parts)
    wide = reference_experts.ExpertWeights(wide_up, wide_down, [None] * 5, [None] * 5)
    own = Routes(routes.experts.long(), routes.weights)
    assert_close(got, reference_experts.experts(x.double(), own, wide, "silu", min_rows=1))


def test_which_numbers_have_16_bits() -> None:
    def one(*scales: float, offset: bool = False) -> SmallExperts:
        scale = torch.tensor(scales, dtype=torch.float32).view(1, 1, -1)
        codes = torch.zeros(1, 1, 16 * len(scales), dtype=torch.int8)
        return SmallExperts(
            codes, scale, scale if offset else None, 16 * len(scales), powers=powers_of_two(scale)
        )

    half, bf16 = torch.float16, torch.bfloat16
    assert one(0.5, 2).has_numbers_of(half) and one(0.5, 2**-100).has_numbers_of(bf16)
    assert not one(0.5, 2**-6).has_numbers_of(half) and not one(2**8, 1).has_numbers_of(half)
    assert not one(0.5, 0.75).has_numbers_of(bf16) and not one(0.5, 0).has_numbers_of(bf16)
    assert not one(0.5).has_numbers_of(bf16) and not one(0.5, 2, offset=True).has_numbers_of(bf16)


def test_scales_of_all_experts_count() -> None:
    def one(scale: float) -> SmallWeight:
        codes = torch.zeros(2, 32, dtype=torch.int8)
        return SmallWeight(codes, torch.tensor([[scale, 1.0]] * 2), None, 32)

    experts_put: SmallExperts | None = SmallExperts.like(one(1), 3, is_fp4=False)
    found = []
    for index, scale in enumerate((0.5, 4.0, 3.0)):
        assert experts_put is not None
        experts_put = experts_put.put(index, one(scale), is_fp4=False)
        assert experts_put is not None
        found.append(experts_put.powers)
    assert found == [(0.5, 1.0), (0.5, 4.0), None]


@pytest.mark.parametrize("copies", [False, True])
def test_what_every_token_has_goes_along(
    copies: bool,
    device: torch.device,
    dtype: torch.dtype,
    assert_close: Check,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An MLP of the size of two experts, beside one of each token's own."""
    size, hidden, num_tokens = 24, 40, 3
    assert takes_shared(num_tokens, size, 2 * size)
    assert not takes_shared(num_tokens, size, size + 8) and not takes_shared(20, size, size)
    if dtype != torch.float32:
        tiles = Tiles(16, 16, 32, copies=copies)
        monkeypatch.setattr(experts_table, "choose", lambda *_, **__: tiles)
    weights = weights_of(5, hidden, size, device, dtype, bias=False)
    gate_up, down = (
        (torch.randn(shape) * 0.3).to(device, dtype)
        for shape in ((4 * size, hidden), (hidden, 2 * size))
    )
    x, residual = (torch.randn(num_tokens, hidden).to(device, dtype) for _ in range(2))
    routes = random_routes(num_tokens, 5, 1, device)
    mine = residual.clone()
    got = experts(x, routes, weights, "silu", mine, shared=SharedWeights(gate_up, down))
    assert got is mine
    gate, up = (x.double() @ gate_up.double().T).chunk(2, 1)
    alone = (torch.nn.functional.silu(gate) * up) @ down.double().T
    own = experts(x, routes, weights, "silu", residual.clone()).double()
    assert_close(got, alone + own)
    gates = torch.randn(num_tokens, 5, device=device)[:, 2:3]
    shared = SharedWeights(gate_up, down)
    got = experts(x, routes, weights, "silu", residual, shared=shared, shared_gate=gates)
    assert_close(got, gates.double().sigmoid() * alone + own)


def test_an_expert_without_tokens_is_not_read(device: torch.device) -> None:
    for num_tokens in (3, 12):
        weights = weights_of(6, 32, 16, device, torch.float32, bias=True)
        routes = random_routes(num_tokens, 6, 2, device)
        x = torch.randn(num_tokens, 32, device=device)
        expected = experts(x, routes, weights, "silu")
        for tensor in weights:
            assert tensor is not None
            tensor[3] = float("nan")
        assert torch.equal(experts(x, routes, weights, "silu"), expected)


def test_a_token_s_bits_are_those_of_a_step_of_its_size(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is added in an order that chance decides."""
    # The interpreter's products are a library's, whose sums depend on some CPUs on a row's place.
    monkeypatch.setattr(numpy, "matmul", _sums_alike)
    weights = weights_of(4, 32, 16, device, torch.float32, bias=False)
    routes = random_routes(20, 4, 3, device)
    x = torch.randn(20, 32, device=device)
    whole = experts(x, routes, weights, "silu")
    assert torch.equal(experts(x, routes, weights, "silu"), whole)
    turned = Routes(routes.experts.flip(0), routes.weights.flip(0))
    assert torch.equal(experts(x.flip(0), turned, weights, "silu").flip(0), whole)


def _sums_alike(a: Any, b: Any, dtype: Any = None) -> Any:
    """[M, K] @ [K, N], each row's sums in the same order."""
    return numpy.einsum("mk,kn->mn", a, b, dtype=dtype, optimize=False)


def test_no_tokens(device: torch.device) -> None:
    weights = weights_of(4, 32, 16, device, torch.float32, bias=False)
    routes = route(torch.zeros(0, 4, device=device), RoutingRule(num_experts=4, top_k=2))
    x = torch.zeros(0, 32, device=device)
    assert experts(x, routes, weights, "silu").shape == (0, 32)
    assert gated_add(x, torch.zeros(0, 1, device=device), x) is x


@pytest.mark.parametrize(
    "tiles",
    [
        Tiles(16, 16, 32, copies=True),
        Tiles(32, 32, 16, group=3),
        Tiles(16, 64, 32, group=4, copies=True),
    ],
)
def test_results_do_not_depend_on_tiles(
    tiles: Tiles, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Columns and sums that end within a tile; more tiles than there are; experts of a few rows."""
    weights = weights_of(5, 40, 24, device, torch.float16, bias=True)
    monkeypatch.setattr(experts_table, "choose", lambda *_, **__: tiles)
    for num_tokens in (2, 20):
        x = torch.randn(num_tokens, 40, device=device).half()
        routes = random_routes(num_tokens, 5, 2, device)
        inner = torch.full((num_tokens * 2, 24), float("nan"), device=device).half()
        rows = torch.full((num_tokens * 2, 40), float("nan"), device=device).half()
        order = order_of(routes, 5)
        kernels.multiply_up(inner, x, weights, routes, order, "silu")
        kernels.multiply_down(rows, inner, weights, routes, order)
        pairs = torch.arange(num_tokens * 2) if order is None else order.pairs.cpu()
        chosen = routes.experts.view(-1).tolist()
        gate_up, down, gate_up_bias, down_bias = (each.cpu().double() for each in weights)  # type: ignore[union-attr]
        for place, pair in enumerate(pairs.tolist()):
            expert, token = chosen[pair], pair // 2
            gate, up = (gate_up[expert] @ x[token].cpu().double() + gate_up_bias[expert]).chunk(2)
            expected = torch.nn.functional.silu(gate) * up
            torch.testing.assert_close(inner[place].cpu().double(), expected, atol=5e-3, rtol=1e-2)
            expected = down[expert] @ inner[place].cpu().double() + down_bias[expert]
            torch.testing.assert_close(rows[pair].cpu().double(), expected, atol=5e-3, rtol=1e-2)


def test_gated_add(device: torch.device, dtype: torch.dtype, assert_close: Check) -> None:
    x, residual = (torch.randn(5, 70).to(device, dtype) for _ in range(2))
    gate = torch.randn(5, 9, device=device)[:, 8:] * 4
    expected = x.double() * gate.double().sigmoid()
    assert_close(gated_add(x, gate, None), expected)
    expected = expected + residual.double()
    assert gated_add(x, gate, residual) is residual
    assert_close(residual, expected)


def test_tiles_are_as_many_as_there_may_be(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All pairs of one expert, and as many experts as pairs; in large tiles."""
    monkeypatch.setattr(expert_order, "UNSORTED_TOKENS", 0)
    monkeypatch.setattr(experts_table, "STEPS", (0, 1, 1024))
    weights = weights_of(9, 32, 16, device, torch.float32, bias=False)
    x = torch.randn(9, 32, device=device)
    for chosen in (torch.full((9, 1), 8), torch.arange(9).flip(0)[:, None]):
        routes = Routes(chosen.int().to(device), torch.ones(9, 1, device=device))
        got = experts(x, routes, weights, "silu")
        for token, expert in enumerate(chosen[:, 0].tolist()):
            gate, up = (weights.gate_up[expert] @ x[token]).chunk(2)
            alone = weights.down[expert] @ (torch.nn.functional.silu(gate) * up)
            torch.testing.assert_close(got[token], alone, atol=1e-5, rtol=1e-4)
