"""The report, and the command as a whole: tables, files, exit codes."""

from __future__ import annotations

import asyncio
import csv
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import pytest
import uvloop

from baton.loadtest import environment
from baton.loadtest.__main__ import main
from baton.loadtest.null_server import start_http
from baton.loadtest.report import Report, Run
from baton.loadtest.samples import Offered, Sample, summarise
from baton.loadtest.svg import Mark, Series, chart, cumulative, ticks
from baton.services.launcher import __main__ as launcher
from tests.device import ROOT, process_environment


def sample(at_s: float, **changes: object) -> Sample:
    fields = {
        "at_s": at_s,
        "ttft_s": 0.2,
        "e2e_s": 0.5,
        "num_tokens": 4,
        "num_messages": 4,
        "gaps_s": [0.1, 0.1, 0.1],
        "status": "OK",
        "transfer_s": 0.004,
    }
    return Sample(**(fields | changes))  # type: ignore[arg-type]


def report_of(*rates: float) -> Report:
    samples = [sample(0.0), sample(1.0), sample(2.0, status="HTTP 429", ttft_s=None, e2e_s=None)]
    summary = summarise(Offered(samples, 0.1), [(1.0, 0.2)])
    runs = [Run(f"poisson {rate:g}/s", rate, summary, samples) for rate in rates]
    return Report("Load <on> it", {"model": "a&b"}, runs, ("3 prompts capped",))


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    """A null server in a thread of its own, for commands that have their own event loop."""
    ready, found = threading.Event(), SimpleNamespace()

    async def serve() -> None:
        server, found.target = await start_http()
        found.loop, found.stop = asyncio.get_running_loop(), asyncio.Event()
        ready.set()
        await found.stop.wait()
        server.close()

    thread = threading.Thread(target=lambda: uvloop.run(serve()))
    thread.start()
    ready.wait()
    yield found.target
    found.loop.call_soon_threadsafe(found.stop.set)
    thread.join()


def test_the_page_needs_nothing_but_itself() -> None:
    page = report_of(1.0, 2.0).html()
    assert not re.search(r"https?://|<script|<link|<img|@import|url\(", page)
    assert "Load &lt;on&gt; it" in page and "a&amp;b" in page
    for figure in ("Goodput against rate", "TTFT", "TPOT", "ITL", "E2E", "hand-off", "Timeline"):
        assert figure in page
    # Goodput and its latency, six distributions, four timelines for each run.
    assert page.count("<svg") == 2 + 6 + 2 * 4
    assert "3 prompts capped" in page and "requests without an answer" in page
    assert "Goodput against rate" not in report_of(1.0).html()


def test_table_json_and_csv_agree(tmp_path: Path) -> None:
    report = report_of(4.0)
    assert re.search(r"TTFT +200\.0 +200\.0 +200\.0 +200\.0", report.text())
    assert "1 x HTTP 429: " in report.text()
    paths = report.write(tmp_path / "new")
    assert [path.name for path in paths] == ["report.json", "requests.csv", "report.html"]
    (run,) = json.loads(paths[0].read_text())["runs"]
    assert run["rate"] == 4.0 and run["ttft_ms"]["p50"] == 200.0 and run["num_refused"] == 1
    rows = list(csv.DictReader(paths[1].read_text().splitlines()))
    assert [row["status"] for row in rows] == ["OK", "OK", "HTTP 429"]
    assert float(rows[0]["tpot_s"]) == pytest.approx(0.1) and rows[2]["ttft_s"] == ""


def test_charts() -> None:
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.13, 0.31) == pytest.approx([0.15, 0.2, 0.25, 0.3])
    assert ticks(3, 3) == [3]
    assert cumulative([3.0, 1.0, 2.0, 4.0])[0] == (1.0, 25.0)
    assert cumulative(list(range(10_000)))[-1] == (9999, 100.0)
    assert len(cumulative(list(range(10_000)))) <= 161
    drawn = chart("T", [Series("a<b", [(1, 2), (2, 1)])], x_label="x", y_label="y")
    assert drawn.count("<circle") == 2 and "a&lt;b" in drawn and "<polyline" in drawn
    marked = chart(
        "T", [Series("a", [(0, 1)])], x_label="x", y_label="y", marks=[Mark(0.5, "here")]
    )
    assert "here" in marked
    nothing = chart("T", [Series("a", [(float("nan"), 1)])], x_label="x", y_label="y")
    assert "nothing to draw" in nothing


