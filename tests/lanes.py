"""Three lanes of tests side by side, each in its own process: `pytest -n 3`, for two cores.

Two start whole stacks, and wait for them most of the time; the third does what waits too. What
computes is left for the end: kernels in Triton's interpreter, engines, workers. Of these, whichever
lane is through takes the next file, so that no core is idle while another lane has much left. They
step back wherever somebody else wants a core, and take one thread, so that they disturb no stack.
Without `-n` all run one after the other.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

_STACKS = ("tests/e2e/", "tests/http/")
_FAULTS = "tests/faults/"
_COMPUTING = ("tests/kernels/", "tests/unit/engine/", "tests/unit/kv/", "tests/unit/worker/")
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
            return nodeid.partition("::")[0] if nodeid.startswith(_COMPUTING) else "the rest"

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
