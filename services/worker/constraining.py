"""Constrained sequences: which tokens each draw of a step may give, and what must follow anyway.

    schedule   forced tokens become drafts, which always stand
    launch     a mask for each draw, by the tokens that have been emitted and the drafts before it

A mask depends on every token before it. So a constrained sequence takes part in a step only when
all its earlier steps have been collected (services/decode/scheduler.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq

from baton.services.worker.part import Part
from baton.shared.constraints.matcher import AnswerMatcher
from baton.shared.engine.batch import BatchRow
from baton.shared.kv.sequence import Sequence
from baton.shared.rpc.errors import BatonError, InvalidField
from baton.shared.telemetry import log_event

logger = logging.getLogger(__name__)


class Constraining:
    def __init__(self, most_forced: int, observe: Callable[[float], None] = lambda _: None) -> None:
        """`most_forced`: drafts that a row of one token may have. `observe` is told the seconds
        that the masks of a sequence's part of a step took."""
        self._most_forced = most_forced
        self._observe = observe
        self._failures: dict[Sequence, BatonError] = {}

    def add_forced(
        self, parts: Seq[Part], extend: Callable[[Sequence, int], bool], num_more: int
    ) -> None:
        """Gives decode parts the tokens that must follow as drafts, `num_more` at most in all.

        `extend` finds room for so many tokens of a sequence; without it a part gets none.
        """
        for part in parts:
            matcher = part.sequence.matcher
            if matcher is None or not self._follows(part.sequence, matcher):
                continue
            # What is drawn last is not computed.
            left = part.sequence.num_to_compute - part.end
            forced = matcher.forced(max(0, min(self._most_forced, left, num_more)))
            if forced and extend(part.sequence, part.end + len(forced)):
                part.draft_ids, part.is_forced = forced, True
                part.num_tokens += len(forced)
                num_more -= len(forced)

    def add_masks(self, parts: Seq[Part], rows: Seq[BatchRow]) -> None:
        """To the rows that draw."""
        for part, row in zip(parts, rows, strict=True):
            matcher = part.sequence.matcher
            if matcher is None or row.sampling is None:
                continue
            started_s = time.perf_counter()
            if not self._follows(part.sequence, matcher):
                continue
            try:
                row.masks = matcher.masks(part.draft_ids)
            except BaseException as error:
                self._failed(part.sequence, error)
            self._observe(time.perf_counter() - started_s)

    def failure(self, sequence: Sequence) -> BatonError | None:
        """Why nothing that is drawn for it counts any more."""
        return self._failures.get(sequence)

    def forget(self, sequence: Sequence) -> None:
        self._failures.pop(sequence, None)

    def _follows(self, sequence: Sequence, matcher: AnswerMatcher) -> bool:
        """Whether the matcher could be told what was emitted since."""
        first = sequence.num_prompt_tokens - sequence.first_index
        new = sequence.token_slice(first + matcher.num_taken, sequence.num_tokens)
        try:
            matcher.take(new)
        except BaseException as error:
            self._failed(sequence, error)
        return sequence not in self._failures

    def _failed(self, sequence: Sequence, error: BaseException) -> None:
        """A panic of llguidance, which is no Exception, ends the sequence and not the worker."""
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise error
        if not isinstance(error, BatonError):
            log_event(logger, logging.ERROR, "constraint failed", key=sequence.key, exc_info=error)
            error = InvalidField("constraint", "cannot be followed further", limit="another one")
        self._failures.setdefault(sequence, error)
