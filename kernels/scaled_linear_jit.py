"""The kernel of kernels/scaled_linear.py."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.skinny_linear_jit import prefetch_weight
from baton.kernels.small_linear_jit import deliver


@triton.jit(do_not_specialize=["rows", "x_scale_stride"])
def scaled_linear_kernel(
    x_ptr,
    x_descriptor,
    x_scale_ptr,
    weight_ptr,
    weight_descriptor,
    weight_scale_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    partial_ptr,
    arrival_ptr,
    rows,
    size_n,
    size_k,
    steps_per_split,
    x_scale_stride,
    residual_stride,
    out_stride,
    scale,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    IMPRECISE: tl.constexpr,
    PREFETCH: tl.constexpr,
    NUM_THREADS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile of [BLOCK_M rows, BLOCK_N columns]; codes of the weight are the left operand.

    GROUP: rows and columns of the weight, and columns of x, that have a scale together, of which
    BLOCK_N and BLOCK_K are parts; 0: each row has one. BLOCK_K divides size_k. SPLIT_K programs
    share a tile; the last to arrive adds up what all have stored. IMPRECISE: so many columns are
    added up by the tensor cores before float32 does; None: all. With descriptors the bulk copy
    engine loads tiles.
    """
    IS_FLOAT: tl.constexpr = x_ptr.dtype.element_ty != tl.int8
    number: tl.constexpr = tl.float32 if IS_FLOAT else tl.int32
    pid = tl.program_id(0)
    num_tiles_m = tl.cdiv(rows, BLOCK_M)
    # Programs that read the same weights are neighbours.
    tile_n, tile_m = pid // num_tiles_m, pid % num_tiles_m
    split = tl.program_id(1)
    first = split * steps_per_split * BLOCK_K
    end = tl.minimum(size_k, first + steps_per_split * BLOCK_K)
    if PDL:
        if PREFETCH > 0:
            prefetch_weight(weight_ptr, tile_n * BLOCK_N, size_n, size_k, first, end, BLOCK_N,
                            BLOCK_K * PREFETCH, False, NUM_THREADS)  # fmt: skip
        gdc_wait()
        gdc_launch_dependents()
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_n = m < rows, n < size_n
    num_groups = size_k // GROUP if GROUP else 1
    # What is beyond the last is another one's, and is not stored.
    x_rows = x_ptr + tl.minimum(m, rows - 1).to(tl.int64)[:, None] * size_k
    weight_rows = weight_ptr + tl.minimum(n, size_n - 1).to(tl.int64)[:, None] * size_k
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32 if GROUP else number)
    for start in range(first, end, BLOCK_K):
        k = (start + tl.arange(0, BLOCK_K))[None, :]
        if weight_descriptor is not None:
            x = x_descriptor.load([tile_m * BLOCK_M, start])
            weight = weight_descriptor.load([tile_n * BLOCK_N, start])
        else:
            x = tl.load(x_rows + k)
            weight = tl.load(weight_rows + k, eviction_policy="evict_first")
        if GROUP:
            product = tl.dot(weight, x.T, out_dtype=number)
            group = start // GROUP
            of_weight = tl.load(weight_scale_ptr + tile_n * BLOCK_N // GROUP * num_groups + group)
            of_x = tl.load(x_scale_ptr + group * x_scale_stride + m, mask=in_m, other=0.0)
            acc += product.to(tl.float32) * (of_x * of_weight)[None, :]
        elif IS_FLOAT:
            # The tensor cores' own sums have 14 bits.
            acc = tl.dot(weight, x.T, acc, max_num_imprecise_acc=IMPRECISE)
        else:
            acc = tl.dot(weight, x.T, acc, out_dtype=tl.int32)
    result = acc.to(tl.float32)
    is_last = True
    if SPLIT_K > 1:
        row = tl.arange(0, BLOCK_M)
        within = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + row[None, :]
        TILE: tl.constexpr = BLOCK_N * BLOCK_M
        stride = tl.num_programs(0) * TILE
        partials = partial_ptr + pid * TILE
        tl.store(partials + split * stride + within, result)
        # All threads have stored before one of them says so.
        tl.debug_barrier()
        is_last = tl.atomic_add(arrival_ptr + pid, 1, sem="acq_rel") == SPLIT_K - 1
        if is_last:
            tl.store(arrival_ptr + pid, 0)
            result = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for _ in tl.static_range(SPLIT_K):
                # Past the L1 cache, which does not see what other processors store.
                result += tl.load(partials + within, cache_modifier=".cg")
                partials += stride
    if is_last:
        if GROUP == 0:
            of_weight = tl.load(weight_scale_ptr + n, mask=in_n, other=0.0)
            of_x = tl.load(x_scale_ptr + m, mask=in_m, other=0.0)
            result *= of_weight[:, None] * of_x[None, :]
        inside = in_m[:, None] & in_n[None, :]
        deliver(
            result.T,
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
