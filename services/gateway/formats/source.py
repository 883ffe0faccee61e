"""Text that arrives in pieces, and how the formats read it.

A format is a generator over a Source: it yields parts, and None whenever it cannot go on before
there is more text. It decides nothing that later text could change, so however the text was cut,
the parts put together are the same.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import groupby
from typing import TypeVar

from baton.services.gateway.answer_parts import Arguments, Content, Part, ToolCall

_T = TypeVar("_T")
Steps = Generator[Part | None, None, _T]
"""None: more text is needed."""

_MAX_NAME = 256
"""Characters of what a format takes for a name. Beyond them it is none."""


class Source:
    def __init__(self) -> None:
        self.is_closed = False
        """No text will follow."""
        self.is_reasoning = False
        """Set by formats: what is read now is thought, not said."""
        self.messages: list[bool] = []
        """Those that formats have found to begin between markers: whether each is reasoning."""
        self._text = ""
        self._record: list[str] | None = None

    def push(self, text: str) -> None:
        self._text += text

    def close(self) -> None:
        self.is_closed = True

    @property
    def next(self) -> str:
        """The next character; empty when none is here."""
        return self._text[:1]

    @property
    def text(self) -> str:
        """What is here and not taken."""
        return self._text

    def take(self, length: int) -> str:
        taken, self._text = self._text[:length], self._text[length:]
        if self._record is not None:
            self._record.append(taken)
        return taken

    def take_before(self, *markers: str, most: int = sys.maxsize) -> tuple[str, str | None]:
        """The text that is certain to come before the first marker, and that one, once it is here;
        both are taken. Of markers that begin at one place the first that is whole counts. `most`:
        so many characters are taken at most, and a marker counts only if it begins before them."""
        if _beginnings(markers).search(self._text) is None:
            # So it is with nearly all tokens.
            return self.take(min(len(self._text), most)), None
        starts = [(start, marker) for marker in markers if (start := self._text.find(marker)) >= 0]
        whole, found = min(starts, default=(len(self._text), None))
        partial = self._partial(markers)
        if found is None or partial < whole or whole >= most:
            return self.take(min(partial, whole, most)), None
        before = self.take(whole)
        self.take(len(found))
        return before, found

    def drop_partial(self, markers: tuple[str, ...]) -> None:
        """Of an answer that has ended within a marker."""
        self._text = self._text[: self._begun(markers)]

    def _partial(self, markers: tuple[str, ...]) -> int:
        """Where a marker may have begun that is not whole yet; the end of the text if none has."""
        return len(self._text) if self.is_closed or not markers else self._begun(markers)

    def _begun(self, markers: tuple[str, ...]) -> int:
        length = len(self._text)
        first = max(0, length - max(map(len, markers)) + 1)
        for found in _beginnings(markers).finditer(self._text, first):
            start = found.start()
            tail = self._text[start:]
            if any(len(tail) < len(marker) and marker.startswith(tail) for marker in markers):
                return start
        return length

    def begin_record(self, taken: str = "") -> None:
        """`taken` and all that is taken from now on is kept, in case that it is no call."""
        self._record = [taken]

    def recorded(self) -> str:
        """All of it; none is kept any more."""
        text = "".join(self._record or ())
        self._record = None
        return text


@lru_cache
def _beginnings(markers: tuple[str, ...]) -> re.Pattern[str]:
    """The first characters of markers; nothing, where there are none."""
    first = "".join(sorted({marker[0] for marker in markers}))
    return re.compile(f"[{re.escape(first)}]" if first else r"(?!)")


def spaces(source: Source) -> Steps[str]:
    """Takes white space up to what is none."""
    taken: list[str] = []
    while True:
        rest = source.text.lstrip()
        taken.append(source.take(len(source.text) - len(rest)))
        if rest or source.is_closed:
            return "".join(taken)
        yield None


def literal(source: Source, *texts: str) -> Steps[str | None]:
    """Takes the first of `texts` that comes next; None, and takes nothing, when none does."""
    while True:
        open_texts = [text for text in texts if text.startswith(source.text[: len(text)])]
        for text in open_texts:
            if source.text.startswith(text):
                source.take(len(text))
                return text
        if not open_texts or source.is_closed:
            return None
        yield None


def texts_before(
    source: Source,
    *markers: str,
    make: Callable[[str], Part] = Content,
    drops_partial: bool = False,
) -> Steps[str | None]:
    """Yields what comes before the first marker, as parts; returns that marker, None at the end.
    `drops_partial`: a marker that the end has cut is no text."""
    while True:
        if source.is_closed and drops_partial:
            source.drop_partial(markers)
        text, marker = source.take_before(*markers)
        if text:
            yield make(text)
        if marker is not None or source.is_closed:
            return marker
        yield None


def short_text_before(
    source: Source, *markers: str, most: int = _MAX_NAME
) -> Steps[tuple[str, str | None]]:
    """What comes before the first marker, and that one. None for the marker: it is too long (for a
    name), or the end."""
    taken = ""
    while True:
        text, marker = source.take_before(*markers, most=most - len(taken))
        taken += text
        if marker is not None or source.is_closed or len(taken) >= most:
            return taken, marker
        yield None


def is_cut(source: Source, *texts: str) -> bool:
    """Whether the answer ends where one of `texts` might have come."""
    return source.is_closed and any(text.startswith(source.text) for text in texts)


def name_characters(source: Source) -> Steps[str]:
    """Takes letters, digits and what else names of tools have in them."""
    name = ""
    while True:
        length, room = 0, min(len(source.text), _MAX_NAME - len(name))
        while length < room and is_name_character(source.text[length]):
            length += 1
        name += source.take(length)
        if source.text or source.is_closed or len(name) >= _MAX_NAME:
            return name
        yield None


def is_name_character(character: str) -> bool:
    return character.isalnum() or character in "_-."


def merged(parts: Iterable[Part]) -> list[Part]:
    """Neighbours of one kind become one."""
    return [_joined(list(same)) for _, same in groupby(parts, _kind)]


def _kind(part: Part) -> tuple[type[Part], int]:
    return type(part), part.index if isinstance(part, ToolCall | Arguments) else 0


def _joined(parts: Sequence[Part]) -> Part:
    first = parts[0]
    if len(parts) == 1 or isinstance(first, ToolCall):
        return first
    text = "".join(part.text for part in parts if not isinstance(part, ToolCall))
    return replace(first, text=text)
