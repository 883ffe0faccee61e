"""Over NIXL between processes, host memory to host memory: UCX picks shared memory or, when told,
TCP. These tests need the wheel `nixl-cu13`; `-m 'not nixl'` leaves them out."""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import pytest
import torch

from baton.shared.kv.digest import block_sums, digests, seeds
from baton.shared.transfer import nixl_agent
from baton.shared.transfer.interface import (
    BlockCopy,
    GroupBlocks,
    LocalPool,
    OverlappingConnection,
    TransferError,
)
from baton.shared.transfer.nixl import NixlTransport, is_detour
from baton.shared.transfer.puller import ExpectedBlock, Puller, PullJob, PullResult
from baton.v1.kv_service_pb2 import PoolDescription
from tests.unit.transfer import nixl_peer

pytestmark = pytest.mark.nixl

ROOT = Path(__file__).parents[3]
NUM_BLOCKS, NUM_HEADS, BLOCK_BYTES = 96, 2, 16384
WIDE_BYTES, WIDE_HEADS = 40960, 5
NARROW, WIDE, SHARING = 0, 1, 2
"""Cache groups of these tests' pools: two of unequal block bytes, and one that shares the blocks of
the first, with more heads."""
SEED = 2718


def groups_of(
    num_blocks: int, num_wide: int, block_bytes: int = BLOCK_BYTES
) -> tuple[GroupBlocks, ...]:
    """One pool behind the other in one memory, with a block's room between them."""
    narrow = GroupBlocks(0, num_blocks, block_bytes, NUM_HEADS)
    wide = GroupBlocks(narrow.end_bytes + block_bytes, num_wide, WIDE_BYTES, WIDE_HEADS)
    return (narrow, wide, replace(narrow, num_heads=2 * NUM_HEADS))


GROUPS = groups_of(NUM_BLOCKS, 9)


