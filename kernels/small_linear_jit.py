"""The kernels of kernels/small_linear.py."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.small_widen_jit import bytes_of, nibbles


@triton.jit
def _scaled_run(
    product, x, scale_ptr, offset_ptr, group, columns, in_n, scale_stride, group_stride,
    HAS_OFFSET: tl.constexpr,
):  # fmt: skip
    """product · scale + offset · sum of x, [columns, rows], of a run of one group."""
    at = columns * scale_stride + group * group_stride
    scale = tl.load(scale_ptr + at, mask=in_n, other=0.0)
    product *= scale[:, None]
    if HAS_OFFSET:
        offset = tl.load(offset_ptr + at, mask=in_n, other=0.0)
        product += offset[:, None] * tl.sum(x.to(tl.float32), 1)[None, :]
    return product


@triton.jit(do_not_specialize=["rows"])
def small_linear_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    offset_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    partial_ptr,
    rows,
    size_n,
    size_k,
    num_groups,
    scale_stride,
    group_stride,
    x_stride,
    residual_stride,
    out_stride,
    scale,
    steps_per_split,
    GROUP: tl.constexpr,
    IS_PACKED: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    EVEN: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile of the product, or one split's part of it. GROUP 0: a row has one scale. EVEN: the
    weight has only whole tiles, and as many for each split. Codes are the left operand, which
    tensor cores take from registers: they widen there."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    in_m, in_n = m < rows, n < size_n
    # Of packed codes a byte has columns k and k + K / 2.
    width = size_k
    if IS_PACKED:
        width = size_k // 2
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    ones = tl.zeros((BLOCK_M,), dtype=tl.float32)
    x_rows = x_ptr + m.to(tl.int64)[:, None] * x_stride
    code_rows = codes_ptr + n.to(tl.int64)[:, None] * width
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    first = split * steps_per_split
    for step in range(first, first + steps_per_split):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        in_k = k < width
        group = 0
        if GROUP:
            group = tl.minimum(step * BLOCK_K // GROUP, num_groups - 1)
        x_mask = in_m[:, None] if EVEN else in_m[:, None] & in_k[None, :]
        x = tl.load(x_rows + k[None, :], mask=x_mask, other=0.0)
        if EVEN:
            codes = tl.load(code_rows + k[None, :])
        else:
            codes = tl.load(
                code_rows + k[None, :],
                mask=in_n[:, None] & in_k[None, :],
                other=0x88 if IS_PACKED else 0,
            )
        if IS_PACKED:
            other = tl.load(x_rows + width + k[None, :], mask=x_mask, other=0.0)
            low = nibbles(codes, False, dtype, ASM)
            high = nibbles(codes, True, dtype, ASM)
            if GROUP:
                product = tl.dot(low, x.T, input_precision="ieee")
                acc += _scaled_run(
                    product, x, scale_ptr, offset_ptr, group, n, in_n, scale_stride, group_stride,
                    HAS_OFFSET,
                )  # fmt: skip
                beyond = tl.minimum(group + num_groups // 2, num_groups - 1)
                product = tl.dot(high, other.T, input_precision="ieee")
                acc += _scaled_run(
                    product, other, scale_ptr, offset_ptr, beyond, n, in_n, scale_stride,
                    group_stride, HAS_OFFSET,
                )  # fmt: skip
            else:
                acc = tl.dot(low, x.T, acc, input_precision="ieee")
                acc = tl.dot(high, other.T, acc, input_precision="ieee")
                if HAS_OFFSET:
                    ones += tl.sum(x.to(tl.float32), 1) + tl.sum(other.to(tl.float32), 1)
        else:
            code = bytes_of(codes, IS_FLOAT, dtype, ASM)
            if GROUP:
                product = tl.dot(code, x.T, input_precision="ieee")
                acc += _scaled_run(
                    product, x, scale_ptr, offset_ptr, group, n, in_n, scale_stride, group_stride,
                    HAS_OFFSET,
                )  # fmt: skip
            else:
                acc = tl.dot(code, x.T, acc, input_precision="ieee")
                if HAS_OFFSET:
                    ones += tl.sum(x.to(tl.float32), 1)
    if GROUP == 0:
        acc = _scaled_ones(acc, ones, scale_ptr, offset_ptr, n, in_n, HAS_OFFSET)
    acc = acc.T
    inside = in_m[:, None] & in_n[None, :]
    if SPLIT_K > 1:
        own = partial_ptr + (split * rows + m.to(tl.int64)[:, None]) * size_n + n[None, :]
        tl.store(own, acc, mask=inside)
    else:
        deliver(
            acc,
            m,
            n,
            inside,
            in_n,
            bias_ptr,
            residual_ptr,
            out_ptr,
            residual_stride,
            out_stride,
            scale,
        )


@triton.jit
def _scaled_ones(acc, ones, scale_ptr, offset_ptr, n, in_n, HAS_OFFSET: tl.constexpr):
    """acc · scale + offset · sums of x, of rows with one scale."""
    acc *= tl.load(scale_ptr + n, mask=in_n, other=0.0)[:, None]
    if HAS_OFFSET:
        acc += tl.load(offset_ptr + n, mask=in_n, other=0.0)[:, None] * ones[None, :]
    return acc


@triton.jit
def deliver(
    acc, m, n, inside, in_n, bias_ptr, residual_ptr, out_ptr, residual_stride, out_stride, scale
):
    """Bias, scale and residual, then rounded once."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    if scale is not None:
        acc *= scale
    wide = m.to(tl.int64)[:, None]
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + wide * residual_stride + n[None, :], mask=inside)
        acc += residual.to(tl.float32)
    tl.store(
        out_ptr + wide * out_stride + n[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside
    )


@triton.jit(do_not_specialize=["rows"])
def add_splits_kernel(
    partial_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    rows,
    size_n,
    residual_stride,
    out_stride,
    scale,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """The splits' parts of a row, added in their order."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    m = tl.program_id(1) + tl.arange(0, 1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < size_n
    inside = in_n[None, :]
    acc = tl.zeros((1, BLOCK_N), dtype=tl.float32)
    for split in range(SPLIT_K):
        own = partial_ptr + (split * rows + m.to(tl.int64)[:, None]) * size_n + n[None, :]
        acc += tl.load(own, mask=inside, other=0.0)
    deliver(
        acc,
        m,
        n,
        inside,
        in_n,
        bias_ptr,
        residual_ptr,
        out_ptr,
        residual_stride,
        out_stride,
        scale,
    )


@triton.jit
def expand_kernel(
    codes_ptr,
    scale_ptr,
    offset_ptr,
    out_ptr,
    size_n,
    size_k,
    num_groups,
    scale_stride,
    group_stride,
    GROUP: tl.constexpr,
    IS_PACKED: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """code · scale + offset of a tile, in float32, rounded once."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_n = n < size_n
    inside = in_n[:, None] & (k < size_k)[None, :]
    rows = n.to(tl.int64)[:, None]
    if IS_PACKED:
        half = size_k // 2
        is_upper = k >= half
        at = tl.where(is_upper, k - half, k)
        packed = tl.load(codes_ptr + rows * half + at[None, :], mask=inside, other=0)
        packed = tl.where(is_upper[None, :], packed >> 4, packed & 0xF)
        code = packed.to(tl.float32) - 8.0
    else:
        code = tl.load(codes_ptr + rows * size_k + k[None, :], mask=inside, other=0)
        code = bytes_of(code, IS_FLOAT, tl.float32, False)
    group = k * 0
    if GROUP:
        group = tl.minimum(k // GROUP, num_groups - 1)
    where = rows * scale_stride + group[None, :] * group_stride
    number = code * tl.load(scale_ptr + where, mask=inside, other=0.0)
    if HAS_OFFSET:
        number += tl.load(offset_ptr + where, mask=inside, other=0.0)
    tl.store(out_ptr + rows * size_k + k[None, :], number.to(out_ptr.dtype.element_ty), mask=inside)
