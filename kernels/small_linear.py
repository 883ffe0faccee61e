"""Products with weights of few bits, read as they are stored.

    number = code · scale + offset

Codes are multiplied as they are, which 16 bits hold exactly; a run's sum is scaled in float32. So
nothing is rounded but the result. Few rows take one pass over the codes, in three ways: those that
kernels/streamed_linear.py takes go there; of others, one row or two are multiplied without tensor
cores, more with them. For many the weight is expanded, and the library multiplies. All sums have a
fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor

from baton.kernels.overlap import overlap
from baton.kernels.reference import Activation
from baton.kernels.reference_scaled import InputScheme
from baton.kernels.small_fma_jit import small_fma_kernel
from baton.kernels.small_linear_jit import add_splits_kernel, expand_kernel, small_linear_kernel

_streamed: ModuleType | None = None
try:
    from baton.kernels import streamed_linear as _streamed
except (ImportError, AttributeError):
    # A release of Triton may be without the names that it uses.
    pass

MOST_ROWS = 256
"""Of x, that are multiplied by what is stored, whatever that is: those of a decode step."""
_MOST_ROWS_OF_BYTES = 128
"""Bytes with one scale a row are expanded so fast that more rows are better off with the library
(benchmarks/results/kernels_small_h200.json)."""
_PROGRAMS = 264
"""Two for each processor of an H100 or H200."""
_LEAST_STEPS = 8
"""Of a split."""


_FMA_ROWS = 2
"""Of x, that are multiplied without tensor cores."""
_MOST_ROWS_WITH_INPUTS = 1
"""Of them, if each program makes x small for itself."""
_MORE_PROGRAMS = 900
"""Where rows are so few that what splits leave is little to add up."""
_FEW_ROWS = 16


@dataclass(frozen=True, slots=True)
class FewConfig:
    """How a product of so few rows is cut."""

    block_n: int
    block_k: int
    """Bytes of a row of the weight: best 16 for each thread."""
    num_warps: int
    num_stages: int = 1


@dataclass(frozen=True, slots=True)
class SmallWeight:
    """[N, K], on the device that computes."""

    codes: Tensor
    """int8 or float8 [N, K]; of four bits uint8 [N, K / 2]: a byte has, plus 8, codes of columns
    k (its lower half) and k + K / 2"""
    scale: Tensor
    """float32 [N, groups]; where blocks share them [N / rows_per_scale, groups]; after `by_groups`
    those of a group are neighbours"""
    offset: Tensor | None
    """float32 [N, groups], with scale's strides"""
    num_in: int
    columns: Tensor | None = None
    """int64 [K]: which of x's columns stands where; None: they are in order."""
    rows_per_scale: int = 1
    """More than one: for products whose inputs are made small, too (kernels/scaled_linear.py)."""

    @property
    def num_out(self) -> int:
        return self.codes.shape[0]

    @property
    def is_packed(self) -> bool:
        return self.codes.dtype == torch.uint8

    @property
    def num_bytes(self) -> int:
        tensors = (self.codes, self.scale, self.offset, self.columns)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def takes(num_out: int, num_in: int, num_groups: int, *, is_packed: bool) -> bool:
    """Whether there is a kernel for so many equal runs of a row."""
    if num_in % num_groups or (is_packed and num_in % 2):
        return False
    if num_groups == 1:
        return True
    size = num_in // num_groups
    # Each half of a row has whole runs.
    return size % 16 == 0 and (not is_packed or num_groups % 2 == 0)


def pack_nibbles(codes: Tensor) -> Tensor:
    """int8 [N, K], from −8 to 7 → uint8 [N, K / 2], as `SmallWeight` has them."""
    low, high = (codes + 8).to(torch.uint8).chunk(2, 1)
    return (low | (high << 4)).contiguous()


