"""Penalties, biases and bans on the device: see reference_logit_shaping for what is computed.

One launch before a draw. Rows without any of it cost two loads; of the others every program changes
its own part of the vocabulary. What the answer has of each token is counted by whoever makes a
token visible: `begin_step`, and for guesses that stood `accept_drafts`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.reference_logit_shaping import BANNED, COUNT, FINAL, PROMPTED

_BLOCK = 1024
_ENTRIES = 128
_PROGRAMS = 4 * 132
TOKEN_BITS = 20
"""Of an entry of `bans`; above them is the number of guesses behind which it counts."""


class Counting(NamedTuple):
    """What is counted where a token becomes visible; S slots."""

    marks: Tensor
    """int32 [S, vocab], as reference_logit_shaping has them."""
    is_shaped: Tensor
    """int32 [S]: 0 where nothing is asked."""
    counts_from: Tensor
    """int32 [S], position of the answer's first token."""


class ShapingColumns(NamedTuple):
    """What is asked, by slot."""

    counting: Counting
    presence: Tensor
    """float32 [S], and so are these."""
    frequency: Tensor
    repetition: Tensor
    may_end_at: Tensor
    """int32 [S], position from which on a token may be FINAL."""
    num_biases: Tensor
    """int32 [S]"""
    bias_tokens: Tensor
    """int32 [S, NB]"""
    biases: Tensor
    """float32 [S, NB]"""
    num_bans: Tensor
    """int32 [S]"""
    bans: Tensor
    """int32 [S, NX]: tokens that are not drawn in this step, in a row behind so many guesses."""


class Guesses(NamedTuple):
    """Those of a step's decode rows, see `drafts`."""

    draft_ids: Tensor
    """int32 [S, K]"""
    num_drafts: Tensor
    """int32 [S]"""
    num_rows: int
    """Rows of logits, from the first on, that are of decode rows; the others have no guesses."""


def shape_logits(
    logits: Tensor,
    rows: Tensor,
    context_lens: Tensor,
    columns: ShapingColumns,
    out: Tensor,
    *,
    back: Tensor | None = None,
    guesses: Guesses | None = None,
    pdl: bool = False,
) -> None:
    """Writes the logits of rows whose slot asks for it, changed, and of no others.

    Args:
        logits: float32, bfloat16 or float16 [R, vocab]; tokens of a row adjacent.
        rows: int32 [R], each row's slot; −1 is padding.
        context_lens: int32 [S], the position that the drawn token will have.
        out: float32 [≥ R, vocab]; `logits` itself where those are float32.
        back: int32 [R], how far before its slot's position a row draws. None: nowhere.
        guesses: of a step that has some; those before a row's token count as emitted.
        pdl: launched to overlap the end of the kernel before.
    """
    num_rows, vocab = logits.shape
    if num_rows == 0:
        return
    if logits.stride(1) != 1 or out.stride(1) != 1:
        raise ValueError("tokens of a row must be adjacent")
    block = min(_BLOCK, max(16, triton.next_power_of_2(vocab)))
    blocks = triton.cdiv(vocab, block)
    span = triton.cdiv(blocks, max(1, min(blocks, triton.cdiv(_PROGRAMS, num_rows))))
    counting = columns.counting
    options = {"launch_pdl": True} if pdl else {}
    _shape[(num_rows, triton.cdiv(blocks, span))](
        logits,
        out,
        rows,
        context_lens,
        back,
        None if guesses is None else guesses.draft_ids,
        None if guesses is None else guesses.num_drafts,
        0 if guesses is None else guesses.num_rows,
        *counting,
        *columns[1:],
        vocab,
        logits.stride(0),
        out.stride(0),
        span * block,
        columns.bias_tokens.shape[1],
        columns.bans.shape[1],
        DRAFTS=0 if guesses is None else guesses.draft_ids.shape[1],
        HAS_BACK=back is not None,
        IN_PLACE=out is logits,
        BLOCK=block,
        ENTRIES=_ENTRIES,
        TOKEN_BITS=TOKEN_BITS,
        COUNT=COUNT,
        PROMPTED=PROMPTED,
        BANNED=BANNED,
        FINAL=FINAL,
        LARGEST=torch.finfo(torch.float32).max,
        PDL=pdl,
        # The reference rounds each product.
        enable_fp_fusion=False,
        num_warps=4,
        **options,
    )


