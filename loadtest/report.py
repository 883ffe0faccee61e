"""What a load showed: table, JSON, a CSV of requests, an HTML page. Pure but for `write`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from baton.loadtest import timeline
from baton.loadtest.metrics_check import MetricsCheck
from baton.loadtest.page import charts, facts, page, paragraphs, section, table, text_table
from baton.loadtest.samples import Sample, times_of, warnings
from baton.loadtest.spec import LoadError
from baton.loadtest.svg import Series, chart, cumulative

_MAX_DOTS = 1500
_TIMES = {
    "ttft_ms": "TTFT",
    "tpot_ms": "TPOT",
    "itl_ms": "ITL",
    "longest_gap_ms": "longest gap",
    "e2e_ms": "E2E",
    "transfer_ms": "hand-off",
}
_COLUMNS = ("mean", "p50", "p90", "p99")
MEANINGS = (
    "Times count from the planned arrival. TTFT: to the first token. TPOT: (E2E - TTFT) / (N - 1). "
    "ITL: each gap between two messages that brought tokens; how many tokens a message brought is "
    "in the table. E2E: to the last token. Goodput: requests per second that kept both limits; "
    "what was refused or failed keeps none. Times are of answers that came whole.",
)


@dataclass(frozen=True)
class Run:
    """One load and what it showed; `rate` is None where none was given."""

    label: str
    rate: float | None
    summary: dict[str, Any]
    samples: Sequence[Sample] = field(repr=False)
    metrics: MetricsCheck | None = None
    """What the target's own metrics say, where they were read."""


@dataclass(frozen=True)
class Report:
    title: str
    facts: dict[str, str]
    runs: list[Run]
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        return "\n\n".join(_block(run) for run in self.runs)

    def json(self) -> str:
        runs = [
            {"label": r.label, "rate": r.rate, **r.summary}
            | ({"metrics": r.metrics.as_dict()} if r.metrics else {})
            for r in self.runs
        ]
        result = {"title": self.title, "facts": self.facts, "notes": self.notes, "runs": runs}
        return json.dumps(result, indent=2) + "\n"

    def csv(self) -> str:
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("run", *_FIELDS))
        for run in self.runs:
            for sample in run.samples:
                row = (_csv_cell(getattr(sample, name)) for name in _FIELDS)
                writer.writerow((run.label, *row))
        return out.getvalue()

    def html(self) -> str:
        problems = [f"{run.label}: {line}" for run in self.runs for line in _warnings(run)]
        return page(
            self.title,
            paragraphs(problems, "warning"),
            paragraphs(self.notes),
            *(section(run.label, _html_tables(run)) for run in self.runs),
            _goodput(self.runs),
            section("Latencies", charts(*(_latency(name, self.runs) for name in _TIMES))),
            *(section(f"Timeline, {run.label}", _timeline(run)) for run in self.runs),
            section("What the figures mean", paragraphs(MEANINGS)),
            section("Of what", facts(self.facts)),
        )

    def write(self, directory: Path) -> list[Path]:
        """The files that were written. Raises OSError."""
        directory.mkdir(parents=True, exist_ok=True)
        made = {"report.json": self.json(), "requests.csv": self.csv(), "report.html": self.html()}
        for name, content in made.items():
            (directory / name).write_text(content)
        return [directory / name for name in made]


