from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from baton.shared.transfer.interface import BlockCopy, GroupBlocks, LocalPool, TransferError
from baton.shared.transfer.shm import ShmTransport, sweep_stale
from baton.v1.kv_service_pb2 import PoolDescription
from tests.unit.transfer.conftest import (
    BLOCK_BYTES,
    GROUPS,
    NARROW,
    NUM_BLOCKS,
    NUM_HEADS,
    SHARING,
    WIDE,
    Peer,
    with_blocks,
)

StartPeer = Callable[[], Peer]


def test_blocks_of_another_process_arrive_and_others_stay(
    transport: ShmTransport, pool: LocalPool, peer: Peer
) -> None:
    connection = transport.connect(peer.description)
    assert connection.bytes_per_second > 0
    connection.read(NARROW, [BlockCopy(16, 3), BlockCopy(0, 4), BlockCopy(16, 0)])
    connection.read(NARROW, [])
    landed = {3: peer.content[16], 4: peer.content[0], 0: peer.content[16]}
    assert torch.equal(pool.memory, with_blocks(pool, NARROW, landed))
    connection.close()
    connection.close()


def test_blocks_of_every_group_arrive_in_their_own_places(
    transport: ShmTransport, pool: LocalPool, peer: Peer
) -> None:
    """The peer's pools have other sizes, and so begin elsewhere."""
    connection = transport.connect(peer.description)
    connection.read(WIDE, [BlockCopy(6, 0), BlockCopy(1, 4)])
    landed = {0: peer.contents[WIDE][6], 4: peer.contents[WIDE][1]}
    assert torch.equal(pool.memory, with_blocks(pool, WIDE, landed))
    pool.memory.zero_()
    connection.read(SHARING, [BlockCopy(16, 11)])
    landed = {11: peer.contents[NARROW][16]}
    assert torch.equal(pool.memory, with_blocks(pool, NARROW, landed))
    connection.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_are_equal_whatever_they_mean(tmp_path: Path, dtype: torch.dtype) -> None:
    """NaN payloads, infinities, negative zeros and denormals are bytes like others."""
    shape = (4, NUM_HEADS, 2, 2, 16, 5)
    num_bytes = torch.empty(shape, dtype=dtype).nbytes
    ends = []
    for _ in range(2):
        incarnation = secrets.token_hex(8)
        end = ShmTransport(incarnation, tmp_path)
        memory = end.allocate(num_bytes)
        group = GroupBlocks(0, 4, num_bytes // 4, NUM_HEADS)
        end.bind(LocalPool(memory, (group,), incarnation))
        ends.append((end, memory))
    (owner, theirs), (reader, ours) = ends
    theirs.random_(0, 256, generator=torch.Generator().manual_seed(1))
    values = theirs.view(dtype)
    values[:4] = torch.tensor([float("nan"), float("-inf"), -0.0, 1e-40], dtype=dtype)
    connection = reader.connect(owner.describe())
    connection.read(0, [BlockCopy(i, 3 - i) for i in range(4)])
    assert torch.equal(ours.view(4, -1), theirs.view(4, -1).flip(0))
    connection.close()
    owner.close()
    reader.close()


def test_reader_sees_later_writes_of_the_owner(tmp_path: Path, pool: LocalPool) -> None:
    incarnation = secrets.token_hex(8)
    owner = ShmTransport(incarnation, tmp_path)
    memory = owner.allocate(pool.memory.numel())
    owner.bind(LocalPool(memory, GROUPS, incarnation))
    reader = ShmTransport(secrets.token_hex(8), tmp_path)
    reader.bind(pool)
    connection = reader.connect(owner.describe())
    for value in (1, 2):
        memory.fill_(value)
        connection.read(NARROW, [BlockCopy(7, 7)])
        assert pool.blocks(NARROW)[7].eq(value).all()
    connection.close()
    owner.close()


def test_file_is_private_and_gone_after_close(tmp_path: Path) -> None:
    transport = ShmTransport("ab12", tmp_path)
    memory = transport.allocate(1 << 20)
    path = tmp_path / "baton-ab12.kv"
    assert path.stat().st_mode & 0o777 == 0o600
    # Pages are there already, so that none can be missing later.
    assert path.stat().st_blocks * 512 >= 1 << 20
    transport.close()
    transport.close()
    assert not path.exists()
    # The engine may still hold the memory.
    assert memory.add_(1).sum() == 1 << 20


def test_file_of_the_same_name_is_not_taken_over(tmp_path: Path) -> None:
    first = ShmTransport("ab12", tmp_path)
    first.allocate(4096)
    second = ShmTransport("ab12", tmp_path)
    with pytest.raises(TransferError, match="exists"):
        second.allocate(4096)
    assert (tmp_path / "baton-ab12.kv").exists()
    first.close()


def test_memory_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    transport = ShmTransport("ab12", tmp_path)
    with pytest.raises(TransferError, match="bytes free") as raised:
        transport.allocate(1 << 60)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TransferError):
        ShmTransport("ab12", tmp_path / "missing").allocate(4096)


