"""What clients saw of their requests, and the figures of a table made of it. Pure."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

OK = "OK"
UNFINISHED = "UNFINISHED"
MAX_LATE_S = 0.02
"""A generator that is later than this at the 99th percentile is too slow for the load."""
_MAX_CLIENT_CPU = 0.8
_NUM_PROBLEMS = 5
_REFUSALS = {
    *("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "FAILED_PRECONDITION", "UNIMPLEMENTED"),
    *("NOT_FOUND", "UNAUTHENTICATED", "PERMISSION_DENIED", "UNAVAILABLE"),
}


class Slo(NamedTuple):
    """Upper limits in seconds; a request keeps it when both hold."""

    ttft_s: float
    tpot_s: float


@dataclass
class Sample:
    """One request as its client saw it; seconds, from the planned arrival."""

    at_s: float
    """The planned arrival, from the start of the load."""
    late_s: float = 0.0
    ttft_s: float | None = None
    e2e_s: float | None = None
    """Until the last token."""
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    num_messages: int = 0
    """Those that brought tokens."""
    gaps_s: list[float] = field(default_factory=list)
    """ITL: from each message that brought tokens to the next."""
    status: str = UNFINISHED
    detail: str = ""
    num_cached_tokens: int | None = None
    transfer_s: float | None = None
    """Time of the hand-off, as the gateway says."""
    is_local: bool = False
    """The worker that answered computed the prompt by itself."""
    num_attempts: int = 0

    def took(self, now_s: float, num_tokens: int) -> None:
        """A message with tokens came, so long after the planned arrival."""
        if self.ttft_s is None:
            self.ttft_s = now_s
        else:
            self.gaps_s.append(now_s - (self.e2e_s or 0.0))
        self.e2e_s = now_s
        self.num_tokens += num_tokens
        self.num_messages += 1

    @property
    def tpot_s(self) -> float | None:
        if self.ttft_s is None or self.e2e_s is None or self.num_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.num_tokens - 1)

    @property
    def longest_gap_s(self) -> float:
        return max(self.gaps_s, default=0.0)

    @property
    def is_refused(self) -> bool:
        """Turned away before it cost a token."""
        is_refusal = self.status in _REFUSALS or self.status in ("HTTP 503", "HTTP 529")
        return self.ttft_s is None and (is_refusal or self.status.startswith("HTTP 4"))

    def keeps(self, slo: Slo) -> bool:
        own = self.tpot_s
        is_fast = self.ttft_s is not None and self.ttft_s <= slo.ttft_s
        return self.status == OK and is_fast and (own is None or own <= slo.tpot_s)


class Watch:
    """Times one request by the monotonic clock."""

    def __init__(self, sample: Sample, started_s: float) -> None:
        """`started_s`: when the load began."""
        self.sample = sample
        self._arrival_s = started_s + sample.at_s
        sample.late_s = time.monotonic() - self._arrival_s

    def took(self, num_tokens: int) -> None:
        self.sample.took(time.monotonic() - self._arrival_s, num_tokens)


@dataclass
class Offered:
    samples: list[Sample]
    client_cpu: float
    """Cores that the busiest generator used while it ran."""
    lag_s: list[float] = field(default_factory=list)
    """How much too late the generators' event loops woke up."""
    client_cpu_s: float = 0.0
    """CPU time of all generators."""


def percentile(values: Sequence[float], share: float) -> float | None:
    """Interpolated between neighbours; None without values."""
    return percentiles(values, (share,))[0]


def percentiles(values: Sequence[float], shares: Iterable[float]) -> list[float | None]:
    ordered = sorted(values)
    return [_at(ordered, share) for share in shares]


def _at(ordered: Sequence[float], share: float) -> float | None:
    if not ordered:
        return None
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


TIMES: dict[str, Callable[[Sample], Iterable[float | None]]] = {
    "ttft_ms": lambda s: (s.ttft_s,),
    "tpot_ms": lambda s: (s.tpot_s,),
    "itl_ms": lambda s: s.gaps_s,
    "longest_gap_ms": lambda s: (s.longest_gap_s,),
    "e2e_ms": lambda s: (s.e2e_s,),
    "transfer_ms": lambda s: (s.transfer_s,),
}
"""Of answers that came whole."""