@triton.jit
def count_token(marks, is_shaped, counts_from, slot, token, position, vocab, real):
    """Counts tokens that become visible, those of an answer that asks for it."""
    wanted = real & (tl.load(is_shaped + slot, mask=real, other=0) != 0)
    wanted &= position >= tl.load(counts_from + slot, mask=wanted, other=0)
    tl.atomic_add(marks + slot.to(tl.int64) * vocab + token, 1, mask=wanted, sem="relaxed")


@triton.jit(do_not_specialize=["num_guess_rows", "span"])
def _shape(
    logits,
    out,
    rows,
    context_lens,
    back,
    draft_ids,
    num_drafts,
    num_guess_rows,
    marks,
    is_shaped,
    counts_from,
    presence,
    frequency,
    repetition,
    may_end_at,
    num_biases,
    bias_tokens,
    biases,
    num_bans,
    bans,
    vocab,
    stride,
    out_stride,
    span,
    most_biases,
    most_bans,
    DRAFTS: tl.constexpr,
    HAS_BACK: tl.constexpr,
    IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
    TOKEN_BITS: tl.constexpr,
    COUNT: tl.constexpr,
    PROMPTED: tl.constexpr,
    BANNED: tl.constexpr,
    FINAL: tl.constexpr,
    LARGEST: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0)
    slot = tl.load(rows + row)
    asked = tl.load(is_shaped + slot, mask=slot >= 0, other=0)
    if asked != 0:
        start = tl.program_id(1) * span
        end = min(start + span, vocab)
        source = logits + row.to(tl.int64) * stride
        target = out + row.to(tl.int64) * out_stride
        num_behind = 0
        if HAS_BACK:
            num_behind = tl.load(back + row)
        position = tl.load(context_lens + slot) - num_behind
        # Guesses before this row's token.
        num_before = 0
        if DRAFTS > 0:
            num_before = tl.load(num_drafts + slot) - num_behind
            num_before = tl.where(row < num_guess_rows, num_before, 0)
        mine = marks + slot.to(tl.int64) * vocab

        if not IN_PLACE:
            for first in range(start, end, BLOCK):
                token = first + tl.arange(0, BLOCK)
                x = tl.load(source + token, mask=token < end, other=0.0).to(tl.float32)
                tl.store(target + token, x, mask=token < end)
            tl.debug_barrier()
        count = tl.load(num_biases + slot)
        if count > 0:
            for first in range(0, count, ENTRIES):
                entry = first + tl.arange(0, ENTRIES)
                at = slot.to(tl.int64) * most_biases + entry
                token = tl.load(bias_tokens + at, mask=entry < count, other=-1)
                here = (token >= start) & (token < end)
                x = tl.load(target + token, mask=here, other=0.0)
                bias = tl.load(biases + at, mask=here, other=0.0)
                tl.store(target + token, x + bias, mask=here)
            tl.debug_barrier()

        factor = tl.load(repetition + slot)
        each = tl.load(frequency + slot)
        once = tl.load(presence + slot)
        may_end = position >= tl.load(may_end_at + slot)
        for first in range(start, end, BLOCK):
            token = first + tl.arange(0, BLOCK)
            x = tl.load(target + token, mask=token < end, other=0.0)
            mark = tl.load(mine + token, mask=token < end, other=0)
            num = mark & COUNT
            for j in tl.static_range(DRAFTS):
                draft = tl.load(draft_ids + slot * DRAFTS + j, mask=j < num_before, other=-1)
                num += (token == draft).to(tl.int32)
            if factor != 1:
                scaled = tl.where(x > 0, tl.div_rn(x, factor + tl.zeros_like(x)), x * factor)
                scaled = tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST)
                seen = (num > 0) | ((mark & PROMPTED) != 0)
                x = tl.where(seen & (tl.abs(x) < float("inf")), scaled, x)
            x = tl.where(num > 0, x - num.to(tl.float32) * each - once, x)
            banned = ((mark & BANNED) != 0) | (((mark & FINAL) != 0) & (may_end == 0))
            x = tl.where(banned & (x == x), float("-inf"), x)
            tl.store(target + token, x, mask=token < end)

        count = tl.load(num_bans + slot)
        if count > 0:
            tl.debug_barrier()
            for first in range(0, count, ENTRIES):
                entry = first + tl.arange(0, ENTRIES)
                at = slot.to(tl.int64) * most_bans + entry
                ban = tl.load(bans + at, mask=entry < count, other=-1)
                token = ban & ((1 << TOKEN_BITS) - 1)
                here = (ban >> TOKEN_BITS == num_before) & (token >= start) & (token < end)
                x = tl.load(target + token, mask=here, other=0.0)
                tl.store(target + token, tl.where(x == x, float("-inf"), x), mask=here)