@pytest.mark.parametrize("incarnation", ["", "../ab", "ab/cd", "xyz"])
def test_incarnation_cannot_lead_elsewhere(tmp_path: Path, incarnation: str) -> None:
    with pytest.raises(ValueError):
        ShmTransport(incarnation, tmp_path)


@pytest.mark.parametrize(
    ("group", "copy"),
    [
        *((NARROW, copy) for copy in [(NUM_BLOCKS + 5, 0), (0, NUM_BLOCKS), (-1, 0), (0, -1)]),
        *((WIDE, copy) for copy in [(7, 0), (0, 5), (-1, 0), (0, -1)]),
    ],
)
def test_no_such_block(
    transport: ShmTransport, pool: LocalPool, peer: Peer, group: int, copy: tuple[int, int]
) -> None:
    connection = transport.connect(peer.description)
    with pytest.raises(TransferError, match="no such block"):
        connection.read(group, [BlockCopy(0, 0), BlockCopy(*copy)])
    assert not pool.memory.any()
    connection.close()


def changed(peer: Peer, group: int | None = None, **fields: object) -> PoolDescription:
    """`fields` are those of the group, or of the description."""
    description = PoolDescription()
    description.CopyFrom(peer.description)
    for name, value in fields.items():
        part = description if group is None else description.groups[group]
        setattr(description.shm if name in ("path", "host_id") else part, name, value)
    return description


def regrouped(peer: Peer, *order: int) -> PoolDescription:
    """With these of its groups, in this order."""
    description = PoolDescription()
    description.CopyFrom(peer.description)
    del description.groups[:]
    description.groups.extend(peer.description.groups[group] for group in order)
    return description


