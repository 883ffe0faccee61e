"""Both ends of a hand-off by themselves: what each says, takes, and gives back, and when."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from baton.services.worker.failpoints import Failpoints
from baton.services.worker.handoff import ClaimTable, Pull, PullTable
from baton.services.worker.messages import Outgoing, Peer, ToReader, ToSource
from baton.services.worker.sealing import Sealer
from baton.shared.engine.block_sums import HostBlockSums
from baton.shared.engine.kv_cache import KvCache
from baton.shared.kv.block_pool import BlockPool
from baton.shared.kv.pools import Pools
from baton.shared.kv.sequence import AttemptKey, BlockTable, Place, Sequence
from baton.shared.rpc.convert import key_to_pb
from baton.shared.rpc.errors import Cancelled, ClaimBroken, DigestMismatch, SourceLost, to_failure
from baton.shared.sampling import SamplingParams
from baton.shared.telemetry import Counters, Trace
from baton.shared.transfer.puller import PullJob, PullResult
from baton.v1 import kv_service_pb2 as kv
from tests.unit.worker.conftest import BLOCK_SIZE, MakeRunner

NUM_BLOCKS = 10
KEY = AttemptKey("r", 0, 1)
PROMPT = tuple(range(10))
"""Two full blocks and a tail of two tokens."""
SOURCE = Peer("p", "aa" * 16, "p.test")


@dataclass
class Side:
    """What both sides stand on."""

    pools: Pools
    cache: KvCache
    sealer: Sealer
    sent: list[Outgoing] = field(default_factory=list)

    @property
    def pool(self) -> BlockPool:
        return self.pools.of(0)

    @property
    def num_cached(self) -> int:
        return self.pools.prefix_cache.num_cached

    def sequence(self, *, num_cached: int = 0) -> Sequence:
        """With room for all of its prompt; `num_cached` blocks at its front are sealed."""
        made = Sequence(KEY, PROMPT, SamplingParams())
        self.sealer.hash_blocks(made)
        made.block_tables = [BlockTable()]
        self.pools.extend(made, len(PROMPT))
        made.is_admitted = True
        made.num_computed_tokens = num_cached * BLOCK_SIZE
        self.sealer.seal_computed(made, with_digests=True)
        return made

    def take_sent(self) -> list[Outgoing]:
        sent, self.sent[:] = list(self.sent), []
        return sent


@pytest.fixture
def side(make_runner: MakeRunner) -> Side:
    runner = make_runner(NUM_BLOCKS)
    cache, pools = runner.kv_cache, Pools(runner.groups, runner.capacity)
    cache.tensors[0].normal_()
    sums, failpoints = HostBlockSums(cache), Failpoints(set())
    return Side(pools, cache, Sealer(pools, cache, sums, "ab" * 16, "c" * 64, failpoints))


# The owner's side


@pytest.fixture
def claims(side: Side) -> ClaimTable:
    return ClaimTable(side.pools, side.sealer, side.sent.append, Trace(None, ""))


def to_reader(side: Side) -> list[kv.HoldResponse]:
    return [sent.message for sent in side.take_sent() if isinstance(sent, ToReader)]


def test_each_block_is_announced_once_and_the_tail_with_the_first_token(
    side: Side, claims: ClaimTable
) -> None:
    sequence = side.sequence()
    claims.add(KEY, "d-1")
    claims.announce(sequence)
    assert side.take_sent() == [], "nothing is sealed"

    sequence.num_computed_tokens = 5
    side.sealer.seal_computed(sequence, with_digests=True)
    claims.announce(sequence)
    claims.announce(sequence)
    [first] = to_reader(side)
    assert first.announce.block_indices == [0] and not first.announce.HasField("computed")

    sequence.num_computed_tokens = 10
    side.sealer.seal_computed(sequence, with_digests=True)
    side.sealer.freeze(sequence)
    sequence.output_token_ids.append(42)
    claims.announce(sequence)
    [last] = to_reader(side)
    assert last.announce.block_indices == [1, 2]
    assert last.announce.computed.first_token_id == 42
    table = sequence.block_tables[0]
    assert last.announce.block_ids == table[1:]
    assert last.announce.generations == side.pool.generations(table[1:])
    expected = [value for digest in side.sealer.digests(0, table[1:]) for value in digest]
    assert last.announce.digests == expected


def test_a_claim_that_comes_late_is_told_everything_at_once(side: Side, claims: ClaimTable) -> None:
    sequence = side.sequence(num_cached=2)
    sequence.output_token_ids.append(42)
    side.sealer.freeze(sequence)
    claims.announce(sequence)
    assert side.take_sent() == [], "nobody has claimed"
    claims.add(KEY, "d-1")
    claims.announce(sequence)
    [only] = to_reader(side)
    assert only.announce.block_indices == [0, 1, 2]


def test_blocks_without_digest_get_theirs_when_claimed(side: Side, claims: ClaimTable) -> None:
    sequence = side.sequence()
    sequence.num_computed_tokens = 8
    side.sealer.seal_computed(sequence, with_digests=False)
    block_id = sequence.block_tables[0][0]
    assert side.pool.block(block_id).digest is None
    claims.add(KEY, "d-1")
    claims.announce(sequence)
    assert side.pool.block(block_id).digest == side.sealer.digests(0, [block_id])[0]


def test_the_tail_is_zeroed_behind_its_fill_and_frozen(side: Side) -> None:
    sequence = side.sequence(num_cached=2)
    tail = sequence.block_tables[0][2]
    before = side.cache.tensors[0][tail].clone()
    side.sealer.freeze(sequence)
    after = side.cache.tensors[0][tail]
    assert bool((after[:, :, :, :2] == before[:, :, :, :2]).all())
    assert not after[:, :, :, 2:].any()
    assert side.pool.block(tail).digest == side.sealer.digests(0, [tail])[0]
    assert side.pool.block(tail).block_hash is None, "a tail is never found by others"


def test_release_answers_whether_the_claim_held(side: Side, claims: ClaimTable) -> None:
    claims.add(KEY, "d-1")
    assert claims.answer_release(KEY, "d-1").released.held
    assert not claims.answer_release(KEY, "d-2").released.held, "another's claim"
    assert not claims.release(KEY, "d-2")
    assert claims.release(KEY, "d-1")
    assert not claims.answer_release(KEY, "d-1").released.held
    assert not claims.release(KEY, "d-1")
    assert KEY not in claims


def test_a_claim_that_fails_is_told_once_with_the_reason(side: Side, claims: ClaimTable) -> None:
    claims.add(KEY, "d-1")
    claims.fail(KEY, Cancelled("gone"))
    claims.fail(KEY, Cancelled("gone"))
    [failed] = to_reader(side)
    assert failed.failed.failure.message == "gone"
    claims.add(KEY, "d-1")
    claims.forget(KEY)
    claims.fail(KEY, Cancelled("gone"))
    assert side.take_sent() == [], "a reader that gave up is told nothing"


def test_claims_are_found_by_reader_and_by_age(
    side: Side, claims: ClaimTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.services.worker.handoff.time.monotonic", lambda: 50.0)
    claims.add(KEY, "d-1")
    assert claims.of_reader("d-1") == [KEY] and claims.of_reader("d-2") == []
    assert claims.older_than(50.0) == [] and claims.older_than(50.1) == [KEY]


# The reader's side


def missing_of(sequence: Sequence) -> set[Place]:
    """All that is not sealed."""
    return {
        (group, index)
        for group, table in enumerate(sequence.block_tables)
        for index in range(table.num_sealed, len(table))
    }


class Reader:
    """A PullTable and what an owner would send it."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self.jobs: list[PullJob] = []
        self.counters = Counters()
        self.table = PullTable(
            side.pools,
            side.sealer,
            self.jobs.append,
            side.sent.append,
            self.counters,
            Trace(None, ""),
        )
        groups = [kv.GroupBlocks(num_heads=2, block_bytes=1024)]
        description = kv.PoolDescription(incarnation=SOURCE.incarnation, groups=groups)
        self.hear(hello=kv.HoldHelloReply(pool=description))

    def hear(self, source: Peer = SOURCE, **message: object) -> Pull | None:
        return self.table.on_message(source, kv.HoldResponse(**message))  # type: ignore[arg-type]

    def announce(self, *indices: int, group: int = 0, first_token_id: int | None = None) -> None:
        message = kv.AnnounceBlocks(
            key=key_to_pb(KEY),
            group=group,
            block_indices=indices,
            block_ids=[100 + index for index in indices],
            generations=[1] * len(indices),
            digests=[1000 * index + head for index in indices for head in range(2)],
        )
        if first_token_id is not None:
            message.computed.first_token_id = first_token_id
        self.hear(announce=message)

    def start(self, sequence: Sequence) -> Pull:
        """Admitted there and here."""
        self.table.start(sequence, SOURCE)
        self.hear(admitted=kv.ClaimAdmitted(key=key_to_pb(KEY)))
        pull = self.table.get(KEY)
        assert pull is not None
        self.table.took_room(pull, missing_of(sequence))
        return pull

    def land(self, *, mismatched: tuple[int, ...] = (), error: str | None = None) -> None:
        """The oldest job ends."""
        job = self.jobs.pop(0)
        sums = np.zeros((len(job.copies), 2), dtype=np.uint64)
        result = PullResult(job.job_id, mismatched, sums, error, 0.0, 1.0)
        try:
            self.table.on_pulled(result)
        finally:
            self.table.settle(result)

    def requests(self) -> list[kv.HoldRequest]:
        return [sent.message for sent in self.side.take_sent() if isinstance(sent, ToSource)]

    def check(self, *held: BlockTable) -> None:
        self.side.pools.check_integrity([[each] for each in held])


