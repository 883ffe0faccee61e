"""What of a sequence changes its logits before a token is drawn: penalties, biases and bans.

All of it is a function of the request, the tokens of its prompt and those emitted since, whoever
emitted them: a new attempt finds the same.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.kernels.reference_logit_shaping import BANNED, FINAL, PROMPTED, shape_logits
from baton.shared.sampling import BANNING_BIAS, SamplingParams

Int32s = npt.NDArray[np.int32]


class History(Protocol):
    """A sequence's tokens; `Sequence` is one."""

    @property
    def num_asked_tokens(self) -> int:
        """Of the client's prompt; those behind them were emitted."""

    @property
    def banned_sequences(self) -> Sequence[tuple[int, ...]]:
        """The last token of each is not drawn behind the others, where those were emitted."""

    def token_slice(self, start: int, end: int) -> Sequence[int]:
        """Those at positions start … end − 1."""


@dataclass(frozen=True, slots=True)
class KnownTokens:
    """A history that is all there."""

    token_ids: Sequence[int]
    num_asked_tokens: int
    banned_sequences: Sequence[tuple[int, ...]] = ()

    def token_slice(self, start: int, end: int) -> Sequence[int]:
        return self.token_ids[start:end]


class Shaping:
    """
    Attributes:
        presence, frequency, repetition: the penalties.
        biases: (token, what is added to its logit); bans are not among them.
        may_end_at: position from which on a token may be drawn that ends the answer.
        counts_from: position of the answer's first token.
        has_bans: whether a token is ruled out by itself, wherever it would come.
    """

    def __init__(
        self, params: SamplingParams, history: History, final_token_ids: Collection[int]
    ) -> None:
        """`final_token_ids`: the model's end-of-sequence tokens."""
        self.presence = params.presence_penalty
        self.frequency = params.frequency_penalty
        self.repetition = params.repetition_penalty
        self.biases = [
            (token_id, bias)
            for token_id, bias in params.logit_bias
            if bias != BANNING_BIAS and bias != 0
        ]
        self.counts_from = history.num_asked_tokens
        self.may_end_at = self.counts_from + params.min_tokens
        self._history = history
        self._allowed = sorted(params.allowed_token_ids)
        self._banned = [token_id for token_id, bias in params.logit_bias if bias == BANNING_BIAS]
        self._banned += [each[0] for each in history.banned_sequences if len(each) == 1]
        self._final = [*final_token_ids, *params.stop_token_ids] if params.min_tokens else []
        self.has_bans = bool(self._allowed or self._banned or self._final)
        self._longer: dict[int, list[tuple[int, ...]]] = {}
        """Banned sequences of several tokens, by the last but one of them."""
        for each in history.banned_sequences:
            if len(each) > 1:
                self._longer.setdefault(each[-2], []).append(each)
        self._longest = max((len(each) for each in history.banned_sequences), default=0)
        self._marks: Int32s | None = None
        self._marked_to = 0

    @classmethod
    def of(
        cls,
        params: SamplingParams | None,
        history: History | None,
        final_token_ids: Collection[int],
    ) -> Shaping | None:
        """None where nothing changes; ValueError for something without a history."""
        banned_sequences = () if history is None else history.banned_sequences
        if params is None or not (shapes_logits(params) or banned_sequences):
            return None
        if history is None:
            raise ValueError("a row whose tokens have a say needs its history")
        return cls(params, history, final_token_ids)

    @property
    def counts_tokens(self) -> bool:
        """Whether it matters what was emitted."""
        return self.presence != 0 or self.frequency != 0 or self.repetition != 1

    @property
    def needs_last_tokens(self) -> bool:
        """Whether a token is banned by those just before it."""
        return bool(self._longer)

    def marks(self, vocab_size: int, end: int) -> Int32s:
        """int32 [vocab], as reference_logit_shaping has them, with what was emitted before position
        `end`. The next call changes it."""
        if self._marks is None or end < self._marked_to:
            self._marks, self._marked_to = self._begun(vocab_size), self.counts_from
        self._count(self._marks, self._marked_to, end)
        self._marked_to = max(end, self.counts_from)
        return self._marks

    def fresh_marks(self, vocab_size: int, end: int) -> Int32s:
        """`marks`, of which nothing is kept."""
        marks = self._begun(vocab_size)
        self._count(marks, self.counts_from, end)
        return marks

    def _count(self, marks: Int32s, start: int, end: int) -> None:
        if self.counts_tokens and end > start:
            np.add.at(marks, np.array(self._history.token_slice(start, end), np.int64), 1)

    def _begun(self, vocab_size: int) -> Int32s:
        """Before the first token of the answer."""
        marks = np.full(vocab_size, BANNED if self._allowed else 0, np.int32)
        marks[self._allowed] = 0
        marks[self._banned] |= BANNED
        marks[self._final] |= FINAL
        if self.repetition != 1:
            marks[list(self._history.token_slice(0, self.counts_from))] |= PROMPTED
        return marks

    def banned_behind(self, end: int, drafts: Sequence[int]) -> list[int]:
        """Tokens that would complete a banned sequence, behind position `end` − 1 and drafts."""
        if not self._longer:
            return []
        start = max(self.counts_from, end - self._longest)
        emitted = (*self._history.token_slice(start, end), *drafts)
        last = emitted[-1] if emitted else -1
        return [
            each[-1]
            for each in self._longer.get(last, ())
            if len(emitted) >= len(each) - 1 and emitted[1 - len(each) :] == each[:-1]
        ]


def apply_shaping(logits: Tensor, shaping: Shaping, end: int, drafts: Sequence[int]) -> None:
    """Changes a row of logits, float32 [vocab], as the tokens before position `end`, and drafts
    behind them, say."""
    marks = torch.from_numpy(shaping.marks(len(logits), end)).to(logits.device)
    if drafts and shaping.counts_tokens:
        marks = marks.clone()
        for draft in drafts:
            marks[draft] += 1
    biases = None
    if shaping.biases:
        tokens, numbers = zip(*shaping.biases, strict=True)
        biases = (
            torch.tensor(tokens, device=logits.device),
            torch.tensor(numbers, dtype=torch.float32, device=logits.device),
        )
    shape_logits(
        logits,
        marks,
        presence=shaping.presence,
        frequency=shaping.frequency,
        repetition=shaping.repetition,
        biases=biases,
        banned=shaping.banned_behind(end, drafts),
        may_end=end + len(drafts) >= shaping.may_end_at,
        has_bans=shaping.has_bans,
    )


def shapes_logits(params: SamplingParams) -> bool:
    return bool(
        params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1
        or params.min_tokens
        or params.logit_bias
        or params.allowed_token_ids
    )
