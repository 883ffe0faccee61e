"""Transport over NIXL and UCX: NVLink and CUDA IPC between GPUs, RDMA, shared memory, TCP.

    owner's agent    one for the process: has registered the pool, has a thread of its own
    reader's agents  one for each connection, of the puller's thread only

A reader takes whole blocks out of the peer's pool by index, and the owner's process is not asked.
A connection has an agent to itself because an agent's end is the only sure end of a read that is
under way: released and with its peer removed, a read over TCP has been seen to land later.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from itertools import count

import numpy as np
import numpy.typing as npt
import torch

from baton.shared.telemetry import log_event
from baton.shared.transfer.interface import (
    BlockCopy,
    GroupBlocks,
    LocalPool,
    TransferError,
    check_layout,
)
from baton.shared.transfer.nixl_agent import Agent, set_defaults
from baton.v1 import kv_service_pb2

log = logging.getLogger(__name__)

# Small pools are read several times over, so that what a read costs by itself does not count.
_MEASURED_BYTES = 64 << 20
_MEASURED_PIECES = 4096
_MEASURED_S = 0.02
"""A fast path is read for so long, and the best pass counts: others use it, too."""
# Between GPUs of one host 186 to 360 GB/s were seen, 40 with blocks of 4 KiB; by way of the host's
# memory or its network, 0.5.
_SLOW_BYTES_PER_S = 5e9
# The library expects 260 GB/s and more of NVLink, 11.7 of the host's memory, 0.01 of its network.
_DETOUR_BYTES_PER_S = 20e9

# Larger blocks are read in parts: pieces of this size come fastest.
_PART_BYTES = 2 << 20

# First connections between many GPUs have been seen to take half a minute.
_CONNECT_S = 30.0
# A read of a piece takes milliseconds. NIXL does not tell how far one is: no end for so long, and
# no rate as low as this, is a peer that has stopped.
_STALLED_S = 10.0
_STALLED_BYTES_PER_S = 50e6
# What a read that nobody waited for is given to end by itself.
_SETTLE_S = 1.0

# Pieces of a read are there in less, and whoever sleeps is late by as much as a piece takes.
_SPIN_S = 1e-3
_SLEEP_S = 50e-6


def is_detour(measured: float, expected: float | None) -> bool:
    """Whether GPU memory goes by way of the host: bytes per second as measured, and as the library
    expects them. Measured alone, a path that is busy just then looks the same."""
    return measured < _SLOW_BYTES_PER_S and (expected is None or expected < _DETOUR_BYTES_PER_S)


class NixlTransport:
    name = "nixl"

    def __init__(self, incarnation: str, host: str = "127.0.0.1") -> None:
        """`host`: the address that this worker listens on; only from there can it be read.

        Costs nothing yet: `bind` starts NIXL, when CUDA is in use already.
        """
        self._agent_name = f"baton-{incarnation}"
        self._host = host
        self._agent: Agent | None = None
        self._local: _Local | None = None

    def bind(self, pool: LocalPool) -> None:
        """`TransferError` when NIXL is not there, or does not take the memory."""
        set_defaults(self._host)
        self._agent = agent = Agent(self._agent_name, has_thread=True)
        self._local = local = _Local(pool)
        agent.register(local.memory)
        local.description.nixl.CopyFrom(
            kv_service_pb2.NixlPool(
                agent_metadata=agent.metadata(),
                agent_name=agent.name,
                base_address=local.memory.data_ptr(),
                device_id=max(local.memory.get_device(), 0),
                is_device_memory=local.memory.is_cuda,
            )
        )

    def describe(self) -> kv_service_pb2.PoolDescription:
        """From any thread."""
        description = kv_service_pb2.PoolDescription()
        description.CopyFrom(self._bound().description)
        return description

    def connect(
        self, peer: kv_service_pb2.PoolDescription, give_up: Callable[[], bool] = lambda: False
    ) -> NixlConnection:
        return NixlConnection(self._bound(), peer, give_up)

    def close(self) -> None:
        """Peers that go on reading get an error."""
        if self._agent is not None:
            self._agent.close()
        self._agent = self._local = None

    def _bound(self) -> _Local:
        if self._local is None:
            raise RuntimeError("no pool bound")
        return self._local


class _Local:
    """What every connection has on this side: the pool, and room to measure with."""

    def __init__(self, pool: LocalPool) -> None:
        self.pool = pool
        self.device = pool.memory.device
        self.memory = pool.memory
        self.description = kv_service_pb2.PoolDescription(
            incarnation=pool.incarnation, groups=[group.describe() for group in pool.groups]
        )
        self.num_parts = [_num_parts(group) for group in pool.groups]
        # The path is measured with parts of the first group's blocks.
        measured = pool.groups[0]
        self.part_bytes = measured.block_bytes // self.num_parts[0]
        num_parts = measured.num_blocks * self.num_parts[0]
        self.num_scratch = max(1, min(num_parts, _MEASURED_BYTES // self.part_bytes))
        self.scratch = torch.empty(
            self.num_scratch * self.part_bytes, dtype=torch.uint8, device=self.device
        )
        self.connections = count(1)


class NixlConnection:
    """A peer's pool. `TransferError` when it is not what `peer` says."""

    def __init__(
        self,
        local: _Local,
        peer: kv_service_pb2.PoolDescription,
        give_up: Callable[[], bool] = lambda: False,
    ) -> None:
        _check_peer(local, peer)
        if local.device.type == "cuda":
            # UCX copies in the context of the thread that asks.
            torch.cuda.set_device(local.device)
        self._local = local
        self._peer = peer
        self._pending: _Read | None = None
        self._is_broken = False
        number = next(local.connections)
        reader = f"baton-{local.pool.incarnation}-reader-{number}"
        self._agent: Agent | None = Agent(reader, has_thread=False)
        try:
            self._prepare(self._agent)
            self.bytes_per_second = self._measure(give_up)
        except TransferError as error:
            self.close()
            if peer.incarnation in str(error):
                raise
            raise TransferError(f"pool {peer.incarnation}: {error}") from error
        except BaseException:
            self.close()
            raise
        self._log_rate()

    def read(self, group: int, copies: Sequence[BlockCopy]) -> None:
        self.start(group, copies).wait()

    def start(self, group: int, copies: Sequence[BlockCopy]) -> _Read:
        ids = np.array(copies, dtype=np.int64).reshape(-1, 2)
        here, there = self._local.pool.groups[group], self._peer.groups[group]
        ends = np.array([there.num_blocks, here.num_blocks])
        wrong = ((ids < 0) | (ids >= ends)).any(axis=1)
        if wrong.any():
            remote_id, local_id = ids[wrong.argmax()].tolist()
            raise TransferError(
                f"block {remote_id} of {ends[0]} to block {local_id} of {ends[1]}: no such block"
            )
        num_parts = self._local.num_parts[group]
        parts = ids.T[:, :, None] * num_parts + np.arange(num_parts)
        remote_ids, local_ids = parts.reshape(2, -1).astype(np.int32)
        return self._start(group, self._blocks[group], local_ids, remote_ids, _STALLED_S)

    def close(self) -> None:
        """Ends the agent, and with it whatever is under way: sockets and queue pairs are closed,
        so that what a peer sends late has nowhere to go. Between GPUs a read is a row of copies
        that the driver has been given, that need no more from the peer and cannot be taken back:
        a read that has not ended well is waited for by waiting for all that the GPU does.
        """
        agent, self._agent = self._agent, None
        if agent is None:
            return
        is_clean = self._pending is None or self._pending.settle()
        try:
            if not is_clean and self._local.device.type == "cuda":
                torch.cuda.synchronize(self._local.device)
        finally:
            if self._pending is not None:
                self._pending.release()
            agent.close()

    def _prepare(self, agent: Agent) -> None:
        """Makes the two sides known to the agent."""
        local, peer = self._local, self._peer
        for memory in (local.memory, local.scratch):
            agent.register(memory)
        groups = local.pool.groups
        # Groups that share a pool share the lists of its blocks.
        local_blocks = {
            (each.offset_bytes, num_parts): agent.local_blocks(
                local.memory[each.offset_bytes :],
                each.num_blocks * num_parts,
                each.block_bytes // num_parts,
            )
            for each, num_parts in zip(groups, local.num_parts, strict=True)
        }
        self._blocks = [
            local_blocks[each.offset_bytes, num_parts]
            for each, num_parts in zip(groups, local.num_parts, strict=True)
        ]
        self._scratch = agent.local_blocks(local.scratch, local.num_scratch, local.part_bytes)
        name = agent.add_peer(peer.nixl.agent_metadata)
        if name != peer.nixl.agent_name:
            raise TransferError(f"said to be {peer.nixl.agent_name}'s, and is {name}'s")
        remote_blocks = {
            (each.offset_bytes, num_parts): agent.peer_blocks(
                name,
                peer.nixl.base_address + each.offset_bytes,
                each.num_blocks * num_parts,
                each.block_bytes // num_parts,
                peer.nixl.device_id,
                is_device_memory=peer.nixl.is_device_memory,
            )
            for each, num_parts in zip(peer.groups, local.num_parts, strict=True)
        }
        self._remote_blocks = [
            remote_blocks[each.offset_bytes, num_parts]
            for each, num_parts in zip(peer.groups, local.num_parts, strict=True)
        ]

    def _start(
        self,
        group: int,
        local_blocks: int,
        local_ids: npt.NDArray[np.int32],
        remote_ids: npt.NDArray[np.int32],
        stalled_s: float,
    ) -> _Read:
        if self._agent is None or self._is_broken:
            raise TransferError(f"pool {self._peer.incarnation} is disconnected")
        if self._pending is not None:
            raise RuntimeError("a read is under way already")
        part_bytes = self._local.pool.groups[group].block_bytes // self._local.num_parts[group]
        num_bytes = len(local_ids) * part_bytes
        read = _Read(self, self._agent, stalled_s + num_bytes / _STALLED_BYTES_PER_S)
        if not len(local_ids):
            return read
        self._pending = read
        try:
            self._agent.progress()
            read.post(
                self._agent.make_read(
                    local_blocks,
                    np.ascontiguousarray(local_ids),
                    self._remote_blocks[group],
                    np.ascontiguousarray(remote_ids),
                )
            )
        except TransferError as error:
            self._is_broken = True
            raise TransferError(f"pool {self._peer.incarnation}: {error}") from error
        return read

    def _measure(self, give_up: Callable[[], bool]) -> float:
        """Bytes per second of reading blocks, none of them into the pool; the first pass only
        makes the path."""
        local_ids, remote_ids = self._measured_ids()
        self._start(0, self._scratch, local_ids, remote_ids, _CONNECT_S).wait(give_up)
        best_s, left_s = math.inf, _MEASURED_S
        while left_s > 0:
            started_s = time.perf_counter()
            self._start(0, self._scratch, local_ids, remote_ids, _CONNECT_S).wait(give_up)
            elapsed_s = time.perf_counter() - started_s
            best_s, left_s = min(best_s, elapsed_s), left_s - elapsed_s
        return len(local_ids) * self._local.part_bytes / max(best_s, 1e-9)

    def _expected_rate(self) -> float | None:
        """Bytes per second by what the library says of the path: other traffic, and how small
        blocks are, do not matter. None when it does not say."""
        agent = self._agent
        assert agent is not None
        local_ids, remote_ids = self._measured_ids()
        try:
            read = agent.make_read(self._scratch, local_ids, self._remote_blocks[0], remote_ids)
            expected_s = agent.expected_s(read)
            agent.release_read(read)
        except TransferError as error:
            log_event(log, logging.DEBUG, "path not known", message=error)
            return None
        num_bytes = len(local_ids) * self._local.part_bytes
        return None if expected_s is None else num_bytes / expected_s

    def _measured_ids(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Parts of the scratch memory, and of the peer's first group, over and over."""
        num_pieces = _MEASURED_BYTES // self._local.part_bytes
        ids = np.arange(max(1, min(num_pieces, _MEASURED_PIECES)), dtype=np.int32)
        num_there = self._peer.groups[0].num_blocks * self._local.num_parts[0]
        return ids % self._local.num_scratch, ids % num_there

    def _log_rate(self) -> None:
        here = self._local.device.type
        there = "cuda" if self._peer.nixl.is_device_memory else "cpu"
        incarnation, rate = self._peer.incarnation, self.bytes_per_second
        log_event(
            log,
            logging.INFO,
            "path measured",
            transport="nixl",
            pool=incarnation,
            gb_per_s=rate / 1e9,
            source=there,
            target=here,
        )
        if not here == there == "cuda" or rate >= _SLOW_BYTES_PER_S:
            return
        expected = self._expected_rate()
        if is_detour(rate, expected):
            log_event(
                log,
                logging.WARNING,
                "path is a detour: UCX has found neither NVLink nor RDMA to this GPU, and every "
                "hand-off will wait for the transfer (UCX_TLS, UCX_NET_DEVICES, /dev/shm and the "
                "IPC namespace of containers have to do with it)",
                pool=incarnation,
                gb_per_s=rate / 1e9,
                expected_gb_per_s=None if expected is None else expected / 1e9,
            )


class _Read:
    """One read, of a connection's one at a time; without a handle there is nothing to wait for."""

    def __init__(self, connection: NixlConnection, agent: Agent, stalled_s: float) -> None:
        self._connection = connection
        self._agent = agent
        self._stalled_s = stalled_s
        self._handle: int | None = None
        self._is_done = True

    def post(self, handle: int) -> None:
        self._handle, self._is_done = handle, False
        self._is_done = self._agent.post(handle)

    def wait(self, give_up: Callable[[], bool] = lambda: False) -> None:
        connection = self._connection
        try:
            if not self._poll(self._stalled_s, give_up):
                why = "was dropped" if give_up() else f"has stalled for {self._stalled_s:.0f} s"
                raise TransferError(why)
        except TransferError as error:
            # It stays the connection's pending one: `close` sees to its end.
            connection._is_broken = True
            raise TransferError(f"pool {connection._peer.incarnation} {error}") from error
        self.release()
        connection._pending = None

    def settle(self) -> bool:
        """Whether it came to its end soon."""
        try:
            return self._poll(_SETTLE_S, lambda: False)
        except TransferError:
            return False

    def release(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            try:
                self._agent.release_read(handle)
            except TransferError as error:
                log_event(
                    log,
                    logging.DEBUG,
                    "read not released",
                    pool=self._connection._peer.incarnation,
                    message=error,
                )

    def _poll(self, timeout_s: float, give_up: Callable[[], bool]) -> bool:
        started_s = time.monotonic()
        while not self._is_done:
            if self._handle is None or self._agent.is_closed:
                return False
            self._is_done = self._agent.is_done(self._handle)
            if self._is_done:
                break
            waited_s = time.monotonic() - started_s
            if waited_s > timeout_s or give_up():
                return False
            # Other threads must have the interpreter, the engine's above all.
            time.sleep(0 if waited_s < _SPIN_S else _SLEEP_S)
        return True


def _num_parts(group: GroupBlocks) -> int:
    """Equal parts of a block that are read by themselves: whole heads, or pieces of a slot."""
    for num_parts in range(1, group.num_heads):
        if group.num_heads % num_parts == 0 and group.block_bytes // num_parts <= _PART_BYTES:
            return num_parts
    return group.num_heads


def _check_peer(local: _Local, peer: kv_service_pb2.PoolDescription) -> None:
    if peer.WhichOneof("transport") != "nixl":
        raise TransferError(f"pool {peer.incarnation} is not offered over nixl")
    check_layout(local.pool, peer)
    if peer.incarnation == local.pool.incarnation:
        raise TransferError(f"pool {peer.incarnation} is this process's own")
