"""DeepSeek V3 and R1; V3.1 leaves out the kind and the fences:

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather
```json
{"city": "Ulm"}
```<｜tool▁call▁end｜><｜tool▁calls▁end｜>

... <｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Ulm"}<｜tool▁call▁end｜> ...
"""

from __future__ import annotations

from baton.services.gateway.answer_parts import Content
from baton.services.gateway.formats.calls import Calls
from baton.services.gateway.formats.json_text import arguments
from baton.services.gateway.formats.source import (
    Source,
    Steps,
    literal,
    short_text_before,
    spaces,
    texts_before,
)

ALL_BEGIN, ALL_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
BEGIN, SEPARATOR, END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_KIND = "function"
_FENCE = "```"


def steps(source: Source, calls: Calls) -> Steps[None]:
    marker = yield from texts_before(source, ALL_BEGIN, BEGIN)
    while marker is not None:
        source.begin_record(marker)
        if marker == ALL_BEGIN:
            yield from spaces(source)
            marker = yield from literal(source, BEGIN)
        is_call = marker == BEGIN and (yield from _call(source, calls))
        yield Content(source.recorded())
        if is_call:
            marker = yield from texts_before(source, END, BEGIN, ALL_BEGIN, ALL_END)
            if marker == END:
                marker = yield from texts_before(source, BEGIN, ALL_BEGIN, ALL_END)
        if not is_call or marker == ALL_END:
            marker = yield from texts_before(source, ALL_BEGIN, BEGIN)


def _call(source: Source, calls: Calls) -> Steps[bool]:
    """False when it is none: nothing was yielded, and all of it is in the record."""
    head, marker = yield from short_text_before(source, SEPARATOR, END)
    name = head.strip()
    if marker != SEPARATOR:
        return False
    yield from spaces(source)
    is_fenced = name == _KIND and source.next != "{"
    if is_fenced:
        head, marker = yield from short_text_before(source, "\n", END)
        name = head.strip()
        if marker != "\n":
            return False
        yield from spaces(source)
        yield from literal(source, _FENCE + "json")
        yield from spaces(source)
    if not name or source.next != "{":
        return False
    yield calls.begin(name)
    yield from arguments(source, calls, END)
    source.begin_record()
    if is_fenced:
        yield from spaces(source)
        if (yield from literal(source, _FENCE)):
            source.begin_record()
    return True
