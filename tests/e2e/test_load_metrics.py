"""What the roles tell Prometheus agrees with what the load test measured from outside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from baton.loadtest.__main__ import main
from tests.e2e.harness import Stack

pytestmark = pytest.mark.e2e

NAMES = ("gateway", "p0", "d0")
NUM_REQUESTS = 12


@pytest.fixture
def stack(demo_stack: Stack) -> Stack:
    return demo_stack


def measured(stack: Stack, directory: Path, scheme: str, *flags: str) -> dict[str, Any]:
    """The report of one load."""
    address = stack.processes["gateway"].addresses[scheme]
    argv = ["--target", f"{scheme}://{address}", "--output", str(directory), *flags]
    argv += ["--streams", "3", "--requests", str(NUM_REQUESTS)]
    argv += ["--prompt-tokens", "uniform:40:90", "--output-tokens", "uniform:2:12"]
    assert main([*argv, "--prefixes", "2", "--prefix-tokens", "32"]) == 0
    (run,) = json.loads((directory / "report.json").read_text())["runs"]
    assert run["num_ok"] == NUM_REQUESTS and not run["metrics"]["problems"]
    assert isinstance(run, dict)
    return run


def all_metrics(stack: Stack) -> tuple[str, str]:
    addresses = [stack.processes[name].addresses["metrics"] for name in NAMES]
    return "--metrics", ",".join(f"http://{address}/metrics" for address in addresses)


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_counts_are_equal_and_times_no_longer(stack: Stack, tmp_path: Path, scheme: str) -> None:
    run = measured(stack, tmp_path, scheme, *all_metrics(stack))
    figures = run["metrics"]["figures"]
    for name in ("answered", "not answered", "prompt tokens", "output tokens", "cached tokens"):
        assert figures[name]["metrics"] == figures[name]["clients"], name
    assert figures["answered"]["metrics"] == NUM_REQUESTS
    assert figures["output tokens"]["metrics"] == run["num_output_tokens"] > NUM_REQUESTS
    assert figures["cached tokens"]["metrics"] > 0
    for name in ("TTFT mean ms", "E2E mean ms"):
        assert 0 < figures[name]["metrics"] <= figures[name]["clients"], name
    assert figures["TPOT mean ms"]["metrics"] > 0 and figures["ITL mean ms"]["metrics"] > 0
    if scheme == "grpc":
        # Both were told by the worker that pulled.
        handoff = figures["hand-off mean ms"]
        assert handoff["metrics"] == pytest.approx(handoff["clients"], abs=0.01)


def test_a_target_that_speaks_http_is_looked_at_without_being_asked_for(
    stack: Stack, tmp_path: Path
) -> None:
    figures = measured(stack, tmp_path, "http")["metrics"]["figures"]
    assert figures["answered"]["metrics"] == NUM_REQUESTS
    assert "cached tokens" not in figures, "workers know them"


def test_requests_that_were_given_up_were_not_answered(
    stack: Stack, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = stack.processes["gateway"].address
    argv = ["--target", f"grpc://{address}", *all_metrics(stack), "--output", str(tmp_path)]
    argv += ["--prompt-tokens", "40", "--output-tokens", "3000", "--requests", "2"]
    assert main([*argv, "--streams", "2", "--timeout", "0.5"]) == 1
    assert "2 x TIMEOUT" in capsys.readouterr().out
    (run,) = json.loads((tmp_path / "report.json").read_text())["runs"]
    figures = run["metrics"]["figures"]
    assert (figures["answered"]["metrics"], figures["not answered"]["metrics"]) == (0, 2)
    stack.assert_idle()
