"""Memory that may still be taken, read from trees of files as the kernel lays them out."""

from __future__ import annotations

from pathlib import Path

import pytest

from baton.shared.engine.host_memory import host_memory, num_oom_kills, own_bytes

MIB = 2**20


class Machine:
    """/proc of a machine with 8 GiB free of 16, and groups of processes."""

    def __init__(self, root: Path) -> None:
        self.proc = root / "proc"
        self.groups = root / "cgroup fs"
        self._write(self.proc / "meminfo", "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n")
        self._write(self.proc / "self/status", "Name:\tx\nRssAnon:\t    2048 kB\n")
        self._write(self.proc / "vmstat", "pgfault 7\noom_kill 1\n")

    def is_in(self, *lines: str) -> None:
        self._write(self.proc / "self/cgroup", "".join(f"{line}\n" for line in lines))

    def mount(self, *mounts: tuple[str, Path, str]) -> None:
        """(path of the group that is mounted, where, kind and options)."""
        lines = [
            f"36 31 0:33 {root} {str(where).replace(' ', chr(92) + '040')} rw - {kind}"
            for root, where, kind in mounts
        ]
        self._write(self.proc / "self/mountinfo", "".join(f"{line}\n" for line in lines))

    def group_v2(self, path: str, limit: str, used: int, *more: str, **stat: int) -> None:
        """`more`: memory.high."""
        group = self.groups / path
        self._write(group / "memory.max", f"{limit}\n")
        self._write(group / "memory.high", f"{[*more, 'max'][0]}\n")
        self._write(group / "memory.current", f"{used}\n")
        self._write(group / "memory.stat", "".join(f"{k} {v}\n" for k, v in stat.items()))
        self._write(group / "memory.events", "oom 9\noom_kill 4\n")

    def group_v1(self, path: str, limit: int, used: int, **stat: int) -> None:
        group = self.groups / path
        self._write(group / "memory.limit_in_bytes", f"{limit}\n")
        self._write(group / "memory.usage_in_bytes", f"{used}\n")
        self._write(group / "memory.stat", "".join(f"{k} {v}\n" for k, v in stat.items()))
        self._write(group / "memory.oom_control", "oom_kill_disable 0\noom_kill 5\n")

    @staticmethod
    def _write(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def v2(machine: Machine, root: str = "/") -> tuple[str, Path, str]:
    return (root, machine.groups, "cgroup2 cgroup2 rw,nsdelegate")


def v1(machine: Machine, root: str = "/") -> tuple[str, Path, str]:
    return (root, machine.groups, "cgroup cgroup rw,memory")


def test_without_groups_the_machine_is_the_bound(machine: Machine) -> None:
    memory = host_memory(machine.proc)
    assert (memory.free_bytes, memory.total_bytes) == (8192 * MIB, 16384 * MIB)
    assert str(memory) == "8.00 GiB free of 16.00 GiB (the machine)"
    assert own_bytes(machine.proc) == 2 * MIB
    assert num_oom_kills(machine.proc) == 1


def test_version_2_counts_files_as_free_and_shared_memory_as_taken(machine: Machine) -> None:
    machine.is_in("0::/pod/worker")
    machine.mount(v2(machine))
    files = {"inactive_file": 100 * MIB, "active_file": 20 * MIB, "file": 200 * MIB}
    machine.group_v2("pod/worker", str(800 * MIB), 300 * MIB, **files)
    machine.group_v2("pod", "max", 300 * MIB)
    memory = host_memory(machine.proc)
    assert (memory.free_bytes, memory.total_bytes) == (620 * MIB, 800 * MIB)
    assert memory.setter == str(machine.groups / "pod/worker/memory.max")
    assert num_oom_kills(machine.proc) == 4


def test_the_tightest_of_the_groups_above_counts(machine: Machine) -> None:
    machine.is_in("0::/slice/pod/worker")
    machine.mount(v2(machine))
    machine.group_v2("slice/pod/worker", str(800 * MIB), 300 * MIB)
    machine.group_v2("slice/pod", str(900 * MIB), 850 * MIB)
    machine.group_v2("slice", "max", 2000 * MIB, str(1 << 40))
    memory = host_memory(machine.proc)
    assert (memory.free_bytes, memory.total_bytes) == (50 * MIB, 900 * MIB)


def test_throttling_is_a_limit(machine: Machine) -> None:
    machine.is_in("0::/x")
    machine.mount(v2(machine))
    machine.group_v2("x", str(800 * MIB), 300 * MIB, str(400 * MIB))
    assert host_memory(machine.proc).free_bytes == 100 * MIB


def test_more_in_use_than_allowed_leaves_nothing(machine: Machine) -> None:
    machine.is_in("0::/x")
    machine.mount(v2(machine))
    machine.group_v2("x", str(200 * MIB), 300 * MIB)
    assert host_memory(machine.proc).free_bytes == 0


def test_version_1_beside_a_version_2_without_memory(machine: Machine) -> None:
    machine.is_in("9:name=systemd:/", "4:cpu,memory:/docker/ab:c", "0::/")
    machine.mount(
        v1(machine), ("/", machine.groups / "unified", "cgroup2 cgroup2 rw"), v1_of_cpu(machine)
    )
    machine.group_v1("docker/ab:c", 800 * MIB, 300 * MIB, total_inactive_file=40 * MIB)
    machine.group_v1("docker", 1 << 62, 900 * MIB)
    memory = host_memory(machine.proc)
    assert (memory.free_bytes, memory.total_bytes) == (540 * MIB, 800 * MIB)
    assert num_oom_kills(machine.proc) == 5


def v1_of_cpu(machine: Machine) -> tuple[str, Path, str]:
    return ("/", machine.groups / "cpu", "cgroup cgroup rw,cpu")


@pytest.mark.parametrize("root", ["/docker/abc", "/elsewhere"])
def test_a_container_sees_its_own_group_only(root: str, machine: Machine) -> None:
    """Without a namespace of its own the path is the host's; what is mounted is the container's."""
    machine.is_in("4:memory:/docker/abc")
    machine.mount(v1(machine, root))
    machine.group_v1(".", 1 << 62, 300 * MIB, hierarchical_memory_limit=700 * MIB)
    memory = host_memory(machine.proc)
    assert (memory.free_bytes, memory.total_bytes) == (400 * MIB, 700 * MIB)


def test_a_path_above_the_namespace(machine: Machine) -> None:
    machine.is_in("0::/../other")
    machine.mount(v2(machine))
    machine.group_v2("../other", str(10 * MIB), 0)
    assert host_memory(machine.proc).total_bytes == 16384 * MIB


def test_unlimited_groups_change_nothing(machine: Machine) -> None:
    machine.is_in("0::/", "4:memory:/")
    machine.mount(v1(machine))
    machine.group_v1(".", 9223372036854771712, 300 * MIB)
    assert host_memory(machine.proc).setter == "the machine"
