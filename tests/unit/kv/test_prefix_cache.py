"""PrefixCache: what the machine of test_pools.py would take long to reach, said in plain words."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from baton.shared.kv.block_pool import NO_BLOCK, BlockPool
from baton.shared.kv.cache_spec import CacheSpec
from baton.shared.kv.prefix_cache import Node, PrefixCache
from tests.unit.kv.pools_model import (
    BLOCK_SIZE,
    FULL,
    STATE,
    Path,
    hashes_of,
    make_groups,
    sliding,
    tokens_of,
)

TWO_BLOCKS = sliding(BLOCK_SIZE + 2)
"""A token at the beginning of a block reads the two blocks before it."""


class Bench:
    """A pool for each group."""

    def __init__(self, *specs: CacheSpec, num_blocks: int = 8) -> None:
        def evict(block_id: int, block: object) -> None:
            self.cache.evicted(block_id, block)  # type: ignore[arg-type]

        self.pools = [BlockPool(num_blocks, on_evicted=evict) for _ in specs]
        self.cache = PrefixCache(make_groups(specs), self.pools, BLOCK_SIZE)

    def seal(self, group: int, block_id: int, path: Path) -> None:
        """As the last block of that prefix."""
        self.cache.seal(
            group, block_id, hashes_of(path), len(path) - 1, tokens_of(path)[-BLOCK_SIZE:], None
        )

    def hold(self, path: Path) -> list[list[int]]:
        """Computes all of it anew, as who distrusts the cache does → blocks by group."""
        tables = [pool.allocate(len(path)) for pool in self.pools]
        for index in range(len(path)):
            for group, table in enumerate(tables):
                self.seal(group, table[index], path[: index + 1])
        return tables

    def evict(self, group: int, block_id: int) -> None:
        """Takes it, which nobody holds, for something else."""
        pool = self.pools[group]
        others = [each for each in pool._free if each != block_id]
        pool.acquire(others)
        assert pool.allocate(1) == [block_id]
        pool.release(others)

    def match(self, path: Path) -> int:
        return self.cache.match(hashes_of(path), tokens_of(path))

    def seen(self, path: Path) -> tuple[int, bool]:
        """Blocks of the deepest prefix that is known, and whether another prompt goes on there."""
        nodes = self.cache.walk(hashes_of(path), tokens_of(path))
        return len(nodes), bool(nodes and nodes[-1].children)

    def find(self, group: int, path: Path) -> int:
        return self.cache.find(hashes_of(path)[-1], group, tokens_of(path))

    def check(self) -> None:
        self.cache.check_integrity()
        for pool in self.pools:
            pool.check_integrity()


# Order of eviction


def test_the_end_of_a_sequence_is_evicted_before_its_beginning() -> None:
    bench = Bench(FULL, num_blocks=3)
    [pool] = bench.pools
    [table] = bench.hold((0, 1, 0))
    pool.release(table)
    assert [pool.allocate(1)[0] for _ in range(3)] == table[::-1]


def test_a_block_that_nobody_finds_is_evicted_before_older_ones() -> None:
    bench = Bench(FULL, num_blocks=4)
    [pool] = bench.pools
    [old] = bench.hold((0,))
    tail = pool.allocate(3)
    pool.release(old)
    pool.release(tail[:1])
    assert pool.allocate(1) == tail[:1]


# What is evicted


def test_an_evicted_block_of_a_group_that_reads_everything_takes_all_behind_it() -> None:
    """In the other groups too: nobody could use them."""
    bench = Bench(FULL, TWO_BLOCKS)
    tables = bench.hold((0, 1, 0, 1))
    bench.pools[0].release(tables[0])
    bench.evict(0, tables[0][1])
    assert bench.match((0, 1, 0, 1)) == 1 and bench.cache.num_cached == 2
    bench.check()


def test_an_evicted_block_of_a_windowed_group_goes_alone() -> None:
    bench = Bench(FULL, TWO_BLOCKS)
    tables = bench.hold((0, 1, 0, 1))
    bench.pools[1].release(tables[1])
    bench.evict(1, tables[1][1])
    assert bench.cache.num_cached == 7
    assert [bench.match((0, 1, 0, 1)[:depth]) for depth in range(1, 5)] == [1, 1, 1, 4]
    bench.evict(1, tables[1][2])
    assert bench.match((0, 1, 0, 1)) == 1
    bench.check()


def test_windowed_blocks_are_found_without_their_parents() -> None:
    """A reader has only the window's blocks from the start."""
    bench = Bench(TWO_BLOCKS)
    path = (0, 1, 0, 1, 1)
    table = bench.pools[0].allocate(2)
    bench.seal(0, table[0], path[:4])
    assert bench.match(path) == 0, "a hit needs two blocks"
    bench.seal(0, table[1], path)
    assert bench.match(path) == 5 and bench.match(path[:4]) == 0
    assert [bench.find(0, path[:depth]) for depth in (3, 4, 5)] == [NO_BLOCK, *table]
    bench.check()
    bench.pools[0].release(table)
    bench.pools[0].allocate(8)
    assert bench.match(path) == 0 and not bench.cache._nodes, "nothing is left of them"


