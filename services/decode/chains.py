"""ChainDrafter: what guesses by a smaller model, or a head, have in common: its rows and its cache.

    drafts     the few tokens that are new ─► a guess ─► its successor ─► … one step of all
               sequences for each place of their chains; on a GPU all of them at once

Noise is a function of seed and place, so the two models draw the same token wherever their chances
are alike. The cache of who guesses holds what it has computed, guesses included: those that did
not stand are written over.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from baton.services.decode.drafters import Draft, Predictions
from baton.shared.engine.batch import BatchRow, ChainRow, RowHandle
from baton.shared.engine.coming_guesses import ComingGuesses, DeviceChains
from baton.shared.engine.draft_model import CHUNK, DraftModel
from baton.shared.engine.executor import Step
from baton.shared.kv.block_pool import PoolExhausted
from baton.shared.kv.pools import Pools
from baton.shared.kv.sequence import BlockTable, Sequence
from baton.shared.rpc.errors import EngineFailure
from baton.shared.sampling import SamplingParams

FEW = 64
"""As many new tokens are computed with a chain; more are caught up with first."""
_CHUNK_BESIDE = 128
"""Tokens that are caught up with before a step for which others wait."""
_STEPS_AHEAD = 3
"""That catch up on a GPU, and are not waited for."""


@dataclass(slots=True, eq=False)
class Guessing(ABC):
    """A sequence, as the drafter knows it."""

    sequence: Sequence
    held: Sequence
    """Stands for it in the pools of who guesses."""
    params: SamplingParams
    """How to draw."""
    num_computed: int = 0
    """Tokens that are in the cache, and were drawn."""
    guesses: list[int] = field(default_factory=list)
    """Those that are in the cache behind them, as if they had been drawn."""
    coming: ComingGuesses | None = None
    """The last chain, where nobody has looked at its guesses yet."""
    handle: RowHandle | None = None

    @property
    def num_asked_tokens(self) -> int:
        return self.sequence.num_asked_tokens

    @property
    def banned_sequences(self) -> Seq[tuple[int, ...]]:
        return self.sequence.banned_sequences

    def token_slice(self, start: int, end: int) -> Seq[int]:
        """As if the guesses had been drawn."""
        known = self.sequence.num_tokens
        behind = self.guesses[max(0, start - known) : max(0, end - known)]
        return (*self.sequence.token_slice(start, min(end, known)), *behind)

    @property
    def num_cached(self) -> int:
        """Tokens that are in the cache, guesses included."""
        num_coming = 0 if self.coming is None else len(self.coming) - 1
        return self.num_computed + len(self.guesses) + num_coming

    @property
    @abstractmethod
    def num_new(self) -> int:
        """Tokens that are not in the cache, and can be computed."""

    def can_begin(self) -> bool:
        """Whether a chain can: with a token that is new."""
        return self.num_new > 0

    def arrive(self) -> None:
        """Waits for the guesses that are coming."""
        if self.coming is not None:
            # The last one was drawn, and is not in the cache.
            self.guesses = self.coming.drawn()[: len(self.coming) - 1]
            self.coming = None

    @abstractmethod
    def settle(self) -> None:
        """Before a chain, or when more is known: of earlier guesses those that were drawn may count
        as computed; the others are forgotten."""


Known = TypeVar("Known", bound=Guessing)


class ChainDrafter(ABC, Generic[Known]):
    needs_known = True

    def __init__(self, model: DraftModel) -> None:
        self._model = model
        self._pools = Pools(model.groups, model.capacity)
        self._known: dict[Sequence, Known] = {}
        self._predictions = Predictions()
        self._steps_ahead = _STEPS_AHEAD if model.makes_chains else 0
        self._catching_up: deque[Step] = deque()
        self._last_chains: DeviceChains | None = None
        """The last ones, if nothing was launched behind them."""

    @abstractmethod
    def _make(self, sequence: Sequence, held: Sequence, params: SamplingParams) -> Known: ...

    @abstractmethod
    def is_behind(self, sequence: Sequence) -> bool: ...

    @abstractmethod
    def _row(self, known: Known, num_tokens: int, *, draws: bool) -> BatchRow:
        """Of the first of the new tokens."""

    def catch_up(self, sequences: Seq[Sequence], *, others_wait: bool) -> bool:
        rows: list[BatchRow] = []
        # On a GPU fewer tokens would not take less time.
        is_short = others_wait and not self._model.makes_chains
        left = _CHUNK_BESIDE if is_short else CHUNK
        most_rows = min(self._model.max_rows, self._model.executor.num_free_rows)
        going: list[tuple[Known, int]] = []
        for sequence in sequences:
            if len(going) == most_rows:
                break
            known = self._settled(sequence)
            # Something is left to begin a chain with.
            count = min(known.num_new - 1, left)
            if count <= 0 or not self._has_room(known, known.num_computed + count):
                continue
            going.append((known, count))
            left -= count
        with self._computing():
            self._prepare(going)
            for known, count in going:
                rows.append(self._row(known, count, draws=False))
                known.num_computed += count
            if rows:
                self._catch_up(rows)
        return bool(rows)

    def drafts(self, wanted: Seq[tuple[Sequence, int]]) -> list[Draft]:
        drafts = [self._predictions.draft(sequence, most) for sequence, most in wanted]
        guessing: list[tuple[Known, int]] = []
        left = CHUNK
        for (sequence, num_wanted), predicted in zip(wanted, drafts, strict=True):
            if predicted is None and self._can_guess(sequence):
                known = self._settled(sequence)
                most = min(num_wanted, self._model.most_guesses)
                # Of the last guess nothing is computed.
                if (
                    known.can_begin()
                    and not self.is_behind(sequence)
                    and known.num_new - 1 <= left
                    and self._has_room(known, known.num_computed + known.num_new + most - 1)
                ):
                    self._open(known)
                    guessing.append((known, most))
                    # One token of each is what a step of decode rows has anyway.
                    left -= known.num_new - 1
        chains: dict[Sequence, Draft] = {}
        if guessing:
            with self._computing():
                chains = self._guess(guessing)
        return [
            predicted or chains.get(sequence, Draft())
            for (sequence, _), predicted in zip(wanted, drafts, strict=True)
        ]

    def forget(self, sequence: Sequence) -> None:
        self._predictions.forget(sequence)
        known = self._known.pop(sequence, None)
        if known is not None:
            self._pools.release(known.held.block_tables)
            self._close(known)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """What fails within ends no worker, unless the device is in no state to go on."""
        try:
            yield
        except Exception as error:
            self._catching_up.clear()
            self._last_chains = None
            self._model.check_device()
            raise EngineFailure(f"guessing failed: {type(error).__name__}") from error

    def check_integrity(self) -> None:
        """Raises AssertionError with what is wrong."""
        self._pools.check_integrity([known.held.block_tables for known in self._known.values()])

    def _can_guess(self, sequence: Sequence) -> bool:
        """Not where guesses are made before the host knows those that they follow, and cannot say
        what is banned behind them; nor without a place."""
        if self._model.makes_chains and sequence.needs_last_tokens:
            return False
        known = self._known.get(sequence)
        has_place = known is not None and known.handle is not None
        return has_place or self._model.executor.num_free_rows > 0

    def _settled(self, sequence: Sequence) -> Known:
        known = self._known.get(sequence)
        if known is None:
            # Nobody asks what it would say.
            params = replace(sequence.params, logprobs=None, prompt_logprobs=None)
            held = Sequence(sequence.key, (), params)
            held.block_tables = [BlockTable() for _ in self._pools.groups]
            known = self._known[sequence] = self._make(sequence, held, params)
        known.settle()
        if known.handle is not None:
            # What it drew last was a guess: rows that are there say what was drawn.
            known.handle.drawn_at = -1
        return known

    def _has_room(self, known: Known, num_tokens: int) -> bool:
        """Takes it. Nobody yields for a guess."""
        self._pools.give_back_behind(known.held, known.num_computed)
        try:
            self._pools.extend(known.held, num_tokens)
        except PoolExhausted:
            return False
        return True

    def _prepare(self, going: Seq[tuple[Known, int]]) -> None:
        """Before rows of so many new tokens."""

    def _guess(self, guessing: Seq[tuple[Known, int]]) -> dict[Sequence, Draft]:
        """Makes their chains, each of so many guesses."""
        if self._model.makes_chains:
            return self._guess_at_once(guessing)
        self._guess_step_by_step(guessing)
        chains = {known.sequence: Draft(tuple(known.guesses)) for known, _ in guessing}
        for known, _ in guessing:
            # The last one was drawn, and is not in the cache.
            del known.guesses[-1:]
        return chains

    def _guess_at_once(self, guessing: Seq[tuple[Known, int]]) -> dict[Sequence, Draft]:
        """Waits for no guess."""
        self._wait_for_chains()
        self._compute_first([known for known, _ in guessing])
        rows = [self._chain(known, num_guesses) for known, num_guesses in guessing]
        launched = self._last_chains = self._model.launch_chains(rows)
        # When those are done, so is all before them.
        self._catching_up.clear()
        chains: dict[Sequence, Draft] = {}
        for (known, _), coming in zip(guessing, launched.coming(), strict=True):
            known.coming = coming
            chains[known.sequence] = Draft(coming)
        return chains

    def _compute_first(self, guessing: Seq[Known]) -> None:
        """The first of their new tokens, where there are more than chains may begin with."""
        most = self._model.most_known
        over = [(known, known.num_new - most) for known in guessing if known.num_new > most]
        if over:
            self._prepare(over)
            self._catch_up([self._row(known, count, draws=False) for known, count in over])
            for known, count in over:
                known.num_computed += count

    def _guess_step_by_step(self, guessing: Seq[tuple[Known, int]]) -> None:
        self._prepare([(known, known.num_new) for known, _ in guessing])
        going = [known for known, _ in guessing]
        self._draw([self._first_row(known) for known in going], going)
        for place in range(1, max(most for _, most in guessing)):
            going = [
                known for known, most in guessing if most > place and len(known.guesses) == place
            ]
            if not going:
                break
            self._draw([self._next_row(known, place) for known in going], going)

    def _draw(self, rows: Seq[BatchRow], going: Seq[Known]) -> None:
        """What each row draws goes behind the guesses; where nothing could be drawn they end."""
        step = self._model.launch(rows)
        self._on_launched(going, step)
        for known, [drawn] in zip(going, step.result(), strict=True):
            if drawn.failure is None:
                known.guesses.append(drawn.token_id)

    def _on_launched(self, going: Seq[Known], step: Step) -> None:
        """Before what it drew is known."""

    def _wait_for_chains(self) -> None:
        """Few launches may be in flight. The model, which checks guesses, has usually waited."""
        if self._last_chains is not None:
            self._last_chains.wait()
            self._last_chains = None

    def _catch_up(self, rows: Seq[BatchRow]) -> None:
        self._wait_for_chains()
        self._catching_up.append(self._model.launch(rows))
        while len(self._catching_up) > self._steps_ahead:
            self._catching_up.popleft().result()

    def _chain(self, known: Known, num_guesses: int) -> ChainRow:
        return ChainRow(self._first_row(known), num_guesses)

    def _first_row(self, known: Known) -> BatchRow:
        count = known.num_new
        row = self._row(known, count, draws=True)
        known.num_computed += count
        return row

    def _next_row(self, known: Known, place: int) -> BatchRow:
        return BatchRow(
            None,
            known.num_computed + place - 1,
            known.held.block_tables,
            known.params,
            known.sequence.key.sample,
            known.handle,
        )

    def _open(self, known: Known) -> None:
        if known.handle is not None and known.handle.shaping is not None:
            # It has counted guesses that did not stand.
            self._close(known)
        if known.handle is None:
            key = known.sequence.key
            known.handle = self._model.executor.open_row(known.params, key.sample, known)

    def _close(self, known: Known) -> None:
        if known.handle is not None:
            self._model.executor.close_row(known.handle)
            known.handle = None
