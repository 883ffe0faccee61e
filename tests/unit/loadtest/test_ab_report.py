"""Two arrangements side by side: who is measured when, and where they cross."""

from __future__ import annotations

import re
from typing import Any

import pytest

from baton.loadtest.ab_report import (
    METRICS,
    Comparison,
    crossings,
    html,
    measuring_order,
    text,
)


def test_the_order_turns_from_one_workload_to_the_next() -> None:
    assert measuring_order(["a"], ["pd", "both"]) == [("pd", ["a"]), ("both", ["a"])]
    assert measuring_order(["a", "b", "c"], ["pd", "both"]) == [
        ("pd", ["a"]),
        ("both", ["a", "b"]),
        ("pd", ["b", "c"]),
        ("both", ["c"]),
    ]


def summary_with(ttft_ms: float, goodput: float) -> dict[str, Any]:
    times = {"p90": ttft_ms, "p99": ttft_ms}
    none = {"p90": None, "p99": None}
    return {"ttft_ms": times, "tpot_ms": none, "itl_ms": none, "slo": [{"goodput": goodput}]}


def test_break_evens() -> None:
    assert crossings([1, 2, 3], [-1.0, 1.0, 2.0]) == [1.5]
    assert crossings([1, 2, 3], [1.0, float("nan"), 3.0]) == []
    assert crossings([1, 2, 3], [1.0, -1.0, 1.0]) == [1.5, 2.5]
    pd = [summary_with(200, 1.0), summary_with(200, 2.0)]
    both = [summary_with(100, 1.0), summary_with(400, 1.0)]
    one = Comparison("512:16", [1.0, 2.0], pd, both)
    ttft, tpot, _, goodput = METRICS
    assert one.crossings(ttft) == [pytest.approx(4 / 3)]
    assert one.verdict(ttft) == "worse, better from 1.3/s"
    assert one.verdict(tpot) == "equal"
    assert one.verdict(goodput) == "never worse"
    assert "worse, better from 1.3/s" in text([one])
    page = html([one], {"model": "demo"})
    assert "1.3/s" in page and 'class="mark"' in page and not re.search("https?://", page)
