"""The prompt chunks of a step as columns for the device: pure arithmetic on the host."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.kernels.float8_widen import STRETCH_FIELDS, cut_stretches, num_stretches
from baton.kernels.prefill_attention import block_m_for, prefill_tiles
from baton.kernels.reference_float8 import STRETCH_TOKENS
from baton.kernels.state_plan import ROW_FIELDS, TILE_FIELDS, state_tiles
from baton.shared.engine.batch import NOT_STORED, BatchRow, kept_states
from baton.shared.engine.batch_state import aligned

Int32s = npt.NDArray[np.int32]

WIDE_TOKENS = 128
"""Of a wide tile; those of 64 are the next smaller ones."""
_TOKEN_ALIGNMENT = 16
"""Steps are padded to so many tokens: kernels are compiled for such counts once."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Where in a step a prompt's chunk is."""

    first_token: int
    num_tokens: int
    num_keys: int
    """Of its row, its own among them."""
    slot: int
    tiles: slice


@dataclass(frozen=True, slots=True)
class ChunkColumns:
    """T tokens: decode rows (filled in on the device), chunks, padding. R of them are wanted.

    packed: int32, one after another, each from a multiple of 16 bytes on, for kernels are compiled
        for aligned pointers: slots [G, T] as int64, input_ids [T], positions [T], tiles [NT, 4], of
        each turn of widening (float8_widen.py) tiles, in place of a slot the first of a chunk's
        blocks, and stretches [W, 4], of each group of states rows [C, 8] and tiles [N, 4]
        (state_plan.py), wanted [R] (which token), rows [R] (which slot, −1 = padding), back [R]
        (how many of the slot's tokens come behind it).
    """

    packed: Int32s
    num_tokens: int
    num_padding: int
    """How many of the tokens, at the end."""
    num_wanted: int
    num_tiles: int
    block_m: int
    num_groups: int
    widened: tuple[tuple[int, int], ...]
    """By turn, its tiles and stretches; none: nothing is widened."""
    chunks: tuple[Chunk, ...]
    """Where the tiles of each stand together; else none."""
    num_state_tiles: tuple[int, ...]
    """Of each group of states."""
    num_rows: int
    """Chunks."""
    keeps_states: bool
    """Some are kept in the middle of a chunk."""

    def unpack(self, sent: Tensor) -> SentColumns:
        """sent: `packed`, on the device."""
        num_slots, num_tokens = self.num_groups * self.num_tokens, self.num_tokens
        slots, rest = sent[: 2 * num_slots], sent[2 * num_slots :]
        input_ids, positions = rest[: 2 * num_tokens].view(2, num_tokens)
        tiles, rest = rest[2 * num_tokens :][: 4 * self.num_tiles], rest[2 * num_tokens :]
        rest = rest[tiles.numel() :]
        widened = []
        for num_tiles, num_seen in self.widened:
            of_turn, rest = rest[: 4 * num_tiles], rest[4 * num_tiles :]
            num_words = STRETCH_FIELDS * num_seen
            seen, rest = rest[:num_words], rest[num_words:]
            widened.append((of_turn.view(-1, 4), seen.view(-1, STRETCH_FIELDS)))
        states = []
        for count in self.num_state_tiles:
            num_words = ROW_FIELDS * self.num_rows
            of_group, rest = rest[:num_words], rest[num_words:]
            num_words = TILE_FIELDS * count
            of_tiles, rest = rest[:num_words], rest[num_words:]
            states.append((of_group.view(-1, ROW_FIELDS), of_tiles.view(-1, TILE_FIELDS)))
        wanted = rest.view(3, -1)[:, : self.num_wanted]
        return SentColumns(
            slots.view(torch.int64).view(self.num_groups, num_tokens),
            input_ids,
            positions,
            tiles.view(-1, 4),
            widened,
            states,
            *wanted,
        )


