"""Reading JSON that a model writes, while it is written.

What is read is copied, not parsed: a deep value costs no more than a flat one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from baton.services.gateway.answer_parts import Content
from baton.services.gateway.formats.calls import Calls
from baton.services.gateway.formats.source import Source, Steps, literal, spaces

_IN_STRING = re.compile(r'["\\]')
_ATOM = re.compile(r"[-+.\w]*")
_ARGUMENTS = ("arguments", "parameters")
_OTHER_KEYS: dict[str, Callable[[str], bool]] = {
    "type": lambda value: value == '"function"',
    "id": lambda value: value.startswith('"'),
}
"""What a call may have besides → whether a value says nothing more than that."""


def call_object(source: Source, calls: Calls, *ends: str, is_marked: bool = True) -> Steps[bool]:
    """A call as an object with `name` and `arguments` or `parameters`, whose `{` comes next.

    False when it is none: nothing was yielded, and all of it is in the record. Else the record
    begins after it. `ends`: markers that no call goes beyond. What is not marked as a call is one
    only if it names a tool, gives arguments, and has nothing else: it is held until it is whole.
    """
    source.take(1)
    name: str | None = None
    held: str | None = None
    has_begun = has_arguments = False
    yield from spaces(source)
    while True:
        is_end = source.next != '"'
        key = yield from _string(source)
        yield from spaces(source)
        if is_end or key is None or (yield from literal(source, ":")) is None:
            if not is_end and not has_begun:
                return False
            break
        yield from spaces(source)
        if has_begun:
            yield from _whole_value(source, *ends)
        elif key == "name":
            name = yield from _string(source)
            if not name or not (is_marked or name in calls.tools):
                return False
        elif key in _ARGUMENTS and is_marked and name is not None and source.next == "{":
            yield calls.begin(name)
            yield from arguments(source, calls, *ends)
            has_begun = True
            source.begin_record()
        elif key in _ARGUMENTS and (is_marked or not has_arguments):
            has_arguments = True
            held = yield from _whole_arguments(source, *ends)
            if held is None:
                return False
        elif is_marked or key in _OTHER_KEYS:
            value = yield from _whole_value(source, *ends)
            if not is_marked and not _OTHER_KEYS[key](value):
                return False
        else:
            return False
        if is_marked and name and held and not has_begun:
            yield calls.begin(name)
            yield calls.arguments(held)
            has_begun = True
            source.begin_record()
        yield from spaces(source)
        if (yield from literal(source, ",")) is None:
            break
        yield from spaces(source)
    is_whole = (yield from literal(source, "}")) is not None
    if has_begun and not is_whole:
        yield Content(source.recorded())
    elif name and is_whole and not has_begun and (is_marked or held):
        yield calls.begin(name)
        yield calls.arguments(held or "{}")
        has_begun = True
    if has_begun:
        source.begin_record()
    return has_begun


def call_objects(source: Source, calls: Calls, *ends: str) -> Steps[None]:
    """One call or a list of them, marked as such. What of the record is no call stays in it."""
    is_list = (yield from literal(source, "[")) is not None
    yield from spaces(source)
    while source.next == "{" and (yield from call_object(source, calls, *ends)):
        yield from spaces(source)
        if is_list and (yield from literal(source, "]")):
            source.begin_record()
            return
        if (yield from literal(source, ",")) is None:
            return
        yield from spaces(source)


def arguments(source: Source, calls: Calls, *ends: str) -> Steps[None]:
    """Of the call that has begun, whose `{` comes next."""
    value = _Value(ends)
    while True:
        text, is_whole = value.take(source)
        if text:
            yield calls.arguments(text)
        if is_whole:
            return
        yield None


def _whole_arguments(source: Source, *ends: str) -> Steps[str | None]:
    """An object, or one within a string; null and an empty string are an empty one. None for all
    else."""
    if source.next == "{":
        return (yield from _whole_value(source, *ends))
    if source.next == '"':
        text = yield from _string(source)
        if text is None or (text.strip() and not text.lstrip().startswith("{")):
            return None
        return text if text.strip() else "{}"
    return "{}" if (yield from literal(source, "null")) else None


def _whole_value(source: Source, *ends: str) -> Steps[str]:
    """Any value; empty where none comes next."""
    if source.next == '"':
        return json.dumps((yield from _string(source)))
    taken: list[str] = []
    value = _Value(ends) if source.next in ("{", "[") else None
    while True:
        if value is not None:
            text, is_whole = value.take(source)
        else:
            match = _ATOM.match(source.text)
            text = source.take(match.end() if match else 0)
            is_whole = bool(source.text) or source.is_closed
        taken.append(text)
        if is_whole:
            return "".join(taken)
        yield None


def _string(source: Source) -> Steps[str | None]:
    """None, and nothing is taken, where no string comes next; None for one that is cut or wrong."""
    if source.next != '"':
        return None
    pieces = [source.take(1)]
    while True:
        text = source.text
        found = _IN_STRING.search(text)
        if found is None:
            pieces.append(source.take(len(text)))
        elif found[0] == '"':
            pieces.append(source.take(found.end()))
            break
        elif found.end() < len(text):
            pieces.append(source.take(found.end() + 1))
            continue
        if source.is_closed:
            return None
        yield None
    try:
        parsed = json.loads("".join(pieces), strict=False)
    except ValueError:
        return None
    return parsed if isinstance(parsed, str) else None


class _Value:
    """Where an object or a list ends that comes in pieces."""

    def __init__(self, ends: tuple[str, ...]) -> None:
        """`ends`: markers before which it ends in any case, unless they stand within a string."""
        self._ends = ends
        self._longest = max(map(len, ends), default=0)
        first = "".join(sorted({end[0] for end in ends}))
        self._outside = re.compile("[" + re.escape('"{}[]' + first) + "]")
        self._depth = 0
        self._is_in_string = False

    def take(self, source: Source) -> tuple[str, bool]:
        """What of it is here, and whether that is all."""
        text, at = source.text, 0
        while True:
            found = (_IN_STRING if self._is_in_string else self._outside).search(text, at)
            if found is None:
                return source.take(len(text)), source.is_closed
            at, character = found.end(), found[0]
            if self._is_in_string:
                if character == '"':
                    self._is_in_string = False
                elif at < len(text):
                    at += 1
                elif not source.is_closed:
                    # What is escaped is not here yet.
                    return source.take(at - 1), False
                continue
            tail = text[found.start() :][: self._longest]
            if any(tail.startswith(end) for end in self._ends):
                return source.take(found.start()), True
            if not source.is_closed and any(end.startswith(tail) for end in self._ends):
                return source.take(found.start()), False
            if character == '"':
                self._is_in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return source.take(at), True
