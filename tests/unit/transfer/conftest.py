"""Pools for these tests, of this process and of real other ones."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import torch

from baton.shared.kv.digest import block_sums, digests, seeds
from baton.shared.transfer.interface import GroupBlocks, LocalPool
from baton.shared.transfer.puller import ExpectedBlock
from baton.shared.transfer.shm import ShmTransport
from baton.v1.kv_service_pb2 import PoolDescription

ROOT = Path(__file__).parents[3]
NUM_BLOCKS, NUM_HEADS, BLOCK_BYTES = 12, 2, 4096
WIDE_BYTES, WIDE_HEADS = 3 * 4096, 3
NARROW, WIDE, SHARING = 0, 1, 2
"""Cache groups of these tests' pools: two of unequal block bytes, and one that shares the blocks of
the first, with more heads."""


def groups_of(num_blocks: int, num_wide: int) -> tuple[GroupBlocks, ...]:
    """One pool behind the other in one memory, with a block's room between them."""
    narrow = GroupBlocks(0, num_blocks, BLOCK_BYTES, NUM_HEADS)
    wide = GroupBlocks(narrow.end_bytes + BLOCK_BYTES, num_wide, WIDE_BYTES, WIDE_HEADS)
    return (narrow, wide, replace(narrow, num_heads=2 * NUM_HEADS))


GROUPS = groups_of(NUM_BLOCKS, 5)

# A peer of pools of random bytes. Prints their description, then waits to be ended.
PEER = """
import json, sys
from pathlib import Path
import torch
from baton.shared.transfer.interface import GroupBlocks, LocalPool
from baton.shared.transfer.shm import ShmTransport
directory, incarnation, groups = sys.argv[1:]
groups = tuple(GroupBlocks(*each) for each in json.loads(groups))
transport = ShmTransport(incarnation, Path(directory))
memory = transport.allocate(max(group.end_bytes for group in groups))
generator = torch.Generator().manual_seed(int(incarnation, 16) % 2**32)
memory.random_(0, 256, generator=generator)
transport.bind(LocalPool(memory, groups, incarnation))
print(transport.describe().SerializeToString().hex(), flush=True)
for line in sys.stdin:
    if line == "close\\n":
        transport.close()
        print("closed", flush=True)
"""


class Peer:
    """Another process with pools; `contents` is what they hold, by group: [num_blocks, bytes of a
    block]; `content` is that of the first."""

    def __init__(self, directory: Path, groups: tuple[GroupBlocks, ...] = GROUPS) -> None:
        self.incarnation = secrets.token_hex(8)
        arguments = [str(directory), self.incarnation, json.dumps(list(map(astuple, groups)))]
        self.process = subprocess.Popen(
            [sys.executable, "-c", PEER, *arguments],
            cwd=ROOT,
            env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        generator = torch.Generator().manual_seed(int(self.incarnation, 16) % 2**32)
        memory = torch.empty(max(group.end_bytes for group in groups), dtype=torch.uint8)
        memory.random_(0, 256, generator=generator)
        pool = LocalPool(memory, groups, self.incarnation)
        self.contents = [pool.blocks(group) for group in range(len(groups))]
        self.content = self.contents[NARROW]
        self.description = PoolDescription.FromString(bytes.fromhex(self._line()))
        self.path = Path(self.description.shm.path)

    def expected(self, block_id: int, generation: int = 0, group: int = NARROW) -> ExpectedBlock:
        """What the peer would announce of its block."""
        num_heads = self.description.groups[group].num_heads
        words = self.contents[group][block_id].view(torch.int32).view(1, num_heads, -1)
        seed = seeds(self.incarnation, [block_id], [generation], num_heads)
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
    peer = Peer(tmp_path_factory.mktemp("peer"), groups_of(NUM_BLOCKS + 5, 7))
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
    """This process's pools, all zeros."""
    memory = transport.allocate(max(group.end_bytes for group in GROUPS))
    pool = LocalPool(memory, GROUPS, incarnation)
    transport.bind(pool)
    return pool


def with_blocks(pool: LocalPool, group: int, blocks: dict[int, torch.Tensor]) -> torch.Tensor:
    """What the memory of a pool of zeros holds when these blocks have landed, and nothing else."""
    wanted = LocalPool(torch.zeros_like(pool.memory), pool.groups, pool.incarnation)
    for block_id, content in blocks.items():
        wanted.blocks(group)[block_id] = content
    return wanted.memory
