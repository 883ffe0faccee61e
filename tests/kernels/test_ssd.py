"""Mamba2's recurrence against itself in float64: kernels, and the forms of the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from baton.kernels.gated_norm import gated_norm
from baton.kernels.reference_gated_norm import GatedNorm
from baton.kernels.reference_gated_norm import gated_norm as gated_norm_reference
from baton.kernels.reference_ssd import SsdWeights, ssd_in_chunks
from baton.kernels.reference_ssd import ssd as ssd_reference
from baton.kernels.ssd_scan import ScanConfig, ssd
from baton.kernels.state_plan import (
    NO_ROW,
    NO_SLOT,
    NO_TILE,
    DeviceStatePlan,
    Kept,
    StatePlan,
    state_tiles,
)
from tests.kernels.closeness import TOLERANCE

Check = Callable[[Tensor, Tensor], None]
Poisoned = Callable[..., Tensor]
_LAYERS, _SLOTS = 2, 9
_UNUSED_SLOT = 3


def _weights(num_heads: int, groups: int, device: torch.device, **limits: float) -> SsdWeights:
    return SsdWeights(
        a=-torch.rand(num_heads, device=device) * 3 - 0.01,
        d=torch.randn(num_heads, device=device),
        dt_bias=torch.randn(num_heads, device=device) - 1,
        num_groups=groups,
        **limits,
    )


def _doubled(weights: SsdWeights) -> SsdWeights:
    return replace(
        weights, a=weights.a.double(), d=weights.d.double(), dt_bias=weights.dt_bias.double()
    )


def _close_for(value: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error = (value.double() - expected.double()).abs().max()
    limit = TOLERANCE[dtype] * max(1.0, float(expected.abs().max()))
    assert not error.isnan() and float(error) <= limit, f"{float(error):.3g} exceeds {limit:.3g}"


@pytest.mark.parametrize(
    ("num_heads", "head_dim", "state_size", "groups", "state_dtype", "tiles_each", "of_graph"),
    [
        (1, 1, 1, 1, torch.float32, 0, False),
        (3, 20, 7, 1, torch.bfloat16, 1, False),
        (4, 64, 40, 2, torch.float32, 0, False),
        (2, 17, 128, 2, torch.float32, 2, False),
        # In a graph rows are others, not sizes; whole and in segments.
        (3, 20, 7, 1, torch.bfloat16, 1, True),
        (4, 64, 40, 2, torch.float32, 0, True),
        (2, 17, 128, 2, torch.float32, 2, True),
    ],
)
def test_ssd(
    of_graph: bool,
    num_heads: int,
    head_dim: int,
    state_size: int,
    groups: int,
    state_dtype: torch.dtype,
    tiles_each: int,
    device: torch.device,
    dtype: torch.dtype,
    poisoned: Poisoned,
) -> None:
    """A step of single tokens, padding among them, of rows that begin and that go on, with a state
    kept in the middle of a tile, and of padding behind; rows whole or in segments."""
    width = num_heads * head_dim + 2 * groups * state_size
    single_slots, single_positions = [5, NO_SLOT, 0], [9, 0, 0]
    lengths, slots, positions = [1, 70, 129, 3], [1, 2, 6, 8], [0, 7, 0, 64]
    kept = [Kept(1, 33, 7), Kept(2, 64, 4)]
    starts = np.cumsum([3, *lengths])
    num_tokens, num_padding = int(starts[-1]) + 6, 6
    weights = _weights(num_heads, groups, device, dt_scale=0.7, dt_min=0.1, dt_max=1.5)
    x = torch.randn(num_tokens, width + 3, device=device).to(dtype)[:, :width]
    dt = torch.randn(num_tokens, num_heads + 1, device=device).to(dtype)[:, :num_heads]
    state = torch.randn(_SLOTS + 1, num_heads, _LAYERS, head_dim, state_size, device=device)
    state = state.to(state_dtype)
    cut_rows, tiles = state_tiles(starts.tolist(), positions, slots, kept)
    num_more = 2 if of_graph else 0
    if of_graph:
        cut_rows = np.concatenate((cut_rows, np.array([NO_ROW] * 2, np.int32)))
        tiles = np.concatenate((tiles, np.array([NO_TILE] * 5, np.int32)))
    plan = DeviceStatePlan(
        torch.tensor(single_slots + [NO_SLOT] * num_more, device=device),
        torch.tensor(single_positions + [7] * num_more, dtype=torch.int32, device=device),
        3 + num_more,
        torch.from_numpy(cut_rows).to(device),
        torch.from_numpy(tiles).to(device),
        0 if of_graph else num_padding,
        has_kept=True,
        shared={} if of_graph else None,
    )
    expected_state, before = state.double().cpu(), state.clone()
    whole = StatePlan(
        np.array([0, 1, 2, *starts]),
        np.array([*single_positions, *positions]),
        np.array([*single_slots, *slots]),
        [Kept(each.row + 3, each.num_tokens, each.slot) for each in kept],
    )
    wide = _doubled(_weights_on(weights, torch.device("cpu")))
    expected = ssd_reference(x.double().cpu(), dt.double().cpu(), wide, expected_state, 1, whole)
    out = poisoned(num_tokens, num_heads, head_dim, dtype=dtype)
    if of_graph:
        out = plan.make_out(x, num_heads, head_dim)
    config = ScanConfig(16, tiles_each=tiles_each)
    own = None if of_graph else out
    assert ssd(x, dt, weights, state, 1, plan, out=own, config=config) is out
    real = [0, *range(2, num_tokens)]
    _close_for(out[real].cpu(), expected[real], dtype)
    assert not out[1].any() and not out[-num_padding:].any()
    touched = [5, 0, 1, 2, 6, 8, 7, 4]
    coarsest = max((dtype, state_dtype), key=lambda each: TOLERANCE[each])
    _close_for(state[touched, :, 1].cpu(), expected_state[touched, :, 1], coarsest)
    # Nothing else changed: not the other layer, the other slots, nor the zero slot.
    state[touched, :, 1] = before[touched, :, 1]
    assert torch.equal(state, before)


def _weights_on(weights: SsdWeights, device: torch.device) -> SsdWeights:
    return replace(
        weights,
        a=weights.a.to(device),
        d=weights.d.to(device),
        dt_bias=weights.dt_bias.to(device),
    )


def test_segments_run_in_any_order(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last segment of a row writes the slot that the first one begins with: on a GPU nothing
    says which program comes first. Here they come backwards."""
    num_heads, head_dim, state_size, slots = 1, 5, 6, [1, 0, 3]
    starts = [0, 129, 150, 290]
    weights = _weights(num_heads, 1, device)
    x = torch.randn(starts[-1], num_heads * head_dim + 2 * state_size, device=device)
    dt = torch.randn(starts[-1], num_heads, device=device)
    cut = state_tiles(starts, [9, 5, 64], slots, [Kept(2, 100, 4)])
    rows, tiles = (torch.from_numpy(each).to(device) for each in cut)
    none = torch.zeros(0, dtype=torch.int32, device=device)
    plan = DeviceStatePlan(none.long(), none, 0, rows, tiles, has_kept=True)
    before = torch.randn(6, num_heads, 1, head_dim, state_size, device=device)

    def scan(each: int) -> tuple[Tensor, Tensor]:
        state = before.clone()
        return ssd(x, dt, weights, state, 0, plan, config=ScanConfig(16, tiles_each=each)), state

    expected = scan(0)
    if device.type == "cpu":
        builder = interpreter.interpreter_builder
        usual = builder.set_grid_idx

        def backwards(*place: int) -> None:
            usual(*(size - 1 - each for size, each in zip(builder.grid_dim, place, strict=True)))

        monkeypatch.setattr(builder, "set_grid_idx", backwards)
    for given, wanted in zip(scan(1), expected, strict=True):
        _close_for(given.cpu(), wanted.cpu(), torch.float32)


