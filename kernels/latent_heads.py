"""What is around attention over latents in a decode step, in two launches: queries become what
latents are compared with, and what was attended to becomes each head's result.

    query, latent ─► store_and_absorb ─► absorbed queries; latents and turned keys in the cache
                                              │ latent_decode_attention (latent_attention.py)
    results ◄─ add_up_values (few rows) or of_latents ◄─ sums of latents, whole or of stretches

A step of many rows, and a chunk of a prompt, take rope_and_store_latent (latent_store.py) and
products of the library. A program has its whole weight in registers, on its way while the kernel
before still runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.decode_plan import DecodeWork
from baton.kernels.latent_store import store_latent
from baton.kernels.overlap import overlap

MOST_ROWS, _MOST_HEADS = 64, 1024
"""Beyond these, rows and heads of all rows, the library's products are the faster ones."""
ADDED_ROWS = 4
"""Up to so many rows, the sums of a row's stretches and the product with its values are one."""
_SPLITS = 32
"""Stretches of a row that a program adds up at a time."""
_VALUES = 32
"""Of a head's values, those that a program makes."""
_ABSORBED = 64
"""Of a head's absorbed query, likewise."""
_MOST_KEY = 256


def takes(num_rows: int, key: Tensor, value: Tensor) -> bool:
    """Whether so many rows of a decode step are best computed here."""
    return num_rows <= MOST_ROWS and num_rows * len(key) <= _MOST_HEADS and covers(key, value)


def covers(key: Tensor, value: Tensor) -> bool:
    """Whether the kernels take such heads ([heads, key_dim, rank] and [heads, rank, value_dim]):
    sizes are whole tiles, as every real model's are. An absorbed query has another shape than one
    that is not, so that its form shows."""
    _, key_dim, rank = key.shape
    is_whole = rank % _ABSORBED == 0 and key_dim % 32 == 0 and value.shape[2] % _VALUES == 0
    # Float32 is multiplied without tensor cores, number by number: whole ranks make long programs.
    is_small = key_dim <= _MOST_KEY and (key.element_size() == 2 or rank <= 128)
    return is_whole and is_small and rank & (rank - 1) == 0 and rank != key_dim


