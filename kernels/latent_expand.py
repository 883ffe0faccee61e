"""Keys and values of some heads, made of the latents of one row: what long chunks of prompts attend
to, in a form that the kernels of attention take.

A token of the absorbed form costs a query as many products as a latent has numbers, twice; one of
the expanded form as many as a head's key and value have, but its key and value must be made first,
of every key again for every chunk. `expands` weighs the two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.shared_memory import shared_bytes

_MOST_BYTES = 256 * 2**20
"""Of the expanded keys and values of the heads that are computed at once."""
_MOST_HEADS = 16
_MOST_DIM = 256
"""Of a head's key or value: a program has the sums of both in its registers."""
_NARROWEST = 64
"""Columns of a tile of keys or values of 16 bits: with fewer of them an H200 made wrong values, or
reached into memory that is not there (Triton 3.6.0), while the interpreter has all of it right."""
STRETCH_TOKENS = 128
"""Of a row, a multiple of what a program of any kind makes."""
_WHOLE = 8
"""Values whose rows are no runs of 16 bytes were wrong on an H200, of 64 numbers of a latent at
once (Triton 3.6.0), while the interpreter has them right: their tile is put together otherwise."""
_ROOMY = 225_000
"""Shared memory of a program for large tiles, in three stages."""
_PRODUCTS_OF_A_KEY = 4_800_000
"""Products of the expanded form in the time that a program of the absorbed form takes for a key, of
however few queries: 88 ns on an H200 (benchmarks/results/latent_forms_h200.txt). Few heads with few
queries make few programs, and are better off expanded."""
_PRODUCTS_OF_A_TURN = 870_000_000
"""Likewise in the time that launches of either form take, of the expanded one for each time that
heads are expanded: 16 µs."""


def heads_at_once(num_heads: int) -> int:
    """Heads that are expanded together, the same number for every chunk: kernels are compiled for
    it."""
    return max(each for each in range(1, _MOST_HEADS + 1) if num_heads % each == 0)


def _tile_of(rank: int) -> int:
    """Numbers of a latent that are multiplied at once."""
    tile: int = min(64, max(16, triton.next_power_of_2(rank)))
    return tile


def why_never_expanded(rank: int, rope_dim: int, key_dim: int, value_dim: int) -> str | None:
    """What keeps prompts of such sizes from the expanded form, however long they are; None:
    nothing."""
    if rank % _tile_of(rank):
        return f"latents have {rank} numbers, which are no whole tiles of {_tile_of(rank)}"
    for what, size in (("keys", key_dim), ("values", value_dim)):
        if size > _MOST_DIM:
            return f"heads make {what} of {size} numbers of a latent, and {_MOST_DIM} are the most"
    if value_dim % _WHOLE:
        return f"values have {value_dim} numbers, no multiple of {_WHOLE}"
    if value_dim > key_dim + rope_dim:
        return f"values have {value_dim} numbers, more than keys with {key_dim + rope_dim}"
    return None


def expands(
    num_queries: int,
    num_keys: int,
    *,
    num_heads: int,
    rank: int,
    rope_dim: int,
    key_dim: int,
    value_dim: int,
    itemsize: int,
) -> bool:
    """Whether the expanded form is the cheaper one for a chunk of `num_queries` tokens, the last of
    `num_keys`, and there is room for it."""
    head_dim = key_dim + rope_dim
    if why_never_expanded(rank, rope_dim, key_dim, value_dim) is not None:
        return False
    if expanded_bytes(num_keys, num_heads, head_dim, itemsize) > _MOST_BYTES:
        return False
    pairs = num_queries * (num_keys - (num_queries - 1) / 2)
    of_a_latent = rank * (key_dim + value_dim)
    absorbed = num_heads * (pairs * (2 * rank + rope_dim) + num_queries * of_a_latent)
    absorbed = max(absorbed, num_keys * _PRODUCTS_OF_A_KEY) + _PRODUCTS_OF_A_TURN
    # Values lie in room for keys, and are computed with as such.
    expanded = num_heads * (pairs * 2 * head_dim + num_keys * of_a_latent)
    num_turns = num_heads // heads_at_once(num_heads)
    return expanded + num_turns * _PRODUCTS_OF_A_TURN <= absorbed