def test_unlike_pools_are_not_connected(
    transport: ShmTransport, pool: LocalPool, peer: Peer, tmp_path: Path
) -> None:
    not_offered = changed(peer)
    not_offered.ClearField("shm")
    (tmp_path / "secret").write_bytes(bytes(pool.memory.numel()))
    cases = {
        "another host": changed(peer, host_id="else"),
        "blocks of 2048 bytes": changed(peer, NARROW, block_bytes=BLOCK_BYTES // 2),
        "4096 bytes and 3 heads, 4096 bytes and 4": changed(peer, WIDE, block_bytes=BLOCK_BYTES),
        "and 1 heads": changed(peer, NARROW, num_heads=1),
        "and 6 heads": changed(peer, WIDE, num_heads=6),
        "no blocks": changed(peer, WIDE, num_blocks=0),
        "has .* bytes, its blocks end at": changed(peer, NARROW, num_blocks=10**6),
        "bytes, its blocks end at": changed(peer, WIDE, offset_bytes=2**63),
        "2 heads, 12288 bytes and 3 heads, this": regrouped(peer, NARROW, WIDE),
        "has blocks of 12288": regrouped(peer, WIDE, NARROW, SHARING),
        "has blocks of no cache group": regrouped(peer),
        "cannot be in a file named": changed(peer, path=str(tmp_path / "secret")),
        "cannot be in a file": changed(peer, incarnation="beef"),
        "cannot be opened": changed(peer, path=str(tmp_path / "not-here" / peer.path.name)),
        "not offered": not_offered,
    }
    for problem, description in cases.items():
        with pytest.raises(TransferError, match=problem):
            transport.connect(description)
    transport.connect(peer.description).close()


def test_file_that_is_not_a_pool(transport: ShmTransport, pool: LocalPool, tmp_path: Path) -> None:
    size = pool.memory.numel()
    description = transport.describe()
    description.incarnation = "beef"
    path = tmp_path / "baton-beef.kv"
    description.shm.path = str(path)

    with pytest.raises(TransferError, match="cannot be opened"):
        transport.connect(description)
    path.write_bytes(bytes(size - 1))
    with pytest.raises(TransferError, match="has"):
        transport.connect(description)
    path.write_bytes(bytes(size))
    with pytest.raises(TransferError, match="gone"):
        transport.connect(description)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TransferError, match="cannot be opened"):
        transport.connect(description)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(TransferError, match="not ours"):
        transport.connect(description)


def test_killed_peer_is_noticed(
    transport: ShmTransport, pool: LocalPool, start_peer: StartPeer
) -> None:
    peer = start_peer()
    connection = transport.connect(peer.description)
    connection.read(NARROW, [BlockCopy(0, 0)])
    peer.kill()
    with pytest.raises(TransferError, match="gone"):
        connection.read(NARROW, [BlockCopy(1, 1)])
    connection.close()
    with pytest.raises(TransferError, match="gone"):
        transport.connect(peer.description)
    sweep_stale(peer.path.parent)
    with pytest.raises(TransferError, match="cannot be opened"):
        transport.connect(peer.description)


def test_closed_peer_is_noticed(
    transport: ShmTransport, pool: LocalPool, start_peer: StartPeer
) -> None:
    peer = start_peer()
    connection = transport.connect(peer.description)
    peer.close_transport()
    with pytest.raises(TransferError, match="gone"):
        connection.read(NARROW, [BlockCopy(0, 0)])
    connection.close()


def test_sweep_takes_what_dead_processes_left_and_nothing_else(
    tmp_path: Path, start_peer: StartPeer
) -> None:
    living, dead = start_peer(), start_peer()
    dead.kill()
    others = [tmp_path / name for name in ("baton-xyz.kv", "baton-ab.kv.txt", "other-ab.kv")]
    for other in others:
        other.write_bytes(b"")
    (tmp_path / "baton-aa.kv").symlink_to(others[0])
    assert living.path.exists() and dead.path.exists()
    assert sweep_stale(tmp_path) == 1
    assert living.path.exists() and not dead.path.exists()
    assert all(other.exists() for other in others)
    assert sweep_stale(tmp_path) == 0


def test_readers_do_not_keep_a_dead_peers_file(
    transport: ShmTransport, pool: LocalPool, start_peer: StartPeer, tmp_path: Path
) -> None:
    peer = start_peer()
    connection = transport.connect(peer.description)
    peer.kill()
    assert sweep_stale(tmp_path) == 1
    connection.close()


def test_closing_gives_everything_back(
    transport: ShmTransport, pool: LocalPool, peer: Peer
) -> None:

    def held() -> tuple[int, int]:
        maps = Path("/proc/self/maps").read_text().count(peer.path.name)
        return len(os.listdir("/proc/self/fd")), maps

    before = held()
    connections = [transport.connect(peer.description) for _ in range(3)]
    assert held() == (before[0] + 3 * 2, before[1] + 3)
    for connection in connections:
        connection.close()
    assert held() == before
