"""DeepSeek V3 and R1; V3.1 leaves out the kind and the fences:

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather
```json
{"city": "Ulm"}
```<｜tool▁call▁end｜><｜tool▁calls▁end｜>

... <｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Ulm"}<｜tool▁call▁end｜> ...
"""

from __future__ import annotations

from baton.services.gateway.formats.calls import Calls
from baton.services.gateway.formats.json_text import arguments
from baton.services.gateway.formats.sections import SectionMarkers, sections
from baton.services.gateway.formats.source import (
    Source,
    Steps,
    literal,
    short_text_before,
    spaces,
)

ALL_BEGIN, ALL_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
BEGIN, SEPARATOR, END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_KIND = "function"
_FENCE = "```"
_MARKERS = SectionMarkers(ALL_BEGIN, ALL_END, BEGIN, END)


def steps(source: Source, calls: Calls) -> Steps[None]:
    return sections(source, calls, _MARKERS, _call)


def _call(source: Source, calls: Calls) -> Steps[bool]:
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
