"""Admission, sealing and announcement where some layers keep a state, without a model."""

from __future__ import annotations

import pytest
import torch

from baton.services.prefill.scheduler import Admission
from baton.services.worker.handoff import ClaimTable
from baton.services.worker.messages import Outgoing, ToReader
from baton.services.worker.sequence_table import Recipient
from baton.shared.engine.kv_cache import KvCache, SlotCopy
from baton.shared.kv.arrangement import Arrangement
from baton.shared.kv.block_pool import NO_BLOCK
from baton.shared.kv.cache_spec import CacheGroup, Full, State, StateTensor
from baton.shared.kv.capacity import Capacity, GroupShare
from baton.shared.kv.pools import Pools
from baton.shared.kv.sequence import BlockTable, Sequence, SequenceState
from baton.shared.telemetry import Trace
from tests.unit.worker.conftest import BLOCK_SIZE
from tests.unit.worker.test_admitter import Bench

FULL, STATES = 0, 1
GROUPS = (
    CacheGroup(Full(2, 8), (1,)),
    CacheGroup(State(3, (StateTensor("sum", (4, 2), "float32"),)), (0, 2)),
)
PROMPT = tuple(range(26))
"""Six full blocks, and a tail."""


def make_bench(
    num_blocks: int = 20,
    num_slots: int = 3,
    *,
    has_blocks: bool = True,
    keeps_states: bool = False,
) -> Bench:
    groups = GROUPS if has_blocks else GROUPS[STATES:]
    counts = (num_blocks, num_slots) if has_blocks else (num_slots,)
    sizes = tuple(each.block_bytes(BLOCK_SIZE, 4) for each in groups)
    pools = tuple(range(len(groups)))
    shares = tuple(GroupShare(pool, None if groups[pool].spec.grows else 1) for pool in pools)
    cache = KvCache(Arrangement(groups, pools, sizes, 0.0), counts, BLOCK_SIZE, torch.float32)
    cache.memory.random_(0, 100)
    made = Pools(groups, Capacity(BLOCK_SIZE, counts, shares, 4096))
    return Bench(made, cache, keeps_states=keeps_states)


@pytest.fixture
def bench() -> Bench:
    return make_bench()


def admitted(bench: Bench, name: str, prompt: tuple[int, ...] = PROMPT) -> Sequence:
    sequence = bench.arrive(name, prompt)
    assert bench.admit(sequence) is Admission.ADMIT
    bench.check()
    return sequence


def test_a_sequence_takes_a_slot_and_room_for_all_of_its_prompt(bench: Bench) -> None:
    sequence = admitted(bench, "a")
    assert [len(table) for table in sequence.block_tables] == [7, 1]
    assert bench.num_free == [13, 2] and sequence.num_room_tokens == 28
    bench.pools.extend(sequence, 40)
    assert [len(table) for table in sequence.block_tables] == [10, 1]
    assert bench.pools.num_lacking(sequence, 41) == [1, 0]
    bench.pools.give_back_behind(sequence, 40)
    assert len(sequence.block_tables[STATES]) == 1 and NO_BLOCK not in sequence.block_tables[STATES]
    bench.end(sequence)
    assert bench.num_free == [20, 3]
    bench.check()


@pytest.mark.parametrize(("num_blocks", "num_slots"), [(99, 2), (14, 9)])
def test_room_is_blocks_and_a_slot(num_blocks: int, num_slots: int) -> None:
    bench = make_bench(num_blocks, num_slots)
    first = admitted(bench, "a")
    admitted(bench, "b", PROMPT[::-1])
    third = bench.arrive("c", (60, 61))
    assert bench.admit(third) is Admission.WAIT_FOR_ROOM
    bench.end(first)
    assert bench.admit(third) is Admission.ADMIT
    bench.check()


def test_who_grows_will_want_blocks_and_no_slot() -> None:
    bench = make_bench(11, 2)
    growing = bench.arrive("a", PROMPT, recipient=Recipient("g", 1))
    assert bench.admit(growing) is Admission.ADMIT
    assert bench.admit(bench.arrive("b", (60,) * 13)) is Admission.WAIT_FOR_ROOM
    assert bench.admit(bench.arrive("c", (60,) * 12)) is Admission.ADMIT, "the last slot"


