"""Whether a machine is quiet enough to measure on."""

from __future__ import annotations

import os
import time
from pathlib import Path


class OtherLoad:
    """How many cores processes that are not ours kept busy since the last look."""

    def __init__(self) -> None:
        self._last = self._look()

    def cores(self) -> float:
        now = self._look()
        elapsed_s, busy_s = (a - b for a, b in zip(now, self._last, strict=True))
        self._last = now
        return max(0.0, busy_s / elapsed_s)

    def _look(self) -> tuple[float, float]:
        """Seconds on the clock, and seconds of CPU that others have used."""
        ticks_per_s = os.sysconf("SC_CLK_TCK")
        fields = [int(field) for field in Path("/proc/stat").read_text().split()[1:9]]
        idle = fields[3] + fields[4]
        return time.monotonic(), (sum(fields) - idle) / ticks_per_s - _our_cpu_s(ticks_per_s)


def _our_cpu_s(ticks_per_s: int) -> float:
    """Of this process and its living descendants, children that have ended included."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        pid = int(path.parent.name)
        parents[pid], ticks[pid] = int(fields[1]), sum(map(int, fields[11:15]))
    ours = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return sum(ticks[pid] for pid in ours) / ticks_per_s
