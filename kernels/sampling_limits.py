"""How far top-k and top-p reach: the second launch of a draw (see sampling), and its end.

A token's distance is how much less likely it is than the most likely one, as the bits of its
scaled logit without the sign: integers that sort as the distances do. A limit is the least distance
up to which the tokens' count or weight reaches a goal.

The second launch adds up how many tokens, and about what weight, have at least each of a few
logits, the thresholds: dense where most logits of a row lie. Two of them are known to have the
limit between them (`bracket`): what is before both is kept, what is behind both is not. So
little need be gathered, and one program finds the limit there.
Sums that decide are of integers; those of the thresholds only say where it is worth looking.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_SLACK = tl.constexpr(1e-3)  # of sums of weights in float32, and more
_MASS = tl.constexpr(2.0**40)
_INFINITE = tl.constexpr(0x7F800000)


@triton.jit(do_not_specialize=["blocks", "parts"])
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
    thresholds,
    counts,
    weights,
    token_ids,
    out,
    vocab,
    stride,
    blocks,
    parts,
    changed,
    is_changed,
    changed_stride,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    SAMPLE: tl.constexpr,
    WAYS: tl.constexpr,
    ONE: tl.constexpr,
    MAX_WAYS: tl.constexpr,
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
    limited = (heat > 0) & (((k > 0) & (k < vocab)) | (p < 1))
    if (split == 0) | limited:
        index = row * MAX_SPLITS + tl.arange(0, MAX_SPLITS)
        some = (tl.arange(0, MAX_SPLITS) < parts) & (slot >= 0)
        value = tl.load(part_value + index, mask=some, other=float("-inf"))
        most, token = first_best(value, tl.load(part_token + index, mask=some, other=0))
        usable = tl.abs(most) < float("inf")
        if split == 0:
            share = tl.load(min_p + slot, mask=slot >= 0, other=0.0)
            lowest = tl.where(share > 0, tl.log(tl.where(share > 0, share, 1.0)), float("-inf"))
            drawn = usable & (heat > 0)
            tl.store(row_value + row * 2, most)
            tl.store(row_value + row * 2 + 1, tl.where(drawn, lowest, float("inf")))
            nothing = tl.where((slot >= 0) & (most == float("-inf")), NOTHING_LEFT, -1)
            tl.store(out + row, tl.where(usable, token, nothing), mask=drawn == 0)
            tl.store(token_ids + slot, token, mask=usable & (heat <= 0))
        if usable & limited:
            source = logits + row.to(tl.int64) * stride
            other = changed_row(changed, is_changed, slot, row, changed_stride)
            way = tl.arange(0, WAYS)
            threshold = _thresholds(source, other, vocab, most, heat, SAMPLE, WAYS)
            if split == 0:
                tl.store(thresholds + row * MAX_WAYS + way, threshold)
            start = split * blocks * (BLOCK * UNROLL)
            end = min(start + blocks * (BLOCK * UNROLL), vocab)
            count, mass, weight = _count(
                source, other, start, end, vocab, most, heat, threshold, ONE, BLOCK, UNROLL, WAYS
            )
            tl.atomic_add(counts + row * MAX_WAYS + way, count, sem="relaxed")
            tl.atomic_add(weights + row * (MAX_WAYS + 2) + way, mass, sem="relaxed")
            tl.atomic_add(weights + row * (MAX_WAYS + 2) + WAYS, weight, sem="relaxed")


@triton.jit
def _thresholds(source, other, vocab, most, heat, SAMPLE: tl.constexpr, WAYS: tl.constexpr):
    """float32 [WAYS], falling, the last −inf: by how far the first logits are from the highest."""
    x = row_logits(source, other, tl.arange(0, SAMPLE), vocab)
    finite = x > float("-inf")
    number = tl.sum(finite.to(tl.float32), 0)
    total = tl.sum(tl.where(finite, most - x, 0.0), 0)
    spread = tl.where(number > 0, total / tl.maximum(number, 1.0), 10.0 * heat)
    way = tl.arange(0, WAYS)
    threshold = most - spread * (0.2 + way.to(tl.float32) * (1.05 / (WAYS - 1)))
    return tl.where(way == WAYS - 1, float("-inf"), threshold)


@triton.jit
def _count(
    source,
    other,
    start,
    end,
    vocab,
    most,
    heat,
    threshold,
    ONE: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    WAYS: tl.constexpr,
):
    """How many tokens have at least each threshold, what weight in multiples of 2^-40, roughly;
    and the weight of all, exactly."""
    count = tl.zeros((WAYS, BLOCK), tl.float32)
    mass = tl.zeros((WAYS, BLOCK), tl.float32)
    weight = tl.zeros((BLOCK,), tl.int64)
    for first in range(start, end, BLOCK * UNROLL):
        for i in tl.static_range(UNROLL):
            token = first + i * BLOCK + tl.arange(0, BLOCK)
            x = row_logits(source, other, token, vocab)
            one = tl.exp(tl.div_rn(x - most, heat))
            weight += (one * ONE).to(tl.int64)
            # What is impossible has no limit to wait for.
            x = tl.where(x > float("-inf"), x, float("nan"))
            within = tl.where(x[None, :] >= threshold[:, None], 1.0, 0.0)
            count += within
            mass += within * one[None, :]
    mass_sum = (tl.sum(mass, 1) * _MASS).to(tl.int64)
    return tl.sum(count, 1).to(tl.int32), mass_sum, tl.sum(weight, 0)


@triton.jit
def bracket(thresholds, counts, weights, k, p, vocab, WAYS: tl.constexpr):
    """Where a row's limits lie, from the sums of `limits`.

    Returns the logit down to which every token is kept (+inf: not known of any; −inf: all are), the
    one down to which the others may be, how many each of them has, and k: no more than there are.
    """
    way = tl.arange(0, WAYS)
    threshold = tl.load(thresholds + way)
    count = tl.load(counts + way)
    mass = tl.load(weights + way).to(tl.float64)
    every = tl.max(count, 0)
    k = tl.where((k > 0) & (k < vocab), tl.minimum(k, every), every)
    is_before = count < k
    is_behind = count >= k
    if p < 1:
        share = p.to(tl.float64)
        least = tl.max(tl.where(is_before, mass, 0.0), 0)
        if k == every:
            least = tl.max(mass, 0)
            is_behind = mass >= least * share * (1 + _SLACK)
        is_before = is_before & (mass < least * share * (1 - _SLACK))
    last = tl.min(tl.where(is_behind, way, WAYS - 1), 0)
    sure = tl.min(tl.where(is_before, threshold, float("inf")), 0)
    maybe = tl.max(tl.where(way == last, threshold, float("-inf")), 0)
    num_sure = tl.max(tl.where(is_before, count, 0), 0)
    num_maybe = tl.max(tl.where(way == last, count, 0), 0)
    if (k == every) & (p >= 1):
        sure = tl.full((), float("-inf"), tl.float32)
        maybe = tl.full((), float("inf"), tl.float32)
    return sure, maybe, num_sure, num_maybe, k, every


@triton.jit
def find_limits(
    source,
    other,
    listed,
    num_listed,
    is_row,
    vocab,
    most,
    heat,
    lo,
    hi,
    few,
    light,
    k,
    by_count,
    p,
    whole,
    room,
    ONE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The distance up to which tokens are kept.

    Args:
        listed: int32 [num_listed], distances; or, where is_row, those of the row are looked at.
        lo: a distance up to which no limit is; hi, one that all limits are within.
        few, light: count and weight of the tokens that are nearer and not listed.
        k, p: the limits; by_count: whether k is less than there are.
        whole: int64, the weight of all tokens.
    """
    kept = hi
    goal = whole.to(tl.float64)
    if by_count:
        kept, nearer, lighter = _search(
            source, other, listed, num_listed, is_row, vocab, most, heat, lo, hi, few, light,
            k.to(tl.float64), False, room, ONE, BLOCK,
        )  # fmt: skip
        last = weight_of(-kept.to(tl.float32, bitcast=True), ONE)
        goal = (lighter + (k - nearer) * last).to(tl.float64)
    if p < 1:
        kept, nearer, lighter = _search(
            source, other, listed, num_listed, is_row, vocab, most, heat, lo, kept, few, light,
            tl.maximum(goal * p.to(tl.float64), 1.0), True, room, ONE, BLOCK,
        )  # fmt: skip
    return kept


