"""How this model writes its reasoning and its calls of tools, and how its answers are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain

from baton.services.gateway.answer_parts import PLAIN, AnswerParser, Reading
from baton.services.gateway.formats import harmony, think
from baton.services.gateway.formats.calls import Calls, Tools
from baton.services.gateway.formats.choose import (
    REASONING_TAGS,
    TOOL_FORMATS,
    reasoning_format_of,
    tool_format_of,
)
from baton.services.gateway.formats.constraint import ANSWER_BEGIN, READ_AS, calls_constraint
from baton.services.gateway.formats.parser import FormatParser
from baton.services.gateway.formats.reasoning_tokens import ReasoningTokens
from baton.services.gateway.formats.source import Source, Steps, texts_before
from baton.shared.answer_formats import AUTO, HARMONY, NONE
from baton.v1 import types_pb2

_SWITCH = "enable_thinking"
"""A template that reads it, and has not ended the reasoning, lets the model begin it."""

_AROUND = (harmony.MESSAGE, *harmony.MESSAGE_ENDS, *chain(*REASONING_TAGS.values()))


@dataclass(frozen=True)
class ChatFormat:
    """`tools` and `reasoning`: names of formats, or `none`."""

    tools: str = NONE
    reasoning: str = NONE
    template: str = ""
    """Its Jinja source."""
    special_ids: Mapping[str, int] = field(default_factory=dict)
    """Of the tokens that yield no text, by what they are written as."""
    around_ids: Mapping[str, int] = field(default_factory=dict)
    """Of all tokens that stand around messages, whether they yield text or not, likewise."""

    @classmethod
    def choose(
        cls,
        template: str | None,
        special_ids: Mapping[str, int],
        *,
        token_id: Callable[[str], int | None] = lambda text: None,
        tools: str = AUTO,
        reasoning: str = AUTO,
    ) -> ChatFormat:
        """`token_id`: of the token that is written so, special or not; None: there is none.
        `auto`: what the chat template has the signs of."""
        source = template or ""
        found = {text: token_id(text) for text in _AROUND}
        return cls(
            tool_format_of(source) if tools == AUTO else tools,
            reasoning_format_of(source) if reasoning == AUTO else reasoning,
            source,
            special_ids,
            {text: found_id for text, found_id in found.items() if found_id is not None},
        )

    def constraint(
        self, tools: Tools, *, only_calls: bool, is_parallel: bool
    ) -> types_pb2.Constraint:
        """See `calls_constraint`. `begin_after` is for all constraints of chats."""
        return calls_constraint(
            self.tools, self.template, tools, only_calls=only_calls, is_parallel=is_parallel
        )

    @property
    def answer_begin(self) -> str:
        """What stands before the answer proper, where a constraint begins."""
        return ANSWER_BEGIN if self.reasoning == HARMONY else ""

    def begin_after(self, prompt: str) -> types_pb2.BeginAfter | None:
        """Where what `prompt` is answered with begins, if not at once: behind the reasoning."""
        if self.reasoning == HARMONY:
            return types_pb2.BeginAfter(text=harmony.END)
        tags = REASONING_TAGS.get(self.reasoning)
        if tags is None or prompt.rstrip().endswith(tags.end):
            return None
        is_reasoning = tags.are_open(prompt) or _SWITCH in self.template
        return types_pb2.BeginAfter(text=tags.end) if is_reasoning else None

    def reading(
        self,
        prompt: str,
        tools: Tools,
        *,
        is_parallel: bool = True,
        is_constrained: bool = False,
    ) -> Reading:
        """Of the answers to `prompt`, as the template gave it. `tools`: those that may be called.
        `is_constrained`: calls are written as `constraint` has them."""
        called = tools if self.tools != NONE else {}
        form = READ_AS.get(self.tools, self.tools) if is_constrained else self.tools
        is_harmony = HARMONY in (self.reasoning, self.tools if called else NONE)
        tags = REASONING_TAGS.get(self.reasoning)
        if not called and not is_harmony and tags is None:
            return PLAIN
        is_open = tags is not None and tags.are_open(prompt)

        def new_parser(answer_id: str) -> AnswerParser:
            source, calls = Source(), Calls(called, answer_id)
            reasoning_tokens = ReasoningTokens(
                _ids(self.around_ids, tags.begin if tags else harmony.MESSAGE),
                _ids(self.around_ids, *([tags.end] if tags else harmony.MESSAGE_ENDS)),
                is_open=is_open,
            )
            steps = self._steps(form, source, calls, is_open=is_open)
            return FormatParser(source, steps, reasoning_tokens, is_parallel=is_parallel)

        markers = [*(tags or ()), *(harmony.MARKERS if is_harmony else ())]
        if called:
            markers += TOOL_FORMATS[form].markers
        return Reading(new_parser, _ids(self.special_ids, *markers))

    def _steps(self, form: str, source: Source, calls: Calls, *, is_open: bool) -> Steps[None]:
        tags = REASONING_TAGS.get(self.reasoning)
        if tags is not None:
            yield from think.steps(source, tags, is_open=is_open)
        if HARMONY in (self.reasoning, self.tools if calls.tools else NONE):
            yield from harmony.steps(source, calls)
        elif calls.tools:
            yield from TOOL_FORMATS[form].steps(source, calls)
        else:
            yield from texts_before(source)


def _ids(known: Mapping[str, int], *markers: str) -> frozenset[int]:
    return frozenset(known[marker] for marker in markers if marker in known)


NO_FORMAT = ChatFormat()