def test_bits_do_not_depend_on_the_step() -> None:
    """Of the reference in float32, however a sequence is cut and whatever else is there; a slot of
    16 bits rounds behind every token alike."""
    num_heads, head_dim, state_size, num_tokens = 3, 10, 11, 75
    weights = _weights(num_heads, 1, torch.device("cpu"))
    x = torch.randn(num_tokens + 1, num_heads * head_dim + 2 * state_size)
    dt = torch.randn(num_tokens + 1, num_heads)

    def run(cuts: list[int], dtype: torch.dtype, others: int) -> tuple[Tensor, Tensor]:
        state = torch.full((4, num_heads, 1, head_dim, state_size), 9.0).to(dtype)
        given = []
        for start, end in zip(cuts[:-1], cuts[1:], strict=True):
            own = list(range(start, end))
            tokens = [num_tokens] * others + own
            plan = StatePlan(
                np.array([*range(others + 1), others + len(own)]),
                np.array([0] * others + [start]),
                np.array([2, 3][:others] + [1]),
            )
            given.append(ssd_reference(x[tokens], dt[tokens], weights, state, 0, plan)[others:])
        return torch.cat(given), state[1].clone()

    for dtype in (torch.float32, torch.bfloat16):
        whole = run([0, num_tokens], dtype, 0)
        for cuts in ([0, 1, 2, 40, 75], list(range(76)), [0, 64, 75]):
            for others in (0, 2):
                given = run(cuts, dtype, others)
                assert all(map(torch.equal, given, whole))