def small_linear(
    x: Tensor,
    weight: SmallWeight,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    activation: Activation | None = None,
    inputs: InputScheme | None = None,
    scale: float = 1.0,
    out: Tensor | None = None,
    split_k: int | None = None,
    config: FewConfig | None = None,
    pdl: bool = False,
) -> Tensor:
    """f((norm(x) · weightᵀ + bias) · scale) + residual, summed in float32 and rounded once.

    Args:
        x: [M, K], M up to about 256, of 16 or 32 bits; rows may be strided.
        bias: [N].
        norm_weight: [K], of any float dtype; if given, norm is RMSNorm with it and `eps`. Where
            `takes_norm` only.
        residual: [M, N]; rows may be strided.
        activation: f(gate, up) = activation(gate) · up, N' = N / 2; without it f does nothing.
            Where `takes_activation` only, and with neither bias, nor scale, nor residual.
        inputs: how norm(x) is made small first. Where `takes_norm` only.
        out: [M, N'], may be `residual`, not x; rows may be strided.
        split_k: programs that share the columns of a tile; a guess if not given.
        config: of few rows, how; what was measured if not given.
        pdl: launch while the kernel before still runs; weights must not come from it.

    Returns:
        out, or a new tensor [M, N'] of x's dtype.
    """
    rows, size_k = x.shape
    size_n = weight.num_out // (1 if activation is None else 2)
    assert size_k == weight.num_in and x.stride(1) == 1
    if out is None:
        out = torch.empty((rows, size_n), dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    if weight.columns is not None:
        assert norm_weight is None
        x = x.index_select(1, weight.columns)
    assert activation is None or (bias is None and residual is None and scale == 1)
    is_free = config is None and split_k is None
    if is_free and _streamed is not None and _streams(rows, weight, x.dtype, inputs):
        _streamed.streamed_linear(
            x,
            weight,
            out,
            bias=bias,
            norm_weight=norm_weight,
            eps=eps,
            residual=residual,
            activation=activation,
            inputs=inputs,
            scale=scale,
            pdl=pdl,
        )
        return out
    ends: dict[str, Any] = {
        "bias_ptr": bias,
        "residual_ptr": residual,
        "out_ptr": out,
        "rows": rows,
        "size_n": size_n,
        "residual_stride": 0 if residual is None else residual.stride(0),
        "out_stride": out.stride(0),
        # Without a scale the kernel has none.
        "scale": None if scale == 1 else scale,
        **overlap(x, pdl=pdl),
    }
    if config is None and split_k is None and x.element_size() == 2:
        config = few_config(rows, weight)
    if config is not None:
        ends |= {"norm_ptr": norm_weight, "eps": eps, "ACTIVATION": activation}
        _multiply_few(x, weight, inputs, ends, config)
    else:
        assert norm_weight is None and activation is None and inputs is None
        _multiply(x, weight, ends, split_k)
    return out


def by_groups(weight: SmallWeight, dtype: torch.dtype) -> SmallWeight:
    """The same, for x of `dtype`: where kernels/streamed_linear.py multiplies it, scales of a group
    are neighbours. A step of that takes one of each of a tile's rows, and where rows are apart,
    each is a sector of memory by itself."""
    if not weight.is_packed or weight.scale.shape[1] == 1:
        return weight
    if not all(_streams(rows, weight, dtype, None) for rows in (1, 2)):
        return weight
    scale, offset = (
        None if each is None else each.t().contiguous().t()
        for each in (weight.scale, weight.offset)
    )
    assert scale is not None
    return replace(weight, scale=scale, offset=offset)


def most_rows(weight: SmallWeight) -> int:
    """Of x, up to which reading what is stored takes less time than expanding it."""
    return MOST_ROWS if weight.is_packed or _group(weight) else _MOST_ROWS_OF_BYTES


def takes_norm(
    rows: int, weight: SmallWeight, dtype: torch.dtype, inputs: InputScheme | None = None
) -> bool:
    """Whether the norm of x is part of the product, and that x is made small."""
    if weight.columns is not None or (inputs is not None and rows > _MOST_ROWS_WITH_INPUTS):
        return False
    if _streams(rows, weight, dtype, inputs):
        # In front of four bits x is multiplied by the norm's weight before what is left of the
        # norm, in x's own type, and float16 may have no room for that.
        return rows == 1 and (inputs is not None or dtype == torch.bfloat16)
    return dtype.itemsize == 2 and few_config(rows, weight) is not None


def takes_activation(
    rows: int, weight: SmallWeight, dtype: torch.dtype, inputs: InputScheme | None = None
) -> bool:
    """Whether gate and up are multiplied, and what becomes of them, in one."""
    return takes_norm(rows, weight, dtype, inputs) or _streams(rows, weight, dtype, inputs)


def _streams(
    rows: int, weight: SmallWeight, dtype: torch.dtype, inputs: InputScheme | None
) -> bool:
    """Whether kernels/streamed_linear.py takes it."""
    return (
        _streamed is not None and _streamed.streamed_config(rows, weight, dtype, inputs) is not None
    )


def few_config(rows: int, weight: SmallWeight) -> FewConfig | None:
    """What was fastest on an H200, over llama-8b's products; None: tensor cores were, or rows are
    not made of 16 bytes of one group each."""
    group = _group(weight)
    if rows > _FMA_ROWS or weight.codes.shape[1] % 16 or group % 16:
        return None
    if weight.is_packed:
        return FewConfig(4, 1024, 2)
    is_float = weight.codes.dtype == torch.float8_e4m3fn
    if rows == 1 and (group or is_float):
        return FewConfig(4, 2048, 4)
    return None if group else FewConfig(8, 2048, 4, num_stages=2)


def _multiply_few(
    x: Tensor,
    weight: SmallWeight,
    inputs: InputScheme | None,
    ends: dict[str, Any],
    config: FewConfig,
) -> None:
    assert weight.scale.is_contiguous()
    rows, size_n, width = len(x), ends["size_n"], weight.codes.shape[1]
    block_k = min(config.block_k, max(16, triton.next_power_of_2(width)))
    small_fma_kernel[(triton.cdiv(size_n, config.block_n),)](
        x,
        **_stored(weight),
        **ends,
        size_k=weight.num_in,
        x_stride=x.stride(0),
        given_ptr=None if inputs is None else inputs.scale,
        SCALE_ROWS=weight.rows_per_scale,
        INPUTS=None if inputs is None else "group" if inputs.group else "row",
        MOST=0.0 if inputs is None else inputs.largest_code,
        BLOCK_M=triton.next_power_of_2(rows),
        BLOCK_N=config.block_n,
        BLOCK_K=block_k,
        EVEN=size_n % config.block_n == 0 and width % block_k == 0,
        STAGES=config.num_stages,
        ASM=x.is_cuda,
        num_warps=config.num_warps,
    )


def _multiply(x: Tensor, weight: SmallWeight, ends: dict[str, Any], split_k: int | None) -> None:
    rows, size_k = x.shape
    size_n, group = weight.num_out, _group(weight)
    block_k = _block_k(group, x.element_size(), weight.is_packed)
    block_m = min(64, max(16, triton.next_power_of_2(rows)))
    block_n = 64
    num_steps = triton.cdiv(size_k // 2 if weight.is_packed else size_k, block_k)
    tiles = triton.cdiv(size_n, block_n), triton.cdiv(rows, block_m)
    # Of all that are more than 64 the same: whatever is warmed up is all that there is.
    most = _MORE_PROGRAMS if rows <= _FEW_ROWS else _PROGRAMS
    split_k = split_k or _splits(tiles[0] * min(2, tiles[1]), num_steps, most)
    steps = triton.cdiv(num_steps, split_k)
    partial = None
    if split_k > 1:
        partial = torch.empty((split_k, rows, size_n), dtype=torch.float32, device=x.device)
    ends = {**ends, "partial_ptr": partial, "SPLIT_K": split_k}
    small_linear_kernel[(*tiles, split_k)](
        x,
        **_stored(weight),
        **_scale_strides(weight),
        **ends,
        size_k=size_k,
        x_stride=x.stride(0),
        steps_per_split=steps,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        EVEN=size_n % block_n == 0 and weight.codes.shape[1] == steps * split_k * block_k,
        ASM=x.is_cuda,
        num_warps=4,
        num_stages=4,
    )
    if split_k > 1:
        add_splits_kernel[(triton.cdiv(size_n, 512), rows)](**ends, BLOCK_N=512, num_warps=4)


def expand(weight: SmallWeight, dtype: torch.dtype) -> Tensor:
    """The numbers [N, K], of columns as x has them, if these are put in order."""
    out = torch.empty((weight.num_out, weight.num_in), dtype=dtype, device=weight.codes.device)
    grid = triton.cdiv(weight.num_out, 16), triton.cdiv(weight.num_in, 128)
    expand_kernel[grid](
        **_stored(weight),
        **_scale_strides(weight),
        out_ptr=out,
        size_n=weight.num_out,
        size_k=weight.num_in,
        BLOCK_N=16,
        BLOCK_K=128,
        num_warps=4,
    )
    return out


def _stored(weight: SmallWeight) -> dict[str, Any]:
    is_float = weight.codes.dtype == torch.float8_e4m3fn
    return {
        "codes_ptr": weight.codes.view(torch.uint8) if is_float else weight.codes,
        "scale_ptr": weight.scale,
        # A pointer that is not read.
        "offset_ptr": weight.scale if weight.offset is None else weight.offset,
        "num_groups": weight.scale.shape[1],
        "GROUP": _group(weight),
        "IS_PACKED": weight.is_packed,
        "IS_FLOAT": is_float,
        "HAS_OFFSET": weight.offset is not None,
    }


def _scale_strides(weight: SmallWeight) -> dict[str, int]:
    scale_stride, group_stride = weight.scale.stride()
    return {"scale_stride": scale_stride, "group_stride": group_stride}


def _group(weight: SmallWeight) -> int:
    """Numbers with one scale; 0: all of a row."""
    if weight.rows_per_scale > 1:
        return weight.rows_per_scale
    num_groups = weight.scale.shape[1]
    return 0 if num_groups == 1 else weight.num_in // num_groups


def _block_k(group: int, itemsize: int, is_packed: bool) -> int:
    """Columns of a step, all of one group."""
    most = 32 if itemsize == 4 else 64 if is_packed else 128
    return most if not group else min(most, group & -group)


def _splits(num_tiles: int, num_steps: int, most: int) -> int:
    split = 1
    while 2 * split * num_tiles <= most and num_steps // (2 * split) >= _LEAST_STEPS:
        split *= 2
    return split
