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
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """As kernels.rope_store.rope_and_store; computes in float32, or float64 if `qkv` is that."""
    block_size = kv.shape[4]
    wide = qkv.double() if qkv.dtype == torch.float64 else qkv.float()
    query = wide[:, :num_heads]
    key, value = wide[:, num_heads:].chunk(2, 1)
    index = positions.long()
    query = _turn(_normalised(query, q_norm, eps), cos[index], sin[index]).to(qkv.dtype)
    key = _turn(_normalised(key, k_norm, eps), cos[index], sin[index]).to(kv.dtype)
    stored = slots >= 0
    block, offset = slots[stored] // block_size, slots[stored] % block_size
    kv[block, :, layer, 0, offset] = key[stored]
    kv[block, :, layer, 1, offset] = value[stored].to(kv.dtype)
    return query if out is None else out.copy_(query)


def _normalised(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, head_dim]; cos, sin [T, head_dim / 2]."""
    first, second = x.chunk(2, -1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
