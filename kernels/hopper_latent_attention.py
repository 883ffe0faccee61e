"""Latent attention of many heads, for GPUs of compute capability 9.0 and 16-bit types.

What kernels/latent_attention.py computes for rows of one token, where 64 heads or more fill the
tensor cores. Triton gives both groups of four warps all the scores of a tile, each for itself; here
each has half of its keys, then half of the sums:

    paged cache ─► ring of tiles ▤ ▤, 64 latents each ─► scores ─► weights, in shared memory
                   (bulk copies, block by block)            └──► sums of latents, in registers

All eight warps do the same; one of their threads starts the copies of the tile after the next as
soon as nobody reads from that place. Barriers are as in hopper_prefill_attention.py, whose remarks
on Gluon hold here too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from baton.kernels.decode_plan import ITEM_FIELDS, DecodeWork
from baton.kernels.hopper_prefill_attention import _processors, problem

KEYS = 64
"""Of a tile."""
_KEYS = gl.constexpr(KEYS)
_HEADS = gl.constexpr(64)
_PLACES = gl.constexpr(2)
RANK, ROPE_DIM = 512, 64
"""Of latents and turned keys that the kernel is for: tiles of others are of other sizes."""
_RANK, _ROPE = gl.constexpr(RANK), gl.constexpr(ROPE_DIM)
_LAYOUT: Any = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
_LOG2E = 1.4426950408889634
_FEWEST_HEADS = 33
"""Up to half as many as a program has, half of its products would be for nothing."""


def covers(num_heads: int, kv: Tensor) -> bool:
    """Whether the kernel is there for these."""
    block_size, width = kv.shape[4:]
    return (
        problem() is None
        and num_heads >= _FEWEST_HEADS
        and width == RANK + ROPE_DIM
        and block_size in (16, 32, 64)
        and kv.dtype in (torch.bfloat16, torch.float16)
        # The copy engine wants rows as int32, and aligned memory.
        and kv.numel() // width < 2**31
        and kv.data_ptr() % 16 == 0
        and _processors(kv.device) > 0
    )


@gluon.jit
def _start_copy(
    latents, turned, ready, tile, of_latents, of_turned, table, layer, begin, end,
    num_layers: gl.constexpr, block_size: gl.constexpr,
):  # fmt: skip
    """Of a tile's latents and turned keys, into its place."""
    place = tile % _PLACES
    mbarrier.expect(ready.index(place), _KEYS * (_RANK + _ROPE) * 2)
    last = (end - 1) // block_size
    first = (begin + tile * _KEYS) // block_size
    for i in gl.static_range(_KEYS // block_size):
        # Behind the item's end its last block comes again: hidden, but memory that exists.
        block = gl.load(table + gl.minimum(first + i, last))
        row = (block * num_layers + layer) * block_size
        part = latents.index(place).slice(i * block_size, block_size)
        tma.async_copy_global_to_shared(of_latents, [row, 0], ready.index(place), part)
        part = turned.index(place).slice(i * block_size, block_size)
        tma.async_copy_global_to_shared(of_turned, [row, _RANK], ready.index(place), part)


@gluon.jit
def _clear_behind(latents, num_left):
    """Weights of zero do not hide what unwritten slots may hold: zeros must be there."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [gl.num_warps(), 1], [1, 0])
    zero = gl.to_tensor(0.0).to(latents.dtype)
    for i in gl.static_range(_KEYS // 16):
        part = latents.slice(i * 16, 16)
        key = i * 16 + gl.arange(0, 16, layout=gl.SliceLayout(1, layout))
        held = part.load(layout)
        part.store(gl.where((key < num_left)[:, None], held, zero))
    fence_async_shared()


@gluon.jit(do_not_specialize=["layer", "table_stride"])
def _hopper_latent_decode(
    out, query, turned_query, of_latents, of_turned, items, block_tables, partial, weight,
    layer, scale, query_row, query_head, turned_row, turned_head, table_stride,
    HEADS: gl.constexpr, num_layers: gl.constexpr, block_size: gl.constexpr,
    FIELDS: gl.constexpr,
):  # fmt: skip
    """64 heads of one item."""
    item = gl.program_id(1)
    entry = items + item * FIELDS
    row = gl.load(entry)
    if row >= 0:
        _attend(
            out, query, turned_query, of_latents, of_turned, entry, block_tables, partial, weight,
            layer, scale, query_row, query_head, turned_row, turned_head, table_stride, item, row,
            HEADS, num_layers, block_size,
        )  # fmt: skip


@gluon.jit
def _attend(
    out, query, turned_query, of_latents, of_turned, entry, block_tables, partial, weight,
    layer, scale, query_row, query_head, turned_row, turned_head, table_stride, item, row,
    HEADS: gl.constexpr, num_layers: gl.constexpr, block_size: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = of_latents.dtype
    shared: gl.constexpr = of_latents.layout
    warps: gl.constexpr = gl.num_warps()
    score_layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, warps // 4], [16, _KEYS * 4 // warps, 16]
    )
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, warps // 4], [16, _RANK * 4 // warps, 16]
    )
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    acc_row_layout: gl.constexpr = gl.SliceLayout(1, acc_layout)
    slot = gl.load(entry + 1)
    begin = gl.load(entry + 2)
    end = gl.load(entry + 3)
    num_splits = gl.load(entry + 5)
    num_tiles = (end - begin + _KEYS - 1) // _KEYS
    table = block_tables + gl.maximum(slot, 0).to(gl.int64) * table_stride

    latents = gl.allocate_shared_memory(dtype, [_PLACES, _KEYS, _RANK], shared)
    turned = gl.allocate_shared_memory(dtype, [_PLACES, _KEYS, _ROPE], shared)
    ready = gl.allocate_shared_memory(gl.int64, [_PLACES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [_PLACES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(_PLACES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    fence_async_shared()
    for tile in range(gl.minimum(num_tiles, _PLACES)):
        _start_copy(
            latents, turned, ready, tile, of_latents, of_turned, table, layer, begin, end,
            num_layers, block_size,
        )  # fmt: skip

    first_head = gl.program_id(0) * _HEADS
    queries = gl.allocate_shared_memory(dtype, [_HEADS, _RANK], shared)
    turns = gl.allocate_shared_memory(dtype, [_HEADS, _ROPE], shared)
    weights = gl.allocate_shared_memory(dtype, [_HEADS, _KEYS], shared)
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [warps, 1], [1, 0])
    head = gl.arange(0, _HEADS, layout=gl.SliceLayout(1, wide))
    dim = gl.arange(0, _RANK, layout=gl.SliceLayout(0, wide))
    source = query + row.to(gl.int64) * query_row + first_head * query_head
    source += head[:, None] * query_head + dim[None, :]
    queries.store(gl.load(source, mask=(first_head + head < HEADS)[:, None], other=0.0))
    narrow: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [warps, 1], [1, 0])
    head = gl.arange(0, _HEADS, layout=gl.SliceLayout(1, narrow))
    dim = gl.arange(0, _ROPE, layout=gl.SliceLayout(0, narrow))
    source = turned_query + row.to(gl.int64) * turned_row + first_head * turned_head
    source += head[:, None] * turned_head + dim[None, :]
    turns.store(gl.load(source, mask=(first_head + head < HEADS)[:, None], other=0.0))
    fence_async_shared()

    key = gl.arange(0, _KEYS, layout=gl.SliceLayout(0, score_layout))
    highest = gl.full([_HEADS], float("-inf"), gl.float32, layout=row_layout)
    # Summed over keys at the end only: between warps that costs a barrier.
    shares = gl.full([_HEADS, _KEYS], 0.0, gl.float32, layout=score_layout)
    acc = gl.full([_HEADS, _RANK], 0.0, gl.float32, layout=acc_layout)
    none = gl.full([_HEADS, _KEYS], 0.0, gl.float32, layout=score_layout)
    for tile in range(num_tiles):
        place = tile % _PLACES
        phase = tile // _PLACES % 2
        mbarrier.wait(ready.index(place), phase)
        scores = warpgroup_mma(
            queries, latents.index(place).permute((1, 0)), none, use_acc=False, is_async=True
        )
        scores = warpgroup_mma(turns, turned.index(place).permute((1, 0)), scores, is_async=True)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        num_left = end - begin - tile * _KEYS
        if num_left < _KEYS:
            scores = gl.where((key < num_left)[None, :], scores, float("-inf"))
            _clear_behind(latents.index(place), num_left)
        # Every tile has a key of the item, so `above` is finite.
        above = gl.maximum(highest, gl.max(scores, 1) * scale)
        p = gl.exp2(scores * scale - above[:, None])
        fade = gl.exp2(highest - above)
        shares = shares * fade[:, None] + p
        highest = above
        weights.store(p.to(dtype))
        fence_async_shared()
        acc = acc * gl.convert_layout(fade, acc_row_layout)[:, None]
        acc = warpgroup_mma(weights, latents.index(place), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(free.index(place), count=1)
        if tile + _PLACES < num_tiles:
            mbarrier.wait(free.index(place), phase)
            _start_copy(
                latents, turned, ready, tile + _PLACES, of_latents, of_turned, table, layer,
                begin, end, num_layers, block_size,
            )  # fmt: skip

    total = gl.sum(shares, 1)
    # A row without keys has a total of zero and becomes zero.
    whole = gl.where(total > 0, total, 1.0)
    acc = acc / gl.convert_layout(whole, acc_row_layout)[:, None]
    head = first_head + gl.arange(0, _HEADS, layout=acc_row_layout)
    dim = gl.arange(0, _RANK, layout=gl.SliceLayout(0, acc_layout))
    if num_splits == 1:
        target = (row.to(gl.int64) * HEADS + head)[:, None] * _RANK + dim[None, :]
        gl.store(out + target, acc.to(out.dtype.element_ty), mask=(head < HEADS)[:, None])
    else:
        target = (item.to(gl.int64) * HEADS + head)[:, None] * _RANK + dim[None, :]
        gl.store(partial + target, acc, mask=(head < HEADS)[:, None])
        by_row = first_head + gl.arange(0, _HEADS, layout=row_layout)
        of_item = weight + item.to(gl.int64) * HEADS + by_row
        gl.store(of_item, highest + gl.log2(total), mask=by_row < HEADS)


def attend_items(
    query: Tensor,
    turned: Tensor,
    kv: Tensor,
    layer: int,
    block_tables: Tensor,
    work: DecodeWork,
    scale: float,
    out: Tensor,
) -> None:
    """What the first kernel of `latent_decode_attention` does, where this one `covers` it."""
    num_heads = query.shape[1]
    _, _, num_layers, _, block_size, width = kv.shape
    shape = [kv.numel() // width, width]
    of_latents, of_turned = (
        TensorDescriptor(kv, shape, [width, 1], [block_size, size], _LAYOUT)
        for size in (RANK, ROPE_DIM)
    )
    _hopper_latent_decode[(-(-num_heads // _HEADS.value), work.items.shape[0])](
        out, query, turned, of_latents, of_turned, work.items, block_tables, work.partial,
        work.weight, layer, scale * _LOG2E, query.stride(0), query.stride(1), turned.stride(0),
        turned.stride(1), block_tables.stride(0), num_heads, num_layers, block_size, ITEM_FIELDS,
        num_warps=8,
    )  # fmt: skip
