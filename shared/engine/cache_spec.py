"""What each layer caches, and how layers share blocks.

Layers with equal specs form a cache group with its own block table. A block of a group holds
`block_size` tokens of all its layers, contiguous:
`[num_kv_heads, num_layers, 2, block_size, head_dim]`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Full:
    """Key and value of every position."""

    num_kv_heads: int
    head_dim: int


CacheSpec = Full
"""The union of the specs; another kind of layer joins here."""


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers that share a block table; `layer_ids` in model order."""

    spec: CacheSpec
    layer_ids: tuple[int, ...]

    def block_shape(self, block_size: int) -> tuple[int, int, int, int, int]:
        """Shape of one block: [num_kv_heads, num_layers, 2, block_size, head_dim]."""
        spec = self.spec
        return (spec.num_kv_heads, len(self.layer_ids), 2, block_size, spec.head_dim)

    def block_bytes(self, block_size: int, itemsize_bytes: int) -> int:
        return math.prod(self.block_shape(block_size)) * itemsize_bytes


def cache_groups(specs: Sequence[CacheSpec]) -> tuple[CacheGroup, ...]:
    """Groups layers (one spec per layer) with equal specs, in order of first appearance."""
    layer_ids: dict[CacheSpec, list[int]] = {}
    for layer_id, spec in enumerate(specs):
        layer_ids.setdefault(spec, []).append(layer_id)
    return tuple(CacheGroup(spec, tuple(ids)) for spec, ids in layer_ids.items())