def test_what_descends_from_an_evicted_block_is_found_again_when_that_is_back() -> None:
    bench = Bench(TWO_BLOCKS)
    [table] = bench.hold((0, 1, 0, 1))
    bench.pools[0].release(table)
    for block_id in table[1:3]:
        bench.evict(0, block_id)
    assert bench.match((0, 1, 0, 1)) == 1
    [again] = bench.pools[0].allocate(1)
    bench.seal(0, again, (0, 1, 0))
    assert bench.match((0, 1, 0, 1)) == 4
    bench.check()


# What is dropped


def test_dropping_a_twin_drops_what_was_computed_behind_it() -> None:
    """The corrupt block is not the one that is found, yet its child was computed from it."""
    bench = Bench(FULL, TWO_BLOCKS)
    good = bench.hold((0,))
    corrupt = bench.hold((0, 1))
    assert bench.find(0, (0,)) == good[0][0] and bench.find(0, (0, 1)) == corrupt[0][1]
    lost = bench.cache.drop(0, corrupt[0][0])
    assert set(lost) == {(0, good[0][0]), (1, good[1][0]), (0, corrupt[0][1]), (1, corrupt[1][1])}
    bench.hold((0,))
    assert bench.match((0, 1)) == 1 and bench.find(0, (0, 1)) == NO_BLOCK
    bench.check()


@pytest.mark.parametrize("specs", [(FULL,), (TWO_BLOCKS,), (FULL, TWO_BLOCKS)])
def test_dropping_reaches_descendants_behind_an_evicted_block(specs: tuple[CacheSpec, ...]) -> None:
    """First and last block are held, the one between them was evicted: the last still descends."""
    bench = Bench(*specs, num_blocks=6)
    path = (0, 1, 0)
    first, second = bench.hold(path[:2]), bench.hold(path)
    for pool, table in zip(bench.pools, first, strict=True):
        pool.release(table[1:])
        pool.allocate(pool.num_free)
    bench.cache.drop(0, first[0][0])
    for pool, table in zip(bench.pools, second, strict=True):
        pool.release(table)
    bench.hold(path[:2])
    assert bench.match(path) == 2 and bench.find(0, path) == NO_BLOCK
    bench.check()


def test_dropping_a_twin_reaches_what_stands_behind_a_block_that_was_evicted() -> None:
    """The one that was found of the two is gone, and so is nobody's; the last block was computed
    from the other."""
    bench = Bench(TWO_BLOCKS)
    path = (0, 1, 0)
    [found] = bench.hold(path[:2])
    [twins] = bench.hold(path)
    bench.pools[0].release(found[1:])
    bench.evict(0, found[1])
    assert bench.find(0, path[:2]) == NO_BLOCK and bench.find(0, path) == twins[2]
    assert bench.cache.drop(0, twins[1]) == [(0, twins[2])]
    assert bench.find(0, path) == NO_BLOCK
    bench.check()


def test_what_is_computed_behind_a_dropped_block_is_not_found() -> None:
    bench = Bench(FULL)
    path = (0, 1)
    [corrupt, child] = bench.pools[0].allocate(2)
    bench.seal(0, corrupt, path[:1])
    bench.cache.drop(0, corrupt)
    bench.seal(0, child, path)
    bench.hold(path[:1])
    assert bench.match(path) == 1


# What the directory lists


def told(bench: Bench) -> tuple[list[bytes], list[bytes]]:
    changes = bench.cache.take_changes()
    return list(changes.added), list(changes.removed)


