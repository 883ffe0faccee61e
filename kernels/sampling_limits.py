"""How far top-k and top-p reach, the second launch of a draw (see sampling).

A token's distance is how much less likely it is than the most likely one, as the bits of its
scaled logit without the sign: integers that sort as the distances do. A limit is the least distance
up to which the tokens' count or weight reaches a goal.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit(do_not_specialize=["span", "parts"])
def limits(
    logits,
    rows,
    temperature,
    top_k,
    top_p,
    min_p,
    part_value,
    part_token,
    row_value,
    arrivals,
    counts,
    weights,
    candidates,
    token_ids,
    out,
    vocab,
    stride,
    span,
    parts,
    candidates_stride,
    changed,
    is_changed,
    changed_stride,
    BLOCK: tl.constexpr,
    SEARCH: tl.constexpr,
    ONE: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    NOTHING_LEFT: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0)
    split = tl.program_id(1)
    slot = tl.load(rows + row)
    heat = tl.load(temperature + slot, mask=slot >= 0, other=0.0)
    k = tl.load(top_k + slot, mask=slot >= 0, other=0)
    p = tl.load(top_p + slot, mask=slot >= 0, other=1.0)
    k = tl.where((k > 0) & (k < vocab), k, vocab)
    limited = (heat > 0) & ((k < vocab) | (p < 1))
    if (split == 0) | limited:
        index = row * MAX_SPLITS + tl.arange(0, MAX_SPLITS)
        some = (tl.arange(0, MAX_SPLITS) < parts) & (slot >= 0)
        value = tl.load(part_value + index, mask=some, other=float("-inf"))
        most, token = first_best(value, tl.load(part_token + index, mask=some, other=0))
        usable = tl.abs(most) < float("inf")
        share = tl.load(min_p + slot, mask=slot >= 0, other=0.0)
        lowest = tl.where(share > 0, tl.log(tl.where(share > 0, share, 1.0)), float("-inf"))
        if split == 0:
            drawn = usable & (heat > 0)
            tl.store(row_value + row * 2, most)
            tl.store(row_value + row * 2 + 1, tl.where(drawn, lowest, float("inf")))
            nothing = tl.where((slot >= 0) & (most == float("-inf")), NOTHING_LEFT, -1)
            tl.store(out + row, tl.where(usable, token, nothing), mask=drawn == 0)
            tl.store(token_ids + slot, token, mask=usable & (heat <= 0))
        if usable & limited:
            source = logits + row.to(tl.int64) * stride
            other = changed_row(changed, is_changed, slot, row, changed_stride)
            start = split * span
            _count(
                source,
                other,
                start,
                min(start + span, vocab),
                vocab,
                most,
                heat,
                counts + row * 16,
                weights + row * 16,
                ONE,
                BLOCK,
            )
            tl.debug_barrier()
            if tl.atomic_add(arrivals + row * 2, 1) == tl.num_programs(1) - 1:
                tl.debug_barrier()
                way = tl.arange(0, 16)
                count = tl.load(counts + row * 16 + way, cache_modifier=".cg")
                weight = tl.load(weights + row * 16 + way, cache_modifier=".cg")
                room = candidates + row.to(tl.int64) * candidates_stride
                goal = tl.max(weight, 0).to(tl.float64)
                kept = tl.full((), 0x7F800000, tl.int32)
                if k < vocab:
                    kept, few, light = _search(
                        source,
                        other,
                        vocab,
                        most,
                        heat,
                        count,
                        weight,
                        k.to(tl.float64),
                        False,
                        room,
                        ONE,
                        SEARCH,
                    )
                    last = _weight(-kept.to(tl.float32, bitcast=True), ONE)
                    goal = (light + (k - few) * last).to(tl.float64)
                if p < 1:
                    goal *= p.to(tl.float64)
                    nearest, few, light = _search(
                        source,
                        other,
                        vocab,
                        most,
                        heat,
                        count,
                        weight,
                        goal,
                        True,
                        room,
                        ONE,
                        SEARCH,
                    )
                    kept = tl.minimum(kept, nearest)
                lowest = tl.maximum(lowest, -kept.to(tl.float32, bitcast=True))
                tl.store(row_value + row * 2 + 1, lowest)


@triton.jit
def _count(
    source,
    other,
    start,
    end,
    vocab,
    most,
    heat,
    counts,
    weights,
    ONE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds how many of the tokens, and what weight, are no further than each fixed distance."""
    fixed = _fixed()
    count = tl.zeros((BLOCK, 16), tl.int32)
    weight = tl.zeros((BLOCK, 16), tl.int64)
    for first in range(start, end, BLOCK):
        distance, token_weight = _tokens(source, other, first, vocab, most, heat, ONE, BLOCK)
        within = distance[:, None] <= fixed[None, :]
        count += within.to(tl.int32)
        weight += tl.where(within, token_weight[:, None], 0)
    way = tl.arange(0, 16)
    tl.atomic_add(counts + way, tl.sum(count, 0), sem="relaxed")
    tl.atomic_add(weights + way, tl.sum(weight, 0), sem="relaxed")


