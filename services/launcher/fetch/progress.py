"""How far it is: one line that changes on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_TERMINAL_EVERY_S = 0.1
_ELSEWHERE_EVERY_S = 5.0


class Progress:
    def __init__(self, name: str) -> None:
        self._name = name
        self._is_terminal = sys.stderr.isatty()

    def say(self, text: str) -> None:
        print(f"baton: {self._name}: {text}", file=sys.stderr, flush=True)

    @contextmanager
    def of(self, what: str, unit: str, scale: float = 1.0) -> Iterator[Callable[[int, int], None]]:
        """Gives what is to be told how much is done, and of how much, in `unit`s of `scale`."""
        every_s = _TERMINAL_EVERY_S if self._is_terminal else _ELSEWHERE_EVERY_S
        started = time.monotonic()
        next_at = started + every_s
        self._write(what)

        def show(done: int, total: int) -> None:
            nonlocal next_at
            if time.monotonic() >= next_at:
                next_at = time.monotonic() + every_s
                done = min(done, total)
                self._write(f"{what}: {done / scale:.0f} of {total / scale:.0f} {unit}")

        try:
            yield show
        finally:
            if self._is_terminal:
                sys.stderr.write("\r\033[K")
        self.say(f"{what} took {time.monotonic() - started:.0f} s")

    def _write(self, text: str) -> None:
        if self._is_terminal:
            sys.stderr.write(f"\r\033[Kbaton: {self._name}: {text}")
            sys.stderr.flush()
        else:
            self.say(text)
