from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from queue import Queue

import numpy as np
import pytest
import torch

from baton.shared.kv.digest import Uint64Array, block_sums
from baton.shared.transfer.interface import BlockCopy, LocalPool, PeerConnection, TransferError
from baton.shared.transfer.puller import ExpectedBlock, Puller, PullJob, PullResult
from baton.shared.transfer.shm import ShmTransport
from baton.v1.kv_service_pb2 import GroupBlocks, PoolDescription
from tests.unit.transfer.conftest import (
    BLOCK_BYTES,
    NARROW,
    NUM_BLOCKS,
    NUM_HEADS,
    SHARING,
    WIDE,
    WIDE_BYTES,
    WIDE_HEADS,
    Peer,
    with_blocks,
)

StartPeer = Callable[[], Peer]


@pytest.fixture
def results() -> Queue[PullResult]:
    return Queue()


@pytest.fixture
def puller(
    transport: ShmTransport, pool: LocalPool, results: Queue[PullResult]
) -> Iterator[Puller]:
    puller = Puller(transport, pool, results.put)
    yield puller
    puller.close()


def job(
    peer: Peer, copies: Sequence[tuple[int, int]], job_id: int = 1, group: int = NARROW
) -> PullJob:
    return PullJob(
        job_id,
        peer.description,
        group,
        [BlockCopy(*copy) for copy in copies],
        [peer.expected(remote_id, 40 + remote_id, group) for remote_id, _ in copies],
    )


def test_good_blocks(
    puller: Puller, pool: LocalPool, results: Queue[PullResult], peer: Peer
) -> None:
    puller.submit(job(peer, [(5, 0), (2, 11), (9, 4)]))
    result = results.get(timeout=30)
    assert (result.job_id, result.error, result.mismatched) == (1, None, ())
    assert torch.equal(pool.blocks(NARROW)[[0, 11, 4]], peer.content[[5, 2, 9]])
    assert np.array_equal(result.local_sums, block_sums(pool.words(NARROW)[[0, 11, 4]]))
    assert result.started_s <= result.finished_s
    assert puller.rates().keys() == {peer.incarnation}


@pytest.mark.parametrize(
    ("group", "holder", "num_heads"), [(WIDE, WIDE, WIDE_HEADS), (SHARING, NARROW, 2 * NUM_HEADS)]
)
def test_blocks_of_other_groups_are_read_and_summed_by_their_own_heads(
    puller: Puller,
    pool: LocalPool,
    results: Queue[PullResult],
    peer: Peer,
    monkeypatch: pytest.MonkeyPatch,
    group: int,
    holder: int,
    num_heads: int,
) -> None:
    """In pieces of so many bytes, however large a block is."""
    monkeypatch.setattr("baton.shared.transfer.puller._PIECE_BYTES", WIDE_BYTES + 1)
    puller.submit(job(peer, [(6, 4), (0, 2), (5, 0)], group=group))
    result = results.get(timeout=30)
    assert (result.error, result.mismatched) == (None, ())
    assert result.local_sums.shape == (3, num_heads)
    assert np.array_equal(result.local_sums, block_sums(pool.words(group)[[4, 2, 0]]))
    landed = {4: peer.contents[group][6], 2: peer.contents[group][0], 0: peer.contents[group][5]}
    assert torch.equal(pool.memory, with_blocks(pool, holder, landed))


def test_who_sums_for_the_puller_is_told_the_group(
    transport: ShmTransport, pool: LocalPool, peer: Peer
) -> None:
    asked: list[tuple[list[int], int]] = []

    def sum_blocks(block_ids: Sequence[int], group: int) -> Uint64Array:
        asked.append((list(block_ids), group))
        return block_sums(pool.words(group)[list(block_ids)])

    results: Queue[PullResult] = Queue()
    puller = Puller(transport, pool, results.put, sum_blocks)
    for group in (WIDE, NARROW):
        puller.submit(job(peer, [(3, 1)], group=group))
        assert results.get(timeout=30).mismatched == ()
    puller.close()
    assert asked == [([1], WIDE), ([1], NARROW)]


@pytest.mark.parametrize("group", [-1, 3, 1000])
def test_a_group_that_is_not_there_fails_alone(
    puller: Puller, pool: LocalPool, results: Queue[PullResult], peer: Peer, group: int
) -> None:
    good = job(peer, [(0, 0)])
    puller.submit(replace(good, group=group))
    puller.submit(good)
    assert "no cache group" in (results.get(timeout=30).error or "")
    assert results.get(timeout=30).error is None
    assert torch.equal(pool.memory, with_blocks(pool, NARROW, {0: peer.content[0]}))


