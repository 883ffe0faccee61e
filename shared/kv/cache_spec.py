"""What each layer caches, its rules of life, and how layers share blocks. Bookkeeping: no torch.

Layers with equal specs form cache groups. A group has a block table of its own in every sequence; a
block of it holds `block_size` tokens of all its layers, contiguous, with the axes that
`CacheSpec.axes` names. A spec says of its layers which earlier tokens a token reads: from that
follows which blocks a sequence needs, what it may give back behind itself, which prefix hits are
valid, and what a hand-off moves.

Layers that keep a state of constant size (`State`) have a block of another kind, a slot: one holds
all that they keep of a sequence, whatever its length, and its table is that slot from admission to
the end. A token reads what was kept behind the token before it and writes over it: nothing earlier
is left. So a hit needs a copy that was kept just there, in a slot of its own: a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, Self

from baton.shared.kv.capacity import num_blocks_for


class CacheSpec(Protocol):
    """Hashable, and equal for layers that may share a group."""

    @property
    def num_kv_heads(self) -> int:
        """Heads that each have their share of a block."""

    @property
    def reads_everything(self) -> bool:
        """Whether a token reads all tokens before it: then a hit needs every block before it."""

    @property
    def grows(self) -> bool:
        """Whether a sequence takes blocks as it grows; if not, one, its slot, serves it for good,
        and a token changes what the tokens before it left there."""

    def first_read(self, position: int) -> int:
        """The lowest position that a token at `position` reads."""

    def axes(self, num_layers: int, block_size: int) -> dict[str, int]:
        """Names and sizes of a block's axes, outermost first; `byte` where elements differ."""

    def block_bytes(self, num_layers: int, block_size: int, itemsize_bytes: int) -> int:
        """Bytes of a block. `itemsize_bytes`: of an element, where the spec has none of its own."""

    def num_pieces(self, num_layers: int) -> int:
        """Equal parts that lie one after another in a block: one digest each."""

    def of_rank(self, rank: int, num_ranks: int) -> Self:
        """What one of several tensor-parallel ranks caches. ValueError: it cannot be sliced so."""

    def heads_of_rank(self, rank: int, num_ranks: int) -> range:
        """Which of this spec's KV heads a rank has. ValueError as `of_rank`."""


@dataclass(frozen=True, slots=True)
class Full:
    """Key and value of every position."""

    num_kv_heads: int
    head_dim: int
    is_float8: bool = False
    """Kept in 8 bits with a scale for each token and head; see `_key_value_axes`."""

    reads_everything: ClassVar[bool] = True
    grows: ClassVar[bool] = True

    def first_read(self, position: int) -> int:
        return 0

    def axes(self, num_layers: int, block_size: int) -> dict[str, int]:
        return _key_value_axes(self, num_layers, block_size)

    def block_bytes(self, num_layers: int, block_size: int, itemsize_bytes: int) -> int:
        return _key_value_bytes(self, num_layers, block_size, itemsize_bytes)

    def num_pieces(self, num_layers: int) -> int:
        return self.num_kv_heads

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
    is_float8: bool = False
    """As of `Full`."""

    reads_everything: ClassVar[bool] = False
    grows: ClassVar[bool] = True

    def first_read(self, position: int) -> int:
        return max(0, position - self.window + 1)

    def axes(self, num_layers: int, block_size: int) -> dict[str, int]:
        return _key_value_axes(self, num_layers, block_size)

    def block_bytes(self, num_layers: int, block_size: int, itemsize_bytes: int) -> int:
        return _key_value_bytes(self, num_layers, block_size, itemsize_bytes)

    def num_pieces(self, num_layers: int) -> int:
        return self.num_kv_heads

    def of_rank(self, rank: int, num_ranks: int) -> Sliding:
        return replace(self, num_kv_heads=len(self.heads_of_rank(rank, num_ranks)))

    def heads_of_rank(self, rank: int, num_ranks: int) -> range:
        return units_of_rank(self.num_kv_heads, rank, num_ranks, called="KV heads")


@dataclass(frozen=True, slots=True)
class Latent:
    """One vector of every position for all query heads: a latent of which keys and values are made,
    and behind it the part of the key that is turned by its position.

    It is key and value at once: blocks have one of it a token, of one head that every
    tensor-parallel rank has.
    """

    rank: int
    """Numbers of the latent."""
    rope_dim: int

    num_kv_heads: ClassVar[int] = 1
    reads_everything: ClassVar[bool] = True
    grows: ClassVar[bool] = True

    def first_read(self, position: int) -> int:
        return 0

    def axes(self, num_layers: int, block_size: int) -> dict[str, int]:
        dim = self.rank + self.rope_dim
        return {"kv_head": 1, "layer": num_layers, "kv": 1, "token": block_size, "dim": dim}

    def block_bytes(self, num_layers: int, block_size: int, itemsize_bytes: int) -> int:
        return math.prod(self.axes(num_layers, block_size).values()) * itemsize_bytes

    def num_pieces(self, num_layers: int) -> int:
        return self.num_kv_heads

    def of_rank(self, rank: int, num_ranks: int) -> Latent:
        return self

    def heads_of_rank(self, rank: int, num_ranks: int) -> range:
        return range(1)


_ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of an element, by the dtype's name."""
_STATE_ALIGNMENT_BYTES = 16
"""Of what each tensor has of one head in one layer: kernels read so much at once."""
_PIECE_BYTES = 2 << 20
"""The most that one digest of a state is of: transports are fastest with pieces of that size."""


