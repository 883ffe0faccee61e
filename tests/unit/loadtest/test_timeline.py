"""What happened when: rates over time, and what is taken for a step."""

from __future__ import annotations

import pytest

from baton.loadtest import timeline
from baton.loadtest.samples import Sample
from baton.loadtest.timeline import window_of


def sample(at_s: float) -> Sample:
    """Four tokens within half a second."""
    gaps_s = [0.1, 0.1, 0.1]
    return Sample(
        at_s, ttft_s=0.2, e2e_s=0.5, num_tokens=4, num_messages=4, gaps_s=gaps_s, status="OK"
    )


def test_timelines() -> None:
    samples = [sample(0.0), sample(0.1), sample(2.0)]
    assert timeline.bucket_s(samples) == 0.05
    width_s = timeline.bucket_s(samples)
    tokens = timeline.tokens_per_s(samples)
    assert sum(rate * width_s for _, rate in tokens) == pytest.approx(12)
    assert sum(rate * width_s for _, rate in timeline.arrivals_per_s(samples)) == pytest.approx(3)
    assert max(level for _, level in timeline.in_flight(samples)) == 2
    assert timeline.tokens_per_s([]) == timeline.in_flight([]) == []


def _stream(first_s: float, num_tokens: int, step_s: float) -> list[float]:
    return [first_s + i * step_s for i in range(num_tokens)]


def test_a_step_is_the_time_of_a_token_while_all_decode() -> None:
    early, late = _stream(0.0, 200, 0.01), _stream(0.1005, 200, 0.01)
    window = window_of([early, late], 50)
    assert window.step_s == pytest.approx(0.01, rel=0.02)
    assert window.num_steps == 50
    # The late one has its warm-up behind it, the early one ten tokens more.
    assert window.num_before == pytest.approx((9 + 19) / 2, abs=1)


def test_the_window_ends_with_the_first_stream() -> None:
    short, long = _stream(0.0, 40, 0.01), _stream(0.0, 200, 0.01)
    assert window_of([short, long], 100).num_steps == 31


def test_streams_that_never_decode_together_are_no_measurement() -> None:
    with pytest.raises(ValueError, match="at the same time"):
        window_of([_stream(0.0, 20, 0.01), _stream(1.0, 20, 0.01)], 10)
