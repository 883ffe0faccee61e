"""Where time goes, kernel by kernel; of prompts by graphs, and launched one by one.

Kernels of a decode step overlap: a kernel's duration has the wait for the one before in it. So of
each there is also what it adds, from the end of all before it to its own.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.measured_engine import Point, without_prompt_graphs
from benchmarks.in_process import InProcessEngine

_CASES = ((64, 0), (512, 0), (64, 8192))
"""(new tokens, cached ones)."""
_NAME_LENGTH = 72
_DECODE_STEPS = 24


def profile_decode(engine: InProcessEngine, point: Point) -> str:
    """A table of the kernels that each step has, those of one name and grid together."""
    prompts = engine.cached_prompts(point.batch, point.num_tokens)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        engine.decode_cached(prompts, _DECODE_STEPS)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    kernels = sorted((each for each in events if each.get("cat") == "kernel"), key=_start_us)
    return "\n".join([f"decode {point}, us in the median:", *_decode_lines(kernels)]) + "\n"


def _start_us(kernel: dict[str, Any]) -> float:
    return float(kernel["ts"])


def _decode_lines(kernels: list[dict[str, Any]]) -> Iterator[str]:
    added: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    durations: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    end_us = 0.0
    for kernel in kernels:
        how = kernel["args"]
        grid = "x".join(map(str, how["grid"]))
        key = (grid, how["shared memory"], how["registers per thread"], kernel["name"])
        own_end_us = kernel["ts"] + kernel["dur"]
        added[key].append(own_end_us - end_us)
        durations[key].append(kernel["dur"])
        end_us = max(end_us, own_end_us)
    yield "    adds duration a step  shared  regs         grid  kernel"
    total_us = 0.0
    for key, each in added.items():
        count = len(each) / _DECODE_STEPS
        # What a step has once or more; other kernels are of the prompts' last tokens.
        if count < 0.9:
            continue
        grid, shared, registers, name = key
        own_us = statistics.median(each)
        total_us += own_us * count
        yield (
            f"{own_us:>8.2f} {statistics.median(durations[key]):>8.2f} {count:>6.1f} {shared:>7} "
            f"{registers:>5} {grid:>12}  {str(name)[:_NAME_LENGTH]}"
        )
    yield f"{total_us:>8.0f} a step, under the profiler"


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
