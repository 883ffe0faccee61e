"""A tool from outside beside our generator: a stand-in for it, and what the generator can drive."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from baton.loadtest.calibrate import capacity_of
from baton.loadtest.outside_tool import main
from baton.loadtest.samples import Offered, Sample
from tests.device import ROOT, process_environment
from tests.e2e.launched import is_alive, wait_for

GUIDELLM: dict[str, Any] = {
    "benchmarks": [
        {
            "metrics": {
                name: {"successful": {"mean": mean, "percentiles": {"p50": mean, "p99": mean}}}
                for name, mean in (
                    ("time_to_first_token_ms", 20.0),
                    ("inter_token_latency_ms", 21.0),
                    ("request_latency", 0.5),
                    ("requests_per_second", 8.0),
                    ("output_tokens_per_second", 24.0),
                )
            }
        }
    ]
}
AIPERF = {
    name: {"avg": mean, "p50": mean, "p99": mean}
    for name, mean in (
        ("time_to_first_token", 20.0),
        ("inter_token_latency", 21.0),
        ("request_latency", 500.0),
        ("request_throughput", 8.0),
        ("output_token_throughput", 24.0),
    )
}


@pytest.mark.parametrize(
    ("tool", "name", "answer"),
    [
        ("guidellm", "benchmarks.json", GUIDELLM),
        ("aiperf", "profile_export_aiperf.json", AIPERF),
    ],
)
def test_figures_of_both_stand_side_by_side(
    tool: str, name: str, answer: dict[str, Any], tmp_path: Path
) -> None:
    program = tmp_path / tool
    program.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, re, sys\n"
        "scratch = re.search(r'path=(\\S+)/|--artifact-dir (\\S+)', ' '.join(sys.argv))\n"
        f"path = pathlib.Path(scratch[1] or scratch[2]) / {name!r}\n"
        f"path.write_text({json.dumps(answer)!r})\n"
    )
    program.chmod(0o755)
    output = tmp_path / "result.json"
    argv = ["--tool", tool, "--bin", str(program), "--null", "1", "--requests", "4"]
    assert main([*argv, "--output-tokens", "3", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert set(result["runs"]) == {"ours", tool, "ours again"}
    theirs = result["runs"][tool]
    assert (theirs["ttft_ms mean"], theirs["e2e_ms p99"], theirs["requests/s"]) == (20, 500, 8)
    assert set(theirs) == set(result["runs"]["ours"])


def test_a_tool_that_fails_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--tool", "aiperf", "--bin", "/bin/false", "--null", "1", "--requests", "1"]
    assert main([*argv, "--output-tokens", "1"]) == 2
    assert "/bin/false" in capsys.readouterr().err
    assert main(["--tool", "aiperf", "--target", "http://127.0.0.1:1"]) == 2
    assert "nobody answers" in capsys.readouterr().err


def test_an_interrupt_ends_the_tool_and_what_it_started(tmp_path: Path) -> None:
    program, pid_path = tmp_path / "tool", tmp_path / "pids"
    program.write_text(
        f'#!/bin/sh\nsleep 600 &\necho "$$ $!" > {pid_path}.new\n'
        f"mv {pid_path}.new {pid_path}\nwait\n"
    )
    program.chmod(0o755)
    flags = ["--tool", "aiperf", "--bin", str(program), "--null", "1", "--requests", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "baton.loadtest.outside_tool", *flags, "--output-tokens", "1"],
        env=process_environment(),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not pid_path.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert (process.returncode, told) == (130, "interrupted\n")
    pids = [int(pid) for pid in pid_path.read_text().split()]
    # Whoever adopted them may take its time.
    wait_for(lambda: not any(is_alive(pid) for pid in pids))


def test_capacity_is_of_all_generators() -> None:
    def part(cpu_s: float) -> Offered:
        samples = [Sample(0.0, e2e_s=2.0, num_tokens=100, status="OK")] * 10
        return Offered(samples, client_cpu=0.5, client_cpu_s=cpu_s)

    found = capacity_of("http", 100, [part(0.01), part(0.03)])
    assert (found.requests_per_s, found.tokens_per_s, found.cpu) == (10.0, 1000.0, 1.0)
    assert found.cpu_us_per_token == pytest.approx(20)
    assert found.tokens_per_core_s == pytest.approx(50_000)
