"""Attention over latents by Triton kernels: which form each token of a step takes.

    rows of one token   absorbed: queries through the matrices of keys, over the latents themselves
    a prompt's chunk    absorbed likewise, or expanded: keys and values made of the latents first,
                        whichever is cheaper (latent_expand.py)
    chunks of a graph   expanded, all at once

Few rows are absorbed as they are stored (latent_heads.py): of those the queries that `attend` takes
are as wide as what the cache holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from baton.kernels import latent_heads
from baton.kernels.latent_attention import latent_chunk_attention, latent_decode_attention
from baton.kernels.latent_expand import (
    expand_latents,
    expand_stretches,
    expands,
    heads_at_once,
)
from baton.kernels.latent_store import rope_and_store_latent
from baton.kernels.prefill_attention import paged_prefill_attention
from baton.kernels.reference_latent import LatentHeads
from baton.shared.engine.device_columns import Chunk
from baton.shared.engine.device_plan import DevicePlan, Expansion, Rope
from baton.shared.engine.operations import Norm


def rope_and_store(
    query: Tensor,
    latent: Tensor,
    norm: Norm,
    rope: Rope,
    kv: Tensor,
    layer: int,
    plan: DevicePlan,
    heads: LatentHeads,
    *,
    pdl: bool,
) -> Tensor:
    """As of reference_latent.py → queries for `attend`: [T, num_heads, key_dim + rope_dim], or
    absorbed ones, [T, num_heads, rank + rope_dim]."""
    assert rope.positions is not None
    angles = (rope.cos, rope.sin)
    own = (latent, norm.weight, norm.eps, *angles, rope.positions, plan.slots, kv, layer)
    # Of a step without chunks, and without what pads it to the length of one.
    is_decode = plan.rows is not None and len(query) == len(plan.rows) and plan.expansion is None
    if is_decode and latent_heads.takes(len(query), *heads):
        return latent_heads.store_and_absorb(query, *own, heads.key, pdl=pdl)
    rope_and_store_latent(query, *own, pdl=pdl)
    return query


def attend(
    query: Tensor,
    kv: Tensor,
    layer: int,
    plan: DevicePlan,
    heads: LatentHeads,
    scale: float,
    *,
    pdl: bool,
) -> Tensor:
    """As of reference_latent.py, of what `rope_and_store` returns → [T, num_heads, value_dim]."""
    key_dim, rank = heads.key.shape[1:]
    if query.shape[2] == kv.shape[5] and latent_heads.covers(*heads):
        absorbed, turned = query[..., :rank], query[..., rank:]
        return _attend_rows(absorbed, turned, kv, layer, plan, scale, value=heads.value, pdl=pdl)
    out = query.new_empty(*query.shape[:2], heads.value.shape[2])
    if plan.expansion is not None:
        attend_all_expanded(query, kv, layer, plan, plan.expansion, heads, scale, out)
    elif plan.num_padding:
        # Nobody reads what becomes of it, but numbers shall go on through the layers.
        out[-plan.num_padding :].zero_()
    if plan.rows is not None and plan.work is not None:
        own = query[: len(plan.rows)]
        absorbed, turned = _absorbed(own, heads), own[..., key_dim:]
        attended = _attend_rows(absorbed, turned, kv, layer, plan, scale, pdl=pdl)
        # Padding among rows beside chunks of a graph has the places of chunks' tokens: attending to
        # nothing, it adds nothing there.
        is_added = plan.expansion is not None
        _of_latents(attended, heads, out[: len(attended)], is_added=is_added)
    for chunk in plan.chunks:
        attend_chunk = attend_expanded if _expands(chunk, kv, heads) else attend_absorbed
        attend_chunk(query, kv, layer, plan, chunk, heads, scale, out)
    return out


def _attend_rows(
    absorbed: Tensor,
    turned: Tensor,
    kv: Tensor,
    layer: int,
    plan: DevicePlan,
    scale: float,
    *,
    value: Tensor | None = None,
    pdl: bool,
) -> Tensor:
    """What rows of one token attend to, zeros for padding; see `latent_decode_attention`.

    Args:
        absorbed: [B, num_heads, rank]
        turned: [B, num_heads, rope_dim]
    """
    assert plan.rows is not None and plan.work is not None
    return latent_decode_attention(
        absorbed,
        turned,
        kv,
        layer,
        plan.rows,
        plan.block_tables,
        plan.work,
        scale,
        value=value,
        pdl=pdl,
    )


def _absorbed(query: Tensor, heads: LatentHeads) -> Tensor:
    """query [T, num_heads, key_dim + …] → [T, num_heads, rank], strided."""
    own = query[..., : heads.key.shape[1]]
    return torch.bmm(own.transpose(0, 1), heads.key).transpose(0, 1)


def _of_latents(
    attended: Tensor, heads: LatentHeads, out: Tensor, *, is_added: bool = False
) -> None:
    """attended [T, num_heads, rank] → out [T, num_heads, value_dim], or added to what that has."""
    # With a beta of zero, what `out` holds is not read.
    beta = int(is_added)
    out.transpose(0, 1).baddbmm_(attended.transpose(0, 1), heads.value, beta=beta)


def _expands(chunk: Chunk, kv: Tensor, heads: LatentHeads) -> bool:
    num_heads, key_dim, rank = heads.key.shape
    return expands(
        chunk.num_tokens,
        chunk.num_keys,
        num_heads=num_heads,
        rank=rank,
        rope_dim=kv.shape[5] - rank,
        key_dim=key_dim,
        value_dim=heads.value.shape[2],
        itemsize=kv.element_size(),
    )


def attend_absorbed(
    query: Tensor,
    kv: Tensor,
    layer: int,
    plan: DevicePlan,
    chunk: Chunk,
    heads: LatentHeads,
    scale: float,
    out: Tensor,
) -> None:
    """A chunk's tokens, into their places in `out`."""
    assert plan.tiles is not None
    own = slice(chunk.first_token, chunk.first_token + chunk.num_tokens)
    attended = query.new_empty(*query.shape[:2], heads.key.shape[2])
    absorbed = torch.empty_like(attended)
    absorbed[own] = _absorbed(query[own], heads)
    latent_chunk_attention(
        absorbed,
        query[..., heads.key.shape[1] :],
        kv,
        layer,
        plan.tiles[chunk.tiles],
        plan.block_tables,
        scale,
        block_m=plan.block_m,
        out=attended,
    )
    _of_latents(attended[own], heads, out[own])


