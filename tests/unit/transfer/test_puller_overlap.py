"""The puller with reads that go on by themselves, and with sums made elsewhere."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, Queue

import numpy as np
import pytest
import torch

from baton.shared.kv.digest import Uint64Array, block_sums, digests, seeds
from baton.shared.transfer.interface import BlockCopy, GroupBlocks, LocalPool, TransferError
from baton.shared.transfer.puller import ExpectedBlock, Puller, PullJob, PullResult
from baton.v1.kv_service_pb2 import PoolDescription

NUM_BLOCKS, NUM_HEADS, BLOCK_BYTES = 16, 2, 256
OTHER = GroupBlocks(0, 2, BLOCK_BYTES // 2, 1)
GROUP = 1
"""The one that all is about."""
GROUPS = (OTHER, GroupBlocks(OTHER.end_bytes, NUM_BLOCKS, BLOCK_BYTES, NUM_HEADS))
PEER = PoolDescription(incarnation="ab12", groups=[group.describe() for group in GROUPS])


class Read:
    def __init__(self, connection: Connection, copies: Sequence[BlockCopy]) -> None:
        self.connection = connection
        self.copies = copies

    def wait(self, give_up: Callable[[], bool] = lambda: False) -> None:
        log, numbers = self.connection.log, [copy.remote_block_id for copy in self.copies]
        while self.connection.hangs_at in numbers:
            if give_up():
                log.append("given up")
                raise TransferError("given up")
        if self.connection.fails_at in numbers:
            raise TransferError("broken")
        for remote_id, local_id in self.copies:
            self.connection.pool.blocks(GROUP)[local_id] = self.connection.source[remote_id]
        log.append(f"landed {numbers}")


class Connection:
    """Blocks land when they are waited for; `log` has what happened in its order."""

    bytes_per_second = 1.0

    def __init__(self, pool: LocalPool, source: torch.Tensor, log: list[str]) -> None:
        self.pool = pool
        self.source = source
        self.log = log
        self.fails_at = self.hangs_at = -1

    def start(self, group: int, copies: Sequence[BlockCopy]) -> Read:
        assert group == GROUP
        self.log.append(f"start {[copy.remote_block_id for copy in copies]}")
        return Read(self, copies)

    def read(self, group: int, copies: Sequence[BlockCopy]) -> None:
        pytest.fail("the puller waits for no read that it could start")

    def close(self) -> None:
        self.log.append("close")


class Transport:
    name = "test"

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def bind(self, pool: LocalPool) -> None: ...

    def describe(self) -> PoolDescription:
        return PEER

    def connect(
        self, peer: PoolDescription, give_up: Callable[[], bool] = lambda: False
    ) -> Connection:
        return self.connection

    def close(self) -> None: ...


class StartedSums:
    """Sums that are made elsewhere, meanwhile."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.fail_when_taken = False

    def start(self, block_ids: Sequence[int], group: int) -> Callable[[], Uint64Array]:
        sums = self.bench.sum_blocks(block_ids, group)

        def take() -> Uint64Array:
            self.bench.log.append(f"take {list(block_ids)}")
            if self.fail_when_taken:
                raise RuntimeError("no sums today")
            return sums

        return take


class Bench:
    def __init__(self, *, starts_sums: bool = False) -> None:
        memory = torch.zeros(GROUPS[-1].end_bytes, dtype=torch.uint8)
        self.pool = LocalPool(memory, GROUPS, secrets.token_hex(8))
        self.log: list[str] = []
        source = torch.randint(0, 256, (NUM_BLOCKS, BLOCK_BYTES), dtype=torch.uint8)
        self.connection = Connection(self.pool, source, self.log)
        self.sum_fails = False
        self.results: Queue[PullResult] = Queue()
        self.started = StartedSums(self)
        self.puller = Puller(
            Transport(self.connection),
            self.pool,
            self.results.put,
            self.started if starts_sums else self.sum_blocks,
        )

    def sum_blocks(self, block_ids: Sequence[int], group: int) -> Uint64Array:
        assert group == GROUP
        self.log.append(f"sum {list(block_ids)}")
        if self.sum_fails:
            raise RuntimeError("no sums today")
        return block_sums(self.pool.words(group)[list(block_ids)])

    def pull(self, ids: Sequence[int]) -> None:
        """Block i to block 15 − i."""
        words = self.connection.source[list(ids)].view(torch.int32).view(len(ids), NUM_HEADS, -1)
        seed = seeds(PEER.incarnation, ids, [0] * len(ids), NUM_HEADS)
        rows = digests(block_sums(words), seed).tolist()
        expected = [ExpectedBlock(i, 0, tuple(row)) for i, row in zip(ids, rows, strict=True)]
        copies = [BlockCopy(i, 15 - i) for i in ids]
        self.puller.submit(PullJob(1, PEER, GROUP, copies, expected))