def test_32k_tokens_do_not_drift(device: torch.device) -> None:
    """Over 32,768 tokens kernels are as near to float64 as the reference in float32 is, in either
    form; in the interpreter over as many as there is time for."""
    num_tokens = 32768
    steps, in_tiles = (num_tokens, num_tokens) if device.type == "cuda" else (200, 2048)
    num_heads, head_dim, state_size = 1, 5, 6
    weights = _weights(num_heads, 1, device)
    # Hardly anything is forgotten.
    weights = replace(weights, a=weights.a * 1e-3)
    x = torch.randn(num_tokens, head_dim + 2 * state_size, device=device)
    dt = torch.randn(num_tokens, num_heads, device=device)
    on_cpu, cpu = _weights_on(weights, torch.device("cpu")), torch.device("cpu")

    def reference(form: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
        state = torch.zeros(2, num_heads, 1, head_dim, state_size, dtype=dtype)
        own = _doubled(on_cpu) if dtype == torch.float64 else on_cpu
        plan = StatePlan(np.array([0, num_tokens]), np.array([0]), np.array([0]))
        return form(x.to(cpu, dtype), dt.to(cpu, dtype), own, state, 0, plan)

    truth = reference(ssd_reference, torch.float64)

    def error(given: Tensor) -> float:
        return float((given.double().cpu() - truth[: len(given)]).abs().max())

    own = error(reference(ssd_reference, torch.float32))
    assert own < 1e-4 * float(truth.abs().max())
    assert error(reference(ssd_in_chunks, torch.float32)) <= 2 * own
    state = torch.zeros(2, num_heads, 1, head_dim, state_size, device=device)
    positions = torch.arange(steps, dtype=torch.int32, device=device)
    slots, none = torch.zeros(1, dtype=torch.int64, device=device), positions[:0]
    given = [
        ssd(
            x[i : i + 1], dt[i : i + 1], weights, state, 0, DeviceStatePlan(slots, positions[i:], 1)
        )
        for i in range(steps)
    ]
    assert error(torch.cat(given)) <= 2 * own
    rows, tiles = (
        torch.from_numpy(each).to(device) for each in state_tiles([0, in_tiles], [0], [0])
    )
    plan = DeviceStatePlan(slots, none, 0, rows, tiles)
    assert error(ssd(x[:in_tiles], dt[:in_tiles], weights, state, 0, plan)) <= 2 * own


@pytest.mark.parametrize(("num_rows", "size", "group"), [(1, 1, 1), (3, 90, 30), (70, 40, 40)])
@pytest.mark.parametrize("form", ["gated first", "normalised first", "not normalised"])
def test_gated_norm(
    num_rows: int,
    size: int,
    group: int,
    form: str,
    device: torch.device,
    dtype: torch.dtype,
    poisoned: Poisoned,
    assert_close: Check,
) -> None:
    x, gate = ((torch.randn(num_rows, size + 3, device=device) * 2).to(dtype) for _ in range(2))
    norm = GatedNorm(
        None if form == "not normalised" else torch.rand(size, device=device) + 0.5,
        group,
        1e-5,
        norms_first=form == "normalised first",
        gate_scale=0.3,
    )
    x, gate = x[:, :size], gate[:, 3:]
    out = poisoned(num_rows, size, dtype=dtype)
    assert gated_norm(x, gate, norm, out=out) is out
    expected = gated_norm_reference(x.double(), gate.double(), norm)
    assert_close(out, expected)
    assert_close(gated_norm_reference(x, gate, norm), expected)
    assert gated_norm(x[:0], gate[:0], norm).shape == (0, size)
