"""Rows of many tokens through Mamba2's recurrence, as products of matrices.

A program takes one head, or some rows of its state, through one row of the step, tile by tile; the
state stays in its registers, in float32. What tokens of a tile give each other is a
product of c with b, weighted by how much decays in between; what comes from before the tile is a
product of c with the state.

A long row of few heads would leave most of a GPU idle: it is cut into segments. What each makes of
a state of zeros is found first, from that what each begins with, and then all that comes out. Which
segment it has a program finds out by itself: of a step from a graph nothing but the most that there
may be is known beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.reference_ssd import SsdWeights
from baton.kernels.ssd_step import decay_of, ssd_step, step_size
from baton.kernels.state_plan import TILE_TOKENS, DeviceStatePlan

_TILES_EACH = 4
_FEW_STATES = 264
_ROWS = 32
"""Of a step whose rows are cut into segments, at most, or the next power of two: kernels are
compiled for that."""


@dataclass(frozen=True, slots=True)
class ScanConfig:
    block_p: int
    """Rows of a head's state that a program has."""
    num_warps: int = 4
    num_stages: int = 2
    tiles_each: int = 0
    """A row is cut into segments of so many tiles, for programs of their own; 0: it is not."""


def scan_config(
    head_dim: int, state_size: int, num_heads: int, num_rows: int, num_tiles: int, itemsize: int = 2
) -> ScanConfig:
    """What an H200 was fastest with, as far as registers and shared memory hold it."""
    is_small = state_size <= 128 and itemsize == 2
    block_p = 64 if is_small else 32 if itemsize == 2 else 16
    # Tile after tile takes long, however few programs there are.
    is_long = num_heads * num_rows <= _FEW_STATES and num_tiles >= 4 * _TILES_EACH * num_rows
    return ScanConfig(
        max(16, min(block_p, triton.next_power_of_2(head_dim))),
        num_stages=2 if is_small else 1,
        tiles_each=_TILES_EACH if is_long else 0,
    )


@triton.jit
def _counts(rows_ptr, num_rows, TILES_EACH: tl.constexpr, ROWS: tl.constexpr):
    """How many segments each row has."""
    row = tl.arange(0, ROWS)
    tiles = tl.load(rows_ptr + row * 8 + 5, mask=row < num_rows, other=0)
    return row, (tiles + TILES_EACH - 1) // TILES_EACH


@triton.jit
def _place_of(row, counts, number):
    """Of the first segment of row `number`, if it has several: rows of one have no place."""
    return tl.sum(tl.where((row < number) & (counts > 1), counts, 0), 0)


