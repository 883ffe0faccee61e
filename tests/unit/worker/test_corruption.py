"""Who has to end when a block is found corrupt, and how it is found, with two cache groups."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from baton.services.worker.corruption import CorruptionGuard
from baton.services.worker.failpoints import Failpoints
from baton.services.worker.sealing import Sealer
from baton.services.worker.sequence_table import SequenceTable
from baton.shared.engine.block_sums import HostBlockSums
from baton.shared.engine.kv_cache import KvCache
from baton.shared.kv.block_pool import NO_BLOCK
from baton.shared.kv.pools import Pools
from baton.shared.kv.sequence import AttemptKey, BlockTable, Sequence
from baton.shared.rpc.errors import BatonError, DigestMismatch
from baton.shared.sampling import SamplingParams
from baton.shared.telemetry import Counters
from baton.v1 import kv_service_pb2 as kv
from tests.unit.worker.conftest import BLOCK_SIZE
from tests.unit.worker.two_groups import FULL, GROUPS, WINDOWED, make_two_groups

PROMPT = tuple(range(26))


@dataclass
class Bench:
    pools: Pools
    cache: KvCache
    sealer: Sealer = field(init=False)
    table: SequenceTable = field(default_factory=SequenceTable)
    counters: Counters = field(default_factory=Counters)
    failed: list[str] = field(default_factory=list)
    guard: CorruptionGuard = field(init=False)

    def __post_init__(self) -> None:
        sums, failpoints = HostBlockSums(self.cache), Failpoints(set())
        self.sealer = Sealer(self.pools, self.cache, sums, "ab" * 16, "c" * 64, failpoints)
        self.guard = CorruptionGuard(self.pools, self.sealer, self.table, self._fail, self.counters)

    def _fail(self, sequence: Sequence, error: BatonError) -> None:
        assert isinstance(error, DigestMismatch)
        self.failed.append(sequence.key.request_id)
        self.table.remove(sequence.key)

    def compute(self, name: str, num_tokens: int, *, depth: int = 0, keeps: int = 0) -> Sequence:
        """A sequence that found `depth` blocks, and gave back what tokens from `keeps` on do not
        read."""
        made = Sequence(AttemptKey(name, 0, 1), PROMPT, SamplingParams())
        self.sealer.hash_blocks(made)
        for group, each in enumerate(GROUPS):
            first = each.first_block(depth * BLOCK_SIZE, BLOCK_SIZE)
            table = BlockTable(
                [self.found(group, index) for index in range(first, depth)], first_live=first
            )
            self.pools.of(group).acquire(table[first:])
            table.num_sealed = depth
            made.block_tables.append(table)
        made.is_admitted = True
        self.pools.extend(made, num_tokens)
        made.num_computed_tokens = num_tokens
        self.sealer.seal_computed(made, with_digests=True)
        self.pools.give_back_behind(made, keeps)
        self.table.add(made, None)
        return made

    def found(self, group: int, index: int) -> int:
        hashes = next(iter(self.table.all())).block_hashes
        block_id = self.pools.prefix_cache.find(hashes[index], group, PROMPT)
        assert block_id != NO_BLOCK
        return block_id

    def spoil(self, group: int, block_id: int) -> None:
        self.cache.words(group)[block_id, 1, 5] ^= 4


@pytest.fixture
def bench() -> Bench:
    return Bench(*make_two_groups(30, 30))


@pytest.mark.parametrize(("group", "index"), [(FULL, 1), (WINDOWED, 3), (WINDOWED, 4)])
def test_a_prompt_computed_from_a_corrupt_block_ends(bench: Bench, group: int, index: int) -> None:
    sequence = bench.compute("a", 20, keeps=20)
    assert not bench.guard.has_spoiled(sequence) and not bench.failed
    bench.spoil(group, sequence.block_tables[group][index])
    assert bench.guard.has_spoiled(sequence)
    assert bench.failed == ["a"] and bench.counters["digest_mismatches"] == 1
    assert bench.pools.prefix_cache.match(sequence.block_hashes, PROMPT) == min(index, 5)


def test_what_falls_out_of_a_window_is_checked_before_it_does(bench: Bench) -> None:
    sequence = bench.compute("a", 20)
    assert bench.guard.may_leave(sequence, 20)
    bench.spoil(WINDOWED, sequence.block_tables[WINDOWED][2])
    assert bench.guard.may_leave(sequence, 20), "a token at 20 reads it: it stays"
    bench.spoil(WINDOWED, sequence.block_tables[WINDOWED][1])
    assert not bench.guard.may_leave(sequence, 20)
    assert bench.failed == ["a"] and bench.counters["digest_mismatches"] == 1


def test_everybody_ends_who_has_the_block_or_had_it(bench: Bench) -> None:
    """Also who gave it back behind its window; not who has found another copy."""
    first = bench.compute("holds", 24)
    corrupt = first.block_tables[WINDOWED][1]
    # Behind four blocks, a token reads those from the second on.
    bench.compute("shares", 24, depth=4)
    gave_back = bench.compute("gave back", 16, depth=2)
    assert gave_back.block_tables[WINDOWED][1] == corrupt
    bench.pools.give_back_behind(gave_back, 100)
    twin = bench.compute("has a twin", 24)
    assert twin.block_tables[WINDOWED][1] != corrupt
    bench.compute("never read it", 8, depth=1)
    bench.spoil(WINDOWED, corrupt)
    bench.guard.found(bench.sealer.drop_corrupt(WINDOWED, [corrupt]))
    assert bench.failed == ["holds", "shares", "gave back"]


def test_everybody_ends_who_has_what_was_computed_from_it(bench: Bench) -> None:
    """Without having read the block itself, which was before the window."""
    bench.compute("holds", 24)
    bench.compute("behind it", 26, depth=6)
    corrupt = bench.found(WINDOWED, 2)
    bench.spoil(WINDOWED, corrupt)
    assert corrupt not in bench.table.all()[1].block_tables[WINDOWED]
    bench.guard.found(bench.sealer.drop_corrupt(WINDOWED, [corrupt]))
    assert bench.failed == ["holds", "behind it"]
    assert bench.pools.prefix_cache.num_cached == 4, "two blocks in both groups"


def test_what_is_computed_behind_a_copy_is_not_found(bench: Bench) -> None:
    """Who found it would not hold the copy, and would notice nothing when that one is corrupt."""
    bench.compute("was first", 8)
    apart = bench.compute("has a copy", 16)
    found = bench.pools.prefix_cache
    assert found.match(apart.block_hashes, PROMPT) == 2
    bench.spoil(FULL, apart.block_tables[FULL][1])
    assert bench.guard.has_spoiled(apart)
    assert bench.failed == ["has a copy"]


def test_what_is_computed_behind_what_is_found_is_found(bench: Bench) -> None:
    bench.compute("was first", 8)
    goes_on = bench.compute("goes on", 16, depth=2)
    assert bench.pools.prefix_cache.match(goes_on.block_hashes, PROMPT) == 4


def test_who_holds_the_block_of_that_id_anew_goes_on(bench: Bench) -> None:
    first = bench.compute("gave back", 20, keeps=20)
    left = first.block_tables[WINDOWED].left
    block_id, generation = left[0]
    assert bench.pools.of(WINDOWED).block(block_id).generation == generation
    pool = bench.pools.of(WINDOWED)
    while pool.block(block_id).generation == generation:
        pool.allocate(1)
    anew = Sequence(AttemptKey("anew", 0, 1), PROMPT[::-1], SamplingParams())
    anew.block_tables = [BlockTable(), BlockTable([block_id])]
    anew.is_admitted, anew.num_computed_tokens = True, 4
    bench.table.add(anew, None)
    pool.set_digest(block_id, (1, 2, 3))
    bench.guard.found(bench.sealer.drop_corrupt(WINDOWED, [block_id]))
    assert bench.failed == ["anew"], "the other one had it before"


def test_what_a_reader_reports_is_looked_at_in_its_group(bench: Bench) -> None:
    """Of a later generation, or of no pool, it is nobody's any more."""
    sequence = bench.compute("a", 24)
    block_id = sequence.block_tables[WINDOWED][5]
    bench.spoil(WINDOWED, block_id)
    generation = bench.pools.of(WINDOWED).block(block_id).generation

    def report(*columns: tuple[int, int, int]) -> None:
        cancel = kv.CancelClaim()
        for group, reported, its_generation in columns:
            cancel.mismatched_groups.append(group)
            cancel.mismatched_block_ids.append(reported)
            cancel.mismatched_generations.append(its_generation)
        bench.guard.check_reported(cancel)

    report(
        (WINDOWED, block_id, generation + 1),
        (WINDOWED, 30, 0),
        (FULL, block_id, bench.pools.of(FULL).block(block_id).generation),
        (2, block_id, generation),
        (2**32 - 1, 2**32 - 1, 2**64 - 1),
    )
    assert not bench.failed
    report((FULL, 0, 0), (WINDOWED, block_id, generation))
    assert bench.failed == ["a"]
    assert bench.counters["digest_mismatches"] == 0, "the reader has counted them"


def test_columns_of_unequal_length_are_read_as_far_as_they_go(bench: Bench) -> None:
    sequence = bench.compute("a", 24)
    bench.spoil(FULL, sequence.block_tables[FULL][0])
    cancel = kv.CancelClaim(
        mismatched_groups=[FULL], mismatched_block_ids=[sequence.block_tables[FULL][0]]
    )
    bench.guard.check_reported(cancel)
    assert not bench.failed
