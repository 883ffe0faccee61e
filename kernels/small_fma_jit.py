"""The kernel of kernels/small_linear.py for up to four rows, which multiplies without tensor cores.

A thread has 16 bytes of codes of each of some rows at a time, and the numbers of x that they meet.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.small_linear_jit import deliver
from baton.kernels.small_widen_jit import bytes_of, nibbles


@triton.jit(do_not_specialize=["rows"])
def small_fma_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    offset_ptr,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    out_ptr,
    rows,
    size_n,
    size_k,
    num_groups,
    x_stride,
    residual_stride,
    out_stride,
    eps,
    scale,
    GROUP: tl.constexpr,
    IS_PACKED: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N columns of all rows, which are normalised first if there is a norm. GROUP 0: a row of
    the weight has one scale. EVEN: there are only whole blocks."""
    VEC: tl.constexpr = 16
    RUNS: tl.constexpr = BLOCK_K // VEC
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    # Of packed codes a byte has columns k and k + K / 2.
    width = size_k
    if IS_PACKED:
        width = size_k // 2
    m = tl.arange(0, BLOCK_M)[:, None, None]
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :, None]
    x_rows = x_ptr + m.to(tl.int64) * x_stride
    code_rows = codes_ptr + n.to(tl.int64) * width
    acc = tl.zeros((BLOCK_M, BLOCK_N, RUNS), tl.float32)
    ones = tl.zeros((BLOCK_M, 1, RUNS), tl.float32)
    squares = tl.zeros((BLOCK_M, 1, RUNS), tl.float32)
    for start in tl.range(0, width, BLOCK_K, num_stages=STAGES):
        k = (start + tl.arange(0, BLOCK_K))[None, None, :]
        run = (start + VEC * tl.arange(0, RUNS))[None, None, :]
        in_x = m < rows
        if EVEN:
            code = tl.load(code_rows + k, eviction_policy="evict_first")
        else:
            inside = (n < size_n) & (k < width)
            in_x = in_x & (k < width)
            code = tl.load(code_rows + k, mask=inside, other=0, eviction_policy="evict_first")
        x = tl.load(x_rows + k, mask=in_x, other=0.0).to(tl.float32)
        if norm_ptr is not None:
            squares += tl.sum(tl.reshape(x * x, (BLOCK_M, 1, RUNS, 16)), 3)
            x *= _gain(norm_ptr, k, width, EVEN)
        if IS_PACKED:
            other = tl.load(x_rows + width + k, mask=in_x, other=0.0).to(tl.float32)
            if norm_ptr is not None:
                squares += tl.sum(tl.reshape(other * other, (BLOCK_M, 1, RUNS, 16)), 3)
                other *= _gain(norm_ptr + width, k, width, EVEN)
            low, high = nibbles(code, False, tl.float32, ASM), nibbles(code, True, tl.float32, ASM)
            acc, ones = _add_runs(
                acc, ones, low, x, scale_ptr, offset_ptr, n, run, 0, size_n, width, num_groups,
                GROUP, HAS_OFFSET, BLOCK_M, BLOCK_N, RUNS, EVEN,
            )  # fmt: skip
            acc, ones = _add_runs(
                acc, ones, high, other, scale_ptr, offset_ptr, n, run, num_groups // 2, size_n,
                width, num_groups, GROUP, HAS_OFFSET, BLOCK_M, BLOCK_N, RUNS, EVEN,
            )  # fmt: skip
        else:
            number = bytes_of(code, IS_FLOAT, tl.float32, ASM)
            acc, ones = _add_runs(
                acc, ones, number, x, scale_ptr, offset_ptr, n, run, 0, size_n, width, num_groups,
                GROUP, HAS_OFFSET, BLOCK_M, BLOCK_N, RUNS, EVEN,
            )  # fmt: skip
    result = tl.sum(acc, 2)
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < size_n
    if GROUP == 0:
        result *= tl.load(scale_ptr + n, mask=in_n, other=0.0)[None, :]
        if HAS_OFFSET:
            all_ones = tl.sum(tl.sum(ones, 2), 1)
            result += all_ones[:, None] * tl.load(offset_ptr + n, mask=in_n, other=0.0)[None, :]
    if norm_ptr is not None:
        mean = tl.sum(tl.sum(squares, 2), 1) / size_k
        result *= tl.rsqrt(mean + eps)[:, None]
    inside = (m < rows)[:, None] & in_n[None, :]
    deliver(
        result, m, n, inside, in_n, bias_ptr, residual_ptr, out_ptr, residual_stride, out_stride,
        scale,
    )  # fmt: skip


@triton.jit
def _gain(norm_ptr, k, width, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(norm_ptr + k).to(tl.float32)
    return tl.load(norm_ptr + k, mask=k < width, other=0.0).to(tl.float32)


@triton.jit
def _add_runs(
    acc, ones, code, x, scale_ptr, offset_ptr, n, run, first_group, size_n, width,
    num_groups, GROUP: tl.constexpr, HAS_OFFSET: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, RUNS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """acc + Σ x · code, of runs of 16 columns of one group, scaled if there are several, with
    x · offset; and ones + Σ x."""
    sums = tl.sum(tl.reshape(x, (BLOCK_M, 1, RUNS, 16)), 3)
    part = tl.sum(tl.reshape(code * x, (BLOCK_M, BLOCK_N, RUNS, 16)), 3)
    if GROUP:
        at = n * num_groups + first_group + run // GROUP
        is_there = (n < size_n) & (run < width)
        if EVEN:
            part *= tl.load(scale_ptr + at)
        else:
            part *= tl.load(scale_ptr + at, mask=is_there, other=0.0)
        if HAS_OFFSET:
            part += sums * tl.load(offset_ptr + at, mask=is_there, other=0.0)
    return acc + part, ones + sums
