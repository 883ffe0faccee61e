"""Decode rows that bring guesses along: the start of such a step, and what of them stands.

A row of a slot with n drafts becomes n + 1 tokens, in a step of `width` tokens for each row: its
last token, then the drafts; the rest is padding. Behind each a token is drawn, and what stands is
what was drawn up to the first draft that it is not.

Where a chain of guesses begins, the "drafts" are tokens that are known (chain_steps.py): nothing is
drawn but behind the last of them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.logit_shaping import Counting, count_token

_BLOCK = 128


def begin_drafted_step(
    rows: Tensor,
    token_ids: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    draft_ids: Tensor,
    num_drafts: Tensor,
    input_ids: Tensor,
    positions: Tensor,
    slots: Tensor,
    token_rows: Tensor,
    back: Tensor,
    *,
    block_size: int,
    num_slot_groups: int = 0,
    counting: Counting | None = None,
) -> None:
    """As `batch_state.begin_step`, for tokens of which each row has `width`, at most K + 1.

    Counts all of a row's tokens as visible, drafts included (`accept_drafts` takes back what does
    not stand); of the tokens' counts, where `counting` asks for them, only that of the row's own
    token. Padding gets token 0, position 0, place −1 and row −1.

    Args:
        rows: int32 [B], each row's slot, distinct; −1 is padding.
        token_ids, context_lens: int32 [S].
        block_tables: int32 [G, S, max_blocks], by cache group; blocks of a row adjacent.
        draft_ids: int32 [S, K], contiguous; K at least 1.
        num_drafts: int32 [S], 0 to width − 1.
        input_ids, positions: int32 [≥ B · width], out.
        slots: int64 [G, ≥ B · width], out: block_id · block_size + offset; of a group of states the
            row's slot.
        token_rows: int32 [B · width], out: each token's slot.
        back: int32 [B · width], out: how many of the slot's tokens come behind it.
    """
    count = rows.numel()
    if count == 0:
        return
    width = token_rows.numel() // count
    if not 1 < width <= draft_ids.shape[1] + 1:
        raise ValueError(f"rows of {width} tokens, and {draft_ids.shape[1]} drafts at most")
    _begin_drafted_step[(triton.cdiv(count, _BLOCK),)](
        rows,
        token_ids,
        context_lens,
        block_tables,
        draft_ids,
        num_drafts,
        input_ids,
        positions,
        slots,
        token_rows,
        back,
        count,
        block_tables.shape[2],
        block_tables.stride(1),
        block_tables.stride(0),
        slots.stride(0),
        *(counting or (None, None, None)),
        0 if counting is None else counting.marks.shape[1],
        COUNTS=counting is not None,
        GROUPS=block_tables.shape[0] - num_slot_groups,
        SLOT_GROUPS=num_slot_groups,
        DRAFTS=width - 1,
        MOST_DRAFTS=draft_ids.shape[1],
        BLOCK_SIZE=block_size,
        BLOCK=_BLOCK,
        num_warps=_BLOCK // 32,
    )


def accept_drafts(
    rows: Tensor,
    tokens: Tensor,
    draft_ids: Tensor,
    num_drafts: Tensor,
    token_ids: Tensor,
    context_lens: Tensor,
    counts: Tensor,
    *,
    counting: Counting | None = None,
) -> None:
    """Keeps of each row what was drawn up to the first draft that it is not, and counts those that
    stand where `counting` asks for it.

    Args:
        rows, draft_ids, num_drafts: as given to `begin_drafted_step`.
        tokens: int32 [B · width], what was drawn behind each token; −1 where nothing could be.
        token_ids: int32 [S], gets the last token that stands; keeps its own where that is −1.
        context_lens: int32 [S], loses what does not stand.
        counts: int32 [B], out: how many of a row's drawn tokens stand, at least 1; 0 for padding.
    """
    count = rows.numel()
    if count == 0:
        return
    _accept_drafts[(triton.cdiv(count, _BLOCK),)](
        rows,
        tokens,
        draft_ids,
        num_drafts,
        token_ids,
        context_lens,
        counts,
        *(counting or (None, None, None)),
        0 if counting is None else counting.marks.shape[1],
        count,
        COUNTS=counting is not None,
        DRAFTS=draft_ids.shape[1],
        BLOCK=_BLOCK,
        num_warps=_BLOCK // 32,
    )


@triton.jit(do_not_specialize=["count", "max_blocks", "group_stride", "slots_stride", "vocab"])
def _begin_drafted_step(
    rows,
    token_ids,
    context_lens,
    block_tables,
    draft_ids,
    num_drafts,
    input_ids,
    positions,
    slots,
    token_rows,
    back,
    count,
    max_blocks,
    stride,
    group_stride,
    slots_stride,
    marks,
    is_shaped,
    counts_from,
    vocab,
    COUNTS: tl.constexpr,
    GROUPS: tl.constexpr,
    SLOT_GROUPS: tl.constexpr,
    DRAFTS: tl.constexpr,
    MOST_DRAFTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A thread has one row: what it reads of a slot is read before it is written.
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = row < count
    slot = tl.load(rows + row, mask=exists, other=-1)
    real = slot >= 0
    base = tl.load(context_lens + slot, mask=real, other=0)
    drafts = tl.load(num_drafts + slot, mask=real, other=-1)
    token = tl.load(token_ids + slot, mask=real, other=0)
    if COUNTS:
        count_token(marks, is_shaped, counts_from, slot, token, base, vocab, real)
    for j in tl.static_range(DRAFTS + 1):
        i = row * (DRAFTS + 1) + j
        live = real & (j <= drafts)
        if j > 0:
            token = tl.load(draft_ids + slot * MOST_DRAFTS + j - 1, mask=live, other=0)
        position = tl.where(live, base + j, 0)
        index = position // BLOCK_SIZE
        placed = live & (index < max_blocks)
        tl.store(input_ids + i, tl.where(live, token, 0), mask=exists)
        tl.store(positions + i, position, mask=exists)
        tl.store(token_rows + i, tl.where(live, slot, -1), mask=exists)
        tl.store(back + i, tl.where(live, drafts - j, 0), mask=exists)
        entry = block_tables + slot.to(tl.int64) * stride + index
        out = slots + i
        for _ in tl.static_range(GROUPS):
            block = tl.load(entry, mask=placed, other=0)
            place = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
            tl.store(out, tl.where(placed, place, -1), mask=exists)
            entry += group_stride
            out += slots_stride
        entry += -index
        for _ in tl.static_range(SLOT_GROUPS):
            tl.store(out, tl.load(entry, mask=live, other=-1).to(tl.int64), mask=exists)
            entry += group_stride
            out += slots_stride
    tl.store(context_lens + slot, base + 1 + drafts, mask=real)


@triton.jit(do_not_specialize=["count", "vocab"])
def _accept_drafts(
    rows,
    tokens,
    draft_ids,
    num_drafts,
    token_ids,
    context_lens,
    counts,
    marks,
    is_shaped,
    counts_from,
    vocab,
    count,
    COUNTS: tl.constexpr,
    DRAFTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = row < count
    slot = tl.load(rows + row, mask=exists, other=-1)
    real = slot >= 0
    drafts = tl.load(num_drafts + slot, mask=real, other=0)
    length = tl.load(context_lens + slot, mask=real, other=0)
    stands = real
    standing = tl.zeros([BLOCK], tl.int32)
    for j in tl.static_range(DRAFTS):
        drawn = tl.load(tokens + row * (DRAFTS + 1) + j, mask=real, other=-1)
        draft = tl.load(draft_ids + slot * DRAFTS + j, mask=real, other=-1)
        stands = stands & (j < drafts) & (drawn == draft)
        standing += stands.to(tl.int32)
        if COUNTS:
            position = length - drafts + j
            count_token(marks, is_shaped, counts_from, slot, draft, position, vocab, stands)
    last = tl.load(tokens + row * (DRAFTS + 1) + standing, mask=real, other=-1)
    tl.store(token_ids + slot, last, mask=real & (last >= 0))
    tl.store(context_lens + slot, length - (drafts - standing), mask=real)
    tl.store(counts + row, tl.where(real, standing + 1, 0), mask=exists)
