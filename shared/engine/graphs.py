"""CUDA graphs that share their memory: what was launched once is launched again by one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Graphs:
    """Captures on the stream of the steps. Graphs lie in each other's memory: of two that are
    replayed one after another, the second may have what the first has left, and nobody else."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._pool: Any = None

    def capture(self, launch: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """`launch` reads and writes fixed addresses only, and has been called before: its kernels
        are compiled.

        Raises:
            torch.OutOfMemoryError: there is no memory for what it computes meanwhile.
        """
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            launch()
        if self._pool is None:
            self._pool = graph.pool()
        return graph
