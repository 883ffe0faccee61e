"""The block pool against a model that knows prefixes by their tokens, not by their hashes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baton.shared.kv.block_hash import extend_hashes, root_hash
from baton.shared.kv.block_pool import BlockPool, Digest, PoolExhausted

NUM_BLOCKS, BLOCK_SIZE, NUM_HEADS = 7, 2, 2
ROOT = root_hash("a" * 64)

Path = tuple[int, ...]
"""The tokens of a block and of all before it."""


def hashes_of(tokens: Path) -> list[bytes]:
    hashes: list[bytes] = []
    extend_hashes(hashes, ROOT, tokens, BLOCK_SIZE)
    return hashes


def prefix(tokens: Path, index: int) -> Path:
    """Up to the end of the block at `index`."""
    return tokens[: (index + 1) * BLOCK_SIZE]


def seal(
    pool: BlockPool,
    block_id: int,
    path: Path,
    digest: Digest | None = None,
    *,
    is_listed: bool = False,
) -> None:
    hashes = hashes_of(path)
    parent = hashes[-2] if len(hashes) > 1 else None
    pool.seal(block_id, hashes[-1], parent, path[-BLOCK_SIZE:], digest, is_listed=is_listed)


class Model:
    """What the pool should do, said as simply as possible and as slowly as need be."""

    def __init__(self) -> None:
        self.num_references = Counter[int]()
        self.generations = [0] * NUM_BLOCKS
        self.digests: list[Digest | None] = [None] * NUM_BLOCKS
        self.paths: list[Path | None] = [None] * NUM_BLOCKS
        """Of sealed blocks, those included that a twin keeps from being found."""
        self.findable: dict[Path, int] = {}
        self.listed: set[Path] = set()
        self.blank = set(range(NUM_BLOCKS))
        """Free, and nobody can find them: taken first, in whatever order."""
        self.cached: list[int] = []
        """Free and findable, least recently used first."""

    @property
    def num_free(self) -> int:
        return len(self.blank) + len(self.cached)

    def match(self, tokens: Path) -> list[int]:
        found: list[int] = []
        for index in range(len(tokens) // BLOCK_SIZE):
            block_id = self.findable.get(prefix(tokens, index))
            if block_id is None:
                break
            found.append(block_id)
        return found

    def take(self, block_ids: list[int]) -> None:
        for block_id in block_ids:
            self.num_references[block_id] += 1
            self.blank.discard(block_id)
            if block_id in self.cached:
                self.cached.remove(block_id)

    def give_back(self, block_ids: list[int]) -> None:
        for block_id in reversed(block_ids):
            self.num_references[block_id] -= 1
            if not self.num_references[block_id]:
                if block_id in self.findable.values():
                    self.cached.append(block_id)
                else:
                    self.blank.add(block_id)

    def allocated(self, block_ids: list[int]) -> None:
        """Checks that these were the ones to take, and takes them."""
        for block_id in block_ids:
            if self.blank:
                assert block_id in self.blank, "a findable block went before an unfindable one"
            else:
                assert block_id == self.cached[0], "not the least recently used block"
                path = self.paths[block_id]
                assert path is not None
                self.forget(path)
            self.take([block_id])
            self.generations[block_id] += 1
            self.digests[block_id] = self.paths[block_id] = None

    def seal(self, block_id: int, path: Path, digest: Digest | None, *, is_listed: bool) -> None:
        self.digests[block_id] = digest
        self.paths[block_id] = path
        parent = path[:-BLOCK_SIZE]
        if path not in self.findable and (not parent or parent in self.findable):
            self.findable[path] = block_id
            if is_listed:
                self.listed.add(path)

    def forget(self, ancestor: Path) -> None:
        """Nothing that begins with these tokens can be found any more."""
        for path in [path for path in self.findable if path[: len(ancestor)] == ancestor]:
            block_id = self.findable.pop(path)
            self.listed.discard(path)
            self.paths[block_id] = None
            if block_id in self.cached:
                self.cached.remove(block_id)
                self.blank.add(block_id)


@dataclass
class Holder:
    tokens: Path
    block_ids: list[int]
    num_sealed: int
    quarantined: list[list[int]] = field(default_factory=list)

    @property
    def num_full(self) -> int:
        return len(self.tokens) // BLOCK_SIZE


# Two token values and blocks of two: prefixes meet all the time.
tokens = st.lists(st.integers(0, 1), min_size=1, max_size=4 * BLOCK_SIZE).map(tuple)
indices = st.integers(0, 1000)
digests = st.none() | st.tuples(*[st.integers(0, 2**64 - 1)] * NUM_HEADS)


class BlockPoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE)
        self.model = Model()
        self.holders: list[Holder] = []
        self.directory: set[bytes] = set()

    def pick(self, index: int) -> Holder:
        return self.holders[index % len(self.holders)]

    @rule(tokens=tokens)
    def start(self, tokens: Path) -> None:
        """A prompt takes its cached prefix and room for the rest, if there is room."""
        num_blocks = -(-len(tokens) // BLOCK_SIZE)
        matched = self.pool.match(hashes_of(tokens), tokens)
        assert matched == self.model.match(tokens)
        num_new = num_blocks - len(matched)
        num_matched_free = sum(not self.model.num_references[block_id] for block_id in matched)
        has_room = self.model.num_free - num_matched_free >= num_new
        assert (self.pool.num_free_beside(matched) >= num_new) == has_room
        if has_room:
            self.pool.acquire(matched)
            self.model.take(matched)
            new = self.pool.allocate(num_new)
            self.model.allocated(new)
            self.holders.append(Holder(tokens, matched + new, len(matched)))

    @rule(num_more=st.integers(1, 3))
    def ask_for_too_much(self, num_more: int) -> None:
        with pytest.raises(PoolExhausted):
            self.pool.allocate(self.model.num_free + num_more)

    @precondition(lambda self: self.holders)
    @rule(index=indices, digest=digests, is_listed=st.booleans())
    def seal_next(self, index: int, digest: Digest | None, is_listed: bool) -> None:
        holder = self.pick(index)
        if holder.num_sealed == holder.num_full:
            return
        path = prefix(holder.tokens, holder.num_sealed)
        block_id = holder.block_ids[holder.num_sealed]
        holder.num_sealed += 1
        seal(self.pool, block_id, path, digest, is_listed=is_listed)
        self.model.seal(block_id, path, digest, is_listed=is_listed)

    @precondition(lambda self: self.holders)
    @rule(index=indices)
    def share(self, index: int) -> None:
        """Somebody else takes a reference on what a sequence has sealed."""
        holder = self.pick(index)
        block_ids = holder.block_ids[: holder.num_sealed]
        self.pool.acquire(block_ids)
        self.model.take(block_ids)
        sealed = holder.tokens[: len(block_ids) * BLOCK_SIZE]
        self.holders.append(Holder(sealed, block_ids, len(block_ids)))

    @precondition(lambda self: self.holders)
    @rule(index=indices)
    def release(self, index: int) -> None:
        """The sequence ends; what a transfer may still write into stays taken."""
        holder = self.pick(index)
        self.pool.release(holder.block_ids)
        self.model.give_back(holder.block_ids)
        holder.block_ids = []
        holder.num_sealed = holder.num_full
        if not holder.quarantined:
            self.holders.remove(holder)

    @precondition(lambda self: self.holders)
    @rule(index=indices, first=st.integers(0, 3))
    def quarantine(self, index: int, first: int) -> None:
        holder = self.pick(index)
        block_ids = holder.block_ids[first:]
        self.pool.quarantine(block_ids)
        self.model.take(block_ids)
        holder.quarantined.append(block_ids)

    @precondition(lambda self: any(holder.quarantined for holder in self.holders))
    @rule(index=indices)
    def lift_quarantine(self, index: int) -> None:
        under = [holder for holder in self.holders if holder.quarantined]
        holder = under[index % len(under)]
        block_ids = holder.quarantined.pop(0)
        self.pool.lift_quarantine(block_ids)
        self.model.give_back(block_ids)
        if not holder.quarantined and not holder.block_ids:
            self.holders.remove(holder)

    @rule(block_id=st.integers(0, NUM_BLOCKS - 1))
    def drop(self, block_id: int) -> None:
        self.pool.drop(block_id)
        path = self.model.paths[block_id]
        if path is not None:
            self.model.forget(path)
            self.model.paths[block_id] = None

    @rule(block_id=st.integers(0, NUM_BLOCKS - 1), digest=digests.filter(bool))
    def set_digest(self, block_id: int, digest: Digest) -> None:
        self.pool.set_digest(block_id, digest)
        self.model.digests[block_id] = digest

    @rule(wanted=tokens, others=tokens)
    def match_colliding_hashes(self, wanted: Path, others: Path) -> None:
        """Hashes that lead to other tokens' blocks find only what has the same tokens."""
        size = min(len(wanted), len(others))
        found = self.pool.match(hashes_of(others[:size]), wanted[:size])
        run = self.model.match(others[:size])
        same = [
            wanted[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE]
            == others[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE]
            for i in range(len(run))
        ]
        assert found == run[: same.index(False) if False in same else len(run)]

    @rule()
    def tell_directory(self) -> None:
        """A directory that applies the changes lists just what is findable and to be listed."""
        changes = self.pool.take_changes()
        assert not changes.added.keys() & changes.removed.keys()
        self.directory |= changes.added.keys()
        self.directory -= changes.removed.keys()
        assert self.directory == {hashes_of(path)[-1] for path in self.model.listed}

    @invariant()
    def integrity(self) -> None:
        self.pool.check_integrity(holder.block_ids for holder in self.holders)

    @invariant()
    def agrees_with_model(self) -> None:
        assert self.pool.num_free == self.model.num_free
        assert self.pool.num_cached == len(self.model.findable)
        assert self.pool.generations(range(NUM_BLOCKS)) == self.model.generations
        under = {b for h in self.holders for block_ids in h.quarantined for b in block_ids}
        assert self.pool.num_quarantined == len(under)
        for block_id, digest in enumerate(self.model.digests):
            assert self.pool.block(block_id).digest == digest