@pytest.fixture
def reader(side: Side) -> Reader:
    return Reader(side)


def test_only_what_is_missing_is_pulled_each_into_its_place(side: Side, reader: Reader) -> None:
    sequence = side.sequence(num_cached=1)
    table = sequence.block_tables[0]
    reader.start(sequence)
    assert [m.WhichOneof("message") for m in reader.requests()] == ["claim"]
    reader.announce(0, 1)
    [job] = reader.jobs
    assert list(job.copies) == [(101, table[1])]
    assert [block.digests for block in job.expected] == [(1000, 1001)]
    reader.check(table)
    assert side.pool.num_quarantined == 1


def test_what_is_announced_before_there_is_room_here_waits(side: Side, reader: Reader) -> None:
    sequence = side.sequence()
    tables, sequence.block_tables, sequence.is_admitted = sequence.block_tables, [], False
    reader.table.start(sequence, SOURCE)
    reader.announce(0, 1)
    reader.announce(2, first_token_id=7)
    assert reader.jobs == []
    sequence.block_tables, sequence.is_admitted = tables, True
    pull = reader.table.get(KEY)
    assert pull is not None
    reader.table.took_room(pull, missing_of(sequence))
    [job] = reader.jobs
    assert [copy.remote_block_id for copy in job.copies] == [100, 101, 102]


