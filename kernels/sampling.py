"""Drawing the next token of every row: see reference_sampling.sample for what is drawn.

Three launches, and no sort. A token's weight is its probability over that of the most likely one,
as an integer, so that sums do not depend on their order and any number of programs may share a row.

1. `_maxima`: the most likely token of every part of a row.
2. `limits` (sampling_limits): that of the row, which ends greedy rows; then the least likely value
   that top-k and top-p keep. Every program adds up its part's tokens to a few fixed values; the
   last one of a row then searches between two of them.
3. `_race`: the first arrival in every part of a row; the last program of a row finds the winner.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.block_digest import mix64
from baton.kernels.reference_sampling import NOTHING_LEFT
from baton.kernels.sampling_limits import changed_row, first_best, limits, row_logits, scaled_logits

_MAX_SPLITS = 128
MAX_VOCAB = 1 << 20
_FINEST = 44  # bits of a weight
_PROGRAMS = 8 * 132
_LIMIT_PROGRAMS = 2 * 132  # as many as fit at once


class DrawConfig(NamedTuple):
    """Tokens at a time: of the three launches, and of the last program in a row's search."""

    max_block: int
    count_block: int
    race_block: int
    search_block: int
    skip: bool = True  # the race passes over parts of which no token was kept


@dataclass(frozen=True)
class SamplingScratch:
    """Memory between the launches; what it holds before a draw does not matter.

    Attributes:
        part_value: float32 [rows, 128], part_token: int32 [rows, 128], the best of each part.
        row_value: float32 [rows, 2], the maximum and the lowest kept (+inf: nothing to draw).
        arrivals: int32 [rows, 2], programs that are done, of the last two launches.
        counts: int32 [rows, 16], weights: int64 [rows, 16], sums up to each fixed value.
        candidates: int32 [rows, c], tokens among which the search ends.
    """

    part_value: Tensor
    part_token: Tensor
    row_value: Tensor
    arrivals: Tensor
    counts: Tensor
    weights: Tensor
    candidates: Tensor


