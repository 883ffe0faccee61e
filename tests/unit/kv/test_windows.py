"""Pools while a sequence grows: what it holds behind its windows, counted."""

from __future__ import annotations

import pytest

from baton.shared.kv.arrangement import most_blocks
from baton.shared.kv.block_pool import NO_BLOCK, PoolExhausted
from baton.shared.kv.cache_spec import CacheGroup, CacheSpec, Full, Sliding
from baton.shared.kv.capacity import Capacity, GroupShare
from baton.shared.kv.pools import Pools
from baton.shared.kv.sequence import AttemptKey, BlockTable, Sequence
from baton.shared.sampling import SamplingParams

BLOCK_SIZE, WINDOW = 4, 10
FULL, SLIDING = Full(2, 8), Sliding(2, 8, WINDOW)
NUM_TOKENS = 10 * WINDOW

MODELS: dict[str, tuple[list[CacheSpec], list[int]]] = {
    "sliding": ([SLIDING], [0]),
    "share a pool": ([FULL, SLIDING], [0, 0]),
    "pools of their own": ([SLIDING, FULL], [1, 0]),
}


def make_pools(model: str, *, ahead: int, num_blocks: int = 100) -> Pools:
    specs, pools = MODELS[model]
    groups = [CacheGroup(spec, (layer,)) for layer, spec in enumerate(specs)]
    shares = [
        GroupShare(pool, most_blocks(group, BLOCK_SIZE, ahead))
        for pool, group in zip(pools, groups, strict=True)
    ]
    sizes = (num_blocks,) * (max(pools) + 1)
    return Pools(groups, Capacity(BLOCK_SIZE, sizes, tuple(shares), 4096))


def make_sequence(pools: Pools, num_prompt: int) -> Sequence:
    sequence = Sequence(AttemptKey("r", 0, 1), tuple(range(num_prompt)), SamplingParams())
    sequence.block_tables = [BlockTable() for _ in pools.groups]
    sequence.is_admitted = True
    return sequence


def check(pools: Pools, sequence: Sequence, num_tokens: int) -> None:
    """Nothing but the sequence holds blocks, and no more than was reckoned with."""
    pools.check_integrity([sequence.block_tables])
    held = [
        pool.num_blocks - free for pool, free in zip(pools.by_number, pools.num_free, strict=True)
    ]
    most = pools.capacity.blocks_for(num_tokens)
    assert all(have <= bound for have, bound in zip(held, most, strict=True))