def store_and_absorb(
    query: Tensor,
    latent: Tensor,
    norm: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    kv: Tensor,
    layer: int,
    key: Tensor,
    *,
    pdl: bool = False,
) -> Tensor:
    """As `rope_and_store_latent`, but the queries stay: returned are absorbed ones, [T, num_heads,
    rank + rope_dim], the end turned.

    Args:
        query: [T, num_heads, key_dim + rope_dim], T at most `MOST_ROWS`; rows may be strided.
        key: [num_heads, key_dim, rank], contiguous; see `covers`.
        pdl: launched so that it may start before the kernel in front of it has ended.
    """
    num_tokens, num_heads, unit = query.shape
    _, key_dim, rank = key.shape
    rope_dim = unit - key_dim
    assert num_tokens <= MOST_ROWS and query.stride(1) == unit
    out = torch.empty((num_tokens, num_heads, rank + rope_dim), dtype=query.dtype, device=kv.device)
    if num_tokens == 0:
        return out
    _store_and_absorb[(num_tokens + num_heads * (rank // _ABSORBED),)](
        out,
        query,
        latent,
        norm,
        cos,
        sin,
        positions,
        slots,
        kv,
        key,
        layer,
        eps,
        num_tokens,
        query.stride(0),
        latent.stride(0),
        HEADS=num_heads,
        KEY=key_dim,
        RANK=rank,
        HALF=rope_dim // 2,
        LAYERS=kv.shape[2],
        BLOCK_SIZE=kv.shape[4],
        BLOCK_M=max(16, triton.next_power_of_2(num_tokens)),
        BLOCK_K=triton.next_power_of_2(key_dim),
        BLOCK_R=_ABSORBED,
        BLOCK_P=triton.next_power_of_2(rope_dim // 2),
        num_warps=4,
        **overlap(query, pdl=pdl),
    )
    return out


def add_up_values(
    attended: Tensor, value: Tensor, work: DecodeWork, *, pdl: bool = False
) -> Tensor:
    """Of what `_attend_items` left → [B, num_heads, value_dim], for few rows.

    Args:
        attended: [B, num_heads, rank], contiguous: of rows that are one item.
        value: [num_heads, rank, value_dim], contiguous; see `covers`.
        work: has the sums of the others' items.
    """
    num_rows, num_heads, rank = attended.shape
    value_dim = value.shape[2]
    out = attended.new_empty((num_rows, num_heads, value_dim))
    _add_up_values[(value_dim // _VALUES, num_heads, num_rows)](
        out,
        attended,
        value,
        work.row_items,
        work.partial,
        work.weight,
        HEADS=num_heads,
        RANK=rank,
        VALUE=value_dim,
        BLOCK_S=_SPLITS,
        BLOCK_V=_VALUES,
        num_warps=8,
        **overlap(attended, pdl=pdl),
    )
    return out


def of_latents(attended: Tensor, value: Tensor, *, pdl: bool = False) -> Tensor:
    """attended [T, num_heads, rank], T at most `MOST_ROWS`, contiguous, times value [num_heads,
    rank, value_dim] → [T, num_heads, value_dim]."""
    num_rows, num_heads, rank = attended.shape
    value_dim = value.shape[2]
    assert num_rows <= MOST_ROWS
    out = attended.new_empty((num_rows, num_heads, value_dim))
    if num_rows == 0:
        return out
    _of_latents[(value_dim // _VALUES, num_heads)](
        out,
        attended,
        value,
        num_rows,
        HEADS=num_heads,
        RANK=rank,
        VALUE=value_dim,
        BLOCK_M=max(16, triton.next_power_of_2(num_rows)),
        BLOCK_V=_VALUES,
        num_warps=8,
        **overlap(attended, pdl=pdl),
    )
    return out


@triton.jit(do_not_specialize=["layer", "num_tokens"])
def _store_and_absorb(
    out,
    query,
    latent,
    norm,
    cos,
    sin,
    positions,
    slots,
    kv,
    key,
    layer,
    eps,
    num_tokens,
    query_stride,
    latent_stride,
    HEADS: tl.constexpr,
    KEY: tl.constexpr,
    RANK: tl.constexpr,
    HALF: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PDL: tl.constexpr,
):
    """Of each token one program stores; of each head some make BLOCK_R numbers of all tokens'
    queries each, the first of them what turns too."""
    program = tl.program_id(0)
    if program < num_tokens:
        store_latent(
            latent, norm, cos, sin, positions, slots, kv, layer, eps, program.to(tl.int64),
            latent_stride, RANK, HALF, LAYERS, BLOCK_SIZE, RANK, BLOCK_P, PDL,
        )  # fmt: skip
    else:
        pieces: tl.constexpr = RANK // BLOCK_R
        head = (program - num_tokens) // pieces
        piece = (program - num_tokens) % pieces
        WIDTH: tl.constexpr = RANK + 2 * HALF
        row = tl.arange(0, BLOCK_M)
        k = tl.arange(0, BLOCK_K)
        r = piece * BLOCK_R + tl.arange(0, BLOCK_R)
        # No kernel before this one writes weights.
        w = tl.load(
            key + (head.to(tl.int64) * KEY + k[:, None]) * RANK + r[None, :],
            mask=(k < KEY)[:, None],
            other=0.0,
        )
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        exists = row < num_tokens
        source = query + row[:, None].to(tl.int64) * query_stride + head * (KEY + 2 * HALF)
        is_in = exists[:, None] & (k < KEY)[None, :]
        x = tl.load(source + k[None, :], mask=is_in, other=0.0)
        acc = tl.dot(x, w, input_precision="ieee")
        target = out + (row[:, None].to(tl.int64) * HEADS + head) * WIDTH
        dtype = out.dtype.element_ty
        tl.store(target + r[None, :], acc.to(dtype), mask=exists[:, None])
        if piece == 0:
            pair = tl.arange(0, BLOCK_P)[None, :]
            inside = exists[:, None] & (pair < HALF)
            position = tl.load(positions + row, mask=exists, other=0)
            angle = position.to(tl.int64)[:, None] * HALF + pair
            c = tl.load(cos + angle, mask=inside, other=0.0)
            s = tl.load(sin + angle, mask=inside, other=0.0)
            first = tl.load(source + KEY + pair, mask=inside, other=0.0).to(tl.float32)
            second = tl.load(source + KEY + HALF + pair, mask=inside, other=0.0).to(tl.float32)
            end = target + RANK + pair
            tl.store(end, (first * c - second * s).to(dtype), mask=inside)
            tl.store(end + HALF, (second * c + first * s).to(dtype), mask=inside)


@triton.jit
def _add_up_values(
    out,
    attended,
    value,
    row_items,
    partial,
    weight,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_V values of one head of one row."""
    head, row = tl.program_id(1), tl.program_id(2)
    dim = tl.arange(0, RANK)
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    # No kernel before this one writes weights; the plan was there before attention began.
    w = tl.load(value + (head.to(tl.int64) * RANK + dim[:, None]) * VALUE + v[None, :])
    first_item = tl.load(row_items + row * 2).to(tl.int64)
    num_splits = tl.load(row_items + row * 2 + 1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if num_splits == 1:
        source = attended + (row.to(tl.int64) * HEADS + head) * RANK + dim
        sums = tl.load(source).to(tl.float32)
    else:
        at = first_item * HEADS + head
        sums = add_splits(
            partial, weight, at, num_splits, dim, dim < RANK, HEADS, RANK, BLOCK_S, RANK
        )
    result = tl.sum(w.to(tl.float32) * sums[:, None], 0)
    target = out + (row.to(tl.int64) * HEADS + head) * VALUE + v
    tl.store(target, result.to(out.dtype.element_ty))


@triton.jit
def add_splits(
    partial, weight, first, num_splits, dim, is_real,
    HEADS: tl.constexpr, RANK: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Numbers `dim` of what a head of a row attended to, of `num_splits` items; `first` is the
    place of the first one's head among all items' heads."""
    split = tl.arange(0, BLOCK_S)
    highest = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([BLOCK_S, BLOCK_R], tl.float32)
    for begin in tl.range(0, num_splits, BLOCK_S):
        is_it = begin + split < num_splits
        at = first + (begin + split) * HEADS
        logarithm = tl.load(weight + at, mask=is_it, other=float("-inf"))
        source = partial + at[:, None] * RANK + dim[None, :]
        part = tl.load(source, mask=is_it[:, None] & is_real[None, :], other=0.0)
        # An item has a key at least, so this is finite.
        above = tl.maximum(highest, tl.max(logarithm, 0))
        share = tl.exp2(logarithm - above)
        fade = tl.exp2(highest - above)
        total = total * fade + tl.sum(share, 0)
        acc = acc * fade + part * share[:, None]
        highest = above
    return tl.sum(acc, 0) / total


@triton.jit(do_not_specialize=["num_rows"])
def _of_latents(
    out,
    attended,
    value,
    num_rows,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_V values of one head, of all rows."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, BLOCK_M)[:, None].to(tl.int64)
    dim = tl.arange(0, RANK)
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    # No kernel before this one writes weights.
    w = tl.load(value + (head * RANK + dim[:, None]) * VALUE + v)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    exists = row < num_rows
    x = tl.load(attended + (row * HEADS + head) * RANK + dim[None, :], mask=exists, other=0.0)
    acc = tl.dot(x, w, input_precision="ieee")
    target = out + (row * HEADS + head) * VALUE + v
    tl.store(target, acc.to(out.dtype.element_ty), mask=exists)
