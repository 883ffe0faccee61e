"""Sealing: final blocks get their hash and digest; digests are checked where that is asked.

The one place where the bookkeeping of blocks meets their bytes.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from baton.services.worker.failpoints import Failpoints
from baton.shared.engine.block_sums import BlockSums, TakeSums, Writes
from baton.shared.engine.kv_cache import KvCache
from baton.shared.kv import digest as block_digest
from baton.shared.kv.block_hash import KnownHashes, root_hash
from baton.shared.kv.block_pool import DigestRow
from baton.shared.kv.digest import Uint64Array
from baton.shared.kv.pools import Pools
from baton.shared.kv.sequence import BlockTable, Sequence


@dataclass(frozen=True, slots=True)
class _Sealed:
    """What sums of blocks have to be, by the digests that these have."""

    block_ids: frozenset[int]
    rows: npt.NDArray[np.int64]
    """[n]: in which rows of the sums they are."""
    sums: Uint64Array
    """[n, num_heads]"""


class PendingSums:
    """Sums of blocks that were started behind a step which may write to them; to be asked for when
    its result was taken. All of a group are taken when the first is wanted."""

    def __init__(self, taking: list[TakeSums], rows: list[dict[int, int]]) -> None:
        """By cache group: what gives the sums, and in which row of them each block's are."""
        self._taking = taking
        self._rows = rows
        self._taken: dict[int, Uint64Array] = {}
        self._sealed: dict[int, _Sealed] = {}

    def block_ids(self, group: int) -> list[int]:
        return list(self._rows[group])

    def note_sealed(self, group: int, block_ids: Seq[int], sums: Uint64Array) -> None:
        """What these are by their digests, for `unchecked`; while the step computes it costs
        nobody's time. As long as they are held they get no other digest.

        `sums`: [len(block_ids), num_heads]
        """
        rows = np.array([self._rows[group][block_id] for block_id in block_ids])
        self._sealed[group] = _Sealed(frozenset(block_ids), rows, sums)

    def unchecked(self, group: int, block_ids: Seq[int]) -> Seq[int]:
        """Those that are not known to be what was sealed: all, unless all that was noted is as it
        was. Waits for the sums."""
        sealed = self._sealed.get(group)
        if sealed is None or not np.array_equal(self._take(group)[sealed.rows], sealed.sums):
            return block_ids
        known = sealed.block_ids
        if known.issuperset(block_ids):
            return ()
        return [block_id for block_id in block_ids if block_id not in known]

    def of(self, group: int, block_ids: Seq[int]) -> Uint64Array | None:
        """[len(block_ids), num_heads]; None when some are not among them. Waits for them."""
        rows = self._rows[group]
        try:
            wanted = [rows[block_id] for block_id in block_ids]
        except KeyError:
            return None
        return self._take(group)[wanted]

    def _take(self, group: int) -> Uint64Array:
        if group not in self._taken:
            self._taken[group] = self._taking[group]()
        return self._taken[group]


@dataclass(frozen=True, slots=True)
class Corrupt:
    """Blocks of a cache group that are not what was sealed; falsy when there are none."""

    group: int
    block_ids: list[int]
    lost: set[tuple[int, int]]
    """(group, block id) of all that was found by their prefixes, computed from them or not."""

    def __bool__(self) -> bool:
        return bool(self.block_ids)


