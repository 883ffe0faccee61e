"""Attention of 16-bit numbers on a CPU, by torch's fused product of queries, keys and values.

It computes in float32 within, where a CPU without instructions for 16 bits multiplies such matrices
many times slower than others. Its bits depend on what else is in the step: the class is
`consistent`. The plain form, which is exact, is in reference.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.kernels.reference import AttentionPlan, Span, plan_slots, spans

_LEAST_FULL = 0.5
"""Of the longest row's blocks, what rows that are taken along have at least."""


@dataclass(frozen=True, slots=True)
class FusedUnits:
    """U units of `num_queries` consecutive tokens of one row each, with NB blocks each at most."""

    tokens: Tensor
    """int64 [U · num_queries]: which of the step's tokens these are."""
    num_units: int
    num_queries: int
    rows: Tensor
    """int64 [num_layers, 2 (key, value) · U · num_kv_heads · NB]: rows of the cache taken as
    [blocks · num_kv_heads · num_layers · 2, block_size · head_dim]."""
    visible: slice
    """Of the gathered positions, those that any token sees."""
    bias: Tensor | None
    """[U, 1, queries · heads per KV head, or 1, visible], −inf for what a token does not see; None:
    all see all."""
    tail: Tensor | None
    """int64 [2 · U · num_kv_heads]: where each unit's last block is, in `rows`; None: what lies
    behind the last token is not among `visible`."""
    beyond_tail: Tensor | None
    """bool [U, 1, block_size, 1]: slots of that block behind the unit's last token."""
    spans: Tensor
    """int64 [U, 2]: the first of the gathered positions that any of a unit's tokens sees, and the
    one behind the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedPlan(AttentionPlan):
    """`units` is empty."""

    fused: list[FusedUnits]


def plan_fused_attention(
    query_start: npt.NDArray[np.int64],
    context_lens: npt.NDArray[np.int64],
    block_table: npt.NDArray[np.int64],
    slot_mapping: npt.NDArray[np.int64],
    kv: Tensor,
    *,
    num_heads: int,
    window: int | None = None,
) -> FusedPlan:
    """As `reference.plan_attention`, of keys and values."""
    slots, stored = plan_slots(slot_mapping, kv)
    return FusedPlan(
        num_tokens=int(query_start[-1]),
        slots=slots,
        units=[],
        stored=stored,
        fused=[
            _plan_units(part, block_table[part.rows], kv, num_heads, window)
            for span in spans(query_start, context_lens, kv, num_heads, window)
            for part in _alike(span, kv.shape[4], window)
        ],
    )


Attend = Callable[[Tensor, Tensor, int, FusedUnits, float], Tensor]


def fused_attention(
    query: Tensor,
    kv: Tensor,
    layer: int,
    plan: FusedPlan,
    scale: float,
    attend: Attend | None = None,
) -> Tensor:
    """As `reference.paged_attention`, without caps and sinks. `attend`: in place of
    `attend_fused`."""
    attend = attend or attend_fused
    num_heads, head_dim = query.shape[1:]
    if len(plan.fused) == 1 and plan.fused[0].num_units == query.shape[0]:
        # One token of each row, all in one, in the step's order.
        return attend(query, kv, layer, plan.fused[0], scale).view(query.shape)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for units in plan.fused:
        attended = attend(query.index_select(0, units.tokens), kv, layer, units, scale)
        out.index_copy_(0, units.tokens, attended.view(-1, num_heads, head_dim))
    if out.shape[0] > plan.num_tokens:
        out[plan.num_tokens :] = out[0]
    return out


def attend_fused(query: Tensor, kv: Tensor, layer: int, units: FusedUnits, scale: float) -> Tensor:
    """query [U · num_queries, num_heads, head_dim] → that shape, flattened in some way."""
    _, num_kv_heads, _, _, block_size, head_dim = kv.shape
    num_units, num_queries = units.num_units, units.num_queries
    gathered = kv.view(-1, block_size * head_dim).index_select(0, units.rows[layer])
    if units.tail is not None and units.beyond_tail is not None:
        # An unseen key's weight is zero, but zero times NaN is not, nor NaN minus infinity.
        tail = gathered.index_select(0, units.tail).view(2, num_units, num_kv_heads, block_size, -1)
        tail.masked_fill_(units.beyond_tail, 0)
        gathered.index_copy_(0, units.tail, tail.view(-1, block_size * head_dim))
    keys, values = gathered.view(2, num_units, num_kv_heads, -1, head_dim)
    if units.bias is None:
        keys, values = keys[:, :, units.visible], values[:, :, units.visible]
    by_head = query.view(num_units, num_queries, num_kv_heads, -1, head_dim)
    by_head = by_head.transpose(1, 2).flatten(2, 3)
    attended = torch.nn.functional.scaled_dot_product_attention(
        by_head, keys, values, attn_mask=units.bias, scale=scale
    )
    by_token = attended.view(num_units, num_kv_heads, num_queries, -1, head_dim).transpose(1, 2)
    return by_token.contiguous()


def _alike(span: Span, block_size: int, window: int | None) -> Iterator[Span]:
    """Parts of a span whose units have about as many blocks each."""
    first_block, end = _blocks(span, block_size, window)
    num_blocks = end - first_block
    order = np.argsort(-num_blocks, kind="stable")
    while len(order):
        least = num_blocks[order[0]] * _LEAST_FULL
        alike = order[num_blocks[order] >= least]
        order = order[len(alike) :]
        # As the step has them, which spans need not: where they are all of its tokens, attention
        # takes and gives them as they stand.
        alike = alike[np.argsort(span.first_token[alike])]
        yield replace(
            span,
            first_token=span.first_token[alike],
            rows=span.rows[alike],
            visible=span.visible[alike],
        )


def _first_key(span: Span, window: int | None) -> npt.NDArray[np.int64]:
    """[U]: that any of a unit's tokens sees."""
    first_query = span.visible - span.num_queries
    return first_query * 0 if window is None else np.maximum(first_query - window + 1, 0)


