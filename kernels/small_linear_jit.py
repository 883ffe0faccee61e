"""The kernels of kernels/small_linear.py."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _codes(ptr, where, mask, IS_FLOAT: tl.constexpr, dtype: tl.constexpr):
    """Codes of a byte each, in the activations' dtype, which holds every one of them."""
    code = tl.load(ptr + where, mask=mask, other=0)
    if IS_FLOAT:
        code = code.to(tl.float8e4nv, bitcast=True)
    return code.to(dtype)


@triton.jit
def _nibbles(packed, UPPER: tl.constexpr, dtype: tl.constexpr):
    """Codes of four bits, from −8 to 7."""
    if UPPER:
        packed = packed >> 4
    return ((packed & 0xF).to(tl.int8) - 8).to(dtype)


@triton.jit
def _add_run(
    acc, x, code, scale_ptr, offset_ptr, group, columns, in_n, num_groups, HAS_OFFSET: tl.constexpr
):
    """acc + (x · codeᵀ) · scale + sum of x · offset, of a run of one group."""
    scale = tl.load(scale_ptr + columns * num_groups + group, mask=in_n, other=0.0)
    acc += tl.dot(x, tl.trans(code), input_precision="ieee") * scale[None, :]
    if HAS_OFFSET:
        offset = tl.load(offset_ptr + columns * num_groups + group, mask=in_n, other=0.0)
        acc += tl.sum(x.to(tl.float32), 1)[:, None] * offset[None, :]
    return acc


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
):
    """A tile of the product, or one split's part of it. GROUP 0: a row has one scale."""
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    in_m, in_n = m < rows, n < size_n
    # Of packed codes a byte has columns k and k + K / 2.
    width = size_k
    if IS_PACKED:
        width = size_k // 2
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
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
        x_mask = in_m[:, None] & in_k[None, :]
        x = tl.load(x_rows + k[None, :], mask=x_mask, other=0.0)
        mask = in_n[:, None] & in_k[None, :]
        if IS_PACKED:
            packed = tl.load(code_rows + k[None, :], mask=mask, other=0x88)
            acc = _add_run(
                acc,
                x,
                _nibbles(packed, False, dtype),
                scale_ptr,
                offset_ptr,
                group,
                n,
                in_n,
                num_groups,
                HAS_OFFSET,
            )
            other = tl.load(x_rows + width + k[None, :], mask=x_mask, other=0.0)
            beyond = 0
            if GROUP:
                beyond = tl.minimum(group + num_groups // 2, num_groups - 1)
            acc = _add_run(
                acc,
                other,
                _nibbles(packed, True, dtype),
                scale_ptr,
                offset_ptr,
                beyond,
                n,
                in_n,
                num_groups,
                HAS_OFFSET,
            )
        else:
            code = _codes(code_rows, k[None, :], mask, IS_FLOAT, dtype)
            acc = _add_run(
                acc, x, code, scale_ptr, offset_ptr, group, n, in_n, num_groups, HAS_OFFSET
            )
    inside = in_m[:, None] & in_n[None, :]
    if SPLIT_K > 1:
        own = partial_ptr + (split * rows + m.to(tl.int64)[:, None]) * size_n + n[None, :]
        tl.store(own, acc, mask=inside)
    else:
        _deliver(
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
def _deliver(
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
):
    """The splits' parts of a row, added in their order."""
    m = tl.program_id(1) + tl.arange(0, 1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < size_n
    inside = in_n[None, :]
    acc = tl.zeros((1, BLOCK_N), dtype=tl.float32)
    for split in range(SPLIT_K):
        own = partial_ptr + (split * rows + m.to(tl.int64)[:, None]) * size_n + n[None, :]
        acc += tl.load(own, mask=inside, other=0.0)
    _deliver(
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
        code = _codes(codes_ptr + rows * size_k, k[None, :], inside, IS_FLOAT, tl.float32)
    group = k * 0
    if GROUP:
        group = tl.minimum(k // GROUP, num_groups - 1)
    where = rows * num_groups + group[None, :]
    number = code * tl.load(scale_ptr + where, mask=inside, other=0.0)
    if HAS_OFFSET:
        number += tl.load(offset_ptr + where, mask=inside, other=0.0)
    tl.store(out_ptr + rows * size_k + k[None, :], number.to(out_ptr.dtype.element_ty), mask=inside)
