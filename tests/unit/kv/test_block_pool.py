"""BlockPool by itself: who holds which block, in what order they are taken, and what is found out
when its books are wrong. With prefixes: test_pools.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from baton.shared.kv.block_pool import NO_BLOCK, BlockPool, PoolExhausted

NUM_BLOCKS = 7


def test_what_nobody_finds_is_taken_before_what_was_given_back_earlier() -> None:
    pool = BlockPool(4)
    first, second = pool.allocate(2), pool.allocate(2)
    pool.release(first)
    pool.release(second)
    assert sorted(pool.allocate(2)) == sorted(second)


def test_all_that_is_asked_or_nothing() -> None:
    pool = BlockPool(NUM_BLOCKS)
    pool.allocate(5)
    with pytest.raises(PoolExhausted, match="3 blocks asked, 2 free"):
        pool.allocate(3)
    assert pool.num_free == 2
    assert len(pool.allocate(2)) == 2 and pool.num_free == 0
    assert pool.allocate(0) == []


def test_a_block_is_free_when_the_last_of_its_holders_lets_go() -> None:
    pool = BlockPool(NUM_BLOCKS)
    table = pool.allocate(2)
    pool.acquire(table)
    pool.release(table)
    assert pool.num_free == NUM_BLOCKS - 2
    assert pool.num_free_among([*table, 5]) == 1
    pool.release(table)
    assert pool.num_free == NUM_BLOCKS


def test_a_generation_is_counted_whenever_an_id_is_given_out() -> None:
    pool = BlockPool(2)
    for count in range(3):
        assert sorted(pool.generations([0, 1])) == [count, count]
        pool.release(pool.allocate(2))


def test_a_block_that_is_given_out_says_nothing_of_what_it_held() -> None:
    pool = BlockPool(1)
    [block_id] = pool.allocate(1)
    pool.set_digest(block_id, (1, 2))
    pool.release([block_id])
    assert pool.block(block_id).digest == (1, 2)
    pool.allocate(1)
    assert pool.block(block_id).digest is None


def test_quarantine_keeps_what_its_holder_lets_go() -> None:
    pool = BlockPool(NUM_BLOCKS)
    table = pool.allocate(3)
    pool.quarantine(table[1:])
    pool.quarantine(table[2:])
    pool.release(table)
    assert (pool.num_free, pool.num_quarantined) == (NUM_BLOCKS - 2, 2)
    pool.lift_quarantine(table[1:])
    assert (pool.num_free, pool.num_quarantined) == (NUM_BLOCKS - 1, 1)
    pool.lift_quarantine(table[2:])
    assert (pool.num_free, pool.num_quarantined) == (NUM_BLOCKS, 0)


def test_releasing_what_is_not_held_is_refused() -> None:
    pool = BlockPool(NUM_BLOCKS)
    with pytest.raises(ValueError, match="not held"):
        pool.release([0])


# check_integrity itself


def lose_a_reference(pool: BlockPool) -> None:
    pool._blocks[0].ref_count -= 1


def free_a_held_block(pool: BlockPool) -> None:
    pool._free[0] = None


def lose_a_free_block(pool: BlockPool) -> None:
    del pool._free[NUM_BLOCKS - 1]


def go_negative(pool: BlockPool) -> None:
    pool._blocks[NUM_BLOCKS - 1].ref_count = -1


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
        lose_a_quarantine,
        hold_twice,
    ],
)
def test_check_integrity_finds(fault: Callable[[BlockPool], None]) -> None:
    pool = BlockPool(NUM_BLOCKS)
    table = pool.allocate(2)
    pool.check_integrity([table])
    fault(pool)
    with pytest.raises(AssertionError):
        pool.check_integrity([table])


def test_check_integrity_counts_each_holder_and_no_hole() -> None:
    pool = BlockPool(NUM_BLOCKS)
    table = pool.allocate(2)
    pool.quarantine(table[1:])
    pool.acquire(table)
    pool.check_integrity([table, [NO_BLOCK, NO_BLOCK, *table]])
    with pytest.raises(AssertionError, match="block 0: 2 references, 1 held"):
        pool.check_integrity([table])
