"""Times of GPU work in replayed CUDA graphs."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

CACHE_BYTES = 200 * 2**20
"""Data sets used in turn must be larger together: more than three times the L2 cache."""


Call = Callable[[int], object]
"""Takes the number of a data set."""


@dataclass
class Point:
    """`call(i)` works on data set i of num_sets."""

    shape: str
    call: Call
    num_bytes: float
    flop: float = 0.0
    num_sets: int = 1
    library: dict[str, Call] = field(default_factory=dict)
    """By name; those that fail are left out, the fastest counts."""
    note: str = ""


def num_sets_for(num_bytes: float) -> int:
    """How many data sets of so many bytes one must cycle over so that no cache helps."""
    return max(1, min(64, -(-CACHE_BYTES // max(1, int(num_bytes)))))


def time_us(call: Call, num_sets: int, *, replays: int = 5) -> float:
    """Microseconds per call of `call(i)`, where i counts data sets, in a replayed CUDA graph.

    The gaps between kernels of a graph are part of it, as they are in an engine.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(min(2, num_sets)):
            call(i)
        rough_us = elapsed_us(lambda: call(0))
        # A few milliseconds a graph, every data set equally often.
        rounds = max(1, round(min(30, max(6, 4000 / rough_us)) / num_sets))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(rounds * num_sets):
                call(i % num_sets)
        graph.replay()
        times_us = [elapsed_us(graph.replay) for _ in range(replays)]
    torch.cuda.current_stream().wait_stream(stream)
    return statistics.median(times_us) / (rounds * num_sets)


def elapsed_us(call: Callable[[], object]) -> float:
    """Of what it launches on the current stream."""
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3
