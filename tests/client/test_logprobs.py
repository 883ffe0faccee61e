"""Logprobs as a client gets them, also where its stream broke before the first token."""

from __future__ import annotations

import pytest
from baton_client.answer import Progress, TokenLogprobs
from baton_client.errors import ServerError
from baton_client.v1 import inference_service_pb2 as pb
from baton_client.v1 import types_pb2


def told(logprob: float) -> types_pb2.TokenLogprobs:
    return types_pb2.TokenLogprobs(
        logprob=logprob, rank=1, top_token_ids=[7], top_logprobs=[logprob]
    )


def of_prompt(first: int, *logprobs: float) -> pb.GenerateResponse:
    message = types_pb2.PromptLogprobs(first_position=first, tokens=map(told, logprobs))
    return pb.GenerateResponse(prompt_logprobs=message)


def shown(logprob: float) -> TokenLogprobs:
    return TokenLogprobs(logprob, 1, ((7, logprob),))


STARTED = pb.GenerateResponse(started=pb.GenerateStarted(seed=1, num_prompt_tokens=4))
REQUEST = pb.GenerateRequest(sampling=types_pb2.SamplingParams(logprobs=1, prompt_logprobs=1))


def test_they_come_with_their_tokens_and_once() -> None:
    progress = Progress(REQUEST)
    for message in (STARTED, of_prompt(1, -1.0, -2.0)):
        assert progress.take(message) is None
    # It breaks, and all of it comes again.
    assert progress.next_request().sampling.prompt_logprobs == 1
    for message in (STARTED, of_prompt(1, -1.0, -2.0), of_prompt(3, -3.0)):
        progress.take(message)
    for index in range(2):
        chunk = pb.GenerateChunk(first_index=index, token_ids=[7], logprobs=[told(-4.0 - index)])
        taken = progress.take(pb.GenerateResponse(chunk=chunk))
        assert taken is not None and taken.logprobs == (shown(-4.0 - index),)
    progress.take(
        pb.GenerateResponse(
            finished=pb.GenerateFinished(finish_reason=types_pb2.FINISH_REASON_LENGTH)
        )
    )
    [answer] = progress.answers()
    assert answer.prompt_logprobs == (shown(-1.0), shown(-2.0), shown(-3.0))
    assert answer.logprobs == (shown(-4.0), shown(-5.0))


def test_a_gap_is_refused() -> None:
    progress = Progress(REQUEST)
    progress.take(STARTED)
    with pytest.raises(ServerError):
        progress.take(of_prompt(2, -1.0))
