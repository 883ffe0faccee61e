"""Paged attention for rows of one query token, cut so that every processor gets a like share.

One program attends one KV head of one work item (kernels/decode_plan.py); programs without an item
end at once. A row of one item is written at once. Of a row of several, each item leaves its
normalised sum and the logarithm (base 2) of its weight, and either the program that comes last or a
second kernel adds them up. Which it is, is configured; the arithmetic is the same.

Of keys and values in 8 bits programs compute as decode_float8.py says, where it can.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.decode_float8 import attend_codes
from baton.kernels.decode_plan import (
    ITEM_FIELDS,
    TEAM_KEYS,
    DecodeConfig,
    DecodeWork,
    decode_config,
    make_work,
    plan_decode,
    takes_teams,
    takes_width,
    team_block,
)
from baton.kernels.decode_sums_jit import add_up, with_sinks
from baton.kernels.float8_jit import (
    add_halves,
    as_bytes,
    casts_codes,
    codes_offset,
    has_assembler,
    is_float8,
    scale_of,
    scales_offset,
    score_halves,
)
from baton.kernels.shared_memory import shared_bytes
from baton.kernels.soft_cap import capped

__all__ = [
    "DecodeConfig",
    "DecodeWork",
    "decode_config",
    "make_work",
    "paged_decode_attention",
    "plan_decode",
    "takes_width",
]

_LOG2E = 1.4426950408889634
_COMBINED_AT_ONCE = 8
_TILE_BYTES = 160 * 1024
"""Shared memory that a program's tiles of keys and values take at most, where it is there: n stages
hold n − 1 of each."""
_OTHER_BYTES = 4096


def paged_decode_attention(
    query: Tensor,
    kv: Tensor,
    layer: int,
    rows: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    work: DecodeWork,
    scale: float,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """Query tokens, `work.width` of each row, over the row's keys in the pool → [B · width,
    num_heads, head_dim].

    `plan_decode` has been called with the same rows, context_lens and window; what those say is
    taken from the plan. A row of −1 becomes zero, unless it was planned that padding is left. Of a
    row with drafts each token sees the keys up to its own.

    Args:
        query: [B · width, num_heads, head_dim], the last dimension contiguous.
        kv: [blocks + 1, num_kv_heads, num_layers, 2, block_size, head_dim], contiguous, the dtype
            of `query`; or of such a shape codes, with their scales behind them
            (reference_float8.py). Slots behind a row's context may hold anything, NaN included.
        layer: which layer of `kv`.
        rows: int32 [B · width], the slot of each token.
        context_lens: as for `plan_decode`.
        block_tables: int32 [slots, ≥ blocks of the context]; what follows them, and what lies
            before the window, is not read.
        scale: of the products of query and key.
        soft_cap: scores become cap · tanh(score / cap); 0: they stay.
        sinks: float32 [num_heads]: of each head a score beside those of the keys, of a value that
            is zero.
        out: where the result goes, every element; the last dimension contiguous.
        pdl: start while the kernel before still runs. It may write `query` and `kv`, but neither
            the plan nor the block tables.

    Raises:
        ValueError: shapes, or a window, that `work` was not made and planned for.
    """
    if out is None:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
    num_tokens, num_heads, head_dim = query.shape
    _, num_kv_heads, num_layers, _, block_size, _ = kv.shape
    is_meant = num_tokens == work.num_rows * work.width and num_heads == work.num_heads
    if not is_meant or rows.shape != (num_tokens,):
        raise ValueError(f"{num_tokens} × {num_heads} heads are not what the work was made for")
    if work.window != window:
        raise ValueError(f"planned for window {work.window}, asked for {window}")
    config, num_items = work.config, work.items.shape[0]
    group = num_heads // num_kv_heads
    num_warps = config.num_warps
    has_codes, is_wide = is_float8(kv), query.element_size() == 4
    has_teams = takes_teams(group * work.width, head_dim)
    kernel: Any
    if has_codes and not is_wide and has_teams and config.block_n == TEAM_KEYS * num_warps:
        kernel, how = attend_codes, {"TEAMS": num_warps, "KEYS": TEAM_KEYS}
        how["CASTS"] = casts_codes(kv.device)
        block_h, block_d = team_block(group * work.width, head_dim)
    else:
        block_h = max(16, triton.next_power_of_2(group * work.width))
        # Codes are multiplied in halves.
        block_d = max(32 if has_codes else 16, triton.next_power_of_2(head_dim))
        kernel, how = _attend, {"BLOCK_N": config.block_n, "FLOAT8": has_codes}
        # Float32 products do not go through tensor cores, and hold whole operands in registers.
        num_warps = max(num_warps, 8 if is_wide else 0)
    kernel[(num_kv_heads, num_items)](
        out,
        query,
        as_bytes(kv),
        work.items,
        block_tables,
        work.partial,
        work.weight,
        work.arrived,
        sinks,
        context_lens,
        layer,
        scale * _LOG2E,  # exp2 is what the hardware has
        query.stride(0),
        query.stride(1),
        out.stride(0),
        out.stride(1),
        block_tables.stride(0),
        int(config.overlaps),
        KV_HEADS=num_kv_heads,
        LAYERS=num_layers,
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        GROUP=group,
        WIDTH=work.width,
        WINDOW=window if work.width > 1 else 0,
        BLOCK_H=block_h,
        BLOCK_D=block_d,
        AT_ONCE=_COMBINED_AT_ONCE,
        FIELDS=ITEM_FIELDS,
        FUSED=config.fused,
        SOFT_CAP=soft_cap * _LOG2E,
        PDL=pdl,
        ASM=has_assembler(),
        **how,
        num_warps=num_warps,
        num_stages=_num_stages(config, block_h, block_d, query, kv),
        launch_pdl=pdl,
    )
    if not config.fused:
        _combine[(num_kv_heads, work.num_rows)](
            out,
            work.row_items,
            work.partial,
            work.weight,
            sinks,
            out.stride(0),
            out.stride(1),
            KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            GROUP=group,
            WIDTH=work.width,
            BLOCK_D=block_d,
            AT_ONCE=_COMBINED_AT_ONCE,
            num_warps=4,
        )
    return out


def _num_stages(config: DecodeConfig, block_h: int, block_d: int, query: Tensor, kv: Tensor) -> int:
    """Two at least; more as far as there is room beside the queries, of which many lie there
    twice, and beside a tile of codes that are widened."""
    query_bytes = block_h * block_d * query.element_size() * (2 if block_h >= 64 else 1)
    if is_float8(kv):
        query_bytes += 2 * config.block_n * block_d * query.element_size()
    room = min(_TILE_BYTES, shared_bytes(kv.device) - query_bytes - _OTHER_BYTES)
    stage_bytes = 2 * config.block_n * block_d * kv.element_size()
    return max(2, min(config.num_stages, 1 + room // stage_bytes))


@triton.jit(do_not_specialize=["layer", "table_stride", "overlaps"])
def _attend(
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
    BLOCK_N: tl.constexpr,
    AT_ONCE: tl.constexpr,
    FIELDS: tl.constexpr,
    FUSED: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    PDL: tl.constexpr,
    FLOAT8: tl.constexpr,
    ASM: tl.constexpr,
):
    """One KV head of one item. Row m of the products is token m // GROUP of the row."""
    HEADS: tl.constexpr = GROUP * WIDTH
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    entry = items + item * FIELDS
    row = tl.load(entry)
    slot = tl.load(entry + 1)
    begin = tl.load(entry + 2)
    end = tl.load(entry + 3)
    first_item = tl.load(entry + 4)
    num_splits = tl.load(entry + 5)
    # Keys that are not the item's are replaced by its nearest one: no load needs a mask, nothing
    # unwritten is read, and no entry of the table beyond the row's own.
    first = begin // BLOCK_N * BLOCK_N
    near = tl.minimum(tl.maximum(first + tl.arange(0, BLOCK_N), begin), end - 1)
    table = block_tables + slot.to(tl.int64) * table_stride
    at_block = first if BLOCK_N <= BLOCK_SIZE else near
    block = tl.load(table + at_block // BLOCK_SIZE, mask=begin < end, other=0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if row < 0:
        return

    head = tl.arange(0, BLOCK_H)
    dim = tl.arange(0, BLOCK_D)
    is_real = (head < HEADS)[:, None] & (dim < HEAD_DIM)[None, :]
    if WIDTH == 1:
        heads = kv_head * GROUP + head
        q_of = row.to(tl.int64) * query_row + heads[:, None] * query_head
    else:
        heads = kv_head * GROUP + head % GROUP
        token = row.to(tl.int64) * WIDTH + head // GROUP
        q_of = token[:, None] * query_row + heads[:, None] * query_head
        # Of padding behind the last draft nothing is used.
        hidden = tl.maximum(tl.load(entry + 6) - head // GROUP, 0)
        last = tl.load(context_lens + slot, mask=begin < end, other=0) - hidden
    if FLOAT8:
        pair = tl.arange(0, BLOCK_D // 2)
        is_pair = (head < HEADS)[:, None] & (pair < HEAD_DIM // 2)[None, :]
        even = tl.load(query + (q_of + 2 * pair[None, :]), mask=is_pair, other=0.0)
        odd = tl.load(query + (q_of + 2 * pair[None, :] + 1), mask=is_pair, other=0.0)
        column = pair
        elements = kv.to(tl.pointer_type(tl.int16))
    else:
        q = tl.load(query + (q_of + dim[None, :]), mask=is_real, other=0.0)
        column = dim
        elements = kv
    if WIDTH > 1:
        # Scores of −∞ alone must not pass for those of keys that a token does not see.
        if FLOAT8:
            even, odd = _finite_or_nan(even), _finite_or_nan(odd)
        else:
            q = _finite_or_nan(q)

    # A block's offset needs 64 bits; what follows inside the block does not. An element is a
    # number, or a pair of codes.
    DIMS: tl.constexpr = HEAD_DIM // 2 if FLOAT8 else HEAD_DIM
    run_elements: tl.constexpr = BLOCK_SIZE * DIMS
    # Of codes there are scales, too.
    held: tl.constexpr = BLOCK_SIZE * (HEAD_DIM + 1) // 2 if FLOAT8 else run_elements
    block_elements: tl.constexpr = KV_HEADS * LAYERS * 2 * held
    first_run = (kv_head * LAYERS + layer) * 2
    if FLOAT8:
        keys = elements + codes_offset(first_run, LAYERS * 2, BLOCK_SIZE, HEAD_DIM) // 2
        scales = kv + scales_offset(first_run, LAYERS * 2, BLOCK_SIZE, HEAD_DIM)
    else:
        keys = elements + first_run * run_elements
    # What scores must be multiplied by when they are known: capped ones are scaled before.
    rest = 1.0 if SOFT_CAP > 0 else scale
    if WIDTH == 1:
        highest = tl.full([BLOCK_H], float("-inf"), tl.float32)
    else:
        # Finite: of an item's keys a token may see none.
        highest = tl.full([BLOCK_H], -1.0e30, tl.float32)
    # Summed over keys at the end only: between warps that costs a barrier.
    shares = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
    if FLOAT8:
        acc = (
            tl.zeros([BLOCK_H, BLOCK_D // 2], tl.float32),
            tl.zeros([BLOCK_H, BLOCK_D // 2], tl.float32),
        )
        at_scale = scales + block.to(tl.int64) * (2 * block_elements) + near % BLOCK_SIZE
        k_exponent = tl.load(at_scale)
        v_exponent = tl.load(at_scale + BLOCK_SIZE)
    else:
        acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for start in tl.range(first, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        offset = (near % BLOCK_SIZE * DIMS)[:, None] + column[None, :]
        ahead = block.to(tl.int64) * block_elements
        if BLOCK_N <= BLOCK_SIZE:
            source = keys + ahead + offset
        else:
            source = keys + ahead[:, None] + offset
        # The next tile's blocks, a turn early: no load of keys waits for the table.
        near = tl.minimum(key + BLOCK_N, end - 1)
        at_block = tl.minimum(start + BLOCK_N, end - 1) if BLOCK_N <= BLOCK_SIZE else near
        block = tl.load(table + at_block // BLOCK_SIZE)
        if BLOCK_D == HEAD_DIM:
            k = tl.load(source)
            v = tl.load(source + run_elements)
        else:
            k = tl.load(source, mask=column[None, :] < DIMS, other=0)
            v = tl.load(source + run_elements, mask=column[None, :] < DIMS, other=0)
        if FLOAT8:
            k_scale, v_scale = scale_of(k_exponent), scale_of(v_exponent)
            # The next ones likewise a turn early: single bytes are not copied ahead.
            at_scale = scales + block.to(tl.int64) * (2 * block_elements) + near % BLOCK_SIZE
            k_exponent = tl.load(at_scale)
            v_exponent = tl.load(at_scale + BLOCK_SIZE)
            score = score_halves((even, odd), k, k_scale, ASM)
        else:
            score = tl.dot(q, tl.trans(k), input_precision="ieee")
        if SOFT_CAP > 0:
            score = capped(score * scale, SOFT_CAP)
        seen = ((key >= begin) & (key < end))[None, :]
        if WIDTH > 1:
            seen &= key[None, :] < last[:, None]
            if WINDOW > 0:
                seen &= key[None, :] >= last[:, None] - WINDOW
        score = tl.where(seen, score, float("-inf"))
        # Every tile has a key of the item, so `above` is finite.
        above = tl.maximum(highest, tl.max(score, 1) * rest)
        p = tl.exp2(score * rest - above[:, None])
        fade = tl.exp2(highest - above)[:, None]
        shares = shares * fade + p
        if FLOAT8:
            acc = add_halves(acc, fade, p, v, v_scale, query.dtype.element_ty, ASM)
        else:
            acc = tl.dot(p.to(v.dtype), v, acc * fade, input_precision="ieee")
        highest = above
    if PDL:
        if overlaps:
            tl.extra.cuda.gdc_launch_dependents()

    total = tl.sum(shares, 1)
    if FLOAT8:
        acc = tl.interleave(acc[0], acc[1])
    if sinks is not None:
        # Of a row of several items, when those are added up.
        if num_splits == 1:
            acc, total, highest = with_sinks(acc, total, highest, sinks, heads, head < HEADS)
    # A row without keys has a total of zero and becomes zero.
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    if num_splits == 1:
        if WIDTH == 1:
            out_at = row.to(tl.int64) * out_row + heads[:, None] * out_head + dim[None, :]
        else:
            out_at = token[:, None] * out_row + heads[:, None] * out_head + dim[None, :]
        tl.store(out + out_at, acc.to(out.dtype.element_ty), mask=is_real)
    else:
        at = (item * KV_HEADS + kv_head) * HEADS + head
        tl.store(partial + at[:, None] * HEAD_DIM + dim[None, :], acc, mask=is_real)
        if WIDTH > 1:
            total = tl.where(total > 0, total, 1.0)
        tl.store(weight + at, highest + tl.log2(total), mask=head < HEADS)
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
def _finite_or_nan(x):
    return tl.where(tl.abs(x) < float("inf"), x, float("nan"))


@triton.jit
def _combine(
    out,
    row_items,
    partial,
    weight,
    sinks,
    out_row,
    out_head,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """One KV head of a row of several items."""
    kv_head = tl.program_id(0)
    row = tl.program_id(1)
    first_item = tl.load(row_items + row * 2)
    num_splits = tl.load(row_items + row * 2 + 1)
    if num_splits > 1:
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
