"""Qwen3-Coder:

<tool_call>
<function=weather>
<parameter=city>
Ulm
</parameter>
</function>
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
    short_text_before,
    spaces,
    texts_before,
)
from baton.services.gateway.formats.tagged import TaggedArguments

BEGIN, END = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
KEY, KEY_END = "<parameter=", "</parameter>"


def steps(source: Source, calls: Calls) -> Steps[None]:
    # The outer tags are forgotten at times.
    while marker := (yield from texts_before(source, BEGIN, FUNCTION)):
        source.begin_record(marker)
        is_marked = marker == BEGIN
        if is_marked:
            yield from spaces(source)
            marker = yield from literal(source, FUNCTION)
        name, end = "", None
        if marker is not None:
            name, end = yield from short_text_before(source, ">", "\n")
        name = name.strip()
        if end != ">" or not name or not (is_marked or name in calls.tools):
            yield Content(source.recorded())
            continue
        space = yield from spaces(source)
        marker = yield from literal(source, KEY, FUNCTION_END)
        if marker is None and not is_marked:
            # The tag is spoken of.
            yield Content(source.recorded())
            continue
        yield calls.begin(name)
        arguments = TaggedArguments(calls, name)
        source.begin_record("" if marker else space)
        while marker == KEY:
            source.begin_record(KEY)
            key, end = yield from short_text_before(source, ">", "\n")
            if end != ">":
                break
            yield from literal(source, "\n")
            if not (yield from arguments.value(source, key.strip(), "\n" + KEY_END, KEY_END)):
                return
            source.begin_record()
            yield from spaces(source)
            marker = yield from literal(source, KEY, FUNCTION_END)
        if marker == FUNCTION_END:
            source.begin_record()
            yield arguments.end()
            yield from spaces(source)
            yield from literal(source, END)
        elif not is_cut(source, KEY, FUNCTION_END):
            yield arguments.end()
        yield Content(source.recorded().removesuffix(END))