def expanded_bytes(num_keys: int, num_heads: int, head_dim: int, itemsize: int) -> int:
    """That keys and values of the heads take which are expanded together."""
    return 2 * head_dim * heads_at_once(num_heads) * num_keys * itemsize


def expand_latents(
    kv: Tensor,
    layer: int,
    block_tables: Tensor,
    slot: int,
    num_keys: int,
    key: Tensor,
    value: Tensor,
) -> Tensor:
    """Keys and values of the first `num_keys` positions of a row, in blocks one after another.

    Args:
        kv: [blocks + 1, 1, num_layers, 1, block_size, rank + rope_dim], contiguous.
        layer: which layer of `kv`.
        block_tables: int32 [slots, ≥ blocks of the row].
        slot: of the row.
        key: [heads, key_dim, rank], contiguous. A product with a latent is a key's first part.
        value: [heads, rank, value_dim], contiguous. See `why_never_expanded`.

    Returns:
        [blocks of the row, heads, 1, 2, block_size, key_dim + rope_dim], zeros behind a value's
        numbers; what is behind the last key is not written.
    """
    num_blocks = triton.cdiv(num_keys, kv.shape[4])
    return _expanded(kv, layer, block_tables, slot, num_keys, key, value, num_blocks, None, 0)


def expand_stretches(
    kv: Tensor,
    layer: int,
    block_tables: Tensor,
    stretches: Tensor,
    num_tokens: int,
    key: Tensor,
    value: Tensor,
) -> Tensor:
    """Likewise of many rows, in stretches of `num_tokens` positions, a multiple of `STRETCH_TOKENS`
    and of a block.

    Args:
        stretches: int32 [N, 3], slot, first position, and the end of the row's keys; without keys
            it is passed over. Stretches of a row come one after another.

    Returns:
        [N · blocks of a stretch, …], stretch after stretch.
    """
    assert num_tokens % STRETCH_TOKENS == num_tokens % kv.shape[4] == 0
    num_blocks = len(stretches) * num_tokens // kv.shape[4]
    num_keys = len(stretches) * num_tokens
    rows = (block_tables, 0, num_keys, key, value, num_blocks, stretches, num_tokens)
    return _expanded(kv, layer, *rows)


def _expanded(
    kv: Tensor,
    layer: int,
    block_tables: Tensor,
    slot: int,
    num_keys: int,
    key: Tensor,
    value: Tensor,
    num_blocks: int,
    stretches: Tensor | None,
    stretch_tokens: int,
) -> Tensor:
    """`num_keys`: of the row, or of all stretches."""
    _, _, num_layers, _, block_size, width = kv.shape
    num_heads, key_dim, rank = key.shape
    assert rank % _tile_of(rank) == 0
    value_dim, rope_dim = value.shape[2], width - rank
    head_dim = key_dim + rope_dim
    out = torch.empty(
        (num_blocks, num_heads, 1, 2, block_size, head_dim), dtype=kv.dtype, device=kv.device
    )
    is_wide = kv.element_size() == 4
    least = 16 if is_wide else _NARROWEST
    block_k, block_v = (max(least, triton.next_power_of_2(dim)) for dim in (key_dim, value_dim))
    is_narrow = block_k + block_v <= 256 and shared_bytes(kv.device) >= _ROOMY
    block_n = 16 if is_wide else 128 if is_narrow else 64
    _expand[(triton.cdiv(num_keys, block_n), num_heads)](
        out,
        kv,
        block_tables,
        stretches,
        key,
        value,
        layer,
        slot,
        num_keys,
        block_tables.stride(0),
        HEADS=num_heads,
        LAYERS=num_layers,
        BLOCK_SIZE=block_size,
        RANK=rank,
        ROPE=rope_dim,
        KEY=key_dim,
        VALUE=value_dim,
        STRETCH=stretch_tokens,
        BLOCK_N=block_n,
        BLOCK_R=_tile_of(rank),
        BLOCK_T=triton.next_power_of_2(rope_dim),
        BLOCK_K=block_k,
        BLOCK_V=block_v,
        BLOCK_Z=triton.next_power_of_2(max(1, head_dim - value_dim)),
        num_warps=8,
        num_stages=1 if is_wide else 3 if shared_bytes(kv.device) >= _ROOMY else 2,
    )
    return out


