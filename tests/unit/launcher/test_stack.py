"""What `baton up` does with its processes, shown with roles that compute nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.launched import descendants, is_alive

_ROOT = Path(__file__).parents[3]
_PATIENCE_S = 60.0


class Launcher:
    def __init__(
        self, tmp_path: Path, exits: dict[str, int], *, stderr_to: int | None = None
    ) -> None:
        self.journal = tmp_path / "journal"
        self.journal.touch()
        self.stdout_path, self.stderr_path = tmp_path / "stdout", tmp_path / "stderr"
        with self.stdout_path.open("wb") as stdout, self.stderr_path.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.unit.launcher.fake_stack", str(self.journal)],
                cwd=_ROOT,
                env={
                    **os.environ,
                    "PYTHONPATH": str(_ROOT),
                    "FAKE_ROLE_EXITS": json.dumps(exits),
                    # What it leaves behind must be seen, and not be another test's.
                    "TMPDIR": str(tmp_path),
                },
                stdout=stdout,
                stderr=stderr if stderr_to is None else stderr_to,
            )

    @property
    def stdout(self) -> str:
        return self.stdout_path.read_text()

    @property
    def stderr(self) -> str:
        return self.stderr_path.read_text()

    def started(self, name: str) -> list[tuple[int, str]]:
        """(pid, address) of each start of the role."""
        found = re.findall(rf"^{name} started (\d+) (\S+)$", self.journal.read_text(), re.MULTILINE)
        return [(int(pid), address) for pid, address in found]

    def wait_started(self, name: str, *, num_times: int = 1) -> None:
        wait_for(lambda: len(self.started(name)) >= num_times)
        assert len(self.started(name)) == num_times

    def wait_ready(self) -> str:
        wait_for(lambda: "READY" in self.stdout or self.process.poll() is not None)
        ready = re.fullmatch(r"READY grpc=(\S+)\n", self.stdout)
        assert ready is not None, self.stderr
        return ready[1]

    def wait_exit(self) -> int:
        return self.process.wait(_PATIENCE_S)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + _PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launcher]]:
    launchers = []

    def start(**exits: int) -> Launcher:
        launchers.append(
            Launcher(tmp_path, {name.replace("_", "-"): n for name, n in exits.items()})
        )
        return launchers[-1]

    yield start
    for launcher in launchers:
        if launcher.process.poll() is None:
            launcher.process.kill()
            launcher.process.wait()


def test_ready_is_said_once_and_sigterm_stops_gateway_then_workers(
    launch: Callable[..., Launcher], tmp_path: Path
) -> None:
    launcher = launch()
    address = launcher.wait_ready()
    assert launcher.started("gateway")[0][1] == address
    launcher.wait_started("prefill-0")
    launcher.wait_started("decode-0")
    pids = descendants(launcher.process.pid)
    assert len(pids) == 4  # two workers, the gateway, Valkey

    launcher.process.send_signal(signal.SIGTERM)

    assert launcher.wait_exit() == 0
    stops = [line for line in launcher.journal.read_text().splitlines() if "told to stop" in line]
    assert stops[0] == "gateway told to stop"
    assert sorted(stops[1:]) == ["decode-0 told to stop", "prefill-0 told to stop"]
    assert launcher.stdout == f"READY grpc={address}\n"
    assert "[prefill-0] chatter of prefill-0" in launcher.stderr
    assert not any(is_alive(pid) for pid in pids)
    assert list(tmp_path.glob("baton-*")) == []


def test_nothing_outlives_a_launcher_that_is_killed(launch: Callable[..., Launcher]) -> None:
    launcher = launch()
    launcher.wait_ready()
    pids = descendants(launcher.process.pid)
    assert len(pids) == 4

    launcher.process.kill()
    launcher.process.wait()

    wait_for(lambda: not any(is_alive(pid) for pid in pids))


def test_roles_that_die_are_reported_and_started_again(launch: Callable[..., Launcher]) -> None:
    launcher = launch()
    address = launcher.wait_ready()
    for name in ("decode-0", "gateway"):
        launcher.wait_started(name)
        os.kill(launcher.started(name)[0][0], signal.SIGKILL)

    launcher.wait_started("decode-0", num_times=2)
    launcher.wait_started("gateway", num_times=2)

    assert launcher.started("gateway")[1][1] == address
    launcher.wait_started("prefill-0")
    assert "decode-0 was killed by SIGKILL; starting it again in 0.2 s" in launcher.stderr
    launcher.process.send_signal(signal.SIGINT)
    assert launcher.wait_exit() == 0
    assert launcher.stdout == f"READY grpc={address}\n"


def test_a_role_that_cannot_be_configured_ends_everything_in_one_line(
    launch: Callable[..., Launcher],
) -> None:
    launcher = launch(prefill_0=2, decode_0=2)

    assert launcher.wait_exit() == 2
    assert re.fullmatch(r"broken.safetensors: truncated \(said \S+\)\n", launcher.stderr)
    assert launcher.stdout == ""
    assert launcher.started("gateway") == []


def test_a_role_that_never_gets_ready_ends_everything_with_its_last_line(
    launch: Callable[..., Launcher],
) -> None:
    launcher = launch(prefill_0=1, decode_0=1)

    assert launcher.wait_exit() == 1
    *_, last = launcher.stderr.splitlines()
    assert re.fullmatch(
        r"baton: (\S+) exited with code 1, the third time before all was ready; its last line: "
        r"broken\.safetensors: truncated \(said \1\)",
        last,
    )
    assert launcher.stdout == ""


def test_who_reads_its_log_may_go_away(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    launcher = Launcher(tmp_path, {}, stderr_to=writer)
    os.close(writer)
    os.close(reader)
    launcher.wait_ready()
    launcher.wait_started("decode-0")
    os.kill(launcher.started("decode-0")[0][0], signal.SIGKILL)
    launcher.wait_started("decode-0", num_times=2)
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.wait_exit() == 0


def test_a_second_signal_kills(launch: Callable[..., Launcher]) -> None:
    launcher = launch()
    launcher.wait_ready()
    [(gateway, _)] = launcher.started("gateway")
    # A gateway that is stopped does not drain.
    os.kill(gateway, signal.SIGSTOP)
    launcher.process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        launcher.process.wait(0.5)

    launcher.process.send_signal(signal.SIGTERM)

    assert launcher.wait_exit() == 128 + signal.SIGTERM
    assert not is_alive(gateway)
