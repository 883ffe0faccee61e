"""How what several programs have attended to becomes one, for kernels of decode attention."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def with_sinks(acc, total, highest, sinks, heads, is_real):
    """The sums of some rows [heads, dim], [heads] and their highest score, as if one more key had
    been attended to, whose value is zero."""
    sink = tl.load(sinks + heads, mask=is_real, other=0.0) * 1.4426950408889634
    above = tl.maximum(highest, sink)
    fade = tl.exp2(highest - above)
    return acc * fade[:, None], total * fade + tl.exp2(sink - above), above


@triton.jit
def add_up(
    out,
    partial,
    weight,
    sinks,
    first_item,
    num_splits,
    kv_head,
    out_row,
    out_head,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Adds up a row's items for one KV head; `out` points to the row."""
    HEADS: tl.constexpr = GROUP * WIDTH
    GROUP_P: tl.constexpr = triton.next_power_of_2(HEADS)
    head = tl.arange(0, GROUP_P)
    dim = tl.arange(0, BLOCK_D)
    is_real = (head < HEADS)[:, None] & (dim < HEAD_DIM)[None, :]
    highest = tl.full([GROUP_P], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_P], tl.float32)
    acc = tl.zeros([GROUP_P, BLOCK_D], tl.float32)
    for start in tl.range(0, num_splits, AT_ONCE):
        # Unrolled, so that the loads of several items are under way together.
        for ahead in tl.static_range(AT_ONCE):
            split = start + ahead
            at = ((first_item + split) * KV_HEADS + kv_head) * HEADS + head
            # .cg: other programs wrote these while this one ran; they are in the L2 cache.
            w = tl.load(
                weight + at,
                mask=(head < HEADS) & (split < num_splits),
                other=float("-inf"),
                cache_modifier=".cg",
            )
            part = tl.load(
                partial + at[:, None] * HEAD_DIM + dim[None, :],
                mask=is_real & (split < num_splits),
                other=0.0,
                cache_modifier=".cg",
            )
            # Heads that only pad have no weight anywhere; without this they would make NaN.
            above = tl.where(head < HEADS, tl.maximum(highest, w), 0.0)
            share = tl.exp2(w - above)
            fade = tl.exp2(highest - above)
            total = total * fade + share
            acc = acc * fade[:, None] + part * share[:, None]
            highest = above
    if sinks is not None:
        heads = kv_head * GROUP + head % GROUP
        acc, total, highest = with_sinks(acc, total, highest, sinks, heads, head < HEADS)
    acc = acc / tl.where(head < HEADS, total, 1.0)[:, None]
    out_at = (kv_head * GROUP + head % GROUP)[:, None] * out_head + dim[None, :]
    if WIDTH > 1:
        out_at += (head // GROUP)[:, None] * out_row
    tl.store(out + out_at, acc.to(out.dtype.element_ty), mask=is_real)
