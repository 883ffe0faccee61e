"""What clients saw of their requests, and the figures of a table made of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

UNFINISHED = "UNFINISHED"
MAX_LATE_S = 0.02
"""A generator whose 99th percentile is later than that is too slow for what it shall offer."""
_MAX_CLIENT_CPU = 0.8


@dataclass
class Sample:
    """One request as its client saw it; seconds, from the planned arrival."""

    at_s: float
    late_s: float = 0.0
    ttft_s: float | None = None
    e2e_s: float | None = None
    """To the last token."""
    num_tokens: int = 0
    longest_gap_s: float = 0.0
    status: str = UNFINISHED
    is_local: bool = False
    """The worker that answered computed the prompt by itself."""
    num_attempts: int = 0

    @property
    def tpot_s(self) -> float | None:
        if self.ttft_s is None or self.e2e_s is None or self.num_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.num_tokens - 1)

    def keeps(self, ttft_s: float, tpot_s: float) -> bool:
        own = self.tpot_s
        is_fast = self.ttft_s is not None and self.ttft_s <= ttft_s
        return self.status == "OK" and is_fast and (own is None or own <= tpot_s)


@dataclass
class Offered:
    samples: list[Sample]
    client_cpu: float
    """Cores that the busiest generator used while it ran."""


def percentile(values: Sequence[float], share: float) -> float | None:
    """Interpolated between neighbours; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def summarise(offered: Offered, slos: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """What a table needs; times in ms. `slos`: seconds of TTFT and of TPOT. What failed, or was
    not finished, keeps none."""
    samples = offered.samples
    good = [sample for sample in samples if sample.status == "OK"]
    times = {
        "ttft_ms": [s.ttft_s for s in good if s.ttft_s is not None],
        "tpot_ms": [s.tpot_s for s in good if s.tpot_s is not None],
        "longest_gap_ms": [s.longest_gap_s for s in good],
        "late_ms": [s.late_s for s in samples],
    }
    end_s = max((s.at_s + (s.e2e_s or 0.0) for s in samples), default=0.0)
    return {
        "num_requests": len(samples),
        "statuses": dict(Counter(sample.status for sample in samples)),
        "num_retried": sum(sample.num_attempts > 1 for sample in good),
        "local_share": sum(s.is_local for s in good) / len(good) if good else None,
        "output_tokens_per_s": sum(s.num_tokens for s in samples) / end_s if end_s else 0.0,
        "client_cpu": offered.client_cpu,
        "slo": [
            {
                "ttft_s": ttft_s,
                "tpot_s": tpot_s,
                "attained": sum(s.keeps(ttft_s, tpot_s) for s in samples) / max(1, len(samples)),
            }
            for ttft_s, tpot_s in slos
        ],
        **{
            name: {f"p{p}": _ms(percentile(values, p / 100)) for p in (50, 90, 99)}
            for name, values in times.items()
        },
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e3 * seconds, 3)


def warnings(summary: dict[str, Any]) -> list[str]:
    """Why not to trust the figures."""
    late_ms = summary["late_ms"]["p99"]
    found = []
    if late_ms is not None and late_ms > 1e3 * MAX_LATE_S:
        found.append(f"the load generator fell behind its schedule: {late_ms:.0f} ms at p99")
    if summary["client_cpu"] > _MAX_CLIENT_CPU:
        found.append(f"a load generator used {summary['client_cpu']:.2f} cores: use more of them")
    bad = {name: n for name, n in summary["statuses"].items() if name != "OK"}
    if bad:
        found.append(f"requests without an answer: {bad}")
    return found
