"""What happened when, from what clients saw. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from baton.loadtest.samples import Sample
from baton.loadtest.svg import Point

_NUM_BUCKETS = 60
NUM_WARM_UP = 8
"""Steps that nobody counts, after the last stream's first token."""


class Window(NamedTuple):
    """When all streams decoded."""

    step_s: float
    num_before: int
    """Tokens that a stream had then, in the mean."""
    num_steps: int


def bucket_s(samples: Sequence[Sample]) -> float:
    """Width of a bucket, in seconds."""
    end_s = max((s.at_s + (s.e2e_s or 0.0) for s in samples), default=0.0)
    return max(end_s / _NUM_BUCKETS, 0.05)


def tokens_per_s(samples: Sequence[Sample]) -> list[Point]:
    """By time; the tokens of a request are taken to be spread evenly over its messages."""
    moments: list[tuple[float, float]] = []
    for sample in samples:
        if sample.num_messages:
            share = sample.num_tokens / sample.num_messages
            moments += [(at_s, share) for at_s in _messages(sample)]
    return _rates(moments, bucket_s(samples))


def arrivals_per_s(samples: Sequence[Sample]) -> list[Point]:
    return _rates([(sample.at_s, 1.0) for sample in samples], bucket_s(samples))


def in_flight(samples: Sequence[Sample]) -> list[Point]:
    """Requests under way, at the middle of each bucket; one that failed without a token counts
    for its arrival only."""
    width_s = bucket_s(samples)
    changes = [(s.at_s, 1) for s in samples]
    changes += [(s.at_s + (s.e2e_s or 0.0), -1) for s in samples]
    changes.sort()
    points, level, place = [], 0, 0
    num_buckets = int(changes[-1][0] / width_s) + 1 if changes else 0
    for bucket in range(num_buckets):
        middle_s = (bucket + 0.5) * width_s
        while place < len(changes) and changes[place][0] <= middle_s:
            level += changes[place][1]
            place += 1
        points.append((middle_s, float(level)))
    return points


def window_of(arrivals: Sequence[Sequence[float]], num_steps: int) -> Window:
    """When all streams decoded: at most `num_steps` steps, from some steps after the last stream's
    first token on. `arrivals`: by stream, when each of its tokens came, in seconds of one clock.

    Raises:
        ValueError: there was no such time.
    """
    begin = max(stream[NUM_WARM_UP] for stream in arrivals)
    end = min(stream[-1] for stream in arrivals)
    behind = [sum(at <= begin for at in stream) for stream in arrivals]
    for num_before, stream in zip(behind, arrivals, strict=True):
        end = min([end, *stream[num_before:][num_steps - 1 : num_steps]])
    counts = [sum(begin < at <= end for at in stream) for stream in arrivals]
    if end <= begin or min(counts) == 0:
        raise ValueError("the streams did not decode at the same time")
    steps = statistics.mean(counts)
    return Window((end - begin) / steps, round(statistics.mean(behind)), round(steps))


def _messages(sample: Sample) -> Iterator[float]:
    at_s = sample.at_s + (sample.ttft_s or 0.0)
    yield at_s
    for gap_s in sample.gaps_s:
        at_s += gap_s
        yield at_s


def _rates(moments: Sequence[tuple[float, float]], width_s: float) -> list[Point]:
    if not moments:
        return []
    sums = [0.0] * (int(max(at_s for at_s, _ in moments) / width_s) + 1)
    for at_s, amount in moments:
        sums[int(at_s / width_s)] += amount
    return [((index + 0.5) * width_s, total / width_s) for index, total in enumerate(sums)]
