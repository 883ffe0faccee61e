"""Whether constraints can be compiled, found out beside the gateway's loop, in bounded time and
memory (constraint_check.py). Workers compile only what has passed."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import struct
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import OrderedDict
from pathlib import Path

from baton.shared.rpc.errors import (
    BatonError,
    EngineFailure,
    InvalidField,
    from_failure,
    to_failure,
)
from baton.v1 import error_details_pb2, types_pb2

LENGTH = struct.Struct("<I")
"""Before each message to and from a process."""
CPU_S = 1
"""Of one constraint; the kernel counts whole seconds, so it may be one more."""
MEMORY_BYTES = 512 << 20
"""That all constraints of a process may add to it."""
_NUM_PROCESSES = 2
_MAX_KNOWN = 1024
_START_S = 120.0
_ANSWER_S = 30.0
"""Of the clock on the wall, on a machine that does much else."""


class ConstraintChecker:
    """Starts its processes when the first constraints come."""

    def __init__(self, model_dir: Path, vocab_size: int) -> None:
        self._arguments = [
            *(sys.executable, "-m", "baton.services.gateway.constraint_check"),
            *("--model", str(model_dir), "--vocab-size", str(vocab_size)),
        ]
        self._known: OrderedDict[bytes, error_details_pb2.Failure | None] = OrderedDict()
        self._free: asyncio.LifoQueue[_Child] = asyncio.LifoQueue()
        self._children = [_Child(self._arguments) for _ in range(_NUM_PROCESSES)]
        for child in self._children:
            self._free.put_nowait(child)

    async def check(self, constraint: types_pb2.Constraint) -> None:
        """Raises InvalidField, naming field and place; NoTokenizer."""
        message = constraint.SerializeToString(deterministic=True)
        if message not in self._known:
            child = await self._free.get()
            try:
                error = await child.ask(message, constraint.WhichOneof("kind") or "")
            finally:
                self._free.put_nowait(child)
            self._known[message] = None if error is None else to_failure(error)
            while len(self._known) > _MAX_KNOWN:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(message)
        failure = self._known[message]
        if failure is not None:
            raise from_failure(failure)

    async def close(self) -> None:
        for child in self._children:
            await child.end()


class _Child:
    def __init__(self, arguments: list[str]) -> None:
        self._arguments = arguments
        self._process: Process | None = None

    async def ask(self, message: bytes, kind: str) -> BatonError | None:
        """What is wrong with it, if anything. Raises EngineFailure."""
        try:
            if self._process is None:
                error = await self._start()
                if error is not None:
                    return error
            async with asyncio.timeout(_ANSWER_S):
                await self._send(message)
                return await self._receive()
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError) as error:
            is_slow = isinstance(error, TimeoutError)
            status = await self.end()
            return _exhausted(f"constraint.{kind}", is_slow or status == -signal.SIGXCPU)
        except BaseException:
            # Whoever asks next must not get this answer.
            await self.end()
            raise

    async def end(self) -> int | None:
        """The status that it ended with; None: there was none."""
        process, self._process = self._process, None
        if process is None:
            return None
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        return await process.wait()

    async def _start(self) -> BatonError | None:
        self._process = await asyncio.create_subprocess_exec(
            *self._arguments, stdin=PIPE, stdout=PIPE, stderr=DEVNULL
        )
        try:
            async with asyncio.timeout(_START_S):
                error = await self._receive()
        except (asyncio.IncompleteReadError, TimeoutError):
            raise EngineFailure(
                "constraints cannot be compiled: no process for it starts"
            ) from None
        if error is not None:
            await self.end()
        return error

    async def _send(self, message: bytes) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(LENGTH.pack(len(message)) + message)
        await self._process.stdin.drain()

    async def _receive(self) -> BatonError | None:
        assert self._process is not None and self._process.stdout is not None
        stdout = self._process.stdout
        (length,) = LENGTH.unpack(await stdout.readexactly(LENGTH.size))
        if not length:
            return None
        return from_failure(error_details_pb2.Failure.FromString(await stdout.readexactly(length)))


def _exhausted(field: str, is_slow: bool) -> InvalidField:
    if is_slow:
        return InvalidField(field, "takes too long to compile", limit=f"{CPU_S} s")
    limit = f"{MEMORY_BYTES >> 20} MiB"
    # Or its compiler failed, which looks the same from here.
    return InvalidField(field, "cannot be compiled in the memory that it may take", limit=limit)
