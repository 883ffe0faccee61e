"""Makes plain weights small while they are loaded (`--quantization`): the nearest codes.

fp8     8-bit floats, a scale for each row
int8    whole numbers, a scale for each row
int4    whole numbers, a scale for each run of 128, 64 or 32 of a row
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from baton.shared.engine.quantised.weight import QuantisedWeight

Method = Literal["fp8", "int8", "int4"]
_RUNS = (128, 64, 32)
_LARGEST_FP8 = 448.0


def quantise(weight: Tensor, method: Method) -> QuantisedWeight | None:
    """Of float32 [out, in], or on paper; None: no run of int4's divides its rows."""
    num_out, num_in = weight.shape
    run = num_in
    if method == "int4":
        fitting = [each for each in _RUNS if num_in % each == 0]
        if not fitting:
            return None
        run = fitting[0]
    if weight.is_meta:
        dtype = torch.float8_e4m3fn if method == "fp8" else torch.int8
        bits = 4 if method == "int4" else 8
        return QuantisedWeight.on_paper(num_out, num_in, bits, num_in // run, dtype)
    runs = weight.view(num_out, -1, run)
    largest = runs.abs().amax(-1)
    if method == "fp8":
        scale = _not_zero(largest / _LARGEST_FP8)
        small = (runs / scale[..., None]).to(torch.float8_e4m3fn)
        return QuantisedWeight(small.view(num_out, num_in), scale, 8)
    if method == "int8":
        scale = _not_zero(largest / 127)
        return QuantisedWeight(_nearest(runs, scale, 8).view(num_out, num_in), scale, 8)
    # The number that is farthest from zero becomes −8: of 16 codes one more is below zero. A scale
    # that loses less, because it cuts this number, was tried, and cost SmolLM2 more.
    farthest = runs.gather(-1, runs.abs().argmax(-1, keepdim=True))[..., 0]
    scale = _not_zero(farthest / -8)
    return QuantisedWeight(_nearest(runs, scale, 4).view(num_out, num_in), scale, 4)


def _not_zero(scale: Tensor) -> Tensor:
    """Of runs of nothing but zeros it does not matter."""
    return torch.where(scale == 0, 1.0, scale)


def _nearest(runs: Tensor, scale: Tensor, num_bits: int) -> Tensor:
    half = 2 ** (num_bits - 1)
    return (runs / scale[..., None]).round_().clamp_(-half, half - 1).to(torch.int8)
