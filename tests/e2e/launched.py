"""`baton` as users start it: a process, what it writes, and what it leaves behind."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.device import PATIENCE, ROOT, process_environment

_PATIENCE_S = 60.0 * PATIENCE
_ORPHANS_PATIENCE_S = 15.0
"""Half of what running answers get in a drain: nobody waits for those of a dead launcher."""


class Launched:
    """`python -m MODULE ARGUMENTS...`; its temporary files go to `tmp_path`."""

    def __init__(self, tmp_path: Path, module: str, *arguments: str) -> None:
        self.tmp_path = tmp_path
        self.stdout_path, self.stderr_path = tmp_path / "stdout", tmp_path / "stderr"
        self._pids: set[int] = set()
        self._shm_dirs: set[Path] = set()
        with self.stdout_path.open("wb") as stdout, self.stderr_path.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=ROOT,
                env=environment(tmp_path),
                stdout=stdout,
                stderr=stderr,
            )

    @property
    def stdout(self) -> str:
        return self.stdout_path.read_text()

    @property
    def stderr(self) -> str:
        return self.stderr_path.read_text()

    def wait_ready(self) -> str:
        """The address in the only line of standard output."""
        wait_for(lambda: "\n" in self.stdout or self.process.poll() is not None)
        ready = re.fullmatch(r"READY grpc=(127\.0\.0\.1:\d+)\n", self.stdout)
        assert ready is not None, self.stderr
        return ready[1]

    def wait_exit(self) -> int:
        """The exit code; what runs until then is remembered."""

        def has_ended() -> bool:
            self.pids()
            return self.process.poll() is not None

        wait_for(has_ended)
        return self.process.wait()

    def kill(self) -> None:
        """Of a launcher that is still there; its roles must follow by themselves."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def pids(self) -> dict[str, int]:
        """The launcher's processes now: worker id, `gateway` or `valkey` → pid."""
        roles: dict[str, int] = {}
        for pid in descendants(self.process.pid):
            command = _command(pid)
            self._pids.add(pid)
            if "--shm-dir" in command:
                self._shm_dirs.add(Path(command[command.index("--shm-dir") + 1]))
            if is_alive(pid) and (role := _role(command)):
                roles[role] = pid
        return roles

    def assert_nothing_left(self) -> None:
        """No process, and nothing in shared memory, of all that was seen."""
        wait_for(lambda: not any(map(is_alive, self._pids)), patience_s=_ORPHANS_PATIENCE_S)
        assert not any(path.exists() for path in self._shm_dirs)


def environment(tmp_path: Path) -> dict[str, str]:
    return process_environment(TMPDIR=str(tmp_path))


def ask(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a client command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "baton.services.launcher", *arguments],
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=_PATIENCE_S,
        check=False,
    )


def only_line(output: str) -> dict[str, Any]:
    """One JSON object on one line, and nothing else."""
    assert output.count("\n") == 1 and output.endswith("\n")
    parsed: dict[str, Any] = json.loads(output)
    return parsed


def wait_for(condition: Callable[[], bool], *, patience_s: float = _PATIENCE_S) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # gone before or while it is read
        return False


def descendants(pid: int) -> list[int]:
    children: list[int] = []
    # Threads and processes may end while they are listed.
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                children += map(int, (task / "children").read_text().split())
    return children + [grandchild for child in children for grandchild in descendants(child)]


def _command(pid: int) -> list[str]:
    """Empty for what is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []


def _role(command: list[str]) -> str:
    """Empty for what is not a role yet."""
    if "--worker-id" in command:
        return command[command.index("--worker-id") + 1]
    if "baton.services.gateway" in command:
        return "gateway"
    # It adds to its name where it listens.
    return "valkey" if any("-server" in part for part in command[:1]) else ""
