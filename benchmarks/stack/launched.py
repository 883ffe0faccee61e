"""The launcher's stack as a benchmark's subject: a GPU and flags for each worker, what processes
use, and a loud end when one dies that nobody killed."""

from __future__ import annotations

import asyncio
import os
import sys
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from baton.services.launcher.private_dir import private_dir, shared_memory_root
from baton.services.launcher.role_process import Misconfigured, RoleProcess
from baton.services.launcher.roles import GATEWAY, RoleSpec, StackConfig
from baton.services.launcher.stack import Stack
from benchmarks.checkout import set_import_path

_NUM_KEPT_LINES = 400
_POLL_S = 0.1

# The role becomes another program, in the same process: the launcher's hold on it remains.
_ON_GPU = (
    "import os, sys; os.environ['CUDA_VISIBLE_DEVICES'] = sys.argv[1]; "
    "os.execv(sys.executable, [sys.executable, '-P', *sys.argv[2:]])"
)


class StackFailed(Exception):
    """The stack did not start, or a process of it died; the roles' last lines are in it."""


@dataclass(frozen=True)
class StackOptions:
    """What a benchmark asks of its stack, beside the launcher's own configuration.

    `gpus`: indices by worker, in the order prefill, decode, both; taken in turn.
    `role_flags`: more flags for the workers of a role, or for `gateway`.
    """

    config: StackConfig
    gpus: tuple[str, ...] = ()
    role_flags: dict[str, tuple[str, ...]] = field(default_factory=dict)
    start_limit_s: float = 300.0
    log: Path | None = None
    """Where the roles' lines go; else only the last ones are kept, for errors."""


class BenchmarkStack(Stack):
    def __init__(self, options: StackOptions, shm_dir: Path) -> None:
        super().__init__(options.config, shm_dir, emit=self._keep, notice=self._on_notice)
        self.deaths: list[str] = []
        """What the launcher said of roles that ended and were not told to."""
        self.address = ""
        self._options = options
        self._lines: deque[str] = deque(maxlen=_NUM_KEPT_LINES)

    async def start(self) -> str:
        """The gateway's address, once every worker serves. Raises StackFailed."""
        limit_s = self._options.start_limit_s
        ready = asyncio.ensure_future(super().start())
        try:
            async with asyncio.timeout(limit_s):
                while not ready.done() or not all(w.was_ready.is_set() for w in self.workers):
                    self.check()
                    await asyncio.wait([ready], timeout=_POLL_S)
                    if ready.done():
                        self.address = ready.result()
                        await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise StackFailed(self._told(f"the stack did not start in {limit_s:g} s")) from None
        except Misconfigured as error:
            raise StackFailed(self._told(str(error))) from None
        finally:
            ready.cancel()
        return self.address

    def check(self) -> None:
        """Raises StackFailed when a process has died."""
        if self.deaths:
            raise StackFailed(self._told(self.deaths[-1]))

    def _told(self, problem: str) -> str:
        return "\n".join([*self._lines, problem])

    def worker_address(self, worker_id: str) -> str | None:
        """None while it is not there."""
        return next((w.address for w in self.workers if w.spec.name == worker_id), None)

    def pids(self) -> dict[str, int]:
        """Worker id or `gateway` → its process, of those that run now."""
        names = {worker.spec.name: worker.spec.name for worker in self.workers}
        found = {}
        for command_path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                command = command_path.read_bytes().decode(errors="replace").split("\0")
                is_child = _parent(command_path.parent) == os.getpid()
            except OSError:
                continue
            if is_child and "baton.services.gateway" in command:
                found[GATEWAY] = int(command_path.parent.name)
            elif is_child and "--worker-id" in command:
                name = names.get(command[command.index("--worker-id") + 1])
                if name is not None:
                    found[name] = int(command_path.parent.name)
        return found

    def _add(self, spec: RoleSpec) -> RoleProcess:
        """The launcher's, with the flags of the role, and a GPU for a worker."""
        role = spec.name.rpartition("-")[0] or spec.name
        argv = (*spec.argv, *self._options.role_flags.get(role, ()))
        if self._options.gpus and role != GATEWAY:
            gpu = self._options.gpus[len(self.workers) % len(self._options.gpus)]
            argv = ("-c", _ON_GPU, gpu, *argv)
        return super()._add(replace(spec, argv=argv))

    def _keep(self, line: str) -> None:
        self._lines.append(line)
        if self._options.log is not None:
            with self._options.log.open("a") as log:
                log.write(line + "\n")

    def _on_notice(self, line: str) -> None:
        self._keep(f"launcher: {line}")
        print(f"  {line}", file=sys.stderr, flush=True)
        if "starting it again" in line:
            self.deaths.append(line)


@asynccontextmanager
async def running(options: StackOptions) -> AsyncIterator[BenchmarkStack]:
    """A stack that serves; nothing of it is left afterwards. Raises StackFailed."""
    set_import_path()
    with private_dir(shared_memory_root()) as shm_dir:
        stack = BenchmarkStack(options, shm_dir)
        try:
            await stack.start()
            yield stack
        finally:
            await stack.stop()


def private_mib(pid: int) -> float:
    """Memory of a process in RAM, without files and without what it shares; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024


def cpu_s(pid: int) -> float:
    """CPU time that a process has used; 0 when it is gone."""
    try:
        fields = _stat(Path(f"/proc/{pid}"))
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _parent(process: Path) -> int:
    return int(_stat(process)[1])


def _stat(process: Path) -> Sequence[str]:
    """Fields of /proc/PID/stat from the state on: 1 is the parent, 11 and 12 the CPU time."""
    return (process / "stat").read_text().rpartition(")")[2].split()