def make_sampling_scratch(max_rows: int, vocab: int, device: torch.device) -> SamplingScratch:
    """Work for `draw` with at most so many rows and tokens."""

    def empty(columns: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(max_rows, columns, dtype=dtype, device=device)

    return SamplingScratch(
        part_value=empty(_MAX_SPLITS, torch.float32),
        part_token=empty(_MAX_SPLITS, torch.int32),
        row_value=empty(2, torch.float32),
        arrivals=empty(2, torch.int32),
        counts=empty(16, torch.int32),
        weights=empty(16, torch.int64),
        candidates=empty(_config(max_rows, vocab).search_block, torch.int32),
    )


def draw(
    logits: Tensor,
    rows: Tensor,
    context_lens: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    stream: Tensor,
    token_ids: Tensor,
    *,
    out: Tensor | None = None,
    work: SamplingScratch | None = None,
    config: DrawConfig | None = None,
    back: Tensor | None = None,
    changed: Tensor | None = None,
    is_changed: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """Draws one token per row, with the parameters of the row's slot → int32 [R].

    The same logits, parameters and position give the same token in any batch. The lowest token wins
    a tie. A row whose logits hold a NaN or +inf gets −1, one that has nothing but −inf gets
    NOTHING_LEFT; their slots keep the last token, which the next step can still look up. A row of
    padding gets −1.

    Args:
        logits: float32, bfloat16 or float16 [R, vocab]; tokens of a row adjacent.
        rows: int32 [R], each row's slot, distinct but where there is `back`; −1 is padding.
        context_lens: int32 [S], the position that the drawn token will have.
        temperature: float32 [S]; 0 takes the most likely token.
        top_k: int32 [S]; 0 keeps all.
        top_p, min_p: float32 [S]; 1 and 0 keep all.
        stream: int64 [S], random state before the position is mixed in.
        token_ids: int32 [S], gets the drawn tokens.
        out: int32 [R].
        work: of make_sampling_scratch, for no fewer rows and no fewer tokens.
        back: int32 [R], how far before its slot's position a row draws; of several rows of a slot
            any may win `token_ids`. None: nowhere.
        changed: float32 [≥ R, vocab], the logits of those rows whose slot says so in `is_changed`,
            int32 [S]; the others are as in `logits`.
        pdl: launched to overlap the end of the kernel before.
    """
    num_rows, vocab = logits.shape
    if vocab > MAX_VOCAB or logits.stride(1) != 1:
        raise ValueError(f"logits must have at most {MAX_VOCAB} adjacent tokens")
    if out is None:
        out = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    if num_rows == 0:
        return out
    work = work or make_sampling_scratch(num_rows, vocab, logits.device)
    config = config or _config(num_rows, vocab)
    options = {"launch_pdl": True} if pdl else {}
    max_splits, max_span = _splits(num_rows, vocab, config.max_block)
    parts = (work.part_value, work.part_token)
    changed_stride = 0 if changed is None else changed.stride(0)
    _maxima[(num_rows, max_splits)](
        logits,
        rows,
        *parts,
        work.arrivals,
        work.counts,
        work.weights,
        vocab,
        logits.stride(0),
        max_span,
        changed,
        is_changed,
        changed_stride,
        BLOCK=config.max_block,
        MAX_SPLITS=_MAX_SPLITS,
        PDL=pdl,
        num_warps=4,
        **options,
    )
    splits, span = _splits(num_rows, vocab, config.count_block, _LIMIT_PROGRAMS)
    limits[(num_rows, splits)](
        logits,
        rows,
        temperature,
        top_k,
        top_p,
        min_p,
        *parts,
        work.row_value,
        work.arrivals,
        work.counts,
        work.weights,
        work.candidates,
        token_ids,
        out,
        vocab,
        logits.stride(0),
        span,
        max_splits,
        work.candidates.stride(0),
        changed,
        is_changed,
        changed_stride,
        BLOCK=config.count_block,
        SEARCH=config.search_block,
        ONE=largest_weight(vocab),
        MAX_SPLITS=_MAX_SPLITS,
        NOTHING_LEFT=NOTHING_LEFT,
        PDL=pdl,
        num_warps=8,
        **options,
    )
    splits, span = _splits(num_rows, vocab, config.race_block)
    _race[(num_rows, splits)](
        logits,
        rows,
        temperature,
        stream,
        context_lens,
        back,
        *parts,
        work.row_value,
        work.arrivals,
        token_ids,
        out,
        vocab,
        logits.stride(0),
        span,
        changed,
        is_changed,
        changed_stride,
        BLOCK=config.race_block,
        MAX_SPLITS=_MAX_SPLITS,
        SKIP=config.skip,
        HAS_BACK=back is not None,
        PDL=pdl,
        num_warps=4,
        **options,
    )
    return out


def largest_weight(vocab: int) -> float:
    """That of the most likely token: as fine as 63 bits allow, in which all may be as likely."""
    return 2.0 ** min(_FINEST, 63 - vocab.bit_length())


def _config(num_rows: int, vocab: int) -> DrawConfig:
    most = max(16, triton.next_power_of_2(vocab))
    return DrawConfig(
        max_block=min(most, 1024 if num_rows <= 4 else 2048),
        count_block=min(most, 256),
        race_block=min(most, 1024),
        search_block=min(most, 4096),  # in registers, of which two programs share a processor's
    )


def _splits(num_rows: int, vocab: int, block: int, programs: int = _PROGRAMS) -> tuple[int, int]:
    """Into how many parts a row is split, and how many tokens each has (of whole blocks)."""
    blocks = triton.cdiv(vocab, block)
    wanted = max(1, min(_MAX_SPLITS, blocks, triton.cdiv(programs, num_rows)))
    span = triton.cdiv(blocks, wanted)
    return triton.cdiv(blocks, span), span * block


@triton.jit(do_not_specialize=["span"])
def _maxima(
    logits,
    rows,
    part_value,
    part_token,
    arrivals,
    counts,
    weights,
    vocab,
    stride,
    span,
    changed,
    is_changed,
    changed_stride,
    BLOCK: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0)
    split = tl.program_id(1)
    slot = tl.load(rows + row)
    if slot >= 0:
        if split == 0:
            ways = tl.arange(0, 16)
            tl.store(arrivals + row * 2 + tl.arange(0, 2), tl.zeros((2,), tl.int32))
            tl.store(counts + row * 16 + ways, tl.zeros((16,), tl.int32))
            tl.store(weights + row * 16 + ways, tl.zeros((16,), tl.int64))
        source = logits + row.to(tl.int64) * stride
        other = changed_row(changed, is_changed, slot, row, changed_stride)
        best = tl.full((BLOCK,), float("-inf"), tl.float32)
        best_token = tl.zeros((BLOCK,), tl.int32)
        start = split * span
        for first in range(start, min(start + span, vocab), BLOCK):
            token = first + tl.arange(0, BLOCK)
            x = row_logits(source, other, token, vocab)
            x = tl.where(x != x, float("inf"), x)  # as unusable as an infinite maximum
            best_token = tl.where(x > best, token, best_token)
            best = tl.maximum(best, x)
        value, token = first_best(best, best_token)
        tl.store(part_value + row * MAX_SPLITS + split, value)
        tl.store(part_token + row * MAX_SPLITS + split, token)


@triton.jit(do_not_specialize=["span"])
def _race(
    logits,
    rows,
    temperature,
    stream,
    context_lens,
    back,
    part_value,
    part_token,
    row_value,
    arrivals,
    token_ids,
    out,
    vocab,
    stride,
    span,
    changed,
    is_changed,
    changed_stride,
    BLOCK: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    SKIP: tl.constexpr,
    HAS_BACK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0)
    split = tl.program_id(1)
    lowest = tl.load(row_value + row * 2 + 1)
    if lowest < float("inf"):
        most = tl.load(row_value + row * 2)
        slot = tl.load(rows + row)
        heat = tl.load(temperature + slot)
        position = tl.load(context_lens + slot)
        if HAS_BACK:
            position -= tl.load(back + row)
        draw = (position + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
        key = mix64(tl.load(stream + slot).to(tl.uint64, bitcast=True) + draw)
        source = logits + row.to(tl.int64) * stride
        other = changed_row(changed, is_changed, slot, row, changed_stride)
        best = tl.full((BLOCK,), float("-inf"), tl.float32)
        best_token = tl.zeros((BLOCK,), tl.int32)
        start = split * span
        for first in range(start, min(start + span, vocab), BLOCK):
            token = first + tl.arange(0, BLOCK)
            scaled = scaled_logits(source, other, token, vocab, most, heat)
            nearest = tl.max(scaled, 0) if SKIP else 0.0
            if nearest >= lowest:
                score = scaled - tl.log(_exponential(key, token))
                score = tl.where(scaled < lowest, float("-inf"), score)
                best_token = tl.where(score > best, token, best_token)
                best = tl.maximum(best, score)
        value, winner = first_best(best, best_token)
        tl.store(part_value + row * MAX_SPLITS + split, value)
        tl.store(part_token + row * MAX_SPLITS + split, winner)
        tl.debug_barrier()
        if tl.atomic_add(arrivals + row * 2 + 1, 1) == tl.num_programs(1) - 1:
            tl.debug_barrier()
            part = tl.arange(0, MAX_SPLITS)
            some = part < tl.num_programs(1)
            values = tl.load(
                part_value + row * MAX_SPLITS + part,
                mask=some,
                other=float("-inf"),
                cache_modifier=".cg",
            )
            tokens = tl.load(
                part_token + row * MAX_SPLITS + part, mask=some, other=0, cache_modifier=".cg"
            )
            value, winner = first_best(values, tokens)
            tl.store(out + row, winner)
            tl.store(token_ids + slot, winner)


@triton.jit
def _exponential(key, token):
    """Exponential variates with mean 1, finest near 0, from the reference's random bits."""
    bits = mix64(key + (token + 1).to(tl.uint64) * 0x9E3779B97F4A7C15)
    uniform = ((bits >> 11).to(tl.float32) + 0.5) * 1.1102230246251565e-16
    uniform = tl.minimum(uniform, 0.99999994)  # else a lone token might never arrive
    # log1p: the error of the sum is made good by the quotient.
    rest = 1.0 - uniform
    slope = uniform / tl.where(rest == 1.0, 1.0, 1.0 - rest)
    return tl.where(rest == 1.0, uniform, -tl.log(rest) * slope)
