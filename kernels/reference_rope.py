"""Rotary embedding with the store into the pool, in plain torch: what the kernel must compute."""

from __future__ import annotations

import torch
from torch import Tensor


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
) -> Tensor:
    """As kernels.rope_store.rope_and_store; computes in float32, or float64 if `qkv` is that."""
    block_size = kv.shape[4]
    query = rope_query(
        qkv[:, :num_heads],
        cos,
        sin,
        positions,
        query_scale=query_scale,
        q_norm=q_norm,
        eps=eps,
        out=out,
    )
    key, value = _wide(qkv[:, num_heads:]).chunk(2, 1)
    index = positions.long()
    if k_norm is not None:
        key = _normalised(key, eps) * k_norm.to(key.dtype)
    if value_norm:
        value = _normalised(value, eps)
    key = _turn(key, cos[index], sin[index]).to(kv.dtype)
    stored = slots >= 0
    block, offset = slots[stored] // block_size, slots[stored] % block_size
    kv[block, :, layer, 0, offset] = key[stored]
    kv[block, :, layer, 1, offset] = value[stored].to(kv.dtype)
    return query


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
    """As kernels.rope_store.rope_query, likewise."""
    wide, index = _wide(query), positions.long()
    if q_norm is not None:
        wide = _normalised(wide, eps) * q_norm.to(wide.dtype)
    turned = _turn(wide, cos[index], sin[index])
    if query_scale is not None:
        turned *= query_scale[index, None, None].to(turned.dtype)
    turned = turned.to(query.dtype)
    return turned if out is None else out.copy_(turned)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _normalised(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, head_dim]; cos, sin [T, head_dim / 2]."""
    first, second = x.chunk(2, -1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
