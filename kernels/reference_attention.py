"""Decode attention in plain torch: the oracle of kernels/decode_attention.py."""

from __future__ import annotations

import torch
from torch import Tensor


def decode_attention_reference(
    query: Tensor,
    kv: Tensor,
    layer: int,
    rows: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One query token a row, over the row's keys in the pool → [B, num_heads, head_dim].

    Computes in float32, or in float64 where `query` is float64. It reads device values: not for a
    CUDA graph.

    Args:
        query: [B, num_heads, head_dim].
        kv: [blocks + 1, num_kv_heads, num_layers, 2, block_size, head_dim].
        layer: which layer of `kv`.
        rows: int32 [B], the slot of each row; the result of a row of −1 is zero.
        context_lens: int32 [slots], at least 1 for a slot in `rows`: the keys that it sees.
        block_tables: int32 [slots, ≥ blocks of the context]; what follows them is not read.
        scale: of the products of query and key.
        soft_cap: scores become cap · tanh(score / cap); 0: they stay.
        sinks: float32 [num_heads]: of each head a score beside those of the keys, of a value that
            is zero.
        window: a row sees its last `window` keys only; 0 means all of them.
        out: where the result goes; a new tensor without it.
    """
    if out is None:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
    num_kv_heads, block_size, head_dim = kv.shape[1], kv.shape[4], kv.shape[5]
    wide = torch.promote_types(query.dtype, torch.float32)
    for row, slot in enumerate(rows.tolist()):
        if slot < 0:
            out[row] = 0
            continue
        end = int(context_lens[slot])
        begin = max(end - window, 0) if window else 0
        first_block = begin // block_size
        blocks = block_tables[slot, first_block : -(-end // block_size)].long()
        visible = slice(begin - first_block * block_size, end - first_block * block_size)
        # [2, num_kv_heads, keys, head_dim]
        pair = kv[blocks, :, layer].permute(2, 1, 0, 3, 4).flatten(2, 3)[:, :, visible].to(wide)
        by_head = query[row].to(wide).view(num_kv_heads, -1, head_dim)
        scores = by_head @ pair[0].transpose(1, 2) * scale
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        if sinks is not None:
            # One more key, whose value is left out.
            own_sinks = sinks.to(wide).view(num_kv_heads, -1, 1)
            scores = torch.cat((scores, own_sinks), -1)
        weights = torch.softmax(scores, -1)[..., : pair.shape[2]]
        out[row] = (weights @ pair[1]).view(-1, head_dim).to(out.dtype)
    return out