class Peer:
    """`contents` is what its pools hold, by group: [num_blocks, bytes of a block] uint8."""

    def __init__(
        self, env: dict[str, str] | None = None, groups: tuple[GroupBlocks, ...] = GROUPS
    ) -> None:
        self.incarnation = secrets.token_hex(16)
        self.process, self._connection = nixl_peer.started(
            nixl_peer.own, env or {}, self.incarnation, SEED, groups
        )
        memory = torch.empty(max(group.end_bytes for group in groups), dtype=torch.uint8)
        memory.random_(0, 256, generator=torch.Generator().manual_seed(SEED))
        pool = LocalPool(memory, groups, self.incarnation)
        self.contents = [pool.blocks(group) for group in range(len(groups))]
        self.description = PoolDescription.FromString(self._connection.recv())

    def ask(self, what: str) -> Any:
        self._connection.send(what)
        return self._connection.recv()

    def stop(self) -> None:
        """Returns when no thread of it runs any more."""
        pid = self.process.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        while not all("State:\tT" in (each / "status").read_text() for each in threads):
            time.sleep(0.01)

    def go_on(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def job(self, copies: list[tuple[int, int]], job_id: int = 1, group: int = NARROW) -> PullJob:
        """With what the peer would announce of these blocks."""
        remote_ids = [remote for remote, _ in copies]
        num_heads = self.description.groups[group].num_heads
        content = self.contents[group][remote_ids]
        words = content.view(torch.int32).view(len(copies), num_heads, -1)
        seed = seeds(self.incarnation, remote_ids, [7] * len(copies), num_heads)
        rows = digests(block_sums(words), seed).tolist()
        expected = [
            ExpectedBlock(remote, 7, tuple(row))
            for remote, row in zip(remote_ids, rows, strict=True)
        ]
        return PullJob(
            job_id, self.description, group, [BlockCopy(*copy) for copy in copies], expected
        )


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    """For tests that leave it as it is."""
    peer = Peer()
    yield peer
    peer.kill()


@pytest.fixture
def start_peer() -> Iterator[Callable[..., Peer]]:
    peers: list[Peer] = []

    def start(**arguments: Any) -> Peer:
        peers.append(Peer(**arguments))
        return peers[-1]

    yield start
    for peer in peers:
        peer.kill()


@pytest.fixture
def pool() -> LocalPool:
    """This process's pools: all 0xA5."""
    num_bytes = max(group.end_bytes for group in GROUPS)
    memory = torch.full((num_bytes,), 0xA5, dtype=torch.uint8)
    return LocalPool(memory, GROUPS, secrets.token_hex(16))


@pytest.fixture
def transport(pool: LocalPool) -> Iterator[NixlTransport]:
    transport = NixlTransport(pool.incarnation)
    transport.bind(pool)
    yield transport
    transport.close()


def random_copies(num: int, num_blocks: int = NUM_BLOCKS) -> list[BlockCopy]:
    remote = torch.randperm(num_blocks)[:num].tolist()
    local = torch.randperm(num_blocks)[:num].tolist()
    return [BlockCopy(*pair) for pair in zip(remote, local, strict=True)]


def check_landed(pool: LocalPool, peer: Peer, copies: list[BlockCopy], group: int = NARROW) -> None:
    """The copies, and nothing else, have changed."""
    wanted = replace(pool, memory=torch.full_like(pool.memory, 0xA5))
    for remote_id, local_id in copies:
        wanted.blocks(group)[local_id] = peer.contents[group][remote_id]
    assert torch.equal(pool.memory, wanted.memory)


def test_it_is_there() -> None:
    assert nixl_agent.available("cpu") is None


@pytest.mark.parametrize("num_copies", [7, NUM_BLOCKS])
def test_random_blocks_arrive_and_others_stay(
    transport: NixlTransport, pool: LocalPool, peer: Peer, num_copies: int
) -> None:
    connection = transport.connect(peer.description)
    # Measuring has touched nothing.
    check_landed(pool, peer, [])
    assert connection.bytes_per_second > 1e6
    copies = random_copies(num_copies)
    connection.read(NARROW, copies)
    check_landed(pool, peer, copies)
    connection.close()


# Seen between H100s, over NVLink and on one GPU, with pools of 24 blocks of 48 KiB and 64 of 4 KiB
# that were read once; then without CUDA IPC, and over TCP.
@pytest.mark.parametrize(
    ("measured_gb", "expected_gb", "is_one"),
    [
        (11.0, 392.0, False),
        (5.7, 392.0, False),
        (1.6, 262.0, False),
        (360.0, 417.0, False),
        (40.0, None, False),
        (0.43, 11.7, True),
        (0.5, 0.01, True),
        (0.5, None, True),
    ],
)
def test_a_path_is_a_detour_when_it_is_slow_and_known_to_be(
    measured_gb: float, expected_gb: float | None, is_one: bool
) -> None:
    expected = None if expected_gb is None else expected_gb * 1e9
    assert is_detour(measured_gb * 1e9, expected) is is_one


def test_small_pools_are_measured_by_many_reads(
    start_peer: Callable[..., Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = groups_of(2, 1)
    peer = start_peer(groups=groups)
    transport = NixlTransport("ca11")
    transport.bind(LocalPool(torch.zeros(groups[1].end_bytes, dtype=torch.uint8), groups, "ca11"))
    num_pieces = []
    make_read = nixl_agent.Agent.make_read

    def counted(agent: Any, local: int, local_ids: Any, *more: Any) -> int:
        num_pieces.append(len(local_ids))
        return make_read(agent, local, local_ids, *more)

    monkeypatch.setattr(nixl_agent.Agent, "make_read", counted)
    connection = transport.connect(peer.description)
    assert min(num_pieces) * BLOCK_BYTES == 64 << 20
    # The library knows of host memory here, and does not take it for NVLink.
    expected = connection._expected_rate()
    assert expected is not None and 1e6 < expected < 20e9
    connection.close()
    transport.close()


@pytest.mark.parametrize("part_bytes", [2 << 20, WIDE_BYTES // WIDE_HEADS])
def test_blocks_of_other_groups_arrive_in_their_own_places(
    part_bytes: int,
    transport: NixlTransport,
    pool: LocalPool,
    start_peer: Callable[..., Peer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The peer's pools have other sizes, and so begin elsewhere. Large blocks come in parts."""
    monkeypatch.setattr("baton.shared.transfer.nixl._PART_BYTES", part_bytes)
    peer = start_peer(groups=groups_of(NUM_BLOCKS + 3, 12))
    connection = transport.connect(peer.description)
    for group, num_blocks in ((WIDE, 9), (NARROW, NUM_BLOCKS), (SHARING, NUM_BLOCKS)):
        pool.memory.fill_(0xA5)
        copies = random_copies(num_blocks, num_blocks)
        connection.read(group, copies)
        check_landed(pool, peer, copies, group)
        with pytest.raises(TransferError, match="no such block"):
            connection.read(group, [BlockCopy(0, num_blocks)])
    connection.close()


def test_reads_follow_one_another(transport: NixlTransport, pool: LocalPool, peer: Peer) -> None:
    connection = transport.connect(peer.description)
    assert isinstance(connection, OverlappingConnection)
    connection.read(NARROW, [])
    first = connection.start(NARROW, [BlockCopy(3, 4)])
    with pytest.raises(RuntimeError, match="under way"):
        connection.start(NARROW, [BlockCopy(5, 6)])
    first.wait()
    connection.start(NARROW, [BlockCopy(5, 6)]).wait()
    check_landed(pool, peer, [BlockCopy(3, 4), BlockCopy(5, 6)])
    connection.close()
    connection.close()
    with pytest.raises(TransferError, match="disconnected"):
        connection.read(NARROW, [BlockCopy(0, 0)])


def test_reading_leaves_the_source_as_it_was(transport: NixlTransport, peer: Peer) -> None:
    before = peer.ask("hash")
    connection = transport.connect(peer.description)
    connection.read(NARROW, random_copies(NUM_BLOCKS))
    connection.close()
    assert peer.ask("hash") == before


def test_an_idle_owner_takes_no_core(transport: NixlTransport, peer: Peer) -> None:
    connection = transport.connect(peer.description)
    assert peer.ask("cpu") < 0.3
    connection.close()


def test_over_tcp_a_busy_owner_is_read(
    transport: NixlTransport, pool: LocalPool, start_peer: Callable[..., Peer]
) -> None:
    """TCP needs the owner's hand: its agent's thread gives it while Python is busy."""
    peer = start_peer(env={"UCX_TLS": "tcp"})
    assert peer.ask("busy") == "busy"
    connection = transport.connect(peer.description)
    copies = random_copies(NUM_BLOCKS)
    connection.read(NARROW, copies)
    check_landed(pool, peer, copies)
    connection.close()


@pytest.mark.parametrize(("remote_id", "local_id"), [(-1, 0), (0, -1), (96, 0), (0, 96)])
def test_blocks_that_are_not_there(
    transport: NixlTransport, pool: LocalPool, peer: Peer, remote_id: int, local_id: int
) -> None:
    connection = transport.connect(peer.description)
    copies = [BlockCopy(1, 1), BlockCopy(remote_id, local_id)]
    with pytest.raises(TransferError, match=f"block {remote_id} of 96 to block {local_id} of 96"):
        connection.read(NARROW, copies)
    check_landed(pool, peer, [])
    connection.read(NARROW, copies[:1])
    check_landed(pool, peer, copies[:1])
    connection.close()


def test_wrong_layouts_are_refused(
    transport: NixlTransport, peer: Peer, pool: LocalPool, start_peer: Callable[..., Peer]
) -> None:
    with pytest.raises(TransferError, match="has blocks of 8192 bytes and 2 heads"):
        transport.connect(start_peer(groups=groups_of(8, 8, 8192)).description)
    with pytest.raises(TransferError, match="own"):
        transport.connect(transport.describe())
    cases: list[tuple[str, Callable[[PoolDescription], object]]] = [
        ("and 4 heads", lambda d: setattr(d.groups[NARROW], "num_heads", 4)),
        ("and 10 heads", lambda d: setattr(d.groups[WIDE], "num_heads", 10)),
        ("8192 bytes and 5 heads", lambda d: setattr(d.groups[WIDE], "block_bytes", 8192)),
        ("no blocks", lambda d: setattr(d.groups[WIDE], "num_blocks", 0)),
        ("no cache group", lambda d: d.ClearField("groups")),
        ("16384 bytes and 2 heads, this", lambda d: d.groups.__delitem__(slice(1, None))),
        ("registered", lambda d: setattr(d.groups[WIDE], "num_blocks", 9 + 1)),
        ("registered", lambda d: setattr(d.groups[WIDE], "offset_bytes", 1 << 40)),
        ("registered", lambda d: setattr(d.nixl, "base_address", d.nixl.base_address - 64)),
        ("registered", lambda d: setattr(d.nixl, "is_device_memory", True)),
        ("said to be", lambda d: setattr(d.nixl, "agent_name", "baton-0")),
        ("metadata", lambda d: setattr(d.nixl, "agent_metadata", b"")),
        ("metadata", lambda d: setattr(d.nixl, "agent_metadata", secrets.token_bytes(400))),
        ("not offered over nixl", lambda d: d.ClearField("nixl")),
    ]
    for match, damage in cases:
        description = PoolDescription.FromString(peer.description.SerializeToString())
        damage(description)
        with pytest.raises(TransferError, match=match):
            transport.connect(description)
    connection = transport.connect(peer.description)
    connection.read(NARROW, [BlockCopy(0, 0)])
    connection.close()
    check_landed(pool, peer, [BlockCopy(0, 0)])


def test_a_killed_peer_is_an_error_and_another_can_be_read(
    transport: NixlTransport, pool: LocalPool, start_peer: Callable[..., Peer]
) -> None:
    victim, other = start_peer(), start_peer()
    connection = transport.connect(victim.description)
    connection.read(NARROW, [BlockCopy(0, 0)])
    victim.kill()
    with pytest.raises(TransferError, match=victim.incarnation):
        connection.read(NARROW, [BlockCopy(1, 1)])
    with pytest.raises(TransferError):
        connection.read(NARROW, [BlockCopy(1, 1)])
    connection.close()
    with pytest.raises(TransferError):
        transport.connect(victim.description)
    connection = transport.connect(other.description)
    copies = random_copies(NUM_BLOCKS)
    connection.read(NARROW, copies)
    check_landed(pool, other, copies)
    connection.close()


def test_a_reader_killed_in_the_middle_leaves_the_owner_alone(
    start_peer: Callable[..., Peer],
) -> None:
    peer = start_peer(env={"UCX_TLS": "tcp"}, groups=groups_of(NUM_BLOCKS, 1, 1 << 20))
    before = peer.ask("hash")
    described = peer.description.SerializeToString()
    reader, connection = nixl_peer.started(nixl_peer.read_without_end, {}, described)
    assert connection.recv() == "reading"
    time.sleep(0.1)
    reader.kill()
    reader.join()
    time.sleep(0.2)
    assert peer.ask("hash") == before


def test_a_peer_killed_in_the_middle(
    transport: NixlTransport, start_peer: Callable[..., Peer]
) -> None:
    """Stopped first, so that the read is under way when the end comes."""
    peer = start_peer(env={"UCX_TLS": "tcp"})
    connection = transport.connect(peer.description)
    peer.stop()
    pending = connection.start(NARROW, random_copies(NUM_BLOCKS))
    peer.kill()
    started = time.monotonic()
    with pytest.raises(TransferError, match=peer.incarnation):
        pending.wait()
    assert time.monotonic() - started < 1.0
    connection.close()


def test_a_read_of_a_stopped_peer_can_be_given_up(
    transport: NixlTransport, pool: LocalPool, start_peer: Callable[..., Peer]
) -> None:
    """Once the connection is closed nothing lands, not even when the peer goes on. (The peer may
    die of it: over TCP UCX bears no reader that is gone before it is answered.)"""
    peer = start_peer(env={"UCX_TLS": "tcp"})
    connection = transport.connect(peer.description)
    peer.stop()
    pending = connection.start(NARROW, random_copies(NUM_BLOCKS))
    give_up_at = time.monotonic() + 0.2
    with pytest.raises(TransferError, match="dropped"):
        pending.wait(lambda: time.monotonic() > give_up_at)
    connection.close()
    pool.memory.fill_(0xA5)
    peer.go_on()
    time.sleep(0.5)
    check_landed(pool, peer, [])
    other = start_peer()
    connection = transport.connect(other.description)
    copies = random_copies(NUM_BLOCKS)
    connection.read(NARROW, copies)
    check_landed(pool, other, copies)
    connection.close()


def test_a_stalled_read_ends(
    transport: NixlTransport, start_peer: Callable[..., Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = start_peer(env={"UCX_TLS": "tcp"})
    connection = transport.connect(peer.description)
    peer.stop()
    monkeypatch.setattr("baton.shared.transfer.nixl._STALLED_S", 0.2)
    with pytest.raises(TransferError, match="stalled"):
        connection.read(NARROW, [BlockCopy(0, 0)])
    connection.close()


def test_a_closed_pool_is_off_offer(
    transport: NixlTransport, start_peer: Callable[..., Peer]
) -> None:
    peer = start_peer()
    connection = transport.connect(peer.description)
    assert peer.ask("close") == "closed"
    with pytest.raises(TransferError):
        connection.read(NARROW, [BlockCopy(0, 0)])
    connection.close()


def test_the_puller_reads_verifies_and_outlives_peers(
    transport: NixlTransport,
    pool: LocalPool,
    peer: Peer,
    start_peer: Callable[..., Peer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("baton.shared.transfer.puller._PIECE_BYTES", 10 * BLOCK_BYTES)
    results: Queue[PullResult] = Queue()
    puller = Puller(transport, pool, results.put)
    try:
        copies = random_copies(NUM_BLOCKS)
        puller.submit(peer.job([(remote, local) for remote, local in copies]))
        result = results.get(timeout=30)
        assert (result.error, result.mismatched) == (None, ())
        check_landed(pool, peer, copies)
        local_ids = [copy.local_block_id for copy in copies]
        assert np.array_equal(result.local_sums, block_sums(pool.words(NARROW)[local_ids]))
        assert puller.rates().keys() == {peer.incarnation}
        puller.submit(peer.job([(8, 1), (0, 3)], group=WIDE))
        result = results.get(timeout=30)
        assert (result.error, result.mismatched) == (None, ())
        assert np.array_equal(result.local_sums, block_sums(pool.words(WIDE)[[1, 3]]))

        victim = start_peer()
        puller.submit(victim.job([(0, 0)]))
        assert results.get(timeout=30).error is None
        victim.kill()
        puller.submit(victim.job([(0, 0)]))
        assert victim.incarnation in (results.get(timeout=30).error or "")
        puller.submit(peer.job([(3, 5)]))
        assert results.get(timeout=30).error is None

        # A drop ends a read that waits for a stopped peer.
        stopped = start_peer(env={"UCX_TLS": "tcp"})
        puller.submit(stopped.job([(0, 0)]))
        assert results.get(timeout=30).error is None
        stopped.stop()
        puller.submit(stopped.job([(0, 0)]))
        time.sleep(0.1)
        puller.drop_peer(stopped.incarnation)
        assert "dropped" in (results.get(timeout=30).error or "")
        puller.submit(peer.job([(3, 5)]))
        assert results.get(timeout=30).error is None

        # So it does where the way to one is only being made.
        silent = start_peer(env={"UCX_TLS": "tcp"})
        silent.stop()
        puller.submit(silent.job([(0, 0)]))
        # Until the puller is making the connection; it tells nobody when.
        time.sleep(0.5)
        puller.drop_peer(silent.incarnation)
        assert "dropped" in (results.get(timeout=30).error or "")
        puller.submit(peer.job([(3, 5)]))
        assert results.get(timeout=30).error is None
    finally:
        puller.close()


def test_two_connections_at_once(
    transport: NixlTransport, pool: LocalPool, peer: Peer, start_peer: Callable[..., Peer]
) -> None:
    one, two = transport.connect(peer.description), transport.connect(start_peer().description)
    first, second = one.start(NARROW, [BlockCopy(1, 1)]), two.start(NARROW, [BlockCopy(2, 2)])
    second.wait()
    first.wait()
    check_landed(pool, peer, [BlockCopy(1, 1), BlockCopy(2, 2)])
    one.close()
    two.read(NARROW, [BlockCopy(3, 3)])
    two.close()


def test_why_it_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    _, connection = nixl_peer.started(nixl_peer.say_why_not, {"UCX_TLS": "sm,self"})
    why_not = connection.recv()
    assert "UCX_TLS=sm,self must hold tcp" in why_not and "\n" not in why_not

    nixl_agent.library.cache_clear()
    monkeypatch.setattr(nixl_agent, "_module_names", lambda: ["nixl_cu99"])
    assert nixl_agent.available("cpu") == "NIXL is not installed (pip install nixl-cu13)"
    nixl_agent.library.cache_clear()
