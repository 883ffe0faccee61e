"""Sealing: final blocks get their hash and digest; digests are checked where that is asked.

The one place where the bookkeeping of blocks meets their bytes.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate, chain

from baton.services.worker.failpoints import Failpoints
from baton.shared.engine.block_sums import BlockSums, TakeSums
from baton.shared.engine.kv_cache import KvCache
from baton.shared.engine.steps import Step
from baton.shared.kv import digest as block_digest
from baton.shared.kv.block_hash import chain_hashes, is_boundary, root_hash
from baton.shared.kv.block_pool import BlockPool, DigestRow
from baton.shared.kv.digest import Uint64Array
from baton.shared.kv.sequence import Sequence


class _Started:
    """Sums that were started together, by cache group; all are taken when the first is wanted."""

    def __init__(self, taking: list[TakeSums]) -> None:
        self._taking = taking
        self._taken: list[Uint64Array] | None = None

    def of(self, group: int) -> Uint64Array:
        if self._taken is None:
            self._taken = [take() for take in self._taking]
        return self._taken[group]


@dataclass(frozen=True, slots=True)
class StepSums:
    """Sums of a sequence's blocks from index `first` to `end`, started behind a step that may write
    to them; to be asked for when its result was taken."""

    first: int
    end: int
    started: _Started
    offset: int
    """Of the first of these blocks among all that were started."""

    def of(self, group: int, first: int, end: int) -> Uint64Array | None:
        """[end − first, num_heads]; None when they are not among them. Waits for them."""
        if first < self.first or end > self.end:
            return None
        begin = self.offset - self.first
        return self.started.of(group)[begin + first : begin + end]


class Sealer:
    def __init__(
        self,
        pool: BlockPool,
        kv_cache: KvCache,
        block_sums: BlockSums,
        incarnation: str,
        capability_hash: str,
        failpoints: Failpoints,
    ) -> None:
        self._pool = pool
        self._cache = kv_cache
        self._block_sums = block_sums
        self._incarnation = incarnation
        self._capability_hash = capability_hash
        self._failpoints = failpoints
        self.num_groups = len(kv_cache.tensors)

    def hash_blocks(self, sequence: Sequence) -> None:
        """Brings the sequence's block hashes up to its full blocks."""
        block_size = self._pool.block_size
        if not sequence.block_hashes:
            sequence.block_hashes = [[] for _ in range(self.num_groups)]
        first, end = len(sequence.block_hashes[0]), sequence.num_tokens // block_size
        if first >= end:
            return
        token_ids = sequence.token_slice(first * block_size, end * block_size)
        for group, hashes in enumerate(sequence.block_hashes):
            parent = hashes[-1] if hashes else self.root(sequence, group)
            hashes += chain_hashes(parent, token_ids, block_size)

    def root(self, sequence: Sequence, group: int) -> bytes:
        return root_hash(self._capability_hash, group=group, salt=sequence.salt)

    def start_sums(
        self, ranges: Seq[tuple[Sequence, int, int]], behind: Step
    ) -> list[StepSums | None]:
        """Of blocks of each sequence, from an index to another; all at once, for a start costs more
        than a sum. None where there are no blocks."""
        num_blocks = [end - first for _, first, end in ranges]
        if not sum(num_blocks):
            return [None] * len(ranges)
        taking = []
        for group in range(self.num_groups):
            tables = [seq.block_tables[group][first:end] for seq, first, end in ranges]
            block_ids = list(chain.from_iterable(tables))
            taking.append(self._block_sums.start(block_ids, group, behind=behind))
        started, offsets = _Started(taking), accumulate(num_blocks, initial=0)
        return [
            StepSums(first, end, started, offset) if first < end else None
            for (_, first, end), offset in zip(ranges, offsets, strict=False)
        ]

    def digests(self, group: int, block_ids: Seq[int]) -> list[DigestRow]:
        """As the bytes are now."""
        return self.digests_of_sums(block_ids, self._block_sums(block_ids, group))

    def digests_of_sums(self, block_ids: Seq[int], sums: Uint64Array) -> list[DigestRow]:
        """`sums`: [n, num_heads], of what the blocks hold."""
        generations = self._pool.generations(block_ids)
        seeds = block_digest.seeds(self._incarnation, block_ids, generations, sums.shape[1])
        # Nobody needs them as ints before a reader is told of them.
        num_heads, values = sums.shape[1], block_digest.digests(sums, seeds).ravel().data
        return [values[i : i + num_heads] for i in range(0, len(values), num_heads)]

    def seal_computed(
        self, sequence: Sequence, *, with_digests: bool, sums: StepSums | None = None
    ) -> None:
        """Seals the blocks that are full of computed tokens and were not sealed before.

        Without digests (blocks written by decode) they are made when a peer claims the block.
        """
        first = sequence.num_sealed_blocks
        end = sequence.num_computed_tokens // self._pool.block_size
        if first >= end:
            return
        self.hash_blocks(sequence)
        for group, table in enumerate(sequence.block_tables):
            block_ids = table[first:end]
            digests: Seq[DigestRow | None] = [None] * len(block_ids)
            if with_digests:
                known = sums.of(group, first, end) if sums is not None else None
                digests = self._digests(group, block_ids, known)
            for index, block_id in enumerate(block_ids, first):
                self.seal_block(sequence, group, index, block_id, digests[index - first])
            if with_digests:
                self._failpoints.after_seal(self._cache, group, block_ids)
        sequence.num_sealed_blocks = end

    def seal_block(
        self, sequence: Sequence, group: int, index: int, block_id: int, value: DigestRow | None
    ) -> None:
        hashes, block_size = sequence.block_hashes[group], self._pool.block_size
        start = index * block_size
        self._pool.seal(
            block_id,
            hashes[index],
            hashes[index - 1] if index else None,
            sequence.token_slice(start, start + block_size),
            value,
            is_listed=group == 0 and is_boundary(index, block_size),
        )

    def freeze_tail(self, sequence: Sequence) -> None:
        """Zeroes what is unused of a prompt's partly filled last block, and digests it whole."""
        fill = sequence.num_prompt_tokens % self._pool.block_size
        if not fill:
            return
        for group, table in enumerate(sequence.block_tables):
            self._cache.tensors[group][table[-1], :, :, :, fill:].zero_()
            self._pool.set_digest(table[-1], self.digests(group, table[-1:])[0])

    def digests_to_announce(self, group: int, block_ids: Seq[int]) -> list[DigestRow]:
        """As they were made when the blocks were sealed; now for those that decode wrote."""
        bare = [block_id for block_id in block_ids if self._pool.block(block_id).digest is None]
        if bare:
            for block_id, value in zip(bare, self.digests(group, bare), strict=True):
                self._pool.set_digest(block_id, value)
        self._failpoints.before_announcing(self._cache, group, block_ids)
        digests = [self._pool.block(block_id).digest for block_id in block_ids]
        return [value for value in digests if value is not None]

    def drop_corrupt(
        self, group: int, block_ids: Seq[int], sums: Uint64Array | None = None
    ) -> list[int]:
        """Checks blocks against their digests; those that fail leave the cache with all that
        descends from them. Blocks without digest are left alone.

        `sums`: [n, num_heads], of what the blocks hold, where they are known. Returns the ids that
        failed.
        """
        digested = [
            index
            for index, block_id in enumerate(block_ids)
            if self._pool.block(block_id).digest is not None
        ]
        if not digested:
            return []
        checked = [block_ids[index] for index in digested]
        found = self._digests(group, checked, None if sums is None else sums[digested])
        bad = [
            block_id
            for block_id, value in zip(checked, found, strict=True)
            if self._pool.block(block_id).digest != value
        ]
        for block_id in bad:
            self._pool.drop(block_id)
        return bad

    def _digests(
        self, group: int, block_ids: Seq[int], sums: Uint64Array | None
    ) -> list[DigestRow]:
        if sums is None:
            return self.digests(group, block_ids)
        return self.digests_of_sums(block_ids, sums)
