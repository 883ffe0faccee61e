"""Admission into a real pool: a common prefix is computed once, a full pool makes wait."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from baton.services.prefill.scheduler import Admission
from baton.services.worker.admission import Admitter
from baton.services.worker.failpoints import Failpoints
from baton.services.worker.sealing import Corrupt, Sealer
from baton.services.worker.sequence_table import Recipient, SequenceTable
from baton.shared.engine.block_sums import HostBlockSums
from baton.shared.engine.kv_cache import KvCache
from baton.shared.kv.pools import Pools
from baton.shared.kv.sequence import AttemptKey, Sequence
from baton.shared.sampling import SamplingParams
from tests.unit.worker.conftest import MakeRunner

NUM_BLOCKS = 8
PREFIX = tuple(range(8))


@dataclass
class Bench:
    pools: Pools
    cache: KvCache
    sealer: Sealer = field(init=False)
    table: SequenceTable = field(init=False)
    admitter: Admitter = field(init=False)
    dropped: list[Corrupt] = field(default_factory=list)
    keeps_states: bool = False

    def __post_init__(self) -> None:
        sums, failpoints = HostBlockSums(self.cache), Failpoints(set())
        self.sealer = Sealer(self.pools, self.cache, sums, "ab" * 16, "c" * 64, failpoints)
        self.table = SequenceTable()
        self.admitter = Admitter(
            self.pools,
            self.sealer,
            self.table,
            self.dropped.append,
            keeps_states=self.keeps_states,
        )

    def arrive(
        self,
        name: str,
        prompt: tuple[int, ...],
        *,
        distrust: bool = False,
        salt: bytes = b"",
        recipient: Recipient | None = None,
    ) -> Sequence:
        made = Sequence(
            AttemptKey(name, 0, 1), prompt, SamplingParams(), distrust=distrust, salt=salt
        )
        self.table.add(made, recipient)
        self.sealer.hash_blocks(made)
        return made

    def admit(self, sequence: Sequence, *, reads: bool = False) -> Admission:
        return self.admitter.try_admit(sequence, reads=reads)

    @property
    def num_free(self) -> list[int]:
        return self.pools.num_free

    def compute(self, sequence: Sequence, num_tokens: int) -> None:
        """As if a step had written the tokens up to `num_tokens`."""
        sequence.num_computed_tokens = num_tokens
        self.sealer.seal_computed(sequence, with_digests=True)

    def end(self, sequence: Sequence) -> None:
        self.table.remove(sequence.key)
        self.pools.release(sequence.block_tables)
        sequence.block_tables, sequence.is_admitted = [], False
        self.admitter.forget(sequence)

    def check(self) -> None:
        self.pools.check_integrity([s.block_tables for s in self.table.all() if s.is_admitted])


@pytest.fixture
def bench(make_runner: MakeRunner) -> Bench:
    runner = make_runner(NUM_BLOCKS)
    return Bench(Pools(runner.groups, runner.capacity), runner.kv_cache)


def test_the_second_waits_for_the_first_ones_prefix_and_then_shares_it(bench: Bench) -> None:
    first = bench.arrive("a", (*PREFIX, 20, 21))
    second = bench.arrive("b", (*PREFIX, 30))
    assert bench.admit(first) is Admission.ADMIT
    assert bench.admit(second) is Admission.WAIT_FOR_PREFIX
    bench.compute(first, 4)
    assert bench.admit(second) is Admission.WAIT_FOR_PREFIX, "one of two blocks"
    bench.compute(first, 8)
    assert bench.admit(second) is Admission.ADMIT
    assert second.num_cached_tokens == 8
    assert second.block_tables[0][:2] == first.block_tables[0][:2]
    assert second.block_tables[0][2] != first.block_tables[0][2]
    bench.check()


def test_when_the_first_is_gone_the_second_computes_what_is_missing(bench: Bench) -> None:
    first = bench.arrive("a", (*PREFIX, 20, 21))
    second = bench.arrive("b", (*PREFIX, 30))
    bench.admit(first)
    bench.compute(first, 4)
    assert bench.admit(second) is Admission.WAIT_FOR_PREFIX
    bench.end(first)
    assert bench.admit(second) is Admission.ADMIT
    assert second.num_cached_tokens == 4
    bench.check()


@pytest.mark.parametrize("reads", [False, True])
def test_nothing_is_remembered_of_who_has_ended(bench: Bench, reads: bool) -> None:
    """As the engine takes what it asks for: of who reads the places, of who computes the states."""
    sequence = bench.arrive("a", (*PREFIX, 20, 21))
    assert bench.admit(sequence, reads=reads) is Admission.ADMIT
    if reads:
        bench.admitter.take_new_places(sequence)
    else:
        assert bench.admitter.take_sources(sequence) == {}
    bench.end(sequence)
    kept = {name: held for name, held in vars(bench.admitter).items() if isinstance(held, dict)}
    assert not any(kept.values()), kept


def test_a_hit_leaves_at_least_one_token_to_compute(bench: Bench) -> None:
    first = bench.arrive("a", PREFIX)
    bench.admit(first)
    bench.compute(first, 8)
    again = bench.arrive("b", PREFIX)
    assert bench.admit(again) is Admission.ADMIT
    assert again.num_cached_tokens == 4


def test_prompts_of_the_same_tokens_and_different_salts_share_nothing(bench: Bench) -> None:
    first = bench.arrive("a", (*PREFIX, 9), salt=b"one")
    bench.admit(first)
    bench.compute(first, 8)
    other = bench.arrive("b", (*PREFIX, 9), salt=b"two")
    assert bench.admit(other) is Admission.ADMIT
    assert other.num_cached_tokens == 0


def test_room_is_for_the_whole_prompt_or_nothing_is_taken(bench: Bench) -> None:
    first = bench.arrive("a", tuple(range(20)))
    bench.admit(first)
    second = bench.arrive("b", tuple(range(40, 53)))
    assert bench.admit(second) is Admission.WAIT_FOR_ROOM
    assert second.block_tables == [] and bench.num_free == [3]
    bench.end(first)
    assert bench.admit(second) is Admission.ADMIT
    bench.check()


def test_cached_blocks_that_are_free_are_not_counted_as_room_too(bench: Bench) -> None:
    """Eight free blocks of which two are the prompt's own prefix: six for the rest."""
    first = bench.arrive("a", (*PREFIX, 9))
    bench.admit(first)
    bench.compute(first, 8)
    bench.end(first)
    assert bench.num_free == [NUM_BLOCKS]
    exact = bench.arrive("b", (*PREFIX, *range(50, 74)))
    assert bench.admit(exact) is Admission.ADMIT
    assert exact.num_cached_tokens == 8 and bench.num_free == [0]
    bench.check()