def test_a_boundary_is_listed_while_a_hit_there_is_valid_in_every_group() -> None:
    """Every second block is one. The last block of any group that comes, or the first that goes,
    decides."""
    bench = Bench(FULL, TWO_BLOCKS)
    path = (0, 1, 0, 1)
    second, fourth = hashes_of(path)[1::2]
    tables = [pool.allocate(4) for pool in bench.pools]
    for index in range(4):
        bench.seal(0, tables[0][index], path[: index + 1])
    assert told(bench) == ([], [])
    for index in (0, 1, 3):
        bench.seal(1, tables[1][index], path[: index + 1])
    assert told(bench) == ([second], [])
    bench.seal(1, tables[1][2], path[:3])
    assert told(bench) == ([fourth], [])
    bench.pools[1].release(tables[1])
    bench.evict(1, tables[1][2])
    assert told(bench) == ([], [fourth])
    bench.evict(1, tables[1][0])
    assert told(bench) == ([], [second])
    again = bench.pools[1].allocate(2)
    bench.seal(1, again[0], path[:3])
    bench.seal(1, again[1], path[:1])
    assert told(bench) == ([fourth, second], [])
    bench.cache.drop(0, tables[0][1])
    assert told(bench) == ([], [second, fourth])


def test_a_state_is_listed_at_the_boundary_before_it() -> None:
    """As long as one of those that are listed there is left."""
    bench = Bench(FULL, STATE)
    path = (0, 1, 0, 1, 1)
    second, fourth = hashes_of(path)[1::2]
    table, slots = bench.pools[0].allocate(5), bench.pools[1].allocate(4)
    for index in range(5):
        bench.seal(0, table[index], path[: index + 1])
    for slot, depth in zip(slots, (1, 2, 3, 5), strict=True):
        bench.seal(1, slot, path[:depth])
        assert bench.match(path) == depth
    assert told(bench) == ([second, fourth], []), "nothing is listed before the first"
    bench.pools[1].release(slots)
    bench.evict(1, slots[1])
    bench.evict(1, slots[3])
    assert told(bench) == ([], [fourth])
    assert bench.match(path) == 3
    assert bench.seen(path) == (5, False)
    bench.cache.drop(1, slots[2])
    assert told(bench) == ([], [second])
    assert bench.seen(path) == (2, False)
    bench.cache.check_integrity()


def test_prefixes_are_seen_as_long_as_a_state_is_kept_behind_them() -> None:
    bench = Bench(STATE)
    [slot] = bench.pools[0].allocate(1)
    bench.seal(0, slot, (0, 1, 0, 1))
    for path, seen in (((0, 1, 1), (2, True)), ((0, 1, 0, 1, 1), (4, False)), ((1,), (0, False))):
        assert bench.seen(path) == seen, "whether they part there"
    assert bench.match((0, 1, 1)) == 0 and bench.match((0, 1, 0, 1, 1)) == 4
    bench.pools[0].release([slot])
    bench.evict(0, slot)
    assert bench.seen((0, 1)) == (0, False)


def test_what_came_and_went_between_two_looks_is_not_told() -> None:
    bench = Bench(FULL)
    [table] = bench.hold((0, 1))
    bench.cache.drop(0, table[1])
    added, removed = told(bench)
    assert not added and removed == hashes_of((0, 1))[1:], "it may be listed from before"


# check_integrity itself


def node(bench: Bench, path: Path) -> Node:
    return bench.cache._nodes[hashes_of(path)[-1]]


def lead_elsewhere(bench: Bench) -> None:
    node(bench, (0,)).blocks[0] = 3


def find_by_a_wrong_hash(bench: Bench) -> None:
    bench.cache._nodes[b"stray"] = node(bench, (0,))


def seal_a_part(bench: Bench) -> None:
    node(bench, (0,)).token_ids = (0,)


def orphan_a_child(bench: Bench) -> None:
    node(bench, (0,)).children.clear()


def find_behind_nothing(bench: Bench) -> None:
    del bench.cache._nodes[hashes_of((0,))[0]]


def keep_a_node_without_blocks(bench: Bench) -> None:
    for group in range(2):
        bench.cache._lose(node(bench, (0, 1)), group)


def lose_what_reads_everything(bench: Bench) -> None:
    bench.cache._lose(node(bench, (0,)), 0)


def count_wrong(bench: Bench) -> None:
    bench.cache._num_blocks += 1


def take_it_for_another_groups(bench: Bench) -> None:
    bench.pools[0].block(0).group = 1


@pytest.mark.parametrize(
    "fault",
    [
        lead_elsewhere,
        find_by_a_wrong_hash,
        seal_a_part,
        orphan_a_child,
        find_behind_nothing,
        keep_a_node_without_blocks,
        lose_what_reads_everything,
        count_wrong,
        take_it_for_another_groups,
    ],
)
def test_check_integrity_finds(fault: Callable[[Bench], None]) -> None:
    bench = Bench(FULL, TWO_BLOCKS)
    bench.hold((0, 1))
    bench.cache.check_integrity()
    fault(bench)
    with pytest.raises(AssertionError):
        bench.cache.check_integrity()
