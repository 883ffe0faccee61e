"""Causal convolution over the tokens of a sequence, channel by channel, with its state.

As `causal_conv` of kernels/reference_conv.py, which says what it is. Rows of one token: one launch
reads the state, and moves it on by the token, whatever guesses come behind. Tiles of other rows:
one launch for the sums, which reads the state only, and one that writes it; where states in the
middle of rows are kept, one more between them, for these may need what the row began with.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.gated_mul import activate
from baton.kernels.overlap import overlap
from baton.kernels.reference_conv import Conv
from baton.kernels.state_plan import TILE_TOKENS, DeviceStatePlan

_STEP_CHANNELS, _TILE_CHANNELS, _TOKENS_AT_ONCE = 256, 64, 32
assert TILE_TOKENS % _TOKENS_AT_ONCE == 0


def causal_conv(
    x: Tensor,
    conv: Conv,
    state: Tensor,
    layer: int,
    plan: DeviceStatePlan,
    *,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """See kernels/reference_conv.py.

    Args:
        x: [T, C]; rows may be strided.
        state: [num_slots + 1, heads, layers, K − 1, width], any float dtype.
        out: [T, C]; rows may be strided.
        pdl: launched to overlap the end of the kernel before.

    Returns:
        out, or a new tensor; zeros in padding at the end of the step.
    """
    assert x.stride(1) == 1 and state.stride(4) == 1 and state.stride(3) == state.shape[4]
    if out is None:
        out = plan.make_out(x, x.shape[1])
    if plan.num_padding:
        out[-plan.num_padding :].zero_()
    own = state[:, :, layer]
    common: dict[str, Any] = {
        "channels": x.shape[1],
        "x_stride": x.stride(0),
        "slot_stride": own.stride(0),
        "head_stride": own.stride(1),
        "width": own.shape[3],
        "KERNEL": own.shape[2] + 1,
    }
    of_sums = {"HAS_BIAS": conv.bias is not None, "ACTIVATION": conv.activation or "none"}
    bias = conv.weight if conv.bias is None else conv.bias
    if plan.num_singles:
        grid = (triton.cdiv(x.shape[1], _STEP_CHANNELS), plan.num_rows)
        kernel: Any = _conv_step if plan.width == 1 else _conv_guesses
        kernel[grid](
            x,
            conv.weight,
            bias,
            conv.places,
            own,
            plan.slots,
            plan.positions,
            out,
            out_stride=out.stride(0),
            BLOCK_C=_STEP_CHANNELS,
            num_warps=_STEP_CHANNELS // 64,
            **common,
            **of_sums,
            **(
                {"LEAVES_PADDING": plan.shared is not None}
                if plan.width == 1
                else {"WIDTH": plan.width}
            ),
            **overlap(x, pdl=pdl),
        )

        def again(x: Tensor, plan: DeviceStatePlan) -> None:
            _conv_settle[grid](
                x,
                conv.places,
                own,
                plan.slots,
                plan.num_standing,
                WIDTH=plan.width,
                BLOCK_C=_STEP_CHANNELS,
                num_warps=_STEP_CHANNELS // 64,
                **{**common, "x_stride": x.stride(0)},
            )

        plan.note(again, x)
    if plan.rows is None or plan.tiles is None:
        return out
    num_blocks = triton.cdiv(x.shape[1], _TILE_CHANNELS)
    _conv_tiles[(num_blocks, len(plan.tiles), TILE_TOKENS // _TOKENS_AT_ONCE)](
        x,
        conv.weight,
        bias,
        conv.places,
        own,
        plan.rows,
        plan.tiles,
        out,
        out_stride=out.stride(0),
        BLOCK_T=_TOKENS_AT_ONCE,
        BLOCK_C=_TILE_CHANNELS,
        num_warps=4,
        **common,
        **of_sums,
    )
    for of_tiles in (True, False) if plan.has_kept else (False,):
        num_states = len(plan.tiles if of_tiles else plan.rows)
        _conv_state[(triton.cdiv(x.shape[1], _STEP_CHANNELS), num_states)](
            x,
            conv.places,
            own,
            plan.rows,
            plan.tiles,
            OF_TILES=of_tiles,
            BLOCK_C=_STEP_CHANNELS,
            num_warps=_STEP_CHANNELS // 64,
            **common,
        )
    return out


@triton.jit
def _finish(sums, ACTIVATION: tl.constexpr):
    if ACTIVATION == "none":
        return sums
    else:
        return activate(sums, ACTIVATION)


@triton.jit
def _conv_step(
    x,
    weight,
    bias,
    places,
    state,
    slots,
    positions,
    out,
    channels,
    x_stride,
    out_stride,
    slot_stride,
    head_stride,
    width,
    KERNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LEAVES_PADDING: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    """LEAVES_PADDING: nothing comes out for rows without a slot."""
    row = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    place = tl.load(places + c, mask=inside, other=0)
    offset = (place // width).to(tl.int64) * head_stride + place % width
    sums = tl.zeros([BLOCK_C], tl.float32)
    if HAS_BIAS:
        sums = tl.load(bias + c, mask=inside, other=0.0)
    # No kernel before this one writes the state, nor says where it is.
    slot = tl.load(slots + row)
    continues = (slot >= 0) & (tl.load(positions + row) > 0)
    own = state + slot * slot_stride + offset
    moves = inside & (slot >= 0)
    for tap in tl.static_range(KERNEL - 1):
        before = tl.load(own + tap * width, mask=inside & continues, other=0.0).to(tl.float32)
        sums += before * tl.load(weight + tap * channels + c, mask=inside, other=0.0)
        if tap > 0:
            # One step towards the oldest, whose place was read before.
            tl.store(own + (tap - 1) * width, before.to(state.dtype.element_ty), mask=moves)
        tl.debug_barrier()
    last = tl.load(weight + (KERNEL - 1) * channels + c, mask=inside, other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if LEAVES_PADDING:
        if slot < 0:
            return
    value = tl.load(x + row * x_stride + c, mask=inside, other=0.0).to(tl.float32)
    sums += value * last
    tl.store(own + (KERNEL - 2) * width, value.to(state.dtype.element_ty), mask=moves)
    y = _finish(sums, ACTIVATION).to(out.dtype.element_ty)
    tl.store(out + row * out_stride + c, y, mask=inside)


@triton.jit
def _conv_guesses(
    x,
    weight,
    bias,
    places,
    state,
    slots,
    positions,
    out,
    channels,
    x_stride,
    out_stride,
    slot_stride,
    head_stride,
    width,
    KERNEL: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    """Of rows of a token and guesses; the state moves on by the token."""
    row = tl.program_id(1).to(tl.int64) * WIDTH
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    place = tl.load(places + c, mask=inside, other=0)
    offset = (place // width).to(tl.int64) * head_stride + place % width
    slot = tl.load(slots + row)
    continues = (slot >= 0) & (tl.load(positions + row) > 0)
    own = state + slot * slot_stride + offset
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    for j in tl.static_range(WIDTH):
        sums = tl.zeros([BLOCK_C], tl.float32)
        if HAS_BIAS:
            sums = tl.load(bias + c, mask=inside, other=0.0)
        for tap in tl.static_range(KERNEL):
            if j + tap < KERNEL - 1:
                value = tl.load(own + (j + tap) * width, mask=inside & continues, other=0.0)
            else:
                token = row + j + tap - (KERNEL - 1)
                value = tl.load(x + token * x_stride + c, mask=inside, other=0.0)
            tap_weight = tl.load(weight + tap * channels + c, mask=inside, other=0.0)
            sums += value.to(tl.float32) * tap_weight
        y = _finish(sums, ACTIVATION).to(out.dtype.element_ty)
        tl.store(out + (row + j) * out_stride + c, y, mask=inside)
    _move_on(x, own, row, 1, c, inside, continues, slot >= 0, x_stride, width, KERNEL)


@triton.jit
def _conv_settle(
    x,
    places,
    state,
    slots,
    num_standing,
    channels,
    x_stride,
    slot_stride,
    head_stride,
    width,
    KERNEL: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Moves states on by the guesses that stand."""
    count = tl.load(num_standing + tl.program_id(1)) - 1
    if count <= 0:
        return
    row = tl.program_id(1).to(tl.int64) * WIDTH
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    place = tl.load(places + c, mask=inside, other=0)
    slot = tl.load(slots + row)
    own = state + slot * slot_stride
    own += (place // width).to(tl.int64) * head_stride + place % width
    real = slot >= 0
    _move_on(x, own, row + 1, count, c, inside, real, real, x_stride, width, KERNEL)


@triton.jit
def _move_on(
    x, own, first, count, c, inside, continues, moves, x_stride, width, KERNEL: tl.constexpr
):
    """A state of channels, of which each thread has its own, by `count` tokens from `first` on."""
    for j in tl.static_range(KERNEL - 1):
        token = j + count - (KERNEL - 1)
        if token >= 0:
            value = tl.load(x + (first + token) * x_stride + c, mask=inside, other=0.0)
            value = value.to(tl.float32)
        else:
            # Further on in the state than what is written now.
            before = own + (j + count) * width
            value = tl.load(before, mask=inside & continues, other=0.0).to(tl.float32)
        tl.debug_barrier()
        tl.store(own + j * width, value.to(own.dtype.element_ty), mask=inside & moves)


@triton.jit
def _conv_tiles(
    x,
    weight,
    bias,
    places,
    state,
    rows,
    tiles,
    out,
    channels,
    x_stride,
    out_stride,
    slot_stride,
    head_stride,
    width,
    KERNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tile = tiles + tl.program_id(1) * 4
    start = tl.program_id(2) * BLOCK_T
    count = tl.load(tile + 1) - start
    if count <= 0:
        return
    first = tl.load(tile) + start
    row = rows + tl.load(tile + 2) * 8
    begin = tl.load(row)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    token = first + tl.arange(0, BLOCK_T)
    inside = c < channels
    real = (tl.arange(0, BLOCK_T) < count)[:, None] & inside[None, :]
    sums = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    if HAS_BIAS:
        sums += tl.load(bias + c, mask=inside, other=0.0)[None, :]
    x_own = x + token.to(tl.int64)[:, None] * x_stride + c[None, :]
    for tap in tl.static_range(KERNEL):
        back = KERNEL - 1 - tap
        has = real & (token - back >= begin)[:, None]
        value = tl.load(x_own - back * x_stride, mask=has, other=0.0).to(tl.float32)
        sums += value * tl.load(weight + tap * channels + c, mask=inside, other=0.0)[None, :]
    if (first - begin < KERNEL - 1) & (tl.load(row + 3) == 0):
        slot = tl.load(row + 2).to(tl.int64)
        place = tl.load(places + c, mask=inside, other=0)
        offset = (place // width).to(tl.int64) * head_stride + place % width
        own = state + slot * slot_stride + offset
        for tap in tl.static_range(KERNEL - 1):
            # Its place among the inputs before the row.
            before = token - begin + tap
            has = real & (before < KERNEL - 1)[:, None]
            old = tl.load(own[None, :] + before[:, None] * width, mask=has, other=0.0)
            tap_weight = tl.load(weight + tap * channels + c, mask=inside, other=0.0)
            sums += old.to(tl.float32) * tap_weight[None, :]
    y = _finish(sums, ACTIVATION).to(out.dtype.element_ty)
    tl.store(out + token.to(tl.int64)[:, None] * out_stride + c[None, :], y, mask=real)


@triton.jit
def _conv_state(
    x,
    places,
    state,
    rows,
    tiles,
    channels,
    x_stride,
    slot_stride,
    head_stride,
    width,
    KERNEL: tl.constexpr,
    OF_TILES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Leaves the last inputs of every row, or of what comes before the end of a tile, in a slot."""
    if OF_TILES:
        tile = tiles + tl.program_id(1) * 4
        row = rows + tl.load(tile + 2) * 8
        target = tl.load(tile + 3).to(tl.int64)
        end = tl.load(tile) + tl.load(tile + 1)
    else:
        row = rows + tl.program_id(1) * 8
        target = tl.load(row + 2).to(tl.int64)
        end = tl.load(row) + tl.load(row + 1)
    if target < 0:
        return
    begin = tl.load(row)
    slot = tl.load(row + 2).to(tl.int64)
    continues = tl.load(row + 3) == 0
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    place = tl.load(places + c, mask=inside, other=0)
    offset = (place // width).to(tl.int64) * head_stride + place % width
    for j in tl.static_range(KERNEL - 1):
        token = end - (KERNEL - 1) + j
        if token >= begin:
            value = tl.load(x + token.to(tl.int64) * x_stride + c, mask=inside, other=0.0)
            value = value.to(tl.float32)
        else:
            # Further on in the state than what is written now.
            before = state + slot * slot_stride + offset + (KERNEL - 1 + token - begin) * width
            value = tl.load(before, mask=inside & continues, other=0.0).to(tl.float32)
        tl.debug_barrier()
        kept = value.to(state.dtype.element_ty)
        tl.store(state + target * slot_stride + offset + j * width, kept, mask=inside)
