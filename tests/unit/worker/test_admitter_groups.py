"""Admission of models with two cache groups, one of which has a window."""

from __future__ import annotations

import pytest

from baton.services.prefill.scheduler import Admission
from baton.services.worker.sequence_table import Recipient
from baton.shared.kv.block_pool import NO_BLOCK
from baton.shared.kv.sequence import Sequence
from tests.unit.worker.conftest import BLOCK_SIZE
from tests.unit.worker.test_admitter import Bench
from tests.unit.worker.two_groups import FULL, MOST_WINDOWED, WINDOWED, make_two_groups

PROMPT = tuple(range(26))
"""Six full blocks, and a tail."""


def make_bench(num_full: int = 20, num_windowed: int = 12) -> Bench:
    return Bench(*make_two_groups(num_full, num_windowed))


@pytest.fixture
def bench() -> Bench:
    return make_bench()


def compute(bench: Bench, sequence: Sequence) -> None:
    """The whole prompt, chunk by chunk, as far as there is room."""
    while sequence.num_computed_tokens < sequence.num_prompt_tokens:
        bench.pools.extend(sequence, bench.pools.num_ahead(sequence))
        bench.compute(sequence, min(sequence.num_room_tokens, sequence.num_prompt_tokens))
        bench.pools.give_back_behind(sequence, sequence.num_computed_tokens)
        bench.check()


def leave_behind(bench: Bench, name: str = "before") -> None:
    """All of the prompt's blocks are cached, and free."""
    sequence = bench.arrive(name, PROMPT)
    assert bench.admit(sequence) is Admission.ADMIT
    compute(bench, sequence)
    bench.end(sequence)
    assert bench.num_free == list(bench.pools.capacity.num_blocks)
    assert bench.pools.prefix_cache.num_cached == 12


def found(bench: Bench, group: int, index: int) -> int:
    probe = bench.arrive(f"probe-{group}-{index}", PROMPT)
    block_id = bench.pools.prefix_cache.find(probe.block_hashes[index], group, PROMPT)
    bench.table.remove(probe.key)
    return block_id


def evict(bench: Bench, group: int, index: int) -> None:
    """One block is taken for something else."""
    pool, block_id = bench.pools.of(group), found(bench, group, index)
    others = [each for each in pool._free if each != block_id]
    pool.acquire(others)
    pool.release(pool.allocate(1))
    pool.release(others)


def test_a_prompt_has_room_for_all_of_it_or_as_far_as_its_window_goes(bench: Bench) -> None:
    sequence = bench.arrive("a", PROMPT)
    assert bench.admit(sequence) is Admission.ADMIT
    assert [len(table) for table in sequence.block_tables] == [7, MOST_WINDOWED]
    assert sequence.num_room_tokens == MOST_WINDOWED * BLOCK_SIZE
    short = bench.arrive("b", (50, 51, 52))
    assert bench.admit(short) is Admission.ADMIT
    assert [len(table) for table in short.block_tables] == [1, 1]
    bench.check()


def test_a_hit_takes_all_blocks_of_one_group_and_the_window_of_the_other(bench: Bench) -> None:
    leave_behind(bench)
    again = bench.arrive("a", PROMPT)
    assert bench.admit(again) is Admission.ADMIT
    assert again.num_cached_tokens == 24
    assert again.block_tables[FULL][:6] == [found(bench, FULL, index) for index in range(6)]
    windowed = [found(bench, WINDOWED, index) for index in (3, 4, 5)]
    assert again.block_tables[WINDOWED][:-1] == [NO_BLOCK] * 3 + windowed
    assert [table.first_live for table in again.block_tables] == [0, 3]
    assert again.num_sealed_blocks == 6
    bench.check()


@pytest.mark.parametrize(("index", "depth"), [(0, 6), (2, 6), (3, 3), (5, 5)])
def test_a_hit_is_the_deepest_prefix_that_is_valid_in_both_groups(
    bench: Bench, index: int, depth: int
) -> None:
    leave_behind(bench)
    evict(bench, WINDOWED, index)
    again = bench.arrive("a", PROMPT)
    assert bench.admit(again) is Admission.ADMIT
    assert again.num_cached_tokens == depth * BLOCK_SIZE
    compute(bench, again)


def test_a_reader_leaves_out_what_it_holds_group_by_group(bench: Bench) -> None:
    """A windowed block in the middle is gone: who computes could go on from before it only."""
    leave_behind(bench)
    evict(bench, WINDOWED, 5)
    kept = found(bench, WINDOWED, 4)
    reader = bench.arrive("a", PROMPT)
    assert bench.admit(reader, reads=True) is Admission.ADMIT
    assert bench.admitter.take_new_places(reader) == {(FULL, 6), (WINDOWED, 5), (WINDOWED, 6)}
    assert reader.block_tables[WINDOWED][:5] == [NO_BLOCK] * 4 + [kept]
    assert [len(table) for table in reader.block_tables] == [7, 7]
    assert reader.num_sealed_blocks == 5 and reader.num_cached_tokens == 5 * BLOCK_SIZE
    bench.check()


