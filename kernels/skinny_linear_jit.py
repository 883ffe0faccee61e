"""The programs behind kernels/skinny_linear.py, which says what the arguments are.

`size_n` is the number of result columns. With an ACTIVATION a program has two tiles of the weight:
rows n (gate) and size_n + n (up). Absent tensors, and a scale of one, are None.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.gated_mul import activate


@triton.jit(do_not_specialize=["rows"])
def fma_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    out_ptr,
    rows,
    size_n,
    size_k,
    x_stride,
    residual_stride,
    out_stride,
    eps,
    scale,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
    PREFETCH: tl.constexpr,
    NUM_THREADS: tl.constexpr,
):
    """A tile of [BLOCK_M rows, BLOCK_N columns] by multiply-add, for up to four rows.

    Tiles are three-dimensional, [m, n, k], and BLOCK_K is best 16 bytes for each thread: then each
    thread has the same columns k of every row, and of x each number is loaded once.
    """
    # Of 16 bytes in one thread the sum is taken at once, which makes for small accumulators.
    VEC: tl.constexpr = 128 // weight_ptr.dtype.element_ty.primitive_bitwidth
    tile = tl.program_id(0)
    if PDL:
        if PREFETCH > 0:
            prefetch_weight(weight_ptr, tile * BLOCK_N, size_n, size_k, 0, size_k, BLOCK_N,
                      BLOCK_K * PREFETCH, ACTIVATION is not None, NUM_THREADS)  # fmt: skip
        gdc_wait()
        gdc_launch_dependents()
    m = tl.arange(0, BLOCK_M)[:, None, None]
    n = (tile * BLOCK_N + tl.arange(0, BLOCK_N))[None, :, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_K // VEC), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_K // VEC), tl.float32)
    squares = tl.zeros((BLOCK_M, 1, BLOCK_K // VEC), tl.float32)
    for start in tl.range(0, size_k, BLOCK_K, num_stages=STAGES):
        k = (start + tl.arange(0, BLOCK_K))[None, None, :]
        weight = _load_weight(weight_ptr, n, k, size_n, size_k, EVEN_N, EVEN_K)
        in_x = m < rows
        if not EVEN_K:
            in_x = in_x & (k < size_k)
        x = tl.load(x_ptr + m * x_stride + k, mask=in_x, other=0.0).to(tl.float32)
        if norm_ptr is not None:
            squares += _sum_last(x * x, BLOCK_M, 1, BLOCK_K // VEC, VEC)
            x *= _load_vector(norm_ptr, k, size_k, EVEN_K)
        acc += _sum_last(weight.to(tl.float32) * x, BLOCK_M, BLOCK_N, BLOCK_K // VEC, VEC)
        if ACTIVATION is not None:
            second = weight_ptr + size_n.to(tl.int64) * size_k
            weight = _load_weight(second, n, k, size_n, size_k, EVEN_N, EVEN_K)
            up += _sum_last(weight.to(tl.float32) * x, BLOCK_M, BLOCK_N, BLOCK_K // VEC, VEC)
    _finish(tl.sum(acc, axis=2), tl.sum(up, axis=2), tl.sum(tl.sum(squares, axis=2), axis=1),
            bias_ptr, norm_ptr, residual_ptr, out_ptr, 0, tile, rows, size_n, size_k,
            residual_stride, out_stride, eps, scale, ACTIVATION, BLOCK_M, BLOCK_N)  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def dot_kernel(
    x_ptr,
    weight_ptr,
    descriptor,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    out_ptr,
    partial_ptr,
    arrival_ptr,
    rows,
    size_n,
    size_k,
    steps_per_split,
    x_stride,
    residual_stride,
    out_stride,
    eps,
    scale,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    PDL: tl.constexpr,
    PREFETCH: tl.constexpr,
    NUM_THREADS: tl.constexpr,
):
    """A tile of [BLOCK_M rows, BLOCK_N columns] on tensor cores; weight tiles are the left operand.

    SPLIT_K programs share a tile; the last to arrive adds up what all have stored.
    """
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
                      BLOCK_K * PREFETCH, ACTIVATION is not None, NUM_THREADS)  # fmt: skip
        gdc_wait()
        gdc_launch_dependents()
    m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    n = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_K // 8), tl.float32)
    for start in range(first, end, BLOCK_K):
        k = (start + tl.arange(0, BLOCK_K))[None, :]
        in_x = m < rows
        if not EVEN_K:
            in_x = in_x & (k < size_k)
        x = tl.load(x_ptr + m * x_stride + k, mask=in_x, other=0.0)
        if norm_ptr is not None:
            wide = x.to(tl.float32)
            squares += tl.sum((wide * wide).reshape(BLOCK_M, BLOCK_K // 8, 8), axis=2)
            # Loaded in the shape of x, so that it has x's layout and need not be converted.
            gain = _load_vector(norm_ptr, k + tl.zeros_like(m), size_k, EVEN_K)
            x = (wide * gain).to(x.dtype)
        if descriptor is not None:
            weight = descriptor.load([tile_n * BLOCK_N, start])
        else:
            weight = _load_weight(weight_ptr, n, k, size_n, size_k, EVEN_N, EVEN_K)
        acc = tl.dot(weight, x.T, acc, input_precision="ieee")
        if ACTIVATION is not None:
            if descriptor is not None:
                weight = descriptor.load([size_n + tile_n * BLOCK_N, start])
            else:
                second = weight_ptr + size_n.to(tl.int64) * size_k
                weight = _load_weight(second, n, k, size_n, size_k, EVEN_N, EVEN_K)
            up = tl.dot(weight, x.T, up, input_precision="ieee")
    sum_squares = tl.sum(squares, axis=1)
    if SPLIT_K == 1:
        _finish(acc.T, up.T, sum_squares, bias_ptr, norm_ptr, residual_ptr, out_ptr, tile_m, tile_n,
                rows, size_n, size_k, residual_stride, out_stride, eps, scale, ACTIVATION,
                BLOCK_M, BLOCK_N)  # fmt: skip
    else:
        NUM_TILES: tl.constexpr = 2 if ACTIVATION is not None else 1
        TILE: tl.constexpr = BLOCK_N * BLOCK_M
        SIZE: tl.constexpr = NUM_TILES * TILE + BLOCK_M
        row = tl.arange(0, BLOCK_M)
        within = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + row[None, :]
        stride = tl.num_programs(0) * SIZE
        partials = partial_ptr + pid * SIZE
        mine = partials + split * stride
        tl.store(mine + within, acc)
        if ACTIVATION is not None:
            tl.store(mine + TILE + within, up)
        if norm_ptr is not None:
            tl.store(mine + NUM_TILES * TILE + row, sum_squares)
        # All threads have stored before one of them says so.
        tl.debug_barrier()
        if tl.atomic_add(arrival_ptr + pid, 1, sem="acq_rel") == SPLIT_K - 1:
            tl.store(arrival_ptr + pid, 0)
            acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            sum_squares = tl.zeros((BLOCK_M,), tl.float32)
            for _ in tl.static_range(SPLIT_K):
                # Past the L1 cache, which does not see what other processors store.
                acc += tl.load(partials + within, cache_modifier=".cg")
                if ACTIVATION is not None:
                    up += tl.load(partials + TILE + within, cache_modifier=".cg")
                if norm_ptr is not None:
                    squares_ptr = partials + NUM_TILES * TILE + row
                    sum_squares += tl.load(squares_ptr, cache_modifier=".cg")
                partials += stride
            _finish(acc.T, up.T, sum_squares, bias_ptr, norm_ptr, residual_ptr, out_ptr, tile_m,
                    tile_n, rows, size_n, size_k, residual_stride, out_stride, eps, scale,
                    ACTIVATION, BLOCK_M, BLOCK_N)  # fmt: skip


@triton.jit
def _finish(
    acc, up, sum_squares, bias_ptr, norm_ptr, residual_ptr, out_ptr, tile_m, tile_n, rows, size_n,
    size_k, residual_stride, out_stride, eps, scale, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums acc and up [BLOCK_M, BLOCK_N] → results in memory."""
    m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    n = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inside = (m < rows) & (n < size_n)
    if norm_ptr is not None:
        inverse = tl.rsqrt(sum_squares / size_k + eps)[:, None]
        acc *= inverse
        up *= inverse
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < size_n, other=0.0).to(tl.float32)
        if ACTIVATION is not None:
            up += tl.load(bias_ptr + size_n + n, mask=n < size_n, other=0.0).to(tl.float32)
    if scale is not None:
        acc *= scale
        up *= scale
    if ACTIVATION is not None:
        acc = activate(acc, ACTIVATION) * up
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + m * residual_stride + n, mask=inside, other=0.0)
        acc += residual.to(tl.float32)
    out = out_ptr + m.to(tl.int64) * out_stride + n
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _load_weight(weight_ptr, n, k, size_n, size_k, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr):
    """Rows n and columns k; each is read once, so it need not stay in the cache."""
    source = weight_ptr + n.to(tl.int64) * size_k + k
    if EVEN_N and EVEN_K:
        return tl.load(source, eviction_policy="evict_first")
    inside = (n < size_n) & (k < size_k)
    return tl.load(source, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def _load_vector(vector_ptr, k, size_k, EVEN_K: tl.constexpr):
    if EVEN_K:
        return tl.load(vector_ptr + k).to(tl.float32)
    return tl.load(vector_ptr + k, mask=k < size_k, other=0.0).to(tl.float32)


@triton.jit
def _sum_last(x, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, VEC: tl.constexpr):
    return tl.sum(tl.reshape(x, (M, N, K, VEC)), axis=3)


@triton.jit
def prefetch_weight(
    weight_ptr, first_n, size_n, size_k, first_k, end_k, BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr, TWICE: tl.constexpr, NUM_THREADS: tl.constexpr,
):  # fmt: skip
    """Fetches columns first_k to first_k + WIDTH of BLOCK_N rows of the weight to the L2 cache.

    Each thread asks for one piece of a row, a multiple of 16 bytes.
    """
    PIECES: tl.constexpr = NUM_THREADS // BLOCK_N if NUM_THREADS > BLOCK_N else 1
    PIECE: tl.constexpr = WIDTH // PIECES
    which = tl.arange(0, BLOCK_N * PIECES)
    n = tl.minimum(first_n + which // PIECES, size_n - 1)
    k = first_k + which % PIECES * PIECE
    bytes_per_element: tl.constexpr = weight_ptr.dtype.element_ty.primitive_bitwidth // 8
    length = tl.maximum(tl.minimum(PIECE, end_k - k), 0) * bytes_per_element
    source = weight_ptr + n.to(tl.int64) * size_k + k
    prefetch_l2(source.to(tl.int64), length)
    if TWICE:
        source += size_n.to(tl.int64) * size_k
        prefetch_l2(source.to(tl.int64), length)


@triton.jit
def prefetch_l2(address, length):
    """So many bytes at each address, multiples of 16 both; of no length nothing."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred some;
        setp.gt.s32 some, $2, 0;
        @some cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r",
        [address, length],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
