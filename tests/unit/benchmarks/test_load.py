"""What is offered, and what is made of what clients saw."""

from __future__ import annotations

import pytest

from benchmarks.load import Load, plan, split
from benchmarks.samples import Offered, Sample, percentile, summarise, warnings

LOAD = Load("nobody:1", prompt_tokens=40, output_tokens=8, vocab_size=300, rate=20.0)


def sample(**changes: object) -> Sample:
    fields = {"at_s": 1.0, "ttft_s": 0.5, "e2e_s": 1.5, "num_tokens": 101, "status": "OK"}
    return Sample(**(fields | changes))  # type: ignore[arg-type]


def test_a_plan_is_a_function_of_its_seed() -> None:
    requests, arrivals = plan(LOAD)
    assert (requests, arrivals) == plan(LOAD)
    assert arrivals == sorted(arrivals) and 0 < arrivals[0] and arrivals[-1] < LOAD.duration_s
    assert len(requests) == len(arrivals) == pytest.approx(20 * 22, rel=0.2)
    assert {len(request.token_ids.token_ids) for request in requests} == {40}
    assert max(max(request.token_ids.token_ids) for request in requests) < 300
    other, _ = plan(LOAD.at(20.0, seed=1))
    assert requests[0] != other[0]


def test_shares_are_the_whole_load_and_differ() -> None:
    closed = LOAD.in_turn(10, num_streams=4, output_tokens=3)
    parts = split(closed, 3)
    assert sum(part.num_requests for part in parts) == 10
    assert sum(part.num_streams for part in parts) >= 4
    assert sum(part.rate or 0.0 for part in split(LOAD, 3)) == pytest.approx(20.0)
    first, second = (plan(part)[0] for part in parts[:2])
    assert first[0] != second[0]
    # No share asks what the same share of another seed asks: it would find it in the caches.
    seeds = [part.seed for seed in (0, 1, 2, 999_999) for part in split(LOAD.at(1.0, seed=seed), 3)]
    assert len(set(seeds)) == len(seeds)


def test_percentiles_interpolate() -> None:
    assert percentile([], 0.5) is None
    assert percentile([7.0], 0.99) == 7.0
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert percentile([1.0, 2.0], 1.0) == 2.0


def test_time_per_token_leaves_the_first_out() -> None:
    assert sample().tpot_s == pytest.approx(0.01)
    assert sample(num_tokens=1).tpot_s is None
    assert sample(ttft_s=None).tpot_s is None


def test_an_slo_is_kept_by_answers_only() -> None:
    assert sample().keeps(0.5, 0.011)
    assert not sample().keeps(0.49, 0.011)
    assert not sample().keeps(0.5, 0.009)
    assert not sample(status="UNAVAILABLE: gone").keeps(9.0, 9.0)
    assert sample(num_tokens=1).keeps(0.5, 0.0)


def test_what_failed_counts_against_the_slo_and_not_in_the_times() -> None:
    seen = [sample(), sample(is_local=True), sample(status="UNFINISHED", ttft_s=99.0)]
    summary = summarise(Offered(seen, client_cpu=0.1), [(1.0, 0.025), (0.1, 0.025)])
    assert [slo["attained"] for slo in summary["slo"]] == [pytest.approx(2 / 3), 0.0]
    assert summary["ttft_ms"] == {"p50": 500.0, "p90": 500.0, "p99": 500.0}
    assert summary["local_share"] == 0.5
    assert warnings(summary) == ["requests without an answer: {'UNFINISHED': 1}"]


def test_a_slow_generator_is_told() -> None:
    late = summarise(Offered([sample(late_s=0.05)], client_cpu=0.9), [])
    assert len(warnings(late)) == 2
    assert not warnings(summarise(Offered([sample()], client_cpu=0.1), []))
    assert not warnings(summarise(Offered([], client_cpu=0.0), []))
