"""Prompts that are held at the gateway until a worker has room, and whose turn it is.

    with turns.turn() as turn:
        while not (there is room and turn.has_come):
            await turn.hold()

A prompt that has just come goes before those that are late, and after all others. `wake` is called
whenever there may be room; it wakes only the one whose turn it is, so that many that wait cost
little more than one.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter

from baton.services.gateway.router import next_in_turn

_since_s = attrgetter("since_s")


class Turns:
    def __init__(self, late_after_s: float) -> None:
        """Those that have waited for longer than `late_after_s` go after all others."""
        self._late_after_s = late_after_s
        self._held: list[Turn] = []
        """Oldest first."""

    @contextmanager
    def turn(self) -> Iterator[Turn]:
        """A turn that counts from now, held or not; when it ends, the next one is woken."""
        turn = Turn(self, time.monotonic())
        try:
            yield turn
        finally:
            self.leave(turn)

    def hold(self, turn: Turn) -> None:
        if not turn.is_held:
            turn.is_held = True
            self._held.insert(bisect_right(self._held, turn.since_s, key=_since_s), turn)

    def leave(self, turn: Turn) -> None:
        if turn.is_held:
            self._let_go(turn)
            self.wake()

    def has_come(self, turn: Turn) -> bool:
        if turn.is_held:
            return self._next() is turn
        self.hold(turn)
        has_come = self._next() is turn
        self._let_go(turn)
        return has_come

    def wake(self) -> None:
        """There may be room."""
        turn = self._next()
        if turn is not None:
            turn.wake()

    def _let_go(self, turn: Turn) -> None:
        turn.is_held = False
        first_as_old = bisect_left(self._held, turn.since_s, key=_since_s)
        del self._held[self._held.index(turn, first_as_old)]

    def _next(self) -> Turn | None:
        return next_in_turn(self._held, _since_s, time.monotonic(), self._late_after_s)


class Turn:
    def __init__(self, turns: Turns, since_s: float) -> None:
        self.since_s = since_s
        """On the monotonic clock."""
        self.is_held = False
        self._turns = turns
        self._woken = asyncio.Event()

    @property
    def has_come(self) -> bool:
        return self._turns.has_come(self)

    async def hold(self) -> None:
        """Waits until its turn may have come. If it is another's turn, that one is woken."""
        self._turns.hold(self)
        # First: if the others have just become late it is this one's turn, and `wake` wakes it.
        self._woken.clear()
        if not self.has_come:
            self._turns.wake()
        await self._woken.wait()

    def leave(self) -> None:
        """It waits for something other than room now: those behind it need not wait for it."""
        self._turns.leave(self)

    def wake(self) -> None:
        self._woken.set()
