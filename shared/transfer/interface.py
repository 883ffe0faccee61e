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


@dataclass(frozen=True, slots=True)
class GroupBlocks:
    """Where a cache group's blocks lie in the memory; the heads of a block lie one after another.

    Of a slot, the block of a group of states, its pieces stand for heads. Groups that share a pool
    of blocks have equal numbers, but for the heads.
    """

    offset_bytes: int
    num_blocks: int
    block_bytes: int
    num_heads: int

    @property
    def end_bytes(self) -> int:
        return self.offset_bytes + self.num_blocks * self.block_bytes

    @classmethod
    def of(cls, message: kv_service_pb2.GroupBlocks) -> GroupBlocks:
        return cls(message.offset_bytes, message.num_blocks, message.block_bytes, message.num_heads)

    def describe(self) -> kv_service_pb2.GroupBlocks:
        return kv_service_pb2.GroupBlocks(
            offset_bytes=self.offset_bytes,
            num_blocks=self.num_blocks,
            block_bytes=self.block_bytes,
            num_heads=self.num_heads,
        )


@dataclass(frozen=True)
class LocalPool:
    """This process's blocks, and what a reader must know of them.

    `memory`: flat uint8, that holds the blocks of all groups. `ValueError` when the numbers do not
    fit together.
    """

    memory: torch.Tensor
    groups: tuple[GroupBlocks, ...]
    incarnation: str
    """Random at the process's start, in hex digits."""

    def __post_init__(self) -> None:
        if self.memory.dtype != torch.uint8 or self.memory.dim() != 1:
            raise ValueError("pool memory is not a flat tensor of bytes")
        if not self.groups:
            raise ValueError("a pool without cache groups")
        for group in self.groups:
            is_inside = 0 <= group.offset_bytes and group.end_bytes <= self.memory.numel()
            if group.num_blocks < 1 or not is_inside:
                raise ValueError(
                    f"pool memory of {self.memory.numel()} bytes does not hold {group.num_blocks} "
                    f"blocks of {group.block_bytes} from byte {group.offset_bytes} on"
                )
            words = group.block_bytes % (4 * group.num_heads) if group.num_heads > 0 else 1
            if group.block_bytes < 1 or words or group.offset_bytes % 4:
                raise ValueError(
                    f"a block of {group.block_bytes} bytes is not {group.num_heads} heads of "
                    "whole words"
                )

    def blocks(self, group: int) -> torch.Tensor:
        """[num_blocks, block_bytes] uint8, a view."""
        each = self.groups[group]
        return self.memory[each.offset_bytes : each.end_bytes].view(each.num_blocks, -1)

    def words(self, group: int) -> torch.Tensor:
        """[num_blocks, num_heads, words of a head] int32, a view: what digests are made of."""
        each = self.groups[group]
        return self.blocks(group).view(torch.int32).view(each.num_blocks, each.num_heads, -1)


class PeerConnection(Protocol):
    """One peer's pool. Used by one thread only."""

    @property
    def bytes_per_second(self) -> float:
        """Measured when connecting."""

    def read(self, group: int, copies: Sequence[BlockCopy]) -> None:
        """Copies blocks of a cache group; returns when all have landed. `TransferError`: any part
        of them may have landed."""

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

    def start(self, group: int, copies: Sequence[BlockCopy]) -> PendingRead:
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
    theirs = [GroupBlocks.of(group) for group in peer.groups]
    if [_shape(group) for group in theirs] != [_shape(group) for group in local.groups]:
        raise TransferError(
            f"pool {peer.incarnation} has blocks of {_shapes(theirs)}, this one of "
            f"{_shapes(local.groups)}"
        )
    if any(group.num_blocks < 1 for group in theirs):
        raise TransferError(f"pool {peer.incarnation} has no blocks")


def _shape(group: GroupBlocks) -> tuple[int, int]:
    return group.block_bytes, group.num_heads


def _shapes(groups: Sequence[GroupBlocks]) -> str:
    shapes = [f"{group.block_bytes} bytes and {group.num_heads} heads" for group in groups]
    return ", ".join(shapes) or "no cache group"