_OVERLAPPED = [
    "start [3, 1]",
    "landed [3, 1]",
    "start [4, 0]",
    "sum [12, 14]",
    "landed [4, 0]",
    "start [5]",
    "sum [11, 15]",
    "landed [5]",
    "sum [10]",
]
"""Each piece but the last is summed while the next one is read."""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr("baton.shared.transfer.puller._PIECE_BYTES", 2 * BLOCK_BYTES)
    bench = Bench()
    yield bench
    bench.puller.close()


def test_a_piece_is_summed_while_the_next_is_read(bench: Bench) -> None:
    bench.pull([3, 1, 4, 0, 5])
    result = bench.results.get(timeout=60)
    assert (result.error, result.mismatched) == (None, ())
    assert bench.log == _OVERLAPPED
    local = bench.pool.words(GROUP)[[12, 14, 11, 15, 10]]
    assert np.array_equal(result.local_sums, block_sums(local))


@pytest.fixture
def starting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr("baton.shared.transfer.puller._PIECE_BYTES", 2 * BLOCK_BYTES)
    bench = Bench(starts_sums=True)
    yield bench
    bench.puller.close()


def test_sums_that_can_be_started_are_taken_when_all_has_landed(starting: Bench) -> None:
    starting.pull([3, 1, 4, 0, 5])
    result = starting.results.get(timeout=60)
    assert (result.error, result.mismatched) == (None, ())
    assert starting.log == [*_OVERLAPPED, "take [12, 14]", "take [11, 15]", "take [10]"]
    local = starting.pool.words(GROUP)[[12, 14, 11, 15, 10]]
    assert np.array_equal(result.local_sums, block_sums(local))


def test_sums_that_fail_when_taken_fail_the_job(starting: Bench) -> None:
    starting.started.fail_when_taken = True
    starting.pull([3, 1])
    result = starting.results.get(timeout=60)
    assert result.error == "RuntimeError: no sums today"
    assert len(result.local_sums) == 0 and starting.log[-1] == "close"


def test_a_piece_that_fails_leaves_no_sums(bench: Bench) -> None:
    bench.connection.fails_at = 4
    bench.pull([3, 1, 4, 0, 5])
    result = bench.results.get(timeout=60)
    assert result.error == "broken"
    assert len(result.local_sums) == 0
    assert bench.log[-1] == "close"


def test_sums_that_fail_end_the_read_under_way(bench: Bench) -> None:
    bench.sum_fails = True
    bench.pull([3, 1, 4, 0, 5])
    result = bench.results.get(timeout=60)
    assert result.error == "RuntimeError: no sums today"
    assert bench.log == ["start [3, 1]", "landed [3, 1]", "start [4, 0]", "sum [12, 14]", "close"]


def test_a_drop_ends_a_read_that_hangs(bench: Bench) -> None:
    bench.connection.hangs_at = 4
    bench.pull([3, 1, 4, 0, 5])
    bench.puller.drop_peer("cd34")
    with pytest.raises(Empty):
        bench.results.get(timeout=0.1)
    bench.puller.drop_peer(PEER.incarnation)
    assert bench.results.get(timeout=60).error is not None
    assert bench.log[-1] == "close"


def test_closing_ends_a_read_that_hangs(bench: Bench) -> None:
    bench.connection.hangs_at = 3
    bench.pull([3])
    bench.puller.close()
    assert bench.results.get(timeout=60).error is not None
