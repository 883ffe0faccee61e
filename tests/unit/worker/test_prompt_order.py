"""A long prompt among short ones, in simulated time: neither waits long for the other.

A step takes as long as its tokens: 0.5 ms and 22.5 µs a token, 6.7 ms at least, as steps of an 8B
model do on an H100. What is real here is the choice of chunks.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import pytest

from baton.services.prefill.scheduler import choose_chunks
from baton.shared.kv.sequence import AttemptKey, Sequence
from baton.shared.sampling import SamplingParams

NUM_SHORT, NUM_LONG = 500, 100_000
LONG_CAME_S = 1.0
LONG_ALONE_S = NUM_LONG * 22.5e-6
"""In steps so large that what a step costs beside its tokens is nothing."""


def step_s(num_tokens: int) -> float:
    return 0.5e-3 + max(6.2e-3, num_tokens * 22.5e-6)


@dataclass
class Run:
    """Seconds from arrival to the first token."""

    short_s: list[float] = field(default_factory=list)
    long_s: float = 0.0

    @property
    def p99_s(self) -> float:
        return sorted(self.short_s)[int(len(self.short_s) * 0.99)]


def run(load: float, token_budget: int, *, with_long: bool) -> Run:
    """`load`: of short prompts alone, as a share of what can be computed."""
    generator = random.Random(7)
    came: list[tuple[float, int]] = [(LONG_CAME_S, NUM_LONG)] if with_long else []
    now = 0.0
    while now < 20.0:
        now += generator.expovariate(load / (NUM_SHORT * 22.5e-6))
        came.append((now, NUM_SHORT))
    coming = deque(sorted(came))
    prompts: dict[Sequence, float] = {}
    result = Run()
    now = 0.0
    while coming or prompts:
        if not prompts:
            now = max(now, coming[0][0])
        while coming and coming[0][0] <= now:
            came_s, num_tokens = coming.popleft()
            prompts[prompt(num_tokens)] = came_s
        chunks = choose_chunks(
            list(prompts), token_budget=token_budget, max_rows=256, block_size=16
        )
        now += step_s(sum(chunk.num_tokens for chunk in chunks))
        for chunk in chunks:
            chunk.sequence.num_scheduled_tokens += chunk.num_tokens
            if chunk.sequence.num_scheduled_tokens < chunk.sequence.num_prompt_tokens:
                continue
            waited_s = now - prompts.pop(chunk.sequence)
            if chunk.sequence.num_prompt_tokens == NUM_LONG:
                result.long_s = waited_s
            else:
                result.short_s.append(waited_s)
    return result


def prompt(num_tokens: int) -> Sequence:
    key = AttemptKey("r", 0, 1)
    made = Sequence(key, (0,) * num_tokens, SamplingParams(max_tokens=1))
    made.num_room_tokens = num_tokens
    return made


@pytest.mark.parametrize("token_budget", [512, 1024, 2048])
@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_neither_waits_long_for_the_other(load: float, token_budget: int) -> None:
    """The long one has what the short ones leave, and half as much time again is enough for it."""
    without = run(load, token_budget, with_long=False)
    beside = run(load, token_budget, with_long=True)
    assert beside.p99_s <= 3 * without.p99_s
    assert beside.long_s <= 1.5 * LONG_ALONE_S / (1 - load)


def test_the_long_one_ends_where_short_ones_alone_are_too_many() -> None:
    """An eighth of every step is its own."""
    assert run(1.2, 1024, with_long=True).long_s <= 8.5 * LONG_ALONE_S