@triton.jit
def _search(
    source,
    other,
    vocab,
    most,
    heat,
    counts,
    weights,
    goal,
    BY_WEIGHT: tl.constexpr,
    room,
    ONE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The least distance up to which the count or the weight of tokens reaches the goal.

    Also the count and the weight of the tokens nearer than that. Halves the bits (lo, hi], up to
    the lower of which the goal is not reached; once the tokens between fit, they are gathered.
    """
    fixed = _fixed()
    reached = (weights.to(tl.float64) if BY_WEIGHT else counts.to(tl.float64)) >= goal
    below = (reached == 0) & (fixed < 0x7F800000)
    lo = tl.max(tl.where(below, fixed, -1), 0)
    hi = tl.min(tl.where(below, 0x7F800000, fixed), 0)
    few = tl.max(tl.where(below, counts, 0), 0)
    light = tl.max(tl.where(below, weights, 0), 0)
    left = tl.min(tl.where(below, 0x7FFFFFFF, counts), 0) - few
    while (hi - lo > 1) & (left > BLOCK):
        middle = lo + ((hi - lo) >> 1)
        count = 0
        weight = tl.full((), 0, tl.int64)
        for first in range(0, vocab, BLOCK):
            distance, token_weight = _tokens(source, other, first, vocab, most, heat, ONE, BLOCK)
            within = (distance > lo) & (distance <= middle)
            count += tl.sum(within.to(tl.int32), 0)
            weight += tl.sum(tl.where(within, token_weight, 0), 0)
        lo, hi, few, light, left = _halve(
            lo, hi, middle, few, light, left, count, weight, goal, BY_WEIGHT
        )
    if hi - lo > 1:
        filled = 0
        for first in range(0, vocab, BLOCK):
            distance, token_weight = _tokens(source, other, first, vocab, most, heat, ONE, BLOCK)
            within = (distance > lo) & (distance <= hi)
            rank = tl.cumsum(within.to(tl.int32), 0)
            tl.store(room + filled + rank - 1, distance, mask=within)
            filled += tl.max(rank, 0)
        tl.debug_barrier()
        index = tl.arange(0, BLOCK)
        near = tl.load(room + index, mask=index < filled, other=0x7FFFFFFF, cache_modifier=".cg")
        near_weight = _weight(-tl.minimum(near, 0x7F800000).to(tl.float32, bitcast=True), ONE)
        while (hi - lo > 1) & (left > 1):
            middle = lo + ((hi - lo) >> 1)
            within = (near > lo) & (near <= middle)
            count = tl.sum(within.to(tl.int32), 0)
            weight = tl.sum(tl.where(within, near_weight, 0), 0)
            lo, hi, few, light, left = _halve(
                lo, hi, middle, few, light, left, count, weight, goal, BY_WEIGHT
            )
        # All that is left is as likely.
        hi = tl.max(tl.where(near <= hi, near, 0), 0)
        tl.debug_barrier()
    return hi, few, light


@triton.jit
def _halve(lo, hi, middle, few, light, left, count, weight, goal, BY_WEIGHT: tl.constexpr):
    """Keeps the half in which the goal is reached."""
    reached = ((light + weight) if BY_WEIGHT else (few + count)).to(tl.float64) >= goal
    few = tl.where(reached, few, few + count)
    light = tl.where(reached, light, light + weight)
    left = tl.where(reached, count, left - count)
    return tl.where(reached, lo, middle), tl.where(reached, middle, hi), few, light, left


@triton.jit
def _tokens(source, other, first, vocab, most, heat, ONE: tl.constexpr, BLOCK: tl.constexpr):
    """Distances of tokens from the most likely one, as bits that sort as they do; weights."""
    token = first + tl.arange(0, BLOCK)
    scaled = scaled_logits(source, other, token, vocab, most, heat)
    distance = tl.abs(scaled).to(tl.int32, bitcast=True)
    return tl.where(token < vocab, distance, 0x7FFFFFFF), _weight(scaled, ONE)


@triton.jit
def _weight(scaled, ONE: tl.constexpr):
    """exp as a multiple of 1 / ONE."""
    return (tl.exp(scaled) * ONE).to(tl.int64)


@triton.jit
def _fixed():
    """int32 [16], bits of the distances ½, 1 … 4, 5, 6 … 10, 16, ∞."""
    way = tl.arange(0, 16)
    value = tl.where(way < 8, (way + 1) * 0.5, way - 3.0)
    value = tl.where(way == 14, 16.0, value)
    return tl.where(way == 15, float("inf"), value).to(tl.int32, bitcast=True)


@triton.jit
def scaled_logits(source, changed, token, vocab, most, heat):
    """Log of how likely tokens are beside the most likely one, rounded as the reference does."""
    return tl.div_rn(row_logits(source, changed, token, vocab) - most, heat)


@triton.jit
def row_logits(source, changed, token, vocab):
    """Of a row, as float32: those in `changed` where it is no null pointer."""
    inside = token < vocab
    if changed is None:
        x = tl.load(source + token, mask=inside, other=float("-inf")).to(tl.float32)
    else:
        is_changed = changed.to(tl.int64) != 0
        raw = tl.load(source + token, mask=inside & (is_changed == 0), other=float("-inf"))
        x = tl.load(changed + token, mask=inside & is_changed, other=float("-inf"))
        x = tl.where(is_changed, x, raw.to(tl.float32))
    return x


@triton.jit
def changed_row(changed, is_changed, slot, row, stride):
    """Pointer to the row of `changed`; null where its slot asked for nothing."""
    if changed is None:
        at = changed
    else:
        asked = tl.load(is_changed + slot, mask=slot >= 0, other=0)
        at = changed + row.to(tl.int64) * stride
        at = tl.where(asked != 0, at.to(tl.int64), 0).to(tl.pointer_type(tl.float32))
    return at


@triton.jit
def first_best(value, token):
    """The highest value and the lowest token that has it."""
    best = tl.max(value, 0)
    return best, tl.min(tl.where(value == best, token, 0x7FFFFFFF), 0)
