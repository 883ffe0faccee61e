"""GLM 4.5 and later:

<tool_call>weather
<arg_key>city</arg_key>
<arg_value>Ulm</arg_value>
</tool_call>
"""

from __future__ import annotations

from baton.services.gateway.answer_parts import Content
from baton.services.gateway.formats.calls import Calls
from baton.services.gateway.formats.source import (
    Source,
    Steps,
    is_cut,
    literal,
    name_characters,
    short_text_before,
    spaces,
    texts_before,
)
from baton.services.gateway.formats.tagged import TaggedArguments

BEGIN, END = "<tool_call>", "</tool_call>"
KEY, KEY_END, VALUE, VALUE_END = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"


def steps(source: Source, calls: Calls) -> Steps[None]:
    while (yield from texts_before(source, BEGIN)) is not None:
        source.begin_record(BEGIN)
        yield from spaces(source)
        name = yield from name_characters(source)
        yield from spaces(source)
        marker = yield from literal(source, KEY, END)
        if not name or marker is None:
            yield Content(source.recorded())
            continue
        yield calls.begin(name)
        arguments = TaggedArguments(calls, name)
        while marker == KEY:
            source.begin_record(KEY)
            key, end = yield from short_text_before(source, KEY_END)
            yield from spaces(source)
            if end is None or (yield from literal(source, VALUE)) is None:
                break
            if not (yield from arguments.value(source, key, VALUE_END)):
                return
            source.begin_record()
            yield from spaces(source)
            marker = yield from literal(source, KEY, END)
        if marker == END:
            source.begin_record()
        if marker == END or not is_cut(source, KEY, VALUE, END):
            yield arguments.end()
        yield Content(source.recorded())
