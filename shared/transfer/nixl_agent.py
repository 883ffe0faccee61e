"""What is used of the NIXL library: one agent with its UCX backend, and plain numbers for handles.

The library's own Python class is passed over for what it is made of: it lets its progress thread
spin, which takes a whole core from every worker, and writes to standard output.
"""

from __future__ import annotations

import importlib
import ipaddress
import os
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from baton.shared.transfer.interface import TransferError

_BACKEND = "UCX"
# The longest sleep of the agent's thread; what comes in wakes it before.
_PROGRESS_US = 1000


class Agent:
    """Used by one thread at a time. Every method raises `TransferError`, with a line that tells
    what was tried; handles and remote names are good until they are released or removed."""

    def __init__(self, name: str, *, has_thread: bool) -> None:
        """With a thread of its own an agent serves others while this process is busy; without one
        it moves on in its calls only, `is_done` among them."""
        self._library = library()
        config = self._library.nixlAgentConfig()
        config.useProgThread = has_thread
        config.useListenThread = False
        config.pthrDelay = _PROGRESS_US
        config.syncMode = self._library.NIXL_THREAD_SYNC_NONE
        try:
            self._agent: Any = self._library.nixlAgent(name, config)
            self._backend = self._agent.createBackend(_BACKEND, {})
        except Exception as error:
            tls = os.environ.get("UCX_TLS")
            hint = f"; UCX_TLS={tls} must hold tcp and what else is there" if tls else ""
            raise TransferError(f"NIXL's {_BACKEND} does not start: {error}{hint}") from error
        self.name = name

    def close(self) -> None:
        """Ends the backend, whatever is under way, and its hold on memory. No call may follow."""
        self._agent = None

    @property
    def is_closed(self) -> bool:
        return self._agent is None

    def register(self, memory: torch.Tensor) -> None:
        """Takes `memory` (contiguous, on the CPU or a GPU) for reads from it and into it."""
        region = (memory.data_ptr(), memory.nbytes, _device_id(memory), "")
        descriptors = self._library.nixlRegDList(self._kind(memory.is_cuda), [region])
        self._call("memory cannot be registered", "registerMem", descriptors, [self._backend])

    def metadata(self) -> bytes:
        """What `add_peer` of another agent needs: how to reach this one, what it has registered."""
        return bytes(self._call("no metadata", "getLocalMD"))

    def add_peer(self, metadata: bytes) -> str:
        """Returns the peer's name."""
        name = self._call("not a peer's metadata", "loadRemoteMD", metadata)
        return str(name, "utf-8", "replace") if isinstance(name, bytes) else str(name)

    def remove_peer(self, name: str) -> None:
        """Closes what leads to it."""
        self._call(f"{name} stays", "invalidateRemoteMD", name)

    def local_blocks(self, memory: torch.Tensor, num_blocks: int, block_bytes: int) -> int:
        """A handle for `num_blocks` blocks, one after another from the start of `memory`."""
        run = _run(memory.data_ptr(), num_blocks, block_bytes, _device_id(memory))
        return self._blocks(self._library.NIXL_INIT_AGENT, memory.is_cuda, run)

    def peer_blocks(
        self,
        peer: str,
        address: int,
        num_blocks: int,
        block_bytes: int,
        device_id: int,
        *,
        is_device_memory: bool,
    ) -> int:
        """The same of a peer's memory, which it must have registered."""
        run = _run(address, num_blocks, block_bytes, device_id)
        return self._blocks(peer, is_device_memory, run)

    def _blocks(self, agent: str, is_device: bool, run: npt.NDArray[np.uint64]) -> int:
        kind = self._kind(is_device)
        what = "the blocks are not in registered memory"
        return int(self._call(what, "prepXferDlist", agent, kind, run, [self._backend]))

    def release_blocks(self, handle: int) -> None:
        self._call("descriptors stay", "releasedDlistH", handle)

    def make_read(
        self,
        local: int,
        local_ids: npt.NDArray[np.int32],
        remote: int,
        remote_ids: npt.NDArray[np.int32],
    ) -> int:
        """Handle of a read that copies block `remote_ids[i]` into block `local_ids[i]`."""
        arguments = (local, local_ids, remote, remote_ids, "", [self._backend], False)
        return int(self._call("no read", "makeXferReq", self._library.NIXL_READ, *arguments))

    def expected_s(self, read: int) -> float | None:
        """Seconds that the library expects of a read, by what it knows of the path that it has
        found; None when it does not know."""
        expected_us, _, _ = self._call("no estimate", "estimateXferCost", read)
        return expected_us / 1e6 if expected_us > 0 else None

    def progress(self) -> None:
        """Takes note of what has happened, of peers that are gone for one."""
        self._call("no news", "getNotifs", {}, [self._backend])

    def post(self, read: int) -> bool:
        """Starts it; whether it is done already."""
        return self._is_done(self._call("read not started", "postXferReq", read, ""))

    def is_done(self, read: int) -> bool:
        return self._is_done(self._call("read broken off", "getXferStatus", read))

    def release_read(self, read: int) -> None:
        """Raises when it goes on and cannot be stopped."""
        self._call("read not released", "releaseXferReq", read)

    def _is_done(self, status: object) -> bool:
        if status == self._library.NIXL_SUCCESS:
            return True
        if status == self._library.NIXL_IN_PROG:
            return False
        raise TransferError(f"read broken off: {status}")

    def _kind(self, is_device: bool) -> object:
        return self._library.VRAM_SEG if is_device else self._library.DRAM_SEG

    def _call(self, failure: str, method: str, *arguments: object) -> Any:
        try:
            return getattr(self._agent, method)(*arguments)
        # The library's errors have no class in common.
        except Exception as error:
            raise TransferError(f"{failure}: {error}".replace("\n", " ")) from error