def test_a_load_test_from_end_to_end(
    target: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BATON_TARGET", target)
    # The generators are of this tree, wherever the command is given.
    monkeypatch.chdir(tmp_path)
    argv = ["load", "--rate", "50,100", "--duration", "0.2", "--clients", "2"]
    argv += ["--prompt-tokens", "8", "--output-tokens", "3", "--output", "."]
    assert launcher.main(argv) == 0
    out = capsys.readouterr().out
    assert "poisson 50/s" in out and "poisson 100/s" in out and "goodput" in out
    # That server has none; the load test goes on.
    assert out.count(f"no figures of the metrics: {target}/metrics answers 404") == 2
    runs = json.loads((tmp_path / "report.json").read_text())["runs"]
    assert [run["rate"] for run in runs] == [50.0, 100.0]
    for run in runs:
        assert run["num_ok"] == run["num_requests"] > 0
        assert run["num_output_tokens"] == 3 * run["num_requests"]


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--target", "grpc://127.0.0.1:1"], "nobody answers"),
        (["--target", "http://127.0.0.1:1"], "nobody answers"),
        (["--target", "carrier-pigeon://x"], "must be grpc://HOST:PORT"),
        (["--rate", "0"], "--rate: more than 0"),
        (["--rate", "nan"], "--rate: more than 0"),
        (["--rate", "fast"], "--rate fast"),
        (["--rate", "1e12"], "at most 1,000,000"),
        (["--trace", "/nowhere/trace.jsonl"], "No such file"),
        (["--trace", "/dev/null"], "the file is empty"),
        (["--trace", "x", "--rate", "3"], "--trace has its own arrivals"),
        (["--prompt-tokens", "many"], "--prompt-tokens many"),
        (["--window", "5:1"], "--window 5:1"),
        (["--slo", "1"], "--slo 1"),
        (["--streams", "few"], "argument --streams: 'few' is no whole number"),
        (["--streams", "2", "--rate", "3"], "--streams is a closed loop"),
        (["--clients", "0"], "--clients"),
        (["--metrics", "gopher://x"], "--metrics gopher://x: must be http://"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(
    argv: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(argv)
    except SystemExit as error:
        code = int(str(error.code))
    told = capsys.readouterr().err
    assert code == 2 and problem in told and told.count("\n") == 1


def test_what_the_model_cannot_take_is_said_before(
    target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--target", target, "--model", "gpt-9"]) == 2
    assert "serves null" in capsys.readouterr().err
    assert main(["--target", target, "--prompt-tokens", "2000000", "--requests", "1"]) == 2
    told = capsys.readouterr().err
    assert "--prompt-tokens" in told and "--max-prompt" not in told and "--turns" not in told
    assert main(["--target", target, "--prompt-tokens", "999999", "--turns", "2"]) == 2
    assert "--turns" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_said_before(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        assert main(["--target", target, "--output", str(output), "--duration", "3600"]) == 2
        out, err = capsys.readouterr()
        assert f"--output {output}: " in err and err.count("\n") == 1 and not out


def test_what_is_not_installed_has_no_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the image: no transformers there, nor git, nor a checkout."""
    everything = environment.describe_environment()
    assert {"baton-llm", "grpcio", "torch", "transformers"} <= set(everything)

    def missing(package: str) -> str:
        if package in ("torch", "transformers", "numpy"):
            raise PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(environment, "version", missing)
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "baton/loadtest/environment.py"))
    monkeypatch.setenv("PATH", "")
    found = environment.describe_environment()
    assert {"baton-llm", "grpcio", "cpu", "cores", "python"} <= set(found)
    assert not {"torch", "transformers", "numpy", "gpu", "commit"} & set(found)


def test_an_interrupt_ends_it_and_its_generators(target: str) -> None:
    command = [sys.executable, "-m", "baton.services.launcher", "load", "--target", target]
    process = subprocess.Popen(
        [*command, "--duration", "60", "--warm-up", "0"],
        env=process_environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (generators := children.read_text().split()):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130 and told == "interrupted\n"
    assert not [pid for pid in generators if Path(f"/proc/{pid}").exists()]
