"""Capacity: how many blocks a sequence holds, and how long the longest is that fits."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.shared.kv.capacity import Capacity, GroupShare

MOST_TOKENS = 400


@st.composite
def capacities(draw: st.DrawFn) -> Capacity:
    """Of one to three pools and at least as many groups, each pool with a group at least."""
    num_blocks = draw(st.lists(st.integers(0, 30), min_size=1, max_size=3))
    pools = [
        *range(len(num_blocks)),
        *draw(st.lists(st.integers(0, len(num_blocks) - 1), max_size=3)),
    ]
    groups = [GroupShare(pool, draw(st.none() | st.integers(1, 12))) for pool in pools]
    block_size, length = draw(st.sampled_from([1, 4, 16])), draw(st.integers(1, 2 * MOST_TOKENS))
    return Capacity(block_size, tuple(num_blocks), tuple(groups), length)


def num_blocks_of(capacity: Capacity, num_tokens: int) -> list[int]:
    """Token by token: each that begins a block takes one in every group, which then gives back what
    it holds too many."""
    held = [0] * len(capacity.groups)
    for position in range(num_tokens):
        for number, group in enumerate(capacity.groups):
            if position % capacity.block_size == 0:
                held[number] += 1
            if group.max_blocks is not None:
                held[number] = min(held[number], group.max_blocks)
    pools = range(len(capacity.num_blocks))
    return [
        sum(n for n, group in zip(held, capacity.groups, strict=True) if group.pool == pool)
        for pool in pools
    ]


@given(capacity=capacities(), num_tokens=st.integers(0, MOST_TOKENS))
def test_blocks_are_those_that_a_sequence_holds_at_its_end(
    capacity: Capacity, num_tokens: int
) -> None:
    assert capacity.blocks_for(num_tokens) == num_blocks_of(capacity, num_tokens)


@given(
    capacity=capacities(),
    num_tokens=st.integers(0, MOST_TOKENS),
    num_taken=st.lists(st.integers(0, 30), min_size=3, max_size=3),
)
def test_it_holds_what_is_not_too_long_and_fits_into_every_pool(
    capacity: Capacity, num_tokens: int, num_taken: list[int]
) -> None:
    need = capacity.blocks_for(num_tokens)
    free = [max(0, n - taken) for n, taken in zip(capacity.num_blocks, num_taken, strict=False)]
    for room, num_free in ((capacity.num_blocks, None), (free, free)):
        fits = all(need[pool] <= have for pool, have in enumerate(room))
        fits = fits and num_tokens <= capacity.max_model_len
        assert capacity.holds(num_tokens, num_free) is fits


@given(
    capacity=capacities(),
    limit=st.integers(0, MOST_TOKENS),
    free=st.none() | st.lists(st.integers(0, 30), min_size=3, max_size=3),
)
def test_the_longest_that_fits_is_found(
    capacity: Capacity, limit: int, free: list[int] | None
) -> None:
    num_free = None if free is None else free[: len(capacity.num_blocks)]
    holding = [n for n in range(2 * MOST_TOKENS) if capacity.holds(n)]
    assert capacity.longest == holding[-1]
    capacity = replace(capacity, max_model_len=limit)
    fitting = [n for n in range(limit + 1) if capacity.holds(n, num_free)]
    assert fitting == list(range(len(fitting))), "what fits, fits also when it is shorter"
    found = capacity.max_tokens(limit, num_free)
    assert found == fitting[-1] and isinstance(found, int)


def test_refusals_say_what_is_needed_where_it_is_missing() -> None:
    one = Capacity(16, (10,), (GroupShare(0),), 4096)
    assert (one.describe_need(161), one.describe(161)) == ("11 blocks", "10 blocks in the pool")
    two = Capacity(16, (10, 6), (GroupShare(0), GroupShare(1, 5), GroupShare(1, 2)), 4096)
    assert two.describe_need(161) == "11 blocks of pool 0, 7 blocks of pool 1"
    assert two.describe_need(170) == two.describe_need(161)
    assert two.describe(170) == "10 blocks in pool 0, 6 blocks in pool 1"
    roomy = Capacity(16, (10, 7), two.groups, 160)
    assert (roomy.describe_need(161), roomy.describe(161)) == (
        "161 tokens",
        "160 tokens in a sequence",
    )
    roomy = replace(roomy, max_model_len=161)
    assert roomy.describe_need(161) == "11 blocks of pool 0", "only where it is too little"


@pytest.mark.parametrize("num_free", [[3], [3, 2, 1]])
def test_numbers_of_other_pools_are_refused(num_free: list[int]) -> None:
    with pytest.raises(ValueError):
        Capacity(16, (10, 6), (GroupShare(0), GroupShare(1)), 4096).holds(5, num_free)


def test_a_hand_off_moves_states_and_the_blocks_that_are_not_held() -> None:
    groups = (GroupShare(0), GroupShare(0, 3), GroupShare(1, 1))
    capacity = Capacity(16, (99, 9), groups, 4096, (100, 7000))
    assert capacity.bytes_to_move(15) == 100 + 100 + 7000
    assert capacity.bytes_to_move(160) == 1000 + 300 + 7000
    assert capacity.bytes_to_move(160, 100) == 400 + 300 + 7000
    assert replace(capacity, block_bytes=()).bytes_to_move(160) == 0
