"""Where the rows of a step keep their states: what an operation with a state of constant size is
told beside its tokens.

Such an operation goes through a row's tokens one after another. It begins with what the row's slot
holds, or with zeros where the row's first token is its sequence's first; what it has behind the
row's last token it leaves in the slot. So a row must not be computed twice. The state behind other
tokens of a row may be wanted too: it goes to a slot of its own, whatever that held. Tokens that
belong to no row are padding, and touch no slot; so do rows whose slot is NO_SLOT, which begin with
zeros.

A row's last tokens may be guesses. Then what the slot gets is the state before them, and a plan
keeps what the operation was told of them (`note`): when it is known how many of them stand, these
are gone through once more, from the slot on, and that is what the slot gets.

An operation takes one of the layer's tensors, [num_slots + 1, heads, layers, …] (`KvCache.caches`),
which of the layers it is, and a plan: `StatePlan` for the torch reference, which walks `rows`;
`DeviceStatePlan` for kernels, which have one program, or several, a row of one token and guesses,
and take the others tile by tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

NO_SLOT = -1
TILE_TOKENS = 64
"""The most of a tile: chunks of the scans' matrix form."""
ROW_FIELDS, TILE_FIELDS = 8, 4
NO_ROW, NO_TILE = (0, 0, NO_SLOT, 1, 0, 0, 0, 0), (0, 0, 0, NO_SLOT)
"""A row and a tile without tokens, which no slot is touched of."""

Ints = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]


class Kept(NamedTuple):
    """A state that is wanted in the middle of a row, or at its end for somebody else."""

    row: int
    num_tokens: int
    """Of the row's tokens, those behind which it is."""
    slot: int


class StateRow(NamedTuple):
    """A row as the torch reference takes it."""

    tokens: slice
    slot: int
    is_first: bool
    """It begins with zeros."""
    stores: Sequence[tuple[int, int]]
    """(how many of its tokens, the slot that the state behind them goes to), ascending; the row's
    own slot is the last, if it has one."""

    @property
    def is_single(self) -> bool:
        """Of one token, behind which its slot alone changes: such rows are computed together."""
        return self.tokens.stop - self.tokens.start == 1 and list(self.stores) == [(1, self.slot)]


@dataclass(frozen=True, slots=True)
class StatePlan:
    """R rows; all int64."""

    query_start: Ints
    """[R + 1]: tokens query_start[i] … query_start[i + 1] − 1 are row i's."""
    first_positions: Ints
    """[R]: of each row's first token."""
    slots: Ints
    """[R]"""
    kept: Sequence[Kept] = ()
    """By row, those of a row in the order of its tokens."""
    num_guesses: Ints | None = None
    """[R]: how many of each row's tokens, its last, are guesses; None: none are."""
    noted: list[Callable[[StandingPlan], object]] = field(default_factory=list)
    """Operations, to be done again over guesses that stand."""

    def rows(self) -> Iterator[StateRow]:
        for row, slot in enumerate(self.slots.tolist()):
            first, end = int(self.query_start[row]), int(self.query_start[row + 1])
            begins = not self.first_positions[row] or slot == NO_SLOT
            stores = [(each.num_tokens, each.slot) for each in self.kept if each.row == row]
            if slot != NO_SLOT:
                stores.append((end - first - self._num_guesses_of(row), slot))
            yield StateRow(slice(first, end), slot, begins, stores)

    def _num_guesses_of(self, row: int) -> int:
        return 0 if self.num_guesses is None else int(self.num_guesses[row])

    def note(self, operation: Callable[..., object], *by_token: Tensor) -> None:
        """`operation`, which was done over `by_token`, [≥ T, ...] each, and this plan: takes such
        tensors and a plan. Of them the guesses' rows are kept, if there are any."""
        if self.num_guesses is not None:
            ends = self.query_start[1:].tolist()
            places = [
                place
                for end, count in zip(ends, self.num_guesses.tolist(), strict=True)
                for place in range(end - count, end)
            ]
            self.noted.append(partial(operation, *(each[places] for each in by_token)))

    def settle(self, num_standing: Ints) -> None:
        """Takes each row's slot through those of its guesses that stand, [R] of them."""
        if self.num_guesses is None:
            return
        ends = np.cumsum(self.num_guesses)
        rows = np.flatnonzero(num_standing)
        starts = ends[rows] - self.num_guesses[rows]
        for operation in self.noted:
            operation(StandingPlan(starts, num_standing[rows], self.slots[rows]))
        self.noted.clear()


@dataclass(frozen=True, slots=True)
class StandingPlan:
    """As `StatePlan`, of guesses that stand, among those that were noted. All int64 [R]."""

    starts: Ints
    num_tokens: Ints
    slots: Ints

    def rows(self) -> Iterator[StateRow]:
        columns = (self.starts, self.num_tokens, self.slots)
        for start, count, slot in zip(*(each.tolist() for each in columns), strict=True):
            yield StateRow(slice(start, start + count), slot, False, [(count, slot)])

    def note(self, operation: Callable[..., object], *by_token: Tensor) -> None:
        """Nothing of it is a guess any more."""


