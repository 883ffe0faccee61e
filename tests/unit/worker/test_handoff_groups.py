"""Both ends of a hand-off of two cache groups, of unequal block bytes and heads."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from baton.services.worker.failpoints import Failpoints
from baton.services.worker.handoff import ClaimTable, Pull, PullTable
from baton.services.worker.messages import Outgoing, ToReader, ToSource
from baton.services.worker.sealing import Sealer
from baton.shared.engine.block_sums import HostBlockSums
from baton.shared.engine.kv_cache import KvCache
from baton.shared.kv.block_pool import NO_BLOCK
from baton.shared.kv.pools import Pools
from baton.shared.kv.sequence import AttemptKey, BlockTable, Place, Sequence
from baton.shared.rpc.convert import key_to_pb
from baton.shared.rpc.errors import ClaimBroken, DigestMismatch
from baton.shared.sampling import SamplingParams
from baton.shared.telemetry import Counters, Trace
from baton.shared.transfer.puller import PullJob, PullResult
from baton.v1 import kv_service_pb2 as kv
from tests.unit.worker.test_handoff import SOURCE
from tests.unit.worker.two_groups import FULL, GROUPS, WINDOWED, make_two_groups

KEY = AttemptKey("r", 0, 1)
PROMPT = tuple(range(26))
"""Six full blocks, and a tail; the token behind them reads blocks from the fourth on."""
FIRST_WINDOWED = 4
NUM_HEADS = [group.spec.num_kv_heads for group in GROUPS]


@dataclass
class Side:
    pools: Pools
    cache: KvCache
    sealer: Sealer
    sent: list[Outgoing] = field(default_factory=list)

    def sequence(self, *first_live: int) -> Sequence:
        """With room for the prompt, in each group from some block on."""
        made = Sequence(KEY, PROMPT, SamplingParams())
        self.sealer.hash_blocks(made)
        made.block_tables = [
            BlockTable(self.pools.of(group).allocate(7 - first), first_live=first)
            for group, first in enumerate(first_live)
        ]
        made.is_admitted = True
        return made

    def compute(self, sequence: Sequence, num_tokens: int) -> None:
        sequence.num_computed_tokens = num_tokens
        self.sealer.seal_computed(sequence, with_digests=True)
        self.pools.give_back_behind(sequence, num_tokens)


@pytest.fixture
def side() -> Side:
    pools, cache = make_two_groups(20, 20)
    sums, failpoints = HostBlockSums(cache), Failpoints(set())
    return Side(pools, cache, Sealer(pools, cache, sums, "ab" * 16, "c" * 64, failpoints))


# The owner's side


def test_of_a_windowed_group_only_the_last_window_is_announced(side: Side) -> None:
    claims = ClaimTable(side.pools, side.sealer, side.sent.append, Trace(None, ""))
    claims.add(KEY, "d-1")
    sequence = side.sequence(0, 0)
    told: dict[int, list[int]] = {FULL: [], WINDOWED: []}

    def take_told() -> list[kv.AnnounceBlocks]:
        claims.announce(sequence)
        sent, side.sent[:] = list(side.sent), []
        messages = [each.message.announce for each in sent if isinstance(each, ToReader)]
        for message in messages:
            told[message.group] += message.block_indices
            ids = list(message.block_ids)
            table = sequence.block_tables[message.group]
            assert ids == [table[index] for index in message.block_indices]
            assert NO_BLOCK not in ids
            pool = side.pools.of(message.group)
            assert list(message.generations) == pool.generations(ids)
            digests = side.sealer.digests(message.group, ids)
            assert list(message.digests) == [value for digest in digests for value in digest]
        return messages

    for num_tokens in (8, 20):
        side.compute(sequence, num_tokens)
        assert not any(message.HasField("computed") for message in take_told())
    assert told == {FULL: [0, 1, 2, 3, 4], WINDOWED: [4]}
    side.compute(sequence, 26)
    side.sealer.freeze(sequence)
    sequence.output_token_ids.append(42)
    messages = take_told()
    assert told == {FULL: list(range(7)), WINDOWED: [4, 5, 6]}
    # Whoever hears of the first token has heard of all blocks.
    assert [message.HasField("computed") for message in messages] == [False, True]
    side.pools.give_back_behind(sequence, 26)
    assert sequence.block_tables[WINDOWED].first_live == FIRST_WINDOWED, "all that was announced"


# The reader's side


class Reader:
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
        groups = [
            kv.GroupBlocks(num_heads=heads, block_bytes=1000 * (group + 1), num_blocks=500)
            for group, heads in enumerate(NUM_HEADS)
        ]
        description = kv.PoolDescription(incarnation=SOURCE.incarnation, groups=groups)
        self.hear(hello=kv.HoldHelloReply(pool=description))
        self.sequence = side.sequence(0, FIRST_WINDOWED)
        self.table.start(self.sequence, SOURCE)
        self.hear(admitted=kv.ClaimAdmitted(key=key_to_pb(KEY)))
        pull = self.table.get(KEY)
        assert pull is not None
        self.pull = pull
        missing: set[Place] = {
            (group, index)
            for group, table in enumerate(self.sequence.block_tables)
            for index in range(table.first_live, len(table))
        }
        self.table.took_room(pull, missing)

    def hear(self, **message: object) -> Pull | None:
        return self.table.on_message(SOURCE, kv.HoldResponse(**message))  # type: ignore[arg-type]

    def announce(self, group: int, *indices: int, num_heads: int | None = None) -> None:
        heads = NUM_HEADS[group] if num_heads is None else num_heads
        message = kv.AnnounceBlocks(
            key=key_to_pb(KEY),
            group=group,
            block_indices=indices,
            block_ids=[100 + index for index in indices],
            generations=[10 + group] * len(indices),
            digests=[1000 * index + head for index in indices for head in range(heads)],
        )
        self.hear(announce=message)

    def end_announcements(self) -> None:
        message = kv.AnnounceBlocks(key=key_to_pb(KEY), group=len(GROUPS) - 1)
        message.computed.first_token_id = 7
        self.hear(announce=message)

    def land(self, *, mismatched: tuple[int, ...] = ()) -> None:
        """The oldest job ends."""
        job = self.jobs.pop(0)
        sums = np.zeros((len(job.copies), NUM_HEADS[job.group]), dtype=np.uint64)
        result = PullResult(job.job_id, mismatched, sums, None, 0.0, 1.0)
        try:
            self.table.on_pulled(result)
        finally:
            self.table.settle(result)

    def requests(self) -> list[kv.HoldRequest]:
        sent, self.side.sent[:] = list(self.side.sent), []
        return [each.message for each in sent if isinstance(each, ToSource)]

    def found(self, group: int) -> list[int]:
        """Positions of the prompt at which a block of the group is found."""
        sequence, cache = self.sequence, self.side.pools.prefix_cache
        return [
            index
            for index, block_hash in enumerate(sequence.block_hashes)
            if cache.find(block_hash, group, PROMPT) != NO_BLOCK
        ]


@pytest.fixture
def reader(side: Side) -> Reader:
    return Reader(side)


def test_each_group_is_pulled_into_its_own_table_with_its_own_heads(
    side: Side, reader: Reader
) -> None:
    reader.announce(FULL, 0, 1)
    reader.announce(WINDOWED, 4, 5)
    full, windowed = reader.jobs
    assert (full.group, windowed.group) == (FULL, WINDOWED)
    tables = reader.sequence.block_tables
    assert list(full.copies) == [(100, tables[FULL][0]), (101, tables[FULL][1])]
    assert list(windowed.copies) == [(104, tables[WINDOWED][4]), (105, tables[WINDOWED][5])]
    assert [block.digests for block in windowed.expected] == [
        (4000, 4001, 4002),
        (5000, 5001, 5002),
    ]
    assert [side.pools.of(group).num_quarantined for group in (FULL, WINDOWED)] == [2, 2]
    side.pools.check_integrity([tables])


def test_a_copy_is_found_behind_the_blocks_before_it_in_every_group(
    side: Side, reader: Reader
) -> None:
    reader.announce(WINDOWED, 4, 5)
    reader.announce(FULL, 0, 1, 2)
    reader.end_announcements()
    reader.land()
    assert reader.found(WINDOWED) == [], "the other group has nothing yet"
    reader.land()
    assert reader.found(FULL) == [0, 1, 2] and reader.found(WINDOWED) == []
    assert reader.sequence.num_sealed_blocks == 3
    reader.announce(FULL, 3, 4)
    reader.land()
    assert (reader.found(FULL), reader.found(WINDOWED)) == ([0, 1, 2, 3, 4], [4])
    assert reader.sequence.num_sealed_blocks == 5
    side.pools.check_integrity([reader.sequence.block_tables])


def test_it_is_released_when_all_groups_have_landed_and_joins(side: Side, reader: Reader) -> None:
    reader.announce(FULL, *range(7))
    reader.announce(WINDOWED, 4, 5, 6)
    reader.end_announcements()
    reader.land()
    assert [m.WhichOneof("message") for m in reader.requests()] == ["claim"]
    reader.land()
    assert [m.WhichOneof("message") for m in reader.requests()] == ["release"]
    assert reader.sequence.num_sealed_blocks == 6
    assert (reader.found(FULL), reader.found(WINDOWED)) == (list(range(6)), [4, 5])
    # Three blocks of 2000 bytes, and seven of 1000.
    assert reader.counters["pulled_blocks"] == 10 and reader.counters["pulled_bytes"] == 13_000
    released = kv.ClaimReleased(key=key_to_pb(KEY), held=True)
    assert reader.hear(released=released) is reader.pull
    assert side.pools.num_quarantined == 0
    side.pools.check_integrity([reader.sequence.block_tables])


def test_a_mismatch_names_the_group_and_blocks_of_none_are_used(side: Side, reader: Reader) -> None:
    reader.announce(FULL, 0, 1)
    reader.announce(WINDOWED, 4, 5)
    reader.jobs.reverse()
    with pytest.raises(DigestMismatch):
        reader.land(mismatched=(1,))
    cancel = reader.requests()[-1].cancel
    assert list(cancel.mismatched_groups) == [WINDOWED]
    assert list(cancel.mismatched_block_ids) == [105]
    assert list(cancel.mismatched_generations) == [11]
    reader.land()
    assert side.pools.prefix_cache.num_cached == 0 and side.pools.num_quarantined == 0
    side.pools.check_integrity([reader.sequence.block_tables])


@pytest.mark.parametrize(("group", "num_heads"), [(2, 2), (1000, 0), (FULL, 3), (WINDOWED, 2)])
def test_announcements_that_fit_no_group_break_the_claim(
    reader: Reader, group: int, num_heads: int
) -> None:
    with pytest.raises(ClaimBroken, match="makes no sense"):
        reader.announce(group, 4, num_heads=num_heads)
    assert reader.jobs == []


def test_places_that_nobody_asked_for_are_not_read(reader: Reader) -> None:
    """Before the window, behind the prompt, or again."""
    reader.announce(WINDOWED, 3, 7, 1000)
    reader.announce(FULL, 7, 1000)
    assert reader.jobs == []
    reader.announce(WINDOWED, 4)
    reader.land()
    reader.announce(WINDOWED, 4)
    assert reader.jobs == []
