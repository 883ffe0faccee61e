"""Pools: a worker's block pools, and the block tables that its sequences have in them.

Every cache group draws on one pool; groups whose blocks are equally large may share one. Behind a
window a table has holes: what no later token reads is given back. Tables of one sequence grow
together, but while its prompt is computed those with a window have room for a few tokens ahead, and
the others for all of it. A group of states has a pool of slots: of those a sequence has one, and
neither wants more as it grows nor gives it back before its end. Slots that no sequence has may hold
checkpoints: copies of states, found by their prefix as blocks are, and never written while they
are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

from baton.shared.kv.block_pool import NO_BLOCK, Block, BlockPool, PoolExhausted, check
from baton.shared.kv.cache_spec import CacheGroup
from baton.shared.kv.capacity import Capacity, num_blocks_for
from baton.shared.kv.prefix_cache import PrefixCache
from baton.shared.kv.sequence import BlockTable
from baton.shared.kv.sequence import Sequence as Seq


class Pools:
    """
    Attributes:
        by_number: the pools.
        prefix_cache: what finds their blocks by prefix.
        slot_groups: those whose layers keep states.
    """

    def __init__(self, groups: Sequence[CacheGroup], capacity: Capacity) -> None:
        self.groups = tuple(groups)
        self.capacity = capacity
        self.block_size = capacity.block_size
        self.by_number = tuple(
            BlockPool(num_blocks, on_evicted=self._on_evicted) for num_blocks in capacity.num_blocks
        )
        self._of_group = tuple(self.by_number[share.pool] for share in capacity.groups)
        self.prefix_cache = PrefixCache(self.groups, self._of_group, self.block_size)
        self._windowed = [
            number
            for number, group in enumerate(groups)
            if group.spec.grows and not group.spec.reads_everything
        ]
        self.slot_groups = [number for number, group in enumerate(groups) if not group.spec.grows]

    def of(self, group: int) -> BlockPool:
        """The pool that a cache group's blocks are of."""
        return self._of_group[group]

    @property
    def num_free(self) -> list[int]:
        """By pool: blocks that an allocation could have."""
        return [pool.num_free for pool in self.by_number]

    @property
    def num_quarantined(self) -> int:
        return sum(pool.num_quarantined for pool in self.by_number)

    # Room

    def num_lacking(self, sequence: Seq, num_tokens: int) -> list[int]:
        """By pool: blocks that the sequence lacks for its first `num_tokens` tokens."""
        wanted = [0] * len(self.by_number)
        for group, table in enumerate(sequence.block_tables):
            have = self.groups[group].num_blocks_for(num_tokens, self.block_size)
            wanted[self.capacity.groups[group].pool] += max(0, have - len(table))
        return wanted

    def has(self, num_blocks: Iterable[int]) -> bool:
        """Whether so many blocks, by pool, are free."""
        return all(map(int.__le__, num_blocks, self.num_free))

    def extend(self, sequence: Seq, num_tokens: int) -> None:
        """Gives the sequence room for its first `num_tokens` tokens, in every group.

        Raises PoolExhausted, and takes none, when too few blocks are free.
        """
        if not self.has(self.num_lacking(sequence, num_tokens)):
            raise PoolExhausted(f"no room for {num_tokens} tokens of {sequence.key}")
        for group, table in enumerate(sequence.block_tables):
            have = self.groups[group].num_blocks_for(num_tokens, self.block_size)
            if len(table) < have:
                table.extend(self._of_group[group].allocate(have - len(table)))
        num_room_tokens = num_blocks_for(num_tokens, self.block_size) * self.block_size
        sequence.num_room_tokens = max(sequence.num_room_tokens, num_room_tokens)

    def num_room_tokens(self, tables: Sequence[BlockTable], num_tokens: int) -> int:
        """Tokens, of a sequence's first `num_tokens` or a few more, for which tables by group have
        room."""
        lengths = [num_blocks_for(num_tokens, self.block_size)]
        for group, table in zip(self.groups, tables, strict=True):
            if group.spec.grows:
                lengths.append(len(table))
        return min(lengths) * self.block_size

    def num_ahead(self, sequence: Seq) -> int:
        """Tokens from its beginning for which a sequence may have room now: of a windowed group it
        holds so many blocks at most, and gives those behind the window back first."""
        most = sequence.num_prompt_tokens
        for group in self._windowed:
            max_blocks = self.capacity.groups[group].max_blocks
            if max_blocks is not None:
                first_live = sequence.block_tables[group].first_live
                most = min(most, (first_live + max_blocks) * self.block_size)
        return most

    def behind_window(self, sequence: Seq, group: int, position: int) -> list[int]:
        """The blocks that no token from `position` on reads, and that are still held."""
        table = sequence.block_tables[group]
        end = min(self.groups[group].first_block(position, self.block_size), len(table))
        return table[table.first_live : end]

    def give_back_behind(self, sequence: Seq, position: int) -> None:
        """Gives back what no token of the sequence from `position` on reads.

        Every step that was launched for a token before it has retired.
        """
        for group in self._windowed:
            block_ids = self.behind_window(sequence, group, position)
            if block_ids:
                pool, table = self._of_group[group], sequence.block_tables[group]
                table.leave(block_ids, pool.generations(block_ids))
                pool.release([block_id for block_id in block_ids if block_id != NO_BLOCK])

    def give_back_ahead(self, sequence: Seq, num_tokens: int) -> None:
        """Gives back what was taken for more than the sequence's first `num_tokens` tokens.

        No step that was launched writes to a later one.
        """
        for group, table in enumerate(sequence.block_tables):
            have = self.groups[group].num_blocks_for(num_tokens, self.block_size)
            if len(table) > have:
                self._of_group[group].release(table[have:])
                del table[have:]
        num_room_tokens = num_blocks_for(num_tokens, self.block_size) * self.block_size
        sequence.num_room_tokens = min(sequence.num_room_tokens, num_room_tokens)

    def release(self, tables: Sequence[BlockTable]) -> None:
        """Gives back all that a sequence's tables hold; `tables` are by group."""
        for pool, table in zip(self._of_group, tables, strict=True):
            pool.release([block_id for block_id in table if block_id != NO_BLOCK])

    def drop(self, sequence: Seq) -> None:
        """Nothing that the sequence holds is found any more, nor states of its prefixes."""
        for group, table in enumerate(sequence.block_tables):
            for block_id in table:
                if block_id != NO_BLOCK:
                    self.prefix_cache.drop(group, block_id)
        for group in self.slot_groups:
            token_ids = sequence.token_slice(0, sequence.num_tokens)
            for chain_hash in sequence.block_hashes:
                slot = self.prefix_cache.find(chain_hash, group, token_ids)
                if slot != NO_BLOCK:
                    self.prefix_cache.drop(group, slot)
                    break

    @property
    def num_checkpoints(self) -> int:
        """States that are found by their prefixes, those in use included."""
        return sum(
            self._of_group[group].block(slot).node is not None
            for group in self.slot_groups[:1]
            for slot in range(self._of_group[group].num_blocks)
        )

    def check_integrity(
        self,
        held: Iterable[Sequence[BlockTable]] | None = None,
        kept: Iterable[tuple[int, int]] = (),
    ) -> None:
        """Raises AssertionError with what is wrong. `held`: every sequence's tables, by group;
        `kept`: (group, slot) that are held beside those."""
        by_pool: list[list[BlockTable]] | None = None
        if held is not None:
            by_pool = [[] for _ in self.by_number]
            for tables in held:
                for group, table in enumerate(tables):
                    by_pool[self.capacity.groups[group].pool].append(table)
                    if not self.groups[group].spec.grows:
                        check(len(table) == 1, f"a sequence has one slot, not {table}")
        beside: list[list[int]] = [[] for _ in self.by_number]
        for group, slot in kept:
            beside[self.capacity.groups[group].pool].append(slot)
        for number, pool in enumerate(self.by_number):
            pool.check_integrity(
                None
                if by_pool is None
                else [*by_pool[number], *([slot] for slot in beside[number])]
            )
        self.prefix_cache.check_integrity()
        for table in chain.from_iterable(by_pool or ()):
            holes = [block_id for block_id in table[: table.first_live] if block_id != NO_BLOCK]
            is_right = not holes and NO_BLOCK not in table[table.first_live :]
            check(is_right, f"holes and blocks out of place: {table}")
        for group, each in enumerate(self.groups):
            if not each.spec.grows:
                # A state is its sequence's own; a checkpoint is nobody's, and whole.
                pool, number = self._of_group[group], self.capacity.groups[group].pool
                slots = sorted(chain.from_iterable(by_pool[number] if by_pool else ()))
                check(len(slots) == len(set(slots)), f"a slot of two sequences: {slots}")
                found = [slot for slot in slots if pool.block(slot).node]
                check(not found, f"sequences' slots that can be found: {found}")
                bare = [
                    slot
                    for slot in range(pool.num_blocks)
                    if pool.block(slot).node and pool.block(slot).digest is None
                ]
                check(not bare, f"checkpoints without digests: {bare}")

    def _on_evicted(self, block_id: int, block: Block) -> None:
        self.prefix_cache.evicted(block_id, block)