def set_defaults(host: str) -> None:
    """Settings of UCX, where the environment has none; before the first agent.

    `host`: where this worker listens. One that listens on the loopback device only must not be
    open to readers from elsewhere either. UCX_TLS stays as it is: by default UCX takes the best
    of all it has, NVLink, InfiniBand and shared memory before TCP.
    """
    # Standard output is the worker's own.
    os.environ.setdefault("UCX_LOG_FILE", "stderr")
    # Not a word about settings of parts that this machine has no use for.
    os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")
    # Left to itself UCX reads through CUDA IPC only where a GPU has NVLink, and through TCP from
    # another process on the same GPU.
    os.environ.setdefault("UCX_CUDA_IPC_ENABLE_GET_ZCOPY", "on")
    if _is_loopback(host):
        os.environ.setdefault("UCX_NET_DEVICES", "lo")


def available(device: str) -> str | None:
    """Why NIXL cannot be used for pools of `device` (cpu or cuda), in one line; None when it can.

    Starts a backend to find out: half a second the first time.
    """
    os.environ.setdefault("UCX_LOG_FILE", "stderr")
    if device == "cuda" and torch.cuda.is_available():
        # UCX looks at what CUDA has in use when it starts.
        torch.empty(1, device="cuda")
    try:
        Agent("probe", has_thread=False).close()
    except TransferError as error:
        return str(error)
    return None


@cache
def library() -> Any:
    """The compiled module; `TransferError` when there is none that works."""
    found = []
    for name in _module_names():
        try:
            return importlib.import_module(f"{name}._bindings")
        except Exception as error:
            if not isinstance(error, ModuleNotFoundError) or error.name != name:
                found.append(f"{name} does not load: {error}".splitlines()[0])
    raise TransferError("; ".join(found) or "NIXL is not installed (pip install nixl-cu13)")


def _module_names() -> list[str]:
    """One wheel for each major version of CUDA; that of torch first, since both share a process."""
    names = ["nixl_cu13", "nixl_cu12"]
    if (torch.version.cuda or "").startswith("12."):
        names.reverse()
    return names


def _run(address: int, num_blocks: int, block_bytes: int, device: int) -> npt.NDArray[np.uint64]:
    """[1, 5]: address, length, device, stride and number of blocks that follow one another."""
    return np.array([[address, block_bytes, device, block_bytes, num_blocks]], dtype=np.uint64)


def _device_id(memory: torch.Tensor) -> int:
    return max(memory.get_device(), 0)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
