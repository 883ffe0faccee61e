"""Products of 8-bit floats with 8-bit floats, of the rows of a decode step, for compute capability
9.0: what kernels/scaled_linear.py computes, faster.

A step's products are short: before the first weights of one are there, a good part of it could have
been read. So a program asks for weights, as many as it has room for, before the kernel in front of
it has ended, and where it has room for all of them, what is left of the product when its inputs are
there is little more than multiplying. Gluon, in which this is written, is experimental: as with
kernels/hopper_prefill_attention.py, only known releases are used.
"""

from __future__ import annotations

from functools import cache
from math import gcd
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from baton.kernels import hopper_prefill_attention
from baton.kernels.hopper_scaled_jit import hopper_scaled_kernel
from baton.kernels.overlap import overlap
from baton.kernels.reference import Activation
from baton.kernels.reference_scaled import QuantisedRows
from baton.kernels.scaled_table import HopperConfig
from baton.kernels.skinny_linear import linear_work
from baton.kernels.small_linear import SmallWeight

STEP = 128
"""Columns that are copied at a time."""
_LAYOUT: Any = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
_USABLE = hopper_prefill_attention.problem() is None


def covers(weight: SmallWeight, dtype: torch.dtype) -> bool:
    """Whether the kernel is there for the weight, and results of that type."""
    return (
        _USABLE
        and weight.codes.dtype == torch.float8_e4m3fn
        and dtype.itemsize == 2
        and weight.rows_per_scale == 1
        and weight.scale.shape[1] == 1
        and weight.num_in % STEP == 0
        and weight.codes.data_ptr() % 16 == 0
        and _runs_on(weight.codes.device)
    )


@cache
def _runs_on(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def hopper_scaled(
    x: QuantisedRows,
    weight: SmallWeight,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    scale: float = 1.0,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    config: HopperConfig,
    pdl: bool = False,
) -> Tensor:
    """`scaled_linear` where it `covers` the arguments."""
    if out is None:
        out = torch.empty((x.num_rows, weight.num_out), dtype=dtype, device=x.codes.device)
    _launch(x, weight, bias, residual, scale, None, out, None, config, pdl)
    return out


def hopper_scaled_gated(
    x: QuantisedRows,
    weight: SmallWeight,
    activation: Activation,
    *,
    dtype: torch.dtype = torch.bfloat16,
    config: HopperConfig,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """activation(gate) · up, where x · weightᵀ = (gate, up), each rounded before and behind that.

    Returns:
        that, [M, N / 2]; and, as `quantise_known` takes them, the largest magnitudes of its parts,
        int32 [M, parts].
    """
    size_n = weight.num_out // 2
    num_parts = triton.cdiv(size_n, config.block_n)
    out = torch.empty((x.num_rows, size_n), dtype=dtype, device=x.codes.device)
    maxima = torch.empty((x.num_rows, num_parts), dtype=torch.int32, device=x.codes.device)
    _launch(x, weight, None, None, 1.0, activation, out, maxima, config, pdl)
    return out, maxima


def _launch(
    x: QuantisedRows,
    weight: SmallWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: float,
    activation: Activation | None,
    out: Tensor,
    maxima: Tensor | None,
    config: HopperConfig,
    pdl: bool,
) -> None:
    rows, size_n = out.shape
    if rows == 0:
        return
    assert x.scale.shape[1] == 1 and not x.num_padding and weight.num_in % STEP == 0
    # Of fewer, threads would share what they add to the residual.
    assert config.block_m >= 16 and config.block_n >= 16 * config.num_warps
    num_tiles = triton.cdiv(size_n, config.block_n) * triton.cdiv(rows, config.block_m)
    num_steps = weight.num_in // STEP
    steps = triton.cdiv(num_steps, config.split_k)
    run = gcd(config.run, num_steps, steps)
    # What is multiplied while the next steps are asked for keeps its places.
    assert config.places % run == 0 and (run < config.places or not config.is_fast)
    work = linear_work(x.codes.device) if config.split_k > 1 else None
    if work is not None:
        tile_size = config.block_m * config.block_n * (1 if activation is None else 2)
        needed = config.split_k * num_tiles * tile_size
        assert num_tiles <= len(work.arrivals) and needed <= len(work.partials)
    hopper_scaled_kernel[(num_tiles, config.split_k)](
        _tiles(x.codes, config.block_m),
        _tiles(weight.codes, config.block_n),
        x.scale.t(),
        weight.scale,
        bias,
        residual,
        out,
        maxima,
        None if work is None else work.partials,
        None if work is None else work.arrivals,
        rows,
        size_n,
        num_steps,
        steps,
        0 if residual is None else residual.stride(0),
        out.stride(0),
        # Without a scale the kernel has none.
        None if scale == 1 else scale,
        ACTIVATION=activation,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        PLACES=config.places,
        RUN=run,
        SPLIT_K=config.split_k,
        IS_FAST=config.is_fast,
        num_warps=config.num_warps,
        **overlap(x.codes, pdl=pdl),
    )


def _tiles(codes: Tensor, rows: int) -> TensorDescriptor:
    return TensorDescriptor(codes, [*codes.shape], [codes.shape[1], 1], [rows, STEP], _LAYOUT)
