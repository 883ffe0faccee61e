"""Llama 3 and its kin: the whole answer, or what follows a marker, is an object; several stand in a
row, with semicolons between them.

<|python_tag|>{"name": "weather", "parameters": {"city": "Ulm"}}
"""

from __future__ import annotations

from baton.services.gateway.answer_parts import Content
from baton.services.gateway.formats.calls import Calls
from baton.services.gateway.formats.json_text import call_object
from baton.services.gateway.formats.source import Source, Steps, literal, spaces, texts_before

BEGIN = "<|python_tag|>"


def steps(source: Source, calls: Calls) -> Steps[None]:
    source.begin_record()
    marker: str | None = ""
    while marker is not None:
        yield from spaces(source)
        while source.next == "{" and (
            yield from call_object(source, calls, BEGIN, is_marked=marker == BEGIN)
        ):
            yield from spaces(source)
            if (yield from literal(source, ";")):
                yield from spaces(source)
        yield Content(source.recorded())
        marker = yield from texts_before(source, BEGIN)
        source.begin_record(BEGIN)
