"""What a server's metrics say of a load, beside what its clients saw. Pure.

Counts must be equal. Times of the metrics are shorter: they count from the request's arrival at the
gateway, those of the clients from the planned moment of asking.

The names are vLLM's where there is one, so that a vLLM server can be looked at as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from baton.loadtest.samples import OK, Sample, times_of

ANSWERED, PROMPT_TOKENS, OUTPUT_TOKENS = "answered", "prompt tokens", "output tokens"
"""These must be equal."""
_KEPT = ("status", "finished_reason", "position")
"""Labels whose values are kept apart; a metric has one of them at most."""
_DRAFTS = "vllm:spec_decode_num_drafts_total"
_ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"
_BY_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
_NOT_ANSWERS = {"abort", "error"}
"""vLLM counts these among its successes, by their reason."""


@dataclass(frozen=True)
class Scrape:
    """One process at one moment."""

    process: str
    """Equal for as long as it is the same process; empty when it does not say."""
    values: Mapping[tuple[str, str], float]
    """Sums, by name and outcome or position (empty where there is none) over all other labels."""

    def of(self, name: str) -> float | None:
        """None: it has no such metric. A metric of what has not happened yet may have no value."""
        found = [value for (own, _), value in self.values.items() if own == name]
        return sum(found) if found else None


def read(text: str) -> Scrape:
    """Reads the text format. Raises ValueError."""
    process, values = "", dict[tuple[str, str], float]()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "baton_build_info":
                process = sample.labels.get("incarnation", "")
            outcome = next((sample.labels[each] for each in _KEPT if sample.labels.get(each)), "")
            key = sample.name, outcome
            values[key] = values.get(key, 0.0) + sample.value
    return Scrape(process, values)


@dataclass(frozen=True)
class Figure:
    """Counts, or milliseconds; None where nobody said, or nothing happened."""

    name: str
    clients: float | None
    metrics: float | None

    @property
    def difference_percent(self) -> float | None:
        """Apart by this share of the clients' figure; None where there is nothing to compare."""
        if self.clients is None or self.metrics is None:
            return None
        if not self.clients:
            return None if self.metrics else 0.0
        return 100 * (self.metrics - self.clients) / self.clients


@dataclass(frozen=True)
class MetricsCheck:
    sources: Sequence[str]
    """Where the metrics were read."""
    counts: Sequence[Figure] = ()
    times: Sequence[Figure] = ()
    """And means of other kinds."""
    problems: Sequence[str] = ()
    """One line each: what could not be read, and what does not agree."""

    def as_dict(self) -> dict[str, Any]:
        figures = {
            figure.name: {
                "clients": figure.clients,
                "metrics": figure.metrics,
                "difference_percent": figure.difference_percent,
            }
            for figure in (*self.counts, *self.times)
        }
        return {"sources": list(self.sources), "problems": list(self.problems), "figures": figures}


class Deltas:
    """What the counters of some processes gained together."""

    def __init__(self, pairs: Iterable[tuple[Scrape, Scrape]]) -> None:
        """Before and after, of each process."""
        self._pairs = list(pairs)

    def total(self, name: str, keep: Callable[[str], bool] = lambda outcome: True) -> float | None:
        """Summed over the outcomes that are kept; None where no process has the metric."""
        found = [
            value - before.values.get((own, outcome), 0.0)
            for before, after in self._pairs
            for (own, outcome), value in after.values.items()
            if own == name and keep(outcome)
        ]
        return sum(found) if found else None

    def by_position(self, name: str) -> dict[int, float]:
        """Of a metric that has a value for each position."""
        total: dict[int, float] = {}
        for before, after in self._pairs:
            for (own, place), value in after.values.items():
                if own == name and place.isdigit():
                    gained = value - before.values.get((own, place), 0.0)
                    total[int(place)] = total.get(int(place), 0.0) + gained
        return total

    def mean_ms(self, name: str) -> float | None:
        """The mean of a histogram of seconds, in ms; None where nothing was observed."""
        total_s, number = self.total(f"{name}_sum"), self.total(f"{name}_count")
        return 1e3 * total_s / number if total_s is not None and number else None