class Sealer:
    def __init__(
        self,
        pools: Pools,
        kv_cache: KvCache,
        block_sums: BlockSums,
        incarnation: str,
        capability_hash: str,
        failpoints: Failpoints,
    ) -> None:
        self._pools = pools
        self._cache = kv_cache
        self._block_sums = block_sums
        self._incarnation = incarnation
        self._capability_hash = capability_hash
        self._failpoints = failpoints
        self._known_hashes = KnownHashes()

    def hash_blocks(self, sequence: Sequence) -> None:
        """Brings the sequence's block hashes up to its full blocks."""
        block_size, hashes = self._pools.block_size, sequence.block_hashes
        first, end = len(hashes), sequence.num_tokens // block_size
        if first < end:
            parent = hashes[-1] if hashes else self.root(sequence)
            token_ids = sequence.token_slice(first * block_size, end * block_size)
            hashes += self._known_hashes.chain(parent, token_ids, block_size)

    def root(self, sequence: Sequence) -> bytes:
        return root_hash(self._capability_hash, salt=sequence.salt)

    def start_sums(self, block_ids: Seq[Seq[int]], behind: Writes) -> PendingSums:
        """Of blocks by cache group, all at once: a start costs more than a sum."""
        return PendingSums(
            [
                self._block_sums.start(ids, group, behind=behind)
                for group, ids in enumerate(block_ids)
            ],
            [{block_id: row for row, block_id in enumerate(ids)} for ids in block_ids],
        )

    def note_sealed(self, pending: PendingSums) -> None:
        """Of its blocks those that have a digest now: then they are checked in no time."""
        for group in range(len(self._pools.groups)):
            known = self._pools.of(group).digests(pending.block_ids(group))
            if known:
                block_ids, rows = list(known), cast("list[memoryview]", list(known.values()))
                digests = np.frombuffer(b"".join(rows), dtype=np.uint64).reshape(len(rows), -1)
                sums = block_digest.sums(digests, self._seeds(group, block_ids, digests.shape[1]))
                pending.note_sealed(group, block_ids, sums)

    def digests(self, group: int, block_ids: Seq[int]) -> list[DigestRow]:
        """As the bytes are now."""
        return self.digests_of_sums(group, block_ids, self._block_sums(block_ids, group))

    def digests_of_sums(
        self, group: int, block_ids: Seq[int], sums: Uint64Array
    ) -> list[DigestRow]:
        """`sums`: [n, num_heads], of what the blocks hold."""
        num_heads = sums.shape[1]
        seeds = self._seeds(group, block_ids, num_heads)
        # Nobody needs them as ints before a reader is told of them.
        values = block_digest.digests(sums, seeds).ravel().data
        return [values[i : i + num_heads] for i in range(0, len(values), num_heads)]

    def _seeds(self, group: int, block_ids: Seq[int], num_heads: int) -> Uint64Array:
        generations = self._pools.of(group).generations(block_ids)
        return block_digest.seeds(self._incarnation, block_ids, generations, num_heads)

    def seal_computed(
        self, sequence: Sequence, *, with_digests: bool, sums: PendingSums | None = None
    ) -> None:
        """Seals the blocks that are full of computed tokens and were not sealed before.

        Who finds a block must hold all that it was computed from, or its own checks would tell
        nothing of it: behind a copy that others do not find, no block is found.
        Without digests (blocks written by decode) they are made when a peer claims the block.
        """
        first = sequence.num_sealed_blocks
        end = sequence.num_computed_tokens // self._pools.block_size
        if first >= end:
            return
        self.hash_blocks(sequence)
        digests: dict[int, Seq[DigestRow | None]] = {}
        for group, table in self._growing(sequence):
            block_ids = table[first:end]
            if with_digests:
                known = sums.of(group, block_ids) if sums is not None else None
                digests[group] = self._digests(group, block_ids, known)
            else:
                digests[group] = [None] * len(block_ids)
        # Block by block in all groups: one is found only behind the others' before it.
        for index in range(first, end):
            for group, values in digests.items():
                value = values[index - first]
                self.seal_block(sequence, group, index, value, may_be_found=not sequence.is_apart)
        for table in sequence.block_tables:
            table.num_sealed = end
        if with_digests:
            for group, table in self._growing(sequence):
                self._failpoints.after_seal(self._cache, group, table[first:end])

    def seal_block(
        self,
        sequence: Sequence,
        group: int,
        index: int,
        value: DigestRow | None,
        *,
        may_be_found: bool = True,
    ) -> None:
        """The block at `index` is full and final; its hash is known already."""
        block_size = self._pools.block_size
        start = index * block_size
        is_found = self._pools.prefix_cache.seal(
            group,
            sequence.block_tables[group][index],
            sequence.block_hashes,
            index,
            sequence.token_slice(start, start + block_size),
            value,
            may_be_found=may_be_found,
        )
        sequence.is_apart |= not is_found

    def seal_state(
        self, sequence: Sequence, group: int, slot: int, index: int, sums: PendingSums | None
    ) -> bool:
        """A slot holds a copy of the sequence's state behind the block at `index`, which is sealed;
        nobody writes to it from now on. Whether it is found: no other one is.

        `sums`: of what the slot holds, where they are known.
        """
        known = None if sums is None else sums.of(group, [slot])
        [value] = self._digests(group, [slot], known)
        start = index * self._pools.block_size
        is_found = self._pools.prefix_cache.seal(
            group,
            slot,
            sequence.block_hashes,
            index,
            sequence.token_slice(start, start + self._pools.block_size),
            value,
            may_be_found=not sequence.is_apart,
        )
        self._failpoints.after_keep(self._cache, group, slot)
        return is_found

    def freeze(self, sequence: Sequence) -> None:
        """A computed prompt is left as it is, for its reader: digests what is never sealed, its
        states and, with zeros in what is unused, the partly filled last blocks."""
        fill = sequence.num_prompt_tokens % self._pools.block_size
        for group, table in enumerate(sequence.block_tables):
            if self._pools.groups[group].spec.grows:
                if not fill:
                    continue
                for tensor in self._cache.typed(group):
                    tensor[table[-1], :, :, :, fill:].zero_()
            self._pools.of(group).set_digest(table[-1], self.digests(group, table[-1:])[0])

    def _growing(self, sequence: Sequence) -> list[tuple[int, BlockTable]]:
        """(group, table) of blocks that are sealed when they are full."""
        return [
            (group, table)
            for group, table in enumerate(sequence.block_tables)
            if self._pools.groups[group].spec.grows
        ]

    def digests_to_announce(self, group: int, block_ids: Seq[int]) -> list[DigestRow]:
        """As they were made when the blocks were sealed; now for those that decode wrote."""
        pool = self._pools.of(group)
        bare = [block_id for block_id in block_ids if pool.block(block_id).digest is None]
        if bare:
            for block_id, value in zip(bare, self.digests(group, bare), strict=True):
                pool.set_digest(block_id, value)
        self._failpoints.before_announcing(self._cache, group, block_ids)
        digests = [pool.block(block_id).digest for block_id in block_ids]
        return [value for value in digests if value is not None]

    def drop_corrupt(
        self, group: int, block_ids: Seq[int], sums: PendingSums | None = None
    ) -> Corrupt:
        """Checks blocks against their digests; those that fail leave the cache with all that
        descends from them, in every group. Blocks without digest are left alone.

        `sums`: of what the blocks hold, where they are known.
        """
        corrupt = Corrupt(group, [], set())
        if sums is not None:
            block_ids = sums.unchecked(group, block_ids)
        known = self._pools.of(group).digests(block_ids)
        checked = list(known)
        if not checked:
            return corrupt
        found = self._digests(group, checked, None if sums is None else sums.of(group, checked))
        # A prompt's first token waits for this, and may have thousands of blocks.
        if found != list(known.values()):
            for block_id, value in zip(checked, found, strict=True):
                if known[block_id] != value:
                    corrupt.block_ids.append(block_id)
                    corrupt.lost.update(self._pools.prefix_cache.drop(group, block_id))
        return corrupt

    def _digests(
        self, group: int, block_ids: Seq[int], sums: Uint64Array | None
    ) -> list[DigestRow]:
        if sums is None:
            return self.digests(group, block_ids)
        return self.digests_of_sums(group, block_ids, sums)
