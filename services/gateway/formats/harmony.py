"""OpenAI's harmony (gpt-oss). An answer is several messages, each with a header:

<|channel|>analysis<|message|>...<|end|>
<|start|>assistant<|channel|>commentary to=functions.weather<|message|>{"city": "Ulm"}<|call|>
<|start|>assistant<|channel|>final<|message|>It rains.<|return|>

The prompt ends within the first header. `analysis` is reasoning, what goes to a function is a call,
and all else is content: what is said in `commentary` is meant for the user.
"""

from __future__ import annotations

import re

from baton.services.gateway.answer_parts import Content, Reasoning
from baton.services.gateway.formats.calls import Calls
from baton.services.gateway.formats.json_text import arguments
from baton.services.gateway.formats.source import (
    Source,
    Steps,
    is_cut,
    literal,
    short_text_before,
    spaces,
    texts_before,
)

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
CONSTRAIN = "<|constrain|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
MARKERS = (START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN)
_ENDS = (END, CALL, RETURN)
MESSAGE_ENDS = (*_ENDS, START)
_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([^\s<]+)")
_FUNCTIONS = "to=functions."
_MAX_HEADER = 512


def steps(source: Source, calls: Calls) -> Steps[None]:
    source.begin_record()
    is_header = yield from _begins_header(source)
    while True:
        header = (yield from _header(source)) if is_header else None
        if header is None:
            yield Content(source.recorded())
            marker = yield from texts_before(source, START, CHANNEL, *_ENDS)
        else:
            marker = yield from _message(source, calls, header)
        while marker in _ENDS:
            # What follows the end of a message begins another.
            yield from spaces(source)
            source.begin_record()
            marker = yield from texts_before(source, START, CHANNEL, *_ENDS)
        if marker is None:
            return
        source.begin_record(marker)
        is_header = True


def _begins_header(source: Source) -> Steps[bool]:
    """Whether the answer goes on with the header that the prompt has begun."""
    beginnings = (CHANNEL, MESSAGE, START, CONSTRAIN, " to=", "to=")
    while True:
        text = source.text
        if any(text.startswith(each) for each in beginnings):
            return True
        if source.is_closed or not any(each.startswith(text) for each in beginnings):
            return False
        yield None


def _header(source: Source) -> Steps[str | None]:
    """What comes before <|message|>; None when that does not come. It is in the record."""
    header, marker = yield from short_text_before(source, MESSAGE, *_ENDS, most=_MAX_HEADER)
    return header if marker == MESSAGE else None


def _message(source: Source, calls: Calls, header: str) -> Steps[str | None]:
    """Returns the marker that ended it."""
    recipient = _RECIPIENT.search(header)
    is_reasoning = "analysis" in header.split(CHANNEL)[-1]
    name = recipient[1].split(CHANNEL)[0] if recipient else ""
    is_call = bool(name and calls.tools and (_FUNCTIONS in header or name in calls.tools))
    is_reasoning = is_reasoning and not is_call
    source.messages.append(is_reasoning)
    if is_call:
        space = yield from spaces(source)
        if source.next == "{":
            yield calls.begin(name)
            yield from arguments(source, calls, *MESSAGE_ENDS)
            source.begin_record()
            yield from spaces(source)
            yield Content(source.recorded())
        elif marker := (yield from literal(source, *MESSAGE_ENDS)):
            yield calls.begin(name)
            yield calls.arguments("{}")
            return marker
        elif is_cut(source, *MESSAGE_ENDS):
            # Whether arguments would have come is not known.
            yield Content(source.recorded())
        else:
            yield Content(space)
    source.recorded()
    source.is_reasoning = is_reasoning
    marker = yield from texts_before(
        source, *MESSAGE_ENDS, make=Reasoning if is_reasoning else Content
    )
    source.is_reasoning = False
    return marker
