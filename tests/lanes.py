"""Two lanes of tests side by side, each in its order, in a process of its own: `pytest -n 2`.

Whatever starts processes waits most of the time; kernels in Triton's interpreter, and engines, keep
a core busy. So that one does not disturb the other, `COMPUTING` steps back whenever a core is
wanted, and takes one thread. Without `-n` all run one after the other.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

STACKS, COMPUTING = "stacks", "computing"
_COMPUTING_FOLDERS = (
    "tests/kernels/",
    "tests/unit/engine/",
    "tests/unit/kv/",
    "tests/unit/worker/",
)
_NICE = 10


def lane_of(nodeid: str) -> str:
    return COMPUTING if nodeid.startswith(_COMPUTING_FOLDERS) else STACKS


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Lanes(LoadScopeScheduling):  # type: ignore[misc]
        """What is of one scope runs in one process."""

        def _split_scope(self, nodeid: str) -> str:
            return lane_of(nodeid)

    return Lanes(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    is_beside_another = "PYTEST_XDIST_WORKER" in os.environ
    if is_beside_another and lane_of(item.nodeid) == COMPUTING and os.nice(0) < _NICE:
        os.nice(_NICE)
        torch.set_num_threads(1)
