"""What `python -m benchmarks.gpu.kernels` measures of layers with a gated delta rule, at the sizes
of qwen3.5-35b-a3b: a whole mixer beside its projections alone."""

# ruff: noqa: B023

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.gpu.gpu_timing import Point

_HIDDEN, _KEY_HEADS, _EACH, _DIM, _KERNEL = 2048, 16, 2, 128, 4
_VALUE_HEADS = _KEY_HEADS * _EACH
_UNITS = (_DIM, _DIM, _EACH * _DIM)
_CHANNELS, _VALUES = _KEY_HEADS * sum(_UNITS), _VALUE_HEADS * _DIM
_STEPS = ([8192], [1024] * 8, [2048])
"""Lengths of a step's chunks. Steps of rows of one token are the engine's to measure: here their
weights would be in the cache."""


def delta_mixer() -> Iterator[Point]:
    """Norm, projection, convolution, rule, gated norm and projection."""
    from baton.kernels.causal_conv import causal_conv
    from baton.kernels.gated_delta import gated_delta
    from baton.kernels.gated_norm import gated_norm
    from baton.kernels.reference_conv import Conv, conv_places
    from baton.kernels.reference_delta import DeltaGates
    from baton.kernels.reference_gated_norm import GatedNorm
    from baton.kernels.rms_norm import rms_norm
    from baton.kernels.state_plan import DeviceStatePlan, state_tiles

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, dtype=dtype, device="cuda")

    def plan_of(step: list[int]) -> DeviceStatePlan:
        none = torch.zeros(1, dtype=torch.int64, device="cuda")
        starts = [sum(step[:number]) for number in range(len(step) + 1)]
        rows, tiles = state_tiles(starts, [0] * len(step), list(range(len(step))))
        of_rows, of_tiles = torch.from_numpy(rows).cuda(), torch.from_numpy(tiles).cuda()
        return DeviceStatePlan(none, none.int(), 0, of_rows, of_tiles)

    conv = Conv(random(_KERNEL, _CHANNELS), None, conv_places(_KEY_HEADS, _UNITS).cuda())
    gates = DeltaGates(random(_VALUE_HEADS).abs(), random(_VALUE_HEADS))
    before = random(33, _KEY_HEADS, 1, _KERNEL - 1, sum(_UNITS))
    states = random(33, _KEY_HEADS, 1, _EACH, _DIM, _DIM)
    norm = GatedNorm(torch.ones(_VALUES, device="cuda"), _DIM, 1e-6, norms_first=True)
    weight = torch.ones(_HIDDEN, device="cuda")
    num_out = _CHANNELS + _VALUES + 2 * _VALUE_HEADS
    first = random(num_out, _HIDDEN, dtype=torch.bfloat16) * _HIDDEN**-0.5
    second = random(_HIDDEN, _VALUES, dtype=torch.bfloat16) * _VALUES**-0.5
    sizes = [_CHANNELS, _VALUES, _VALUE_HEADS, _VALUE_HEADS]
    for step in _STEPS:
        num_tokens, num_rows = sum(step), len(step)
        x, plan = random(num_tokens, _HIDDEN, dtype=torch.bfloat16), plan_of(step)

        def mixer(_: int) -> object:
            projected = rms_norm(x, weight, 1e-6) @ first.t()
            qkv, gate, strength, decay = torch.split(projected, sizes, 1)
            qkv = causal_conv(qkv, conv, before, 0, plan)
            mixed = gated_delta(qkv, strength, decay, gates, states, 0, plan)
            return gated_norm(mixed.flatten(1), gate, norm) @ second.t()

        def projections(_: int) -> object:
            return (x @ first.t())[:, :_VALUES] @ second.t()

        state_bytes = 2 * num_rows * (before[0].nbytes + states[0].nbytes)
        num_weights = _HIDDEN * (num_out + _VALUES)
        yield Point(
            f"{num_tokens} tokens, {num_rows} rows",
            mixer,
            num_bytes=2 * num_weights + state_bytes + 4 * num_tokens * _HIDDEN,
            flop=2 * num_tokens * num_weights,
            num_sets=1,
            library={"projections alone": projections},
        )
