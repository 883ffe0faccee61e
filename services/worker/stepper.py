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

from baton.services.decode import scheduler as decode_policy
from baton.services.prefill import scheduler as prefill_policy
from baton.services.prefill.pacing import Pacing
from baton.services.worker.failpoints import Failpoints
from baton.services.worker.sealing import StepSums
from baton.services.worker.sequence_table import SequenceTable
from baton.shared.engine.batch import Batch, BatchRow, RowHandle
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.steps import Step
from baton.shared.kv.block_pool import BlockPool
from baton.shared.kv.sequence import Sequence, SequenceState
from baton.shared.rpc.errors import EngineFailure
from baton.shared.telemetry import log_event

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepLimits:
    """`token_budget` tokens and `max_num_seqs` rows per step, prompt chunks and decode rows.

    `tpot_goal_s`: prompts wait while streams get their tokens more slowly than that, on average.
    """

    token_budget: int
    max_num_seqs: int
    tpot_goal_s: float | None = None


@dataclass(slots=True)
class Work:
    """A sequence's part of a step: `num_tokens` tokens from position `start` on."""

    sequence: Sequence
    start: int
    num_tokens: int
    sums: StepSums | None = None
    """Of the blocks that a chunk fills; for the last one of a prompt, of those before as well."""

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def is_chunk(self) -> bool:
        """Of a prompt; else one token of a sequence that decodes."""
        return self.start < self.sequence.num_prompt_tokens

    def row(self, handle: RowHandle) -> BatchRow:
        """Draws a token when the part reaches the end of what is known of the sequence."""
        sequence, start = self.sequence, self.start
        end, num_known = self.end, sequence.num_tokens
        return BatchRow(
            sequence.token_slice(start, end) if end <= num_known else None,
            start,
            sequence.block_tables,
            sequence.params if end >= num_known else None,
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
    chunks: list[Work] = field(default_factory=list)
    """Those of the parts that are chunks of prompts."""
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
        self.pacing = Pacing(limits.tpot_goal_s)
        self._handles: dict[Sequence, RowHandle] = {}

    def plan(
        self, preempt: Callable[[Sequence], None], blocks_are_coming: Callable[[], bool]
    ) -> list[Work]:
        """A token for each running sequence, then chunks of prompts, as far as the limits go.

        `preempt` ends a sequence for good and gives its blocks back, when no step that is in flight
        may write to them any more; `blocks_are_coming` says whether such are awaited.
        """
        decoding = self._plan_decode(preempt, blocks_are_coming)
        work = [Work(sequence, sequence.num_scheduled_tokens, 1) for sequence in decoding]
        prefilling = self._table.in_state(SequenceState.PREFILLING)
        if prefilling and self.pacing.may_take_chunks(time.monotonic(), num_decoding=len(decoding)):
            work += self._plan_chunks(prefilling, decoding)
        return work

    def _plan_chunks(self, prefilling: list[Sequence], decoding: list[Sequence]) -> list[Work]:
        """What the step has room for beside those that decode."""
        num_to_open = sum(sequence not in self._handles for sequence in decoding)
        chunks = prefill_policy.plan_chunks(
            prefilling,
            # However many decode, prompts go on by a block at least.
            token_budget=max(self._limits.token_budget - len(decoding), self._pool.block_size),
            max_rows=min(
                self._limits.max_num_seqs - len(decoding), self._runner.num_free_rows - num_to_open
            ),
            block_size=self._pool.block_size,
        )
        return [
            Work(chunk.sequence, chunk.sequence.num_scheduled_tokens, chunk.num_tokens)
            for chunk in chunks
        ]

    def _plan_decode(
        self, preempt: Callable[[Sequence], None], blocks_are_coming: Callable[[], bool]
    ) -> list[Sequence]:
        """The running sequences of this step, each with room for its token."""
        block_size, max_rows = self._pool.block_size, self._limits.max_num_seqs
        running = decode_policy.running(self._table.decode_hosted())
        rows = running[:max_rows]
        while decode_policy.is_short_of_blocks(running, self._pool.num_free, block_size):
            victim = None
            if not self._pool.num_quarantined and not blocks_are_coming():
                victim = decode_policy.choose_victim(self._table.growing())
            if victim is None:
                rows = decode_policy.plan_rows(
                    running,
                    num_free_blocks=self._pool.num_free,
                    max_rows=max_rows,
                    block_size=block_size,
                )
                break
            preempt(victim)
            running = decode_policy.running(self._table.decode_hosted())
            rows = running[:max_rows]
        for sequence in decode_policy.lacking_blocks(rows, block_size):
            for table in sequence.block_tables:
                table.extend(self._pool.allocate(1))
        return rows

    def launch(self, work: list[Work]) -> StepInFlight:
        """Starts a step of all parts in one batch."""
        self._failpoints.before_step()
        started_s = time.monotonic()
        step = None
        try:
            step = self._runner.launch(Batch(self._rows(work)))
        except Exception:
            log_event(
                logger,
                logging.ERROR,
                "step failed, trying its rows one by one",
                exc_info=True,
                num_rows=len(work),
            )
            self._runner.check_device()
        for part in work:
            part.sequence.num_scheduled_tokens += part.num_tokens
            part.sequence.num_steps_in_flight += 1
        chunks = [part for part in work if part.is_chunk]
        return StepInFlight(work, step, started_s, chunks)

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

    def forget(self, sequence: Sequence) -> None:
        """It takes part in no further step."""
        handle = self._handles.pop(sequence, None)
        if handle is not None:
            self._runner.close_row(handle)

    def _alone(self, part: Work) -> Drawn:
        if not part.sequence.block_tables:
            return None
        try:
            token = self._runner.forward(Batch(self._rows([part])))[0]
        except Exception as error:
            log_event(
                logger, logging.ERROR, "row failed alone", key=part.sequence.key, exc_info=True
            )
            self._runner.check_device()
            return EngineFailure(f"the engine failed: {type(error).__name__}")
        if token is not None and token < 0:
            return EngineFailure("the logits were not numbers")
        return token

    def _rows(self, work: list[Work]) -> list[BatchRow]:
        handles = self._handles
        return [part.row(handles.get(part.sequence) or self._open(part.sequence)) for part in work]

    def _open(self, sequence: Sequence) -> RowHandle:
        handle = self._runner.open_row(sequence.params, sequence.key.sample)
        self._handles[sequence] = handle
        return handle
