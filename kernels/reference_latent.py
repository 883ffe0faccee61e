"""Latent attention in plain torch: the CPU path, and the oracle of kernels/latent_*.py.

Of a token the cache has one vector for all heads: a latent, of which each head's key and value are
made by a matrix of its own, and the part of the key that its position turns. Attention is computed
in the absorbed form: a head's query goes through the matrix of its keys once, and is compared with
the latents themselves; what it attends to is a sum of latents, of which the matrix of its values
makes the result. Always so, for the two forms round differently, and a token's bits must not depend
on the chunk that it came in (see reference.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from baton.kernels import reference
from baton.kernels.reference import AttentionPlan, Rope


class LatentHeads(NamedTuple):
    """What a head makes of a latent."""

    key: Tensor
    """[num_heads, key_dim, rank]: of the part of a key that does not turn."""
    value: Tensor
    """[num_heads, rank, value_dim]"""


def rope_and_store_latent(
    query: Tensor,
    latent: Tensor,
    norm: Tensor,
    eps: float,
    rope: Rope,
    kv: Tensor,
    layer: int,
    plan: AttentionPlan,
) -> None:
    """Turns the end of each query in its place; stores latents, normalised, and turned keys.

    Args:
        query: [≥ T, num_heads, key_dim + rope_dim].
        latent: [≥ T, rank + rope_dim]; rows may be strided.
        norm: [rank], the weight of an RMSNorm with `eps`.
        kv: [blocks + 1, 1, num_layers, 1, block_size, rank + rope_dim].
    """
    rank = len(norm)
    rope_dim = latent.shape[1] - rank
    turning = query[..., -rope_dim:]
    turning.copy_(reference.rotary(turning, rope.cos, rope.sin))
    key = reference.rotary(latent[:, None, rank:], rope.cos, rope.sin)[:, 0]
    kept = torch.cat((reference.rms_norm(latent[:, :rank], norm, eps), key), 1)
    rows = kv.view(-1, kv.shape[5])
    rows.index_copy_(0, plan.slots[layer, 0], plan.tokens_to_store(kept))


def latent_attention(
    query: Tensor,
    kv: Tensor,
    layer: int,
    plan: AttentionPlan,
    heads: LatentHeads,
    scale: float,
) -> Tensor:
    """Causal attention over latents → [≥ T, num_heads, value_dim].

    Args:
        query: [≥ T, num_heads, key_dim + rope_dim], the end turned.
        kv: as of `rope_and_store_latent`.
        scale: of the products of queries and keys.
    """
    key_dim, rank = heads.key.shape[1:]
    absorbed = of_each_head(query[..., :key_dim], heads.key)
    absorbed = torch.cat((absorbed, query[..., key_dim:]), -1)
    attended = reference.paged_attention(absorbed, kv, layer, plan, scale, value_dim=rank)
    return of_each_head(attended, heads.value)


def of_each_head(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, num_heads, in] times weight [num_heads, in, out] → [T, num_heads, out]."""
    by_head = reference.bmm(x.transpose(0, 1).contiguous(), weight)
    return by_head.transpose(0, 1).contiguous()
