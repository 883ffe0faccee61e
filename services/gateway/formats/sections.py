"""Calls between markers of their own, in sections between markers: DeepSeek's and Kimi's."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from baton.services.gateway.answer_parts import Content
from baton.services.gateway.formats.calls import Calls
from baton.services.gateway.formats.source import Source, Steps, literal, spaces, texts_before


class SectionMarkers(NamedTuple):
    all_begin: str
    all_end: str
    begin: str
    end: str


def sections(
    source: Source,
    calls: Calls,
    markers: SectionMarkers,
    call: Callable[[Source, Calls], Steps[bool]],
) -> Steps[None]:
    """`call`: what comes behind `begin`. False when it is none: nothing was yielded, and all of it
    is in the record."""
    all_begin, all_end, begin, end = markers
    marker = yield from texts_before(source, all_begin, begin)
    while marker is not None:
        source.begin_record(marker)
        if marker == all_begin:
            yield from spaces(source)
            marker = yield from literal(source, begin)
        is_call = marker == begin and (yield from call(source, calls))
        yield Content(source.recorded())
        if is_call:
            marker = yield from texts_before(source, end, begin, all_begin, all_end)
            if marker == end:
                marker = yield from texts_before(source, begin, all_begin, all_end)
        if not is_call or marker == all_end:
            marker = yield from texts_before(source, all_begin, begin)
