"""Several samples of one prompt: each is what it is alone, and the prompt is computed once."""

from __future__ import annotations

import random
from typing import Any

import grpc
import pytest

from tests.e2e.harness import Result, Stack, collect_samples
from tests.e2e.oracle import Ask, Oracle
from tests.e2e.test_shared_prefix import NewCounts

pytestmark = pytest.mark.e2e

BLOCK_SIZE = 16
DRAWN: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "seed": 11, "max_tokens": 24}


@pytest.fixture
def stack(tiny_stack: Stack) -> Stack:
    return tiny_stack


def prompt_of(num_tokens: int) -> list[int]:
    source = random.Random(f"samples {num_tokens}")
    return [source.randrange(3, 512) for _ in range(num_tokens)]


def token_ids(results: list[Result]) -> list[list[int]]:
    return [result.token_ids for result in results]


@pytest.mark.parametrize("num_prompt", [5, 203, 208])
def test_a_sample_is_the_same_alone_and_among_others(
    stack: Stack, oracle: Oracle, num_prompt: int
) -> None:
    """Whatever n is; and of the prompt only what fills no block is computed again."""
    prompt = prompt_of(num_prompt)
    expected = [oracle.answer(Ask(prompt, DRAWN, sample)) for sample in range(5)]
    computed, pulled = NewCounts(stack, "p0"), NewCounts(stack, "d0")

    results = stack.samples(prompt, n=5, **DRAWN)

    assert token_ids(results) == expected
    assert len({tuple(each) for each in expected}) == 5
    assert [result.attempts for result in results] == [1] * 5
    # A hit covers at most all tokens but the last.
    num_hit = (num_prompt - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert num_prompt - num_hit <= BLOCK_SIZE
    assert computed("num_computed_prompt_tokens") == num_prompt + 4 * (num_prompt - num_hit)
    assert computed("num_cached_prompt_tokens") == 4 * num_hit
    num_blocks = -(-num_prompt // BLOCK_SIZE)
    assert pulled("num_pulled_blocks") == num_blocks + 4 * (num_blocks - num_hit // BLOCK_SIZE)
    assert pulled("num_computed_prompt_tokens") == 0
    for result in results:
        usage = result.finished.usage
        assert (usage.num_prompt_tokens, usage.num_completion_tokens) == (num_prompt, 24)
        assert usage.num_cached_tokens == 0
    assert token_ids(stack.samples(prompt, n=2, **DRAWN)) == expected[:2]
    assert stack.generate(prompt, **DRAWN).token_ids == expected[0]
    stack.assert_idle()


def test_greedy_samples_are_equal(stack: Stack, oracle: Oracle) -> None:
    prompt = prompt_of(70)
    results = stack.samples(prompt, n=3, max_tokens=20)
    assert token_ids(results) == [oracle.answer(Ask(prompt, {"max_tokens": 20}))] * 3


def test_a_broken_stream_of_samples_goes_on(stack: Stack, oracle: Oracle) -> None:
    """The client keeps what came of each, hangs up, and asks for the rest of all."""
    prompt = prompt_of(90)
    stream = stack.start(prompt, n=3, **DRAWN)
    received: list[list[int]] = [[], [], []]
    for response in stream:
        if response.HasField("chunk"):
            received[response.chunk.sample] += response.chunk.token_ids
            if min(map(len, received)) > 3:
                break
    assert isinstance(stream, grpc.Call)
    stream.cancel()
    rest = stack.samples(prompt, n=3, received_samples=received, **DRAWN)
    whole = [[*had, *result.token_ids] for had, result in zip(received, rest, strict=True)]
    assert whole == [oracle.answer(Ask(prompt, DRAWN, sample)) for sample in range(3)]
    stack.assert_idle()


def test_a_cancelled_request_leaves_nothing(stack: Stack) -> None:
    """Before its first token, and in the middle of all samples."""
    for num_chunks in (0, 20):
        stream = stack.start(prompt_of(150 + num_chunks), n=6, **{**DRAWN, "max_tokens": 800})
        assert next(stream).HasField("started")
        for _ in range(num_chunks):
            assert next(stream).HasField("chunk")
        assert isinstance(stream, grpc.Call)
        stream.cancel()
        stack.assert_idle()


def test_nobody_waits_for_who_does_not_read(stack: Stack, oracle: Oracle) -> None:
    """Workers are done with all samples before the first of them is read; none of it is lost."""
    prompt = prompt_of(60)
    sampling = {**DRAWN, "max_tokens": 60}
    stream = stack.start(prompt, n=4, **sampling)
    counted = NewCounts(stack, "d0")
    stack.wait_until(lambda: counted("num_generated_tokens") >= 4 * 60)
    stack.assert_idle()
    results = collect_samples(stream, 4)
    assert token_ids(results) == [oracle.answer(Ask(prompt, sampling, i)) for i in range(4)]
