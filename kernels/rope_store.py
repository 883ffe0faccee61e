"""Rotary embedding of queries and keys, fused with the norms of heads before it and with the store
of keys and values into the pool."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.float8_jit import (
    as_bytes,
    codes_of,
    codes_offset,
    exponent_of,
    is_float8,
    magnitude_bits,
    scales_offset,
)


@triton.jit(do_not_specialize=["layer"])
def _rope_and_store(
    qkv,
    cos,
    sin,
    query_scale,
    positions,
    slots,
    q_norm,
    k_norm,
    query,
    kv,
    layer,
    eps,
    query_stride,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    num_layers: tl.constexpr,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HAS_V_NORM: tl.constexpr,
    FLOAT8: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program turns HEADS of the num_heads + 2 · num_kv_heads vectors of one token.

    What is absent is None: norms, query_scale; slots and kv where there are queries only.
    """
    all_heads: tl.constexpr = num_heads + 2 * num_kv_heads
    groups: tl.constexpr = (all_heads + HEADS - 1) // HEADS
    half: tl.constexpr = head_dim // 2
    token = (tl.program_id(0) // groups).to(tl.int64)
    head = tl.program_id(0) % groups * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, HALF)
    in_head = pair < half
    is_query = head < num_heads
    is_value = head >= num_heads + num_kv_heads
    rotates = (head < num_heads + num_kv_heads)[:, None]
    # Of kernels before the one in front, which makes the vectors.
    position = tl.load(positions + token)
    if kv is not None:
        slot = tl.load(slots + token)
    angle = position.to(tl.int64) * half + pair
    c = tl.load(cos + angle, mask=in_head, other=0.0)[None, :]
    s = tl.load(sin + angle, mask=in_head, other=0.0)[None, :]
    if query_scale is not None:
        query_factor = tl.load(query_scale + position)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    source = qkv + token * (all_heads * head_dim) + head[:, None] * head_dim + pair[None, :]
    exists = (head < all_heads)[:, None] & in_head[None, :]
    x = tl.load(source, mask=exists, other=0.0).to(tl.float32)
    y = tl.load(source + half, mask=exists, other=0.0).to(tl.float32)

    if (q_norm is not None) or (k_norm is not None) or HAS_V_NORM:
        mean = (tl.sum(x * x, 1) + tl.sum(y * y, 1)) / head_dim
        inverse = tl.rsqrt(mean + eps)[:, None]
        is_query_column = is_query[:, None]
        is_key_column = rotates & (head >= num_heads)[:, None]
        if q_norm is not None:
            weight_x = tl.load(q_norm + pair, mask=in_head, other=0.0).to(tl.float32)
            weight_y = tl.load(q_norm + half + pair, mask=in_head, other=0.0).to(tl.float32)
            x = tl.where(is_query_column, x * inverse * weight_x[None, :], x)
            y = tl.where(is_query_column, y * inverse * weight_y[None, :], y)
        if k_norm is not None:
            weight_x = tl.load(k_norm + pair, mask=in_head, other=0.0).to(tl.float32)
            weight_y = tl.load(k_norm + half + pair, mask=in_head, other=0.0).to(tl.float32)
            x = tl.where(is_key_column, x * inverse * weight_x[None, :], x)
            y = tl.where(is_key_column, y * inverse * weight_y[None, :], y)
        if HAS_V_NORM:
            x = tl.where(is_value[:, None], x * inverse, x)
            y = tl.where(is_value[:, None], y * inverse, y)

    turned_x = tl.where(rotates, x * c - y * s, x)
    turned_y = tl.where(rotates, y * c + x * s, y)
    if query_scale is not None:
        turned_x = tl.where(is_query[:, None], turned_x * query_factor, turned_x)
        turned_y = tl.where(is_query[:, None], turned_y * query_factor, turned_y)

    target = query + token * query_stride + head[:, None] * head_dim + pair[None, :]
    to_query = is_query[:, None] & in_head[None, :]
    tl.store(target, turned_x.to(query.dtype.element_ty), mask=to_query)
    tl.store(target + half, turned_y.to(query.dtype.element_ty), mask=to_query)

    if kv is not None:
        block = slot // block_size
        kv_head = tl.where(is_value, head - num_kv_heads, head) - num_heads
        run = ((block * num_kv_heads + kv_head) * num_layers + layer) * 2 + is_value.to(tl.int64)
        to_pool = exists & (head >= num_heads)[:, None] & (slot >= 0)
        if FLOAT8:
            largest = tl.maximum(magnitude_bits(turned_x), magnitude_bits(turned_y))
            exponent = exponent_of(tl.max(largest, 1))
            place = codes_offset(run, num_layers * 2, block_size, head_dim)
            place += slot % block_size * head_dim
            target = kv + place[:, None] + pair[None, :]
            tl.store(target, codes_of(turned_x, exponent[:, None]), mask=to_pool)
            tl.store(target + half, codes_of(turned_y, exponent[:, None]), mask=to_pool)
            scales = kv + scales_offset(run, num_layers * 2, block_size, head_dim)
            is_stored = (head >= num_heads) & (head < all_heads) & (slot >= 0)
            tl.store(scales + slot % block_size, exponent.to(tl.uint8), mask=is_stored)
        else:
            place = (run * block_size + slot % block_size) * head_dim
            target = kv + place[:, None] + pair[None, :]
            tl.store(target, turned_x.to(kv.dtype.element_ty), mask=to_pool)
            tl.store(target + half, turned_y.to(kv.dtype.element_ty), mask=to_pool)


