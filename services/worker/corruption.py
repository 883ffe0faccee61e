"""Blocks of this worker whose bytes are not those that were sealed: found, dropped, not used.

A digest is checked where a wrong byte could still do harm unseen: before a prompt's first token
leaves, when a reader reports other bytes, and, for a sequence marked `distrust`, before a cached
block is used. Nobody goes on who computed with a corrupt block.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as Seq

from baton.services.worker.sealing import Corrupt, PendingSums, Sealer
from baton.services.worker.sequence_table import SequenceTable
from baton.shared.kv.pools import Pools
from baton.shared.kv.sequence import BlockTable, Sequence
from baton.shared.rpc.errors import BatonError, DigestMismatch
from baton.shared.telemetry import Counters, log_event
from baton.v1 import kv_service_pb2 as kv

logger = logging.getLogger(__name__)


class CorruptionGuard:
    def __init__(
        self,
        pools: Pools,
        sealer: Sealer,
        table: SequenceTable,
        fail: Callable[[Sequence, BatonError], None],
        counters: Counters,
    ) -> None:
        self._pools = pools
        self._sealer = sealer
        self._table = table
        self._fail = fail
        self._counters = counters

    def has_spoiled(self, sequence: Sequence, sums: PendingSums | None = None) -> bool:
        """Whether a block that the prompt was computed from is corrupt; ends the sequence then.

        `sums`: of these blocks, where they were started behind the prompt's last step.

        Asked before the last chunk's own blocks are sealed: those have nothing to be checked with.
        A reader that holds the block itself would never read ours, and notice nothing. Blocks that
        fell behind a window before have been checked when they did (`may_leave`).
        """
        end = sequence.num_sealed_blocks
        tables = [table[:end] for table in sequence.block_tables]
        return self.has_corrupt(tables, sums)

    def may_leave(self, sequence: Sequence, position: int, sums: PendingSums | None = None) -> bool:
        """Whether the blocks that no token of a prompt from `position` on reads are what was
        sealed: after this nobody looks at them. Ends the sequence if not."""
        leaving = [
            self._pools.behind_window(sequence, group, position)
            for group in range(len(sequence.block_tables))
        ]
        return not self.has_corrupt(leaving, sums)

    def has_corrupt(self, block_ids: Seq[Seq[int]], sums: PendingSums | None) -> bool:
        """Whether one of these blocks, by cache group, is not what was sealed; ends all that used
        it then. `sums`: of what they held, where they are known."""
        num_corrupt = 0
        for group, ids in enumerate(block_ids):
            corrupt = self._sealer.drop_corrupt(group, ids, sums)
            num_corrupt += len(corrupt.block_ids)
            self.found(corrupt)
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
        for group in range(len(self._pools.groups)):
            pool = self._pools.of(group)
            # Of a later generation, they are another sequence's by now.
            block_ids = [
                block_id
                for its_group, block_id, generation in columns
                if its_group == group
                and block_id < pool.num_blocks
                and pool.block(block_id).generation == generation
            ]
            self.found(self._sealer.drop_corrupt(group, block_ids))

    def found(self, corrupt: Corrupt) -> None:
        """What was computed from corrupt blocks is wrong, whatever its own digests say."""
        if not corrupt:
            return
        for block_id in corrupt.block_ids:
            log_event(
                logger,
                logging.ERROR,
                "own block is corrupt, dropped",
                group=corrupt.group,
                block=block_id,
            )
        for sequence in self._table.all():
            if sequence.block_tables and self._has_used(sequence, corrupt):
                self._fail(sequence, DigestMismatch("it was computed from a corrupt block"))

    def _has_used(self, sequence: Sequence, corrupt: Corrupt) -> bool:
        """Whether the sequence read one of the blocks, or what was computed from them."""
        table = sequence.block_tables[corrupt.group]
        generations = self._pools.of(corrupt.group).generations(corrupt.block_ids)
        copies = zip(corrupt.block_ids, generations, strict=True)
        if not set(corrupt.block_ids).isdisjoint(table) or not set(copies).isdisjoint(table.left):
            return True
        if self._pools.groups[corrupt.group].spec.reads_everything:
            # Who found a later block of the prefix found this one, too: see `seal_computed`.
            return False
        return any(
            (group, block_id) in corrupt.lost
            for group, each in enumerate(sequence.block_tables)
            for block_id in [*each, *self._copied_from(group, each)]
        )

    def _copied_from(self, group: int, table: BlockTable) -> list[int]:
        """Slots that a state was copied from, as long as they hold the same."""
        if self._pools.groups[group].spec.grows:
            return []
        pool = self._pools.of(group)
        return [
            slot for slot, generation in table.left if pool.block(slot).generation == generation
        ]
