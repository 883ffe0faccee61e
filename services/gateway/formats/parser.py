"""An AnswerParser over the generators of the formats."""

from __future__ import annotations

from collections.abc import Sequence

from baton.services.gateway.answer_parts import Arguments, Content, Part, Reasoning, ToolCall
from baton.services.gateway.formats.reasoning_tokens import ReasoningTokens
from baton.services.gateway.formats.source import Source, Steps, merged


class FormatParser:
    def __init__(
        self,
        source: Source,
        steps: Steps[None],
        reasoning_tokens: ReasoningTokens,
        *,
        is_parallel: bool = True,
    ) -> None:
        """`steps` reads `source`. `is_parallel`: else calls after the first are left out."""
        self._reasoning_tokens = reasoning_tokens
        self._source = source
        self._steps = steps
        self._is_parallel = is_parallel
        self._space: list[str] = []
        """What may stand between calls, which is no content then."""
        self._has_calls = False
        self._is_over = False
        # Up to where it needs text: whether the prompt has begun the reasoning is known then.
        self._run()

    @property
    def num_reasoning_tokens(self) -> int:
        return self._reasoning_tokens.number(self._source.messages)

    def feed(self, token_ids: Sequence[int], text: str) -> list[Part]:
        was_reasoning = self._source.is_reasoning
        parts = self._parts_of(text)
        self._reasoning_tokens.add(
            token_ids,
            self._source.messages,
            has_reasoning=was_reasoning or any(isinstance(part, Reasoning) for part in parts),
            is_reasoning=self._source.is_reasoning,
        )
        return parts

    def finish(self, text: str) -> list[Part]:
        self._source.push(text)
        self._source.close()
        parts = self._cleaned([*self._run(), Content(self._source.text)])
        space = "".join(self._space)
        if space and not self._has_calls:
            parts.append(Content(space))
        return merged(parts)

    def _parts_of(self, text: str) -> list[Part]:
        if not text:
            return []
        self._source.push(text)
        return merged(self._cleaned(self._run()))

    def _run(self) -> list[Part]:
        parts: list[Part] = []
        while not self._is_over:
            try:
                part = next(self._steps)
            except StopIteration:
                self._is_over = True
                break
            if part is None:
                break
            parts.append(part)
        return parts

    def _cleaned(self, parts: Sequence[Part]) -> list[Part]:
        """Without white space before and after calls."""
        result: list[Part] = []
        for part in parts:
            match part:
                case Content(text) if not text or text.isspace():
                    self._space.append(text)
                case Content(text):
                    kept = text.rstrip()
                    result.append(Content("".join([*self._space, kept])))
                    self._space = [text[len(kept) :]]
                case ToolCall(index) | Arguments(index):
                    self._space = []
                    self._has_calls = True
                    if (index == 0 or self._is_parallel) and part != Arguments(index, ""):
                        result.append(part)
                case _:
                    result.append(part)
        return result
