"""Pools and their prefix cache against a model that knows prefixes by their tokens, not by their
hashes, for models with one cache group and with several."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from baton.shared.kv.block_pool import NO_BLOCK, Digest, PoolExhausted
from baton.shared.kv.cache_spec import CacheGroup
from baton.shared.kv.capacity import Capacity
from baton.shared.kv.pools import Pools
from baton.shared.kv.sequence import AttemptKey, BlockTable, Sequence
from baton.shared.sampling import SamplingParams
from tests.unit.kv.pools_model import (
    BLOCK_SIZE,
    FULL,
    OTHER_FULL,
    STATE,
    Model,
    Path,
    hashes_of,
    make_capacity,
    make_groups,
    sliding,
    tokens_of,
)

NUM_HEADS = 2

CONFIGURATIONS = {
    "full": (make_groups([FULL]), make_capacity([7], [0])),
    "sliding": (make_groups([sliding(300)]), make_capacity([9], [0], [5])),
    "share a pool": (make_groups([FULL, sliding(200)]), make_capacity([12], [0, 0], [None, 4])),
    "pools of their own": (
        make_groups([sliding(130), FULL]),
        make_capacity([6, 8], [0, 1], [4, None]),
    ),
    "three": (
        make_groups([FULL, OTHER_FULL, sliding(256)]),
        make_capacity([13, 7], [0, 0, 1], [None, None, 4]),
    ),
    "beside states": (
        make_groups([sliding(200), FULL, STATE]),
        make_capacity([12, 3], [0, 0, 1], [4, None, 1]),
    ),
}


@dataclass(eq=False)
class Holder:
    """A sequence, its whole prompt known; `path` has its full blocks."""

    sequence: Sequence
    path: Path
    num_sealed: int
    next_group: int = 0
    """Of the block at `num_sealed`, the first group that is not sealed; of those that grow."""
    has_ended: bool = False
    quarantined: list[tuple[int, list[int]]] = field(default_factory=list)
    """(group, block ids)."""


# Two letters: prefixes meet all the time.
paths = st.lists(st.integers(0, 1), min_size=1, max_size=6).map(tuple)
indices = st.integers(0, 1000)
digests = st.none() | st.tuples(*[st.integers(0, 2**64 - 1)] * NUM_HEADS)


class PoolsMachine(RuleBasedStateMachine):
    groups: tuple[CacheGroup, ...]
    capacity: Capacity

    def __init__(self) -> None:
        super().__init__()
        self.pools = Pools(self.groups, self.capacity)
        self.cache = self.pools.prefix_cache
        self.model = Model(self.groups, self.capacity)
        self.holders: list[Holder] = []
        self.directory: set[bytes] = set()
        self.num_growing = sum(group.spec.grows for group in self.groups)
        """Groups of states are the last."""

    @property
    def running(self) -> list[Holder]:
        return [holder for holder in self.holders if not holder.has_ended]

    def pick(self, index: int) -> Holder:
        return self.running[index % len(self.running)]

    def pool_of(self, group: int) -> int:
        return self.capacity.groups[group].pool

    # A sequence's life

    @rule(path=paths, has_tail=st.booleans())
    def start(self, path: Path, has_tail: bool) -> None:
        """A prompt takes its cached prefix, and room as far ahead as it may have, if there is."""
        tokens = tokens_of(path) + (0,) * (BLOCK_SIZE // 2 if has_tail else 0)
        depth = self.cache.match(hashes_of(path), tokens)
        assert depth == self.model.match(path)
        num_blocks = -(-len(tokens) // BLOCK_SIZE)
        tables, wanted = [], [0] * len(self.capacity.num_blocks)
        for group, share in enumerate(self.capacity.groups):
            needed = self.model.needed(group, depth)
            if not self.groups[group].spec.grows:
                # A slot of its own, into which the state is copied.
                tables.append(BlockTable())
                wanted[share.pool] += 1
                continue
            cached = [self.model.findable[group, path[: index + 1]] for index in needed]
            hashes = hashes_of(path)[needed.start : needed.stop]
            assert [self.cache.find(each, group, tokens) for each in hashes] == cached
            tables.append(BlockTable(cached, first_live=depth - len(needed)))
            end = num_blocks
            if share.max_blocks is not None:
                end = min(end, tables[-1].first_live + share.max_blocks)
            wanted[share.pool] += end - depth
        for group, table in enumerate(tables):
            cached = table[table.first_live :]
            self.pools.of(group).acquire(cached)
            self.model.take(self.pool_of(group), cached)
        if not self.pools.has(wanted):
            assert any(n > free for n, free in zip(wanted, self.model.num_free, strict=True))
            self.pools.release(tables)
            self.gave_back(tables)
            return
        sequence = Sequence(AttemptKey("r", 0, 1), tokens, SamplingParams())
        sequence.block_tables, sequence.block_hashes = tables, list(hashes_of(path))
        sequence.is_admitted, sequence.num_room_tokens = True, depth * BLOCK_SIZE
        for table in tables:
            table.num_sealed = depth
        self.holders.append(Holder(sequence, path, depth))
        self.extend(sequence, min(len(tokens), self.pools.num_ahead(sequence)))

    def extend(self, sequence: Sequence, num_tokens: int) -> None:
        before = [len(table) for table in sequence.block_tables]
        self.pools.extend(sequence, num_tokens)
        for group, (table, old) in enumerate(zip(sequence.block_tables, before, strict=True)):
            self.model.allocated(self.pool_of(group), table[old:])

    @precondition(lambda self: self.running)
    @rule(index=indices)
    def go_on(self, index: int) -> None:
        """More room for the rest of the prompt, as far as the windows go."""
        holder = self.pick(index)
        sequence = holder.sequence
        num_tokens = min(sequence.num_prompt_tokens, self.pools.num_ahead(sequence))
        lacking = self.pools.num_lacking(sequence, num_tokens)
        before = [list(table) for table in sequence.block_tables]
        if all(n <= free for n, free in zip(lacking, self.model.num_free, strict=True)):
            self.extend(sequence, num_tokens)
            assert sequence.num_room_tokens >= num_tokens
        else:
            with pytest.raises(PoolExhausted):
                self.pools.extend(sequence, num_tokens)
            assert sequence.block_tables == before, "all that was asked or nothing"

    @precondition(lambda self: self.running)
    @rule(index=indices, digest=digests)
    def seal_next(self, index: int, digest: Digest | None) -> None:
        """One block of one group; a block is sealed in all groups before the next is in any."""
        holder = self.pick(index)
        tables = holder.sequence.block_tables
        at, group = holder.num_sealed, holder.next_group
        if at == len(holder.path) or at * BLOCK_SIZE >= holder.sequence.num_room_tokens:
            return
        token_ids = holder.sequence.token_slice(at * BLOCK_SIZE, (at + 1) * BLOCK_SIZE)
        block_id, hashes = tables[group][at], holder.sequence.block_hashes
        self.cache.seal(group, block_id, hashes, at, token_ids, digest)
        self.model.seal(group, block_id, holder.path[: at + 1], digest)
        tables[group].num_sealed = at + 1
        holder.next_group = (group + 1) % self.num_growing
        holder.num_sealed += holder.next_group == 0

    @precondition(lambda self: self.running and self.pools.slot_groups)
    @rule(index=indices, digest=digests.filter(bool))
    def keep_state(self, index: int, digest: Digest) -> None:
        """A copy of the state behind a block that was sealed, in a slot that nobody has."""
        holder = self.pick(index)
        at = holder.num_sealed
        for group in self.pools.slot_groups:
            pool = self.pools.of(group)
            if not at or holder.next_group or not pool.num_free:
                return
            [slot] = pool.allocate(1)
            self.model.allocated(self.pool_of(group), [slot])
            token_ids = holder.sequence.token_slice((at - 1) * BLOCK_SIZE, at * BLOCK_SIZE)
            self.cache.seal(group, slot, hashes_of(holder.path), at - 1, token_ids, digest)
            self.model.seal(group, slot, holder.path[:at], digest)
            pool.release([slot])
            self.model.give_back(self.pool_of(group), [slot])

    @precondition(lambda self: self.running)
    @rule(index=indices)
    def give_back_behind(self, index: int) -> None:
        """What the next token reads is kept, all else goes; in groups without window, nothing."""
        sequence, at = self.pick(index).sequence, self.pick(index).num_sealed
        before = [list(table) for table in sequence.block_tables]
        self.pools.give_back_behind(sequence, at * BLOCK_SIZE)
        for group, table in enumerate(sequence.block_tables):
            grows = self.groups[group].spec.grows
            kept = [NO_BLOCK] * (self.model.needed(group, at).start if grows else 0)
            kept += before[group][len(kept) :]
            assert table == kept[: len(before[group])]
            assert table.first_live == table.count(NO_BLOCK)
            gone = [
                block_id
                for block_id, now in zip(before[group], table, strict=True)
                if block_id != now
            ]
            generations = self.pools.of(group).generations(gone)
            assert table.left[len(table.left) - len(gone) :] == list(
                zip(gone, generations, strict=True)
            )
            self.model.give_back(self.pool_of(group), gone)

    @precondition(lambda self: self.running)
    @rule(index=indices)
    def end(self, index: int) -> None:
        """What a transfer may still write into stays taken."""
        holder = self.pick(index)
        tables = holder.sequence.block_tables
        self.pools.release(tables)
        self.gave_back(tables)
        holder.has_ended = True
        self.forget_if_over(holder)

    def gave_back(self, tables: list[BlockTable]) -> None:
        for group, table in enumerate(tables):
            self.model.give_back(self.pool_of(group), table[table.first_live :])

    def forget_if_over(self, holder: Holder) -> None:
        if holder.has_ended and not holder.quarantined:
            self.holders.remove(holder)

    @precondition(lambda self: self.running)
    @rule(index=indices, group=indices, first=st.integers(0, 3))
    def quarantine(self, index: int, group: int, first: int) -> None:
        holder, group = self.pick(index), group % len(self.groups)
        table = holder.sequence.block_tables[group]
        block_ids = table[table.first_live + first :]
        self.pools.of(group).quarantine(block_ids)
        self.model.take(self.pool_of(group), block_ids)
        holder.quarantined.append((group, block_ids))

    @precondition(lambda self: any(holder.quarantined for holder in self.holders))
    @rule(index=indices)
    def lift_quarantine(self, index: int) -> None:
        under = [holder for holder in self.holders if holder.quarantined]
        holder = under[index % len(under)]
        group, block_ids = holder.quarantined.pop(0)
        self.pools.of(group).lift_quarantine(block_ids)
        self.model.give_back(self.pool_of(group), block_ids)
        self.forget_if_over(holder)

    # What else happens to blocks

    @rule(group=indices, block_id=indices)
    def drop(self, group: int, block_id: int) -> None:
        """In every group, all from the block's position on is lost."""
        group %= len(self.groups)
        pool = self.pool_of(group)
        block_id %= self.capacity.num_blocks[pool]
        lost = self.cache.drop(group, block_id)
        assert len(lost) == len(set(lost)) and set(lost) == self.model.drop(pool, block_id)

    @precondition(lambda self: self.running)
    @rule(index=indices)
    def drop_all_of_a_sequence(self, index: int) -> None:
        sequence = self.pick(index).sequence
        self.pools.drop(sequence)
        for group, table in enumerate(sequence.block_tables):
            for block_id in table[table.first_live :]:
                self.model.drop(self.pool_of(group), block_id)
        for group in self.pools.slot_groups:
            path = self.pick(index).path
            kept = [self.model.findable.get((group, path[:end])) for end in range(1, len(path) + 1)]
            for slot in kept:
                if slot is not None:
                    self.model.drop(self.pool_of(group), slot)

    @rule(pool=indices, block_id=indices, digest=digests.filter(bool))
    def set_digest(self, pool: int, block_id: int, digest: Digest) -> None:
        pool %= len(self.capacity.num_blocks)
        block_id %= self.capacity.num_blocks[pool]
        self.pools.by_number[pool].set_digest(block_id, digest)
        self.model.digests[pool][block_id] = digest

    @rule(pool=indices, num_more=st.integers(1, 3))
    def ask_for_too_much(self, pool: int, num_more: int) -> None:
        pool %= len(self.capacity.num_blocks)
        with pytest.raises(PoolExhausted):
            self.pools.by_number[pool].allocate(self.model.num_free[pool] + num_more)

    @rule(wanted=paths, others=paths)
    def match_colliding_hashes(self, wanted: Path, others: Path) -> None:
        """Hashes that lead to other tokens' blocks find only what has the same tokens."""
        size = min(len(wanted), len(others))
        wanted, others = wanted[:size], others[:size]
        depth = self.cache.match(hashes_of(others), tokens_of(wanted))
        assert not depth or self.model.is_valid(others[:depth])
        for group in range(len(self.groups)):
            needed = self.model.needed(group, depth)
            assert wanted[needed.start : depth] == others[needed.start : depth]
        if wanted == others:
            assert depth == self.model.match(others)
        for at, each in enumerate(hashes_of(others)):
            for group in range(len(self.groups)):
                found = self.model.findable.get((group, others[: at + 1]), NO_BLOCK)
                found = found if wanted[at] == others[at] else NO_BLOCK
                assert self.cache.find(each, group, tokens_of(wanted)) == found

    @rule()
    def tell_directory(self) -> None:
        """A directory that applies the changes lists just the boundaries that are valid."""
        changes = self.cache.take_changes()
        assert not changes.added.keys() & changes.removed.keys()
        self.directory |= changes.added.keys()
        self.directory -= changes.removed.keys()
        assert self.directory == self.model.listed()

    @invariant()
    def integrity(self) -> None:
        self.pools.check_integrity(holder.sequence.block_tables for holder in self.running)

    @invariant()
    def agrees_with_model(self) -> None:
        model, pools = self.model, self.pools
        assert pools.num_free == model.num_free
        assert self.cache.num_cached == len(model.findable)
        under = {
            (self.pool_of(group), block_id)
            for holder in self.holders
            for group, block_ids in holder.quarantined
            for block_id in block_ids
        }
        assert pools.num_quarantined == len(under)
        for pool, generations, known in zip(
            pools.by_number, model.generations, model.digests, strict=True
        ):
            ids = range(pool.num_blocks)
            assert pool.generations(ids) == generations
            assert [pool.block(block_id).digest for block_id in ids] == known


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_any_order_of_events(configuration: str) -> None:
    class Machine(PoolsMachine):
        groups, capacity = CONFIGURATIONS[configuration]

    run_state_machine_as_test(Machine, settings=settings(max_examples=60, stateful_step_count=60))
