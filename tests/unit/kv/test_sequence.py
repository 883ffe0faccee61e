"""Sequence: indices across attempts, what ends one, slices over prompt and output."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.shared.kv.block_pool import NO_BLOCK
from baton.shared.kv.capacity import num_blocks_for
from baton.shared.kv.sequence import AttemptKey, BlockTable, FinishReason, Sequence
from baton.shared.sampling import SamplingParams

EOS = frozenset({2})


def sequence(
    prompt: tuple[int, ...] = (5, 6, 7), *, first_index: int = 0, **params: Any
) -> Sequence:
    sampling = SamplingParams(**{"max_tokens": 3, **params})
    return Sequence(AttemptKey("r", 0, 1), prompt, sampling, first_index)


def test_the_last_token_allowed_ends_it() -> None:
    one = sequence()
    assert [one.append(token, EOS) for token in (9, 9, 9)] == [None, None, FinishReason.LENGTH]
    assert one.next_index == 3 and one.num_tokens == 6


def test_max_tokens_counts_those_of_earlier_attempts() -> None:
    """The prompt of the second attempt ends with the two tokens that the first one drew."""
    again = sequence((5, 6, 7, 9, 9), first_index=2)
    assert again.next_index == 2
    assert again.append(9, EOS) is FinishReason.LENGTH


def test_prompt_and_emitted_tokens_are_told_apart() -> None:
    first = sequence(max_tokens=5)
    assert (first.client_prompt_token_ids, first.emitted_token_ids) == ((5, 6, 7), ())
    for token in (9, 8):
        first.append(token, EOS)
    again = sequence((*first.prompt_token_ids, 9, 8), first_index=2, max_tokens=5)
    for each in (first, again):
        assert (each.client_prompt_token_ids, each.emitted_token_ids) == ((5, 6, 7), (9, 8))
    again.append(4, EOS)
    assert (again.client_prompt_token_ids, again.emitted_token_ids) == ((5, 6, 7), (9, 8, 4))


@pytest.mark.parametrize(
    ("token_id", "params", "reason"),
    [
        (2, {}, FinishReason.STOP),
        (2, {"ignore_eos": True}, None),
        (4, {"stop_token_ids": frozenset({4})}, FinishReason.STOP),
        (2, {"stop_token_ids": frozenset({2}), "ignore_eos": True}, FinishReason.STOP),
        (2, {"max_tokens": 1}, FinishReason.STOP),
        (3, {"max_tokens": 1}, FinishReason.LENGTH),
    ],
)
def test_what_ends_a_sequence(
    token_id: int, params: dict[str, Any], reason: FinishReason | None
) -> None:
    one = sequence(**params)
    assert one.append(token_id, EOS) is reason
    assert one.output_token_ids == [token_id], "the token that stops it is kept"


tokens = st.lists(st.integers(0, 9), max_size=6)


@given(prompt=tokens, output=tokens, start=st.integers(0, 12), length=st.integers(0, 12))
def test_slices_take_prompt_and_output_as_one_list(
    prompt: list[int], output: list[int], start: int, length: int
) -> None:
    one = sequence(tuple(prompt), max_tokens=100, ignore_eos=True)
    for token in output:
        one.append(token, EOS)
    assert one.token_slice(start, start + length) == tuple(prompt + output)[start : start + length]


def test_attempts_are_ordered_and_share_their_sequence() -> None:
    first, second = AttemptKey("r", 1, 1), AttemptKey("r", 1, 2)
    assert first < second and first.sequence == second.sequence == ("r", 1)
    assert str(second) == "r/1#2"


@given(num_tokens=st.integers(0, 10**6), block_size=st.integers(1, 128))
def test_blocks_just_cover_the_tokens(num_tokens: int, block_size: int) -> None:
    num_blocks = num_blocks_for(num_tokens, block_size)
    assert num_blocks * block_size >= num_tokens > (num_blocks - 1) * block_size


# Block tables


def test_a_table_may_begin_with_holes() -> None:
    table = BlockTable([7, 8], first_live=2)
    assert table == [NO_BLOCK, NO_BLOCK, 7, 8]
    assert (table.first_live, table.num_sealed, table.left) == (2, 2, [])
    assert BlockTable() == [] and BlockTable([7]).first_live == 0


def test_what_leaves_a_table_becomes_holes_and_is_remembered() -> None:
    table = BlockTable([7, 8, 9], first_live=1)
    table.leave([7], [40])
    table.leave([8, 9], [41, 42])
    assert table == [NO_BLOCK] * 4 and table.first_live == 4
    assert table.left == [(7, 40), (8, 41), (9, 42)]
    table.append(5)
    assert table[table.first_live :] == [5]


def test_blocks_are_sealed_that_are_so_in_every_group() -> None:
    one = sequence()
    assert one.num_sealed_blocks == 0, "it has no tables yet"
    one.block_tables = [BlockTable([1, 2, 3]), BlockTable([4, 5], first_live=1)]
    assert one.num_sealed_blocks == 0
    one.block_tables[0].num_sealed = 3
    assert one.num_sealed_blocks == 1, "a hole counts as sealed"
