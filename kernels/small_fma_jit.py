"""The kernel of kernels/small_linear.py for one row or two, which multiplies without tensor cores.

A thread has 16 bytes of codes of each of some rows at a time, and the numbers of x that they meet.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.float8_jit import magnitude_bits
from baton.kernels.gated_mul import activate
from baton.kernels.quantised_rows import largest_of, to_code
from baton.kernels.small_linear_jit import deliver
from baton.kernels.small_widen_jit import bytes_of, lowered, nibbles_raised


@triton.jit(do_not_specialize=["rows"])
def small_fma_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    offset_ptr,
    bias_ptr,
    norm_ptr,
    given_ptr,
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
    SCALE_ROWS: tl.constexpr,
    IS_PACKED: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    INPUTS: tl.constexpr,
    MOST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N columns of all rows, which are normalised first if there is a norm.

    GROUP 0: a row of the weight has one scale. SCALE_ROWS rows share theirs. INPUTS: None, or that
    x is made small: "row", by one scale, which is `given_ptr`'s if there is one, or "group", by one
    for each GROUP of its columns. ACTIVATION: size_n rows of the weight are the gate, as many
    behind them up. EVEN: there are only whole blocks.
    """
    VEC: tl.constexpr = 16
    RUNS: tl.constexpr = BLOCK_K // VEC
    # Of packed codes a byte has columns k and k + K / 2.
    width = size_k
    if IS_PACKED:
        width = size_k // 2
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    m = tl.arange(0, BLOCK_M)[:, None, None]
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :, None]
    x_rows = x_ptr + m.to(tl.int64) * x_stride
    acc = tl.zeros((BLOCK_M, BLOCK_N, RUNS), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N, RUNS), tl.float32)
    ones = tl.zeros((BLOCK_M, 1, RUNS), tl.float32)
    squares = tl.zeros((BLOCK_M, 1, RUNS), tl.float32)
    # What x is multiplied by to be codes, and what its codes are, to be numbers.
    inverse = tl.full((BLOCK_M,), 1.0, tl.float32)
    of_x = tl.full((BLOCK_M,), 1.0, tl.float32)
    if INPUTS == "row":
        largest = tl.zeros((BLOCK_M, 1, RUNS), tl.int32)
        for start in range(0, width, BLOCK_K):
            k = (start + tl.arange(0, BLOCK_K))[None, None, :]
            in_x = m < rows if EVEN else (m < rows) & (k < width)
            x = tl.load(x_rows + k, mask=in_x, other=0.0).to(tl.float32)
            if norm_ptr is not None:
                squares += tl.sum(tl.reshape(x * x, (BLOCK_M, 1, RUNS, VEC)), 3)
                x *= _gain(norm_ptr, k, width, EVEN)
            runs = tl.reshape(magnitude_bits(x), (BLOCK_M, 1, RUNS, VEC))
            largest = tl.maximum(largest, tl.max(runs, 3))
        of_row = largest_of(tl.max(tl.max(largest, 2), 1))
        if given_ptr is None:
            inverse = MOST / of_row
            of_x = of_row / MOST
        else:
            of_x = of_x * tl.load(given_ptr)
            inverse = 1.0 / of_x
            if norm_ptr is not None:
                factor = tl.rsqrt(tl.sum(tl.sum(squares, 2), 1) / size_k + eps)
                inverse *= factor
                of_x /= factor
            of_x = tl.where(of_row == of_row, of_x, of_row)
    for start in tl.range(0, width, BLOCK_K, num_stages=STAGES):
        k = (start + tl.arange(0, BLOCK_K))[None, None, :]
        in_x = m < rows if EVEN else (m < rows) & (k < width)
        x = tl.load(x_rows + k, mask=in_x, other=0.0).to(tl.float32)
        if norm_ptr is not None:
            if INPUTS != "row":
                squares += tl.sum(tl.reshape(x * x, (BLOCK_M, 1, RUNS, VEC)), 3)
            x *= _gain(norm_ptr, k, width, EVEN)
        other = x
        of_runs = tl.full((BLOCK_M, 1, RUNS), 1.0, tl.float32)
        if IS_PACKED:
            other = tl.load(x_rows + width + k, mask=in_x, other=0.0).to(tl.float32)
            if norm_ptr is not None:
                squares += tl.sum(tl.reshape(other * other, (BLOCK_M, 1, RUNS, VEC)), 3)
                other *= _gain(norm_ptr + width, k, width, EVEN)
        elif INPUTS == "row":
            x = to_code(x * inverse[:, None, None], MOST, IS_FLOAT, ASM)
        elif INPUTS == "group":
            COUNT: tl.constexpr = BLOCK_K // GROUP
            groups = tl.reshape(x, (BLOCK_M, 1, COUNT, GROUP))
            of_group = largest_of(tl.max(magnitude_bits(groups), 3))[:, :, :, None]
            groups = to_code(groups * (MOST / of_group), MOST, IS_FLOAT, ASM)
            x = tl.reshape(groups, (BLOCK_M, 1, BLOCK_K))
            spread = tl.broadcast_to(of_group / MOST, (BLOCK_M, 1, COUNT, GROUP // VEC))
            of_runs = tl.reshape(spread, (BLOCK_M, 1, RUNS))
        acc, ones = _add_codes(
            acc, ones, x, other, of_runs, codes_ptr, scale_ptr, offset_ptr, n, k, start, size_n,
            width, num_groups, GROUP, SCALE_ROWS, IS_PACKED, IS_FLOAT, HAS_OFFSET, INPUTS, BLOCK_M,
            BLOCK_N, RUNS, EVEN, ASM,
        )  # fmt: skip
        if ACTIVATION is not None:
            up, _ = _add_codes(
                up, ones, x, other, of_runs, codes_ptr, scale_ptr, offset_ptr, n + size_n, k, start,
                2 * size_n, width, num_groups, GROUP, SCALE_ROWS, IS_PACKED, IS_FLOAT, HAS_OFFSET,
                INPUTS, BLOCK_M, BLOCK_N, RUNS, EVEN, ASM,
            )  # fmt: skip
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < size_n
    if norm_ptr is not None:
        of_x *= tl.rsqrt(tl.sum(tl.sum(squares, 2), 1) / size_k + eps)
    all_ones = tl.sum(tl.sum(ones, 2), 1)
    result = _summed(acc, all_ones, of_x, scale_ptr, offset_ptr, n, in_n, GROUP, HAS_OFFSET)
    if ACTIVATION is not None:
        second = _summed(
            up, all_ones, of_x, scale_ptr, offset_ptr, n + size_n, in_n, GROUP, HAS_OFFSET
        )
        result = activate(result, ACTIVATION) * second
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
def _summed(
    acc, all_ones, of_x, scale_ptr, offset_ptr, n, in_n, GROUP: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
):  # fmt: skip
    """The sums of all runs, scaled, [BLOCK_M, BLOCK_N]."""
    result = tl.sum(acc, 2)
    if GROUP == 0:
        result *= tl.load(scale_ptr + n, mask=in_n, other=0.0)[None, :]
        if HAS_OFFSET:
            offset = tl.load(offset_ptr + n, mask=in_n, other=0.0)
            result += all_ones[:, None] * offset[None, :]
    return result * of_x[:, None]


@triton.jit
def _add_codes(
    acc, ones, x, other, of_runs, codes_ptr, scale_ptr, offset_ptr, n, k, start, limit, width,
    num_groups, GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr, IS_PACKED: tl.constexpr,
    IS_FLOAT: tl.constexpr, HAS_OFFSET: tl.constexpr, INPUTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, RUNS: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """acc + the sums of x · codes of rows n, which are less than `limit`, and columns k."""
    source = codes_ptr + n.to(tl.int64) * width + k
    if EVEN:
        code = tl.load(source, eviction_policy="evict_first")
    else:
        inside = (n < limit) & (k < width)
        code = tl.load(source, mask=inside, other=0, eviction_policy="evict_first")
    run = (start + 16 * tl.arange(0, RUNS))[None, None, :]
    if IS_PACKED:
        low, high = nibbles_raised(code, False, ASM), nibbles_raised(code, True, ASM)
        acc, ones = _add_runs(
            acc, ones, low, x, of_runs, scale_ptr, offset_ptr, n, run, 0, limit, width, num_groups,
            GROUP, SCALE_ROWS, HAS_OFFSET, INPUTS, True, BLOCK_M, BLOCK_N, RUNS, EVEN,
        )  # fmt: skip
        return _add_runs(
            acc, ones, high, other, of_runs, scale_ptr, offset_ptr, n, run, num_groups // 2, limit,
            width, num_groups, GROUP, SCALE_ROWS, HAS_OFFSET, INPUTS, True, BLOCK_M, BLOCK_N, RUNS,
            EVEN,
        )  # fmt: skip
    number = bytes_of(code, IS_FLOAT, tl.float32, ASM)
    return _add_runs(
        acc, ones, number, x, of_runs, scale_ptr, offset_ptr, n, run, 0, limit, width, num_groups,
        GROUP, SCALE_ROWS, HAS_OFFSET, INPUTS, False, BLOCK_M, BLOCK_N, RUNS, EVEN,
    )  # fmt: skip


@triton.jit
def _add_runs(
    acc, ones, code, x, of_runs, scale_ptr, offset_ptr, n, run, first_group, limit, width,
    num_groups, GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr, HAS_OFFSET: tl.constexpr,
    INPUTS: tl.constexpr, IS_RAISED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    RUNS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """acc + Σ x · code, of runs of 16 columns of one group, scaled if there are several, with
    x · offset; and ones + Σ x."""
    sums = tl.sum(tl.reshape(x, (BLOCK_M, 1, RUNS, 16)), 3)
    part = tl.sum(tl.reshape(code * x, (BLOCK_M, BLOCK_N, RUNS, 16)), 3)
    if IS_RAISED:
        part = lowered(part, sums)
    if GROUP:
        at = n // SCALE_ROWS * num_groups + first_group + run // GROUP
        is_there = (n < limit) & (run < width)
        if EVEN:
            part *= tl.load(scale_ptr + at)
        else:
            part *= tl.load(scale_ptr + at, mask=is_there, other=0.0)
        if INPUTS == "group":
            part *= of_runs
        if HAS_OFFSET:
            part += sums * tl.load(offset_ptr + at, mask=is_there, other=0.0)
    return acc + part, ones + sums