def test_release_follows_the_last_block_and_the_first_token_and_then_it_joins(
    side: Side, reader: Reader
) -> None:
    sequence = side.sequence()
    pull = reader.start(sequence)
    reader.announce(0, 1)
    reader.land()
    reader.announce(2, first_token_id=7)
    assert [m.WhichOneof("message") for m in reader.requests()] == ["claim"]
    reader.land()
    assert sequence.num_sealed_blocks == 2
    assert [m.WhichOneof("message") for m in reader.requests()] == ["release"]
    assert pull.num_pulled_blocks == 3 and reader.counters["pulled_blocks"] == 3
    released = kv.ClaimReleased(key=key_to_pb(KEY), held=True)
    assert reader.hear(released=released) is pull
    assert len(reader.table) == 0 and side.pool.num_quarantined == 0
    assert side.pool.block(sequence.block_tables[0][2]).block_hash is None
    reader.check(sequence.block_tables[0])


def test_no_copy_is_found_before_the_prompt_is_computed(side: Side, reader: Reader) -> None:
    """Only then the owner has checked what the blocks were computed from."""
    sequence = side.sequence()
    reader.start(sequence)
    reader.announce(0, 1)
    reader.land()
    assert side.num_cached == 0 and sequence.num_sealed_blocks == 0
    reader.announce(first_token_id=7)
    assert side.num_cached == 2 and sequence.num_sealed_blocks == 2


