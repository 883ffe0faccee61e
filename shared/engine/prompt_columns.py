"""The columns of a captured step with prompt chunks: like those of device_columns.py, but where
each begins depends on nothing but the graph that reads them.

    updates  int32 [2, U]  what changed of the batch's state, −1 = padding (batch_state.py)
    wanted   int32 [Rmax]  tokens whose logits are wanted
    rows     int32 [Rmax]  their slots, −1 = padding
    decode   int32 [Dmax]  slots of the decode rows, −1 = padding
    counts   int32 [2 + K] how many wide tiles and stretches to be widened there are, and how many
                           items of each kind
    slots    int64 [G, T]  then input_ids, positions [T], of decode rows filled in on the device
    tiles    int32 [NT, 4] wide tiles
    widened  int32 [W, 4]  stretches of what chunks see, where keys and values of 8 bits are widened
                           first (float8_widen.py): tiles and items have the first of a chunk's
                           blocks among them in place of a slot
    items    int32 [N, 9]  of each kind
    latents  int32         tiles [NT, 4] of chunks, and stretches [N, 3] of what they see
                           (latent_expand.py), where keys and values are made of latents
    states   int32         of each group of states rows [C, 8] and tiles [N, 4] (state_plan.py)

Tokens are decode rows, chunks, padding: token 0, position 0, stored nowhere and attended to by
nobody.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.kernels.float8_widen import STRETCH_FIELDS, num_stretches
from baton.kernels.prefill_attention import prefill_tiles
from baton.kernels.prefill_items import ITEM_FIELDS, cut_items, most_items
from baton.kernels.state_plan import (
    NO_ROW,
    NO_TILE,
    ROW_FIELDS,
    TILE_FIELDS,
    TILE_TOKENS,
    state_tiles,
)
from baton.shared.engine.batch import BatchRow, kept_states
from baton.shared.engine.batch_state import aligned
from baton.shared.engine.device_columns import WIDE_TOKENS, place_in_stretches, slots_of_row

Ints = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]

MOST_UPDATES = 1024
"""Of a step from a graph: a new sequence brings its block table."""
_STRETCH_FIELDS = 3
_FEW_TOKENS, _MANY_KEYS = 128, 1024
"""Chunks of at most so many tokens that see more keys than that are cut into items beside wide
tiles, too: one alone would keep its programs when all others are done."""


@dataclass(frozen=True, slots=True)
class ItemKind:
    """How cache groups cut chunks: those that do it alike share a list."""

    block_m: int
    block_n: int
    most_cuts: int
    window: int
    has_wide: bool
    """Wide tiles take what is not few tokens behind many."""
    is_widened: bool
    """Of what chunks see; wide tiles are of such groups only, where there are any."""


@dataclass(frozen=True, slots=True)
class Stretches:
    """Of keys and values that are made of latents."""

    num_tokens: int
    """Of each, a multiple of a block."""
    most: int
    """That there is room for."""
    block_m: int
    """Tokens of a chunk in a tile."""
    takes_few: bool
    """Few tokens behind many are as well expanded."""

    def needed(self, row: BatchRow) -> int:
        return -(-row.context_len // self.num_tokens)


class PromptViews(NamedTuple):
    """The columns on the device."""

    updates: Tensor
    wanted: Tensor
    rows: Tensor
    decode: Tensor
    counts: Tensor
    slots: Tensor
    input_ids: Tensor
    positions: Tensor
    tiles: Tensor
    widened: Tensor
    items: list[Tensor]
    latent_tiles: Tensor
    stretches: Tensor
    states: list[tuple[Tensor, Tensor]]
    """Of each group of states its rows and tiles."""


@dataclass(frozen=True)
class PromptLayout:
    """Where columns of steps of so many tokens are. All layouts of an engine begin alike."""

    num_tokens: int
    num_groups: int
    most_wanted: int
    most_decode: int
    most_rows: int
    """Of chunks."""
    kinds: tuple[ItemKind, ...]
    num_slot_groups: int = 0
    """How many groups are of states; they come last."""
    most_kept: int = 0
    """States of chunks that are kept."""
    stretches: Stretches | None = None
    """Of groups of latents, if there are any."""
    most_widened: int = 0
    """Stretches that there is room for; 0: nothing is widened."""

    @property
    def most_tiles(self) -> int:
        return self.num_tokens // WIDE_TOKENS + self.most_rows

    @property
    def num_words(self) -> int:
        return int(self._columns[-1].stop)

    @cached_property
    def _columns(self) -> list[slice]:
        """Where each column is; all begin at 16 bytes, for kernels are compiled for that."""
        sizes = [
            2 * MOST_UPDATES,
            *(self.most_wanted, self.most_wanted, self.most_decode, 2 + len(self.kinds)),
            *(2 * self.num_groups * self.num_tokens, self.num_tokens, self.num_tokens),
            4 * self.most_tiles,
            STRETCH_FIELDS * self.most_widened,
            *(ITEM_FIELDS * self._most_items(kind) for kind in self.kinds),
            4 * self._most_latent_tiles,
            0 if self.stretches is None else _STRETCH_FIELDS * self.stretches.most,
            *[ROW_FIELDS * self.most_rows, TILE_FIELDS * self._most_state_tiles]
            * self.num_slot_groups,
        ]
        ends = list(accumulate((aligned(size) for size in sizes), initial=0))
        return [slice(first, end) for first, end in pairwise(ends)]

    def _most_items(self, kind: ItemKind) -> int:
        return most_items(self.num_tokens, self.most_rows, kind.block_m, kind.most_cuts)

    @property
    def _most_latent_tiles(self) -> int:
        if self.stretches is None:
            return 0
        return self.num_tokens // self.stretches.block_m + self.most_rows

    @property
    def _most_state_tiles(self) -> int:
        return self.num_tokens // TILE_TOKENS + self.most_rows + self.most_kept

    def takes(self, chunks: Sequence[BatchRow]) -> bool:
        """Whether there is room for what these need, their tokens aside, and latents are best
        expanded."""
        if len(chunks) > self.most_rows:
            return False
        if self.num_slot_groups and sum(len(row.keeps) for row in chunks) > self.most_kept:
            return False
        if self.most_widened:
            return sum(num_stretches(row.context_len) for row in chunks) <= self.most_widened
        if self.stretches is None:
            return True
        if not self.stretches.takes_few and any(
            _is_few_behind_many(row.num_tokens, row.context_len) for row in chunks
        ):
            return False
        return sum(map(self.stretches.needed, chunks)) <= self.stretches.most

    def views(self, words: Tensor) -> PromptViews:
        """words: int32 [≥ num_words], on the device."""
        parts = [words[column] for column in self._columns]
        updates, wanted, rows, decode, counts, slots, input_ids, positions, *lists = parts
        tiles, widened, *lists = lists
        items, lists = lists[: len(self.kinds)], lists[len(self.kinds) :]
        latent_tiles, stretches, *states = lists
        num_stretches = 0 if self.stretches is None else self.stretches.most
        num_slots = self.num_groups * self.num_tokens
        return PromptViews(
            updates.view(2, MOST_UPDATES),
            wanted[: self.most_wanted],
            rows[: self.most_wanted],
            decode[: self.most_decode],
            counts,
            slots.view(torch.int64)[:num_slots].view(self.num_groups, self.num_tokens),
            input_ids[: self.num_tokens],
            positions[: self.num_tokens],
            tiles.view(-1, 4)[: self.most_tiles],
            widened.view(-1, STRETCH_FIELDS),
            [
                each[: ITEM_FIELDS * self._most_items(kind)].view(-1, ITEM_FIELDS)
                for each, kind in zip(items, self.kinds, strict=True)
            ],
            latent_tiles.view(-1, 4),
            stretches[: _STRETCH_FIELDS * num_stretches].view(-1, _STRETCH_FIELDS),
            [
                (of_rows.view(-1, ROW_FIELDS), of_tiles.view(-1, TILE_FIELDS))
                for of_rows, of_tiles in zip(states[::2], states[1::2], strict=True)
            ],
        )

    def pack(
        self,
        decode: Sequence[int],
        chunks: Sequence[tuple[int, BatchRow]],
        wanted: Sequence[tuple[int, int]],
        block_size: int,
        updates: Int32s | None = None,
    ) -> Int32s:
        """The columns of a step, for which there is room.

        Args:
            decode: slots of the decode rows.
            chunks: (slot, row) of each; their block tables are long enough.
            wanted: (token of the step, slot) of those whose logits are wanted.
            updates: [2, n], at most `MOST_UPDATES` of them.
        """
        packed = np.zeros(self.num_words, np.int32)
        columns = [packed[column] for column in self._columns]
        of_updates, of_wanted, of_rows, of_decode, counts, *columns = columns
        slots_words, input_ids, positions, tiles, widened, *lists = columns
        item_columns, lists = lists[: len(self.kinds)], lists[len(self.kinds) :]
        latent_tiles, stretches, *state_columns = lists
        of_updates[:] = -1
        if updates is not None:
            of_updates.reshape(2, MOST_UPDATES)[:, : updates.shape[1]] = updates
        of_rows[:] = of_decode[:] = -1
        if wanted:
            of_wanted[: len(wanted)], of_rows[: len(wanted)] = np.array(wanted, np.int32).T
        of_decode[: len(decode)] = decode
        num_slots = self.num_groups * self.num_tokens
        slots = slots_words.view(np.int64)[:num_slots].reshape(self.num_groups, self.num_tokens)
        starts = list(accumulate((row.num_tokens for _, row in chunks), initial=len(decode)))
        slots[:, : len(decode)] = slots[:, starts[-1] :] = -1
        slots[self.num_groups - self.num_slot_groups :] = -1
        for (_, row), first, end in zip(chunks, starts[:-1], starts[1:], strict=True):
            assert row.token_ids is not None
            input_ids[first:end] = np.frombuffer(array("i", row.token_ids), np.int32)
            positions[first:end] = np.arange(row.position, row.context_len, dtype=np.int32)
            for group in range(self.num_groups - self.num_slot_groups):
                slots[group, first:end] = slots_of_row(row, group, block_size)
        cut = _Cut(chunks, starts)
        first_blocks = cut.slots
        if self.most_widened:
            seen, first_blocks = place_in_stretches(chunks, block_size)
            widened[: seen.size] = seen.reshape(-1)
            counts[1] = len(seen)
        if any(kind.has_wide for kind in self.kinds):
            own = cut.tiles(WIDE_TOKENS, cut.is_wide, first_blocks)
            tiles[: own.size] = own.reshape(-1)
            counts[0] = len(own)
        for number, (kind, column) in enumerate(zip(self.kinds, item_columns, strict=True)):
            which = ~cut.is_wide if kind.has_wide else np.ones(len(chunks), bool)
            if not which.any():
                continue
            items = cut_items(
                cut.tiles(kind.block_m, which, first_blocks if kind.is_widened else cut.slots),
                block_n=kind.block_n,
                most_cuts=kind.most_cuts,
                window=kind.window,
            )
            column[: items.size] = items.reshape(-1)
            counts[2 + number] = len(items)
        if self.stretches is not None:
            own, needed = self._cut_latents(self.stretches, chunks, starts, block_size)
            latent_tiles[: own.size] = own.reshape(-1)
            stretches[: needed.size] = needed.reshape(-1)
        self._pack_states(chunks, starts, state_columns)
        return packed

    def _cut_latents(
        self,
        stretches: Stretches,
        chunks: Sequence[tuple[int, BatchRow]],
        starts: Sequence[int],
        block_size: int,
    ) -> tuple[Int32s, Int32s]:
        """Tiles of the chunks, in place of the slot the block where what a chunk sees begins, and
        the stretches that have it."""
        needed: list[tuple[int, int, int]] = []
        first_blocks = []
        for slot, row in chunks:
            first_blocks.append(len(needed) * stretches.num_tokens // block_size)
            of_row = range(0, row.context_len, stretches.num_tokens)
            needed += [(slot, first, row.context_len) for first in of_row]
        tiles = prefill_tiles(
            np.array(starts, np.int64),
            np.array(first_blocks, np.int64),
            np.array([row.position for _, row in chunks], np.int64),
            block_m=stretches.block_m,
        )
        return tiles, np.array(needed, np.int32).reshape(-1, _STRETCH_FIELDS)

    def _pack_states(
        self,
        chunks: Sequence[tuple[int, BatchRow]],
        starts: Sequence[int],
        columns: Sequence[Int32s],
    ) -> None:
        """Into rows and tiles of each group of states."""
        rows = [row for _, row in chunks]
        positions = [row.position for row in rows]
        first = self.num_groups - self.num_slot_groups
        for number, (of_rows, of_tiles) in enumerate(zip(columns[::2], columns[1::2], strict=True)):
            slots = [row.block_tables[first + number][0] for row in rows]
            own_rows, own_tiles = state_tiles(
                starts, positions, slots, kept_states(rows, first + number)
            )
            of_rows.reshape(-1, ROW_FIELDS)[:] = NO_ROW
            of_rows[: own_rows.size] = own_rows.reshape(-1)
            of_tiles.reshape(-1, TILE_FIELDS)[:] = NO_TILE
            of_tiles[: own_tiles.size] = own_tiles.reshape(-1)


@overload
def _is_few_behind_many(num_tokens: int, num_keys: int) -> bool: ...
@overload
def _is_few_behind_many(num_tokens: Ints, num_keys: Ints) -> npt.NDArray[np.bool_]: ...
def _is_few_behind_many(num_tokens: Any, num_keys: Any) -> Any:
    return (num_tokens <= _FEW_TOKENS) & (num_keys > _MANY_KEYS)


class _Cut:
    """Chunks of a step and which tiles they are cut into."""

    def __init__(self, chunks: Sequence[tuple[int, BatchRow]], starts: Sequence[int]) -> None:
        """`starts`: where the tokens of each begin, and where the last end."""
        self.slots = np.array([slot for slot, _ in chunks], np.int64)
        self._positions = np.array([row.position for _, row in chunks], np.int64)
        self._starts = np.array(starts, np.int64)
        counts = np.diff(self._starts)
        self.is_wide = ~_is_few_behind_many(counts, self._positions + counts)

    def tiles(self, block_m: int, which: npt.NDArray[np.bool_], places: Ints) -> Int32s:
        """Of some of the chunks; `places`: the slot of each, or what is to be in place of it."""
        tiles = prefill_tiles(self._starts, places, self._positions, block_m=block_m)
        row = np.searchsorted(self._starts, tiles[:, 0], "right") - 1
        return tiles[which[row]]
