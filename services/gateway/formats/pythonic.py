"""Calls as Python writes them, which are the whole answer (Llama 3.2 and 4):

[weather(city="Ulm", days=3), time()]

They are a call only if they name a tool.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from baton.services.gateway.answer_parts import Content
from baton.services.gateway.formats.calls import Calls
from baton.services.gateway.formats.source import (
    Source,
    Steps,
    literal,
    name_characters,
    spaces,
    texts_before,
)

BEGIN, END = "<|python_start|>", "<|python_end|>"
_CONSTANTS = {"true": True, "false": False, "null": None}
_MAX_WRITTEN = 1 << 14
"""Characters of a call: Python's own parser reads them in one go. Beyond them it is none."""
_OUTSIDE = re.compile(r"""["'()\[\]{}]""")


def steps(source: Source, calls: Calls) -> Steps[None]:
    source.begin_record()
    yield from spaces(source)
    marker = yield from literal(source, BEGIN)
    while True:
        has_calls = yield from _list(source, calls)
        yield from spaces(source)
        is_ended = (yield from literal(source, END)) is not None
        text = source.recorded()
        is_part_of_calls = has_calls and is_ended and marker is not None
        yield Content(text.removesuffix(END).rstrip() if is_part_of_calls else text)
        marker = yield from texts_before(source, BEGIN)
        if marker is None:
            return
        source.begin_record(BEGIN)


def _list(source: Source, calls: Calls) -> Steps[bool]:
    """Whether there were calls. What of the record is no call stays in it."""
    has_calls = False
    yield from spaces(source)
    if (yield from literal(source, "[")) is None:
        return False
    while True:
        yield from spaces(source)
        name = yield from name_characters(source)
        if name not in calls.tools or source.next != "(":
            return has_calls
        written = yield from _bracketed(source)
        arguments = None if written is None else _as_json(written)
        if arguments is None:
            return has_calls
        has_calls = True
        yield calls.begin(name)
        yield calls.arguments(arguments)
        source.begin_record()
        yield from spaces(source)
        if (yield from literal(source, "]")):
            source.begin_record()
            return has_calls
        if (yield from literal(source, ",")) is None:
            return has_calls


def _bracketed(source: Source) -> Steps[str | None]:
    """From `(` to the `)` of the same level. None when the answer ends before, or it is too long:
    as much of it is taken then, however the text was cut."""
    taken: list[str] = []
    room = _MAX_WRITTEN
    depth, quote = 0, ""
    while True:
        text, at = source.text[:room], 0
        while at < len(text):
            found = (re.compile(rf"[{quote}\\]") if quote else _OUTSIDE).search(text, at)
            if found is None:
                at = len(text)
                break
            at, character = found.end(), found[0]
            if character == "\\":
                if at == len(text) < room and not source.is_closed:
                    at -= 1
                    break
                at += 1
            elif quote:
                quote = ""
            elif character in "\"'":
                quote = character
            else:
                depth += 1 if character in "([{" else -1
                if depth <= 0:
                    return "".join([*taken, source.take(at)])
        taken.append(source.take(at))
        room -= len(taken[-1])
        if source.is_closed or not room:
            return None
        yield None


def _as_json(written: str) -> str | None:
    """`(city="Ulm")` → `{"city": "Ulm"}`. None when it is not that."""
    try:
        call = ast.parse(f"f{written}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            return None
        arguments = {each.arg: _value(each.value) for each in call.keywords}
        if None in arguments:
            return None
        return json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> Any:
    """Some write what JSON calls so among what Python does."""
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, ast.List):
        return [_value(each) for each in node.elts]
    if isinstance(node, ast.Dict):
        if None in node.keys:
            raise ValueError("an unpacked dictionary")
        keys = [ast.literal_eval(key) for key in node.keys if key is not None]
        return dict(zip(keys, map(_value, node.values), strict=True))
    return ast.literal_eval(node)
