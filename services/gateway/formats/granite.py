"""Granite 3:

<|tool_call|>[{"name": "weather", "arguments": {"city": "Ulm"}}]

Later ones write the marker as `<tool_call>`, whatever their template says.
"""

from __future__ import annotations

from baton.services.gateway.answer_parts import Content
from baton.services.gateway.formats.calls import Calls
from baton.services.gateway.formats.json_text import call_objects
from baton.services.gateway.formats.source import Source, Steps, spaces, texts_before

BEGIN, TEXT_BEGIN = "<|tool_call|>", "<tool_call>"


def steps(source: Source, calls: Calls) -> Steps[None]:
    while (marker := (yield from texts_before(source, BEGIN, TEXT_BEGIN))) is not None:
        source.begin_record(marker)
        yield from spaces(source)
        yield from call_objects(source, calls, BEGIN, TEXT_BEGIN)
        yield Content(source.recorded())