@dataclass(frozen=True, slots=True)
class DeviceStatePlan:
    """B rows of one token and guesses, padding among both; then the tokens of other rows, cut into
    tiles; then padding. No shape and no address here depends on what the first B rows are: their
    part of a step may be a graph."""

    slots: Tensor
    """int64 [≥ B · width]: by token of these rows; NO_SLOT for padding."""
    positions: Tensor
    """int32 [≥ B · width]: of these tokens; a row whose first is at 0 begins with zeros."""
    num_singles: int
    """B · width"""
    rows: Tensor | None = None
    """int32 [R, 8]: of each other row its first token, its number of tokens, its slot, whether it
    begins with zeros (1, or 0), its first tile, its number of tiles; two unused. None: there are
    no others."""
    tiles: Tensor | None = None
    """int32 [N, 4]: first token, number of tokens (1 to TILE_TOKENS), row, and the slot that the
    state behind its last token goes to beside the row's, or NO_SLOT; in the order of tokens."""
    num_padding: int = 0
    """How many of the step's tokens, at the end, are in no row."""
    has_kept: bool = False
    """Some tile may name a slot."""
    shared: dict[tuple[int, ...], Tensor] | None = None
    """By shape, where what comes out of an operation goes, layer after layer, of a step from a
    graph. Such a step has as many rows and tiles as there may be at most: padding among the first B
    rows has the places of others' tokens, and there are `NO_ROW` and `NO_TILE`. Nothing comes out
    for tokens in no row: they keep the zeros that were there. None: to new memory."""
    width: int = 1
    """Tokens of each of the first rows, the first of which is no guess."""
    num_standing: Tensor | None = None
    """int32 [B]: so many of each row's tokens stand, the first among them, and its slot is behind
    that one; 0 or 1: it stays there. Nothing comes out."""
    noted: list[Callable[[DeviceStatePlan], object]] = field(default_factory=list)
    """As of `StatePlan`."""

    @property
    def num_rows(self) -> int:
        """B"""
        return self.num_singles // self.width

    def make_out(self, x: Tensor, *shape: int) -> Tensor:
        """[T, *shape], of x's dtype, for what comes out of x [T, …]."""
        if self.shared is None:
            return x.new_empty(len(x), *shape)
        if shape not in self.shared:
            self.shared[shape] = x.new_zeros(len(x), *shape)
        return self.shared[shape]

    def note(self, operation: Callable[..., object], *by_token: Tensor) -> None:
        """As of `StatePlan`. The tensors stay: of a step that has more than such rows, a copy of
        what is theirs."""
        if self.width > 1:
            own = [each[: self.num_singles] for each in by_token]
            if self.rows is not None:
                own = [each.clone() for each in own]
            self.noted.append(partial(operation, *own))

    def settle(self, num_standing: Tensor) -> None:
        """Takes each row's slot through those of its guesses that stand. `num_standing`: as of the
        attribute; on the device, so that nobody waits for it."""
        standing = replace(
            self, num_standing=num_standing, rows=None, tiles=None, num_padding=0, noted=[]
        )
        for operation in self.noted:
            operation(standing)
        self.noted.clear()


def state_tiles(
    starts: Sequence[int],
    first_positions: Sequence[int],
    slots: Sequence[int],
    kept: Sequence[Kept] = (),
) -> tuple[Int32s, Int32s]:
    """Rows [R, 8] and tiles [N, 4] of `DeviceStatePlan`.

    Args:
        starts: [R + 1], ascending: tokens starts[i] … starts[i + 1] − 1 are row i's.
        first_positions, slots: [R]; what is in NO_SLOT begins with zeros.
        kept: as of `StatePlan`.
    """
    rows = np.zeros((len(slots), ROW_FIELDS), np.int32)
    tiles: list[tuple[int, int, int, int]] = []
    for row, (slot, position) in enumerate(zip(slots, first_positions, strict=True)):
        first, num_tokens = starts[row], starts[row + 1] - starts[row]
        first_tile = len(tiles)
        for start, stop, kept_in in _cuts(num_tokens, row, kept, TILE_TOKENS):
            tiles.append((first + start, stop - start, row, kept_in))
        begins = not position or slot == NO_SLOT
        rows[row, :6] = first, num_tokens, slot, begins, first_tile, len(tiles) - first_tile
    return rows, np.array(tiles, np.int32).reshape(-1, TILE_FIELDS)


def _cuts(
    num_tokens: int, row: int, kept: Sequence[Kept], most: int
) -> Iterator[tuple[int, int, int]]:
    """(start, stop, slot) of stretches of a row, of `most` tokens, or up to where one is kept."""
    ends = {each.num_tokens: each.slot for each in kept if each.row == row}
    start = 0
    for end in sorted({*ends, num_tokens}):
        for first in range(start, end, most):
            stop = min(first + most, end)
            yield first, stop, ends.get(stop, NO_SLOT)
        start = end