def compare(
    sources: Sequence[str], pairs: Iterable[tuple[Scrape, Scrape]], samples: Sequence[Sample]
) -> MetricsCheck:
    """`pairs`: before and after the load, of each process that was read."""
    deltas = Deltas(pairs)
    counts = [figure for figure in _counts(deltas, samples) if figure.metrics is not None]
    times = [figure for figure in _times(deltas, samples) if figure.metrics is not None]
    problems = _disagreements(counts) if counts or times else ["none of the metrics is known"]
    return MetricsCheck(sources, counts, times, problems)


def _counts(deltas: Deltas, samples: Sequence[Sample]) -> Iterator[Figure]:
    """Tokens of answers that came whole, as in the metrics."""
    good = [sample for sample in samples if sample.status == OK]
    answered = deltas.total("vllm:request_success_total", lambda why: why not in _NOT_ANSWERS)
    yield Figure(ANSWERED, len(good), answered)
    ended = deltas.total("baton_requests_total")
    failed = deltas.total("baton_requests_total", lambda status: status != OK)
    # A status that never came has no value yet.
    yield Figure("not answered", len(samples) - len(good), None if ended is None else failed or 0)
    prompt = deltas.total("vllm:request_prompt_tokens_sum")
    yield Figure(PROMPT_TOKENS, sum(sample.num_prompt_tokens for sample in good), prompt)
    output = deltas.total("vllm:request_generation_tokens_sum")
    yield Figure(OUTPUT_TOKENS, sum(sample.num_tokens for sample in good), output)
    told = [s.num_cached_tokens for s in good if s.num_cached_tokens is not None]
    cached = deltas.total("vllm:prefix_cache_hits_total")
    yield Figure("cached tokens", sum(told) if told else None, cached)
    yield from _drafts(deltas)


def _drafts(deltas: Deltas) -> Iterator[Figure]:
    """What workers guessed and verified; nothing where none of them did."""
    num_drafts = deltas.total(_DRAFTS)
    if not num_drafts:
        return
    yield Figure("drafts", None, num_drafts)
    yield Figure("drafted tokens", None, deltas.total("vllm:spec_decode_num_draft_tokens_total"))
    yield Figure("accepted tokens", None, deltas.total(_ACCEPTED))
    for place, count in sorted(deltas.by_position(_BY_POSITION).items()):
        yield Figure(f"accepted at {place}", None, count)


def _times(deltas: Deltas, samples: Sequence[Sample]) -> Iterator[Figure]:
    for name, own, metric in (
        ("TTFT", "ttft_ms", "vllm:time_to_first_token_seconds"),
        ("TPOT", "tpot_ms", "vllm:request_time_per_output_token_seconds"),
        ("ITL", "itl_ms", "vllm:inter_token_latency_seconds"),
        ("E2E", "e2e_ms", "vllm:e2e_request_latency_seconds"),
        ("hand-off", "transfer_ms", "baton_handoff_seconds"),
    ):
        times_s = times_of(samples, own)
        mean_ms = 1e3 * sum(times_s) / len(times_s) if times_s else None
        yield Figure(f"{name} mean ms", mean_ms, deltas.mean_ms(metric))
    num_drafts = deltas.total(_DRAFTS)
    if num_drafts:
        length = 1 + (deltas.total(_ACCEPTED) or 0.0) / num_drafts
        yield Figure("mean accepted length", None, length)


def _disagreements(counts: Sequence[Figure]) -> list[str]:
    """A line about counts that are not equal, if there are any. Requests that were not answered are
    left out, since some may not have reached the gateway; so are cached tokens, of which a second
    attempt finds more."""
    found = [
        f"{figure.name} {figure.metrics:.0f}, the clients {figure.clients:.0f}"
        for figure in counts
        if figure.name in (ANSWERED, PROMPT_TOKENS, OUTPUT_TOKENS) and figure.difference_percent
    ]
    if not found:
        return []
    told = "; ".join(found)
    return [f"the metrics count {told}: do others ask it too, or is a gateway not in --metrics?"]
