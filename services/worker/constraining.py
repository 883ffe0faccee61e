"""Constrained sequences: which tokens each draw of a step may give, and what must follow anyway.

    schedule   forced tokens become drafts, which always stand ─► other drafts ─► a mask for each
               draw, by the tokens that have been emitted and the drafts before it
    draw       masks of those whose last token was drawn by a step in flight, which has been
               collected since: their forward pass runs meanwhile

A mask depends on every token before it. Where the engine checks drafts, a constrained sequence
takes part in a step only when all its earlier steps have been collected, for what must follow is
known only then (services/decode/scheduler.py).

What grammars take of a step is bounded: sequences beyond that sit it out, or draw what does not
count where their step has begun, and come first in the next one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager

from baton.services.worker.part import Part
from baton.shared.constraints.matcher import AnswerMatcher, TokenNotAllowed
from baton.shared.kv.sequence import Sequence
from baton.shared.rpc.errors import BatonError, EngineFailure, InvalidField
from baton.shared.telemetry import log_event
from baton.shared.token_masks import TokenMasks

logger = logging.getLogger(__name__)

_STEP_S = 0.05


class Constraining:
    def __init__(
        self,
        most_forced: int,
        observe: Callable[[float], None] = lambda _: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`most_forced`: drafts that a row of one token may have. `observe` is told the seconds
        that a sequence's part of a step took here."""
        self.most_forced = most_forced
        self._observe = observe
        self._clock = clock
        self._failures: dict[Sequence, BatonError] = {}
        self._waiting: dict[Sequence, None] = {}
        """Those that sat a step out, the longest wait first."""
        self._left_s = 0.0
        self._num_made = 0
        """Masks of this step, by sequence."""
        self._taken_s: dict[Sequence, float] = {}

    def add_forced(
        self,
        parts: Seq[Part],
        extend: Callable[[Sequence, int], bool],
        num_more: int,
        edge: int | None = None,
    ) -> None:
        """Begins a step. Gives decode parts the tokens that must follow as drafts, `num_more` at
        most in all.

        `extend` finds room for so many tokens of a sequence; without it a part gets none. No part
        goes beyond the next multiple of `edge`.
        """
        self._left_s, self._taken_s, self._num_made = _STEP_S, {}, 0
        for part, matcher in self._in_turn(parts):
            if self._left_s <= 0:
                return
            with self._charged(part.sequence):
                if not self._follows(part.sequence, matcher):
                    continue
                # What is drawn last is not computed.
                left = part.sequence.num_to_compute - part.end
                if edge is not None:
                    left = min(left, -part.end % edge)
                forced = matcher.forced(max(0, min(self.most_forced, left, num_more)))
            if forced and extend(part.sequence, part.end + len(forced)):
                part.draft_ids, part.is_forced = forced, True
                part.num_tokens += len(forced)
                num_more -= len(forced)

    def num_allowed(self, sequence: Sequence, token_ids: Seq[int]) -> int:
        """How many of these guesses may be drawn, one after the other; none where grammars have
        taken of the step what they may."""
        matcher = sequence.matcher
        if matcher is None:
            return len(token_ids)
        if self._left_s <= 0:
            return 0
        # A device may be making them: to wait for it takes none of the grammars' time.
        known = tuple(token_ids)
        with self._charged(sequence):
            return matcher.num_allowed(known)

    def add_masks(self, parts: Seq[Part]) -> list[Part]:
        """To those that draw, but for those that await theirs. Returns the parts without those that
        sit the step out; where any is constrained, one of them at least does not, unless it has
        much to follow yet."""
        for part in parts:
            if part.sequence.matcher is not None and part.follows_unknown:
                part.awaits_mask = True
        out = {part.sequence for part in self._unserved(parts)}
        return [part for part in parts if part.sequence not in out] if out else list(parts)

    def add_awaited_masks(self, parts: Seq[Part]) -> list[Part]:
        """To those that await theirs, when all steps before have been collected. Returns those for
        which grammars had no time left in the step: they are void."""
        awaiting = [part for part in parts if part.awaits_mask]
        for part in awaiting:
            part.awaits_mask = False
        void = self._unserved([part for part in awaiting if part.sequence.is_admitted])
        for part in void:
            part.is_void = True
        return void

    def _unserved(self, parts: Seq[Part]) -> list[Part]:
        """Makes masks; returns those for whose there was no time."""
        unserved = []
        for part, matcher in self._in_turn(parts):
            sequence = part.sequence
            is_served = False
            if self._left_s > 0 or not self._num_made:
                with self._charged(sequence):
                    is_served = self._serve(part, matcher)
            if is_served:
                self._num_made += 1
                self._waiting.pop(sequence, None)
                self._observe(self._taken_s[sequence])
            else:
                unserved.append(part)
                self._waiting.setdefault(sequence)
        return unserved

    def _in_turn(self, parts: Seq[Part]) -> list[tuple[Part, AnswerMatcher]]:
        """The constrained parts that draw behind what is known, those that have waited first."""
        found = [
            (part, part.sequence.matcher)
            for part in parts
            if part.sequence.matcher is not None and part.draws and not part.follows_unknown
        ]
        if self._waiting:
            turns = {sequence: turn for turn, sequence in enumerate(self._waiting)}
            found.sort(key=lambda each: turns.get(each[0].sequence, len(turns)))
        return found

    @contextmanager
    def _charged(self, sequence: Sequence) -> Iterator[None]:
        started_s = self._clock()
        try:
            yield
        finally:
            taken_s = self._clock() - started_s
            self._left_s -= taken_s
            self._taken_s[sequence] = self._taken_s.get(sequence, 0.0) + taken_s

    def _serve(self, part: Part, matcher: AnswerMatcher) -> bool:
        """Whether it is known what the part may draw, or that it has failed."""
        try:
            part.masks = self._masks(part, matcher)
        except BaseException as error:
            self._failed(part.sequence, error)
        return part.masks is not None or part.sequence in self._failures

    def _masks(self, part: Part, matcher: AnswerMatcher) -> TokenMasks | None:
        """None while there is more to follow."""
        if not self._follows(part.sequence, matcher):
            return None
        try:
            return matcher.masks(part.draft_ids)
        except BaseException as error:
            if not part.draft_ids or isinstance(error, KeyboardInterrupt | SystemExit):
                raise
        # Whatever was guessed, the answer is the same: what fails behind a draft is nothing yet.
        part.drop_drafts()
        matcher.restart()
        return matcher.masks() if self._follows(part.sequence, matcher) else None

    @property
    def has_failures(self) -> bool:
        """Whether there is one of any sequence."""
        return bool(self._failures)

    def failure(self, sequence: Sequence) -> BatonError | None:
        """Why nothing that is drawn for it counts any more."""
        return self._failures.get(sequence)

    def forget(self, sequence: Sequence) -> None:
        self._failures.pop(sequence, None)
        self._waiting.pop(sequence, None)

    def _follows(self, sequence: Sequence, matcher: AnswerMatcher) -> bool:
        """Whether the matcher could be told all that was emitted since; after a restart it may take
        several steps."""
        first = sequence.num_prompt_tokens - sequence.first_index
        new = sequence.token_slice(first + matcher.num_taken, sequence.num_tokens)
        give_up_at = self._clock() + _STEP_S
        try:
            for token_id in new:
                if self._clock() > give_up_at:
                    return False
                matcher.take((token_id,))
        except BaseException as error:
            self._failed(sequence, error)
        return sequence not in self._failures

    def _failed(self, sequence: Sequence, error: BaseException) -> None:
        """A panic of llguidance, which is no Exception, ends the sequence and not the worker."""
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise error
        if isinstance(error, TokenNotAllowed):
            # Drawn here, under a mask: what the client brought was followed before.
            error = EngineFailure(f"tokens that were drawn {error}")
        if not isinstance(error, BatonError):
            log_event(logger, logging.ERROR, "constraint failed", key=sequence.key, exc_info=error)
            error = InvalidField("constraint", "cannot be followed further", limit="another one")
        self._failures.setdefault(sequence, error)
