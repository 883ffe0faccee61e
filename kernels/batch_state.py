"""Keeping the batch's state on the device: changes from the host, and the start of a step."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.logit_shaping import Counting, count_token

_BLOCK = 128


def scatter(state: Tensor, updates: Tensor) -> None:
    """state[offset] = value for every update, in one launch.

    Args:
        state: int32 [N], contiguous.
        updates: int32 [2, n], offsets and values, on the device. A negative offset is passed over;
            of two updates of one offset either may win.
    """
    count = updates.shape[1]
    if count == 0:
        return
    _scatter[(triton.cdiv(count, _BLOCK),)](
        state, updates, count, updates.stride(0), BLOCK=_BLOCK, num_warps=_BLOCK // 32
    )


def begin_step(
    rows: Tensor,
    token_ids: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    input_ids: Tensor,
    positions: Tensor,
    slots: Tensor,
    *,
    block_size: int,
    num_slot_groups: int = 0,
    counting: Counting | None = None,
    leaves_padding: bool = False,
    pdl: bool = False,
) -> None:
    """Gives every decode row its last token, that token's position and its place in the KV pool.

    Counts the token as visible: context_lens of each row's slot grows by one, and so does the
    token's count where `counting` asks for it. Padding rows get
    token 0, position 0 and place −1; a row whose table ends before its position gets place −1.

    Args:
        rows: int32 [B], each row's slot, distinct; −1 is padding.
        token_ids, context_lens: int32 [S].
        block_tables: int32 [G, S, max_blocks], by cache group; blocks of a row adjacent.
        input_ids, positions: int32 [≥ B], out.
        slots: int64 [G, ≥ B], out: block_id · block_size + offset; of a group of states the row's
            slot, the first entry of its table.
        num_slot_groups: how many groups are of states; they come last.
        leaves_padding: of padding rows nothing is written: their places are others'.
        pdl: launched to overlap the end of the kernel before.
    """
    count = rows.numel()
    if count == 0:
        return
    options = {"launch_pdl": True} if pdl else {}
    _begin_step[(triton.cdiv(count, _BLOCK),)](
        rows,
        token_ids,
        context_lens,
        block_tables,
        input_ids,
        positions,
        slots,
        count,
        block_tables.shape[2],
        block_tables.stride(1),
        block_tables.stride(0),
        slots.stride(0),
        *(counting or (None, None, None)),
        0 if counting is None else counting.marks.shape[1],
        GROUPS=block_tables.shape[0] - num_slot_groups,
        SLOT_GROUPS=num_slot_groups,
        BLOCK_SIZE=block_size,
        COUNTS=counting is not None,
        LEAVES_PADDING=leaves_padding,
        BLOCK=_BLOCK,
        PDL=pdl,
        num_warps=_BLOCK // 32,
        **options,
    )


@triton.jit(do_not_specialize=["count", "stride"])
def _scatter(state, updates, count, stride, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offset = tl.load(updates + i, mask=i < count, other=-1)
    value = tl.load(updates + stride + i, mask=i < count, other=0)
    tl.store(state + offset, value, mask=offset >= 0)


@triton.jit(do_not_specialize=["count", "max_blocks", "group_stride", "slots_stride", "vocab"])
def _begin_step(
    rows,
    token_ids,
    context_lens,
    block_tables,
    input_ids,
    positions,
    slots,
    count,
    max_blocks,
    stride,
    group_stride,
    slots_stride,
    marks,
    is_shaped,
    counts_from,
    vocab,
    GROUPS: tl.constexpr,
    SLOT_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    COUNTS: tl.constexpr,
    LEAVES_PADDING: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(rows + i, mask=i < count, other=-1)
    real = slot >= 0
    position = tl.load(context_lens + slot, mask=real, other=0)
    token = tl.load(token_ids + slot, mask=real, other=0)
    page = position // BLOCK_SIZE
    placed = real & (page < max_blocks)
    written = real if LEAVES_PADDING else i < count
    tl.store(input_ids + i, token, mask=written)
    tl.store(positions + i, position, mask=written)
    entry = block_tables + slot.to(tl.int64) * stride + page
    out = slots + i
    for _ in tl.static_range(GROUPS):
        block = tl.load(entry, mask=placed, other=0)
        place = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
        tl.store(out, tl.where(placed, place, -1), mask=written)
        entry += group_stride
        out += slots_stride
    entry += -page
    for _ in tl.static_range(SLOT_GROUPS):
        tl.store(out, tl.load(entry, mask=real, other=-1).to(tl.int64), mask=written)
        entry += group_stride
        out += slots_stride
    if COUNTS:
        count_token(marks, is_shaped, counts_from, slot, token, position, vocab, real)
    tl.store(context_lens + slot, position + 1, mask=real)
