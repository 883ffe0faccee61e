"""Three lanes of tests side by side, each in its own process: `pytest -n 3`, for two cores.

Two start whole stacks, and wait for them most of the time. The third does what waits too, then what
computes: kernels in Triton's interpreter, engines, workers. That steps back wherever somebody else
wants a core, and takes one thread, so that it disturbs no stack. Whichever lane is through first
takes engines or workers next. Without `-n` all run one after the other.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

_STACKS = ("tests/e2e/", "tests/http/")
_FAULTS = "tests/faults/"
_ENGINES = "tests/unit/engine/"
_WORKERS = ("tests/unit/kv/", "tests/unit/worker/")
_COMPUTING = ("tests/kernels/", _ENGINES, *_WORKERS)
_NICE = 5


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Lanes(LoadScopeScheduling):  # type: ignore[misc]
        """What is of one scope runs in one process."""

        def _split_scope(self, nodeid: str) -> str:
            if nodeid.startswith(_STACKS):
                return "stacks"
            if nodeid.startswith(_FAULTS):
                return "faults"
            if nodeid.startswith(_ENGINES):
                return "engines"
            return "workers" if nodeid.startswith(_WORKERS) else "the rest"

    # Scopes begin in the order of their first tests, not the one with most tests first.
    config.option.loadscopereorder = False
    return Lanes(config, log)


def computing_last(items: list[pytest.Item]) -> None:
    """In place; otherwise in the order in which they were."""
    items.sort(key=_is_computing)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ and _is_computing(item) and os.nice(0) < _NICE:
        os.nice(_NICE)
        torch.set_num_threads(1)


def _is_computing(item: pytest.Item) -> bool:
    return item.nodeid.startswith(_COMPUTING)
