"""CUDA graphs that share their memory: what was launched once is launched again by one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

_KEPT_FREE_BYTES = 2**28
"""Of the device, for what libraries take when they like."""


class Graph(Protocol):
    def replay(self) -> None: ...


class Graphs:
    """Captures on the stream of the steps. Graphs lie in each other's memory: of two that are
    replayed one after another, the second may have what the first has left, and nobody else."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._pool: Any = None
        self.num_bytes = 0
        """That what they compute in takes, shared by all."""

    def capture(self, launch: Callable[[], None]) -> Graph:
        """`launch` reads and writes fixed addresses only, and has been called before: its kernels
        are compiled.

        Raises:
            torch.OutOfMemoryError: there is no memory for what it computes meanwhile.
        """
        self._stream.synchronize()
        # A capture begins with it: what is kept for launched steps is not what the graph takes.
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self._stream.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            launch()
        if self._pool is None:
            self._pool = graph.pool()
        self.num_bytes += torch.cuda.memory_reserved(self._stream.device) - before
        return graph

    def capture_if_room(self, launch: Callable[[], None]) -> Graph | None:
        """As `capture`, but launches it once before; None: there is no memory for it."""
        device = self._stream.device
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        try:
            launch()
        except torch.OutOfMemoryError:
            return None
        self._stream.synchronize()
        num_bytes = torch.cuda.max_memory_allocated(device) - before
        # What the launch took is kept for others like it: a graph has memory of its own.
        if num_bytes > self.num_bytes and num_bytes > self._free_bytes - _KEPT_FREE_BYTES:
            return None
        return self.capture(launch)

    @property
    def _free_bytes(self) -> int:
        free, _ = torch.cuda.mem_get_info(self._stream.device)
        return int(free)