def test_the_source_is_told_before_the_copies_are_sealed_and_then_they_are(
    side: Side, reader: Reader
) -> None:
    sequence = side.sequence()
    reader.start(sequence)
    reader.announce(0, 1, 2, first_token_id=7)
    [job] = reader.jobs
    sums = np.zeros((3, 2), dtype=np.uint64)
    result = PullResult(job.job_id, (), sums, None, 0.0, 1.0)
    reader.table.on_pulled(result)
    assert [m.WhichOneof("message") for m in reader.requests()] == ["claim", "release"]
    assert side.pool.num_quarantined == 3 and side.num_cached == 0
    reader.table.settle(result)
    assert side.pool.num_quarantined == 0 and side.num_cached == 2
    assert sequence.num_sealed_blocks == 2
    assert len(reader.requests()) == 0
    reader.check(sequence.block_tables[0])


def test_a_prompt_whose_last_blocks_land_before_it_is_computed_is_released_once(
    side: Side, reader: Reader
) -> None:
    reader.start(side.sequence())
    reader.announce(0, 1, 2)
    reader.land()
    reader.announce(first_token_id=7)
    reader.announce(first_token_id=7)
    assert [m.WhichOneof("message") for m in reader.requests()] == ["claim", "release"]


def test_a_claim_that_did_not_hold_is_not_joined(side: Side, reader: Reader) -> None:
    reader.start(side.sequence())
    with pytest.raises(ClaimBroken):
        reader.hear(released=kv.ClaimReleased(key=key_to_pb(KEY), held=False))


def test_a_mismatch_ends_the_claim_and_names_the_blocks(side: Side, reader: Reader) -> None:
    sequence = side.sequence()
    reader.start(sequence)
    reader.announce(0, 1)
    with pytest.raises(DigestMismatch):
        reader.land(mismatched=(1,))
    cancel = reader.requests()[-1].cancel
    assert cancel.mismatched_groups == [0] and cancel.mismatched_block_ids == [101]
    assert cancel.mismatched_generations == [1]
    assert reader.counters["digest_mismatches"] == 1
    assert side.num_cached == 0, "nothing of a job that failed is used"
    reader.check(sequence.block_tables[0])


def test_a_mismatch_after_the_claim_was_given_up_is_no_alarm(side: Side, reader: Reader) -> None:
    """The owner may have reused the blocks while they were still being read."""
    sequence = side.sequence()
    pull = reader.start(sequence)
    reader.announce(0, 1)
    reader.table.cancel(pull)
    side.pool.release(sequence.block_tables[0])
    reader.check()
    assert side.pool.num_free == NUM_BLOCKS - 2, "the read may still write into two"
    reader.land(mismatched=(0, 1))
    assert reader.counters["digest_mismatches"] == 0
    assert side.pool.num_free == NUM_BLOCKS
    reader.check()


def test_a_read_that_fails_costs_the_attempt_and_lifts_the_quarantine(
    side: Side, reader: Reader
) -> None:
    sequence = side.sequence()
    reader.start(sequence)
    reader.announce(0)
    with pytest.raises(SourceLost):
        reader.land(error="the pool is gone")
    assert side.pool.num_quarantined == 0
    reader.check(sequence.block_tables[0])


def test_cancel_is_said_once(side: Side, reader: Reader) -> None:
    pull = reader.start(side.sequence())
    reader.table.cancel(pull)
    reader.table.cancel(pull)
    assert [m.WhichOneof("message") for m in reader.requests()] == ["claim", "cancel"]


def test_messages_about_others_or_from_others_change_nothing(side: Side, reader: Reader) -> None:
    pull = reader.start(side.sequence())
    other = key_to_pb(AttemptKey("other", 0, 1))
    assert reader.hear(failed=kv.ClaimFailed(key=other)) is None
    stranger = Peer("p", "bb" * 16, "p.test")
    assert reader.hear(stranger, failed=kv.ClaimFailed(key=key_to_pb(KEY))) is None
    assert reader.hear(tick=None) is None
    assert reader.table.get(KEY) is pull
    assert reader.table.of_source(SOURCE) == [pull] and not reader.table.of_source(stranger)


def test_an_owner_that_ends_the_claim_is_believed(side: Side, reader: Reader) -> None:
    reader.start(side.sequence())
    with pytest.raises(ClaimBroken):
        reader.hear(failed=kv.ClaimFailed(key=key_to_pb(KEY)))
    corrupt = to_failure(DigestMismatch("a block is corrupt"))
    with pytest.raises(DigestMismatch):
        reader.hear(failed=kv.ClaimFailed(key=key_to_pb(KEY), failure=corrupt))
