"""The matrices of latent attention by which each head makes its keys and values of a latent: what a
model asks for, and how a checkpoint holds them."""

from __future__ import annotations

from dataclasses import dataclass

from baton.kernels.reference_latent import LatentHeads
from baton.shared.engine.linear import LinearSpec, Part, PartReader, Ranks, Split, expand


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentHeadsSpec:
    """One module of a checkpoint: of each head the rows that make its key, then those of its
    value, for a latent of `rank` numbers."""

    module: str
    num_heads: int
    key_dim: int
    value_dim: int
    rank: int


def expand_latent_heads(spec: LatentHeadsSpec, reader: PartReader, ranks: Ranks) -> LatentHeads:
    """Of this rank's heads, in the activations' dtype, contiguous.

    Raises:
        ModelError: a tensor is missing, has another shape, or a form that is not served.
    """
    unit = spec.key_dim + spec.value_dim
    part = Part(spec.module, spec.num_heads * unit, unit=unit)
    weight, _ = expand(LinearSpec(spec.rank, (part,), Split.COLUMNS), reader, ranks)
    by_head = weight.view(-1, unit, spec.rank)
    num_heads = len(by_head)
    if by_head.is_meta:
        return LatentHeads(
            by_head.new_empty(num_heads, spec.key_dim, spec.rank),
            by_head.new_empty(num_heads, spec.rank, spec.value_dim),
        )
    key, value = by_head[:, : spec.key_dim], by_head[:, spec.key_dim :]
    return LatentHeads(key.contiguous(), value.transpose(1, 2).contiguous())
