"""Transport between processes of one host: each pool is a file in shared memory.

The owner maps its file for writing, readers map it for reading only, so that a stray write
cannot reach a peer. The owner holds a lock on the file as long as it lives, whatever ends it:
readers see by the lock whether the peer is still there, and `sweep_stale` which files were left
behind.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import mmap
import os
import re
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from baton.shared.telemetry import log_event
from baton.shared.transfer.interface import (
    BlockCopy,
    GroupBlocks,
    LocalPool,
    TransferError,
    check_layout,
)
from baton.v1 import kv_service_pb2

log = logging.getLogger(__name__)

DEFAULT_DIRECTORY = Path("/dev/shm")
_FILE_NAME = re.compile(r"baton-([0-9a-f]+)\.kv")
# More than caches near the processor hold, and still a matter of milliseconds.
_MEASURED_BYTES = 32 << 20


class ShmTransport:
    name = "shm"

    def __init__(self, incarnation: str, directory: Path = DEFAULT_DIRECTORY) -> None:
        """`incarnation`: hex digits; names the file, which `allocate` creates."""
        self._path = directory.absolute() / f"baton-{incarnation}.kv"
        if not _FILE_NAME.fullmatch(self._path.name):
            raise ValueError(f"incarnation {incarnation!r} is not made of hex digits")
        self._file: int | None = None
        self._pool: LocalPool | None = None

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Memory for the pool: [num_bytes] uint8, zero, valid as long as the tensor lives.

        `TransferError` when the directory cannot hold it.
        """
        try:
            self._file = _create_locked(self._path)
            # Takes the pages now: a full file system is an error here, and no SIGBUS later.
            os.posix_fallocate(self._file, 0, num_bytes)
            mapping = mmap.mmap(self._file, num_bytes)
        except OSError as error:
            self.close()
            directory = self._path.parent
            raise TransferError(
                f"no shared memory of {num_bytes} bytes in {directory}: {error.strerror}"
                f" ({_free_bytes(directory)} bytes free)"
            ) from error
        return torch.frombuffer(mapping, dtype=torch.uint8)

    def bind(self, pool: LocalPool) -> None:
        self._pool = pool

    def describe(self) -> kv_service_pb2.PoolDescription:
        pool = self._bound()
        return kv_service_pb2.PoolDescription(
            incarnation=pool.incarnation,
            groups=[group.describe() for group in pool.groups],
            shm=kv_service_pb2.ShmPool(path=str(self._path), host_id=host_id()),
        )

    def connect(
        self, peer: kv_service_pb2.PoolDescription, give_up: Callable[[], bool] = lambda: False
    ) -> ShmConnection:
        """Nothing here waits for the peer."""
        return ShmConnection(self._bound(), peer)

    def close(self) -> None:
        if self._file is not None:
            _unlink_if_same(self._path, self._file)
            # Closing alone is not enough: the mapping keeps a descriptor of its own.
            fcntl.flock(self._file, fcntl.LOCK_UN)
            os.close(self._file)
            self._file = None

    def _bound(self) -> LocalPool:
        if self._pool is None:
            raise RuntimeError("no pool bound")
        return self._pool