def test_a_reader_takes_of_a_windowed_group_the_last_window_only(bench: Bench) -> None:
    reader = bench.arrive("a", PROMPT)
    assert bench.admit(reader, reads=True) is Admission.ADMIT
    # The token behind the prompt, at 26, reads from 17 on.
    windowed = {(WINDOWED, 4), (WINDOWED, 5), (WINDOWED, 6)}
    assert bench.admitter.take_new_places(reader) == {(FULL, i) for i in range(7)} | windowed
    assert bench.num_free == [13, 9]
    assert reader.block_tables[WINDOWED][:4] == [NO_BLOCK] * 4
    bench.check()


@pytest.mark.parametrize(("num_full", "num_windowed"), [(13, 12), (20, 9)])
def test_room_is_asked_of_every_pool_and_nothing_taken_where_one_lacks(
    num_full: int, num_windowed: int
) -> None:
    bench = make_bench(num_full, num_windowed)
    first = bench.arrive("a", PROMPT)
    assert bench.admit(first) is Admission.ADMIT
    before = bench.num_free
    second = bench.arrive("b", PROMPT[::-1])
    assert bench.admit(second) is Admission.WAIT_FOR_ROOM
    assert bench.num_free == before and not second.is_admitted and second.block_tables == []
    bench.check()
    bench.end(first)
    assert bench.admit(second) is Admission.ADMIT


def test_sequences_that_grow_keep_a_block_in_every_pool() -> None:
    bench = make_bench(13, 9)
    grows = bench.arrive("a", PROMPT[:9], recipient=Recipient("g", 1))
    assert bench.admit(grows) is Admission.ADMIT
    assert bench.num_free == [10, 6]
    takes_five = bench.arrive("b", PROMPT[::-1])
    assert bench.admit(takes_five) is Admission.ADMIT
    assert bench.num_free == [3, 1]
    one_more = bench.arrive("c", (55,))
    assert bench.admit(one_more) is Admission.WAIT_FOR_ROOM


def test_a_prefix_is_coming_until_both_groups_have_it(bench: Bench) -> None:
    first, second = bench.arrive("a", PROMPT), bench.arrive("b", (*PROMPT[:8], 50))
    assert bench.admit(first) is Admission.ADMIT
    for group in (FULL, WINDOWED):
        assert bench.admit(second) is Admission.WAIT_FOR_PREFIX
        for index in range(2):
            bench.sealer.seal_block(first, group, index, None)
        first.block_tables[group].num_sealed = 2
    assert bench.admit(second) is Admission.ADMIT
    assert second.num_cached_tokens == 8
    bench.check()


def test_who_computes_does_not_wait_for_what_a_reader_never_has(bench: Bench) -> None:
    """Of the windowed group a reader has the last window: no prefix before it is valid here."""
    reader = bench.arrive("a", PROMPT)
    assert bench.admit(reader, reads=True) is Admission.ADMIT
    other = bench.arrive("b", (*PROMPT[:16], 50))
    assert bench.admit(other) is Admission.WAIT_FOR_PREFIX
    bench.sealer.hash_blocks(reader)
    for index in range(6):
        bench.sealer.seal_block(reader, FULL, index, None)
    for index in (4, 5):
        bench.sealer.seal_block(reader, WINDOWED, index, None)
    for table in reader.block_tables:
        table.num_sealed = 6
    assert bench.admit(other) is Admission.ADMIT
    assert other.num_cached_tokens == 0
    bench.check()


def spoil(bench: Bench, group: int, index: int) -> int:
    block_id = found(bench, group, index)
    bench.cache.words(group)[block_id, 0, 3] ^= 1
    return block_id


@pytest.mark.parametrize(("group", "index", "depth"), [(FULL, 1, 1), (WINDOWED, 4, 4)])
def test_who_distrusts_checks_the_blocks_of_every_group(
    bench: Bench, group: int, index: int, depth: int
) -> None:
    leave_behind(bench)
    corrupt = spoil(bench, group, index)
    wary = bench.arrive("a", PROMPT, distrust=True)
    assert bench.admit(wary) is Admission.ADMIT
    assert wary.num_cached_tokens == depth * BLOCK_SIZE
    [dropped] = bench.dropped
    assert (dropped.group, dropped.block_ids) == (group, [corrupt])
    assert len(dropped.lost) == 2 * (6 - index), "in both groups, all from its position on"
    bench.check()


def test_what_no_token_reads_any_more_is_not_checked(bench: Bench) -> None:
    leave_behind(bench)
    spoil(bench, WINDOWED, 1)
    wary = bench.arrive("a", PROMPT, distrust=True)
    assert bench.admit(wary) is Admission.ADMIT
    assert wary.num_cached_tokens == 24 and not bench.dropped


def test_who_distrusts_uses_nothing_that_has_no_digest(bench: Bench) -> None:
    """Also of a windowed group, and also who reads."""
    leave_behind(bench)
    block_id = found(bench, WINDOWED, 5)
    bench.pools.of(WINDOWED).block(block_id).digest = None
    wary = bench.arrive("a", PROMPT, distrust=True)
    assert bench.admit(wary) is Admission.ADMIT
    assert wary.num_cached_tokens == 5 * BLOCK_SIZE
    bench.end(wary)
    reader = bench.arrive("b", PROMPT, distrust=True)
    assert bench.admit(reader, reads=True) is Admission.ADMIT
    assert (WINDOWED, 5) in bench.admitter.take_new_places(reader)
    bench.check()
