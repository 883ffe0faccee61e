"""Blocks of this worker whose bytes are not those that were sealed: found, dropped, not used.

A digest is checked where a wrong byte could still do harm unseen: before a prompt's first token
leaves, when a reader reports other bytes, and, for a sequence marked `distrust`, before a cached
block is used. Nobody goes on who computed with a corrupt block.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from baton.services.worker.sealing import Sealer, StepSums
from baton.services.worker.sequence_table import SequenceTable
from baton.shared.kv.block_pool import BlockPool
from baton.shared.kv.sequence import Sequence
from baton.shared.rpc.errors import BatonError, DigestMismatch
from baton.shared.telemetry import Counters, log_event
from baton.v1 import kv_service_pb2 as kv

logger = logging.getLogger(__name__)


class CorruptionGuard:
    def __init__(
        self,
        pool: BlockPool,
        sealer: Sealer,
        table: SequenceTable,
        fail: Callable[[Sequence, BatonError], None],
        counters: Counters,
    ) -> None:
        self._pool = pool
        self._sealer = sealer
        self._table = table
        self._fail = fail
        self._counters = counters

    def has_spoiled(self, sequence: Sequence, sums: StepSums | None = None) -> bool:
        """Whether a block that the prompt was computed from is corrupt; ends the sequence then.

        `sums`: of these blocks, where they were started behind the prompt's last step.

        Asked before the last chunk's own blocks are sealed: those have nothing to be checked with.
        A reader that holds the block itself would never read ours, and notice nothing.
        """
        num_corrupt, end = 0, sequence.num_sealed_blocks
        for group, table in enumerate(sequence.block_tables):
            known = sums.of(group, 0, end) if end and sums is not None else None
            corrupt = self._sealer.drop_corrupt(group, table[:end], known)
            num_corrupt += len(corrupt)
            self.found(group, corrupt)
        self._counters["digest_mismatches"] += num_corrupt
        return num_corrupt > 0

    def check_reported(self, cancel: kv.CancelClaim) -> None:
        """A reader got other bytes than were announced: look who is right. It has counted them."""
        columns = list(
            zip(
                cancel.mismatched_groups,
                cancel.mismatched_block_ids,
                cancel.mismatched_generations,
                strict=False,
            )
        )
        for group in range(self._sealer.num_groups):
            # Of a later generation, they are another sequence's by now.
            block_ids = [
                block_id
                for its_group, block_id, generation in columns
                if its_group == group
                and block_id < self._pool.num_blocks
                and self._pool.block(block_id).generation == generation
            ]
            self.found(group, self._sealer.drop_corrupt(group, block_ids))

    def found(self, group: int, corrupt: list[int]) -> None:
        """What was computed from corrupt blocks is wrong, whatever its own digests say."""
        if not corrupt:
            return
        for block_id in corrupt:
            log_event(
                logger, logging.ERROR, "own block is corrupt, dropped", group=group, block=block_id
            )
        for sequence in self._table.all():
            table = sequence.block_tables[group] if sequence.block_tables else []
            if not set(corrupt).isdisjoint(table):
                self._fail(sequence, DigestMismatch("it was computed from a corrupt block"))