class ShmConnection:
    """A peer's pool, mapped. `TransferError` when it is not what `peer` says."""

    def __init__(self, local: LocalPool, peer: kv_service_pb2.PoolDescription) -> None:
        _check_offer(peer)
        check_layout(local, peer)
        self._peer_name = peer.incarnation
        self._local_blocks = [local.blocks(group) for group in range(len(local.groups))]
        self._file = _open_peer(peer)
        try:
            num_bytes = _end_bytes(peer)
            self._mapping = mmap.mmap(self._file, num_bytes, prot=mmap.PROT_READ)
        except (OSError, ValueError, OverflowError) as error:
            os.close(self._file)
            raise TransferError(f"pool {peer.incarnation} cannot be mapped: {error}") from error
        memory = _read_only_tensor(self._mapping)
        self._remote_blocks = [
            memory[each.offset_bytes : each.end_bytes].view(each.num_blocks, -1)
            for each in map(GroupBlocks.of, peer.groups)
        ]
        del memory
        self.bytes_per_second = self._measure()
        log_event(
            log,
            logging.INFO,
            "path measured",
            transport="shm",
            pool=peer.incarnation,
            gb_per_s=self.bytes_per_second / 1e9,
        )

    def read(self, group: int, copies: Sequence[BlockCopy]) -> None:
        remote, local = self._remote_blocks[group], self._local_blocks[group]
        num_remote, num_local = len(remote), len(local)
        for remote_id, local_id in copies:
            if not (0 <= remote_id < num_remote and 0 <= local_id < num_local):
                raise TransferError(
                    f"block {remote_id} of {num_remote} to block {local_id} of {num_local}:"
                    " no such block"
                )
        if not _is_owned(self._file):
            raise TransferError(f"pool {self._peer_name} is gone")
        # Block by block: three to ten times the rate of index_select and index_copy_.
        for remote_id, local_id in copies:
            local[local_id].copy_(remote[remote_id])

    def close(self) -> None:
        if self._mapping.closed:
            return
        del self._remote_blocks
        self._mapping.close()
        os.close(self._file)

    def _measure(self) -> float:
        """Bytes per second of reading some blocks; the first pass only brings pages in."""
        remote = self._remote_blocks[0]
        block_bytes = remote.shape[1]
        num_blocks = max(1, min(len(remote), _MEASURED_BYTES // block_bytes))
        scratch = torch.empty(num_blocks, block_bytes, dtype=torch.uint8)
        elapsed_s = 0.0
        for _ in range(2):
            started_s = time.perf_counter()
            for index in range(num_blocks):
                scratch[index].copy_(remote[index])
            elapsed_s = time.perf_counter() - started_s
        return num_blocks * block_bytes / max(elapsed_s, 1e-9)


def sweep_stale(directory: Path = DEFAULT_DIRECTORY) -> int:
    """Removes the pools of processes that are gone; returns how many. For a process's start."""
    num_removed = 0
    for path in directory.glob("baton-*.kv"):
        if not _FILE_NAME.fullmatch(path.name):
            continue
        try:
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _unlink_if_same(path, file)
            num_removed += 1
        except OSError:
            continue
        finally:
            os.close(file)
    return num_removed


def host_id() -> str:
    """Of the host's current boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _check_offer(peer: kv_service_pb2.PoolDescription) -> None:
    if peer.WhichOneof("transport") != "shm":
        raise TransferError(f"pool {peer.incarnation} is not offered over shm")
    if peer.shm.host_id != host_id():
        raise TransferError(f"pool {peer.incarnation} is on another host")


def _end_bytes(peer: kv_service_pb2.PoolDescription) -> int:
    return max(GroupBlocks.of(group).end_bytes for group in peer.groups)


def _open_peer(peer: kv_service_pb2.PoolDescription) -> int:
    """The peer's file, open for reading, after everything was checked that can be."""
    path = Path(peer.shm.path)
    name = _FILE_NAME.fullmatch(path.name)
    if name is None or name[1] != peer.incarnation:
        raise TransferError(f"pool {peer.incarnation} cannot be in a file named {path.name!r}")
    try:
        # Neither a link nor a pipe may take us elsewhere or keep us.
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise TransferError(f"pool {peer.incarnation} cannot be opened: {error}") from error
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise TransferError(f"pool {peer.incarnation}: the file is not ours")
        if found.st_size < _end_bytes(peer):
            raise TransferError(
                f"pool {peer.incarnation}: the file has {found.st_size} bytes, its blocks end at "
                f"{_end_bytes(peer)}"
            )
        if not _is_owned(file):
            raise TransferError(f"pool {peer.incarnation} is gone")
    except BaseException:
        os.close(file)
        raise
    return file


def _create_locked(path: Path) -> int:
    """A new file that is ours, locked and in place."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(file, fcntl.LOCK_EX)
        # A sweep may have taken the file before the lock was ours.
        if os.fstat(file).st_nlink:
            return file
        os.close(file)


def _is_owned(file: int) -> bool:
    """Whether a living process holds the lock of `_create_locked`."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(file, fcntl.LOCK_UN)
    return False


def _unlink_if_same(path: Path, file: int) -> None:
    try:
        if os.path.samestat(path.stat(follow_symlinks=False), os.fstat(file)):
            path.unlink()
    except FileNotFoundError:
        pass


def _read_only_tensor(mapping: mmap.mmap) -> torch.Tensor:
    """[bytes] uint8 over a mapping that may not be written; use ends before the mapping does."""
    address = np.frombuffer(mapping, dtype=np.uint8).ctypes.data
    # torch takes only buffers that Python could write; the pages themselves stay protected.
    raw = (ctypes.c_uint8 * len(mapping)).from_address(address)
    return torch.frombuffer(raw, dtype=torch.uint8)


def _free_bytes(directory: Path) -> int:
    try:
        found = os.statvfs(directory)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize
