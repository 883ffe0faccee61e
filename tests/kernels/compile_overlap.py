"""What kernels read before those in front of them have ended, of capability 9.0.

    python -m tests.kernels.compile_overlap

Of kernels that let others in before they wait, and of those that may be behind them. Prints, as
JSON, by kernel, the pointers and tensors whose memory it touches before it waits. To be run without
TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from baton.kernels import streamed_linear
from baton.kernels.experts import ExpertWeights, experts
from baton.kernels.hopper_scaled import hopper_scaled, hopper_scaled_gated
from baton.kernels.linear_table import Config
from baton.kernels.quantised_rows import quantise_known, quantise_rows
from baton.kernels.reference_experts import Routes
from baton.kernels.reference_scaled import InputScheme, QuantisedRows
from baton.kernels.rms_norm import rms_norm, rms_norm_add
from baton.kernels.scaled_linear import scaled_linear
from baton.kernels.scaled_table import HopperConfig, ScaledConfig
from baton.kernels.skinny_linear import skinny_linear
from baton.kernels.small_linear import FewConfig, SmallWeight, small_linear
from tests.kernels.compiled import Compiled, on_gpu, recording

_NUM_OUT, _NUM_IN = 8192, 1024


def compile_all() -> list[Compiled]:
    streamed_linear._runs_on = lambda _: True  # type: ignore[assignment]
    with recording(90) as kernels:
        _launch()
    with recording(90) as of_experts:
        routes = Routes(_empty(2, 2, dtype=torch.int32), _empty(2, 2, dtype=torch.float32))
        weights = ExpertWeights(_empty(8, 512, _NUM_IN), _empty(8, _NUM_IN, 256), None, None)
        experts(_empty(2, _NUM_IN), routes, weights, "silu", pdl=True)
    # What is behind the first of these is not behind a norm.
    return [*kernels, of_experts[0]]


def _launch() -> None:
    ahead: dict[str, Any] = {"pdl": True}
    x, gain = _empty(2, _NUM_IN), _empty(_NUM_IN)
    residual = _empty(2, _NUM_OUT)
    into: dict[str, Any] = {"residual": residual, "out": residual, **ahead}
    normed: dict[str, Any] = {"norm_weight": gain, "eps": 1e-5}
    scheme = InputScheme(scale=_empty(1, dtype=torch.float32))
    # What lets others in early.
    rms_norm(x, gain, 1e-5, residual=x, **ahead)
    quantise_rows(x, scheme, **normed, is_early=True, **ahead)
    quantise_known(x, _empty(2, 8, dtype=torch.int32), scheme, **ahead)
    # What may be behind it.
    rms_norm_add(x, gain, 1e-5, x, **ahead)
    codes = _empty(2, _NUM_IN, dtype=torch.float8_e4m3fn)
    rows = QuantisedRows(codes, _empty(1, 2, dtype=torch.float32).t())
    weight, bias = _weight(is_packed=False), _empty(_NUM_OUT)
    hopper_scaled(rows, weight, bias, config=HopperConfig(16, 64, 2, split_k=2), **into)
    hopper_scaled_gated(rows, weight, "silu", config=HopperConfig(16, 64, 2, split_k=2), **ahead)
    for is_bulk in (False, True):
        config = ScaledConfig(16, 64, 128, split_k=2, is_bulk=is_bulk)
        scaled_linear(rows, weight, bias, config=config, **into)
    for packed in (_weight(is_packed=True), _weight(is_packed=True, has_offset=True)):
        small_linear(x, packed, bias, **into)
        small_linear(x[:1], packed, **normed, **ahead)
    small_linear(x[:1], weight, inputs=scheme, **normed, **ahead)
    small_linear(x, weight, bias, split_k=2, **into)
    small_linear(x, weight, **normed, config=FewConfig(4, 1024, 2), **ahead)
    wide = _empty(_NUM_OUT, _NUM_IN)
    for variant in ("fma", "dot", "tma"):
        how = Config(variant, 16, 64, split_k=1 if variant == "fma" else 2, prefetch=2)
        skinny_linear(x, wide, bias, **normed, config=how, **into)


def _weight(*, is_packed: bool, has_offset: bool = False) -> SmallWeight:
    if not is_packed:
        codes = _empty(_NUM_OUT, _NUM_IN, dtype=torch.float8_e4m3fn)
        return SmallWeight(codes, _empty(_NUM_OUT, 1, dtype=torch.float32), None, _NUM_IN)
    codes = _empty(_NUM_OUT, _NUM_IN // 2, dtype=torch.uint8)
    scale = _empty(_NUM_OUT, _NUM_IN // 128, dtype=torch.float32)
    return SmallWeight(codes, scale, scale if has_offset else None, _NUM_IN)


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return on_gpu(torch.empty(shape, dtype=dtype))


def report(kernels: list[Compiled]) -> Iterator[tuple[str, list[str]]]:
    names = dict.fromkeys(each.name for each in kernels)
    for name in names:
        found = set().union(*(each.read_ahead for each in kernels if each.name == name))
        yield name, sorted(found)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(dict(report(compile_all())), indent=1) + "\n")
