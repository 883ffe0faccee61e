"""Pools for these tests, of this process and of real other ones."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from baton.shared.kv.digest import block_sums, digests, seeds
from baton.shared.transfer.interface import LocalPool
from baton.shared.transfer.puller import ExpectedBlock
from baton.shared.transfer.shm import ShmTransport
from baton.v1.kv_service_pb2 import PoolDescription

ROOT = Path(__file__).parents[3]
NUM_BLOCKS, NUM_HEADS, BLOCK_BYTES = 12, 2, 4096

# A peer of one pool of random bytes. Prints the pool's description, then waits to be ended.
PEER = """
import sys
from pathlib import Path
import torch
from baton.shared.transfer.interface import LocalPool
from baton.shared.transfer.shm import ShmTransport
directory, incarnation, num_blocks, num_heads, block_bytes = sys.argv[1:]
num_blocks, num_heads, block_bytes = int(num_blocks), int(num_heads), int(block_bytes)
transport = ShmTransport(incarnation, Path(directory))
memory = transport.allocate(num_blocks * block_bytes)
generator = torch.Generator().manual_seed(int(incarnation, 16) % 2**32)
memory.random_(0, 256, generator=generator)
transport.bind(LocalPool(memory, num_blocks, block_bytes, num_heads, incarnation))
print(transport.describe().SerializeToString().hex(), flush=True)
for line in sys.stdin:
    if line == "close\\n":
        transport.close()
        print("closed", flush=True)
"""


class Peer:
    """Another process with a pool; `content` is what its pool holds: [num_blocks, block_bytes]."""

    def __init__(self, directory: Path, num_blocks: int = NUM_BLOCKS) -> None:
        self.incarnation = secrets.token_hex(8)
        arguments = [str(directory), self.incarnation]
        arguments += [str(number) for number in (num_blocks, NUM_HEADS, BLOCK_BYTES)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", PEER, *arguments],
            cwd=ROOT,
            env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        generator = torch.Generator().manual_seed(int(self.incarnation, 16) % 2**32)
        self.content = torch.empty(num_blocks, BLOCK_BYTES, dtype=torch.uint8)
        self.content.view(-1).random_(0, 256, generator=generator)
        self.description = PoolDescription.FromString(bytes.fromhex(self._line()))
        self.path = Path(self.description.shm.path)

    def expected(self, block_id: int, generation: int = 0) -> ExpectedBlock:
        """What the peer would announce of its block."""
        words = self.content[block_id].view(torch.int32).view(1, NUM_HEADS, -1)
        seed = seeds(self.incarnation, [block_id], [generation], NUM_HEADS)
        [row] = digests(block_sums(words), seed).tolist()
        return ExpectedBlock(block_id, generation, tuple(row))

    def close_transport(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("close\n")
        self.process.stdin.flush()
        assert self._line() == "closed"

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@pytest.fixture(scope="session")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    """For tests that leave it as it is."""
    peer = Peer(tmp_path_factory.mktemp("peer"), NUM_BLOCKS + 5)
    yield peer
    peer.kill()


@pytest.fixture
def start_peer(tmp_path: Path) -> Iterator[Callable[[], Peer]]:
    """For tests that kill or damage it."""
    peers: list[Peer] = []

    def start() -> Peer:
        peers.append(Peer(tmp_path))
        return peers[-1]

    yield start
    for peer in peers:
        peer.kill()


@pytest.fixture
def incarnation() -> str:
    return secrets.token_hex(8)


@pytest.fixture
def transport(tmp_path: Path, incarnation: str) -> Iterator[ShmTransport]:
    transport = ShmTransport(incarnation, tmp_path)
    yield transport
    transport.close()


@pytest.fixture
def pool(transport: ShmTransport, incarnation: str) -> LocalPool:
    """This process's pool, all zeros."""
    memory = transport.allocate(NUM_BLOCKS * BLOCK_BYTES)
    pool = LocalPool(memory, NUM_BLOCKS, BLOCK_BYTES, NUM_HEADS, incarnation)
    transport.bind(pool)
    return pool
