"""Kimi K2, whose ids name the tool and count the calls of a chat:

<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>
{"city": "Ulm"}<|tool_call_end|><|tool_calls_section_end|>
"""

from __future__ import annotations

import re

from baton.services.gateway.formats.calls import Calls
from baton.services.gateway.formats.json_text import arguments
from baton.services.gateway.formats.sections import SectionMarkers, sections
from baton.services.gateway.formats.source import Source, Steps, short_text_before, spaces

ALL_BEGIN, ALL_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
BEGIN, SEPARATOR, END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
_MARKERS = SectionMarkers(ALL_BEGIN, ALL_END, BEGIN, END)
_ID = re.compile(r"(?:functions\.)?(.*?)(?::\d+)?", re.DOTALL)


def named_id(name: str, number: int) -> str:
    """Of a chat's call with that number, from 0: the template writes nothing else of its name."""
    return f"functions.{name}:{number}"


def steps(source: Source, calls: Calls) -> Steps[None]:
    return sections(source, calls, _MARKERS, _call)


def _call(source: Source, calls: Calls) -> Steps[bool]:
    head, marker = yield from short_text_before(source, SEPARATOR, END)
    found = _ID.fullmatch(head.strip())
    name = found[1] if found else ""
    if marker != SEPARATOR:
        return False
    yield from spaces(source)
    if not name or source.next != "{":
        return False
    yield calls.begin(name)
    yield from arguments(source, calls, END)
    source.begin_record()
    return True
