"""Makes plain weights small while they are loaded (`--quantization`): the nearest codes.

fp8           8-bit floats, a scale for each row; activations likewise, where that is computed
fp8-blocks    8-bit floats, a scale for each block of 128 x 128, and for 128 activations
int8          whole numbers, a scale for each row
int4          whole numbers, a scale for each run of 128, 64 or 32 of a row
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from baton.kernels.reference_scaled import GROUP, InputScheme
from baton.shared.engine.quantised.weight import QuantisedWeight

Method = Literal["fp8", "fp8-blocks", "int8", "int4"]
_RUNS = (128, 64, 32)
_LARGEST_FP8 = 448.0


def quantise(weight: Tensor, method: Method) -> QuantisedWeight | None:
    """Of float32 [out, in], or on paper; None: no run of int4's, or block, divides its rows."""
    num_out, num_in = weight.shape
    run = num_in
    if method == "int4":
        fitting = [each for each in _RUNS if num_in % each == 0]
        if not fitting:
            return None
        run = fitting[0]
    if method == "fp8-blocks":
        if num_in % GROUP:
            return None
        run = GROUP
    inputs = None
    if method in ("fp8", "fp8-blocks"):
        inputs = InputScheme(group=GROUP if method == "fp8-blocks" else 0)
    if weight.is_meta:
        dtype = torch.int8 if inputs is None else torch.float8_e4m3fn
        bits = 4 if method == "int4" else 8
        paper = QuantisedWeight.on_paper(num_out, num_in, bits, num_in // run, dtype)
        return replace(paper, inputs=inputs)
    runs = weight.view(num_out, -1, run)
    largest = runs.abs().amax(-1)
    if method == "fp8-blocks":
        blocks = [
            part.amax(0, keepdim=True).expand_as(part) for part in torch.split(largest, GROUP)
        ]
        largest = torch.cat(blocks)
    if inputs is not None:
        scale = _not_zero(largest / _LARGEST_FP8)
        small = (runs / scale[..., None]).to(torch.float8_e4m3fn)
        return QuantisedWeight(small.view(num_out, num_in), scale, 8, inputs=inputs)
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