@dataclass(frozen=True, slots=True)
class StateTensor:
    """One of the tensors that a layer keeps of a sequence. ValueError: not of this world."""

    name: str
    shape: tuple[int, ...]
    """What a head has of it."""
    dtype: str
    """`float32`, `bfloat16` or `float16`, whatever the other caches are in."""

    def __post_init__(self) -> None:
        if self.dtype not in _ITEMSIZES:
            raise ValueError(
                f"{self.name}: dtype {self.dtype} is not one of {', '.join(_ITEMSIZES)}"
            )
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"{self.name}: shape {self.shape} holds nothing")

    @property
    def num_bytes(self) -> int:
        """Of a head."""
        return math.prod(self.shape) * _ITEMSIZES[self.dtype]


@dataclass(frozen=True, slots=True)
class State:
    """A state of constant size: tensors that every token of a sequence changes in place.

    A slot has the layers one after another; of each the heads; of each the tensors, in order.
    A sequence's first token finds zeros, whatever the slot held before. Its pieces are as many of a
    layer's heads as have 2 MiB at most; of larger heads, parts of one.
    """

    num_kv_heads: int
    """Heads, each with its share of every tensor."""
    tensors: tuple[StateTensor, ...]

    reads_everything: ClassVar[bool] = False
    grows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if len({tensor.name for tensor in self.tensors}) < len(self.tensors) or not self.tensors:
            raise ValueError("a state needs tensors, each with a name of its own")

    def first_read(self, position: int) -> int:
        return max(0, position - 1)

    def offsets_bytes(self) -> tuple[int, ...]:
        """By tensor: where it begins in what one layer has of one head; and where that ends."""
        ends = [0]
        for tensor in self.tensors:
            ends.append(ends[-1] + _aligned(tensor.num_bytes))
        return tuple(ends)

    def axes(self, num_layers: int, block_size: int) -> dict[str, int]:
        return {
            "layer": num_layers,
            "kv_head": self.num_kv_heads,
            "byte": self.offsets_bytes()[-1],
        }

    def block_bytes(self, num_layers: int, block_size: int, itemsize_bytes: int) -> int:
        return math.prod(self.axes(num_layers, block_size).values())

    def num_pieces(self, num_layers: int) -> int:
        head_bytes = self.offsets_bytes()[-1]
        of_head = head_bytes // _STATE_ALIGNMENT_BYTES
        if head_bytes > _PIECE_BYTES:
            cuts = (n for n in range(1, of_head + 1) if of_head % n == 0)
            fewest = next(n for n in cuts if head_bytes // n <= _PIECE_BYTES)
            return num_layers * self.num_kv_heads * fewest
        cuts = (n for n in range(1, self.num_kv_heads + 1) if self.num_kv_heads % n == 0)
        fewest = next(n for n in cuts if self.num_kv_heads // n * head_bytes <= _PIECE_BYTES)
        return num_layers * fewest

    def of_rank(self, rank: int, num_ranks: int) -> State:
        return replace(self, num_kv_heads=len(self.heads_of_rank(rank, num_ranks)))

    def heads_of_rank(self, rank: int, num_ranks: int) -> range:
        return units_of_rank(self.num_kv_heads, rank, num_ranks, called="KV heads")


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _STATE_ALIGNMENT_BYTES) * _STATE_ALIGNMENT_BYTES


def window_of(spec: CacheSpec) -> int | None:
    """Positions that a token reads, its own among them; None: all before it."""
    return spec.window if isinstance(spec, Sliding) else None


def in_float8(spec: CacheSpec) -> CacheSpec:
    """What caches the same in 8 bits, where there are keys and values; else the spec itself."""
    return replace(spec, is_float8=True) if isinstance(spec, Full | Sliding) else spec


def _key_value_axes(spec: Full | Sliding, num_layers: int, block_size: int) -> dict[str, int]:
    """In 8 bits a head is the codes of its tokens in all layers, and behind them a byte for each of
    the vectors: its scale (kernels/reference_float8.py)."""
    heads = {"kv_head": spec.num_kv_heads}
    if spec.is_float8:
        return {**heads, "byte": num_layers * 2 * block_size * (spec.head_dim + 1)}
    return {**heads, "layer": num_layers, "kv": 2, "token": block_size, "dim": spec.head_dim}


def _key_value_bytes(
    spec: Full | Sliding, num_layers: int, block_size: int, itemsize_bytes: int
) -> int:
    count = math.prod(_key_value_axes(spec, num_layers, block_size).values())
    return count if spec.is_float8 else count * itemsize_bytes


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
        num_layers = len(self.layer_ids) + self.num_padding_layers
        return self.spec.block_bytes(num_layers, block_size, itemsize_bytes)

    @property
    def num_pieces(self) -> int:
        """Equal parts of a block, one digest each."""
        return self.spec.num_pieces(len(self.layer_ids) + self.num_padding_layers)

    @property
    def constant_bytes(self) -> int:
        """What a sequence takes whatever its length."""
        return 0 if self.spec.grows else self.block_bytes(1, 1)

    def num_blocks_for(self, num_tokens: int, block_size: int) -> int:
        """How long a table is that has room for so many tokens, the holes in it included."""
        return num_blocks_for(num_tokens, block_size) if self.spec.grows else 1

    def first_block(self, position: int, block_size: int) -> int:
        """Index in a table of the first block that a token at `position` reads."""
        return self.spec.first_read(position) // block_size if self.spec.grows else 0


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
