"""Pure policy: who enters, what a step computes, who yields."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.services.decode import scheduler
from baton.services.decode.scheduler import (
    choose_rows,
    choose_victim,
    is_short_of_blocks,
    lacking_room,
)
from baton.services.prefill.scheduler import Admission, admission, choose_chunks
from baton.shared.kv.capacity import num_blocks_for
from baton.shared.kv.sequence import AttemptKey, Sequence, SequenceState
from baton.shared.sampling import SamplingParams

BLOCK_SIZE = 4


def sequence(num_prompt: int, *, num_computed: int = 0, name: str = "r") -> Sequence:
    """With room for its prompt."""
    key = AttemptKey(name, 0, 1)
    made = Sequence(key, tuple(range(num_prompt)), SamplingParams(max_tokens=1000))
    made.num_computed_tokens = made.num_scheduled_tokens = num_computed
    made.num_room_tokens = num_blocks_for(num_prompt, BLOCK_SIZE) * BLOCK_SIZE
    return made


def running(num_tokens: int, num_blocks: int, name: str = "r") -> Sequence:
    """Decoding, with room for `num_blocks` blocks of tokens."""
    made = sequence(num_tokens, num_computed=num_tokens - 1, name=name)
    made.num_room_tokens = num_blocks * BLOCK_SIZE
    return made


def lacking_of(num_pools: int) -> scheduler.Lacking:
    """As if a sequence had a block table in each pool."""

    def num_lacking(each: Sequence) -> list[int]:
        wanted = num_blocks_for(each.num_scheduled_tokens + 1, BLOCK_SIZE)
        return [max(0, wanted - each.num_room_tokens // BLOCK_SIZE)] * num_pools

    return num_lacking


ONE_POOL, TWO_POOLS = lacking_of(1), lacking_of(2)


# Prefill


@pytest.mark.parametrize(
    ("num_new", "num_free", "num_growing", "verdict"),
    [
        ([4], [4], [0], Admission.ADMIT),
        ([5], [4], [0], Admission.WAIT_FOR_ROOM),
        ([3], [4], [1], Admission.ADMIT),
        ([4], [4], [1], Admission.WAIT_FOR_ROOM),
        ([0], [0], [0], Admission.ADMIT),
        ([4, 2], [4, 3], [0, 1], Admission.ADMIT),
        ([4, 3], [9, 3], [0, 1], Admission.WAIT_FOR_ROOM),
        ([9, 0], [4, 9], [0, 0], Admission.WAIT_FOR_ROOM),
    ],
)
def test_a_prompt_enters_when_all_of_it_fits_beside_those_that_grow_in_every_pool(
    num_new: list[int], num_free: list[int], num_growing: list[int], verdict: Admission
) -> None:
    assert verdict is admission(
        num_new_blocks=num_new,
        num_free_blocks=num_free,
        num_growing=num_growing,
        prefix_is_coming=False,
    )


def test_a_prompt_whose_prefix_is_coming_does_not_block_those_behind_it() -> None:
    """Also when there is no room: only WAIT_FOR_ROOM makes the others wait."""
    assert Admission.WAIT_FOR_PREFIX is admission(
        num_new_blocks=[9], num_free_blocks=[0], num_growing=[0], prefix_is_coming=True
    )


def chunks(prompts: list[Sequence], budget: int, max_rows: int = 100) -> list[tuple[str, int]]:
    planned = choose_chunks(prompts, token_budget=budget, max_rows=max_rows, block_size=BLOCK_SIZE)
    return [(chunk.sequence.key.request_id, chunk.num_tokens) for chunk in planned]


def test_chunks_are_of_the_shortest_first() -> None:
    """Of two that have as much left, of the one that came first."""
    prompts = [sequence(6, name="a"), sequence(9, name="b"), sequence(3, name="c")]
    assert chunks(prompts, 100) == [("c", 3), ("a", 6), ("b", 9)]
    assert chunks(prompts, 14) == [("c", 3), ("a", 6), ("b", 4)], "to the end of a block"
    assert chunks([sequence(8, name="a"), sequence(8, name="b")], 12) == [("a", 8), ("b", 4)]
    begun = [sequence(8, name="a"), sequence(20, num_computed=16, name="b")]
    assert chunks(begun, 100) == [("b", 4), ("a", 8)], "what is left counts"
    assert chunks(prompts, 0) == chunks(prompts, -3) == chunks([], 9) == []


def test_an_eighth_of_the_tokens_is_the_oldests_and_a_row() -> None:
    long = sequence(400, name="long")
    short = [sequence(16, name=str(number)) for number in range(4)]
    assert chunks([long, *short], 64) == [("0", 16), ("1", 16), ("2", 16), ("3", 8), ("long", 8)]
    assert chunks([long, *short], 16) == [("0", 12), ("long", 4)], "a block at least"
    assert chunks([long, *short], 4) == [("long", 4)]
    assert chunks([long, *short], 100, max_rows=2) == [("0", 16), ("long", 84)]
    assert chunks([long, *short], 100, max_rows=1) == [("long", 100)]
    assert chunks([*short, long], 64) == [(str(number), 16) for number in range(4)]


def test_a_chunk_ends_with_a_block_unless_it_is_the_last_or_too_small() -> None:
    assert chunks([sequence(20)], 10) == [("r", 8)]
    assert chunks([sequence(20, num_computed=3)], 10) == [("r", 9)]
    assert chunks([sequence(20, num_computed=2)], 2) == [("r", 2)]
    assert chunks([sequence(20)], 3) == [("r", 3)], "less than a block is still progress"
    assert chunks([sequence(7, num_computed=4)], 10) == [("r", 3)]


def test_a_chunk_goes_no_further_than_there_is_room_for() -> None:
    """Of a windowed group a prompt has room for a stretch at a time."""
    stretch, whole = sequence(20, name="a"), sequence(6, name="b")
    stretch.num_room_tokens = 8
    assert chunks([stretch, whole], 100) == [("b", 6), ("a", 8)]
    stretch.num_computed_tokens = stretch.num_scheduled_tokens = 8
    assert chunks([stretch, whole], 100, max_rows=1) == [("b", 6)], "it takes no row in vain"
    stretch.num_room_tokens = 12
    assert chunks([stretch, whole], 100, max_rows=1) == [("a", 4)]


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    budget=st.integers(1, 30),
    max_rows=st.integers(1, 5),
)
def test_every_prompt_is_computed_once_within_budget(
    lengths: list[int], budget: int, max_rows: int
) -> None:
    left = [sequence(length, name=str(i)) for i, length in enumerate(lengths)]
    finished: list[int] = []
    while left:
        planned = choose_chunks(left, token_budget=budget, max_rows=max_rows, block_size=BLOCK_SIZE)
        assert planned, "no step is without progress"
        assert sum(chunk.num_tokens for chunk in planned) <= budget
        assert len(planned) <= max_rows and all(chunk.num_tokens > 0 for chunk in planned)
        for chunk in planned:
            chunk.sequence.num_computed_tokens += chunk.num_tokens
            chunk.sequence.num_scheduled_tokens += chunk.num_tokens
        finished += [each.num_computed_tokens for each in left if _is_computed(each)]
        left = [each for each in left if not _is_computed(each)]
    assert sorted(finished) == sorted(lengths)


def _is_computed(each: Sequence) -> bool:
    return each.num_computed_tokens >= each.num_prompt_tokens


# Decode


def test_who_runs() -> None:
    """Also who draws the first token in a step that is in flight; not who has drawn the last."""
    decoding, ahead, filling, over, waiting = (
        sequence(8, num_computed=8, name=name) for name in "abcde"
    )
    decoding.state = over.state = SequenceState.DECODING
    ahead.state = filling.state = SequenceState.PREFILLING
    filling.num_scheduled_tokens = 7
    over.num_scheduled_tokens = over.num_to_compute
    assert scheduler.running([decoding, ahead, filling, over, waiting]) == [decoding, ahead]


def test_a_constrained_sequence_waits_for_its_last_token_unless_its_mask_follows() -> None:
    free, constrained = (sequence(8, num_computed=8, name=name) for name in "ab")
    free.state = constrained.state = SequenceState.DECODING
    constrained.matcher = object()  # type: ignore[assignment]
    assert scheduler.running([free, constrained]) == [free, constrained]
    free.num_steps_in_flight = constrained.num_steps_in_flight = 1
    assert scheduler.running([free, constrained]) == [free]
    assert scheduler.running([free, constrained], masks_follow=True) == [free, constrained]
    # Bad words have no such way.
    constrained.needs_last_tokens = True
    assert scheduler.running([free, constrained], masks_follow=True) == [free]


def test_a_sequence_lacks_room_when_its_next_token_has_none() -> None:
    fits, lacks = running(8, 2), running(9, 2)
    assert lacking_room([fits, lacks]) == [lacks]


def test_short_of_blocks_counts_all_that_is_wanted() -> None:
    batch = [running(9, 2), running(5, 1), running(4, 1)]
    assert not is_short_of_blocks(batch, ONE_POOL, [2])
    assert is_short_of_blocks(batch, ONE_POOL, [1])


def test_short_of_blocks_is_who_lacks_them_in_any_pool() -> None:
    batch = [running(9, 2), running(5, 1), running(4, 1)]
    assert not is_short_of_blocks(batch, TWO_POOLS, [2, 2])
    assert is_short_of_blocks(batch, TWO_POOLS, [9, 1])
    assert is_short_of_blocks(batch, TWO_POOLS, [1, 9])


def test_the_latest_is_preempted_and_the_first_never() -> None:
    batch = [running(4, 1, name) for name in "abc"]
    assert choose_victim(batch) is batch[2]
    assert choose_victim(batch[:1]) is None
    assert choose_victim([]) is None


def rows(batch: list[Sequence], *num_free: int, max_rows: int = 100) -> list[str]:
    lacking = lacking_of(len(num_free))
    planned = choose_rows(batch, lacking, num_free_blocks=num_free, max_rows=max_rows)
    return [each.key.request_id for each in planned]


def test_rows_oldest_first_and_who_finds_no_block_sits_out() -> None:
    batch = [running(9, 2, "a"), running(9, 2, "b"), running(7, 2, "c")]
    assert rows(batch, 2) == ["a", "b", "c"]
    assert rows(batch, 1) == ["a", "c"]
    assert rows(batch, 0) == ["c"]
    assert rows(batch, 2, max_rows=1) == ["a"]
    assert rows(batch, 9, 1) == rows(batch, 1, 9) == ["a", "c"]


@given(
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 1)), max_size=8),
    num_free=st.lists(st.integers(0, 6), min_size=2, max_size=2),
)
def test_planned_rows_fit_into_what_is_free(
    sizes: list[tuple[int, int]], num_free: list[int]
) -> None:
    batch = [
        running(tokens, num_blocks_for(tokens, BLOCK_SIZE) - lacking, str(i))
        for i, (tokens, lacking) in enumerate(sizes)
    ]
    planned = choose_rows(batch, TWO_POOLS, num_free_blocks=num_free, max_rows=100)
    taken = sum(TWO_POOLS(each)[0] for each in planned)
    assert taken <= min(num_free)
    sitting_out = [each for each in batch if each not in planned]
    assert all(TWO_POOLS(each)[0] for each in sitting_out)
    assert not sitting_out or taken == min(num_free), "nobody sits out for whom there is room"
