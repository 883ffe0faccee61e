"""Hermes, Qwen and many others:

<tool_call>
{"name": "weather", "arguments": {"city": "Ulm"}}
</tool_call>
"""

from __future__ import annotations

from baton.services.gateway.answer_parts import Content
from baton.services.gateway.formats.calls import Calls
from baton.services.gateway.formats.json_text import call_object
from baton.services.gateway.formats.source import Source, Steps, spaces, texts_before

BEGIN, END = "<tool_call>", "</tool_call>"


def steps(source: Source, calls: Calls) -> Steps[None]:
    marker = yield from texts_before(source, BEGIN)
    while marker is not None:
        source.begin_record(BEGIN)
        yield from spaces(source)
        is_call = False
        # Some write several objects between the markers.
        while source.next == "{" and (yield from call_object(source, calls, END)):
            is_call = True
            yield from spaces(source)
        yield Content(source.recorded())
        if is_call:
            marker = yield from texts_before(source, BEGIN, END)
        if not is_call or marker == END:
            marker = yield from texts_before(source, BEGIN)
