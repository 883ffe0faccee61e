"""An AnswerParser over the generators of the formats."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from baton.services.gateway.answer_parts import Arguments, Content, Part, Reasoning, ToolCall
from baton.services.gateway.formats.source import Source, Steps, merged


class FormatParser:
    def __init__(
        self,
        source: Source,
        steps: Steps[None],
        *,
        is_parallel: bool = True,
        begin_ids: Collection[int] = (),
        end_ids: Collection[int] = (),
    ) -> None:
        """`steps` reads `source`. `is_parallel`: else calls after the first are left out.
        `begin_ids`, `end_ids`: the tokens around reasoning, where they are single ones."""
        self.num_reasoning_tokens = 0
        self._source = source
        self._steps = steps
        self._is_parallel = is_parallel
        self._begin_ids = frozenset(begin_ids)
        self._end_ids = frozenset(end_ids)
        self._space: list[str] = []
        """What may stand between calls, which is no content then."""
        self._has_calls = False
        self._is_over = False
        # Up to where it needs text: whether the prompt has begun the reasoning is known then.
        self._run()

    def feed(self, token_ids: Sequence[int], text: str) -> list[Part]:
        was_reasoning = self._source.is_reasoning
        parts = self._parts_of(text)
        self._count(token_ids, was_reasoning, parts)
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

    def _count(self, token_ids: Sequence[int], was_reasoning: bool, parts: list[Part]) -> None:
        """Exact where the tokens around reasoning are single ones, and where tokens come one by
        one."""
        is_reasoning = self._source.is_reasoning
        if (
            not was_reasoning
            and not is_reasoning
            and not any(isinstance(part, Reasoning) for part in parts)
        ):
            return
        begin, end = 0, len(token_ids)
        if not was_reasoning:
            begins = [i for i, token_id in enumerate(token_ids) if token_id in self._begin_ids]
            begin = begins[0] + 1 if begins else end
        if not is_reasoning:
            ends = [i for i, token_id in enumerate(token_ids) if token_id in self._end_ids]
            end = ends[0] + 1 if ends else end
        self.num_reasoning_tokens += max(0, end - begin)
