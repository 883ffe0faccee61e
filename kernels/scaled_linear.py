"""Products of codes with codes, whose scales come behind: weights and inputs are both small.

    x · weightᵀ = Σ code · code, · scale of the row · scale of the column

of 8-bit floats or whole numbers, on tensor cores that take them. All sums have a fixed order.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from baton.kernels.library_product import add_product
from baton.kernels.overlap import overlap
from baton.kernels.quantised_rows import quantise_known
from baton.kernels.reference import Activation
from baton.kernels.reference_scaled import GROUP, InputScheme, QuantisedRows
from baton.kernels.scaled_linear_jit import scaled_linear_kernel
from baton.kernels.scaled_table import (
    MANY_ROWS,
    ROWS,
    HopperConfig,
    ScaledConfig,
    choose,
    choose_gated,
    choose_hopper,
    guess,
)
from baton.kernels.shared_memory import shared_bytes
from baton.kernels.skinny_linear import linear_work
from baton.kernels.small_linear import SmallWeight

_hopper: ModuleType | None = None
try:
    from baton.kernels import hopper_scaled as _hopper
except (ImportError, AttributeError):
    # A release of Triton may be without the names that it uses.
    pass

LEAST_COLUMNS = 32
"""A weight's columns are a multiple of it: as many as tensor cores take at once."""
_LIBRARYS = 16
"""It takes no other multiples of rows and columns."""
_LIBRARYS_BLOCKS = 4
"""Nor of blocks in a row."""
_OTHER_BYTES = 4096
"""Of shared memory, beside tiles."""


def scaled_linear(
    x: QuantisedRows,
    weight: SmallWeight,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    scale: float = 1.0,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    config: ScaledConfig | None = None,
    pdl: bool = False,
) -> Tensor:
    """(x · weightᵀ + bias) · scale + residual, rounded once.

    Args:
        x: [M, K]; a scale a row, as the weight has, or in groups of as many as the weight's blocks
            have rows.
        bias: [N].
        residual: [M, N]; rows may be strided.
        out: [M, N], may be `residual`; rows may be strided.
        dtype: of a new result.
        pdl: launch while the kernel before still runs; weights must not come from it.

    Returns:
        out, or a new tensor [M, N].
    """
    rows, size_k = x.num_rows, weight.num_in
    size_n, group = weight.num_out, _group(weight)
    assert x.scale.shape[1] == weight.scale.shape[1] and group in (0, GROUP)
    if out is None:
        out = torch.empty((rows, size_n), dtype=dtype, device=x.codes.device)
    if rows == 0:
        return out
    config = config or guess(rows, size_n, size_k) or MANY_ROWS
    # Of whole tiles, and of one group.
    block_k = min(config.block_k, group or config.block_k, size_k & -size_k)
    assert size_k % LEAST_COLUMNS == 0
    num_tiles = triton.cdiv(size_n, config.block_n) * triton.cdiv(rows, config.block_m)
    num_steps = size_k // block_k
    steps = triton.cdiv(num_steps, config.split_k)
    work = linear_work(x.codes.device) if config.split_k > 1 else None
    if work is not None:
        needed = config.split_k * num_tiles * config.block_m * config.block_n
        assert num_tiles <= len(work.arrivals) and needed <= len(work.partials)
    x_tiles, weight_tiles = None, None
    if config.is_bulk:
        x_tiles = _tiles(x.codes, config.block_m, block_k)
        weight_tiles = _tiles(weight.codes, config.block_n, block_k)
    scaled_linear_kernel[(num_tiles, config.split_k)](
        x.codes,
        x_tiles,
        x.scale.t(),
        weight.codes,
        weight_tiles,
        weight.scale,
        bias,
        residual,
        out,
        None if work is None else work.partials,
        None if work is None else work.arrivals,
        rows,
        size_n,
        size_k,
        steps,
        x.scale.stride(1),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        # Without a scale the kernel has none.
        None if scale == 1 else scale,
        GROUP=group,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=block_k,
        SPLIT_K=config.split_k,
        IMPRECISE=None if config.is_fast else min(128, block_k),
        PREFETCH=config.prefetch,
        NUM_THREADS=32 * config.num_warps,
        num_warps=config.num_warps,
        num_stages=_num_stages(config, block_k, x.codes.device),
        **overlap(x.codes, pdl=pdl),
    )
    return out


def _num_stages(config: ScaledConfig, block_k: int, device: torch.device) -> int:
    """As configured, or what the device has room for: the table is that of an H200. Where there is
    less, n stages hold n − 1 of each tile."""
    stage_bytes = (config.block_m + config.block_n) * block_k
    room = (shared_bytes(device) - _OTHER_BYTES) // stage_bytes
    return min(config.num_stages, 1 + room)


