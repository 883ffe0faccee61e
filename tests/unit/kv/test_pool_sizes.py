"""Pool sizes: what memory becomes, and the longest sequence that its pools hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.shared.kv.arrangement import arrange, most_blocks
from baton.shared.kv.cache_spec import CacheSpec, Full, Sliding, State, StateTensor
from baton.shared.kv.pool_sizes import NumBlocks, PoolSizes

BLOCK_SIZE, ITEMSIZE = 16, 2
LOCAL: list[CacheSpec] = [Sliding(1, 16, 128)]
LLAMA: list[CacheSpec] = [Full(2, 16)] * 4
GEMMA_3 = [*LOCAL * 5, Full(1, 16)] * 2
GEMMA_4 = [*LOCAL * 5, Full(3, 40)] * 2
MISTRAL: list[CacheSpec] = [Sliding(2, 16, 256)] * 4
STATE = State(2, (StateTensor("sum", (500,), "float32"),))
HYBRID: list[CacheSpec] = [STATE, STATE, Full(2, 16)] * 2


def sizes_of(specs: list[CacheSpec], limit: int, ahead_tokens: int = 64) -> PoolSizes:
    arrangement = arrange(
        specs,
        block_size=BLOCK_SIZE,
        itemsize=ITEMSIZE,
        max_model_len=limit,
        ahead_tokens=ahead_tokens,
    )
    return PoolSizes(arrangement, BLOCK_SIZE, ahead_tokens, in_flight_tokens=1, max_num_seqs=20)


def longest_by_trial(sizes: PoolSizes, num_bytes: int, limit: int) -> int:
    def holds(num_tokens: int) -> bool:
        return sizes.capacity(sizes.of_bytes(num_bytes, num_tokens), limit).holds(num_tokens)

    return max((n for n in range(1, limit + 1) if holds(n)), default=0)


@given(
    specs=st.sampled_from([LLAMA, GEMMA_3, GEMMA_4, MISTRAL, HYBRID]),
    limit=st.integers(1, 1500),
    num_kib=st.integers(0, 3000),
    ahead_tokens=st.sampled_from([1, 64, 512]),
)
def test_the_longest_is_found(
    specs: list[CacheSpec], limit: int, num_kib: int, ahead_tokens: int
) -> None:
    sizes, num_bytes = sizes_of(specs, limit, ahead_tokens), num_kib * 1024
    longest = sizes.longest(lambda num_tokens: sizes.of_bytes(num_bytes, num_tokens), limit)
    assert longest == longest_by_trial(sizes, num_bytes, limit)
    if not longest:
        return
    pools = sizes.of_bytes(num_bytes, longest)
    # With the zero blocks no more than there is, and what is promised to clients is kept.
    assert sizes.bytes_of(pools) + sum(sizes.arrangement.block_bytes) <= num_bytes
    assert sizes.capacity(pools, longest).longest == longest


def test_what_lies_behind_a_window_costs_nothing() -> None:
    """Layers that are all windowed hold any length, or none that the window does not fit into."""
    sizes = sizes_of(MISTRAL, 100_000)
    block_bytes = sizes.arrangement.block_bytes[0]
    [most] = [most_blocks(group, BLOCK_SIZE, 64) for group in sizes.arrangement.groups]
    assert most is not None

    def longest(num_blocks: int) -> int:
        num_bytes = (num_blocks + 1) * block_bytes
        return sizes.longest(lambda num_tokens: sizes.of_bytes(num_bytes, num_tokens), 100_000)

    assert longest(most) == 100_000
    assert longest(10) == 10 * BLOCK_SIZE


def test_windowed_groups_leave_the_full_one_half_of_a_small_pool() -> None:
    """However many there are, and however much is computed ahead."""
    sizes = sizes_of(GEMMA_3, 100_000, ahead_tokens=8192)
    arrangement = sizes.arrangement
    assert arrangement.num_pools == 1 and len(arrangement.groups) > 3
    capacity = sizes.capacity((600,), 100_000)
    windowed = [share.max_blocks for share in capacity.groups if share.max_blocks is not None]
    assert len(windowed) == len(arrangement.groups) - 1
    assert sum(windowed) <= 300
    assert capacity.longest == (600 - sum(windowed)) * BLOCK_SIZE


@pytest.mark.parametrize("specs", [LLAMA, GEMMA_3, GEMMA_4])
def test_of_a_number_of_blocks(specs: list[CacheSpec]) -> None:
    sizes = sizes_of(specs, 10_000)

    def pools_for(num_tokens: int) -> NumBlocks:
        return sizes.of_first(60, num_tokens)

    longest = sizes.longest(pools_for, 10_000)
    assert 0 < longest < 10_000
    assert pools_for(longest)[0] == 60
    capacity = sizes.capacity(pools_for(longest), longest)
    assert capacity.holds(longest)
    longer = sizes.capacity(pools_for(longest + 1), 10_000)
    assert not longer.holds(longest + 1)


def test_none_fits() -> None:
    sizes = sizes_of(LLAMA, 100)
    assert sizes.longest(lambda _: (0,), 100) == 0
    assert sizes.longest(lambda _: None, 100) == 0


@given(num_kib=st.integers(0, 3000), num_tokens=st.integers(1, 3000))
def test_slots_are_one_for_each_row_or_as_many_as_fit(num_kib: int, num_tokens: int) -> None:
    """But blocks for the sequence come first, and half of the memory is theirs."""
    sizes, num_bytes = sizes_of(HYBRID, 4000), num_kib * 1024
    (num_blocks, num_slots), slot = sizes.of_bytes(num_bytes, num_tokens), sizes.slot_bytes
    usable = num_bytes - sum(sizes.arrangement.block_bytes)
    block = sizes.arrangement.block_bytes[0]
    need = -(-num_tokens // BLOCK_SIZE) * block
    assert num_slots <= sizes.max_num_seqs
    assert num_slots * slot <= max(0, usable - need, 0)
    assert num_slots < 2 or num_slots * slot <= usable // 2
    if num_slots < sizes.max_num_seqs:
        more = (num_slots + 1) * slot
        assert more > usable - need or (num_slots and more > usable // 2)
    if usable >= 0:
        assert usable - num_slots * slot - block < num_blocks * block <= usable - num_slots * slot


def test_slots_beside_a_number_of_blocks() -> None:
    sizes = sizes_of(HYBRID, 4000)
    block, slot = sizes.arrangement.block_bytes
    assert sizes.of_first(60, 100, 60 * block + 3 * slot) == (60, 3)
    assert sizes.of_first(60, 100, 60 * block + 100 * slot) == (60, 20)
    assert sizes.of_first(60, 100, 0) == (60, 1), "one at least: what does not fit is refused"
    capacity = sizes.capacity((60, 3), 4000)
    assert capacity.blocks_for(100) == [7, 1] and capacity.longest == 60 * BLOCK_SIZE
