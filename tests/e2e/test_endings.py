"""How an answer ends: end-of-sequence, stop tokens, its length; on the first token too."""

from __future__ import annotations

import random
from itertools import accumulate
from typing import Any

import grpc
import pytest

from baton.v1 import inference_service_pb2_grpc, types_pb2
from tests.e2e.harness import Stack
from tests.e2e.oracle import Ask, Oracle

pytestmark = pytest.mark.e2e

STOP, LENGTH = types_pb2.FINISH_REASON_STOP, types_pb2.FINISH_REASON_LENGTH


@pytest.fixture
def stack(tiny_stack: Stack) -> Stack:
    return tiny_stack


@pytest.fixture(scope="module")
def ask_with_eos(oracle: Oracle) -> Ask:
    """Its answer holds an end-of-sequence token, neither first nor last."""
    source = random.Random(0)
    prompt = [source.randrange(3, 512) for _ in range(40)]
    # Nearly uniform draws: of 4,096 some eight are the token that is looked for.
    asks = [
        Ask(prompt, {"temperature": 100.0, "seed": seed, "max_tokens": 64}) for seed in range(64)
    ]
    answers = oracle.answers_of_batch(asks)
    return next(
        ask
        for ask, answer in zip(asks, answers, strict=True)
        if set(answer[2:60]) & set(oracle.eos_token_ids)
    )


def with_fields(ask: Ask, **sampling: Any) -> Ask:
    return Ask(ask.prompt, {**ask.sampling, **sampling})


def first_eos(ask: Ask, oracle: Oracle) -> int:
    answer = oracle.answer(ask)
    return min(answer.index(eos) for eos in oracle.eos_token_ids if eos in answer)


def assert_ends(stack: Stack, ask: Ask, expected: list[int], reason: int) -> None:
    result = stack.generate(ask.prompt, **ask.sampling)
    assert result.token_ids == expected
    assert result.finish_reason == reason
    assert result.attempts == 1
    usage = result.finished.usage
    assert usage.num_completion_tokens == len(expected)
    assert usage.num_prompt_tokens == result.num_prompt_tokens == len(ask.prompt)


def test_end_of_sequence_ends_unless_ignored(
    stack: Stack, oracle: Oracle, ask_with_eos: Ask
) -> None:
    whole = oracle.answer(ask_with_eos)
    end = first_eos(ask_with_eos, oracle) + 1
    assert len(whole) == 64 > end
    assert_ends(stack, ask_with_eos, whole, LENGTH)
    assert_ends(stack, with_fields(ask_with_eos, ignore_eos=False), whole[:end], STOP)
    stack.assert_idle()


def test_end_of_sequence_as_the_first_token(
    stack: Stack, oracle: Oracle, ask_with_eos: Ask
) -> None:
    """The prefill worker ends the sequence; the decode worker must let go of it too."""
    whole, first = oracle.answer(ask_with_eos), first_eos(ask_with_eos, oracle)
    longer = Ask([*ask_with_eos.prompt, *whole[:first]], ask_with_eos.sampling)
    stopping = with_fields(longer, ignore_eos=False)
    assert_ends(stack, stopping, [whole[first]], STOP)
    stack.assert_idle()
    assert_ends(stack, with_fields(longer, max_tokens=64 - first), whole[first:], LENGTH)
    stack.assert_idle()


def test_stop_token_ends_with_it(stack: Stack, oracle: Oracle) -> None:
    ask = Ask([7, 8, 9], {"temperature": 3.0, "seed": 1, "max_tokens": 30})
    whole = oracle.answer(ask)
    for stop in (whole[0], whole[1], whole[17]):
        end = whole.index(stop) + 1
        assert_ends(stack, with_fields(ask, stop_token_ids=[stop, 0]), whole[:end], STOP)
    unused = next(token_id for token_id in range(512) if token_id not in whole)
    assert_ends(stack, with_fields(ask, stop_token_ids=[unused]), whole, LENGTH)
    stack.assert_idle()


def test_one_token_needs_no_decode_worker(stack: Stack, oracle: Oracle) -> None:
    before = stack.state("d0").counters
    for num_tokens in (1, 16, 40):
        ask = Ask(list(range(10, 10 + num_tokens)), {"max_tokens": 1})
        result = stack.generate(ask.prompt, **ask.sampling)
        assert result.token_ids == oracle.answer(ask)
        assert result.finish_reason == LENGTH
        assert result.finished.prefill_worker_id == "p0"
        assert result.finished.decode_worker_id == ""
        assert not result.finished.timing.HasField("tpot_time")
    stack.assert_idle()
    assert stack.state("d0").counters == before


def test_length_ends_at_every_edge_of_a_block(stack: Stack, oracle: Oracle) -> None:
    asks = [Ask(list(range(10, 25)), {"max_tokens": n}) for n in (2, 3, 16, 17, 18, 33, 34)]
    results = stack.generate_at_once([(ask.prompt, ask.sampling) for ask in asks])
    assert [result.token_ids for result in results] == oracle.answers(asks)
    assert {result.finish_reason for result in results} == {LENGTH}
    stack.assert_idle()


def test_tokens_pile_up_for_a_slow_client(stack: Stack, oracle: Oracle) -> None:
    """It holds up nobody else, has missed nothing, and catches up in few messages."""
    ask = Ask([5, 6, 7], {"temperature": 2.0, "seed": 3, "max_tokens": 600})
    before = stack.state("d0").counters.num_generated_tokens
    options = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
    with grpc.insecure_channel(stack.processes["gateway"].address, options=options) as channel:
        stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
        stream = stack.start(ask.prompt, **ask.sampling, stub=stub)
        assert next(stream).HasField("started")
        stack.wait_until(lambda: stack.state("d0").counters.num_generated_tokens == before + 600)
        assert stack.generate([9], max_tokens=3).token_ids == oracle.answer(
            Ask([9], {"max_tokens": 3})
        )
        responses = list(stream)
    chunks = [response.chunk for response in responses if response.HasField("chunk")]
    assert [token for chunk in chunks for token in chunk.token_ids] == oracle.answer(ask)
    starts = [0, *accumulate(len(chunk.token_ids) for chunk in chunks)]
    assert [chunk.first_index for chunk in chunks] == starts[:-1]
    assert len(chunks) < 300
