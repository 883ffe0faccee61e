"""Prompts that are held at the gateway until a worker has room, and whose turn it is.

    with turns.turn() as turn:
        while not (there is room and turn.has_come):
            await turn.hold()

A newcomer goes before those that are late, but before nobody else. `wake` is called whenever there
may be room; it wakes the next one only, so many that wait cost no more than one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from services.gateway.router import next_in_turn


class Turns:
    def __init__(self, late_after_s: float) -> None:
        """Who waits longer than `late_after_s` goes after all others."""
        self._late_after_s = late_after_s
        self._held: dict[Turn, float] = {}
        """Since when they wait, on the monotonic clock."""

    @contextmanager
    def turn(self) -> Iterator[Turn]:
        """Waits from now on, in this order once it is held; at the end the next one is woken."""
        turn = Turn(self, time.monotonic())
        try:
            yield turn
        finally:
            self.leave(turn)

    def hold(self, turn: Turn) -> None:
        self._held[turn] = turn.since_s

    def leave(self, turn: Turn) -> None:
        if self._held.pop(turn, None) is not None:
            self.wake()

    def next_with(self, turn: Turn) -> Turn | None:
        return self._next({**self._held, turn: turn.since_s})

    def wake(self) -> None:
        """There may be room."""
        turn = self._next(self._held)
        if turn is not None:
            turn.wake()

    def _next(self, held: dict[Turn, float]) -> Turn | None:
        return next_in_turn(held, time.monotonic(), self._late_after_s)


class Turn:
    def __init__(self, turns: Turns, since_s: float) -> None:
        self.since_s = since_s
        self._turns = turns
        self._woken = asyncio.Event()

    @property
    def has_come(self) -> bool:
        return self._turns.next_with(self) is self

    async def hold(self) -> None:
        """Until it may be its turn; whose turn it is instead is woken."""
        self._turns.hold(self)
        if not self.has_come:
            self._turns.wake()
        self._woken.clear()
        await self._woken.wait()

    def leave(self) -> None:
        """It waits for something else than room, and keeps nobody waiting."""
        self._turns.leave(self)

    def wake(self) -> None:
        self._woken.set()