def _blocks(
    span: Span, block_size: int, window: int | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """[U] each: the first block, and the one behind the last."""
    return _first_key(span, window) // block_size, -(-span.visible // block_size)


def _plan_units(
    span: Span, block_table: npt.NDArray[np.int64], kv: Tensor, num_heads: int, window: int | None
) -> FusedUnits:
    """Plans a span's units; block_table [U, blocks] holds the ids of its rows."""
    num_blocks_and_zero, num_kv_heads, num_layers, _, block_size, _ = kv.shape
    num_units, num_queries = len(span.visible), span.num_queries
    first_block, end_block = _blocks(span, block_size, window)
    most = int((end_block - first_block).max())
    number = first_block[:, None] + np.arange(most)
    blocks = np.full(number.shape, -1)
    listed = (number < end_block[:, None]) & (number < block_table.shape[1])
    blocks[listed] = np.take_along_axis(
        block_table, np.minimum(number, block_table.shape[1] - 1), 1
    )[listed]
    blocks[blocks < 0] = num_blocks_and_zero - 1

    kinds = np.arange(2)[:, None, None, None]
    heads = np.arange(num_kv_heads)[:, None]
    rows = (blocks[:, None] * num_kv_heads + heads) * (num_layers * 2) + kinds
    layers = 2 * np.arange(num_layers)[:, None]

    position = first_block[:, None] * block_size + np.arange(most * block_size)
    query = (span.visible - num_queries)[:, None] + np.arange(num_queries)
    unseen = position[:, None] > query[:, :, None]
    if window is not None:
        unseen |= position[:, None] <= query[:, :, None] - window
    seen = np.flatnonzero(~unseen.all((0, 1)))
    visible = slice(int(seen[0]), int(seen[-1]) + 1)
    bias = tail = beyond_tail = None
    if unseen[:, :, visible].any():
        visible = slice(0, position.shape[1])
        if num_queries > 1:
            unseen = np.repeat(unseen, num_heads // num_kv_heads, 1)
        bias = kv.new_zeros(unseen.shape).masked_fill_(_to(kv, unseen), float("-inf"))[:, None]
        last = (end_block - first_block - 1)[None, :, None]
        heads_of = np.arange(2 * num_units * num_kv_heads).reshape(2, num_units, num_kv_heads)
        tail = _to(kv, (heads_of * most + last).reshape(-1))
        slots = np.arange(block_size) + ((end_block - 1) * block_size)[:, None]
        beyond_tail = _to(kv, (slots >= span.visible[:, None])[:, None, :, None])
    from_first = np.stack((_first_key(span, window), span.visible), 1)
    return FusedUnits(
        tokens=_to(kv, (span.first_token[:, None] + np.arange(num_queries)).reshape(-1)),
        num_units=num_units,
        num_queries=num_queries,
        rows=_to(kv, rows.reshape(-1) + layers),
        visible=visible,
        bias=bias,
        tail=tail,
        beyond_tail=beyond_tail,
        spans=_to(kv, from_first - first_block[:, None] * block_size),
    )


def _to(like: Tensor, array: npt.NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(like.device)
