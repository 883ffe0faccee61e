"""Which tests run where: those marked `gpu` are left out, and counted, unless BATON_TEST_DEVICE is
cuda. Those marked `exact` are for the CPU; `make test-gpu` leaves them out by name.

Where there is no GPU, kernels run in Triton's interpreter.
"""

from __future__ import annotations

import os

import pytest
import torch

from tests.device import DEVICE, ON_GPU
from tests.lanes import pytest_runtest_setup as pytest_runtest_setup
from tests.lanes import pytest_xdist_make_scheduler as pytest_xdist_make_scheduler

if not torch.cuda.is_available():
    # Read whenever a kernel is defined: by then it must be set, whichever test is first to import
    # one. A kernel is interpreted with all that it calls, or not at all.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure() -> None:
    if ON_GPU and not torch.cuda.is_available():
        raise pytest.UsageError("BATON_TEST_DEVICE=cuda, but torch finds no CUDA device")


def pytest_report_header() -> str:
    left_out = "" if ON_GPU else "; tests marked gpu are deselected"
    return f"engines compute on: {DEVICE} (BATON_TEST_DEVICE){left_out}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if ON_GPU:
        return
    left_out = [item for item in items if item.get_closest_marker("gpu") is not None]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item.get_closest_marker("gpu") is None]
