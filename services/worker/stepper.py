"""One engine step: which sequences take part, their blocks, and the model's forward pass.

A step is launched, and its result is collected later: on a GPU the next one is launched before, so
that the device never waits for the host. What a sequence draws in a step in flight is on the
device already; the host plans with `num_scheduled_tokens` and learns the token afterwards.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from services.decode import scheduler as decode_policy
from services.prefill import scheduler as prefill_policy
from services.worker.failpoints import Failpoints
from services.worker.sequence_table import SequenceTable
from shared.engine.batch import Batch, BatchRow, RowHandle
from shared.engine.model_runner import ModelRunner
from shared.engine.steps import Step
from shared.kv.block_pool import BlockPool
from shared.kv.sequence import AttemptKey, Sequence, SequenceState
from shared.rpc.errors import EngineFailure

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepLimits:
    """`token_budget` tokens and `max_num_seqs` rows per step, prompt chunks and decode rows."""

    token_budget: int
    max_num_seqs: int


@dataclass(slots=True)
class Work:
    """A sequence's part of a step: `num_tokens` tokens from position `start` on."""

    sequence: Sequence
    start: int
    num_tokens: int

    def row(self, handle: RowHandle) -> BatchRow:
        """Draws a token when the part reaches the end of what is known of the sequence."""
        sequence, end = self.sequence, self.start + self.num_tokens
        is_known = end <= sequence.num_tokens
        return BatchRow(
            sequence.token_slice(self.start, end) if is_known else None,
            self.start,
            sequence.block_tables,
            sequence.params if end >= sequence.num_tokens else None,
            sequence.key.sample,
            handle,
        )


@dataclass(slots=True)
class StepInFlight:
    """A step whose result was not taken yet."""

    work: list[Work]
    step: Step | None
    """None: it could not be launched; its parts are tried one by one."""
    started_s: float
    orphans: list[list[int]] = field(default_factory=list)
    """Block tables of sequences that ended meanwhile: the step may still write to them."""


Drawn = int | EngineFailure | None


class Stepper:
    def __init__(
        self,
        runner: ModelRunner,
        pool: BlockPool,
        table: SequenceTable,
        limits: StepLimits,
        failpoints: Failpoints,
    ) -> None:
        self._runner = runner
        self._pool = pool
        self._table = table
        self._limits = limits
        self._failpoints = failpoints
        self._handles: dict[AttemptKey, RowHandle] = {}

    def plan(
        self, preempt: Callable[[Sequence], None], blocks_are_coming: Callable[[], bool]
    ) -> list[Work]:
        """A token for each running sequence, then chunks of prompts, as far as the limits go.

        `preempt` ends a sequence for good and gives its blocks back, when no step that is in flight
        may write to them any more; `blocks_are_coming` says whether such are awaited.
        """
        decoding = self._plan_decode(preempt, blocks_are_coming)
        num_open = sum(sequence.key not in self._handles for sequence in decoding)
        chunks = prefill_policy.plan_chunks(
            self._table.in_state(SequenceState.PREFILLING),
            # However many decode, prompts go on by a block at least.
            token_budget=max(self._limits.token_budget - len(decoding), self._pool.block_size),
            max_rows=min(
                self._limits.max_num_seqs - len(decoding), self._runner.num_free_rows - num_open
            ),
            block_size=self._pool.block_size,
        )
        work = [Work(sequence, sequence.num_scheduled_tokens, 1) for sequence in decoding]
        work += [
            Work(chunk.sequence, chunk.sequence.num_scheduled_tokens, chunk.num_tokens)
            for chunk in chunks
        ]
        return work

    def _plan_decode(
        self, preempt: Callable[[Sequence], None], blocks_are_coming: Callable[[], bool]
    ) -> list[Sequence]:
        """The running sequences of this step, each with room for its token."""
        block_size = self._pool.block_size
        running = self._running()
        while decode_policy.is_short_of_blocks(running, self._pool.num_free, block_size):
            if self._pool.num_quarantined or blocks_are_coming():
                break
            victim = decode_policy.choose_victim(self._table.growing())
            if victim is None:
                break
            preempt(victim)
            running = self._running()
        rows = decode_policy.plan_rows(
            running,
            num_free_blocks=self._pool.num_free,
            max_rows=self._limits.max_num_seqs,
            block_size=block_size,
        )
        for sequence in rows:
            for table in sequence.block_tables:
                if len(table) * block_size <= sequence.num_scheduled_tokens:
                    table.extend(self._pool.allocate(1))
        return rows

    def _running(self) -> list[Sequence]:
        return [
            sequence
            for sequence in self._table.all()
            if self._table.slot(sequence.key) is not None and decode_policy.is_running(sequence)
        ]

    def launch(self, work: list[Work]) -> StepInFlight:
        """Starts a step of all parts in one batch."""
        self._failpoints.before_step()
        started_s = time.monotonic()
        step = None
        try:
            step = self._runner.launch(Batch([part.row(self._handle(part)) for part in work]))
        except Exception:
            logger.exception("a step of %d rows failed; trying them one by one", len(work))
            self._runner.check_device()
        for part in work:
            part.sequence.num_scheduled_tokens += part.num_tokens
            part.sequence.num_steps_in_flight += 1
        return StepInFlight(work, step, started_s)

    def collect(self, in_flight: StepInFlight) -> Seq[Drawn]:
        """The token that each part drew, None where it drew none, or why it could not.

        The steps before it have been collected. Parts of a step that failed are computed here, one
        by one, so that no sequence stops another.
        """
        for part in in_flight.work:
            part.sequence.num_steps_in_flight -= 1
        if in_flight.step is None:
            return [self._alone(part) for part in in_flight.work]
        return [
            token if token is None or token >= 0 else EngineFailure("the logits were not numbers")
            for token in in_flight.step.result()
        ]

    def forget(self, key: AttemptKey) -> None:
        """The sequence takes part in no further step."""
        handle = self._handles.pop(key, None)
        if handle is not None:
            self._runner.close_row(handle)

    def _alone(self, part: Work) -> Drawn:
        if not part.sequence.block_tables:
            return None
        try:
            token = self._runner.forward(Batch([part.row(self._handle(part))]))[0]
        except Exception as error:
            logger.exception("%s failed alone", part.sequence.key)
            self._runner.check_device()
            return EngineFailure(f"the engine failed: {type(error).__name__}")
        if token is not None and token < 0:
            return EngineFailure("the logits were not numbers")
        return token

    def _handle(self, part: Work) -> RowHandle:
        sequence = part.sequence
        handle = self._handles.get(sequence.key)
        if handle is None:
            handle = self._runner.open_row(sequence.params, sequence.key.sample)
            self._handles[sequence.key] = handle
        return handle
