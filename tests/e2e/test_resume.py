"""Resuming: with the tokens that it has, and the seed, a client gets exactly the rest."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import grpc
import pytest

from baton.services.gateway.tokenizer import StreamDecoder, TextCodec
from baton.v1 import inference_service_pb2, types_pb2
from tests.e2e.harness import Result, Stack, collect
from tests.e2e.oracle import Ask, Oracle

pytestmark = pytest.mark.e2e

DEMO = Path(__file__).parents[2] / "models" / "demo"
PROMPT = "In the beginning God created the heaven and the earth. And the earth was"
NUM_TOKENS = 48
STOP, LENGTH = types_pb2.FINISH_REASON_STOP, types_pb2.FINISH_REASON_LENGTH
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "top_p": 0.95, "top_k": 200, "min_p": 0.01},
    # Draws any token, those among them that are only a part of a character.
    "wild": {"temperature": 100.0},
    # What a client has already counts, and so does the beginning of a bad word in it.
    "penalties and bans": {
        "temperature": 0.8,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.2,
        "min_tokens": NUM_TOKENS - 4,
        "logit_bias": {20: -100.0},
        "bad_words": ["the earth", "darkness", "God said"],
    },
}


@pytest.fixture
def stack(demo_stack: Stack) -> Stack:
    return demo_stack


@pytest.fixture(scope="module")
def demo_oracle() -> Oracle:
    return Oracle(DEMO)


@dataclass(frozen=True)
class Part:
    """What a client has when its stream breaks after some message."""

    token_ids: list[int]
    text: str


def parts_of(stack: Stack, **options: Any) -> tuple[Result, list[Part]]:
    """A whole answer, and what the client had after each of its chunks."""
    responses = list(stack.start(PROMPT, **options))
    result, parts = collect(iter(responses)), [Part([], "")]
    for response in responses:
        if response.HasField("chunk"):
            last, chunk = parts[-1], response.chunk
            parts.append(Part([*last.token_ids, *chunk.token_ids], last.text + chunk.text))
    return result, parts


def assert_resumes(stack: Stack, whole: Result, part: Part, **options: Any) -> None:
    """Token ids, text, seed, reason and usage are those of the answer that never broke."""
    rest = stack.generate(PROMPT, received=part.token_ids, **{"seed": whole.seed, **options})
    assert [*part.token_ids, *rest.token_ids] == whole.token_ids
    assert part.text + rest.text == whole.text
    assert rest.seed == whole.seed
    assert rest.finish_reason == whole.finish_reason
    usage, whole_usage = rest.finished.usage, whole.finished.usage
    assert usage.num_prompt_tokens == whole_usage.num_prompt_tokens == whole.num_prompt_tokens
    assert usage.num_completion_tokens == whole_usage.num_completion_tokens


@pytest.mark.parametrize("name", SAMPLINGS)
def test_rest_follows_after_any_number_of_tokens(stack: Stack, name: str) -> None:
    options = {**SAMPLINGS[name], "max_tokens": NUM_TOKENS}
    whole, parts = parts_of(stack, **options)
    assert len(whole.token_ids) == NUM_TOKENS and whole.finish_reason == LENGTH
    assert whole.text
    for part in [*parts[1:4], *parts[14:19], *parts[-8:]]:
        assert_resumes(stack, whole, part, **options)
    stack.assert_idle()


def test_stream_that_is_cut_off_goes_on(stack: Stack) -> None:
    """As a client would: it keeps what came, hangs up, and asks again; more than once."""
    options = {**SAMPLINGS["sampled"], "max_tokens": NUM_TOKENS}
    token_ids: list[int] = []
    text, seed = "", dict[str, Any]()
    for _ in range(3):
        stream = stack.start(PROMPT, received=token_ids, **options, **seed)
        num_wanted = len(token_ids) + 10
        for response in stream:
            if response.HasField("started"):
                seed = {"seed": response.started.seed}
            token_ids = [*token_ids, *response.chunk.token_ids]
            text += response.chunk.text
            if len(token_ids) >= num_wanted:
                break
        assert isinstance(stream, grpc.Call)
        stream.cancel()
    rest = stack.generate(PROMPT, received=token_ids, **options, **seed)
    whole = stack.generate(PROMPT, **options, **seed)
    assert [*token_ids, *rest.token_ids] == whole.token_ids
    assert text + rest.text == whole.text
    stack.assert_idle()


def test_nothing_is_left_of_a_complete_answer(stack: Stack) -> None:
    """No worker is asked; the text that was held back to the end still comes."""
    for name, sampling in SAMPLINGS.items():
        options = {**sampling, "max_tokens": NUM_TOKENS, "seed": 5}
        whole, parts = parts_of(stack, **options)
        rest = stack.generate(PROMPT, received=whole.token_ids, **options)
        assert (rest.token_ids, rest.finish_reason, rest.attempts) == ([], LENGTH, 0), name
        assert parts[-1].text + rest.text == whole.text
        assert rest.finished.usage.num_completion_tokens == NUM_TOKENS
        assert rest.finished.decode_worker_id == rest.finished.prefill_worker_id == ""
        assert not rest.finished.timing.HasField("ttft_time")


def test_received_stop_token_is_the_end(stack: Stack, demo_oracle: Oracle) -> None:
    token_ids = list(stack.generate(PROMPT, max_tokens=10).token_ids)
    options = {"max_tokens": 30}
    for eos in demo_oracle.eos_token_ids:
        received = [*token_ids, eos]
        ended = stack.generate(PROMPT, received=received, ignore_eos=False, **options)
        assert (ended.token_ids, ended.text, ended.finish_reason) == ([], "", STOP)
        assert ended.finished.usage.num_completion_tokens == 11
        goes_on = stack.generate(PROMPT, received=received, **options)
        prompt = tokens_of(stack, PROMPT)
        expected = demo_oracle.answer(Ask([*prompt, *received], {"max_tokens": 19}))
        assert (goes_on.token_ids, goes_on.finish_reason) == (expected, LENGTH)
    by_id = stack.generate(PROMPT, received=token_ids, stop_token_ids=[token_ids[-1]], **options)
    assert (by_id.token_ids, by_id.finish_reason) == ([], STOP)


def test_stop_string_across_tokens(stack: Stack) -> None:
    """The text ends before it, the tokens with the one that completes it; resumed or not."""
    options = {**SAMPLINGS["sampled"], "max_tokens": NUM_TOKENS, "seed": 1}
    whole = stack.generate(PROMPT, **options)
    ends = text_ends(whole.token_ids)
    assert ends[-1] == len(whole.text)
    for first, end in stops_across_tokens(whole.text, ends):
        stop = whole.text[first:end]
        with_stops = {**options, "stops": [f"{stop}\0", stop, "\0"]}
        stopped, parts = parts_of(stack, **with_stops)
        num_used = next(n for n, text_end in enumerate(ends) if text_end >= end)
        assert stopped.text == whole.text[:first]
        assert stopped.token_ids == whole.token_ids[:num_used]
        assert stopped.finish_reason == STOP
        assert stopped.finished.usage.num_completion_tokens == num_used
        for part in [*parts[1:3], *parts[-4:]]:
            assert_resumes(stack, stopped, part, **with_stops)
    stack.assert_idle()


def text_ends(token_ids: list[int]) -> list[int]:
    """Length of the text after 0, 1, 2, … tokens."""
    codec = TextCodec.load(DEMO)
    assert codec is not None
    decoder = StreamDecoder(codec, [])
    ends = [0, *accumulate(len(decoder.push([token_id]).text) for token_id in token_ids)]
    codec.close()
    return ends


def stops_across_tokens(text: str, ends: list[int]) -> list[tuple[int, int]]:
    """Places (start, end) that begin in one token and end in the next, or in the one after it,
    and are the first with that text."""
    places = [
        (ends[n] - 1, ends[n + n % 2] + 1)
        for n in range(5, NUM_TOKENS - 3)
        if ends[n - 1] < ends[n] and ends[n + n % 2] < ends[n + n % 2 + 1]
    ]
    places = [(first, end) for first, end in places if text.find(text[first:end]) == first]
    assert len(places) >= 4
    return places[:: len(places) // 4][:4]


def tokens_of(stack: Stack, text: str) -> list[int]:
    request = inference_service_pb2.TokenizeRequest(text=text, add_special_tokens=True)
    return list(stack.stub.Tokenize(request, timeout=10).token_ids)


def test_answer_to_text_is_that_to_its_tokens(stack: Stack, demo_oracle: Oracle) -> None:
    """The demo model through the whole path equals the plain loop, token by token and as text."""
    prompt = tokens_of(stack, PROMPT)
    ask = Ask(prompt, {"temperature": 0.7, "seed": 2, "max_tokens": NUM_TOKENS})
    by_text = stack.generate(PROMPT, **ask.sampling)
    by_tokens = stack.generate(prompt, **ask.sampling)
    assert by_text.token_ids == by_tokens.token_ids == demo_oracle.answer(ask)
    request = inference_service_pb2.DetokenizeRequest(
        token_ids=by_text.token_ids, skip_special_tokens=True
    )
    assert by_text.text == by_tokens.text == stack.stub.Detokenize(request, timeout=10).text
