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
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor

from baton.services.decode import chains
from baton.services.decode.chains import ChainDrafter, Guessing
from baton.shared.engine.batch import BatchRow, ChainRow
from baton.shared.engine.draft_model import MOST_LOOSE, MOST_PENDING, DraftModel
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
    num_pending: int = 0
    """Tokens of them."""
    num_loose: int = 0
    """Of the last of them, whose states lie in memory that is their step's."""
    last: _Seen | None = None
    """The last token that was computed, if nothing was seen since."""
    features: Tensor | None = None
    """[n, hidden]: what comes with the first of the pending tokens, or with the next guess."""

    @property
    def num_new(self) -> int:
        return self.num_pending

    def can_begin(self) -> bool:
        """Where it was told of the sequence's last token. It is computed again where nothing came
        behind it."""
        if not self.pending and self.last is not None:
            self._append(self.last)
            self.num_computed -= 1
        return bool(self.pending) and self.pending[-1].end == self.sequence.num_tokens

    def settle(self) -> None:
        self.guesses, self.coming = [], None

    def saw(self, seen: _Seen) -> None:
        """A long chunk waits whole until as much as may wait has come behind it."""
        self._append(seen)
        self.num_loose += 1
        self.last = None
        while self.num_pending - len(self.pending[0].states) >= MOST_PENDING:
            self.num_pending -= len(self.pending.popleft().states)
        if len(self.pending[0].states) <= MOST_PENDING:
            self.keep(MOST_PENDING)

    def keep(self, most: int) -> None:
        """The last so many of the pending tokens."""
        while self.num_pending > most:
            seen, num_over = self.pending.popleft(), self.num_pending - most
            if len(seen.states) > num_over:
                rest = _Seen(seen.first + num_over, seen.states[num_over:])
                self.pending.appendleft(rest)
            self.num_pending -= min(num_over, len(seen.states))

    def gather(self, join: Callable[[Seq[Tensor]], Tensor]) -> None:
        """What is pending gets memory of its own; beside a long chunk, what does not have it."""
        is_long = self.num_pending > MOST_PENDING
        num_last = min(self.num_loose, len(self.pending)) if is_long else len(self.pending)
        runs: list[list[_Seen]] = []
        for seen in [*self.pending][len(self.pending) - num_last :]:
            if not runs or runs[-1][-1].end != seen.first:
                runs.append([])
            runs[-1].append(seen)
        joined = [_Seen(run[0].first, join([seen.states for seen in run])) for run in runs]
        for _ in range(num_last):
            self.pending.pop()
        self.pending.extend(joined)
        self.num_loose = 0

    def first_states(self, num_tokens: int) -> list[Tensor]:
        """Of the first so many of the pending tokens."""
        found: list[Tensor] = []
        for seen in self.pending:
            if num_tokens <= 0:
                break
            found.append(seen.states[:num_tokens])
            num_tokens -= len(seen.states)
        return found

    def _append(self, seen: _Seen) -> None:
        self.pending.append(seen)
        self.num_pending += len(seen.states)

    def take(self, num_tokens: int) -> list[int]:
        """The first of the pending tokens; they are pending no more."""
        taken: list[int] = []
        self.num_pending -= num_tokens
        while len(taken) < num_tokens:
            seen = self.pending.popleft()
            count = min(num_tokens - len(taken), len(seen.states))
            taken += self.sequence.token_slice(seen.first, seen.first + count)
            self.last = _Seen(seen.first + count - 1, seen.states[count - 1 : count])
            if count < len(seen.states):
                self.pending.appendleft(_Seen(seen.first + count, seen.states[count:]))
        self.num_loose = min(self.num_loose, len(self.pending))
        return taken


class HeadDrafter(ChainDrafter[_Following]):
    def __init__(self, model: DraftModel) -> None:
        super().__init__(model)
        self._most_pending = model.max_rows * MOST_PENDING

    def saw(self, sequence: Sequence, position: int, states: Tensor) -> None:
        """What the model made of the sequence's tokens from `position` on, [n, taps · hidden]: each
        comes with the token behind it. EngineFailure: as of `drafts`."""
        known = self._settled(sequence)
        known.saw(_Seen(position + 1, states))
        token_bytes = states.stride(0) * states.element_size()
        num_together = states.untyped_storage().nbytes() // token_bytes
        # Of what others made of the step nothing is kept for long.
        if known.num_loose >= MOST_LOOSE or num_together > self._model.most_decode_tokens:
            with self._computing():
                known.gather(self._model.join)
        if known.num_pending > MOST_PENDING:
            with self._computing():
                self._keep_within_memory()

    def _keep_within_memory(self) -> None:
        """Of the longest chunks that wait only the last tokens do."""
        num_over = sum(each.num_pending for each in self._known.values()) - self._most_pending
        if num_over <= 0:
            return
        for each in sorted(self._known.values(), key=lambda each: -each.num_pending):
            if num_over <= 0 or each.num_pending <= MOST_PENDING:
                break
            num_over -= each.num_pending - MOST_PENDING
            each.keep(MOST_PENDING)
            each.gather(self._model.join)

    def is_behind(self, sequence: Sequence) -> bool:
        known = self._known.get(sequence)
        return known is not None and known.num_pending > chains.FEW

    def _make(self, sequence: Sequence, held: Sequence, params: SamplingParams) -> _Following:
        return _Following(sequence, held, params)

    def _prepare(self, going: Seq[tuple[_Following, int]]) -> None:
        states = [known.first_states(num_tokens) for known, num_tokens in going]
        for (known, _), features in zip(going, self._model.fuse(states), strict=True):
            known.features = features

    def _row(self, known: _Following, num_tokens: int, *, draws: bool) -> BatchRow:
        start, features = known.num_computed, None
        if known.features is not None:
            features, known.features = known.features.tensor_split([num_tokens])
            if not len(known.features):
                known.features = None
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

    def _chain(self, known: _Following, num_guesses: int) -> ChainRow:
        states = known.first_states(known.num_new)
        return replace(super()._chain(known, num_guesses), states=states)

    def _guess_step_by_step(self, guessing: Seq[tuple[_Following, int]]) -> None:
        super()._guess_step_by_step(guessing)
        for known, _ in guessing:
            known.features = None

    def _on_launched(self, going: Seq[_Following], step: Step) -> None:
        for row, known in enumerate(going):
            made = step.taps(row)
            assert made is not None
            known.features = made[-1:]

    def _next_row(self, known: _Following, place: int) -> BatchRow:
        return replace(super()._next_row(known, place), features=known.features)