@triton.jit
def _search(
    source,
    other,
    listed,
    num_listed,
    is_row,
    vocab,
    most,
    heat,
    lo,
    hi,
    few,
    light,
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
    number = tl.where(is_row, vocab, num_listed)
    floor = -1
    middle = lo
    left = number
    # The first round only adds up what is up to lo.
    while (left > BLOCK) & (hi - floor > 1):
        count = 0
        between = 0
        weight = tl.full((), 0, tl.int64)
        for first in range(0, number, BLOCK):
            distance = _distances(
                source, other, listed, first, num_listed, is_row, vocab, most, heat, BLOCK
            )
            within = (distance > floor) & (distance <= middle)
            count += tl.sum(within.to(tl.int32), 0)
            weight += tl.sum(tl.where(within, weight_of_bits(distance, ONE), 0), 0)
            between += tl.sum(((distance > middle) & (distance <= hi)).to(tl.int32), 0)
        reached = ((light + weight) if BY_WEIGHT else (few + count)).to(tl.float64) >= goal
        few = tl.where(reached, few, few + count)
        light = tl.where(reached, light, light + weight)
        left = tl.where(reached, count, between)
        hi = tl.where(reached, middle, hi)
        floor = tl.where(reached, floor, middle)
        middle = floor + ((hi - floor) >> 1)
    index = tl.arange(0, BLOCK)
    if number > BLOCK:
        filled = 0
        for first in range(0, number, BLOCK):
            distance = _distances(
                source, other, listed, first, num_listed, is_row, vocab, most, heat, BLOCK
            )
            within = (distance > floor) & (distance <= hi)
            rank = tl.cumsum(within.to(tl.int32), 0) + filled
            # Of equals, which alone may be too many, any will do.
            tl.store(room + rank - 1, distance, mask=within & (rank <= BLOCK))
            filled = tl.max(rank, 0)
        tl.debug_barrier()
        near = tl.load(room + index, mask=index < filled, other=0x7FFFFFFF, cache_modifier=".cg")
    else:
        near = _distances(source, other, listed, 0, num_listed, is_row, vocab, most, heat, BLOCK)
        near = tl.where(near <= hi, near, 0x7FFFFFFF)
    weights = weight_of_bits(near, ONE)
    nearest = tl.min(near, 0)
    furthest = tl.max(tl.where(near <= hi, near, -1), 0)
    while nearest < furthest:
        middle = nearest + ((furthest - nearest) >> 1)
        within = (near >= nearest) & (near <= middle)
        count = tl.sum(within.to(tl.int32), 0)
        weight = tl.sum(tl.where(within, weights, 0), 0)
        before = tl.max(tl.where(within, near, -1), 0)
        behind = tl.min(tl.where(near > middle, near, 0x7FFFFFFF), 0)
        reached = ((light + weight) if BY_WEIGHT else (few + count)).to(tl.float64) >= goal
        few = tl.where(reached, few, few + count)
        light = tl.where(reached, light, light + weight)
        furthest = tl.where(reached, before, furthest)
        nearest = tl.where(reached, nearest, behind)
    tl.debug_barrier()
    return furthest, few, light


@triton.jit
def _distances(
    source, other, listed, first, num_listed, is_row, vocab, most, heat, BLOCK: tl.constexpr
):
    """int32 [BLOCK], of the list or of the row; beyond their ends, and of −inf, too far."""
    index = first + tl.arange(0, BLOCK)
    inside = (index < num_listed) & ~is_row
    distance = tl.load(listed + index, mask=inside, other=0x7FFFFFFF, cache_modifier=".cg")
    x = row_logits(source, other, index, tl.where(is_row, vocab, 0))
    far = tl.abs(tl.div_rn(x - most, heat)).to(tl.int32, bitcast=True)
    return tl.where(is_row & (x > float("-inf")), far, distance)


@triton.jit
def weight_of_bits(distance, ONE: tl.constexpr):
    """That of a token at a distance."""
    return weight_of(-tl.minimum(distance, _INFINITE).to(tl.float32, bitcast=True), ONE)


@triton.jit
def weight_of(scaled, ONE: tl.constexpr):
    """exp as a multiple of 1 / ONE."""
    return (tl.exp(scaled) * ONE).to(tl.int64)


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
