"""How many tokens of an answer are reasoning.

Where the markers around messages are single tokens, the n-th that begins one is that of the n-th
message which the format has read: text lags behind tokens, but how the two were cut together does
not matter.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence


class ReasoningTokens:
    def __init__(
        self, begin_ids: Collection[int], end_ids: Collection[int], *, is_open: bool
    ) -> None:
        """`begin_ids`, `end_ids`: the tokens around messages; none where they are spelled by
        several. `is_open`: the prompt has begun the first message."""
        self._begin_ids = frozenset(begin_ids)
        self._end_ids = frozenset(end_ids)
        self._is_exact = bool(self._end_ids and (self._begin_ids or is_open))
        self._lengths = [0] if is_open else []
        """Of the messages that tokens have begun: in tokens, with the one that ends it."""
        self._is_within = is_open
        self._estimate = 0

    def add(
        self,
        token_ids: Sequence[int],
        messages: Sequence[bool],
        *,
        has_reasoning: bool,
        is_reasoning: bool,
    ) -> None:
        """`messages`: those read so far, whether each is reasoning. `has_reasoning`: so is some of
        the text that came with these tokens; `is_reasoning`: so is what comes next."""
        for token_id in token_ids:
            if self._is_within:
                self._lengths[-1] += 1
                self._is_within = token_id not in self._end_ids
            elif token_id in self._begin_ids:
                self._lengths.append(0)
                self._is_within = True
        if has_reasoning:
            self._estimate += len(token_ids)
        if len(messages) > len(self._lengths) or (
            len(messages) == len(self._lengths)
            and messages[-1:] == [True]
            and self._is_within
            and not is_reasoning
        ):
            # What has begun, or ended, in the text has not in the tokens: the marker was spelled.
            self._is_exact = False

    def number(self, messages: Sequence[bool]) -> int:
        """Exact where markers are single tokens; else exact only where tokens came one by one."""
        if not self._is_exact:
            return self._estimate
        numbered = zip(self._lengths, messages, strict=False)
        return sum(length for length, is_reasoning in numbered if is_reasoning)
