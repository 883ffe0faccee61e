"""Which tests run where: those marked `gpu` are left out, and counted, unless BATON_TEST_DEVICE is
cuda. Those marked `exact` are for the CPU; `make test-gpu` leaves them out by name.

Where there is no GPU, kernels run in Triton's interpreter.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from tests.device import DEVICE, ON_GPU, ROOT
from tests.e2e.harness import Stack
from tests.lanes import computing_last
from tests.lanes import pytest_runtest_setup as pytest_runtest_setup
from tests.lanes import pytest_xdist_make_scheduler as pytest_xdist_make_scheduler

if not torch.cuda.is_available():
    # Read whenever a kernel is defined: by then it must be set, whichever test is first to import
    # one. A kernel is interpreted with all that it calls, or not at all.
    os.environ["TRITON_INTERPRET"] = "1"

# Hundreds of processes are started: the first compiles the code, the others find it compiled.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


# How long an example takes says nothing on a busy machine. What decides whether a change may land
# tries the same examples every time; whoever works here, others.
hypothesis.settings.register_profile(
    "baton",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    derandomize="CI" in os.environ,
    print_blob=True,
)
hypothesis.settings.load_profile("baton")


def pytest_configure() -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # As in a script's background, and it would be in all that is started here.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if ON_GPU and not torch.cuda.is_available():
        raise pytest.UsageError("BATON_TEST_DEVICE=cuda, but torch finds no CUDA device")


def pytest_report_header() -> str:
    left_out = "" if ON_GPU else "; tests marked gpu are deselected"
    return f"engines compute on: {DEVICE} (BATON_TEST_DEVICE){left_out}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    computing_last(items)
    if ON_GPU:
        return
    left_out = [item for item in items if item.get_closest_marker("gpu") is not None]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item.get_closest_marker("gpu") is None]


@pytest.fixture(scope="session")
def demo_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The demo model, with a prefill worker, a decode worker, both doors and all metrics; for tests
    that leave it as they found it."""
    workers = {"p0": "prefill", "d0": "decode"}
    ports = {"BATON_METRICS_PORT": "0", "BATON_HTTP_PORT": "0"}
    with Stack(
        ROOT / "models/demo",
        tmp_path_factory.mktemp("demo"),
        workers,
        environments=dict.fromkeys(("gateway", *workers), ports),
    ) as stack:
        yield stack
