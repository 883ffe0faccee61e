"""What graphs take is told, whatever else the allocator keeps."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from baton.shared.engine.graphs import Graphs


def test_what_was_kept_for_launched_steps_is_not_taken_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A capture begins with giving it back."""
    reserved = {"cached": 300, "graphs": 0}

    def capture(graph: Any, **_: Any) -> Any:
        reserved["cached"] = 0
        return nullcontext()

    fakes = {
        "memory_reserved": lambda _: sum(reserved.values()),
        "empty_cache": lambda: reserved.update(cached=0),
        "CUDAGraph": lambda: SimpleNamespace(pool=lambda: 1),
        "graph": capture,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    stream: Any = SimpleNamespace(device="cuda:0", synchronize=lambda: None)
    graphs = Graphs(stream)
    for _ in range(2):
        reserved["cached"] = 300
        graphs.capture(lambda: reserved.update(graphs=100))
    assert graphs.num_bytes == 100
