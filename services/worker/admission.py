"""Admission: a prompt takes its cached blocks, and room for all the rest, or it waits.

Two prompts with a common prefix that arrive together compute (or pull) it once: the second one
waits for the first one's blocks, then finds them in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile

from baton.services.prefill.scheduler import Admission, admission
from baton.services.worker.sealing import Sealer
from baton.services.worker.sequence_table import SequenceTable
from baton.shared.kv.block_pool import BlockPool
from baton.shared.kv.sequence import Sequence, num_blocks_for


class Admitter:
    def __init__(
        self,
        pool: BlockPool,
        sealer: Sealer,
        table: SequenceTable,
        on_dropped: Callable[[int, list[int]], None],
    ) -> None:
        """`on_dropped`: told the cache group and ids of blocks that failed their check."""
        self._pool = pool
        self._sealer = sealer
        self._table = table
        self._on_dropped = on_dropped
        self._coming: dict[bytes, tuple[Sequence, int]] = {}
        """Hash of a block that a sequence computes or pulls → who, and where in its table."""

    def try_admit(self, sequence: Sequence) -> Admission:
        """Gives the sequence its block tables when it may have them now."""
        if self._is_coming(sequence, sequence.num_sealed_blocks):
            return Admission.WAIT_FOR_PREFIX
        matched = self._match(sequence)
        num_matched, num_groups = len(matched[0]), len(matched)
        num_new = num_blocks_for(sequence.num_prompt_tokens, self._pool.block_size) - num_matched
        cached = [block_id for block_ids in matched for block_id in block_ids]
        sequence.num_sealed_blocks = num_matched
        verdict = admission(
            num_new_blocks=num_new * num_groups,
            num_free_blocks=self._pool.num_free_beside(cached),
            num_growing=num_groups * len(self._table.growing()),
            prefix_is_coming=self._is_coming(sequence, num_matched),
        )
        if verdict is Admission.ADMIT:
            if sequence.distrust and self._has_corrupt(matched):
                return self.try_admit(sequence)
            self._pool.acquire(cached)
            sequence.block_tables = [ids + self._pool.allocate(num_new) for ids in matched]
            sequence.num_cached_tokens = num_matched * self._pool.block_size
            for index, block_hash in enumerate(sequence.block_hashes[0][num_matched:], num_matched):
                self._coming[block_hash] = (sequence, index)
        return verdict

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended: what it was about to fill is not coming any more."""
        for block_hash in sequence.block_hashes[0]:
            coming = self._coming.get(block_hash)
            if coming is not None and coming[0] is sequence:
                del self._coming[block_hash]

    def _num_usable(self, sequence: Sequence) -> int:
        """A hit covers at most N − 1 tokens: the last one is computed to draw the next."""
        return (sequence.num_prompt_tokens - 1) // self._pool.block_size

    def _is_coming(self, sequence: Sequence, index: int) -> bool:
        """Whether another sequence is about to fill the block at `index` of this one's prompt."""
        if sequence.distrust or index >= self._num_usable(sequence):
            return False
        coming = self._coming.get(sequence.block_hashes[0][index])
        return coming is not None and coming[0].num_sealed_blocks <= coming[1]

    def _match(self, sequence: Sequence) -> list[list[int]]:
        """[group] → cached blocks at the front, as deep as every group has them.

        A sequence marked `distrust` uses no block that has no digest to check.
        """
        usable = self._num_usable(sequence)
        matched = [
            self._pool.match(hashes[:usable], sequence.prompt_token_ids)
            for hashes in sequence.block_hashes
        ]
        if sequence.distrust:
            matched = [list(takewhile(self._has_digest, block_ids)) for block_ids in matched]
        depth = min(len(block_ids) for block_ids in matched)
        return [block_ids[:depth] for block_ids in matched]

    def _has_digest(self, block_id: int) -> bool:
        return self._pool.block(block_id).digest is not None

    def _has_corrupt(self, matched: list[list[int]]) -> bool:
        """Whether any of the cached blocks had to go."""
        has_dropped = False
        for group, block_ids in enumerate(matched):
            bad = self._sealer.drop_corrupt(group, block_ids)
            if bad:
                self._on_dropped(group, bad)
                has_dropped = True
        return has_dropped