def test_sequences_that_grow_keep_a_block_each(bench: Bench) -> None:
    grows = bench.arrive("a", tuple(range(12)), recipient=Recipient("g", 1))
    bench.admit(grows)
    wants_five = bench.arrive("b", tuple(range(40, 60)))
    assert bench.admit(wants_five) is Admission.WAIT_FOR_ROOM
    wants_four = bench.arrive("c", tuple(range(40, 56)))
    assert bench.admit(wants_four) is Admission.ADMIT


def test_who_distrusts_checks_what_it_finds(bench: Bench) -> None:
    first = bench.arrive("a", (*PREFIX, 9))
    bench.admit(first)
    bench.cache.tensors[0][first.block_tables[0]] = 0.5
    bench.compute(first, 8)
    good = bench.arrive("b", (*PREFIX, 9), distrust=True)
    assert bench.admit(good) is Admission.ADMIT
    assert good.num_cached_tokens == 8 and not bench.dropped

    corrupt = first.block_tables[0][1]
    bench.cache.tensors[0][corrupt].view(-1)[3] = 0.25
    wary = bench.arrive("c", (*PREFIX, 9), distrust=True)
    assert bench.admit(wary) is Admission.ADMIT
    assert wary.num_cached_tokens == 4
    assert [(each.group, each.block_ids) for each in bench.dropped] == [(0, [corrupt])]
    trusting = bench.arrive("d", (*PREFIX, 9))
    assert bench.admit(trusting) is Admission.WAIT_FOR_PREFIX, "wary computes it"
    bench.check()


def test_who_distrusts_does_not_wait_for_others(bench: Bench) -> None:
    bench.admit(bench.arrive("a", (*PREFIX, 9)))
    wary = bench.arrive("b", (*PREFIX, 9), distrust=True)
    assert bench.admit(wary) is Admission.ADMIT
    assert wary.num_cached_tokens == 0
