"""Llama 3 and its kin: the whole answer, or what follows a marker, is an object; several stand in a
row, with semicolons between them.

<|python_tag|>{"name": "weather", "parameters": {"city": "Ulm"}}
<|python_start|>{"name": "weather", "parameters": {"city": "Ulm"}}<|python_end|>        (Llama 4)
"""

from __future__ import annotations

from baton.services.gateway.answer_parts import Content
from baton.services.gateway.formats.calls import Calls
from baton.services.gateway.formats.json_text import call_object
from baton.services.gateway.formats.source import Source, Steps, literal, spaces, texts_before

TAG = "<|python_tag|>"
BEGIN, END = "<|python_start|>", "<|python_end|>"


def steps(source: Source, calls: Calls) -> Steps[None]:
    source.begin_record()
    marker: str | None = ""
    while marker is not None:
        yield from spaces(source)
        has_calls = False
        while source.next == "{" and (
            yield from call_object(source, calls, TAG, BEGIN, END, is_marked=marker != "")
        ):
            has_calls = True
            yield from spaces(source)
            if (yield from literal(source, ";")):
                yield from spaces(source)
        if has_calls and marker == BEGIN and (yield from literal(source, END)):
            source.begin_record()
        yield Content(source.recorded())
        marker = yield from texts_before(source, TAG, BEGIN)
        source.begin_record(marker or "")
