"""What Triton kernels are told of a step's tokens: where they are stored, what they attend to, and
the angles of their positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from baton.kernels.decode_plan import DecodeWork
from baton.kernels.split_prefill_attention import ItemWork
from baton.kernels.state_plan import DeviceStatePlan
from baton.shared.engine.device_columns import Chunk


class ChunkItems(NamedTuple):
    """Chunks that share their keys among programs; see split_prefill_attention.py."""

    items: Tensor
    """int32 [N, 9]"""
    num_items: Tensor
    """int32 [1]: how many of them there are."""
    work: ItemWork


class WidenedChunks(NamedTuple):
    """Chunks whose keys and values are widened from 8 bits first; see float8_widen.py."""

    kv: Tensor
    """Where to: [blocks, num_kv_heads, 1, 2, block_size, head_dim]"""
    block_tables: Tensor
    """int32 [blocks, blocks]: from each block on."""
    stretches: Tensor
    """int32 [N, 4]"""
    num_stretches: Tensor | None = None
    """int32 [1]: how many of them count; None: all."""
    tiles: Tensor | None = None
    num_tiles: Tensor | None = None
    items: ChunkItems | None = None
    """As of a plan, in place of a slot the first of a chunk's blocks in `kv`."""


class Expansion(NamedTuple):
    """Keys and values of all chunks of a step from a graph, made of latents; see latent_expand.py.
    The chunks' tiles have, in place of a slot, the first of a chunk's blocks among them."""

    stretches: Tensor
    """int32 [N, 3]"""
    num_tokens: int
    """Of a stretch."""
    block_tables: Tensor
    """int32 [blocks, blocks]: from each block on."""
    attended: dict[tuple[int, ...], Tensor]
    """By shape, where attention goes, layer after layer, as `DeviceStatePlan.shared`."""


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """Where the tokens of a step are stored and what they attend to, in one cache group.

    A step's tokens are B decode rows, padding included, then prompt chunks.
    """

    slots: Tensor
    """int64 [T]: block id · block_size + offset; −1: store nothing."""
    context_lens: Tensor
    """int32 [S]"""
    block_tables: Tensor
    """int32 [S, max_blocks]"""
    rows: Tensor | None
    """int32 [B], the slot of each row of one token, −1 for padding; None: no such rows."""
    work: DecodeWork | None
    tiles: Tensor | None
    """int32 [NT, 4], see prefill_tiles; None: no prompt chunks."""
    block_m: int
    window: int = 0
    """Positions that a token attends to, its own among them; 0: all before it."""
    attended: Tensor | None = None
    """[T, num_heads, head_dim]: where attention goes, layer after layer. Tokens that are in no row
    and no tile keep what it holds. None: to new memory."""
    chunks: tuple[Chunk, ...] = ()
    """Of a group of latents, where in the step prompt chunks are."""
    num_padding: int = 0
    """How many of the tokens, at the end, are in no row and no tile."""
    counting: Tensor | None = None
    """int32 [max_blocks]: 0, 1, 2 and so on; where there are chunks."""
    num_tiles: Tensor | None = None
    """int32 [1]: how many of the tiles count; None: all."""
    items: ChunkItems | None = None
    """Of chunks whose tokens are in no tile."""
    widened: tuple[WidenedChunks, ...] = ()
    """Chunks that are in none of the lists above; some after others, in the same memory."""
    expansion: Expansion | None = None
    """Of a group of latents, in a step from a graph with prompt chunks."""


GroupPlan = DevicePlan | DeviceStatePlan
"""Of a cache group that grows, or of one of states."""


@dataclass(frozen=True, slots=True)
class Rope:
    """A table of angles, and the positions at which a step reads it."""

    cos: Tensor
    sin: Tensor
    """float32 [max position, head_dim / 2]"""
    query_scale: Tensor | None
    """float32 [max position]"""
    positions: Tensor | None = None
    """int32 [T]"""
