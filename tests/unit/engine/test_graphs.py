"""What graphs take is told, whatever else the allocator keeps; those that are cut are replayed
whole."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from baton.shared.engine.graphs import Graphs


class Gpu:
    """Of torch.cuda, what captures."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reserved = {"cached": 300, "graphs": 0}
        self.said: list[str] = []
        self.device = "cuda:0"
        self._num_graphs = 0
        fakes = {
            "memory_reserved": lambda _: sum(self.reserved.values()),
            "empty_cache": lambda: self.reserved.update(cached=0),
            "CUDAGraph": self._graph,
            "graph": Capture,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def synchronize(self) -> None:
        """As of a stream."""

    def _graph(self) -> FakeGraph:
        self._num_graphs += 1
        return FakeGraph(self, self._num_graphs)


class FakeGraph:
    def __init__(self, gpu: Gpu, number: int) -> None:
        self._gpu, self._number = gpu, number

    def capture_begin(self, pool: Any = None) -> None:
        self._gpu.said.append(f"begin {self._number} in {pool}")

    def capture_end(self) -> None:
        self._gpu.said.append(f"end {self._number}")

    def pool(self) -> str:
        return "pool"

    def replay(self) -> None:
        self._gpu.said.append(f"replay {self._number}")


class Capture:
    """As torch.cuda.graph."""

    def __init__(self, cuda_graph: FakeGraph, *, pool: Any, stream: Any) -> None:
        self.cuda_graph, self._pool, self._gpu = cuda_graph, pool, stream

    def __enter__(self) -> None:
        self._gpu.reserved["cached"] = 0
        self.cuda_graph.capture_begin(self._pool)

    def __exit__(self, *_: object) -> None:
        self.cuda_graph.capture_end()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


def test_what_was_kept_for_launched_steps_is_not_taken_off(gpu: Gpu) -> None:
    """A capture begins with giving it back."""
    graphs = Graphs(gpu)  # type: ignore[arg-type]
    for _ in range(2):
        gpu.reserved["cached"] = 300
        graphs.capture(lambda: gpu.reserved.update(graphs=100))
    assert graphs.num_bytes == 100


def test_a_graph_that_is_cut_is_replayed_piece_by_piece(gpu: Gpu) -> None:
    """Out of a capture nothing is cut. Pieces, and later graphs, share the first one's memory."""
    graphs = Graphs(gpu)  # type: ignore[arg-type]

    def launch() -> None:
        for number in range(2):
            gpu.said.append(f"kernel {number}")
            graphs.cut()

    launch()
    assert gpu.said == ["kernel 0", "kernel 1"]
    gpu.said.clear()
    cut = graphs.capture(launch)
    whole = graphs.capture(lambda: gpu.said.append("other kernel"))
    assert gpu.said == [
        *("begin 1 in None", "kernel 0", "end 1"),
        *("begin 2 in pool", "kernel 1", "end 2"),
        *("begin 3 in pool", "end 3"),
        *("begin 4 in pool", "other kernel", "end 4"),
    ]
    gpu.said.clear()
    whole.replay()
    cut.replay()
    assert gpu.said == ["replay 4", "replay 1", "replay 2", "replay 3"]


def test_nothing_is_collected_during_a_capture(gpu: Gpu) -> None:
    """Not even where it fails; then as before."""
    graphs = Graphs(gpu)  # type: ignore[arg-type]
    seen: list[bool] = []
    graphs.capture(lambda: seen.append(gc.isenabled()))
    assert (seen, gc.isenabled()) == ([False], True)

    def fail() -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        graphs.capture(fail)
    assert gc.isenabled()
