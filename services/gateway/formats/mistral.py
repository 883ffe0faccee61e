"""Mistral, in two forms, of which the first is the older:

[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Ulm"}}]
[TOOL_CALLS]weather[ARGS]{"city": "Ulm"}[TOOL_CALLS]time[CALL_ID]123456789[ARGS]{}
"""

from __future__ import annotations

from baton.services.gateway.answer_parts import Content
from baton.services.gateway.formats.calls import Calls
from baton.services.gateway.formats.json_text import arguments, call_objects
from baton.services.gateway.formats.source import (
    Source,
    Steps,
    literal,
    name_characters,
    spaces,
    texts_before,
)

BEGIN, CALL_ID, ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"


def steps(source: Source, calls: Calls) -> Steps[None]:
    while (yield from texts_before(source, BEGIN)) is not None:
        source.begin_record(BEGIN)
        yield from spaces(source)
        if source.next in ("[", "{"):
            yield from call_objects(source, calls, BEGIN)
        else:
            yield from _named(source, calls)
        yield Content(source.recorded())


def _named(source: Source, calls: Calls) -> Steps[None]:
    name = yield from name_characters(source)
    if (yield from literal(source, CALL_ID)):
        # Ours is another.
        yield from name_characters(source)
    yield from literal(source, ARGUMENTS)
    yield from spaces(source)
    if name and source.next == "{":
        yield calls.begin(name)
        yield from arguments(source, calls, BEGIN)
        source.begin_record()
