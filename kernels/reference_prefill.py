"""Attention of prompt chunks over the paged cache, in plain torch: what the kernel must compute."""

from __future__ import annotations

import torch
from torch import Tensor


def paged_prefill_attention(
    query: Tensor,
    kv: Tensor,
    layer: int,
    tiles: Tensor,
    block_tables: Tensor,
    scale: float,
    *,
    block_m: int,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """As kernels.prefill_attention.paged_prefill_attention; computes in float64."""
    out = torch.empty_like(query) if out is None else out
    _, num_kv_heads, _, _, block_size, head_dim = kv.shape
    num_heads = query.shape[1]
    for first, count, slot, position in tiles.tolist():
        if count <= 0 or slot < 0:
            continue
        low = max(0, position - window + 1) if window else 0
        index = torch.arange(low, position + count, device=kv.device)
        blocks = block_tables[slot, index // block_size].long()
        # [2, keys, num_heads, head_dim]
        both = kv[blocks, :, layer, :, index % block_size].permute(2, 0, 1, 3).double()
        keys, values = both.repeat_interleave(num_heads // num_kv_heads, dim=2)
        wide = query[first : first + count].double()
        scores = torch.einsum("qhd,khd->hqk", wide, keys) * scale
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        own = torch.arange(position, position + count, device=kv.device)[:, None]
        hidden = index > own
        if window:
            hidden |= index <= own - window
        scores.masked_fill_(hidden, float("-inf"))
        if sinks is not None:
            # One more key, whose value is left out.
            own_sinks = sinks.double()[:, None, None].expand(-1, count, 1)
            scores = torch.cat((scores, own_sinks), -1)
        weights = scores.softmax(-1)[..., : len(index)]
        out[first : first + count] = torch.einsum("hqk,khd->qhd", weights, values).to(out.dtype)
    return out