def check_reads(pools: Pools, sequence: Sequence, position: int) -> None:
    """A token at `position` finds all that it reads, and what no later one reads is gone."""
    for group, table in zip(pools.groups, sequence.block_tables, strict=True):
        first = group.first_block(position, BLOCK_SIZE)
        assert NO_BLOCK not in table[first : position // BLOCK_SIZE + 1]
        assert table[:first] == [NO_BLOCK] * first


@pytest.mark.parametrize("in_flight", [1, 3])
@pytest.mark.parametrize("model", MODELS)
def test_blocks_stay_bounded_while_a_sequence_decodes_to_ten_windows(
    model: str, in_flight: int
) -> None:
    """With so many tokens in flight: blocks are given back behind the first of them."""
    pools = make_pools(model, ahead=in_flight)
    sequence = make_sequence(pools, 1)
    most_held = 0
    for position in range(NUM_TOKENS):
        pools.extend(sequence, position + in_flight)
        check(pools, sequence, position + in_flight)
        check_reads(pools, sequence, position)
        for table, share in zip(sequence.block_tables, pools.capacity.groups, strict=True):
            if share.max_blocks is not None:
                most_held = max(most_held, len(table) - table.first_live)
        pools.give_back_behind(sequence, position + 1)
        check(pools, sequence, position + in_flight)
    shares = [share.max_blocks for share in pools.capacity.groups if share.max_blocks]
    assert most_held == shares[0] < NUM_TOKENS // BLOCK_SIZE / 3, "and not one could be spared"


@pytest.mark.parametrize("ahead", [BLOCK_SIZE, 16])
@pytest.mark.parametrize("model", MODELS)
def test_blocks_stay_bounded_while_a_prompt_of_ten_windows_is_computed(
    model: str, ahead: int
) -> None:
    pools = make_pools(model, ahead=ahead)
    sequence = make_sequence(pools, NUM_TOKENS)
    computed = num_chunks = 0
    while computed < NUM_TOKENS:
        assert pools.num_ahead(sequence) <= NUM_TOKENS
        pools.extend(sequence, pools.num_ahead(sequence))
        check(pools, sequence, NUM_TOKENS)
        chunk = min(ahead, sequence.num_room_tokens - computed, NUM_TOKENS - computed)
        assert chunk >= min(BLOCK_SIZE, NUM_TOKENS - computed), "there is always room to go on"
        for position in range(computed, computed + chunk):
            for group, table in zip(pools.groups, sequence.block_tables, strict=True):
                first = group.first_block(position, BLOCK_SIZE)
                assert NO_BLOCK not in table[first : position // BLOCK_SIZE + 1]
        computed, num_chunks = computed + chunk, num_chunks + 1
        pools.give_back_behind(sequence, computed)
        check_reads(pools, sequence, min(computed, NUM_TOKENS - 1))
    assert num_chunks <= NUM_TOKENS // BLOCK_SIZE
    pools.release(sequence.block_tables)
    pools.check_integrity([])


def test_what_is_behind_a_window_is_known_before_it_goes() -> None:
    pools = make_pools("share a pool", ahead=BLOCK_SIZE)
    sequence = make_sequence(pools, NUM_TOKENS)
    pools.extend(sequence, 20)
    windowed = list(sequence.block_tables[1])
    assert pools.behind_window(sequence, 0, 20) == []
    assert pools.behind_window(sequence, 1, WINDOW) == []
    # A token at 20 reads from 11 on.
    assert pools.behind_window(sequence, 1, 20) == windowed[:2]
    pools.give_back_behind(sequence, 20)
    assert pools.behind_window(sequence, 1, 20) == []
    assert pools.behind_window(sequence, 1, 1000) == windowed[2:], "of what there is"
    assert sequence.block_tables[1].left == [(block_id, 1) for block_id in windowed[:2]]


def test_room_is_taken_in_every_group_or_in_none() -> None:
    pools = make_pools("share a pool", ahead=BLOCK_SIZE, num_blocks=9)
    sequence = make_sequence(pools, NUM_TOKENS)
    pools.extend(sequence, 16)
    assert pools.num_lacking(sequence, 17) == [2] and pools.num_free == [1]
    assert not pools.has([2]) and pools.has([1])
    with pytest.raises(PoolExhausted):
        pools.extend(sequence, 17)
    assert [len(table) for table in sequence.block_tables] == [4, 4]
    assert sequence.num_room_tokens == 16
    pools.give_back_behind(sequence, 16)
    pools.extend(sequence, 17)
    assert sequence.num_room_tokens == 20
    pools.check_integrity([sequence.block_tables])


def test_tables_of_unequal_lengths_grow_to_the_same() -> None:
    """As after the admission of a long prompt, whose windowed groups have room for a stretch."""
    pools = make_pools("pools of their own", ahead=BLOCK_SIZE)
    sequence = make_sequence(pools, NUM_TOKENS)
    sequence.block_tables[1].extend(pools.of(1).allocate(6))
    assert pools.num_lacking(sequence, 20) == [0, 5]
    pools.extend(sequence, 20)
    assert [len(table) for table in sequence.block_tables] == [5, 6]
    assert sequence.num_room_tokens == 20


def test_holes_out_of_place_are_found() -> None:
    pools = make_pools("sliding", ahead=BLOCK_SIZE)
    sequence = make_sequence(pools, NUM_TOKENS)
    pools.extend(sequence, 12)
    [table] = sequence.block_tables
    pools.check_integrity([sequence.block_tables])
    table.first_live = 1
    with pytest.raises(AssertionError, match="out of place"):
        pools.check_integrity([sequence.block_tables])
    table.first_live = 0
    pools.of(0).release(table[1:2])
    table[1] = NO_BLOCK
    with pytest.raises(AssertionError, match="out of place"):
        pools.check_integrity([sequence.block_tables])