def _config(num_tokens: int, pairs: int) -> tuple[int, int]:
    """Vectors per program, warps.

    Small programs of many threads spread a decode step over the multiprocessors. At `pairs` = 64
    neither choice needs shared memory to bring the angles to the threads.
    """
    heads, per_warp = (8, 128) if num_tokens <= 64 or pairs > 128 else (16, 256)
    return heads, max(1, min(8, heads * pairs // per_warp))


def rope_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    kv: Tensor,
    layer: int,
    *,
    num_heads: int,
    query_scale: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    value_norm: bool = False,
    eps: float = 0.0,
    out: Tensor | None = None,
    pdl: bool = False,
    config: tuple[int, int] | None = None,
) -> Tensor:
    """Normalises (if asked) and rotates queries and keys; stores keys and values.

    Args:
        qkv: [T, num_heads + 2 · num_kv_heads, head_dim], contiguous.
        cos, sin: float32 [max position, head_dim / 2]: of the pair (i, i + head_dim / 2).
        positions: int32 [T].
        slots: int64 [T], block id · block_size + offset; below zero: nothing is stored.
        kv: [blocks + 1, num_kv_heads, num_layers, 2, block_size, head_dim], contiguous; or of such
            a shape codes, with their scales behind them (reference_float8.py).
        layer: which layer of `kv`.
        num_heads: query heads.
        query_scale: float32 [max position], multiplied onto the rotated queries of a position.
        q_norm, k_norm: [head_dim], of any float dtype: weights of an RMSNorm over each query head
            and each key head.
        value_norm: of values too, without a weight.
        eps: of all of these norms.
        out: where the queries go, [T, num_heads, head_dim] with contiguous rows.
        pdl: launched so that it may start before the kernel in front of it has ended, which may
            make `qkv`, but neither positions nor slots.
        config: vectors per program and warps, for measurements.

    Returns:
        the queries, [T, num_heads, head_dim].
    """
    _, num_kv_heads, num_layers, _, block_size, _ = kv.shape
    return _launch(
        qkv,
        (cos, sin, query_scale),
        positions,
        slots,
        (q_norm, k_norm, value_norm, eps),
        kv,
        layer,
        (num_heads, num_kv_heads, num_layers, block_size),
        out,
        pdl,
        config,
    )


def rope_query(
    query: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    *,
    query_scale: Tensor | None = None,
    q_norm: Tensor | None = None,
    eps: float = 0.0,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """What `rope_and_store` does with queries, where there are no keys and values to store.

    Args:
        query: [T, num_heads, head_dim], contiguous.
        others: as of `rope_and_store`.

    Returns:
        [T, num_heads, head_dim].
    """
    return _launch(
        query,
        (cos, sin, query_scale),
        positions,
        None,
        (q_norm, None, False, eps),
        None,
        0,
        (query.shape[1], 0, 1, 1),
        out,
        pdl,
        None,
    )


def _launch(
    vectors: Tensor,
    rope: tuple[Tensor, Tensor, Tensor | None],
    positions: Tensor,
    slots: Tensor | None,
    norms: tuple[Tensor | None, Tensor | None, bool, float],
    kv: Tensor | None,
    layer: int,
    shape: tuple[int, int, int, int],
    out: Tensor | None,
    pdl: bool,
    config: tuple[int, int] | None,
) -> Tensor:
    """norms: of queries, of keys, whether of values, eps. shape: query heads, KV heads, layers,
    block_size."""
    num_tokens, num_vectors, head_dim = vectors.shape
    q_norm, k_norm, value_norm, eps = norms
    if out is None:
        out = vectors.new_empty(num_tokens, shape[0], head_dim)
    if num_tokens == 0:
        return out
    half = triton.next_power_of_2(head_dim // 2)
    heads, num_warps = config or _config(num_tokens, half)
    groups = triton.cdiv(num_vectors, heads)
    _rope_and_store[(num_tokens * groups,)](
        vectors,
        *rope,
        positions,
        slots,
        q_norm,
        k_norm,
        out,
        None if kv is None else as_bytes(kv),
        layer,
        eps,
        out.stride(0),
        *shape,
        head_dim,
        HEADS=heads,
        HALF=half,
        HAS_V_NORM=value_norm,
        FLOAT8=kv is not None and is_float8(kv),
        PDL=pdl,
        num_warps=num_warps,
        **({"launch_pdl": True} if pdl else {}),
    )
    return out
