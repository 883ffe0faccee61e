"""HeadDrafter: guesses by a head that reads the model's own hidden states.

    saw        what the model made of tokens that this worker computed, with each step
    drafts     (token, what the model made of the one before it) ─► a guess
               (guess, what the head made of the token before it) ─► the next ─► …

The head's cache is this worker's own, and holds the tokens of which it was told: of a prompt that
was computed elsewhere it knows nothing, and tokens that it missed are left out, those before and
behind them next to each other. That makes guesses worse, and changes no token. What it computed of
guesses is not kept: when they were drawn the model has made something else of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor

from baton.services.decode import chains
from baton.services.decode.chains import ChainDrafter, Guessing
from baton.shared.engine.batch import BatchRow
from baton.shared.engine.draft_model import MOST_PENDING
from baton.shared.engine.executor import Step
from baton.shared.kv.sequence import Sequence
from baton.shared.sampling import SamplingParams


class _Seen(NamedTuple):
    """What came before tokens `first` …, of which the sequence has those that are drawn."""

    first: int
    states: Tensor
    """[n, taps · hidden]"""

    @property
    def end(self) -> int:
        return self.first + len(self.states)


@dataclass(slots=True, eq=False)
class _Following(Guessing):
    """`num_computed`: of those tokens that it was told of."""

    pending: deque[_Seen] = field(default_factory=deque)
    """Not computed yet; in order."""
    last: _Seen | None = None
    """The last token that was computed."""
    features: Tensor | None = None
    """[n, hidden]: what comes with the first of the pending tokens, or with the next guess."""

    @property
    def num_pending(self) -> int:
        return sum(len(each.states) for each in self.pending)

    @property
    def num_new(self) -> int:
        return self.num_pending

    def can_begin(self) -> bool:
        """Where it was told of the sequence's last token. It is computed again where nothing came
        behind it."""
        if not self.pending and self.last is not None:
            self.pending.append(self.last)
            self.num_computed -= 1
        return bool(self.pending) and self.pending[-1].end == self.sequence.num_tokens

    def settle(self) -> None:
        self.guesses = []

    def saw(self, seen: _Seen) -> None:
        self.pending.append(seen)
        while self.num_pending - len(self.pending[0].states) >= MOST_PENDING:
            self.pending.popleft()

    def take(self, num_tokens: int) -> list[int]:
        """The first of the pending tokens; they are pending no more."""
        taken: list[int] = []
        while len(taken) < num_tokens:
            seen = self.pending.popleft()
            count = min(num_tokens - len(taken), len(seen.states))
            taken += self.sequence.token_slice(seen.first, seen.first + count)
            self.last = _Seen(seen.first + count - 1, seen.states[count - 1 : count])
            if count < len(seen.states):
                self.pending.appendleft(_Seen(seen.first + count, seen.states[count:]))
        return taken


class HeadDrafter(ChainDrafter[_Following]):
    def saw(self, sequence: Sequence, position: int, states: Tensor) -> None:
        """What the model made of the sequence's tokens from `position` on, [n, taps · hidden]: each
        comes with the token behind it."""
        self._settled(sequence).saw(_Seen(position + 1, states))

    def is_behind(self, sequence: Sequence) -> bool:
        known = self._known.get(sequence)
        return known is not None and known.num_pending > chains.FEW

    def _make(self, sequence: Sequence, held: Sequence, params: SamplingParams) -> _Following:
        return _Following(sequence, held, params)

    def _prepare(self, guessing: Seq[_Following]) -> None:
        states = [[seen.states for seen in known.pending] for known in guessing]
        for known, features in zip(guessing, self._model.fuse(states), strict=True):
            known.features = features

    def _row(self, known: _Following, num_tokens: int, *, draws: bool) -> BatchRow:
        start = known.num_computed
        assert known.features is not None
        features, known.features = known.features.tensor_split([num_tokens])
        token_ids = known.take(num_tokens)
        if draws and known.handle is not None and known.last is not None:
            known.handle.move(known.last.first - (start + num_tokens - 1))
        return BatchRow(
            token_ids,
            start,
            known.held.block_tables,
            known.params if draws else None,
            known.sequence.key.sample,
            known.handle,
            features=features,
        )

    def _launched(self, going: Seq[_Following], step: Step) -> None:
        for row, known in enumerate(going):
            made = step.taps(row)
            assert made is not None
            known.features = made[-1:]

    def _next_row(self, known: _Following, place: int) -> BatchRow:
        return replace(super()._next_row(known, place), features=known.features)
