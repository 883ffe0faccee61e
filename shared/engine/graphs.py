"""CUDA graphs that share their memory: what was launched once is launched again by one call."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

_KEPT_FREE_BYTES = 2**28
"""Of the device, for what libraries take when they like."""


class Graph(Protocol):
    def replay(self) -> None: ...


class _Pieces:
    """Graphs that are one: the device begins with the first while the others are launched."""

    def __init__(self, graphs: Sequence[Graph]) -> None:
        self._graphs = graphs

    def replay(self) -> None:
        for graph in self._graphs:
            graph.replay()


class Graphs:
    """Captures on the stream of the steps. Graphs lie in each other's memory: of two that are
    replayed one after another, the second may have what the first has left, and nobody else."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._pool: Any = None
        self._capturing: Any = None
        self._pieces: list[torch.cuda.CUDAGraph] = []
        """Of the graph that is being captured, but for its last."""
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
        self._pieces = []
        self._capturing = torch.cuda.graph(
            torch.cuda.CUDAGraph(), pool=self._pool, stream=self._stream
        )
        try:
            with _nothing_collected(), self._capturing:
                launch()
            *pieces, last = [*self._pieces, self._capturing.cuda_graph]
        finally:
            self._capturing = None
        if self._pool is None:
            self._pool = last.pool()
        self.num_bytes += torch.cuda.memory_reserved(self._stream.device) - before
        return _Pieces([*pieces, last]) if pieces else last

    def cut(self) -> None:
        """Within a launch that is being captured: what follows is launched while the device does
        what came before. To launch a graph of a whole model takes as long as some layers."""
        if self._capturing is None:
            return
        done = self._capturing.cuda_graph
        done.capture_end()
        self._pieces.append(done)
        self._pool = done.pool()
        self._capturing.cuda_graph = torch.cuda.CUDAGraph()
        self._capturing.cuda_graph.capture_begin(pool=self._pool)

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


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Graphs in garbage, of an executor that is gone, would end a capture by their end."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
