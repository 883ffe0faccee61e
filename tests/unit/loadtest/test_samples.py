"""What is made of what clients saw."""

from __future__ import annotations

import pytest

from baton.loadtest.samples import (
    Offered,
    Sample,
    Slo,
    percentile,
    summarise,
    times_of,
    warnings,
)


def sample(**changes: object) -> Sample:
    fields = {"at_s": 1.0, "ttft_s": 0.5, "e2e_s": 1.5, "num_tokens": 101, "status": "OK"}
    return Sample(**(fields | changes))  # type: ignore[arg-type]


def test_percentiles_interpolate() -> None:
    assert percentile([], 0.5) is None
    assert percentile([7.0], 0.99) == 7.0
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert percentile([1.0, 2.0], 1.0) == 2.0


def test_messages_become_times() -> None:
    seen = Sample(1.0)
    for now_s, num_tokens in ((0.2, 1), (0.3, 2), (0.7, 1)):
        seen.took(now_s, num_tokens)
    assert (seen.ttft_s, seen.e2e_s) == (0.2, 0.7)
    # A gap for each message, however many tokens it brought; none is made up.
    assert seen.gaps_s == pytest.approx([0.1, 0.4])
    assert (seen.num_tokens, seen.num_messages) == (4, 3)
    assert seen.tpot_s == pytest.approx(0.5 / 3)
    assert seen.longest_gap_s == pytest.approx(0.4)


def test_time_per_token_leaves_the_first_out() -> None:
    assert sample().tpot_s == pytest.approx(0.01)
    assert sample(num_tokens=1).tpot_s is None
    assert sample(ttft_s=None).tpot_s is None


def test_an_slo_is_kept_by_answers_only() -> None:
    assert sample().keeps(Slo(0.5, 0.011))
    assert not sample().keeps(Slo(0.49, 0.011))
    assert not sample().keeps(Slo(0.5, 0.009))
    assert not sample(status="UNAVAILABLE").keeps(Slo(9.0, 9.0))
    assert sample(num_tokens=1).keeps(Slo(0.5, 0.0))


def test_what_failed_counts_against_the_slo_and_not_in_the_times() -> None:
    seen = [
        sample(num_prompt_tokens=90, num_cached_tokens=30, gaps_s=[0.1, 0.3]),
        sample(is_local=True, num_prompt_tokens=10, num_cached_tokens=10, num_attempts=2),
        sample(status="UNFINISHED", ttft_s=99.0, e2e_s=None, gaps_s=[9.0], num_tokens=0),
        sample(status="RESOURCE_EXHAUSTED", detail="full", ttft_s=None, num_tokens=0, e2e_s=None),
    ]
    summary = summarise(Offered(seen, client_cpu=0.1), [(1.0, 0.025), (0.1, 0.025)])
    assert [slo["attained"] for slo in summary["slo"]] == [0.5, 0.0]
    # All of it ends 1 + 1.5 s after the start.
    assert [slo["goodput"] for slo in summary["slo"]] == [pytest.approx(2 / 2.5), 0.0]
    assert summary["ttft_ms"] == {"mean": 500.0, "p50": 500.0, "p90": 500.0, "p99": 500.0}
    assert summary["itl_ms"]["mean"] == 200.0
    assert summary["local_share"] == 0.5 and summary["num_retried"] == 1
    assert summary["cached_share"] == pytest.approx(0.4)
    assert summary["output_tokens_per_s"] == pytest.approx(202 / 2.5)
    assert summary["total_tokens_per_s"] == pytest.approx(302 / 2.5)
    assert (summary["num_ok"], summary["num_refused"], summary["num_failed"]) == (2, 1, 1)
    assert summary["statuses"] == {"OK": 2, "UNFINISHED": 1, "RESOURCE_EXHAUSTED": 1}
    assert "RESOURCE_EXHAUSTED: full" in summary["problems"]
    (warning,) = warnings(summary)
    assert warning.startswith("requests without an answer")


@pytest.mark.parametrize(
    ("status", "ttft_s", "is_refused"),
    [
        ("HTTP 429", None, True),
        ("HTTP 400", None, True),
        ("HTTP 503", None, True),
        ("HTTP 500", None, False),
        ("UNAVAILABLE", None, True),
        ("UNAVAILABLE", 0.1, False),
        ("CONNECTION", None, False),
        ("OK", 0.1, False),
    ],
)
def test_refused_is_what_cost_no_token(status: str, ttft_s: float | None, is_refused: bool) -> None:
    assert sample(status=status, ttft_s=ttft_s).is_refused is is_refused


def test_times_are_of_whole_answers() -> None:
    seen = [sample(transfer_s=0.003), sample(), sample(status="TIMEOUT", transfer_s=9.0)]
    assert times_of(seen, "transfer_ms") == [0.003]


def test_a_slow_generator_is_told() -> None:
    late = summarise(Offered([sample(late_s=0.05)], client_cpu=0.9), [])
    assert len(warnings(late)) == 2
    lagging = summarise(Offered([sample()], client_cpu=0.1, lag_s=[0.1]), [])
    assert warnings(lagging) == ["the load generator read answers late: 100 ms at p99"]
    assert not warnings(summarise(Offered([sample()], client_cpu=0.1), []))
    assert not warnings(summarise(Offered([], client_cpu=0.0), []))
