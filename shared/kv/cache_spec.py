"""What each layer caches, its rules of life, and how layers share blocks. Bookkeeping: no torch.

Layers with equal specs form cache groups. A group has a block table of its own in every sequence; a
block of it holds `block_size` tokens of all its layers, contiguous, with the axes that
`CacheSpec.axes` names. A spec says of its layers which earlier tokens a token reads: from that
follows which blocks a sequence needs, what it may give back behind itself, which prefix hits are
valid, and what a hand-off moves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, Self


class CacheSpec(Protocol):
    """Hashable, and equal for layers that may share a group."""

    @property
    def num_kv_heads(self) -> int:
        """Heads that lie one after another in a block: one digest each."""

    @property
    def reads_everything(self) -> bool:
        """Whether a token reads all tokens before it: then a hit needs every block before it."""

    def first_read(self, position: int) -> int:
        """The lowest position that a token at `position` reads."""

    def axes(self, num_layers: int, block_size: int) -> dict[str, int]:
        """Names and sizes of a block's axes, outermost first."""

    def of_rank(self, rank: int, num_ranks: int) -> Self:
        """What one of several tensor-parallel ranks caches. ValueError: it cannot be sliced so."""

    def heads_of_rank(self, rank: int, num_ranks: int) -> range:
        """Which of this spec's KV heads a rank has. ValueError as `of_rank`."""


@dataclass(frozen=True, slots=True)
class Full:
    """Key and value of every position."""

    num_kv_heads: int
    head_dim: int

    reads_everything: ClassVar[bool] = True

    def first_read(self, position: int) -> int:
        return 0

    def axes(self, num_layers: int, block_size: int) -> dict[str, int]:
        return _key_value_axes(self, num_layers, block_size)

    def of_rank(self, rank: int, num_ranks: int) -> Full:
        return replace(self, num_kv_heads=len(self.heads_of_rank(rank, num_ranks)))

    def heads_of_rank(self, rank: int, num_ranks: int) -> range:
        return units_of_rank(self.num_kv_heads, rank, num_ranks, called="KV heads")


@dataclass(frozen=True, slots=True)
class Sliding:
    """Key and value of the last `window` positions, a token's own among them."""

    num_kv_heads: int
    head_dim: int
    window: int

    reads_everything: ClassVar[bool] = False

    def first_read(self, position: int) -> int:
        return max(0, position - self.window + 1)

    def axes(self, num_layers: int, block_size: int) -> dict[str, int]:
        return _key_value_axes(self, num_layers, block_size)

    def of_rank(self, rank: int, num_ranks: int) -> Sliding:
        return replace(self, num_kv_heads=len(self.heads_of_rank(rank, num_ranks)))

    def heads_of_rank(self, rank: int, num_ranks: int) -> range:
        return units_of_rank(self.num_kv_heads, rank, num_ranks, called="KV heads")


def window_of(spec: CacheSpec) -> int | None:
    """Positions that a token reads, its own among them; None: all before it."""
    return spec.window if isinstance(spec, Sliding) else None


def _key_value_axes(spec: Full | Sliding, num_layers: int, block_size: int) -> dict[str, int]:
    return {
        "kv_head": spec.num_kv_heads,
        "layer": num_layers,
        "kv": 2,
        "token": block_size,
        "dim": spec.head_dim,
    }


def units_of_rank(num_units: int, rank: int, num_ranks: int, *, called: str = "units") -> range:
    """Which of several things that stay whole a tensor-parallel rank has: each is at one rank, or,
    with more ranks than things, at several neighbours. Caches and weights are shared out alike.

    Raises:
        ValueError: they cannot be divided evenly; `called` is what it calls them.
    """
    if num_units % num_ranks == 0:
        each = num_units // num_ranks
        return range(rank * each, (rank + 1) * each)
    if num_ranks % num_units == 0:
        unit = rank * num_units // num_ranks
        return range(unit, unit + 1)
    raise ValueError(f"{num_units} {called} cannot be shared by {num_ranks} ranks")


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers that share a block table; `layer_ids` in model order."""

    spec: CacheSpec
    layer_ids: tuple[int, ...]
    num_padding_layers: int = 0
    """Room for so many layers more in each block, which nobody uses, so that blocks of several
    groups are equally large."""

    def axes(self, block_size: int) -> dict[str, int]:
        """Names and sizes of a block's axes, outermost first."""
        return self.spec.axes(len(self.layer_ids) + self.num_padding_layers, block_size)

    def block_shape(self, block_size: int) -> tuple[int, ...]:
        return tuple(self.axes(block_size).values())

    def block_bytes(self, block_size: int, itemsize_bytes: int) -> int:
        return math.prod(self.block_shape(block_size)) * itemsize_bytes

    def first_block(self, position: int, block_size: int) -> int:
        """Index of the first block that a token at `position` reads."""
        return self.spec.first_read(position) // block_size


def cache_groups(specs: Sequence[CacheSpec | None]) -> tuple[CacheGroup, ...]:
    """Layers (one spec each; None: it caches nothing) with equal specs together, in order of first
    appearance."""
    layer_ids: dict[CacheSpec, list[int]] = {}
    for layer_id, spec in enumerate(specs):
        if spec is not None:
            layer_ids.setdefault(spec, []).append(layer_id)
    return tuple(CacheGroup(spec, tuple(ids)) for spec, ids in layer_ids.items())


def places_of_layers(groups: Sequence[CacheGroup]) -> dict[int, tuple[int, int]]:
    """By layer that caches: its group, and its place among the layers of a block of that group."""
    return {
        layer_id: (group, place)
        for group, each in enumerate(groups)
        for place, layer_id in enumerate(each.layer_ids)
    }
