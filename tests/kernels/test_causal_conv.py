"""causal_conv against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from baton.kernels import reference_conv
from baton.kernels.causal_conv import causal_conv
from baton.kernels.reference_conv import Conv, conv_places
from tests.kernels.state_cases import CASES, poisoned_state, ways_to_compute

# Where exp(−x) overflows, the result is zero.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


def in_float64(x: Tensor, conv: Conv, before: Tensor) -> Tensor:
    """Of one sequence; before: [K − 1, C]."""
    inputs = torch.cat((before, x)).double().t()[None]
    sums = torch.nn.functional.conv1d(
        inputs,
        conv.weight.t().double()[:, None],
        None if conv.bias is None else conv.bias.double(),
        groups=conv.weight.shape[1],
    )[0].t()
    return sums if conv.activation is None else torch.nn.functional.silu(sums)


@pytest.mark.parametrize(
    ("num_heads", "units", "kernel", "has_bias", "state_dtype", "of_graph"),
    [
        (3, (8, 8, 24), 4, False, torch.float32, False),
        (1, (70, 5, 5), 2, True, torch.float16, False),
        (2, (130,), 3, True, torch.float32, False),
        # In a graph rows are others, not sizes.
        (3, (8, 8, 24), 4, False, torch.float32, True),
    ],
)
@pytest.mark.parametrize("name", CASES)
def test_causal_conv(
    name: str,
    of_graph: bool,
    num_heads: int,
    units: tuple[int, ...],
    kernel: int,
    has_bias: bool,
    state_dtype: torch.dtype,
    device: torch.device,
    dtype: torch.dtype,
    poisoned: Callable[..., Tensor],
    assert_close: Callable[[Tensor, Tensor], None],
) -> None:
    """The sums, and the states behind rows; both as the reference has them, which float64 checks
    too. Nothing else is written."""
    case, width = CASES[name], sum(units)
    num_channels = num_heads * width
    conv = Conv(
        torch.randn(kernel, num_channels, device=device),
        torch.randn(num_channels, device=device) if has_bias else None,
        conv_places(num_heads, units).to(device),
        None if kernel == 3 else "silu",
    )
    x = torch.randn(case.num_tokens, num_channels + 8, device=device).to(dtype)[:, :num_channels]
    layer, shape = 1, (num_heads, 3, kernel - 1, width)
    state = poisoned_state(case, *shape, dtype=state_dtype, device=device)
    of_reference = state.clone()
    places = conv.places.long()
    befores = []
    for row in case.rows:
        before = x.new_zeros(kernel - 1, num_channels, dtype=torch.float32)
        if row.position and row.slot >= 0:
            before = state[row.slot, :, layer].transpose(0, 1).reshape(kernel - 1, -1)[:, places]
        befores.append(before.float())

    expected = reference_conv.causal_conv(x, conv, of_reference, layer, case.plan())
    plan = case.device_plan(device, of_graph=of_graph)
    if of_graph:
        out = causal_conv(x, conv, state, layer, plan)
        assert plan.make_out(x, num_channels) is out
    else:
        out = poisoned(case.num_tokens, num_channels + 4, dtype=dtype)[:, :num_channels]
        assert causal_conv(x, conv, state, layer, plan, out=out) is out
    first = 0
    for row, before in zip(case.rows, befores, strict=True):
        own = x[first : first + row.num_tokens].float()
        reference = in_float64(own, conv, before)
        assert_close(expected[first : first + row.num_tokens], reference)
        if of_graph and row.is_padding:
            reference = torch.zeros_like(reference)
        assert_close(out[first : first + row.num_tokens], reference)
        first += row.num_tokens
    assert not out[first:].any(), "padding is zeros"
    assert torch.equal(state.view(torch.uint8), of_reference.view(torch.uint8))


def test_places() -> None:
    """Two heads: of each section the first has the first half."""
    assert conv_places(2, (2, 1)).tolist() == [0, 1, 3, 4, 2, 5]


def test_bits_of_the_reference_are_those_of_a_row_alone() -> None:
    num_rows, num_tokens, num_heads, units = 6, 5, 2, (9, 4)
    size, width = num_heads * sum(units), sum(units)
    places = conv_places(num_heads, units)
    conv = Conv(torch.randn(4, size), torch.randn(size), places)
    x = torch.randn(num_rows * num_tokens, size)
    results = []
    for steps in ways_to_compute(num_rows, num_tokens).values():
        own = torch.full((num_rows + 1, num_heads, 2, 3, width), torch.nan)
        out = torch.full_like(x, torch.nan)
        for tokens, plan in steps:
            out[tokens] = reference_conv.causal_conv(x[tokens], conv, own, 1, plan)
        assert bool(own[:, :, 0].isnan().all()) and not bool(own[:-1, :, 1].isnan().any())
        results.append(torch.cat((out.flatten(), own[:-1, :, 1].flatten())))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