@triton.jit(do_not_specialize=["layer", "slot", "num_keys", "table_stride"])
def _expand(
    out,
    kv,
    block_tables,
    stretches,
    key,
    value,
    layer,
    slot,
    num_keys,
    table_stride,
    HEADS: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    STRETCH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_Z: tl.constexpr,
):
    """BLOCK_N keys and values of one head. STRETCH: tokens of a stretch; 0: there is one row."""
    WIDTH: tl.constexpr = RANK + ROPE
    HEAD: tl.constexpr = KEY + ROPE
    head = tl.program_id(1)
    place = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    position = place
    if STRETCH > 0:
        entry = stretches + tl.program_id(0) * BLOCK_N // STRETCH * 3
        slot = tl.load(entry)
        first = tl.load(entry + 1) + tl.program_id(0) * BLOCK_N % STRETCH
        num_keys = tl.load(entry + 2)
        if first >= num_keys:
            return
        position = first + tl.arange(0, BLOCK_N)
    exists = (position < num_keys)[:, None]
    # Behind the last key it is read again, and stored nowhere.
    near = tl.minimum(position, num_keys - 1)
    block = tl.load(block_tables + slot.to(tl.int64) * table_stride + near // BLOCK_SIZE)
    run = (block.to(tl.int64) * LAYERS + layer) * BLOCK_SIZE + near % BLOCK_SIZE
    source = kv + (run * WIDTH)[:, None]
    dim = tl.arange(0, BLOCK_R)
    k_dim = tl.arange(0, BLOCK_K)
    v_dim = tl.arange(0, BLOCK_V)
    of_key = key + head.to(tl.int64) * (KEY * RANK) + k_dim[None, :] * RANK + dim[:, None]
    of_value = value + head.to(tl.int64) * (RANK * VALUE) + dim[:, None] * VALUE + v_dim[None, :]
    keys = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    values = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for start in tl.range(0, RANK, BLOCK_R):
        is_left = start + dim < RANK
        latents = tl.load(source + start + dim[None, :], mask=is_left[None, :], other=0.0)
        w = tl.load(of_key + start, mask=is_left[:, None] & (k_dim < KEY)[None, :], other=0.0)
        keys = tl.dot(latents, w, keys, input_precision="ieee")
        w = tl.load(
            of_value + start * VALUE, mask=is_left[:, None] & (v_dim < VALUE)[None, :], other=0.0
        )
        values = tl.dot(latents, w, values, input_precision="ieee")
    turn = tl.arange(0, BLOCK_T)
    turned = tl.load(source + RANK + turn[None, :], mask=(turn < ROPE)[None, :], other=0.0)

    at = ((place // BLOCK_SIZE).to(tl.int64) * HEADS + head) * 2 * BLOCK_SIZE
    target = out + ((at + place % BLOCK_SIZE) * HEAD)[:, None]
    dtype = out.dtype.element_ty
    tl.store(target + k_dim[None, :], keys.to(dtype), mask=exists & (k_dim < KEY)[None, :])
    tl.store(target + KEY + turn[None, :], turned, mask=exists & (turn < ROPE)[None, :])
    target += BLOCK_SIZE * HEAD
    tl.store(target + v_dim[None, :], values.to(dtype), mask=exists & (v_dim < VALUE)[None, :])
    if VALUE < HEAD:
        behind = VALUE + tl.arange(0, BLOCK_Z)
        zeros = tl.zeros([BLOCK_N, BLOCK_Z], dtype)
        tl.store(target + behind[None, :], zeros, mask=exists & (behind < HEAD)[None, :])
