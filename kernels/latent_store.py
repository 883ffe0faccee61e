"""Rotary embedding for latent attention, with the norm of latents and their store into the pool."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_HEADS = 8
"""Heads of a token whose queries a program turns."""


def rope_and_store_latent(
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
    *,
    pdl: bool = False,
) -> None:
    """Turns the end of each query in its place; stores latents, normalised, and turned keys.

    Args:
        query: [T, num_heads, key_dim + rope_dim]; rows may be strided.
        latent: [T, rank + rope_dim]; rows may be strided.
        norm: [rank], of any float dtype: the weight of an RMSNorm with `eps`.
        cos, sin: float32 [max position, rope_dim / 2]: of the pair (i, i + rope_dim / 2).
        positions: int32 [T].
        slots: int64 [T], block id · block_size + offset; below zero: nothing is stored.
        kv: [blocks + 1, 1, num_layers, 1, block_size, rank + rope_dim], contiguous.
        layer: which layer of `kv`.
        pdl: launched so that it may start before the kernel in front of it has ended.
    """
    num_tokens, num_heads, unit = query.shape
    rank, width = norm.shape[0], latent.shape[1]
    if num_tokens == 0:
        return
    half = (width - rank) // 2
    groups = 1 + triton.cdiv(num_heads, _HEADS)
    _rope_and_store_latent[(num_tokens * groups,)](
        query,
        latent,
        norm,
        cos,
        sin,
        positions,
        slots,
        kv,
        layer,
        eps,
        query.stride(0),
        latent.stride(0),
        HEADS=num_heads,
        UNIT=unit,
        RANK=rank,
        HALF=half,
        LAYERS=kv.shape[2],
        BLOCK_SIZE=kv.shape[4],
        AT_ONCE=_HEADS,
        BLOCK_R=triton.next_power_of_2(rank),
        BLOCK_P=triton.next_power_of_2(half),
        PDL=pdl,
        num_warps=2,
        launch_pdl=pdl,
    )


@triton.jit(do_not_specialize=["layer"])
def _rope_and_store_latent(
    query,
    latent,
    norm,
    cos,
    sin,
    positions,
    slots,
    kv,
    layer,
    eps,
    query_stride,
    latent_stride,
    HEADS: tl.constexpr,
    UNIT: tl.constexpr,
    RANK: tl.constexpr,
    HALF: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PDL: tl.constexpr,
):
    """Of each token one program stores, and others turn AT_ONCE queries each."""
    groups: tl.constexpr = 1 + (HEADS + AT_ONCE - 1) // AT_ONCE
    token = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    if group == 0:
        store_latent(
            latent, norm, cos, sin, positions, slots, kv, layer, eps, token, latent_stride,
            RANK, HALF, LAYERS, BLOCK_SIZE, BLOCK_R, BLOCK_P, PDL,
        )  # fmt: skip
    else:
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        pair = tl.arange(0, BLOCK_P)
        angle = tl.load(positions + token).to(tl.int64) * HALF + pair
        c = tl.load(cos + angle, mask=pair < HALF, other=0.0)
        s = tl.load(sin + angle, mask=pair < HALF, other=0.0)
        head = (group - 1) * AT_ONCE + tl.arange(0, AT_ONCE)
        exists = (head < HEADS)[:, None] & (pair < HALF)[None, :]
        place = query + token * query_stride + head[:, None] * UNIT
        place += (UNIT - 2 * HALF) + pair[None, :]
        u = tl.load(place, mask=exists, other=0.0).to(tl.float32)
        v = tl.load(place + HALF, mask=exists, other=0.0).to(tl.float32)
        as_query = query.dtype.element_ty
        tl.store(place, (u * c[None, :] - v * s[None, :]).to(as_query), mask=exists)
        tl.store(place + HALF, (v * c[None, :] + u * s[None, :]).to(as_query), mask=exists)


@triton.jit
def store_latent(
    latent,
    norm,
    cos,
    sin,
    positions,
    slots,
    kv,
    layer,
    eps,
    token,
    latent_stride,
    RANK: tl.constexpr,
    HALF: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PDL: tl.constexpr,
):
    """Of one token; `latent` is the first one's. Waits for the kernel before."""
    WIDTH: tl.constexpr = RANK + 2 * HALF
    dim = tl.arange(0, BLOCK_R)
    pair = tl.arange(0, BLOCK_P)
    # No kernel before this one writes weights.
    weight = tl.load(norm + dim, mask=dim < RANK, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.load(slots + token)
    if slot >= 0:
        angle = tl.load(positions + token).to(tl.int64) * HALF + pair
        c = tl.load(cos + angle, mask=pair < HALF, other=0.0)
        s = tl.load(sin + angle, mask=pair < HALF, other=0.0)
        source = latent + token * latent_stride
        x = tl.load(source + dim, mask=dim < RANK, other=0.0).to(tl.float32)
        x = x * tl.rsqrt(tl.sum(x * x, 0) / RANK + eps) * weight
        first = tl.load(source + RANK + pair, mask=pair < HALF, other=0.0).to(tl.float32)
        behind = source + RANK + HALF + pair
        second = tl.load(behind, mask=pair < HALF, other=0.0).to(tl.float32)
        run = (slot // BLOCK_SIZE * LAYERS + layer) * BLOCK_SIZE + slot % BLOCK_SIZE
        target = kv + run * WIDTH
        as_kept = kv.dtype.element_ty
        tl.store(target + dim, x.to(as_kept), mask=dim < RANK)
        end = target + RANK + pair
        tl.store(end, (first * c - second * s).to(as_kept), mask=pair < HALF)
        tl.store(end + HALF, (second * c + first * s).to(as_kept), mask=pair < HALF)
