"""Prompts wait while streams are slower than their goal, and are never stuck."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from baton.services.prefill.pacing import Pacing
from baton.services.worker.stepper import BatchLimits, Stepper
from baton.shared.sampling import SamplingParams
from tests.unit.worker.conftest import MakeRunner
from tests.unit.worker.test_steps_ahead import NUM_BLOCKS, Bench

GOAL_S = 0.010


def paced(seconds: float, num_steps: int = 1000) -> Pacing:
    """After steps of that length beside streams."""
    pacing = Pacing(GOAL_S)
    for _ in range(num_steps):
        pacing.took_step(seconds, num_decoding=3)
    return pacing


def test_chunks_go_along_as_long_as_the_mean_is_within_the_goal() -> None:
    assert paced(0.009).may_take_chunks(100.0, num_decoding=3)
    slow = paced(0.011)
    assert slow.may_take_chunks(100.0, num_decoding=3)
    assert not slow.may_take_chunks(100.9, num_decoding=3)
    # One long step among short ones is no harm; a second one a hundred steps later neither.
    pacing = paced(0.006)
    pacing.took_step(0.200, num_decoding=3)
    assert pacing.may_take_chunks(200.0, num_decoding=3)
    for _ in range(3):
        pacing.took_step(0.200, num_decoding=3)
    assert not pacing.may_take_chunks(200.1, num_decoding=3)
    for _ in range(100):
        pacing.took_step(0.006, num_decoding=3)
    assert pacing.may_take_chunks(200.2, num_decoding=3)


def test_a_chunk_a_second_goes_along_in_any_case() -> None:
    slow = paced(0.030)
    went = [
        at_ms
        for at_ms in range(10_000, 14_000, 30)
        if slow.may_take_chunks(at_ms / 1e3, num_decoding=3)
    ]
    assert len(went) == 4


def test_without_streams_or_without_a_goal_prompts_never_wait() -> None:
    slow = paced(0.030)
    assert all(slow.may_take_chunks(10.0, num_decoding=0) for _ in range(9))
    free = Pacing(None)
    free.took_step(9.0, num_decoding=3)
    assert all(free.may_take_chunks(10.0, num_decoding=3) for _ in range(9))


def test_steps_of_prompts_alone_say_nothing_of_streams() -> None:
    pacing = paced(0.009)
    for _ in range(100):
        pacing.took_step(0.050, num_decoding=0)
    assert pacing.may_take_chunks(100.0, num_decoding=3)


@pytest.mark.parametrize("goal_s", [None, 1e-9])
def test_a_prompt_waits_for_slow_streams_and_all_get_the_same_tokens(
    make_runner: MakeRunner, monkeypatch: pytest.MonkeyPatch, goal_s: float | None
) -> None:
    """No step is as fast as that goal, and the second after which a chunk goes along never ends."""
    frozen_s = time.monotonic()
    monkeypatch.setattr(
        "baton.services.worker.stepper.time", SimpleNamespace(monotonic=lambda: frozen_s)
    )
    bench = Bench(make_runner(NUM_BLOCKS))
    stepper = bench.engine._stepper
    assert isinstance(stepper, Stepper)
    limits = BatchLimits(token_budget=16, max_num_seqs=4, tpot_goal_s=goal_s)
    stepper._limits, stepper.pacing = limits, Pacing(limits.tpot_goal_s)
    greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    bench.start(0, (5, 9, 13, 7), greedy)
    for _ in range(4):
        bench.step()
    bench.start(1, tuple(range(1, 30)), greedy)
    while not bench.tokens[1]:
        bench.step()
    assert (len(bench.tokens[0]) == 12) == (goal_s is not None)
    bench.run()
    alone = Bench(make_runner(NUM_BLOCKS))
    alone.start(1, tuple(range(1, 30)), greedy)
    alone.run()
    assert bench.tokens[1] == alone.tokens[1]
    assert not bench.failures