def times_of(samples: Sequence[Sample], name: str) -> list[float]:
    """Seconds, of `TIMES`."""
    good = (sample for sample in samples if sample.status == OK)
    return [value for sample in good for value in TIMES[name](sample) if value is not None]


def summarise(offered: Offered, slos: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """What a table needs; times in ms. `slos`: seconds of TTFT and of TPOT. Requests that failed,
    or were not finished, keep none."""
    samples = offered.samples
    good = [sample for sample in samples if sample.status == OK]
    elapsed_s = max((s.at_s + (s.e2e_s or 0.0) for s in samples), default=0.0)
    num_refused = sum(sample.is_refused for sample in samples)
    problems = Counter(f"{s.status}: {s.detail}" for s in samples if s.status != OK)
    num_tokens, num_messages = (
        sum(getattr(s, name) for s in samples) for name in ("num_tokens", "num_messages")
    )
    num_prompt_tokens = sum(s.num_prompt_tokens for s in good)
    kept = [sum(sample.keeps(Slo(*slo)) for sample in samples) for slo in slos]
    return {
        "num_requests": len(samples),
        "num_ok": len(good),
        "num_refused": num_refused,
        "num_failed": len(samples) - len(good) - num_refused,
        "statuses": dict(Counter(sample.status for sample in samples)),
        "problems": dict(problems.most_common(_NUM_PROBLEMS)),
        "num_retried": sum(sample.num_attempts > 1 for sample in good),
        "local_share": sum(s.is_local for s in good) / len(good) if good else None,
        "elapsed_s": round(elapsed_s, 3),
        "requests_per_s": _rate(len(good), elapsed_s),
        "output_tokens_per_s": _rate(num_tokens, elapsed_s),
        "total_tokens_per_s": _rate(num_tokens + num_prompt_tokens, elapsed_s),
        "num_prompt_tokens": num_prompt_tokens,
        "num_output_tokens": num_tokens,
        "tokens_per_message": num_tokens / num_messages if num_messages else None,
        "cached_share": _cached_share(good),
        "client_cpu": offered.client_cpu,
        "lag_ms": {"p99": _ms(percentile(offered.lag_s, 0.99))},
        "slo": [
            {
                "ttft_s": ttft_s,
                "tpot_s": tpot_s,
                "attained": count / max(1, len(samples)),
                "goodput": _rate(count, elapsed_s),
            }
            for (ttft_s, tpot_s), count in zip(slos, kept, strict=True)
        ],
        **{name: distribution(times_of(samples, name)) for name in TIMES},
        "late_ms": distribution([sample.late_s for sample in samples]),
    }


def distribution(times_s: Sequence[float]) -> dict[str, float | None]:
    """In ms."""
    p50, p90, p99 = percentiles(times_s, (0.5, 0.9, 0.99))
    mean = sum(times_s) / len(times_s) if times_s else None
    return {"mean": _ms(mean), "p50": _ms(p50), "p90": _ms(p90), "p99": _ms(p99)}


def warnings(summary: dict[str, Any]) -> list[str]:
    """Reasons not to trust the figures."""
    late_ms, lag_ms = summary["late_ms"]["p99"], summary["lag_ms"]["p99"]
    found = []
    if late_ms is not None and late_ms > 1e3 * MAX_LATE_S:
        found.append(f"the load generator fell behind its schedule: {late_ms:.0f} ms at p99")
    elif lag_ms is not None and lag_ms > 1e3 * MAX_LATE_S:
        found.append(f"the load generator read answers late: {lag_ms:.0f} ms at p99")
    if summary["client_cpu"] > _MAX_CLIENT_CPU:
        found.append(f"a load generator used {summary['client_cpu']:.2f} cores: use more of them")
    bad = {name: n for name, n in summary["statuses"].items() if name != OK}
    if bad:
        found.append(f"requests without an answer: {bad}")
    return found


def _cached_share(good: Sequence[Sample]) -> float | None:
    """The cached share of prompt tokens, over the answers that say it."""
    told = [s for s in good if s.num_cached_tokens is not None]
    num_tokens = sum(s.num_prompt_tokens for s in told)
    return sum(s.num_cached_tokens or 0 for s in told) / num_tokens if num_tokens else None


def _rate(count: int, elapsed_s: float) -> float:
    return count / elapsed_s if elapsed_s else 0.0


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e3 * seconds, 3)
