"""One role over all its restarts.

STARTING ── its READY line ──> SERVING
   │  └─────────── exit ───────────┤
   │                          BACKING_OFF ── pause ──> STARTING
   └── exit 2, or the third exit, stack never ready ──> Misconfigured, NeverReady
any ── stop() ──> SIGTERM ── exit, or limit and SIGKILL ──> gone
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from baton.services.launcher.policy import (
    Verdict,
    describe_exit,
    failures_in_a_row,
    judge_exit,
    pause_s,
)
from baton.services.launcher.role_log import RoleLog
from baton.services.launcher.roles import RoleSpec
from baton.shared.engine.host_memory import host_memory, num_oom_kills
from baton.shared.rpc.serve import LAUNCHER_PID_VARIABLE

_READY = re.compile(r"READY( \w+=\S+)+")
_LONGEST_LINE_BYTES = 1 << 20
_CHILD = Path(__file__).with_name("child.py")

Notice = Callable[[str], None]


class Misconfigured(Exception):
    """A role cannot start as it is configured; the message is the role's own line."""


class NeverReady(Exception):
    """A role died again and again before the stack was ready; the message says how, and why."""


class RoleProcess:
    def __init__(
        self,
        spec: RoleSpec,
        *,
        log: RoleLog,
        notice: Notice,
        stack_was_ready: Callable[[], bool],
    ) -> None:
        # Read at every start: a restarted gateway must listen where the first one did.
        self.spec = spec
        self.address: str | None = None
        self.addresses: dict[str, str] = {}
        """From the last READY line: `grpc`, and whatever else the role serves."""
        self.was_ready = asyncio.Event()
        self._log = log
        self._notice = notice
        self._stack_was_ready = stack_was_ready
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()
        self._stop_signal = signal.SIGTERM
        # Ends when the role is gone for good; raises Misconfigured, NeverReady.
        self.task = asyncio.create_task(self._run(), name=spec.name)

    async def stop(self, limit_s: float) -> None:
        """SIGTERM, and SIGKILL after `limit_s`; returns when the role is gone."""
        self._stopping.set()
        self._signal_process()
        await asyncio.wait([self.task], timeout=limit_s)
        if not self.task.done():
            self._notice(f"{self.spec.name} did not stop within {limit_s:g} s; killing it")
            self.kill()
        await asyncio.gather(self.task, return_exceptions=True)

    def kill(self) -> None:
        self._stop_signal = signal.SIGKILL
        self._stopping.set()
        self._signal_process()

    async def _run(self) -> None:
        num_failures = num_exits = 0
        while not self._stopping.is_set():
            started, num_oom_kills_before = time.monotonic(), num_oom_kills()
            returncode = await self._run_once()
            num_exits += 1
            was_out_of_memory = num_oom_kills() > num_oom_kills_before
            exit_words = describe_exit(
                returncode, memory_limit=host_memory().limit if was_out_of_memory else None
            )
            verdict = judge_exit(
                returncode,
                num_exits=num_exits,
                stack_was_ready=self._stack_was_ready(),
                draining=self._stopping.is_set(),
            )
            match verdict:
                case Verdict.GONE:
                    self._log.release()
                    if returncode not in (0, -self._stop_signal):
                        self._notice(f"{self.spec.name} {exit_words}")
                case Verdict.MISCONFIGURED:
                    raise Misconfigured(self._log.take_last_line() or f"{self.spec.name} gave up")
                case Verdict.HOPELESS:
                    last_line = self._log.take_last_line()
                    raise NeverReady(
                        f"{self.spec.name} {exit_words}, the third time before all was ready"
                        + (f"; its last line: {last_line}" if last_line else "")
                    )
                case Verdict.RESTART:
                    self._log.release()
                    num_failures = failures_in_a_row(num_failures, time.monotonic() - started)
                    await self._back_off(exit_words, pause_s(num_failures))

    async def _run_once(self) -> int:
        self._process = process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-I", "-S", str(_CHILD), str(os.getpid())),
            # -P: modules must not come from the working directory, which is the user's.
            *(sys.executable, "-P", *self.spec.argv),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_LONGEST_LINE_BYTES,
            # A session of its own: Ctrl-C in the terminal reaches the launcher only, which then
            # stops the roles in their order.
            start_new_session=True,
            env={**os.environ, LAUNCHER_PID_VARIABLE: str(os.getpid()), "PYTHONUNBUFFERED": "1"},
        )
        if self._stopping.is_set():
            self._signal_process()
        assert process.stdout is not None and process.stderr is not None
        await asyncio.gather(
            self._read(process.stdout, self._on_stdout),
            self._read(process.stderr, self._log.write),
        )
        returncode = await process.wait()
        self.address = self._process = None
        return returncode

    async def _read(self, stream: asyncio.StreamReader, on_line: Callable[[str], None]) -> None:
        while True:
            try:
                line = await stream.readline()
            except ValueError:
                on_line("(a line that is too long was left out)")
                continue
            if not line:
                return
            on_line(line.decode(errors="replace").rstrip("\r\n"))

    def _on_stdout(self, line: str) -> None:
        ready = _READY.fullmatch(line)
        if ready is None:
            self._log.write(line)
            return
        self.addresses = dict(part.split("=", 1) for part in line.split()[1:])
        self.address = self.addresses.get("grpc")
        self._log.release()
        also = "".join(
            f", {what} at {where}" for what, where in self.addresses.items() if what != "grpc"
        )
        self._notice(f"{self.spec.name} ready at {self.address}{also}")
        self.was_ready.set()

    async def _back_off(self, exit_words: str, delay_s: float) -> None:
        self._notice(f"{self.spec.name} {exit_words}; starting it again in {delay_s:g} s")
        self._log.hold()
        try:
            await asyncio.wait_for(self._stopping.wait(), delay_s)
        except TimeoutError:
            return

    def _signal_process(self) -> None:
        if self._process is None or self._process.returncode is not None:
            return
        # Process.send_signal would poll, and for a process that it reaps asyncio reports code 255.
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, self._stop_signal)