@triton.jit(do_not_specialize=["num_rows"])
def _ssd_scan_kernel(
    x_ptr,
    dt_ptr,
    a_ptr,
    d_ptr,
    bias_ptr,
    states_ptr,
    rows_ptr,
    tiles_ptr,
    y_ptr,
    starts_ptr,
    decays_ptr,
    num_rows,
    x_stride,
    dt_stride,
    slot_stride,
    head_stride,
    num_heads,
    heads_each,
    head_dim,
    state_size,
    dt_scale,
    dt_min,
    dt_max,
    TILES_EACH: tl.constexpr,
    ROWS: tl.constexpr,
    ONLY_ENDS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_P rows of one head's state, through one row of the step, or one segment of it.

    ONLY_ENDS leaves what a segment makes of a state of zeros, but for a row's last one; without it
    a segment of several begins with the state that is in its place by then: the row's slot may have
    been written by the program of the last one."""
    head = tl.program_id(1)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    n, t = tl.arange(0, BLOCK_N), tl.arange(0, CHUNK)
    in_p, in_n = p < head_dim, n < state_size
    inside = in_p[:, None] & in_n[None, :]
    a, d = tl.load(a_ptr + head), tl.load(d_ptr + head)
    bias = tl.load(bias_ptr + head)
    number = tl.program_id(2)
    first_tile = 0
    at = 0
    if TILES_EACH > 0:
        every, counts = _counts(rows_ptr, num_rows, TILES_EACH, ROWS)
        is_before = tl.cumsum(counts, 0) <= number
        segment = number - tl.sum(tl.where(is_before, counts, 0), 0)
        number = tl.sum(is_before.to(tl.int32), 0)
        if number >= num_rows:
            return
        first_tile = segment * TILES_EACH
        at = _place_of(every, counts, number) + segment
    row = rows_ptr + number * 8
    slot = tl.load(row + 2).to(tl.int64)
    continues = (slot >= 0) & (tl.load(row + 3) == 0)
    num_tiles = tl.load(row + 5) - first_tile
    is_alone = True
    if TILES_EACH > 0:
        is_alone = (first_tile == 0) & (num_tiles <= TILES_EACH)
    if ONLY_ENDS:
        if num_tiles <= TILES_EACH:
            return
    tile = tiles_ptr + (tl.load(row + 4) + first_tile) * 4
    inner = num_heads * head_dim
    of_head = states_ptr + head.to(tl.int64) * head_stride
    of_head += p[:, None] * state_size + n[None, :]
    own = of_head + slot * slot_stride
    place = starts_ptr + (at * num_heads + head).to(tl.int64) * head_dim * state_size
    place += p[:, None] * state_size + n[None, :]
    if ONLY_ENDS:
        state = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    elif is_alone:
        state = tl.load(own, mask=inside & continues, other=0.0).to(tl.float32)
    else:
        state = tl.load(place, mask=inside, other=0.0)
    passed = 0.0
    dtype = x_ptr.dtype.element_ty
    b_column = inner + (head // heads_each) * state_size
    c_column = b_column + (num_heads // heads_each) * state_size
    for _ in range(tl.minimum(num_tiles, TILES_EACH) if TILES_EACH > 0 else num_tiles):
        token = (tl.load(tile) + t).to(tl.int64)
        is_token = t < tl.load(tile + 1)
        dt = tl.load(dt_ptr + token * dt_stride + head, mask=is_token, other=0.0).to(tl.float32)
        step = tl.where(is_token, step_size(dt, bias, dt_scale, dt_min, dt_max), 0.0)
        exponent = step * a
        upto = tl.cumsum(exponent, axis=0)
        behind = tl.cumsum(exponent, axis=0, reverse=True) - exponent
        x_rows = x_ptr + token[:, None] * x_stride
        is_x, is_n = is_token[:, None] & in_p[None, :], is_token[:, None] & in_n[None, :]
        x = tl.load(x_rows + head * head_dim + p[None, :], mask=is_x, other=0.0)
        b = tl.load(x_rows + b_column + n[None, :], mask=is_n, other=0.0)
        if not ONLY_ENDS:
            c = tl.load(x_rows + c_column + n[None, :], mask=is_n, other=0.0)
            scores = tl.dot(c, tl.trans(b), input_precision=PRECISION)
            if PRECISION == "tf32x3":
                # A difference of long sums would round more than the rest does.
                later = tl.where(t[:, None] > t[None, :], exponent[:, None], 0.0)
                between = tl.cumsum(later, axis=0)
            else:
                between = upto[:, None] - upto[None, :]
            # A later token's share would overflow before it is left out.
            between = tl.where(t[:, None] >= t[None, :], between, -float("inf"))
            scores *= tl.exp(between) * step[None, :]
            y = tl.dot(c, tl.trans(state.to(dtype)), input_precision=PRECISION)
            y *= tl.exp(upto)[:, None]
            y += tl.dot(scores.to(dtype), x, input_precision=PRECISION)
            y += d * x.to(tl.float32)
            y_rows = y_ptr + token[:, None] * inner + head * head_dim + p[None, :]
            tl.store(y_rows, y.to(y_ptr.dtype.element_ty), mask=is_x)
        left = tl.exp(behind) * step
        added = tl.dot(tl.trans((x * left[:, None]).to(dtype)), b, input_precision=PRECISION)
        whole = tl.sum(exponent, axis=0)
        passed += whole
        state = state * decay_of(whole) + added
        if not ONLY_ENDS:
            kept_in = tl.load(tile + 3).to(tl.int64)
            if kept_in >= 0:
                kept = state.to(states_ptr.dtype.element_ty)
                tl.store(of_head + kept_in * slot_stride, kept, mask=inside)
        tile += 4
    if ONLY_ENDS:
        tl.store(place, state, mask=inside)
        tl.store(decays_ptr + at * num_heads + head, passed)
    else:
        is_kept = slot >= 0
        if TILES_EACH > 0:
            is_kept = is_kept & (num_tiles <= TILES_EACH)
        tl.store(own, state.to(states_ptr.dtype.element_ty), mask=inside & is_kept)


@triton.jit(do_not_specialize=["num_rows"])
def _ssd_starts_kernel(
    states_ptr,
    rows_ptr,
    starts_ptr,
    decays_ptr,
    num_rows,
    slot_stride,
    head_stride,
    num_heads,
    size,
    TILES_EACH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Puts what each segment of a row begins with in the place of what it ends with alone."""
    head = tl.program_id(1)
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < size
    row = rows_ptr + tl.program_id(2) * 8
    num_segments = tl.cdiv(tl.load(row + 5), TILES_EACH)
    if num_segments <= 1:
        return
    every, counts = _counts(rows_ptr, num_rows, TILES_EACH, ROWS)
    at = _place_of(every, counts, tl.program_id(2)) * num_heads + head
    slot = tl.load(row + 2).to(tl.int64)
    continues = (slot >= 0) & (tl.load(row + 3) == 0)
    own = states_ptr + slot * slot_stride + head.to(tl.int64) * head_stride + offset
    state = tl.load(own, mask=inside & continues, other=0.0).to(tl.float32)
    for _ in range(num_segments - 1):
        place = starts_ptr + at.to(tl.int64) * size + offset
        end = tl.load(place, mask=inside, other=0.0)
        tl.store(place, state, mask=inside)
        state = state * decay_of(tl.load(decays_ptr + at)) + end
        at += num_heads
    tl.store(starts_ptr + at.to(tl.int64) * size + offset, state, mask=inside)


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    weights: SsdWeights,
    states: Tensor,
    rows: Tensor,
    tiles: Tensor,
    out: Tensor,
    *,
    config: ScanConfig | None = None,
) -> None:
    """`reference_ssd.ssd` of rows of any number of tokens; tokens of no row are left as they are.

    Args:
        x: [T, H · head_dim + 2 · groups · state_size]; rows may be strided.
        dt: [T, H]; rows may be strided.
        states: [slots, H, head_dim, state_size], of one layer; a head's numbers contiguous.
        rows, tiles: as `DeviceStatePlan` has them.
        out: [T, H, head_dim], contiguous, of x's dtype.
    """
    _, num_heads, head_dim, state_size = states.shape
    num_rows, groups = len(rows), weights.num_groups
    assert x.shape[1] == num_heads * head_dim + 2 * groups * state_size and x.stride(1) == 1
    assert dt.shape == (len(x), num_heads) and dt.stride(1) == 1
    assert states.stride()[2:] == (state_size, 1) and num_heads % groups == 0
    assert out.is_contiguous() and out.dtype == x.dtype
    if num_rows == 0:
        return
    config = config or scan_config(
        head_dim, state_size, num_heads, num_rows, len(tiles), x.element_size()
    )
    tiles_each, num_programs = config.tiles_each, num_rows
    rows_padded = max(_ROWS, triton.next_power_of_2(num_rows))
    starts, decays = weights.d, weights.d
    if tiles_each:
        num_programs = len(tiles) // tiles_each + num_rows
        # Most where rows have a tile more than a segment: two places each.
        starts = torch.empty(
            (2 * len(tiles) // (tiles_each + 1), num_heads, head_dim, state_size),
            dtype=torch.float32,
            device=x.device,
        )
        decays = starts.new_empty(len(starts), num_heads)

    def scan(*, only_ends: bool) -> None:
        grid = (triton.cdiv(head_dim, config.block_p), num_heads, num_programs)
        _ssd_scan_kernel[grid](
            x,
            dt,
            weights.a,
            weights.d,
            weights.dt_bias,
            states,
            rows,
            tiles,
            out,
            starts,
            decays,
            num_rows,
            x.stride(0),
            dt.stride(0),
            states.stride(0),
            states.stride(1),
            num_heads,
            num_heads // groups,
            head_dim,
            state_size,
            weights.dt_scale,
            weights.dt_min,
            weights.dt_max,
            TILES_EACH=tiles_each,
            ROWS=rows_padded,
            ONLY_ENDS=only_ends,
            CHUNK=TILE_TOKENS,
            BLOCK_P=config.block_p,
            BLOCK_N=max(16, triton.next_power_of_2(state_size)),
            PRECISION="tf32x3" if x.dtype == torch.float32 else "tf32",
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    if tiles_each:
        scan(only_ends=True)
        size, block = head_dim * state_size, 1024
        _ssd_starts_kernel[(triton.cdiv(size, block), num_heads, num_rows)](
            states,
            rows,
            starts,
            decays,
            num_rows,
            states.stride(0),
            states.stride(1),
            num_heads,
            size,
            TILES_EACH=tiles_each,
            ROWS=rows_padded,
            BLOCK=block,
            num_warps=4,
        )
    scan(only_ends=False)


def ssd(
    x: Tensor,
    dt: Tensor,
    weights: SsdWeights,
    state: Tensor,
    layer: int,
    plan: DeviceStatePlan,
    *,
    out: Tensor | None = None,
    config: ScanConfig | None = None,
    pdl: bool = False,
) -> Tensor:
    """See kernels/reference_ssd.py.

    Args:
        out: [T, H, head_dim], contiguous.
        config: of rows of many tokens, instead of that of `scan_config`.
        pdl: launched to overlap the end of the kernel before.

    Returns:
        out, or a new tensor; zeros in padding at the end of the step.
    """
    states = state[:, :, layer]
    if out is None:
        out = plan.make_out(x, *states.shape[1:3])
    if plan.num_padding:
        out[-plan.num_padding :].zero_()
    single = plan.num_singles
    if single:
        ssd_step(
            x[:single],
            dt[:single],
            weights,
            states,
            plan.slots,
            plan.positions,
            out[:single],
            width=plan.width,
            leaves_padding=plan.shared is not None,
            pdl=pdl,
        )

        def again(x: Tensor, dt: Tensor, plan: DeviceStatePlan) -> None:
            tensors = x, dt, weights, states, plan.slots, plan.positions, None
            ssd_step(*tensors, width=plan.width, num_standing=plan.num_standing)

        plan.note(again, x, dt)
    if plan.rows is not None and plan.tiles is not None:
        if config is None and plan.shared is not None:
            # One row may have all tokens.
            _, num_heads, head_dim, state_size = states.shape
            num_tiles = len(x) // TILE_TOKENS
            config = scan_config(head_dim, state_size, num_heads, 1, num_tiles, x.element_size())
        ssd_scan(x, dt, weights, states, plan.rows, plan.tiles, out, config=config)
    return out
