"""Pools too small for all that runs: some wait, some are preempted, and nobody can tell."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import Stack
from tests.faults.conftest import Oracle, make_prompt
from tests.faults.streams import Background, events

pytestmark = pytest.mark.e2e

logger = logging.getLogger(__name__)

NUM_BLOCKS = 24
NUM_SEQUENCES = 8
SPLIT = {"prefill-0": "prefill", "decode-0": "decode"}
TOGETHER = {"both-0": "both"}
split_only = pytest.mark.parametrize("stack", [SPLIT], indirect=True, ids=["split"])
"""For what is the prefill worker's matter."""


@pytest.fixture(scope="module", params=[SPLIT, TOGETHER], ids=["split", "both"])
def stack(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    with Stack(
        tiny_model,
        tmp_path_factory.mktemp("small"),
        request.param,
        flags=["--num-blocks", str(NUM_BLOCKS)],
    ) as stack:
        yield stack


def test_answers_that_outgrow_the_pool_are_preempted_and_complete(
    stack: Stack, oracle: Oracle
) -> None:
    # 2 blocks each at first: all are admitted; 8 each in the end: three fit.
    streams = _start_all(stack, "growing", num_prompt=30, num_answer=90)

    _assert_undisturbed(streams, oracle)
    num_preemptions = _num_preemptions(stack)
    assert num_preemptions > 0
    attempts = [stream.result().attempts for stream in streams]
    assert sum(attempts) - len(attempts) >= num_preemptions
    # The first in the pool is never preempted for a later one.
    assert 1 in attempts
    logger.info("%d preemptions, attempts %s", num_preemptions, attempts)
    stack.assert_idle()


@split_only
def test_prompts_that_do_not_fit_together_take_turns(stack: Stack, oracle: Oracle) -> None:
    # 11 blocks each: two fit.
    streams = _start_all(stack, "long", num_prompt=170, num_answer=8)

    _assert_undisturbed(streams, oracle)
    host = _workers(stack)[0]
    admitted_at = sorted(_first_at(stack, host, "admitted", stream) for stream in streams)
    computed_at = [_first_at(stack, host, "chunk", stream) for stream in streams]
    assert admitted_at[2] > min(computed_at)
    stack.assert_idle()


@split_only
def test_a_prompt_of_the_whole_pool_waits_for_it_and_gets_it(stack: Stack, oracle: Oracle) -> None:
    streams = _start_all(stack, "small", num_prompt=30, num_answer=60)
    prompt = make_prompt("whole pool", NUM_BLOCKS * 16 - 4)
    streams.append(Background(stack, prompt, max_tokens=4))
    streams.append(Background(stack, make_prompt("after it", 30), max_tokens=30))

    _assert_undisturbed(streams, oracle)
    stack.assert_idle()


def test_samples_of_one_prompt_that_outgrow_the_pool_are_preempted_and_complete(
    stack: Stack, oracle: Oracle
) -> None:
    # A block of the prompt is shared; seven each beside it in the end: three fit.
    sampling = {"max_tokens": 88, "temperature": 1.0, "seed": 5}
    prompt = make_prompt("samples", 30)
    expected = [oracle(prompt, sample=sample, **sampling) for sample in range(4)]
    # A busy machine may end the first before the last begins, which the next time has its prompt
    # in the cache.
    for _ in range(5):
        num_before = _num_preemptions(stack)
        results = Background(stack, prompt, n=4, **sampling).results()
        assert [result.token_ids for result in results] == expected
        attempts = [result.attempts for result in results]
        if _num_preemptions(stack) > num_before and 1 in attempts and max(attempts) > 1:
            break
    else:
        raise AssertionError("no sample had to yield")
    stack.assert_idle()


def _num_preemptions(stack: Stack) -> int:
    return sum(stack.state(name).counters.num_preemptions for name in _workers(stack))


def _start_all(stack: Stack, name: str, *, num_prompt: int, num_answer: int) -> list[Background]:
    """Every other one greedy."""
    return [
        Background(
            stack,
            make_prompt((name, index), num_prompt),
            max_tokens=num_answer,
            temperature=float(index % 2),
            seed=index,
        )
        for index in range(NUM_SEQUENCES)
    ]


def _assert_undisturbed(streams: list[Background], oracle: Oracle) -> None:
    for stream in streams:
        assert stream.result().token_ids == oracle(stream.prompt, **stream.sampling)


def _first_at(stack: Stack, worker: str, event: str, stream: Background) -> float:
    return min(float(str(e["t"])) for e in events(stack, worker, event, stream.request_id))


def _workers(stack: Stack) -> list[str]:
    return [name for name in stack.processes if name != "gateway"]
