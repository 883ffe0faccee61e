"""One engine step: which sequences take part, their blocks, and the model's forward pass."""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from services.decode import scheduler as decode_policy
from services.prefill import scheduler as prefill_policy
from services.worker.failpoints import Failpoints
from services.worker.sequence_table import SequenceTable
from shared.engine.batch import Batch, BatchRow
from shared.engine.model_runner import ModelRunner
from shared.kv.block_pool import BlockPool
from shared.kv.sequence import Sequence, SequenceState
from shared.rpc.errors import EngineFailure

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepLimits:
    """`token_budget` tokens and `max_num_seqs` rows per step, prompt chunks and decode rows."""

    token_budget: int
    max_num_seqs: int


@dataclass(frozen=True, slots=True)
class Work:
    """A sequence's part of a step: its next `num_tokens` tokens."""

    sequence: Sequence
    num_tokens: int

    def row(self) -> BatchRow:
        """Draws a token when the part reaches the end of what is known of the sequence."""
        sequence, start = self.sequence, self.sequence.num_computed_tokens
        end = start + self.num_tokens
        return BatchRow(
            token_ids=sequence.token_slice(start, end),
            position=start,
            block_tables=sequence.block_tables,
            sampling=sequence.params if end == sequence.num_tokens else None,
            sample_index=sequence.key.sample,
        )


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

    def plan(self, preempt: Callable[[Sequence], None]) -> list[Work]:
        """A token for each running sequence, then chunks of prompts, as far as the limits go.

        `preempt` ends a sequence for good and gives its blocks back.
        """
        decoding = self._plan_decode(preempt)
        chunks = prefill_policy.plan_chunks(
            self._table.in_state(SequenceState.PREFILLING),
            # However many decode, prompts go on by a block at least.
            token_budget=max(self._limits.token_budget - len(decoding), self._pool.block_size),
            max_rows=self._limits.max_num_seqs - len(decoding),
            block_size=self._pool.block_size,
        )
        return [Work(sequence, 1) for sequence in decoding] + [
            Work(chunk.sequence, chunk.num_tokens) for chunk in chunks
        ]

    def _plan_decode(self, preempt: Callable[[Sequence], None]) -> list[Sequence]:
        """The running sequences of this step, each with room for its token."""
        block_size = self._pool.block_size
        running = self._table.in_state(SequenceState.DECODING)
        while decode_policy.is_short_of_blocks(running, self._pool.num_free, block_size):
            victim = decode_policy.choose_victim(self._table.growing())
            if victim is None or self._pool.num_quarantined:
                break
            preempt(victim)
            running = self._table.in_state(SequenceState.DECODING)
        rows = decode_policy.plan_rows(
            running,
            num_free_blocks=self._pool.num_free,
            max_rows=self._limits.max_num_seqs,
            block_size=block_size,
        )
        for sequence in rows:
            for table in sequence.block_tables:
                if len(table) * block_size < sequence.num_tokens:
                    table.extend(self._pool.allocate(1))
        return rows

    def forward(self, work: Seq[Work]) -> list[int | None | EngineFailure]:
        """The token that each part drew, None where it drew none, or why it could not.

        All in one batch; row by row if that fails, so that no sequence stops another.
        """
        self._failpoints.before_step()
        rows = [part.row() for part in work]
        try:
            return list(self._runner.forward(Batch(rows)))
        except Exception:
            logger.exception("a step of %d rows failed; trying them one by one", len(rows))
        return [self._alone(part, row) for part, row in zip(work, rows, strict=True)]

    def _alone(self, part: Work, row: BatchRow) -> int | None | EngineFailure:
        try:
            return self._runner.forward(Batch([row]))[0]
        except Exception as error:
            logger.exception("%s failed alone", part.sequence.key)
            return EngineFailure(f"the engine failed: {type(error).__name__}")
