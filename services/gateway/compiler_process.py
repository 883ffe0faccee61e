"""A process that compiles constraints (constraint_check.py), as the gateway sees it: started when
there is something to compile, and anew where it ended."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import struct
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
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


class CompilerProcess:
    def __init__(self, model_dir: Path, vocab_size: int) -> None:
        self._arguments = [
            *(sys.executable, "-m", "baton.services.gateway.constraint_check"),
            *("--model", str(model_dir), "--vocab-size", str(vocab_size)),
        ]
        self._process: Process | None = None
        self._is_fresh = True
        """It has compiled nothing yet."""

    async def ask(self, message: bytes, kind: str) -> BatonError | None:
        """What is wrong with the constraint, if anything. Raises EngineFailure and Overloaded,
        which say nothing about it."""
        while True:
            try:
                if self._process is None:
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
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await process.wait()

    async def _ended(self) -> int:
        """The status of a process that has closed its output. It ends by itself: a signal now
        could hide how."""
        process = self._process
        assert process is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_S):
                await process.wait()
        await self.end()
        return await process.wait()

    async def _start(self) -> BatonError | None:
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._arguments, stdin=PIPE, stdout=PIPE, stderr=DEVNULL
            )
            async with asyncio.timeout(_START_S):
                error = await self._receive()
        except (asyncio.IncompleteReadError, OSError):  # TimeoutError is one
            raise EngineFailure(
                "constraints cannot be compiled: no process for it starts"
            ) from None
        self._is_fresh = True
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


def _verdict(status: int, field: str) -> InvalidField:
    """On what ended a process that had compiled nothing before. Raises Overloaded where it was not
    the constraint."""
    if status in [-number for number in _FROM_OUTSIDE]:
        raise Overloaded("the process that compiled the constraint was ended: try later")
    # Or its compiler failed, which looks the same from here.
    limit = f"{MEMORY_BYTES >> 20} MiB"
    return InvalidField(field, "cannot be compiled in the memory that it may take", limit=limit)
