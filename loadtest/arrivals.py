"""When conversations begin: seconds from the start. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterator

from baton.loadtest.spec import Load


def arrivals(load: Load) -> list[float]:
    """The arrivals of an open loop without a trace; a function of the load and its seed."""
    found: list[float] = []
    at_s = 0.0
    for gap_s in _gaps(load, random.Random(f"{load.seed}/arrivals")):
        at_s += gap_s
        if load.duration_s is not None and at_s >= load.duration_s:
            break
        if load.num_requests is not None and len(found) * load.num_turns >= load.num_requests:
            break
        found.append(at_s)
    return found


def _gaps(load: Load, draw: random.Random) -> Iterator[float]:
    """Seconds between arrivals, of mean 1 / rate.

    A gamma distribution of shape 1 / cv² has the coefficient of variation cv: bursts above 1, more
    even than Poisson below.
    """
    mean_s = 1 / load.rate
    shape = 1 / load.burstiness**2
    while True:
        if load.arrivals == "constant":
            yield mean_s
        elif load.arrivals == "bursty":
            yield draw.gammavariate(shape, mean_s / shape)
        else:
            yield draw.expovariate(load.rate)
