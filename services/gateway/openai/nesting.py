"""How much there may be of what templates walk through: tools, and the arguments of calls.

A template may write each value on a line of its own, with as much space in front as it is deep: of
40 KB it makes 15 MB, in Python, while nothing else runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from baton.services.gateway.openai.errors import InvalidParam

MAX_DEPTH = 64
"""Levels of one tool, or of the arguments of one call."""


class Nesting:
    """What several values have together."""

    def __init__(self, *, max_values: int, max_characters: int | None = None) -> None:
        """`max_values`: of any kind, from whole objects down to single numbers. `max_characters`:
        of all texts and keys."""
        self._max_values = max_values
        self._max_characters = max_characters
        self._num_values = self._num_characters = 0

    def add(self, path: str, value: Any) -> None:
        """Raises InvalidParam, naming `path`, for what is nested too deep, or makes too much of
        them all."""
        level: Sequence[Any] = [value]
        for _ in range(MAX_DEPTH):
            if not level:
                return
            self._num_values += len(level)
            if self._num_values > self._max_values:
                raise _too_much(path, f"{self._num_values} values", self._max_values)
            below: list[Any] = []
            for each in level:
                if isinstance(each, Mapping):
                    self._num_characters += sum(map(len, each))
                    below.extend(each.values())
                elif isinstance(each, list):
                    below.extend(each)
                elif isinstance(each, str):
                    self._num_characters += len(each)
            if self._max_characters is not None and self._num_characters > self._max_characters:
                raise _too_much(path, f"{self._num_characters} characters", self._max_characters)
            level = below
        if level:
            raise InvalidParam(path, f"is nested too deep; limit: {MAX_DEPTH} levels")


def _too_much(path: str, found: str, limit: int) -> InvalidParam:
    return InvalidParam(path, f"makes it {found} in all; limit: {limit}")