def attend_expanded(
    query: Tensor,
    kv: Tensor,
    layer: int,
    plan: DevicePlan,
    chunk: Chunk,
    heads: LatentHeads,
    scale: float,
    out: Tensor,
) -> None:
    """Likewise; some heads after others, for their keys and values take room."""
    assert plan.tiles is not None
    own = slice(chunk.first_token, chunk.first_token + chunk.num_tokens)
    num_heads, value_dim = query.shape[1], heads.value.shape[2]
    at_once = heads_at_once(num_heads)
    for first in range(0, num_heads, at_once):
        these = slice(first, first + at_once)
        expanded = expand_latents(
            kv,
            layer,
            plan.block_tables,
            chunk.slot,
            chunk.num_keys,
            heads.key[these],
            heads.value[these],
        )
        # Blocks one after another, whatever the slot.
        assert plan.counting is not None
        table = plan.counting[None].expand(len(plan.block_tables), -1)
        attended = paged_prefill_attention(
            query[:, these],
            expanded,
            0,
            plan.tiles[chunk.tiles],
            table,
            scale,
            block_m=plan.block_m,
        )
        out[own, these] = attended[own, :, :value_dim]
        # Else those of the next heads would be made beside them.
        del expanded


def attend_all_expanded(
    query: Tensor,
    kv: Tensor,
    layer: int,
    plan: DevicePlan,
    expansion: Expansion,
    heads: LatentHeads,
    scale: float,
    out: Tensor,
) -> None:
    """Likewise, all chunks of a step at once; zeros for tokens in none."""
    assert plan.tiles is not None
    num_heads, value_dim = query.shape[1], heads.value.shape[2]
    at_once = heads_at_once(num_heads)
    shape = (len(query), at_once, query.shape[2])
    if shape not in expansion.attended:
        expansion.attended[shape] = query.new_zeros(shape)
    attended = expansion.attended[shape]
    for first in range(0, num_heads, at_once):
        these = slice(first, first + at_once)
        expanded = expand_stretches(
            kv,
            layer,
            plan.block_tables,
            expansion.stretches,
            expansion.num_tokens,
            heads.key[these],
            heads.value[these],
        )
        paged_prefill_attention(
            query[:, these],
            expanded,
            0,
            plan.tiles,
            expansion.block_tables,
            scale,
            block_m=plan.block_m,
            out=attended,
        )
        out[:, these] = attended[..., :value_dim]
        del expanded