TestBlockPool = BlockPoolMachine.TestCase
TestBlockPool.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


# What the machine would take long to reach, said once in plain words


def hold(pool: BlockPool, tokens: Path) -> list[int]:
    """Computes all of it anew, as a sequence does that distrusts the cache."""
    block_ids = pool.allocate(len(tokens) // BLOCK_SIZE)
    for index, block_id in enumerate(block_ids):
        seal(pool, block_id, prefix(tokens, index))
    return block_ids


def test_the_end_of_a_sequence_is_evicted_before_its_beginning() -> None:
    pool = BlockPool(3, BLOCK_SIZE)
    table = hold(pool, (0, 0, 1, 1, 0, 1))
    pool.release(table)
    assert [pool.allocate(1)[0] for _ in range(3)] == table[::-1]


def test_a_block_that_nobody_finds_is_evicted_before_older_ones() -> None:
    pool = BlockPool(4, BLOCK_SIZE)
    old = hold(pool, (0, 0))
    tail = pool.allocate(3)
    pool.release(old)
    pool.release(tail[:1])
    assert pool.allocate(1) == tail[:1]


def test_dropping_a_twin_drops_what_was_computed_behind_it() -> None:
    """The corrupt block is not the findable one, yet its child was computed from it."""
    pool = BlockPool(4, BLOCK_SIZE)
    good = hold(pool, (0, 0))
    corrupt = hold(pool, (0, 0, 1, 1))
    assert pool.match(hashes_of((0, 0, 1, 1)), (0, 0, 1, 1)) == [good[0], corrupt[1]]
    pool.drop(corrupt[0])
    hold(pool, (0, 0))
    assert corrupt[1] not in pool.match(hashes_of((0, 0, 1, 1)), (0, 0, 1, 1))


def test_dropping_reaches_descendants_behind_an_evicted_block() -> None:
    """Root and leaf are held, the block between them was evicted: the leaf still descends."""
    pool = BlockPool(6, BLOCK_SIZE)
    path = (0, 0, 1, 1, 0, 1)
    first = hold(pool, path[:4])
    second = hold(pool, path)
    pool.release(first)
    pool.acquire(first[:1])
    pool.allocate(pool.num_free)
    pool.drop(first[0])
    pool.release(second)
    hold(pool, path[:4])
    assert second[2] not in pool.match(hashes_of(path), path)


def test_what_is_computed_behind_a_dropped_block_is_not_found() -> None:
    pool = BlockPool(4, BLOCK_SIZE)
    path = (0, 0, 1, 1)
    [corrupt, child] = pool.allocate(2)
    seal(pool, corrupt, path[:2])
    pool.drop(corrupt)
    seal(pool, child, path)
    hold(pool, path[:2])
    assert len(pool.match(hashes_of(path), path)) == 1


# check_integrity itself


def lose_a_reference(pool: BlockPool) -> None:
    pool._blocks[0].ref_count -= 1


def free_a_held_block(pool: BlockPool) -> None:
    pool._free[0] = None


def lose_a_free_block(pool: BlockPool) -> None:
    del pool._free[NUM_BLOCKS - 1]


def go_negative(pool: BlockPool) -> None:
    pool._blocks[NUM_BLOCKS - 1].ref_count = -1


def lead_elsewhere(pool: BlockPool) -> None:
    pool._by_hash[hashes_of((0, 0))[0]] = 3


def find_an_unhashed_block(pool: BlockPool) -> None:
    pool._by_hash[b"stray"] = 3


def seal_a_part(pool: BlockPool) -> None:
    pool._blocks[0].token_ids = (0,)


def orphan_a_child(pool: BlockPool) -> None:
    pool._children.clear()


def find_behind_nothing(pool: BlockPool) -> None:
    block = pool._blocks[0]
    assert block.block_hash is not None
    del pool._by_hash[block.block_hash]
    block.block_hash = None


def lose_a_quarantine(pool: BlockPool) -> None:
    pool._quarantine[NUM_BLOCKS - 1] = 1


def hold_twice(pool: BlockPool) -> None:
    pool.acquire([1])


@pytest.mark.parametrize(
    "fault",
    [
        lose_a_reference,
        free_a_held_block,
        lose_a_free_block,
        go_negative,
        lead_elsewhere,
        find_an_unhashed_block,
        seal_a_part,
        orphan_a_child,
        find_behind_nothing,
        lose_a_quarantine,
        hold_twice,
    ],
)
def test_check_integrity_finds(fault: Callable[[BlockPool], None]) -> None:
    pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE)
    table = hold(pool, (0, 0, 1, 1))
    pool.check_integrity([table])
    fault(pool)
    with pytest.raises(AssertionError):
        pool.check_integrity([table])


def test_check_integrity_counts_each_holder() -> None:
    pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE)
    table = hold(pool, (0, 0, 1, 1))
    pool.quarantine(table[1:])
    pool.acquire(table)
    pool.check_integrity([table, table])
    with pytest.raises(AssertionError, match="block 0: 2 references, 1 held"):
        pool.check_integrity([table])


def test_releasing_what_is_not_held_is_refused() -> None:
    pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE)
    with pytest.raises(ValueError, match="not held"):
        pool.release([0])