def test_digests_of_another_group_do_not_fit(
    puller: Puller, pool: LocalPool, results: Queue[PullResult], peer: Peer
) -> None:
    """Nor do those of one that shares the blocks: its heads are others."""
    good = job(peer, [(0, 0)])
    for group in (WIDE, SHARING):
        puller.submit(replace(good, group=group))
        assert "do not fit together" in (results.get(timeout=30).error or "")
    assert not pool.memory.any()


def test_blocks_of_several_pieces(
    puller: Puller,
    pool: LocalPool,
    results: Queue[PullResult],
    peer: Peer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("baton.shared.transfer.puller._PIECE_BYTES", 5 * BLOCK_BYTES)
    copies = [(i, NUM_BLOCKS - 1 - i) for i in range(NUM_BLOCKS)]
    puller.submit(job(peer, copies))
    result = results.get(timeout=30)
    assert (result.error, result.mismatched) == (None, ())
    assert torch.equal(pool.blocks(NARROW).flip(0), peer.content[:NUM_BLOCKS])
    assert np.array_equal(result.local_sums[::-1], block_sums(pool.words(NARROW)))


def test_mismatches_name_the_copies(puller: Puller, results: Queue[PullResult], peer: Peer) -> None:
    """A wrong word in one head, another generation, another block's digest."""
    good = job(peer, [(i, i) for i in range(8)])
    expected = list(good.expected)
    first, second = expected[1].digests
    expected[1] = expected[1]._replace(digests=(first, (second + 1) % 2**64))
    expected[3] = expected[3]._replace(generation=expected[3].generation + 1)
    expected[5] = expected[5]._replace(digests=expected[6].digests)
    puller.submit(replace(good, job_id=7, expected=expected))
    result = results.get(timeout=30)
    assert (result.job_id, result.error, result.mismatched) == (7, None, (1, 3, 5))
    assert result.local_sums.shape == (8, NUM_HEADS)


def test_corrupted_and_swapped_bytes_are_found(
    puller: Puller, results: Queue[PullResult], start_peer: StartPeer
) -> None:
    """The peer's memory changes after it was sealed."""
    peer = start_peer()
    good = job(peer, [(i, i) for i in range(6)])
    with open(peer.path, "r+b") as file:
        file.seek(2 * BLOCK_BYTES + 1000)
        file.write(bytes([int(peer.content[2, 1000]) ^ 1]))
        file.seek(4 * BLOCK_BYTES)
        file.write(bytes(peer.content[[5, 4]].flatten().tolist()))
    puller.submit(good)
    assert results.get(timeout=30).mismatched == (2, 4, 5)


def test_blocks_of_another_incarnation_do_not_match(
    puller: Puller, results: Queue[PullResult], peer: Peer, start_peer: StartPeer
) -> None:
    other = start_peer()
    puller.submit(replace(job(peer, [(0, 0)]), expected=[other.expected(0)]))
    assert results.get(timeout=30).mismatched == (0,)


def test_empty_job_is_answered(puller: Puller, results: Queue[PullResult], peer: Peer) -> None:
    puller.submit(job(peer, []))
    result = results.get(timeout=30)
    assert (result.error, result.mismatched, result.local_sums.shape) == (None, (), (0, NUM_HEADS))


def test_announcement_that_does_not_fit_fails_alone(
    puller: Puller, results: Queue[PullResult], peer: Peer
) -> None:
    good = job(peer, [(0, 0), (1, 1)])
    short = [good.expected[0], good.expected[1]._replace(digests=good.expected[1].digests[:1])]
    huge = [good.expected[0], good.expected[1]._replace(digests=(0, 2**64))]
    for expected in (good.expected[:1], good.expected[::-1], short, huge):
        puller.submit(replace(good, job_id=0, expected=expected))
    puller.submit(good)
    for _ in range(4):
        assert results.get(timeout=30).error
    assert results.get(timeout=30).error is None


def test_peer_gone(
    puller: Puller, results: Queue[PullResult], peer: Peer, start_peer: StartPeer
) -> None:
    peer, other = start_peer(), peer
    puller.submit(job(peer, [(0, 0)]))
    assert results.get(timeout=30).error is None
    peer.kill()
    puller.submit(job(peer, [(0, 0)]))
    puller.submit(job(other, [(0, 0)]))
    failed = results.get(timeout=30)
    assert "gone" in (failed.error or "")
    assert len(failed.local_sums) == 0
    assert results.get(timeout=30).error is None
    assert puller.rates().keys() == {other.incarnation}


def test_result_that_is_not_taken_stops_nothing(
    transport: ShmTransport, pool: LocalPool, peer: Peer
) -> None:
    taken: Queue[PullResult] = Queue()

    def take(result: PullResult) -> None:
        if result.job_id == 1:
            raise RuntimeError("no")
        taken.put(result)

    puller = Puller(transport, pool, take)
    puller.submit(job(peer, [(0, 0)], job_id=1))
    puller.submit(job(peer, [(0, 0)], job_id=2))
    assert taken.get(timeout=30).job_id == 2
    puller.close()


class GatedTransport:
    """Reads nothing, and only when let; writes down what happens."""

    name = "gated"

    def __init__(self) -> None:
        self.gate = threading.Semaphore(0)
        self.reading = threading.Semaphore(0)
        self.events: list[str] = []

    def bind(self, pool: LocalPool) -> None: ...

    def describe(self) -> PoolDescription:
        return PoolDescription()

    def connect(
        self, peer: PoolDescription, give_up: Callable[[], bool] = lambda: False
    ) -> PeerConnection:
        self.events.append(f"connect {peer.incarnation}")
        return GatedConnection(self, peer.incarnation)

    def close(self) -> None: ...


class GatedConnection:
    bytes_per_second = 1.0

    def __init__(self, transport: GatedTransport, incarnation: str) -> None:
        self.transport, self.incarnation = transport, incarnation

    def read(self, group: int, copies: Sequence[BlockCopy]) -> None:
        self.transport.reading.release()
        assert self.transport.gate.acquire(timeout=30)
        self.transport.events.append(f"read {self.incarnation} {copies[0].remote_block_id}")

    def close(self) -> None:
        self.transport.events.append(f"close {self.incarnation}")


class Gated:
    def __init__(self, pool: LocalPool) -> None:
        self.transport = GatedTransport()
        self.results: Queue[PullResult] = Queue()
        self.puller = Puller(self.transport, pool, self.results.put)

    def submit(self, incarnation: str, job_id: int) -> None:
        self.puller.submit(
            PullJob(
                job_id,
                PoolDescription(incarnation=incarnation, groups=[GroupBlocks()]),
                NARROW,
                [BlockCopy(job_id, 0)],
                [ExpectedBlock(job_id, 0, (0,) * NUM_HEADS)],
            )
        )

    def errors(self, num: int) -> list[tuple[int, bool]]:
        answers = [self.results.get(timeout=30) for _ in range(num)]
        return [(answer.job_id, answer.error is not None) for answer in answers]


@pytest.fixture
def gated(pool: LocalPool) -> Iterator[Gated]:
    gated = Gated(pool)
    yield gated
    gated.transport.gate.release(1000)
    gated.puller.close()


def test_jobs_are_done_in_order_over_one_connection_a_peer(gated: Gated) -> None:
    gated.transport.gate.release(5)
    for job_id, incarnation in enumerate(["a", "b", "a", "a", "b"]):
        gated.submit(incarnation, job_id)
    assert gated.errors(5) == [(i, False) for i in range(5)]
    assert gated.transport.events == [
        "connect a", "read a 0", "connect b", "read b 1", "read a 2", "read a 3", "read b 4",
    ]  # fmt: skip


def test_dropped_peer_fails_earlier_jobs_and_spares_the_rest(gated: Gated) -> None:
    gated.submit("a", 0)
    assert gated.transport.reading.acquire(timeout=30)
    gated.submit("a", 1)
    gated.submit("b", 2)
    gated.puller.drop_peer("a")
    gated.submit("a", 3)
    gated.puller.drop_peer("never seen")
    gated.transport.gate.release(10)
    # What was being read when the peer was dropped may end well: its last piece had begun.
    assert gated.errors(4) == [(0, False), (1, True), (2, False), (3, False)]
    assert gated.transport.events == [
        "connect a", "read a 0", "close a", "connect b", "read b 2", "connect a", "read a 3",
    ]  # fmt: skip


def test_close_answers_everything_and_closes_connections(gated: Gated) -> None:
    gated.submit("a", 0)
    assert gated.transport.reading.acquire(timeout=30)
    gated.submit("a", 1)
    gated.submit("b", 2)
    closer = threading.Thread(target=gated.puller.close)
    closer.start()
    while not gated.puller._closed:
        time.sleep(0.001)
    gated.transport.gate.release(10)
    closer.join(timeout=30)
    assert not closer.is_alive()
    assert gated.errors(3) == [(0, False), (1, True), (2, True)]
    assert gated.transport.events == ["connect a", "read a 0", "close a"]
    with pytest.raises(RuntimeError):
        gated.submit("a", 4)
    gated.puller.close()


def test_failed_read_closes_the_connection_and_the_next_job_connects_anew(
    gated: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: GatedConnection, group: int, copies: Sequence[BlockCopy]) -> None:
        raise TransferError("no luck")

    with monkeypatch.context() as patched:
        patched.setattr(GatedConnection, "read", fail)
        gated.submit("a", 0)
        assert gated.results.get(timeout=30).error == "no luck"
    gated.transport.gate.release()
    gated.submit("a", 1)
    assert gated.errors(1) == [(1, False)]
    assert gated.transport.events == ["connect a", "close a", "connect a", "read a 1"]
