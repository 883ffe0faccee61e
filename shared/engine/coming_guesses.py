"""Guesses that a device is making: who checks them on the device need not wait for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from baton.shared.kv.drawn import drawn_of


@dataclass(slots=True, eq=False)
class DeviceChains:
    """Chains in flight."""

    num_guesses: Sequence[int]
    """By row."""
    guesses: Tensor
    """int32 [steps, stride], by row of a step; nobody else's memory. Below zero where nothing could
    be drawn."""
    tokens: Tensor
    """The same on the host, once `done`."""
    done: torch.cuda.Event | None
    _told: list[list[int]] | None = None

    def wait(self) -> None:
        """Until the device has made them."""
        if self.done is not None:
            self.done.synchronize()

    def told(self) -> list[list[int]]:
        """By row its guesses, below zero where nothing could be drawn. Waits for the device."""
        if self._told is None:
            self.wait()
            steps = self.tokens.tolist()
            self._told = [
                [step[row] for step in steps[:num]] for row, num in enumerate(self.num_guesses)
            ]
        return self._told

    def result(self) -> list[list[int]]:
        """By row its guesses, up to the first that could not be drawn. Waits for the device."""
        return [_drawn(told) for told in self.told()]

    def coming(self) -> list[ComingGuesses]:
        """By row its guesses. Waits for nothing."""
        return [ComingGuesses(self, row, num) for row, num in enumerate(self.num_guesses)]


@dataclass(frozen=True, slots=True, eq=False)
class ComingGuesses(Sequence[int]):
    """The first guesses of a chain: how many is known, and who asks which waits for them. Token 0
    in place of those that could not be drawn, as `take_guesses` has it: masks and bans are made of
    what is seen here, and what stands is found by what was taken there."""

    chains: DeviceChains
    row: int
    num_guesses: int

    def __len__(self) -> int:
        return self.num_guesses

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        if isinstance(index, int):
            return self._taken()[index]
        start, end, step = index.indices(self.num_guesses)
        if end <= start:
            return ()
        if start == 0 and step == 1:
            return ComingGuesses(self.chains, self.row, end)
        return self._taken()[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self._taken())

    def drawn(self) -> list[int]:
        """Those before the first that could not be drawn."""
        return _drawn(self._told())

    def _told(self) -> list[int]:
        return self.chains.told()[self.row][: self.num_guesses]

    def _taken(self) -> tuple[int, ...]:
        return tuple(max(token, 0) for token in self._told())


def take_guesses(taking: Sequence[tuple[int, ComingGuesses]], draft_ids: Tensor) -> None:
    """Puts guesses into slots, where they are drafts, before the host knows them.

    Args:
        taking: (slot, guesses), of one launch of chains, which the stream has waited for.
        draft_ids: int32 [S, K], K no fewer than the guesses that are taken, whatever the chains
            have more; what is behind them may be anything.
    """
    guesses = taking[0][1].chains.guesses[: draft_ids.shape[1]]
    places = torch.tensor([(slot, each.row) for slot, each in taking], dtype=torch.int64)
    if guesses.is_cuda:
        places = places.pin_memory().to(guesses.device, non_blocking=True)
    slots, rows = places.unbind(1)
    taken = guesses.index_select(1, rows).clamp_(min=0)
    draft_ids[:, : len(guesses)].index_copy_(0, slots, taken.T)


def _drawn(tokens: Sequence[int]) -> list[int]:
    """The first of them, as far as something could be drawn."""
    drawn: list[int] = []
    for token in tokens:
        if drawn_of(token).failure is not None:
            break
        drawn.append(token)
    return drawn