def check_writable(directory: Path) -> None:
    """Makes the folder and tries to write there, before a load is offered in vain. Raises
    LoadError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise LoadError(f"--output {directory}: {error.strerror}") from None


_FIELDS = (
    *("at_s", "late_s", "status", "detail", "ttft_s", "tpot_s", "e2e_s", "longest_gap_s"),
    *("num_prompt_tokens", "num_cached_tokens", "num_tokens", "num_messages"),
    *("transfer_s", "is_local", "num_attempts"),
)


def _block(run: Run) -> str:
    lines = [run.label, text_table(*_times_table(run)), text_table(*_counts_table(run))]
    slos = _slo_table(run)
    if slos[1]:
        lines.append(text_table(*slos))
    metrics = _metrics_table(run)
    if metrics[1]:
        lines.append(text_table(*metrics))
    lines += [f"WARNING: {line}" for line in _warnings(run)]
    problems = run.summary["problems"].items()
    return "\n".join([*lines, *(f"  {count} x {problem}" for problem, count in problems)])


def _times_table(run: Run) -> tuple[list[str], list[list[str]]]:
    rows = [
        [name, *(_number(run.summary[key][column]) for column in _COLUMNS)]
        for key, name in _TIMES.items()
        if run.summary[key]["mean"] is not None
    ]
    return ["ms", *_COLUMNS], rows


def _counts_table(run: Run) -> tuple[list[str], list[list[str]]]:
    s = run.summary
    pairs = {
        "ok": str(s["num_ok"]),
        "refused": str(s["num_refused"]),
        "failed": str(s["num_failed"]),
        "retried": str(s["num_retried"]),
        "requests/s": _number(s["requests_per_s"], 2),
        "output tokens/s": _number(s["output_tokens_per_s"]),
        "total tokens/s": _number(s["total_tokens_per_s"]),
        "tokens/message": _number(s["tokens_per_message"], 2),
        "cached": _percent(s["cached_share"]),
        "seconds": _number(s["elapsed_s"]),
    }
    return list(pairs), [list(pairs.values())]


def _slo_table(run: Run) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            f"TTFT <= {slo['ttft_s']:g} s, TPOT <= {1e3 * slo['tpot_s']:g} ms",
            _number(slo["goodput"], 2),
            _percent(slo["attained"]),
        ]
        for slo in run.summary["slo"]
    ]
    return ["limits", "goodput/s", "kept by"], rows


def _metrics_table(run: Run) -> tuple[list[str], list[list[str]]]:
    rows = []
    for digits, figures in enumerate(
        (run.metrics.counts, run.metrics.times) if run.metrics else ()
    ):
        for one in figures:
            measured = (_number(value, digits) for value in (one.clients, one.metrics))
            difference = one.difference_percent
            apart = "-" if difference is None else f"{difference:+.1f} %" if difference else "equal"
            rows.append([one.name, *measured, apart])
    return ["metrics", "clients saw", "metrics say", "apart"], rows


def _warnings(run: Run) -> list[str]:
    return warnings(run.summary) + list(run.metrics.problems if run.metrics else ())


def _html_tables(run: Run) -> str:
    made = [table(*_times_table(run)), table(*_counts_table(run))]
    slos = _slo_table(run)
    if slos[1]:
        made.append(table(*slos))
    metrics = _metrics_table(run)
    if metrics[1]:
        made.append(table(*metrics))
    statuses = {name: str(count) for name, count in run.summary["statuses"].items()}
    if set(statuses) - {"OK"}:
        made.append(facts(statuses | {k: str(v) for k, v in run.summary["problems"].items()}))
    return "".join(made)


def _latency(name: str, runs: Sequence[Run]) -> str:
    series = [
        Series(run.label, cumulative([1e3 * value for value in times_of(run.samples, name)]))
        for run in runs
    ]
    shown = [one for one in series if one.points]
    return chart(_TIMES[name], shown, x_label="ms", y_label="% of all, not above")


def _goodput(runs: Sequence[Run]) -> str:
    at_rates = sorted((run for run in runs if run.rate), key=lambda run: run.rate or 0.0)
    if len(at_rates) < 2 or not at_rates[0].summary["slo"]:
        return ""
    series = [Series("offered", [(run.rate or 0.0,) * 2 for run in at_rates], dashed=True)]
    for index, slo in enumerate(at_rates[0].summary["slo"]):
        points = [(run.rate or 0.0, run.summary["slo"][index]["goodput"]) for run in at_rates]
        series.append(Series(f"{slo['ttft_s']:g} s / {1e3 * slo['tpot_s']:g} ms", points))
    drawn = chart("Goodput", series, x_label="requests/s offered", y_label="requests/s kept")
    p99 = [
        Series(label, [(run.rate or 0.0, run.summary[key]["p99"] or 0.0) for run in at_rates])
        for key, label in (("ttft_ms", "TTFT p99"), ("itl_ms", "ITL p99"))
    ]
    latency = chart("Latency", p99, x_label="requests/s offered", y_label="ms")
    return section("Goodput against rate", charts(drawn, latency))


def _timeline(run: Run) -> str:
    samples = run.samples
    dots = [(s.at_s, 1e3 * s.ttft_s) for s in samples if s.ttft_s is not None]
    step = -(-len(dots) // _MAX_DOTS) or 1
    lost = [(s.at_s, 0.0) for s in samples if s.status != "OK"][:_MAX_DOTS]
    seen = [Series("TTFT", dots[::step], dots=True)]
    if lost:
        seen.append(Series("no answer", lost, dots=True, colour="#dc2626"))
    second = "seconds"
    return charts(
        chart("TTFT by arrival", seen, x_label=second, y_label="ms"),
        chart(
            "Output",
            [Series("tokens", timeline.tokens_per_s(samples))],
            x_label=second,
            y_label="tokens/s",
        ),
        chart(
            "Under way",
            [Series("in flight", timeline.in_flight(samples))],
            x_label=second,
            y_label="requests",
        ),
        chart(
            "Arrivals",
            [Series("arrivals", timeline.arrivals_per_s(samples))],
            x_label=second,
            y_label="requests/s",
        ),
    )


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def _csv_cell(value: Any) -> Any:
    return f"{value:.6f}" if isinstance(value, float) else value
