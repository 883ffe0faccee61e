"""What is offered to an endpoint: one flat record, which can travel to the shards as JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

ARRIVALS = ("poisson", "constant", "bursty", "closed", "trace")
MAX_REQUESTS = 1_000_000
_OTHER_SEED = 999_999


class LoadError(Exception):
    """The load that was asked for is not possible. The message is one line."""


@dataclass(frozen=True)
class Load:
    """What is offered. Lengths in tokens are written as in lengths.py: `512`, `uniform:64:512`.

    poisson, constant, bursty  `rate` conversations a second, for `duration_s`, or `num_requests`
    closed                     `num_streams` clients that each wait for their answer, likewise
    trace                      arrivals, lengths and shared prefixes of the file `trace`
    """

    target: str
    """grpc://HOST:PORT, http://HOST:PORT or https://HOST:PORT."""
    prompt_tokens: str = "512"
    output_tokens: str = "64"
    arrivals: str = "closed"
    rate: float = 0.0
    burstiness: float = 2.0
    """Of `bursty`: coefficient of variation of the time between arrivals; Poisson has 1."""
    num_streams: int = 1
    num_requests: int | None = None
    duration_s: float | None = None
    num_prefixes: int = 0
    """Groups of prompts that begin with the same `prefix_tokens` tokens; 0: none do."""
    prefix_tokens: int = 0
    num_turns: int = 1
    """Of a conversation: each turn's prompt is all that was said before, and `prompt_tokens`."""
    think_s: float = 0.0
    """From an answer to the next turn."""
    trace: str | None = None
    time_scale: float = 1.0
    """0.1 replays a trace ten times as fast."""
    window_s: tuple[float, float] | None = None
    """From and to, in the trace's own time."""
    length_scale: float = 1.0
    max_prompt: int | None = None
    max_output: int | None = None
    model: str = ""
    vocab_size: int = 1024
    seed: int = 0
    drain_s: float = 30.0
    """After the last arrival; what is not finished then is given up."""
    timeout_s: float = 600.0
    """For one request."""

    def at(self, rate: float, *, seed: int) -> Load:
        return replace(self, arrivals="poisson", rate=rate, seed=seed)

    def in_turn(self, num_requests: int, *, num_streams: int, output_tokens: int) -> Load:
        """The load for warming up: a closed loop, with requests that occur at no rate."""
        return replace(
            self,
            arrivals="closed",
            num_requests=num_requests,
            duration_s=None,
            num_streams=num_streams,
            output_tokens=str(output_tokens),
            seed=_OTHER_SEED,
        )

    @property
    def is_closed(self) -> bool:
        return self.arrivals == "closed"

    def check(self) -> None:
        """Raises LoadError, naming the flag."""
        _check(self.arrivals in ARRIVALS, f"--arrivals: one of {', '.join(ARRIVALS)}")
        if self.arrivals in ("poisson", "constant", "bursty"):
            is_rate = math.isfinite(self.rate) and self.rate > 0
            _check(is_rate, f"--rate: more than 0 requests a second, not {self.rate:g}")
            planned = self.rate * self.duration_s if self.duration_s is not None else 0
            _check(
                planned <= MAX_REQUESTS,
                f"--rate {self.rate:g} for {self.duration_s or 0:g} s would be {planned:.3g}"
                f" requests; at most {MAX_REQUESTS:,}",
            )
        if self.arrivals == "trace":
            _check(self.trace is not None, "--trace: name a file")
        else:
            is_bounded = self.num_requests is not None or self.duration_s is not None
            _check(is_bounded, "give --duration or --requests")
        is_burst = math.isfinite(self.burstiness) and self.burstiness > 0
        _check(is_burst, f"--burstiness: more than 0, not {self.burstiness:g}")
        is_scale = math.isfinite(self.time_scale) and self.time_scale > 0
        _check(is_scale, f"--time-scale: more than 0, not {self.time_scale:g}")
        is_scale = math.isfinite(self.length_scale) and self.length_scale > 0
        _check(is_scale, f"--length-scale: more than 0, not {self.length_scale:g}")
        _check(self.num_streams > 0, "--streams: at least 1")
        _check(self.num_turns > 0, "--turns: at least 1")
        _check(self.think_s >= 0, "--think-time: not negative")
        _check(self.vocab_size > 0, "--vocab-size: at least 1")
        _check(self.timeout_s > 0, "--timeout: more than 0 seconds")
        _check(self.num_prefixes >= 0 and self.prefix_tokens >= 0, "--prefixes: not negative")
        in_range = self.num_requests is None or 0 < self.num_requests <= MAX_REQUESTS
        _check(in_range, f"--requests: 1 to {MAX_REQUESTS:,}")
        is_time = self.duration_s is None or (
            math.isfinite(self.duration_s) and self.duration_s > 0
        )
        _check(is_time, "--duration: more than 0 seconds")
        for flag, most in (("--max-prompt", self.max_prompt), ("--max-output", self.max_output)):
            _check(most is None or most > 0, f"{flag}: at least 1")


def _check(is_right: bool, problem: str) -> None:
    if not is_right:
        raise LoadError(problem)
