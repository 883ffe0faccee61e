"""How much memory this process may still take: of the machine, and of its control groups.

A group bounds all processes in it and in the groups below, so every group from the process's own
up to the root counts, as far as it can be seen from here; what the kernel can drop at once (pages
of files) is free, pages of shared memory are not. Both versions of control groups are read, also
where a machine has both.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PROC = Path("/proc")
# Version 1 says "no limit" by a number that no machine has.
_NO_LIMIT = 1 << 60
_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class HostMemory:
    """One bound on the memory of this process."""

    free_bytes: int
    """What may still be taken; never negative."""
    total_bytes: int
    setter: str
    """What sets the bound: `the machine`, or the file of a control group."""

    def __str__(self) -> str:
        return f"{format_bytes(self.free_bytes)} free of {self.limit}"

    @property
    def limit(self) -> str:
        return f"{format_bytes(self.total_bytes)} ({self.setter})"


def host_memory(proc: Path = PROC) -> HostMemory:
    """The bound that leaves the least."""
    return min(_bounds(proc), key=lambda bound: bound.free_bytes)


def own_bytes(proc: Path = PROC) -> int:
    """What this process alone has taken: its anonymous memory."""
    return _numbers(proc / "self" / "status").get("RssAnon:", 0) * 1024


def num_oom_kills(proc: Path = PROC) -> int:
    """How many processes of this process's control group, or of the machine where there is none,
    the kernel has killed for want of memory; to be compared with an earlier number."""
    for version, group in _groups(proc):
        events = _numbers(group / ("memory.events" if version == 2 else "memory.oom_control"))
        if "oom_kill" in events:
            return events["oom_kill"]
    return _numbers(proc / "vmstat").get("oom_kill", 0)


def format_bytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def _bounds(proc: Path) -> Iterator[HostMemory]:
    yield _machine(proc)
    for version, group in _groups(proc):
        if version == 2:
            # Above memory.high processes are not killed, but hardly run any more.
            limits = [(name, _number(group / name)) for name in ("memory.max", "memory.high")]
            used = _number(group / "memory.current")
        else:
            # The second one is the least of the groups above, which a container does not see.
            stat = _numbers(group / "memory.stat")
            name = "memory.limit_in_bytes"
            above = stat.get("hierarchical_memory_limit")
            limits = [(name, _number(group / name)), (name, above)]
            used = _number(group / "memory.usage_in_bytes")
        if used is None:
            continue
        taken = max(0, used - _droppable_bytes(group, version))
        for name, limit in limits:
            if limit is not None and limit < _NO_LIMIT:
                yield HostMemory(max(0, limit - taken), limit, str(group / name))


def _machine(proc: Path) -> HostMemory:
    meminfo = _numbers(proc / "meminfo")
    if "MemAvailable:" in meminfo:
        free, total = meminfo["MemAvailable:"] * 1024, meminfo["MemTotal:"] * 1024
    else:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        free = total // 2
    return HostMemory(free, total, "the machine")


def _droppable_bytes(group: Path, version: int) -> int:
    """Pages of files; shared memory is on the kernel's other list."""
    stat = _numbers(group / "memory.stat")
    prefix = "" if version == 2 else "total_"
    return stat.get(f"{prefix}inactive_file", 0) + stat.get(f"{prefix}active_file", 0)


def _groups(proc: Path) -> Iterator[tuple[int, Path]]:
    """(version, directory) of this process's groups of memory, its own first, up to the root."""
    mounts = dict(_mounts(proc))
    for line in _lines(proc / "self" / "cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        version = 2 if number == "0" and not controllers else 1
        if version not in mounts or (version == 1 and "memory" not in controllers.split(",")):
            continue
        root, mount_point = mounts[version]
        group = mount_point
        # Where the path is not below what is mounted, that is all there is to see.
        with contextlib.suppress(ValueError):
            below = PurePosixPath(path).relative_to(root)
            if ".." not in below.parts:
                group = mount_point / below
        yield version, group
        while group != mount_point:
            group = group.parent
            yield version, group


def _mounts(proc: Path) -> Iterator[tuple[int, tuple[str, Path]]]:
    """(version, (path of the group that is mounted, where))."""
    for line in _lines(proc / "self" / "mountinfo"):
        fields, _, about = line.partition(" - ")
        root, mount_point = (_unescaped(field) for field in fields.split()[3:5])
        kind, _, options = about.partition(" ")
        if kind == "cgroup2":
            yield 2, (root, Path(mount_point))
        elif kind == "cgroup" and "memory" in options.split()[-1].split(","):
            yield 1, (root, Path(mount_point))


def _unescaped(field: str) -> str:
    return _ESCAPE.sub(lambda found: chr(int(found[1], 8)), field)


def _numbers(path: Path) -> dict[str, int]:
    """The lines `name number …` of a file."""
    words = (line.split() for line in _lines(path))
    return {w[0]: int(w[1]) for w in words if len(w) >= 2 and w[1].isdecimal()}


def _number(path: Path) -> int | None:
    """None where there is no such file, or no number in it: `max` means no limit."""
    for line in _lines(path):
        return int(line) if line.isdecimal() else None
    return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
