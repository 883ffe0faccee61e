"""How this model writes its reasoning and its calls of tools, and how its answers are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from baton.services.gateway.answer_parts import PLAIN, AnswerParser, Reading
from baton.services.gateway.formats import harmony, think
from baton.services.gateway.formats.calls import Calls, Tools
from baton.services.gateway.formats.choose import (
    AUTO,
    HARMONY,
    NONE,
    REASONING_TAGS,
    TOOL_FORMATS,
    reasoning_format_of,
    tool_format_of,
)
from baton.services.gateway.formats.parser import FormatParser
from baton.services.gateway.formats.source import Source, Steps, texts_before


@dataclass(frozen=True)
class ChatFormat:
    """`tools` and `reasoning`: names of formats, or `none`."""

    tools: str = NONE
    reasoning: str = NONE
    special_ids: Mapping[str, int] = field(default_factory=dict)
    """Of the tokens that yield no text, by what they are written as."""

    @classmethod
    def choose(
        cls,
        template: str | None,
        special_ids: Mapping[str, int],
        *,
        tools: str = AUTO,
        reasoning: str = AUTO,
    ) -> ChatFormat:
        """`auto`: what the chat template has the signs of."""
        source = template or ""
        return cls(
            tool_format_of(source) if tools == AUTO else tools,
            reasoning_format_of(source) if reasoning == AUTO else reasoning,
            special_ids,
        )

    def reading(self, prompt: str, tools: Tools | None, *, is_parallel: bool = True) -> Reading:
        """Of the answers to `prompt`, as the template gave it. `tools`: those that may be called;
        None when none may."""
        called = tools if tools and self.tools != NONE else {}
        is_harmony = HARMONY in (self.reasoning, self.tools if called else NONE)
        tags = REASONING_TAGS.get(self.reasoning)
        if not called and not is_harmony and tags is None:
            return PLAIN
        is_open = tags is not None and tags.are_open(prompt)

        def new_parser(answer_id: str) -> AnswerParser:
            source, calls = Source(), Calls(called, answer_id)
            return FormatParser(
                source,
                self._steps(source, calls, is_open=is_open),
                is_parallel=is_parallel,
                begin_ids=self._ids(tags.begin if tags else harmony.MESSAGE),
                end_ids=self._ids(tags.end if tags else harmony.END),
            )

        markers = [*(tags or ()), *(harmony.MARKERS if is_harmony else ())]
        if called:
            markers += TOOL_FORMATS[self.tools].markers
        return Reading(new_parser, self._ids(*markers))

    def _steps(self, source: Source, calls: Calls, *, is_open: bool) -> Steps[None]:
        tags = REASONING_TAGS.get(self.reasoning)
        if tags is not None:
            yield from think.steps(source, tags, is_open=is_open)
        if HARMONY in (self.reasoning, self.tools if calls.tools else NONE):
            yield from harmony.steps(source, calls)
        elif calls.tools:
            yield from TOOL_FORMATS[self.tools].steps(source, calls)
        else:
            yield from texts_before(source)

    def _ids(self, *markers: str) -> frozenset[int]:
        known = self.special_ids
        return frozenset(known[marker] for marker in markers if marker in known)
