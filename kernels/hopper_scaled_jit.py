"""The kernel of kernels/hopper_scaled.py, which says what the arguments are.

A program multiplies a tile of the weight by all, or BLOCK_M, rows of x, and of the columns all or
one split of them. Both come by the bulk copy engine, in steps of 128 columns, into places of a
ring. The weight's first steps, as many as there are places, are asked for before the kernel in
front has ended: with short products that is all a program ever reads of it.

    weight ─► ▤ ▤ ▤ ▤ ▤ ▤ ─┐  one barrier a place, passed
    x      ─► ▫ ▫ ▫ ▫ ▫ ▫ ─┴► when both are there       ─► sums ─► scales, residual ─► out
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language import debug_barrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels import float8_jit, gated_mul

_activate = gluon.jit(gated_mul.activate.fn)
_magnitude_bits = gluon.jit(float8_jit.magnitude_bits.fn)


@gluon.jit(do_not_specialize=["rows", "num_steps", "steps_per_split"])
def hopper_scaled_kernel(
    x_tiles,
    weight_tiles,
    x_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    maxima_ptr,
    partial_ptr,
    arrival_ptr,
    rows,
    size_n,
    num_steps,
    steps_per_split,
    residual_stride,
    out_stride,
    scale,
    ACTIVATION: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PLACES: gl.constexpr,
    RUN: gl.constexpr,
    SPLIT_K: gl.constexpr,
    IS_FAST: gl.constexpr,
    PDL: gl.constexpr,
):
    """A tile of BLOCK_N rows of the weight and BLOCK_M of x; with an ACTIVATION of so many rows
    of the gate and as many of up, size_n apart.

    SPLIT_K programs share a tile; the last to arrive adds up what all have stored. IS_FAST: all
    columns are added up by the tensor cores, whose own sums have 14 bits; otherwise each step's
    are, and then float32 does.
    """
    STEP: gl.constexpr = weight_tiles.block_type.shape[1]
    PARTS: gl.constexpr = 1 if ACTIVATION is None else 2
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_M, 32])
    number: gl.constexpr = x_tiles.dtype
    pid = gl.program_id(0)
    num_tiles_m = gl.cdiv(rows, BLOCK_M)
    # Programs that read the same weights are neighbours.
    tile_n, tile_m = pid // num_tiles_m, pid % num_tiles_m
    split = gl.program_id(1)
    first = split * steps_per_split
    steps = gl.minimum(num_steps - first, steps_per_split)
    weights = gl.allocate_shared_memory(
        number, [PLACES, PARTS * BLOCK_N, STEP], weight_tiles.layout
    )
    xs = gl.allocate_shared_memory(number, [PLACES, BLOCK_M, STEP], x_tiles.layout)
    ready = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(PLACES):
        mbarrier.init(ready.index(i), count=1)
    fence_async_shared()
    debug_barrier()
    for i in gl.static_range(PLACES):
        _copy_weight(
            weights, xs, ready, weight_tiles, i, first + i, i < steps, tile_n, size_n, PARTS,
            BLOCK_N,
        )  # fmt: skip
    # Before the kernel in front has ended, what it does not make; then the rest.
    n = tile_n * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, MMA))
    m = tile_m * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, MMA))
    of_weight = gl.load(weight_scale_ptr + n, mask=n < size_n, other=0.0)
    of_up = of_weight
    if PARTS == 2:
        of_up = gl.load(weight_scale_ptr + size_n + n, mask=n < size_n, other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    for i in gl.static_range(PLACES):
        tma.async_copy_global_to_shared(
            x_tiles, [tile_m * BLOCK_M, (first + i) * STEP], ready.index(i), xs.index(i), i < steps
        )
    of_x = gl.load(x_scale_ptr + m, mask=m < rows, other=0.0)
    # Neighbours in memory are a thread's.
    ALONG: gl.constexpr = BLOCK_N // 8
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [ALONG, 32 // ALONG], [1, gl.num_warps()], [0, 1])
    out_n = tile_n * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, OUT))[:, None]
    out_m = tile_m * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, OUT))[None, :]
    inside = (out_n < size_n) & (out_m < rows)
    wide_m = out_m.to(gl.int64)
    # As much as a thread has room for.
    IS_EARLY: gl.constexpr = residual_ptr is not None and BLOCK_M * BLOCK_N <= 1024 * gl.num_warps()
    residual = of_x
    if IS_EARLY:
        source = residual_ptr + wide_m * residual_stride + out_n
        residual = gl.load(source, mask=inside, other=0.0)
    acc = gl.full([BLOCK_N, BLOCK_M], 0.0, gl.float32, MMA)
    up = gl.full([BLOCK_N, BLOCK_M], 0.0, gl.float32, MMA)
    place = 0
    phase = 0
    for i in range(0, steps, RUN):
        if IS_FAST:
            for r in gl.static_range(RUN):
                mbarrier.wait(ready.index(place + r), phase)
                turned = xs.index(place + r).permute((1, 0))
                held = weights.index(place + r)
                acc = warpgroup_mma(held.slice(0, BLOCK_N), turned, acc, is_async=True)
                if PARTS == 2:
                    up = warpgroup_mma(held.slice(BLOCK_N, BLOCK_N), turned, up, is_async=True)
            if PARTS == 2:
                acc, up = warpgroup_mma_wait(2 * RUN, deps=(acc, up))
            else:
                acc = warpgroup_mma_wait(RUN, deps=(acc,))
        else:
            parts = _nothing()
            for r in gl.static_range(RUN):
                mbarrier.wait(ready.index(place + r), phase)
                turned = xs.index(place + r).permute((1, 0))
                for part in gl.static_range(PARTS):
                    held = weights.index(place + r).slice(part * BLOCK_N, BLOCK_N)
                    parts = parts + (_product(held, turned, BLOCK_N, BLOCK_M, MMA),)
            if RUN * PARTS == 1:
                parts = (warpgroup_mma_wait(0, deps=parts),)
            else:
                parts = warpgroup_mma_wait(0, deps=parts)
            for r in gl.static_range(RUN):
                acc += parts[r * PARTS]
                if PARTS == 2:
                    up += parts[r * PARTS + 1]
        # What has been multiplied by all warps is free: these steps, or, where their product is
        # still under way, those before.
        BEHIND: gl.constexpr = RUN if IS_FAST else 0
        coming = i - BEHIND + PLACES
        freed = gl.where(place == 0, PLACES - RUN, place - RUN) if IS_FAST else place
        debug_barrier()
        for r in gl.static_range(RUN):
            goes_on = (i >= BEHIND) & (coming + r < steps)
            _copy_weight(
                weights, xs, ready, weight_tiles, freed + r, first + coming + r, goes_on, tile_n,
                size_n, PARTS, BLOCK_N,
            )  # fmt: skip
        for r in gl.static_range(RUN):
            goes_on = (i >= BEHIND) & (coming + r < steps)
            tma.async_copy_global_to_shared(
                x_tiles, [tile_m * BLOCK_M, (first + coming + r) * STEP], ready.index(freed + r),
                xs.index(freed + r), goes_on,
            )  # fmt: skip
        place += RUN
        phase = gl.where(place == PLACES, phase ^ 1, phase)
        place = gl.where(place == PLACES, 0, place)
    if IS_FAST:
        if PARTS == 1:
            acc = warpgroup_mma_wait(0, deps=(acc,))
        else:
            acc, up = warpgroup_mma_wait(0, deps=(acc, up))
        # Where other warps still multiply, the compiler puts what threads exchange from here on.
        debug_barrier()
    is_last = True
    if SPLIT_K > 1:
        TILE: gl.constexpr = BLOCK_N * BLOCK_M
        within = (n - tile_n * BLOCK_N)[:, None] * BLOCK_M + (m - tile_m * BLOCK_M)[None, :]
        stride = gl.num_programs(0) * PARTS * TILE
        partials = partial_ptr + pid * PARTS * TILE
        gl.store(partials + split * stride + within, acc)
        if PARTS == 2:
            gl.store(partials + split * stride + TILE + within, up)
        # All threads have stored before one of them says so.
        debug_barrier()
        is_last = gl.atomic_add(arrival_ptr + pid, 1, sem="acq_rel") == SPLIT_K - 1
        if is_last:
            gl.store(arrival_ptr + pid, 0)
            acc = gl.full([BLOCK_N, BLOCK_M], 0.0, gl.float32, MMA)
            up = gl.full([BLOCK_N, BLOCK_M], 0.0, gl.float32, MMA)
            for _ in gl.static_range(SPLIT_K):
                # Past the L1 cache, which does not see what other processors store.
                acc += gl.load(partials + within, cache_modifier=".cg")
                if PARTS == 2:
                    up += gl.load(partials + TILE + within, cache_modifier=".cg")
                partials += stride
    if is_last:
        dtype: gl.constexpr = out_ptr.dtype.element_ty
        result = _scaled(acc, of_weight, of_x, bias_ptr, n, size_n, scale)
        if PARTS == 2:
            result_up = _scaled(up, of_up, of_x, None, n, size_n, scale)
            # Rounded as it would be between a product and an activation.
            gate = result.to(dtype).to(gl.float32)
            result = _activate(gate, ACTIVATION) * result_up.to(dtype).to(gl.float32)
            bits = _magnitude_bits(result.to(dtype).to(gl.float32))
            bits = gl.where((n < size_n)[:, None], bits, 0)
            at = maxima_ptr + m * gl.cdiv(size_n, BLOCK_N) + tile_n
            gl.store(at, gl.max(bits, 0), mask=m < rows)
        turned_result = gl.convert_layout(result, OUT)
        if IS_EARLY:
            turned_result += residual.to(gl.float32)
        elif residual_ptr is not None:
            source = residual_ptr + wide_m * residual_stride + out_n
            turned_result += gl.load(source, mask=inside, other=0.0).to(gl.float32)
        target = out_ptr + wide_m * out_stride + out_n
        gl.store(target, turned_result.to(dtype), mask=inside)


@gluon.jit
def _copy_weight(
    weights, xs, ready, weight_tiles, place, step, is_there, tile_n, size_n, PARTS: gl.constexpr,
    BLOCK_N: gl.constexpr,
):  # fmt: skip
    """And says how many bytes the place waits for, those of x among them."""
    STEP: gl.constexpr = weight_tiles.block_type.shape[1]
    NUM_BYTES: gl.constexpr = (weights.shape[1] + xs.shape[1]) * STEP
    mbarrier.expect(ready.index(place), NUM_BYTES, is_there)
    held = weights.index(place)
    if PARTS == 1:
        tma.async_copy_global_to_shared(
            weight_tiles, [tile_n * BLOCK_N, step * STEP], ready.index(place), held, is_there
        )
    else:
        for i in gl.static_range(2):
            tma.async_copy_global_to_shared(
                weight_tiles, [i * size_n + tile_n * BLOCK_N, step * STEP], ready.index(place),
                held.slice(i * BLOCK_N, BLOCK_N), is_there,
            )  # fmt: skip


@gluon.jit
def _nothing():
    """What tensors are added to: a tuple that holds them."""
    return ()


@gluon.jit
def _product(
    weight, turned, BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr, MMA: gl.constexpr
):  # fmt: skip
    """Of a step alone: the tensor cores' own sums have 14 bits."""
    none = gl.full([BLOCK_N, BLOCK_M], 0.0, gl.float32, MMA)
    return warpgroup_mma(weight, turned, none, use_acc=False, is_async=True)


@gluon.jit
def _scaled(acc, of_weight, of_x, bias_ptr, n, size_n, scale):
    acc = acc * (of_weight[:, None] * of_x[None, :])
    if bias_ptr is not None:
        acc += gl.load(bias_ptr + n, mask=n < size_n, other=0.0).to(gl.float32)[:, None]
    if scale is not None:
        acc *= scale
    return acc
