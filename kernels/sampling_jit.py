"""The kernels of sampling.py."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.block_digest import mix64
from baton.kernels.sampling_limits import (
    bracket,
    changed_row,
    find_limits,
    first_best,
    row_logits,
    weight_of,
)


@triton.jit(do_not_specialize=["blocks"])
def maxima(
    logits,
    rows,
    part_value,
    part_token,
    arrivals,
    counts,
    weights,
    vocab,
    stride,
    blocks,
    changed,
    is_changed,
    changed_stride,
    BLOCK: tl.constexpr,
    WAYS: tl.constexpr,
    MAX_WAYS: tl.constexpr,
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
            ways = tl.arange(0, WAYS)
            tl.store(arrivals + row * 2 + tl.arange(0, 2), tl.zeros((2,), tl.int32))
            tl.store(counts + row * MAX_WAYS + ways, tl.zeros((WAYS,), tl.int32))
            zeros = tl.zeros((WAYS,), tl.int64)
            tl.store(weights + row * (MAX_WAYS + 2) + ways, zeros)
            tl.store(weights + row * (MAX_WAYS + 2) + ways + 2, zeros)
        source = logits + row.to(tl.int64) * stride
        other = changed_row(changed, is_changed, slot, row, changed_stride)
        best = tl.full((BLOCK,), float("-inf"), tl.float32)
        best_token = tl.zeros((BLOCK,), tl.int32)
        # Said in blocks, so that the compiler knows that they are aligned.
        start = split * blocks * BLOCK
        for first in range(start, min(start + blocks * BLOCK, vocab), BLOCK):
            token = first + tl.arange(0, BLOCK)
            x = row_logits(source, other, token, vocab)
            x = tl.where(x != x, float("inf"), x)  # as unusable as an infinite maximum
            best_token = tl.where(x > best, token, best_token)
            best = tl.maximum(best, x)
        value, token = first_best(best, best_token)
        tl.store(part_value + row * MAX_SPLITS + split, value)
        tl.store(part_token + row * MAX_SPLITS + split, token)


@triton.jit(do_not_specialize=["blocks"])
def race(
    logits,
    rows,
    temperature,
    top_k,
    top_p,
    stream,
    context_lens,
    back,
    part_value,
    part_token,
    row_value,
    arrivals,
    thresholds,
    counts,
    weights,
    distances,
    tokens,
    near,
    token_ids,
    out,
    vocab,
    stride,
    blocks,
    room,
    near_stride,
    changed,
    is_changed,
    changed_stride,
    BLOCK: tl.constexpr,
    SEARCH: tl.constexpr,
    WAYS: tl.constexpr,
    ONE: tl.constexpr,
    MAX_WAYS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    HAS_BACK: tl.constexpr,
    ENDS_LIMITED: tl.constexpr,
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
        k = tl.load(top_k + slot)
        p = tl.load(top_p + slot)
        position = tl.load(context_lens + slot)
        if HAS_BACK:
            position -= tl.load(back + row)
        draw = (position + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
        key = mix64(tl.load(stream + slot).to(tl.uint64, bitcast=True) + draw)
        source = logits + row.to(tl.int64) * stride
        other = changed_row(changed, is_changed, slot, row, changed_stride)
        distances += row.to(tl.int64) * room
        tokens += row.to(tl.int64) * room
        near += row.to(tl.int64) * near_stride
        weights += row * (MAX_WAYS + 2)
        sure, maybe, few, of_sure, reads_row, k, every = _plan(
            thresholds + row * MAX_WAYS, counts + row * MAX_WAYS, weights,
            k, p, vocab, most, room, WAYS,
        )  # fmt: skip
        limited = maybe < float("inf")
        gathers = limited & ~reads_row
        races = sure < float("inf")
        start = split * blocks * BLOCK
        end = min(start + blocks * BLOCK, vocab)
        if races:
            best = tl.full((BLOCK,), float("-inf"), tl.float32)
            best_token = tl.zeros((BLOCK,), tl.int32)
            for first in range(start, end, BLOCK):
                token = first + tl.arange(0, BLOCK)
                x = row_logits(source, other, token, vocab)
                scaled = tl.div_rn(x - most, heat)
                is_sure = (x >= sure) & (scaled >= lowest)
                if tl.max(is_sure.to(tl.int32), 0) > 0:
                    score = tl.where(is_sure, _score(key, token, scaled), float("-inf"))
                    best_token = tl.where(score > best, token, best_token)
                    best = tl.maximum(best, score)
            value, winner = first_best(best, best_token)
            tl.store(part_value + row * MAX_SPLITS + split, value)
            tl.store(part_token + row * MAX_SPLITS + split, winner)
        if gathers:
            light = tl.full((), 0, tl.int64)
            for first in range(start, end, BLOCK):
                token = first + tl.arange(0, BLOCK)
                x = row_logits(source, other, token, vocab)
                if races:
                    scaled = tl.div_rn(x - most, heat)
                    light += tl.sum(tl.where(x >= sure, weight_of(scaled, ONE), 0), 0)
                is_open = (x < sure) & (x >= maybe) & (x > float("-inf"))
                number = tl.sum(is_open.to(tl.int32), 0)
                if number > 0:
                    at = tl.atomic_add(arrivals + row * 2, number, sem="relaxed") - 1
                    at += tl.cumsum(is_open.to(tl.int32), 0)
                    fits = is_open & (at < room)
                    distance = tl.abs(tl.div_rn(x - most, heat)).to(tl.int32, bitcast=True)
                    tl.store(distances + at, distance, mask=fits)
                    tl.store(tokens + at, token, mask=fits)
            if races:
                tl.atomic_add(weights + WAYS + 1, light, sem="relaxed")
        if (limited == 0) | ENDS_LIMITED:
            tl.debug_barrier()
            if tl.atomic_add(arrivals + row * 2 + 1, 1) == tl.num_programs(1) - 1:
                tl.debug_barrier()
                parts = tl.where(races, tl.num_programs(1), 0)
                value, winner = _best_part(part_value, part_token, row, parts, MAX_SPLITS)
                if ENDS_LIMITED:
                    if limited:
                        number = tl.load(arrivals + row * 2, cache_modifier=".cg")
                        winner = _end_limited(
                            source, other, distances, tokens, near, weights, number, room,
                            reads_row, of_sure, maybe, few, k, every, p, vocab, most, heat, lowest,
                            key, value, winner, WAYS, ONE, SEARCH, BLOCK,
                        )  # fmt: skip
                tl.store(out + row, winner)
                tl.store(token_ids + slot, winner)


@triton.jit(do_not_specialize=["parts"])
def end_rows(
    logits,
    rows,
    temperature,
    top_k,
    top_p,
    stream,
    context_lens,
    back,
    part_value,
    part_token,
    row_value,
    arrivals,
    thresholds,
    counts,
    weights,
    distances,
    tokens,
    near,
    token_ids,
    out,
    vocab,
    stride,
    parts,
    room,
    near_stride,
    changed,
    is_changed,
    changed_stride,
    BLOCK: tl.constexpr,
    SEARCH: tl.constexpr,
    WAYS: tl.constexpr,
    ONE: tl.constexpr,
    MAX_WAYS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    HAS_BACK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0)
    lowest = tl.load(row_value + row * 2 + 1)
    if lowest < float("inf"):
        slot = tl.load(rows + row)
        k = tl.load(top_k + slot)
        p = tl.load(top_p + slot)
        if ((k > 0) & (k < vocab)) | (p < 1):
            most = tl.load(row_value + row * 2)
            heat = tl.load(temperature + slot)
            position = tl.load(context_lens + slot)
            if HAS_BACK:
                position -= tl.load(back + row)
            draw = (position + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
            key = mix64(tl.load(stream + slot).to(tl.uint64, bitcast=True) + draw)
            source = logits + row.to(tl.int64) * stride
            other = changed_row(changed, is_changed, slot, row, changed_stride)
            weights += row * (MAX_WAYS + 2)
            sure, maybe, few, of_sure, reads_row, k, every = _plan(
                thresholds + row * MAX_WAYS, counts + row * MAX_WAYS, weights,
                k, p, vocab, most, room, WAYS,
            )  # fmt: skip
            if maybe < float("inf"):
                parts = tl.where(sure < float("inf"), parts, 0)
                value, winner = _best_part(part_value, part_token, row, parts, MAX_SPLITS)
                winner = _end_limited(
                    source, other, distances + row.to(tl.int64) * room,
                    tokens + row.to(tl.int64) * room, near + row.to(tl.int64) * near_stride,
                    weights, tl.load(arrivals + row * 2), room, reads_row, of_sure, maybe, few, k,
                    every, p, vocab, most, heat, lowest, key, value, winner,
                    WAYS, ONE, SEARCH, BLOCK,
                )  # fmt: skip
                tl.store(out + row, winner)
                tl.store(token_ids + slot, winner)


@triton.jit
def _plan(thresholds, counts, weights, k, p, vocab, most, room, WAYS: tl.constexpr):
    """What of a row races where it is (down to `sure`), what is gathered (down to `maybe`)."""
    # Of a row without limits all tokens race where they are.
    sure = tl.full((), float("-inf"), tl.float32)
    maybe = tl.full((), float("inf"), tl.float32)
    few = tl.full((), 0, tl.int32)
    every = tl.full((), 0, tl.int32)
    reads_row = tl.full((), False, tl.int1)
    of_sure = sure
    if ((k > 0) & (k < vocab)) | (p < 1):
        of_sure, maybe, few, num_maybe, k, every = bracket(
            thresholds, counts, weights, k, p, vocab, WAYS
        )
        sure = of_sure
        if maybe < float("inf"):
            reads_row = num_maybe - few > room
            if (num_maybe <= room) | reads_row:
                sure = tl.full((), float("inf"), tl.float32)
                few = tl.full((), 0, tl.int32)
            # Logits so near each other can have the same distance.
            maybe -= (most - maybe) * 1e-6
    return sure, maybe, few, of_sure, reads_row, k, every


@triton.jit
def _best_part(part_value, part_token, row, parts, MAX_SPLITS: tl.constexpr):
    part = tl.arange(0, MAX_SPLITS)
    values = tl.load(
        part_value + row * MAX_SPLITS + part,
        mask=part < parts,
        other=float("-inf"),
        cache_modifier=".cg",
    )
    tokens = tl.load(
        part_token + row * MAX_SPLITS + part, mask=part < parts, other=0, cache_modifier=".cg"
    )
    return first_best(values, tokens)


@triton.jit
def _end_limited(
    source,
    other,
    distances,
    tokens,
    near,
    weights,
    number,
    room,
    reads_row,
    of_sure,
    maybe,
    few,
    k,
    every,
    p,
    vocab,
    most,
    heat,
    lowest,
    key,
    value,
    winner,
    WAYS: tl.constexpr,
    ONE: tl.constexpr,
    SEARCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The token that arrives first of those that raced, `winner` at `value`, and those gathered."""
    overflows = number > room
    reads_row = reads_row | overflows
    few = tl.where(overflows, 0, few)
    light = tl.load(weights + WAYS + 1, cache_modifier=".cg")
    lo = tl.abs(tl.div_rn(of_sure - most, heat)).to(tl.int32, bitcast=True) - 1
    kept = find_limits(
        source,
        other,
        distances,
        number,
        reads_row,
        vocab,
        most,
        heat,
        tl.where(of_sure < float("inf"), lo, -1),
        tl.abs(tl.div_rn(maybe - most, heat)).to(tl.int32, bitcast=True),
        few,
        tl.where(few > 0, light, 0),
        k,
        k < every,
        p,
        tl.load(weights + WAYS),
        near,
        ONE,
        SEARCH,
    )
    lowest = tl.maximum(lowest, -kept.to(tl.float32, bitcast=True))
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    best_token = tl.full((BLOCK,), 0x7FFFFFFF, tl.int32)
    number = tl.where(reads_row, vocab, number)
    for first in range(0, number, BLOCK):
        token = first + tl.arange(0, BLOCK)
        listed = (token < number) & ~reads_row
        distance = tl.load(distances + token, mask=listed, other=0, cache_modifier=".cg")
        x = row_logits(source, other, token, tl.where(reads_row, vocab, 0))
        scaled = -distance.to(tl.float32, bitcast=True)
        scaled = tl.where(reads_row, tl.div_rn(x - most, heat), scaled)
        token = tl.load(tokens + token, mask=listed, other=token, cache_modifier=".cg")
        is_kept = (listed | reads_row) & (scaled >= lowest)
        if tl.max(is_kept.to(tl.int32), 0) > 0:
            score = tl.where(is_kept, _score(key, token, scaled), float("-inf"))
            # They are gathered in any order.
            better = (score > best) | ((score == best) & (token < best_token))
            best_token = tl.where(better, token, best_token)
            best = tl.maximum(best, score)
    score, token = first_best(best, best_token)
    return tl.where((score > value) | ((score == value) & (token < winner)), token, winner)


@triton.jit
def _score(key, token, scaled):
    """Highest of the token that arrives first."""
    return scaled - tl.log(_exponential(key, token))


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
