"""Where time goes, kernel by kernel; of prompts by graphs, and launched one by one."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.measured_engine import without_prompt_graphs
from benchmarks.in_process import InProcessEngine

_CASES = ((64, 0), (512, 0), (64, 8192))
"""(new tokens, cached ones)."""
_NAME_LENGTH = 72


def profile_prompts(engine: InProcessEngine) -> str:
    """A table for each case."""
    return "\n\n".join(table for case in _CASES for table in _tables(engine, *case)) + "\n"


def _tables(engine: InProcessEngine, num_new: int, num_cached: int) -> Iterator[str]:
    prefix = engine.cached_prompts(1, num_cached)[0] if num_cached else []

    def run() -> None:
        if prefix:
            engine.prefill_behind(prefix, num_new)
        else:
            engine.prefill(1, num_new)

    behind = f" behind {num_cached:,} cached" if num_cached else ""
    run()
    yield table(f"{num_new} tokens{behind}, by graphs", run)
    with without_prompt_graphs(engine.runner):
        run()
        yield table(f"{num_new} tokens{behind}, launched kernel by kernel", run)


def table(title: str, run: Callable[[], None]) -> str:
    """Of what `run` does, which was done once before."""
    started_s = time.perf_counter()
    run()
    wall_ms = (time.perf_counter() - started_s) * 1e3
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(list)
    first_us, end_us = float("inf"), 0.0
    for event in profiler.events() or ():
        own: Any = event
        if str(own.device_type).endswith("CUDA"):
            found[own.name].append(own.time_range.elapsed_us())
            first_us = min(first_us, own.time_range.start)
            end_us = max(end_us, own.time_range.end)
    busy_ms = sum(map(sum, found.values())) / 1e3
    span_ms = (end_us - first_us) / 1e3 if found else 0.0
    lines = [
        f"{title}: {wall_ms:.2f} ms; under the profiler the GPU was busy for {busy_ms:.2f} of "
        f"{span_ms:.2f} ms",
        f"{'ms':>8} {'share':>6} {'count':>6} {'us each':>8}  kernel",
    ]
    for name, times in sorted(found.items(), key=lambda each: -sum(each[1])):
        own_ms = sum(times) / 1e3
        lines.append(
            f"{own_ms:>8.3f} {own_ms / busy_ms:>6.1%} {len(times):>6} "
            f"{own_ms * 1e3 / len(times):>8.1f}  {name[:_NAME_LENGTH]}"
        )
    return "\n".join(lines)
