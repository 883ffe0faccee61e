"""A process that compiles constraints (constraint_check.py), as the gateway sees it: started when
there is something to compile, and anew where it ended."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from baton.shared.rpc.errors import (
    BatonError,
    EngineFailure,
    InvalidField,
    Overloaded,
    from_failure,
)
from baton.v1 import error_details_pb2

LENGTH = struct.Struct("<I")
"""Before each message to and from a process."""
CPU_S = 1
"""Of one constraint; the kernel counts whole seconds, so it may be one more."""
MEMORY_BYTES = 512 << 20
"""That all constraints of a process may add to it."""
_START_S = 120.0
_END_S = 5.0
_ANSWER_S = 30.0
"""Of the clock on the wall, on a machine that does much else."""
_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""By which a process ends that did nothing wrong: where the machine has no memory left, say."""


@dataclass(frozen=True)
class _Child:
    """A process, and the socket that is its input and output."""

    process: subprocess.Popen[bytes]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def start(cls, arguments: Sequence[str]) -> _Child:
        """Not as event loops start one: uvloop's forks, and gRPC's handlers of a fork, which have
        threads to start again, may end the child before it is another program. subprocess has no
        handlers run. Raises OSError."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                end = theirs.fileno()
                process = subprocess.Popen(
                    arguments, stdin=end, stdout=end, stderr=subprocess.DEVNULL
                )
            ours.setblocking(False)
            reader, writer = await asyncio.open_connection(sock=ours)
        except BaseException:
            # A process of which this is the input ends by itself.
            ours.close()
            raise
        return cls(process, reader, writer)

    async def wait(self) -> int:
        return await asyncio.to_thread(self.process.wait)

    async def end(self) -> None:
        self.process.kill()
        self.writer.close()
        await self.wait()


class CompilerProcess:
    def __init__(self, model_dir: Path, vocab_size: int) -> None:
        self._arguments = [
            *(sys.executable, "-m", "baton.services.gateway.constraint_check"),
            *("--model", str(model_dir), "--vocab-size", str(vocab_size)),
        ]
        self._child: _Child | None = None
        self._is_fresh = True
        """It has compiled nothing yet."""

    async def ask(self, message: bytes, kind: str) -> BatonError | None:
        """What is wrong with the constraint, if anything. Raises EngineFailure and Overloaded,
        which say nothing about it."""
        while True:
            try:
                if self._child is None:
                    error = await self._start()
                    if error is not None:
                        return error
                was_fresh, self._is_fresh = self._is_fresh, False
                async with asyncio.timeout(_ANSWER_S):
                    await self._send(message)
                    return await self._receive()
            except (asyncio.IncompleteReadError, ConnectionError):
                status = await self._ended()
                if status == -signal.SIGXCPU:
                    # It is counted for each constraint.
                    limit = f"{CPU_S} s"
                    return InvalidField(
                        f"constraint.{kind}", "takes too long to compile", limit=limit
                    )
                if was_fresh:
                    return _verdict(status, f"constraint.{kind}")
                # It may be that what came before had left too little memory.
            except TimeoutError:
                await self.end()
                raise Overloaded(
                    f"the constraint was not compiled within {_ANSWER_S:.0f} s: try later"
                ) from None
            except BaseException:
                # Whoever asks next must not get this answer.
                await self.end()
                raise

    async def end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            await child.end()

    async def _ended(self) -> int:
        """The status of a process that has closed its output. It ends by itself: a signal now
        could hide how."""
        child = self._child
        assert child is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_S):
                await child.wait()
        await self.end()
        return await child.wait()

    async def _start(self) -> BatonError | None:
        try:
            self._child = await _Child.start(self._arguments)
            async with asyncio.timeout(_START_S):
                error = await self._receive()
        except (asyncio.IncompleteReadError, OSError):  # TimeoutError is one
            await self.end()
            raise EngineFailure(
                "constraints cannot be compiled: no process for it starts"
            ) from None
        self._is_fresh = True
        if error is not None:
            await self.end()
        return error

    async def _send(self, message: bytes) -> None:
        assert self._child is not None
        self._child.writer.write(LENGTH.pack(len(message)) + message)
        await self._child.writer.drain()

    async def _receive(self) -> BatonError | None:
        assert self._child is not None
        reader = self._child.reader
        (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
        if not length:
            return None
        return from_failure(error_details_pb2.Failure.FromString(await reader.readexactly(length)))


def _verdict(status: int, field: str) -> InvalidField:
    """On what ended a process that had compiled nothing before. Raises Overloaded where it was not
    the constraint."""
    if status in [-number for number in _FROM_OUTSIDE]:
        raise Overloaded("the process that compiled the constraint was ended: try later")
    # Or its compiler failed, which looks the same from here.
    limit = f"{MEMORY_BYTES >> 20} MiB"
    return InvalidField(field, "cannot be compiled in the memory that it may take", limit=limit)