def _tiles(codes: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(codes, [*codes.shape], [codes.shape[1], 1], [rows, columns])


def scaled_product(
    x: QuantisedRows,
    weight: SmallWeight,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    scale: float = 1.0,
    dtype: torch.dtype = torch.bfloat16,
    pdl: bool = False,
) -> Tensor:
    """`scaled_linear` into the residual, or by another kernel or the library where that is
    faster."""
    rows, size_k = x.num_rows, weight.num_in
    size_n = weight.num_out
    if _hopper is not None and _hopper.covers(weight, dtype):
        hopper_config = choose_hopper(rows, size_n, size_k)
        if hopper_config is not None:
            product: Tensor = _hopper.hopper_scaled(
                x,
                weight,
                bias,
                residual=residual,
                scale=scale,
                out=residual,
                dtype=dtype,
                config=hopper_config,
                pdl=pdl,
            )
            return product
    config = choose(rows, size_n, size_k, group=_group(weight))
    if config is None and not _librarys(weight, dtype):
        config = guess(rows, size_n, size_k) or MANY_ROWS
    if config is not None:
        return scaled_linear(
            x,
            weight,
            bias,
            residual=residual,
            scale=scale,
            out=residual,
            dtype=dtype,
            config=config,
            pdl=pdl,
        )
    if residual is not None and bias is None and add_product(x, weight, residual, scale=scale):
        return residual
    y = _by_library(x, weight, dtype)
    if bias is not None:
        y += bias
    if scale != 1:
        y *= scale
    return y if residual is None else residual.add_(y)


def reads_ahead(rows: int, weight: SmallWeight, dtype: torch.dtype) -> bool:
    """Whether a product gains by starting long before its inputs are there: it fills all shared
    memory with weights meanwhile."""
    is_there = _hopper is not None and _hopper.covers(weight, dtype)
    return is_there and rows <= ROWS[-1]


def takes_activation(rows: int, weight: SmallWeight, dtype: torch.dtype) -> bool:
    """Whether `scaled_gated` is there for so many rows, and faster."""
    return _gated_config(rows, weight, dtype) is not None


def scaled_gated(
    x: QuantisedRows,
    weight: SmallWeight,
    activation: Activation,
    scheme: InputScheme,
    *,
    dtype: torch.dtype = torch.bfloat16,
    pdl: bool = False,
) -> QuantisedRows:
    """activation(gate) · up, made small, where x · weightᵀ = (gate, up), if `takes_activation`.

    Gate and up, and what becomes of them, are rounded to `dtype`.
    """
    config = _gated_config(x.num_rows, weight, dtype)
    assert _hopper is not None and config is not None
    y, maxima = _hopper.hopper_scaled_gated(
        x, weight, activation, dtype=dtype, config=config, pdl=pdl
    )
    return quantise_known(y, maxima, scheme, pdl=pdl)


def _gated_config(rows: int, weight: SmallWeight, dtype: torch.dtype) -> HopperConfig | None:
    if _hopper is None or not _hopper.covers(weight, dtype):
        return None
    return choose_gated(rows, weight.num_out, weight.num_in)


def _librarys(weight: SmallWeight, dtype: torch.dtype) -> bool:
    is_float = weight.codes.dtype == torch.float8_e4m3fn
    is_whole = weight.num_out % _LIBRARYS == 0 and weight.num_in % _LIBRARYS == 0
    if weight.rows_per_scale > 1:
        is_whole &= weight.scale.shape[1] % _LIBRARYS_BLOCKS == 0
        is_whole = is_whole and _takes_blocks(weight.codes.device)
    return is_float and is_whole and dtype == torch.bfloat16 and weight.codes.is_cuda


@cache
def _takes_blocks(device: torch.device) -> bool:
    """Whether the library multiplies blocks there: of all GPUs those of compute capability 9.0."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _by_library(x: QuantisedRows, weight: SmallWeight, dtype: torch.dtype) -> Tensor:
    has_blocks = weight.rows_per_scale > 1
    product = torch._scaled_mm(
        x.codes,
        weight.codes.t(),
        scale_a=x.scale,
        scale_b=weight.scale.t(),
        out_dtype=dtype,
        use_fast_accum=not has_blocks,
    )
    return product[: x.num_rows]


def _group(weight: SmallWeight) -> int:
    return weight.rows_per_scale if weight.rows_per_scale > 1 else 0
