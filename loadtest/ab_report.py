"""Two arrangements side by side, and where they cross. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from baton.loadtest.page import (
    charts,
    coloured_table,
    page,
    paragraphs,
    section,
    table,
    text_table,
)
from baton.loadtest.page import facts as facts_table
from baton.loadtest.svg import Mark, Series, chart

Summary = dict[str, Any]
PD, BOTH = "prefill + decode", "both"
EQUAL = 0.05
"""Values that differ by no more than this share count as equal."""


@dataclass(frozen=True)
class Metric:
    name: str
    unit: str
    of: Callable[[Summary], float]
    """NaN where nothing was measured."""
    more_is_better: bool = False


def _time(name: str, percentile: str) -> Callable[[Summary], float]:
    return lambda summary: _known(summary[name][percentile])


def _known(value: float | None) -> float:
    return float("nan") if value is None else value


METRICS = (
    Metric("TTFT p90", "ms", _time("ttft_ms", "p90")),
    Metric("TPOT p90", "ms", _time("tpot_ms", "p90")),
    Metric("ITL p99", "ms", _time("itl_ms", "p99")),
    Metric("goodput", "requests/s", lambda summary: float(summary["slo"][0]["goodput"]), True),
)


@dataclass(frozen=True)
class Comparison:
    """One pair of lengths; summaries by rate."""

    workload: str
    rates: Sequence[float]
    pd: Sequence[Summary]
    both: Sequence[Summary]

    def values(self, metric: Metric) -> tuple[list[float], list[float]]:
        """Of prefill + decode, and of `both`."""
        return [metric.of(one) for one in self.pd], [metric.of(one) for one in self.both]

    def leads(self, metric: Metric) -> list[float]:
        """By rate, by how much prefill + decode is better; below 0 it is worse, 0 within
        `EQUAL`."""
        sign = 1 if metric.more_is_better else -1
        return [
            0.0 if abs(own - other) <= EQUAL * max(own, other) else sign * (own - other)
            for own, other in zip(*self.values(metric), strict=True)
        ]

    def crossings(self, metric: Metric) -> list[float]:
        return crossings(self.rates, self.leads(metric))

    def verdict(self, metric: Metric) -> str:
        """In words: at which rates prefill + decode is the better one."""
        found = self.crossings(metric)
        known = [lead for lead in self.leads(metric) if lead == lead and lead != 0]
        if not known:
            return "equal"
        begins = "better" if known[0] > 0 else "worse"
        if not found:
            return f"never {'worse' if known[0] > 0 else 'better'}"
        turns = [
            "worse" if (known[0] > 0) == (index % 2 == 0) else "better"
            for index in range(len(found))
        ]
        told = [f"{turn} from {rate:.2g}/s" for turn, rate in zip(turns, found, strict=True)]
        return ", ".join([begins, *told])

    def as_json(self) -> dict[str, Any]:
        points = zip(self.rates, self.pd, self.both, strict=True)
        return {
            "workload": self.workload,
            "break_even": {
                metric.name: {
                    "rates": [round(rate, 3) for rate in self.crossings(metric)],
                    "prefill + decode is": self.verdict(metric),
                }
                for metric in METRICS
            },
            "points": [{"rate": rate, "pd": pd, "both": both} for rate, pd, both in points],
        }


def measuring_order(workloads: Sequence[str], names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Which arrangement measures which workloads, in order of time. All arrangements measure every
    workload; the last one goes on with the next workload, and need not be started anew for it."""
    order = [
        (name, workload)
        for index, workload in enumerate(workloads)
        for name in (reversed(names) if index % 2 else names)
    ]
    return [
        (name, [workload for _, workload in group])
        for name, group in groupby(order, key=lambda turn: turn[0])
    ]


def crossings(xs: Sequence[float], leads: Sequence[float]) -> list[float]:
    """Where a line through (xs, leads) changes its sign; leads that are 0 or NaN are left out."""
    points = [(x, lead) for x, lead in zip(xs, leads, strict=True) if lead == lead and lead != 0]
    found = []
    for (x0, lead0), (x1, lead1) in zip(points, points[1:], strict=False):
        if (lead0 > 0) != (lead1 > 0):
            found.append(x0 + (x1 - x0) * lead0 / (lead0 - lead1))
    return found


def text(comparisons: Sequence[Comparison]) -> str:
    blocks = [f"{one.workload} tokens\n{text_table(*_points(one))}" for one in comparisons]
    head, rows = _verdicts(comparisons)
    return "\n\n".join([*blocks, f"{PD} is\n{text_table(head, rows)}"])


def html(comparisons: Sequence[Comparison], facts: dict[str, str]) -> str:
    return page(
        f"{PD} against {BOTH}, at equal resources",
        paragraphs(
            [
                "The same workers, router and requests. Red lines are break-evens: where a line"
                " between the measured rates changes sides; what differs by 5 % or less is equal."
            ]
        ),
        section(f"Where {PD} is better", table(*_verdicts(comparisons))),
        section(
            f"{PD} over {BOTH}",
            paragraphs([f"Green where {PD} is better, red where {BOTH} is."]),
            _map(comparisons),
        ),
        *(
            section(
                f"{one.workload} tokens",
                charts(*(_chart(one, metric) for metric in METRICS)),
                table(*_points(one)),
            )
            for one in comparisons
        ),
        section("Of what", facts_table(facts)),
    )


def _verdicts(comparisons: Sequence[Comparison]) -> tuple[list[str], list[list[str]]]:
    rows = [[one.workload, *(one.verdict(metric) for metric in METRICS)] for one in comparisons]
    return ["in:out", *(metric.name for metric in METRICS)], rows


def _points(one: Comparison) -> tuple[list[str], list[list[str]]]:
    head = ["rate"]
    columns = []
    for metric in METRICS:
        head += [f"{metric.name} pd", "both"]
        columns += list(one.values(metric))
    rows = [
        [f"{rate:g}", *(f"{column[index]:.3g}" for column in columns)]
        for index, rate in enumerate(one.rates)
    ]
    return head, rows


def _chart(one: Comparison, metric: Metric) -> str:
    pd, both = one.values(metric)
    return chart(
        metric.name,
        [
            Series(PD, list(zip(one.rates, pd, strict=True))),
            Series(BOTH, list(zip(one.rates, both, strict=True))),
        ],
        x_label="requests/s offered",
        y_label=metric.unit,
        marks=[Mark(rate, f"{rate:.2g}/s") for rate in one.crossings(metric)],
    )


def _map(comparisons: Sequence[Comparison]) -> str:
    """By metric, lengths and rate: what prefill + decode measured, over what `both` did."""
    rates = sorted({rate for one in comparisons for rate in one.rates})
    rows = []
    for metric in METRICS:
        for one in comparisons:
            cells = dict(zip(one.rates, _ratios(one, metric), strict=True))
            rows.append(
                (f"{metric.name}, {one.workload}", [cells.get(rate, ("", "")) for rate in rates])
            )
    return coloured_table(["in:out", *(f"{rate:g}/s" for rate in rates)], rows)


def _ratios(one: Comparison, metric: Metric) -> list[tuple[str, str]]:
    pairs = zip(*one.values(metric), one.leads(metric), strict=True)
    return [
        (
            f"{own / other:.2f} x" if other and own == own and other == other else "-",
            "good" if lead > 0 else "bad" if lead < 0 else "",
        )
        for own, other, lead in pairs
    ]