class SentColumns(NamedTuple):
    """Parts of the columns on the device."""

    slots: Tensor
    """int64 [G, T]"""
    input_ids: Tensor
    """int32 [T]"""
    positions: Tensor
    """int32 [T]"""
    tiles: Tensor
    """int32 [NT, 4]"""
    widened: list[tuple[Tensor, Tensor]]
    """By turn, its tiles, int32 [NT, 4], and stretches, int32 [W, 4]."""
    states: list[tuple[Tensor, Tensor]]
    """Of each group of states its rows, int32 [C, 8], and tiles, int32 [N, 4]."""
    wanted: Tensor
    """int32 [R]: which tokens."""
    rows: Tensor
    """int32 [R]: their slots; −1 for padding."""
    back: Tensor
    """int32 [R]: tokens of the slot behind each."""


def chunk_columns(
    num_decode: int,
    chunks: Sequence[tuple[int, BatchRow]],
    wanted: Sequence[tuple[int, int, int]],
    num_wanted: int,
    *,
    num_groups: int,
    num_slot_groups: int = 0,
    block_size: int,
    head_dim: int,
    itemsize: int,
    by_chunk: bool = False,
    most_widened: int = 0,
) -> ChunkColumns:
    """Columns of a step.

    Args:
        num_decode: tokens of decode rows, padding included.
        chunks: (slot, row); their block tables are long enough.
        wanted: (token, slot, tokens behind it) of those whose logits are wanted; the tokens of
            chunk c begin at num_decode + the tokens of those before it.
        num_wanted: R, at least as many as are wanted.
        num_slot_groups: how many groups are of states; they come last.
        head_dim: the largest of any group.
        itemsize: bytes of an element of what is attended to.
        by_chunk: a chunk's tiles stand together, for kernels that take one chunk after another.
        most_widened: stretches that keys and values of 8 bits can be widened in at a time; 0: they
            are not.
    """
    lens = [row.num_tokens for _, row in chunks]
    starts = list(accumulate(lens, initial=num_decode))
    num_real = starts[-1]
    num_tokens = -(-num_real // _TOKEN_ALIGNMENT) * _TOKEN_ALIGNMENT
    block_m = block_m_for(max(lens, default=1), head_dim, itemsize)
    turns: list[list[int]] = []
    if most_widened and block_m == WIDE_TOKENS:
        turns = _turns([row.context_len for _, row in chunks], most_widened)
        # The kernel that reads 8 bits has been compiled for shorter chunks only.
        block_m = WIDE_TOKENS if turns else WIDE_TOKENS // 2
    slots_of = np.array([slot for slot, _ in chunks], np.int64)
    positions_of = np.array([row.position for _, row in chunks], np.int64)
    tiles = prefill_tiles(np.array(starts, np.int64), slots_of, positions_of, block_m=block_m)
    places: tuple[Chunk, ...] = ()
    if by_chunk:
        tiles = tiles[np.argsort(np.searchsorted(starts, tiles[:, 0], "right"), kind="stable")]
        places = tuple(_chunks(starts, chunks, block_m))
    of_turns = [_in_turn(turn, tiles, chunks, starts, block_size) for turn in turns]

    states = [
        state_tiles(
            starts,
            [row.position for _, row in chunks],
            [row.block_tables[group][0] for _, row in chunks],
            kept_states([row for _, row in chunks], group),
        )
        for group in range(num_groups - num_slot_groups, num_groups)
    ]
    parts = [part.reshape(-1) for pair in (*of_turns, *states) for part in pair]

    num_columns = aligned(num_wanted)
    slots_words = 2 * num_groups * num_tokens
    num_words = tiles.size + sum(part.size for part in parts)
    packed = np.zeros(slots_words + 2 * num_tokens + num_words + 3 * num_columns, np.int32)
    slots = packed[:slots_words].view(np.int64).reshape(num_groups, num_tokens)
    slots[:, :num_decode] = slots[:, num_real:] = -1
    slots[num_groups - num_slot_groups :] = -1
    input_ids, positions = packed[slots_words:][: 2 * num_tokens].reshape(2, num_tokens)
    behind = packed[slots_words + 2 * num_tokens :]
    behind[:num_words] = np.concatenate((tiles.reshape(-1), *parts))
    for (_, row), first, end in zip(chunks, starts[:-1], starts[1:], strict=True):
        assert row.token_ids is not None
        input_ids[first:end] = np.frombuffer(array("i", row.token_ids), np.int32)
        positions[first:end] = np.arange(row.position, row.context_len, dtype=np.int32)
        for group in range(num_groups - num_slot_groups):
            slots[group, first:end] = slots_of_row(row, group, block_size)
    columns = behind[num_words:].reshape(3, num_columns)
    columns[1] = -1
    if wanted:
        columns[:, : len(wanted)] = np.array(wanted, np.int32).T
    return ChunkColumns(
        packed,
        num_tokens,
        num_tokens - num_real,
        num_wanted,
        len(tiles),
        block_m,
        num_groups,
        tuple((len(of_turn), len(seen)) for of_turn, seen in of_turns),
        places,
        tuple(len(of_tiles) for _, of_tiles in states),
        len(chunks),
        any(row.keeps for _, row in chunks),
    )


def _chunks(
    starts: Sequence[int], chunks: Sequence[tuple[int, BatchRow]], block_m: int
) -> Iterator[Chunk]:
    first_tile = 0
    for first, (slot, row) in zip(starts, chunks, strict=False):
        end = first_tile - (-row.num_tokens // block_m)
        yield Chunk(first, row.num_tokens, row.context_len, slot, slice(first_tile, end))
        first_tile = end


def _turns(num_keys: Sequence[int], most_widened: int) -> list[list[int]]:
    """Which chunks, that see so many keys, are widened together; none where one is too long for
    that."""
    needed = [num_stretches(count) for count in num_keys]
    if max(needed, default=0) > most_widened:
        return []
    turns: list[list[int]] = []
    taken = most_widened
    for chunk, count in enumerate(needed):
        if taken + count > most_widened:
            turns.append([])
            taken = 0
        turns[-1].append(chunk)
        taken += count
    return turns


def _in_turn(
    turn: Sequence[int],
    tiles: Int32s,
    chunks: Sequence[tuple[int, BatchRow]],
    starts: Sequence[int],
    block_size: int,
) -> tuple[Int32s, Int32s]:
    """Those tiles that are of the turn's chunks, and the stretches that it widens.

    `starts`: where the tokens of each chunk begin, and where the last end.
    """
    seen, places = place_in_stretches([chunks[i] for i in turn], block_size)
    first_blocks = np.full(len(chunks), -1)
    first_blocks[turn] = places
    placed = tiles.copy()
    placed[:, 2] = first_blocks[np.searchsorted(starts, tiles[:, 0], "right") - 1]
    return placed[placed[:, 2] >= 0], seen


def place_in_stretches(
    chunks: Sequence[tuple[int, BatchRow]], block_size: int
) -> tuple[Int32s, npt.NDArray[np.int64]]:
    """Where chunks see keys and values that are widened: the stretches, int32 [W, 4], and of each
    chunk the first of its blocks, which its tiles have in place of a slot."""
    rows = [(slot, row.position, row.context_len) for slot, row in chunks]
    stretches, firsts = cut_stretches(rows)
    return stretches, np.array(firsts, np.int64) * (STRETCH_TOKENS // block_size)


def slots_of_row(row: BatchRow, group: int, block_size: int) -> npt.NDArray[np.int64]:
    """Where the group's pool has the row's tokens."""
    first, end = row.position // block_size, -(-row.context_len // block_size)
    blocks = np.array(row.block_tables[group][first:end], np.int64) * block_size
    slots = (blocks[:, None] + np.arange(block_size)).reshape(-1)
    slots = slots[row.position - first * block_size :][: row.num_tokens]
    slots[: max(0, row.num_stored - row.position)] = NOT_STORED
    return slots
