"""Workers forked from a process that has imported torch: that alone is 1.6 s of CPU of the 1.9 s
that a worker takes to start, and the suite starts hundreds.

What is forked is a process as any other: its own signals, files and death. Only its parent is
another one, so its exit status comes through a pipe.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import IO, Any, NoReturn

from tests.device import ON_GPU, ROOT, process_environment

_STATUS_BYTES = 4


class Forked:
    """What tests use of a `subprocess.Popen` whose standard output is a pipe."""

    def __init__(self, pid: int, status: int, stdout: IO[str]) -> None:
        """status: the pipe that its exit status comes through."""
        self.pid = pid
        self.stdout: IO[str] | None = stdout
        self.returncode: int | None = None
        self._status = status

    def poll(self) -> int | None:
        return self._returncode_within(0)

    def wait(self, timeout: float | None = None) -> int:
        """subprocess.TimeoutExpired: it runs on."""
        returncode = self._returncode_within(timeout)
        if returncode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _returncode_within(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            status = os.read(self._status, _STATUS_BYTES)
            os.close(self._status)
            assert status, f"nobody knows how process {self.pid} ended"
            self.returncode = os.waitstatus_to_exitcode(int.from_bytes(status, "little"))
        return self.returncode


def can_fork(command: Sequence[str], environment: dict[str, str]) -> bool:
    """`command`: after the interpreter. What is read when torch is imported must be as it is."""
    differences = environment.items() ^ process_environment().items()
    return not ON_GPU and command[0] == "-m" and all(n.startswith("BATON_") for n, _ in differences)


def fork(command: Sequence[str], environment: dict[str, str], stderr: IO[Any]) -> Forked:
    """`command`: -m MODULE ARGUMENTS..."""
    stdout_read, stdout_write = os.pipe()
    status_read, status_write = os.pipe()
    server, _ = _server()
    message = json.dumps({"command": list(command), "environment": environment}).encode()
    socket.send_fds(server, [message], [stdout_write, stderr.fileno(), status_write])
    os.close(stdout_write)
    os.close(status_write)
    pid = int.from_bytes(server.recv(_STATUS_BYTES), "little")
    return Forked(pid, status_read, os.fdopen(stdout_read))


@functools.cache
def _server() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Started by the first that asks; it ends when this process does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.e2e.forks", str(theirs.fileno())],
        cwd=ROOT,
        env=process_environment(),
        pass_fds=[theirs.fileno()],
    )
    theirs.close()
    return ours, process


def serve(requests: socket.socket) -> None:
    import baton.services.worker.worker  # noqa: F401  (with all that a worker imports)

    gc.freeze()
    # Whoever waits for a worker is waited for by nobody.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, fds, _, _ = socket.recv_fds(requests, 1 << 20, 3)
        if not message:
            return
        if os.fork() == 0:
            _start(json.loads(message), fds, requests)
        for fd in fds:
            os.close(fd)


def _start(request: dict[str, Any], fds: Sequence[int], requests: socket.socket) -> NoReturn:
    """In a process of its own, which waits for the worker."""
    stdout, stderr, status = fds
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    worker = os.fork()
    if worker == 0:
        os.close(status)
        requests.close()
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        os.close(stdout)
        os.close(stderr)
        _run(request["command"][1:], request["environment"])
    requests.send(worker.to_bytes(_STATUS_BYTES, "little"))
    requests.close()
    os.close(stdout)
    os.close(stderr)
    os.write(status, os.waitpid(worker, 0)[1].to_bytes(_STATUS_BYTES, "little"))
    os._exit(0)


def _run(arguments: list[str], environment: dict[str, str]) -> NoReturn:
    """As `python -m` runs a module; the interpreter then ends as it always does."""
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = list(arguments)
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    sys.exit()


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
