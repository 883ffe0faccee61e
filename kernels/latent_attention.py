"""Attention over latents in the paged cache, in the absorbed form.

A latent is key and value at once, of all heads: a tile of latents is read once, compared with the
absorbed queries of all heads of a program, and added up by their weights. Of up to 64 heads there
is one program for a stretch of keys; of more, the programs beside each other read the same latents
at the same time, so that they come from memory once.

On compute capability 9.0, many heads of deepseek's sizes go to kernels/hopper_latent_attention.py.

`latent_decode_attention` takes rows of one token, cut into work items (kernels/decode_plan.py); a
second kernel adds up the items of a row. `latent_chunk_attention` takes tiles of prompt chunks: few
new tokens behind a long prefix. Longer ones are better expanded (kernels/latent_expand.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.decode_plan import ITEM_FIELDS, DecodeConfig, DecodeWork
from baton.kernels.latent_heads import ADDED_ROWS, add_splits, add_up_values, of_latents
from baton.kernels.shared_memory import shared_bytes

_hopper: ModuleType | None = None
try:
    from baton.kernels import hopper_latent_attention as _hopper
except (ImportError, AttributeError):
    # A release of Triton may be without the names that it uses.
    _hopper = None

_LOG2E = 1.4426950408889634
MOST_RANK, MOST_ROPE_DIM = 512, 128
"""Numbers of a latent, and of what turns beside it, that the kernels take: the sums of a program's
heads are in its registers."""
_ROOMY, _MIDDLING = 192 * 1024, 150 * 1024
"""Shared memory of a program from which on it holds two tiles beside 64 queries, or one; consumers'
cards have less."""
_HOPPER_KEYS = 64
"""Of a tile; work that is cut so goes to the other kernel, where it is there."""
_ADDING = 1024
"""Programs that add up, before one has several heads."""
_MOST_SPLITS, _LEAST_TILES = 64, 2
"""Splits of a row, and tiles of a split: what more splits save in reading, adding them up costs."""


def why_no_latents(rank: int, rope_dim: int) -> str | None:
    """What the kernels do not take; None: they take it."""
    for what, size, most in (
        ("latents", rank, MOST_RANK),
        ("turned keys", rope_dim, MOST_ROPE_DIM),
    ):
        if size > most:
            return f"{what} have {size} numbers, and the kernels take {most} at most"
    return None


def latent_decode_config(num_rows: int, num_heads: int, kv: Tensor) -> DecodeConfig:
    """How the keys of a padded batch of `num_rows` are cut; for `make_work` with one KV head."""
    block_h = _block_h(num_heads, kv)
    # Of few heads two programs fit a multiprocessor.
    at_once = max(1, (264 if block_h <= 16 else 132) // triton.cdiv(num_heads, block_h))
    # Rows of one length then have as many items each, and all of them run at once.
    programs = max(1, min(_MOST_SPLITS, at_once // num_rows)) * num_rows
    if kv.element_size() == 4:
        return DecodeConfig(16, num_warps=8, num_stages=1, programs=programs, fused=False)
    if _is_for_hopper(num_heads, kv):
        return DecodeConfig(_HOPPER_KEYS, 8, 2, programs, fused=False)
    num_stages = 3 if shared_bytes(kv.device) >= _ROOMY else 2
    num_warps = 4 if block_h <= 16 else 8
    return DecodeConfig(32, num_warps, num_stages, programs, fused=False, least_tiles=_LEAST_TILES)


def _is_for_hopper(num_heads: int, kv: Tensor) -> bool:
    return _hopper is not None and _hopper.covers(num_heads, kv)


def _block_h(num_heads: int, kv: Tensor) -> int:
    """Heads of a program, padded. Float32 products hold whole operands in registers; where there is
    little shared memory, it holds fewer queries."""
    most = 16 if kv.element_size() == 4 else 64 if shared_bytes(kv.device) >= _MIDDLING else 16
    return int(max(16, min(most, triton.next_power_of_2(num_heads))))


def latent_decode_attention(
    query: Tensor,
    turned: Tensor,
    kv: Tensor,
    layer: int,
    rows: Tensor,
    block_tables: Tensor,
    work: DecodeWork,
    scale: float,
    *,
    value: Tensor | None = None,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """One token a row, over the row's latents → [B, num_heads, rank], or with `value` of each head
    [B, num_heads, value_dim].

    `plan_decode` has been called with the same rows. A row of −1 becomes zero.

    Args:
        query: [B, num_heads, rank], absorbed; the last dimension contiguous.
        turned: [B, num_heads, rope_dim], likewise.
        kv: [blocks + 1, 1, num_layers, 1, block_size, rank + rope_dim], contiguous, the dtype of
            `query`. Slots behind a row's context may hold anything, NaN included.
        layer: which layer of `kv`.
        rows: as for `plan_decode`.
        block_tables: int32 [slots, ≥ blocks of the context]; what follows them is not read.
        work: of `make_work` with one KV head of `rank` numbers, and `latent_decode_config`.
        scale: of the products of query and key.
        value: [num_heads, rank, value_dim], contiguous, as `covers` of latent_heads.py takes it;
            for at most its `MOST_ROWS` rows.
        out: where sums of latents go, every element; contiguous.
        pdl: start while the kernel before still runs. It may write queries and `kv`, but neither
            the plan nor the block tables.

    Raises:
        ValueError: shapes that `work` was not made for, or that the kernel does not take.
    """
    num_rows, num_heads, rank = query.shape
    if out is None:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if num_rows != work.num_rows or num_heads != work.num_heads or rows.shape != (num_rows,):
        raise ValueError(f"{num_rows} × {num_heads} heads are not what the work was made for")
    if (problem := why_no_latents(rank, kv.shape[5] - rank)) is not None:
        raise ValueError(problem)
    is_hopper = work.config.block_n == _HOPPER_KEYS and _is_for_hopper(num_heads, kv)
    if is_hopper and _hopper is not None:
        _hopper.attend_items(query, turned, kv, layer, block_tables, work, scale, out)
    else:
        _attend_items(query, turned, kv, layer, block_tables, work, scale, out, pdl=pdl)
    if value is not None and num_rows <= ADDED_ROWS:
        return add_up_values(out, value, work, pdl=pdl)
    # Of many rows most are one item: programs that have nothing to add up take time, too.
    at_once = triton.next_power_of_2(triton.cdiv(num_rows * num_heads, _ADDING))
    at_once = int(min(8, at_once))
    _add_up[(triton.cdiv(num_heads, at_once), num_rows)](
        out,
        work.row_items,
        work.partial,
        work.weight,
        HEADS=num_heads,
        RANK=rank,
        AT_ONCE=at_once,
        BLOCK_S=8,
        BLOCK_R=max(16, triton.next_power_of_2(rank)),
        PDL=pdl,
        num_warps=4,
        launch_pdl=pdl,
    )
    return out if value is None else of_latents(out, value, pdl=pdl)


def _attend_items(
    query: Tensor,
    turned: Tensor,
    kv: Tensor,
    layer: int,
    block_tables: Tensor,
    work: DecodeWork,
    scale: float,
    out: Tensor,
    *,
    pdl: bool,
) -> None:
    """Items that are whole rows go to `out`, others to `work`."""
    _, num_heads, rank = query.shape
    _, _, num_layers, _, block_size, width = kv.shape
    config, num_items = work.config, work.items.shape[0]
    block_h = _block_h(num_heads, kv)
    _decode[(triton.cdiv(num_heads, block_h), num_items)](
        out,
        query,
        turned,
        kv,
        work.items,
        block_tables,
        work.partial,
        work.weight,
        layer,
        scale * _LOG2E,
        query.stride(0),
        query.stride(1),
        turned.stride(0),
        turned.stride(1),
        block_tables.stride(0),
        HEADS=num_heads,
        LAYERS=num_layers,
        BLOCK_SIZE=block_size,
        RANK=rank,
        ROPE=width - rank,
        BLOCK_H=block_h,
        BLOCK_R=max(16, triton.next_power_of_2(rank)),
        BLOCK_T=max(16, triton.next_power_of_2(width - rank)),
        BLOCK_N=config.block_n,
        FIELDS=ITEM_FIELDS,
        PDL=pdl,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        launch_pdl=pdl,
    )


@dataclass(frozen=True, slots=True)
class ChunkConfig:
    """How `latent_chunk_attention` runs."""

    rows: int = 64
    """Of a product: tokens times heads."""
    block_n: int = 32
    num_warps: int = 8
    num_stages: int = 3


def _chunk_config(kv: Tensor) -> ChunkConfig:
    if kv.element_size() == 4:
        return ChunkConfig(16, 16, 8, 1)
    shared = shared_bytes(kv.device)
    if shared < _MIDDLING:
        return ChunkConfig(16, 32, 4, 2)
    return ChunkConfig(num_stages=3 if shared >= _ROOMY else 2)


def latent_chunk_attention(
    query: Tensor,
    turned: Tensor,
    kv: Tensor,
    layer: int,
    tiles: Tensor,
    block_tables: Tensor,
    scale: float,
    *,
    block_m: int,
    out: Tensor,
    config: ChunkConfig | None = None,
) -> Tensor:
    """Causal attention of chunk tokens over their row's latents, which hold their own already.

    Args:
        query, turned, kv, layer, block_tables, scale: as for `latent_decode_attention`, of T
            tokens.
        tiles: int32 [NT, 4], from `prefill_tiles` with the same `block_m`; a tile without tokens,
            or of a slot below zero, is skipped.
        out: [T, num_heads, rank], contiguous; only tokens in tiles are written.
        config: for measurements.

    Raises:
        ValueError: sizes that the kernel does not take.
    """
    _, num_heads, rank = query.shape
    _, _, num_layers, _, block_size, width = kv.shape
    if (problem := why_no_latents(rank, width - rank)) is not None:
        raise ValueError(problem)
    if config is None:
        config = _chunk_config(kv)
    block_h = min(_block_h(num_heads, kv), config.rows)
    tokens = min(config.rows // block_h, block_m)
    _chunk[(triton.cdiv(num_heads, block_h), tiles.shape[0] * triton.cdiv(block_m, tokens))](
        out,
        query,
        turned,
        kv,
        tiles,
        block_tables,
        layer,
        scale * _LOG2E,
        query.stride(0),
        query.stride(1),
        turned.stride(0),
        turned.stride(1),
        block_tables.stride(0),
        triton.cdiv(block_m, tokens),
        HEADS=num_heads,
        LAYERS=num_layers,
        BLOCK_SIZE=block_size,
        RANK=rank,
        ROPE=width - rank,
        BLOCK_H=block_h,
        TOKENS=tokens,
        BLOCK_R=max(16, triton.next_power_of_2(rank)),
        BLOCK_T=max(16, triton.next_power_of_2(width - rank)),
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


@triton.jit
def _walk(
    queries,
    turned,
    kv,
    table,
    layer,
    block,
    begin,
    end,
    visible,
    scale,
    M: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attends to the keys from `begin` to `end`, of which each row sees those before `visible`.

    `block`: of the first tile, by key, or one where a tile is within a block. Returns the sums
    [M, BLOCK_R], the weights' totals [M] and the highest scores [M], of exponents of two.
    """
    WIDTH: tl.constexpr = RANK + ROPE
    dim = tl.arange(0, BLOCK_R)
    turn = tl.arange(0, BLOCK_T)
    own = kv + layer.to(tl.int64) * (BLOCK_SIZE * WIDTH)
    highest = tl.full([M], float("-inf"), tl.float32)
    # Summed over keys at the end only: between warps that costs a barrier.
    shares = tl.zeros([M, BLOCK_N], tl.float32)
    acc = tl.zeros([M, BLOCK_R], tl.float32)
    first = begin // BLOCK_N * BLOCK_N
    near = tl.minimum(tl.maximum(first + tl.arange(0, BLOCK_N), begin), end - 1)
    for start in tl.range(first, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        offset = (near % BLOCK_SIZE * WIDTH)[:, None]
        ahead = block.to(tl.int64) * (LAYERS * BLOCK_SIZE * WIDTH)
        if BLOCK_N <= BLOCK_SIZE:
            source = own + ahead + offset
        else:
            source = own + ahead[:, None] + offset
        # The next tile's blocks, a turn early: no load of latents waits for the table.
        near = tl.minimum(key + BLOCK_N, end - 1)
        at_block = tl.minimum(start + BLOCK_N, end - 1) if BLOCK_N <= BLOCK_SIZE else near
        block = tl.load(table + at_block // BLOCK_SIZE)
        if BLOCK_R == RANK:
            latents = tl.load(source + dim[None, :])
        else:
            latents = tl.load(source + dim[None, :], mask=dim[None, :] < RANK, other=0.0)
        if BLOCK_T == ROPE:
            keys = tl.load(source + RANK + turn[None, :])
        else:
            keys = tl.load(source + RANK + turn[None, :], mask=turn[None, :] < ROPE, other=0.0)
        score = tl.dot(queries, tl.trans(latents), input_precision="ieee")
        score = tl.dot(turned, tl.trans(keys), score, input_precision="ieee")
        score = tl.where(
            (key >= begin)[None, :] & (key[None, :] < visible[:, None]), score, float("-inf")
        )
        # A row's first tile has a key that it sees, so `above` is finite.
        above = tl.maximum(highest, tl.max(score, 1) * scale)
        p = tl.exp2(score * scale - above[:, None])
        fade = tl.exp2(highest - above)[:, None]
        shares = shares * fade + p
        acc = tl.dot(p.to(latents.dtype), latents, acc * fade, input_precision="ieee")
        highest = above
    return acc, tl.sum(shares, 1), highest


@triton.jit(do_not_specialize=["layer", "table_stride"])
def _decode(
    out,
    query,
    turned,
    kv,
    items,
    block_tables,
    partial,
    weight,
    layer,
    scale,
    query_row,
    query_head,
    turned_row,
    turned_head,
    table_stride,
    HEADS: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FIELDS: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_H heads of one item."""
    item = tl.program_id(1)
    entry = items + item * FIELDS
    row = tl.load(entry)
    slot = tl.load(entry + 1)
    begin = tl.load(entry + 2)
    end = tl.load(entry + 3)
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

    head = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    dim = tl.arange(0, BLOCK_R)
    turn = tl.arange(0, BLOCK_T)
    is_real = (head < HEADS)[:, None] & (dim < RANK)[None, :]
    source = query + row.to(tl.int64) * query_row + head[:, None] * query_head + dim[None, :]
    queries = tl.load(source, mask=is_real, other=0.0)
    source = turned + row.to(tl.int64) * turned_row + head[:, None] * turned_head + turn[None, :]
    turns = tl.load(source, mask=(head < HEADS)[:, None] & (turn < ROPE)[None, :], other=0.0)
    visible = tl.full([BLOCK_H], 0, tl.int32) + end
    acc, total, highest = _walk(
        queries, turns, kv, table, layer, block, begin, end, visible, scale,
        BLOCK_H, LAYERS, BLOCK_SIZE, RANK, ROPE, BLOCK_R, BLOCK_T, BLOCK_N,
    )  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()

    # A row without keys has a total of zero and becomes zero.
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    if num_splits == 1:
        target = out + (row.to(tl.int64) * HEADS + head)[:, None] * RANK + dim[None, :]
        tl.store(target, acc.to(out.dtype.element_ty), mask=is_real)
    else:
        at = item.to(tl.int64) * HEADS + head
        tl.store(partial + at[:, None] * RANK + dim[None, :], acc, mask=is_real)
        tl.store(weight + at, highest + tl.log2(total), mask=head < HEADS)


@triton.jit
def _add_up(
    out,
    row_items,
    partial,
    weight,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """AT_ONCE heads of one row of several items, BLOCK_S items at a time."""
    row = tl.program_id(1)
    first_item = tl.load(row_items + row * 2).to(tl.int64)
    num_splits = tl.load(row_items + row * 2 + 1)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if num_splits == 1:
        return
    dim = tl.arange(0, BLOCK_R)
    is_real = dim < RANK
    first = tl.program_id(0) * AT_ONCE
    for head in tl.range(first, tl.minimum(first + AT_ONCE, HEADS)):
        sums = add_splits(
            partial, weight, first_item * HEADS + head, num_splits, dim, is_real,
            HEADS, RANK, BLOCK_S, BLOCK_R,
        )  # fmt: skip
        target = out + (row.to(tl.int64) * HEADS + head) * RANK + dim
        tl.store(target, sums.to(out.dtype.element_ty), mask=is_real)


@triton.jit(do_not_specialize=["layer", "table_stride", "parts"])
def _chunk(
    out,
    query,
    turned,
    kv,
    tiles,
    block_tables,
    layer,
    scale,
    query_row,
    query_head,
    turned_row,
    turned_head,
    table_stride,
    parts,
    HEADS: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (x, y): heads x · BLOCK_H and on, part y % parts of tile y // parts, which has TOKENS
    tokens. Row m of the products is token m // BLOCK_H."""
    M: tl.constexpr = TOKENS * BLOCK_H
    tile = tiles + tl.program_id(1) // parts * 4
    before = tl.program_id(1) % parts * TOKENS
    first_token = tl.load(tile).to(tl.int64) + before
    num_tokens = tl.load(tile + 1) - before
    slot = tl.load(tile + 2)
    position = tl.load(tile + 3) + before
    if (slot < 0) | (num_tokens <= 0):
        return
    num_tokens = tl.minimum(num_tokens, TOKENS)
    row = tl.arange(0, M)
    token = row // BLOCK_H
    head = tl.program_id(0) * BLOCK_H + row % BLOCK_H
    dim = tl.arange(0, BLOCK_R)
    turn = tl.arange(0, BLOCK_T)
    exists = (token < num_tokens) & (head < HEADS)
    is_real = exists[:, None] & (dim < RANK)[None, :]
    at = (first_token + token)[:, None]
    source = query + at * query_row + head[:, None] * query_head + dim[None, :]
    queries = tl.load(source, mask=is_real, other=0.0)
    source = turned + at * turned_row + head[:, None] * turned_head + turn[None, :]
    turns = tl.load(source, mask=exists[:, None] & (turn < ROPE)[None, :], other=0.0)
    end = position + num_tokens
    visible = position + token + 1
    table = block_tables + slot.to(tl.int64) * table_stride
    near = tl.minimum(tl.arange(0, BLOCK_N), end - 1)
    at_block = 0 if BLOCK_N <= BLOCK_SIZE else near
    block = tl.load(table + at_block // BLOCK_SIZE)
    acc, total, _ = _walk(
        queries, turns, kv, table, layer, block, 0, end, visible, scale,
        M, LAYERS, BLOCK_SIZE, RANK, ROPE, BLOCK_R, BLOCK_T, BLOCK_N,
    )  # fmt: skip
    target = out + (at * HEADS + head[:, None]) * RANK + dim[None, :]
    tl.store(target, (acc / total[:, None]).to(out.dtype.element_ty), mask=is_real)