def test_without_a_checkpoint_no_prefix_is_a_hit_nor_waited_for(bench: Bench) -> None:
    """Blocks are found by their hashes, and shared; but who computes needs the state behind them,
    and computes it from the beginning."""
    first = admitted(bench, "a")
    second = admitted(bench, "b")
    bench.compute(first, 26)
    assert first.num_sealed_blocks == 6 and bench.pools.prefix_cache.num_cached == 6
    assert bench.pools.prefix_cache.match(first.block_hashes, PROMPT) == 0
    bench.end(first)
    third = admitted(bench, "c")
    for sequence, num_stored in ((second, 0), (third, 24)):
        assert (sequence.num_cached_tokens, sequence.num_stored_tokens) == (0, num_stored)
        assert sequence.num_sealed_blocks == num_stored // BLOCK_SIZE
    assert third.block_tables[FULL][:6] != second.block_tables[FULL][:6]
    bench.compute(second, 26)
    bench.compute(third, 12)
    assert third.num_sealed_blocks == 6 and not third.is_apart and second.is_apart
    bench.check()


def keep(bench: Bench, sequence: Sequence, num_tokens: int) -> int:
    """The state behind so many computed tokens → its slot."""
    pool = bench.pools.of(STATES)
    [slot] = pool.allocate(1)
    bench.cache.copy_slots([SlotCopy(STATES, sequence.block_tables[STATES][0], slot)])
    assert bench.sealer.seal_state(sequence, STATES, slot, num_tokens // BLOCK_SIZE - 1, None)
    pool.release([slot])
    return slot


def test_a_hit_is_the_deepest_state_and_blocks_behind_it_are_shared() -> None:
    """It takes a slot of its own beside the one that it copies, which is held until it has."""
    bench = make_bench(num_slots=4, keeps_states=True)
    first = admitted(bench, "a")
    bench.compute(first, 8)
    slot = keep(bench, first, 8)
    bench.compute(first, 26)
    bench.end(first)
    second = bench.arrive("b", (*PROMPT[:22], *range(60, 67)))
    assert bench.admit(second) is Admission.ADMIT
    assert (second.num_cached_tokens, second.num_stored_tokens) == (8, 20)
    assert bench.admitter.take_sources(second) == {STATES: slot}
    assert bench.pools.of(STATES).block(slot).ref_count == 1
    assert second.block_tables[STATES] != [slot]
    assert second.stops == (20, 28), "where it leaves the first one's prompt, and its own end"
    bench.pools.of(STATES).release([slot])
    third = bench.arrive("c", (*PROMPT, *range(60, 67)))
    assert bench.admit(third) is Admission.ADMIT
    assert (third.num_cached_tokens, third.num_stored_tokens) == (8, 24)
    assert third.stops == (32,), "the first one's prompt ended there: it does not leave it"
    bench.pools.of(STATES).release([slot])
    bench.check()


def test_a_prompt_waits_for_the_state_where_they_part() -> None:
    """Which the first one then keeps; once it is past that, nobody waits."""
    bench = make_bench(num_slots=4, keeps_states=True)
    first = admitted(bench, "a")
    first.state = SequenceState.PREFILLING
    assert list(first.stops) == [24]
    branch = (*PROMPT[:13], *range(60, 70))
    second = bench.arrive("b", branch)
    assert bench.admit(second) is Admission.WAIT_FOR_PREFIX
    assert list(first.stops) == [12, 24]
    bench.compute(first, 12)
    assert bench.admit(second) is Admission.ADMIT, "none was kept"
    third = bench.arrive("c", (*PROMPT[:18], 60))
    first.num_scheduled_tokens = 20
    assert bench.admit(third) is Admission.ADMIT and len(first.stops) == 2
    bench.check()


def test_a_checkpoint_in_the_only_free_slot_is_not_waited_for() -> None:
    bench = make_bench(num_slots=2, keeps_states=True)
    first = admitted(bench, "a")
    bench.compute(first, 16)
    keep(bench, first, 16)
    second = admitted(bench, "b")
    assert second.num_cached_tokens == 0 and bench.admitter.take_sources(second) == {}


def test_distrust_checks_a_state_before_it_is_used() -> None:
    bench = make_bench(num_slots=4, keeps_states=True)
    first = admitted(bench, "a")
    bench.compute(first, 24)
    keep(bench, first, 16)
    deeper = keep(bench, first, 24)
    bench.end(first)
    bench.cache.words(STATES)[deeper, 1, 2] ^= 8
    second = bench.arrive("b", PROMPT, distrust=True)
    assert bench.admit(second) is Admission.ADMIT
    assert second.num_cached_tokens == 16 and [each.block_ids for each in bench.dropped] == [
        [deeper]
    ]


def test_a_prefix_that_is_no_hit_is_not_listed() -> None:
    bench = make_bench(80)
    sequence = admitted(bench, "a", tuple(range(260)))
    bench.compute(sequence, 260)
    changes = bench.pools.prefix_cache.take_changes()
    assert bench.pools.prefix_cache.num_cached == 65
    assert not changes.added and not changes.removed


def test_a_reader_leaves_out_blocks_and_never_a_state(bench: Bench) -> None:
    before = admitted(bench, "before")
    bench.compute(before, 16)
    reader = bench.arrive("a", PROMPT)
    assert bench.admit(reader, reads=True) is Admission.WAIT_FOR_PREFIX, "the rest is coming"
    bench.end(before)
    assert bench.admit(reader, reads=True) is Admission.ADMIT
    assert reader.num_cached_tokens == 16 and reader.num_sealed_blocks == 4
    places = bench.admitter.take_new_places(reader)
    assert places == {(FULL, 4), (FULL, 5), (FULL, 6), (STATES, 0)}
    bench.check()


def test_where_all_is_state_nobody_waits_for_another() -> None:
    bench = make_bench(has_blocks=False)
    for name, reads in (("a", False), ("b", False), ("c", True)):
        sequence = bench.arrive(name, PROMPT)
        assert bench.admit(sequence, reads=reads) is Admission.ADMIT
        assert sequence.num_cached_tokens == 0 and sequence.num_room_tokens == 28
        assert bench.admitter.take_new_places(sequence) == {(0, 0)}
    assert bench.admit(bench.arrive("d", PROMPT)) is Admission.WAIT_FOR_ROOM
    bench.check()


def test_a_slot_is_announced_with_the_first_token(bench: Bench) -> None:
    sent: list[Outgoing] = []
    claims = ClaimTable(bench.pools, bench.sealer, sent.append, Trace(None, ""))
    sequence = admitted(bench, "a")
    claims.add(sequence.key, "d-1")
    bench.compute(sequence, 17)
    claims.announce(sequence)
    bench.compute(sequence, 26)
    [slot] = sequence.block_tables[STATES]
    assert bench.pools.of(STATES).block(slot).digest is None, "it is not final"
    bench.sealer.freeze(sequence)
    sequence.output_token_ids.append(7)
    claims.announce(sequence)
    told = [each.message.announce for each in sent if isinstance(each, ToReader)]
    assert [(each.group, list(each.block_indices)) for each in told] == [
        (FULL, [0, 1, 2, 3]),
        (FULL, [4, 5, 6]),
        (STATES, [0]),
    ]
    assert [each.HasField("computed") for each in told] == [False, False, True]
    assert list(told[-1].block_ids) == [slot]
    [digest] = bench.sealer.digests(STATES, [slot])
    assert list(told[-1].digests) == list(digest) and len(digest) == 2, "one a layer"


def test_a_corrupt_slot_is_its_sequence_s_alone(bench: Bench) -> None:
    one, other = admitted(bench, "a"), admitted(bench, "b", PROMPT[::-1])
    for sequence in (one, other):
        bench.compute(sequence, 26)
        bench.sealer.freeze(sequence)
    [slot] = one.block_tables[STATES]
    assert not bench.sealer.drop_corrupt(STATES, [slot, *other.block_tables[STATES]])
    bench.cache.words(STATES)[slot, 1, 1] ^= 1
    found = bench.sealer.drop_corrupt(STATES, [slot, *other.block_tables[STATES]])
    assert (found.group, found.block_ids, found.lost) == (STATES, [slot], set())
    assert bench.pools.prefix_cache.num_cached == 12


def test_slots_out_of_place_are_found(bench: Bench) -> None:
    one, other = admitted(bench, "a"), admitted(bench, "b", PROMPT[::-1])
    tables = one.block_tables
    more = [tables[FULL], BlockTable([*tables[STATES], *bench.pools.of(STATES).allocate(1)])]
    with pytest.raises(AssertionError, match="has one slot"):
        bench.pools.check_integrity([more, other.block_tables])
    bench.pools.release([BlockTable(), BlockTable(more[STATES][1:])])
    bench.check()
    [slot] = tables[STATES]
    bench.pools.of(STATES).acquire([slot])
    with pytest.raises(AssertionError, match="slot of two"):
        bench.pools.check_integrity([tables, other.block_tables, [BlockTable(), tables[STATES]]])
    bench.pools.of(STATES).release([slot])
    bench.compute(one, BLOCK_SIZE)
    bench.pools.prefix_cache.seal(STATES, slot, one.block_hashes, 0, PROMPT[:BLOCK_SIZE], (1,))
    with pytest.raises(AssertionError, match="can be found"):
        bench.check()
