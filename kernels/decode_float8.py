"""Paged attention of decode rows over keys and values in 8 bits (reference_float8.py).

Work items, and what is left for those that add them up, are those of decode_attention.py; how a
program computes is another matter. A memory that is read at half the bytes leaves half the time for
each key, and widening codes takes some of it, so what is saved is instructions:

- Codes become float16, in which each of them is exact, two by one instruction (CASTS). Where there
  is none, their bits are moved, which makes 2⁻⁸ times the number. Queries are scaled by a power of
  two, to fit into float16.
- Keys and values are the left operands of the products, of which tensor cores take 16 rows at
  least, and queries the right ones, of which 8 do. Turned the other way, a group of 4 heads would
  be padded to 16.
- Each warp is a team: it has keys of its own and sums of its own, which are added up at the end,
  and does not wait for another one's scores. Where such sums are too many for a warp's registers
  (`takes_teams`), and for float32, decode_attention.py computes codes too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from baton.kernels.decode_sums_jit import add_up, with_sinks
from baton.kernels.float8_jit import (
    codes_offset,
    neighbours,
    scale_of,
    scales_offset,
    small_halves,
)
from baton.kernels.soft_cap import capped

_LEAST_EXPONENT = tl.constexpr(67)
"""Of a float32, 2⁻⁶⁰. Values with a smaller scale are weighed as if it were that one."""


@triton.jit(do_not_specialize=["layer", "table_stride", "overlaps"])
def attend_codes(
    out,
    query,
    kv,
    items,
    block_tables,
    partial,
    weight,
    arrived,
    sinks,
    context_lens,
    layer,
    scale,
    query_row,
    query_head,
    out_row,
    out_head,
    table_stride,
    overlaps,
    KV_HEADS: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TEAMS: tl.constexpr,
    KEYS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    FIELDS: tl.constexpr,
    FUSED: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    PDL: tl.constexpr,
    CASTS: tl.constexpr,
    ASM: tl.constexpr,
):
    """One KV head of one item, KEYS of its keys for each of the TEAMS, the warps, at a time. Column
    m of the products is token m // GROUP of the row."""
    HEADS: tl.constexpr = GROUP * WIDTH
    TILE: tl.constexpr = TEAMS * KEYS
    PAIRS: tl.constexpr = HEAD_DIM // 2
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    entry = items + item * FIELDS
    row = tl.load(entry)
    slot = tl.load(entry + 1)
    begin = tl.load(entry + 2)
    end = tl.load(entry + 3)
    first_item = tl.load(entry + 4)
    num_splits = tl.load(entry + 5)

    # Places in a tile, of what is looked up in the table together: a team's keys where they lie in
    # one block, else each by itself. A thread has the scores of the two keys whose scales it gets
    # in one load.
    team = tl.arange(0, TEAMS)[:, None] * KEYS
    place = tl.arange(0, KEYS)
    own = (place % 8 * 2 + place // 8)[None, :]
    both = (tl.arange(0, KEYS // 2) * 2)[None, :]
    IN_ONE: tl.constexpr = KEYS <= BLOCK_SIZE
    of_row = team if IN_ONE else team + own
    of_pair = team if IN_ONE else team + both
    pair_inside = both if IN_ONE else both * 0
    first = begin // TILE * TILE
    table = block_tables + slot.to(tl.int64) * table_stride
    has_keys = begin < end
    block = _block_of(table, first + of_row, begin, end, has_keys, BLOCK_SIZE)
    pair_block = _block_of(table, first + of_pair, begin, end, has_keys, BLOCK_SIZE)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if row < 0:
        return

    head = tl.arange(0, BLOCK_H)
    if WIDTH == 1:
        heads = kv_head * GROUP + head
        q_of = row.to(tl.int64) * query_row + heads * query_head
    else:
        heads = kv_head * GROUP + head % GROUP
        token = row.to(tl.int64) * WIDTH + head // GROUP
        q_of = token * query_row + heads * query_head
        # Of padding behind the last draft nothing is used.
        hidden = tl.maximum(tl.load(entry + 6) - head // GROUP, 0)
        last = tl.load(context_lens + slot, mask=has_keys, other=0) - hidden
    column = tl.arange(0, BLOCK_D // 2)
    # Which dimensions the halves of keys are.
    dim_of = column // 2 * 4 + column % 2 if CASTS else 2 * column
    apart: tl.constexpr = 2 if CASTS else 1
    one, other, unit = _query_halves(
        query + q_of, head < HEADS, dim_of, apart, TEAMS, HEAD_DIM, BLOCK_H, BLOCK_D
    )

    # A block's offset needs 64 bits; what follows inside the block does not. An element is a pair
    # of codes.
    block_elements: tl.constexpr = KV_HEADS * LAYERS * (BLOCK_SIZE * (HEAD_DIM + 1))
    first_run = (kv_head * LAYERS + layer) * 2
    elements = kv.to(tl.pointer_type(tl.int16))
    keys = elements + codes_offset(first_run, LAYERS * 2, BLOCK_SIZE, HEAD_DIM) // 2
    scales = elements + scales_offset(first_run, LAYERS * 2, BLOCK_SIZE, HEAD_DIM) // 2
    # What codes in float16 must be multiplied by.
    SMALL: tl.constexpr = 1.0 if CASTS else 256.0
    factor = (unit * (scale * SMALL))[None, None, :]
    # Finite: of a tile, and of an item, there may be no key that a team, or a token, sees.
    highest = tl.full([TEAMS, BLOCK_H], -1.0e30, tl.float32)
    shares = tl.zeros([TEAMS, KEYS, BLOCK_H], tl.float32)
    acc_even = tl.zeros([TEAMS, BLOCK_D // 2, BLOCK_H], tl.float32)
    acc_odd = tl.zeros([TEAMS, BLOCK_D // 2, BLOCK_H], tl.float32)
    at = scales + pair_block.to(tl.int64) * block_elements
    at += ((first + of_pair) % BLOCK_SIZE + pair_inside) // 2
    k_exponents, v_exponents = tl.load(at), tl.load(at + BLOCK_SIZE // 2)
    for start in tl.range(first, end, TILE):
        key = start + team + own
        is_own = (key >= begin) & (key < end)
        run = keys + block.to(tl.int64) * block_elements
        # Slots that are not the item's may hold anything, no numbers too: read is the nearest one.
        near = tl.minimum(tl.maximum(key, begin), end - 1) % BLOCK_SIZE * PAIRS
        source = run[:, :, None] + (near[:, :, None] + column[None, None, :])
        # Values turned, so that they go from shared memory to registers as tensor cores want them.
        turned = run[:, None, :] + (near[:, None, :] + column[None, :, None])
        if BLOCK_D == HEAD_DIM:
            k = tl.load(source)
            v = tl.load(turned + BLOCK_SIZE * PAIRS)
        else:
            k = tl.load(source, mask=column[None, None, :] < PAIRS, other=0)
            v = tl.load(turned + BLOCK_SIZE * PAIRS, mask=column[None, :, None] < PAIRS, other=0)
        # Scales are those of the slots. Scores of others' are replaced, and their weights are zero:
        # scales that are none must not get that far.
        k_scale = tl.where(is_own, scale_of(_each(k_exponents, TEAMS, KEYS)), 0.0)[:, :, None]
        v_exponent = _each(v_exponents, TEAMS, KEYS)
        v_scale = tl.where(is_own, scale_of(v_exponent), 0.0)[:, :, None]
        v_size = (tl.maximum(v_exponent, _LEAST_EXPONENT) - 127).to(tl.float32)[:, :, None]
        # The next tile's blocks and scales, a turn early: no copy waits for the table, and
        # what is loaded in pairs is not copied ahead.
        block = _block_of(table, start + TILE + of_row, begin, end, True, BLOCK_SIZE)
        pair_block = _block_of(table, start + TILE + of_pair, begin, end, True, BLOCK_SIZE)
        at = scales + pair_block.to(tl.int64) * block_elements
        at += ((start + TILE + of_pair) % BLOCK_SIZE + pair_inside) // 2
        k_exponents, v_exponents = tl.load(at), tl.load(at + BLOCK_SIZE // 2)

        if CASTS:
            k_one, k_other = neighbours(k, ASM)
        else:
            k_one, k_other = small_halves(k, CASTS, ASM)
        score = tl.zeros([TEAMS, KEYS, BLOCK_H], tl.float32)
        score = tl.dot(k_one, one, score)
        score = tl.dot(k_other, other, score) * factor
        seen = is_own[:, :, None]
        if WIDTH > 1:
            seen &= key[:, :, None] < last[None, None, :]
            if WINDOW > 0:
                seen &= key[:, :, None] >= last[None, None, :] - WINDOW
        score *= k_scale
        if SOFT_CAP > 0:
            score = capped(score, SOFT_CAP)
        score = tl.where(seen, score, float("-inf"))
        # Weights are compared with the largest product of weight and scale, so that these
        # products, which float16 must hold, are 1 at most.
        above = tl.maximum(highest, tl.max(score + v_size, 1))
        p = tl.exp2(score - above[:, None, :])
        fade = tl.exp2(highest - above)[:, None, :]
        shares = shares * fade + p
        p = (p * v_scale).to(tl.float16)
        v_even, v_odd = small_halves(v, CASTS, ASM)
        acc_even = tl.dot(v_even, p, acc_even * fade)
        acc_odd = tl.dot(v_odd, p, acc_odd * fade)
        highest = above
    if PDL:
        if overlaps:
            tl.extra.cuda.gdc_launch_dependents()

    above = tl.max(highest, 0)
    fade = tl.exp2(highest - above[None, :])
    total = tl.sum(tl.sum(shares, 1) * fade, 0)
    dim = tl.arange(0, BLOCK_D)
    is_real = (head < HEADS)[:, None] & (dim < HEAD_DIM)[None, :]
    # What of the sums goes through shared memory depends on where they are stored.
    if num_splits == 1:
        acc = _sums_of_heads(acc_even, acc_odd, fade * SMALL, TEAMS)
        if sinks is not None:
            acc, total, above = with_sinks(acc, total, above, sinks, heads, head < HEADS)
        # A row without keys has a total of zero and becomes zero.
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        if WIDTH == 1:
            out_at = row.to(tl.int64) * out_row + heads[:, None] * out_head + dim[None, :]
        else:
            out_at = token[:, None] * out_row + heads[:, None] * out_head + dim[None, :]
        tl.store(out + out_at, acc.to(out.dtype.element_ty), mask=is_real)
    else:
        total = tl.where(total > 0, total, 1.0)
        acc = _sums_of_heads(acc_even, acc_odd, fade * SMALL, TEAMS) / total[:, None]
        at_head = (item * KV_HEADS + kv_head) * HEADS + head
        tl.store(partial + at_head[:, None] * HEAD_DIM + dim[None, :], acc, mask=is_real)
        tl.store(weight + at_head, above + tl.log2(total), mask=head < HEADS)
        if FUSED:
            # The barrier puts the stores of all threads before the release of the one that adds.
            tl.debug_barrier()
            done = arrived + row * KV_HEADS + kv_head
            if tl.atomic_add(done, 1, sem="acq_rel") == num_splits - 1:
                tl.store(done, 0)
                add_up(
                    out + row.to(tl.int64) * (WIDTH * out_row),
                    partial,
                    weight,
                    sinks,
                    first_item,
                    num_splits,
                    kv_head,
                    out_row,
                    out_head,
                    KV_HEADS,
                    HEAD_DIM,
                    GROUP,
                    WIDTH,
                    BLOCK_D,
                    AT_ONCE,
                )


@triton.jit
def _block_of(table, key, begin, end, has_keys, BLOCK_SIZE: tl.constexpr):
    """The blocks of some keys; of those that are not the item's, that of its nearest one: nothing
    unwritten is read, and no entry of the table beyond the row's own."""
    near = tl.minimum(tl.maximum(key, begin), end - 1)
    return tl.load(table + near // BLOCK_SIZE, mask=has_keys, other=0)


@triton.jit
def _query_halves(
    query,
    is_real,
    dim,
    apart: tl.constexpr,
    TEAMS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Pointers to queries [H] → for each team [D / 2, H], the dimensions that `dim` [D / 2] names,
    and those `apart` further on, and what products with them must be multiplied by, float32 [H].

    In float16 the largest number of a query is from 2¹⁴ to 2¹⁵. What of the others falls below its
    smallest ones is less than the products' sum in float32 loses. With a query that is infinite
    they are NaN: scores of nothing but −∞ would else look like those of a token that sees no key.
    """
    source = query[None, :] + dim[:, None]
    is_there = is_real[None, :] & (dim < HEAD_DIM)[:, None]
    x = tl.load(source, mask=is_there, other=0.0).to(tl.float32)
    is_there = is_real[None, :] & (dim + apart < HEAD_DIM)[:, None]
    y = tl.load(source + apart, mask=is_there, other=0.0).to(tl.float32)
    largest = tl.max(tl.maximum(tl.abs(x), tl.abs(y)), 0)
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 15)
    inverse = ((268 - exponent) << 23).to(tl.float32, bitcast=True)[None, :]
    unit = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    unit = tl.where(exponent == 255, float("nan"), unit)
    shape: tl.constexpr = (TEAMS, BLOCK_D // 2, BLOCK_H)
    x = tl.broadcast_to((x * inverse).to(tl.float16)[None, :, :], shape)
    y = tl.broadcast_to((y * inverse).to(tl.float16)[None, :, :], shape)
    return x, y, unit


@triton.jit
def _each(pairs, TEAMS: tl.constexpr, KEYS: tl.constexpr):
    """int16 [TEAMS, KEYS / 2], of two tokens each → int32 [TEAMS, KEYS], in the order of a
    tile's rows."""
    shift = (tl.arange(0, 2) * 8)[None, :, None]
    return tl.reshape((pairs.to(tl.int32)[:, None, :] >> shift) & 0xFF, (TEAMS, KEYS))


@triton.jit
def _sums_of_heads(even, odd, fade, TEAMS: tl.constexpr):
    """Of teams [TEAMS, D / 2, H], which count as fade [TEAMS, H] says → [H, D]."""
    even = _sum_of_teams(even * fade[:, None, :], TEAMS)
    odd = _sum_of_teams(odd * fade[:, None, :], TEAMS)
    return tl.interleave(tl.trans(even), tl.trans(odd))


@triton.jit
def _sum_of_teams(x, TEAMS: tl.constexpr):
    """[TEAMS, M, N] → [M, N]. By halves, each of which lies in threads of its own once it is split
    off: a sum over warps would meet in the same banks of shared memory."""
    M: tl.constexpr = x.shape[1]
    N: tl.constexpr = x.shape[2]
    x = tl.permute(x, (1, 2, 0))
    if TEAMS >= 8:
        a, b = tl.split(tl.reshape(x, (M, N, TEAMS // 2, 2)))
        x = a + b
    if TEAMS >= 4:
        a, b = tl.split(tl.reshape(x, (M, N, 2, 2)))
        x = a + b
    if TEAMS >= 2:
        a, b = tl.split(x)
        return a + b
    else:
        return tl.reshape(x, (M, N))
