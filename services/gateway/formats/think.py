"""Reasoning between tags, at the beginning of an answer:

<think>
The sky is blue since ...
</think>

Blue.
"""

from __future__ import annotations

from typing import NamedTuple

from baton.services.gateway.answer_parts import Content, Reasoning
from baton.services.gateway.formats.source import Source, Steps, literal, spaces


class Tags(NamedTuple):
    begin: str
    end: str

    def are_open(self, prompt: str) -> bool:
        """Whether the template has begun the reasoning already."""
        return prompt.rstrip().endswith(self.begin)


def steps(source: Source, tags: Tags, *, is_open: bool) -> Steps[None]:
    """Reads what comes before the answer proper. White space around reasoning is no part of it."""
    source.is_reasoning = is_open
    space = yield from spaces(source)
    # Some repeat what the prompt has.
    if (yield from literal(source, tags.begin)) is None and not is_open:
        if space:
            yield Content(space)
        return
    source.messages.append(True)
    source.is_reasoning = True
    yield from spaces(source)
    held: list[str] = []
    while True:
        text, end = source.take_before(tags.end)
        if text.isspace():
            held.append(text)
        elif text:
            thought = text.rstrip()
            yield Reasoning("".join([*held, thought]))
            held = [text[len(thought) :]]
        if end is not None:
            break
        if source.is_closed:
            return
        yield None
    source.is_reasoning = False
    yield from spaces(source)
