"""Moving blocks: one interface; the transports are siblings of this file.

The reader pulls. A transport describes the local pool, connects to a peer's, and copies whole
blocks of the peer's pool into the local one. What the bytes mean, who may be read and when, and
whether they are right is not its business: claims and digests see to that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from baton.v1 import kv_service_pb2


class TransferError(Exception):
    """A peer cannot be read, or the local pool not be offered. The message is one line."""


class BlockCopy(NamedTuple):
    remote_block_id: int
    local_block_id: int


@dataclass(frozen=True)
class LocalPool:
    """This process's blocks, and what a reader must know of them.

    `memory`: flat uint8, at least `num_blocks * block_bytes` long; the heads of a block lie one
    after another in it. `ValueError` when the numbers do not fit together.
    """

    memory: torch.Tensor
    num_blocks: int
    block_bytes: int
    num_heads: int
    incarnation: str
    """Random at the process's start, in hex digits."""

    def __post_init__(self) -> None:
        if self.memory.dtype != torch.uint8 or self.memory.dim() != 1:
            raise ValueError("pool memory is not a flat tensor of bytes")
        if self.num_blocks < 1 or self.memory.numel() < self.num_blocks * self.block_bytes:
            raise ValueError(
                f"pool memory of {self.memory.numel()} bytes does not hold {self.num_blocks} "
                f"blocks of {self.block_bytes}"
            )
        if self.num_heads < 1 or self.block_bytes < 1 or self.block_bytes % (4 * self.num_heads):
            raise ValueError(
                f"a block of {self.block_bytes} bytes is not {self.num_heads} heads of whole words"
            )

    def blocks(self) -> torch.Tensor:
        """[num_blocks, block_bytes] uint8, a view."""
        return self.memory[: self.num_blocks * self.block_bytes].view(self.num_blocks, -1)

    def words(self) -> torch.Tensor:
        """[num_blocks, num_heads, words of a head] int32, a view: what digests are made of."""
        return self.blocks().view(torch.int32).view(self.num_blocks, self.num_heads, -1)


class PeerConnection(Protocol):
    """One peer's pool. Used by one thread only."""

    @property
    def bytes_per_second(self) -> float:
        """Measured when connecting."""

    def read(self, copies: Sequence[BlockCopy]) -> None:
        """Returns when all have landed. `TransferError`: any part of them may have landed."""

    def close(self) -> None:
        """When it returns, nothing lands any more."""


class PendingRead(Protocol):
    """A read that goes on by itself."""

    def wait(self, give_up: Callable[[], bool] = lambda: False) -> None:
        """Returns when all blocks have landed. `TransferError`: any part of them may have landed,
        or may land until the connection is closed; so too when `give_up()` turns true."""


@runtime_checkable
class OverlappingConnection(PeerConnection, Protocol):
    """A connection whose reads leave the thread free."""

    def start(self, copies: Sequence[BlockCopy]) -> PendingRead:
        """Begins what `read` does; one at a time. `TransferError` as `read`."""


class KvTransport(Protocol):
    @property
    def name(self) -> str: ...

    def bind(self, pool: LocalPool) -> None:
        """Says which memory is offered and read into; once, before all that follows."""

    def describe(self) -> kv_service_pb2.PoolDescription:
        """What a peer's `connect` needs."""

    def connect(
        self, peer: kv_service_pb2.PoolDescription, give_up: Callable[[], bool] = lambda: False
    ) -> PeerConnection:
        """Opens and measures the path, by reading some blocks; logs the rate once.

        `TransferError` when the peer is gone, out of reach, or its blocks are not like ours; so
        too when `give_up()` turns true on the way.
        """

    def close(self) -> None:
        """Takes the pool off offer. Peers that read it notice."""


def check_layout(local: LocalPool, peer: kv_service_pb2.PoolDescription) -> None:
    """`TransferError` unless the peer's blocks can be copied into ours as they are."""
    if (peer.block_bytes, peer.num_heads) != (local.block_bytes, local.num_heads):
        raise TransferError(
            f"pool {peer.incarnation} has blocks of {peer.block_bytes} bytes and "
            f"{peer.num_heads} heads, this one of {local.block_bytes} and {local.num_heads}"
        )
    if peer.num_blocks < 1:
        raise TransferError(f"pool {peer.incarnation} has no blocks")
