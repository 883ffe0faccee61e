"""What a role writes, with its name in front.

While a role starts, its lines are held back for a few seconds: when it turns out to be
misconfigured, its last line is the launcher's message, and no worker repeats it. A line that says
why the role gives up waits for its end, however long a busy machine takes for that.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

_HOLD_S = 3.0
_LAST_WORD = re.compile(r"baton \w+: ")
"""As workers and gateways begin the line in which they give up."""


class RoleLog:
    def __init__(self, name: str, emit: Callable[[str], None]) -> None:
        self._name = name
        self._emit = emit
        self._held: list[str] | None = []
        self._timer: asyncio.TimerHandle | None = None
        self._last = ""

    def write(self, line: str) -> None:
        self._last = line or self._last
        if self._held is None:
            self._emit(f"[{self._name}] {line}")
            return
        self._held.append(line)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_HOLD_S, self._flush_early)

    def hold(self) -> None:
        """From now on each line waits, until `release`."""
        if self._held is None:
            self._held = []

    def release(self) -> None:
        self._flush()
        self._held = None

    def take_last_line(self) -> str:
        """Returns the last line, without the name; lines that are held back are dropped."""
        self._drop()
        return self._last

    def mute(self) -> None:
        """Nothing more is written, nor what is held back now."""
        self._emit = _to_nobody
        self._drop()

    def _drop(self) -> None:
        if self._held is not None:
            self._held.clear()

    def _flush_early(self) -> None:
        last_word = []
        if self._held and _LAST_WORD.match(self._held[-1]):
            last_word.append(self._held.pop())
        self._flush()
        if self._held is not None:
            self._held += last_word

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for line in self._held or ():
            self._emit(f"[{self._name}] {line}")
        self._drop()


def _to_nobody(line: str) -> None:
    pass
