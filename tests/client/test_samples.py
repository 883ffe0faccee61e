"""Several answers to one prompt, and a stream of them that breaks."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from baton_client import InvalidRequest, ServerError

from baton.v1 import inference_service_pb2 as pb
from baton.v1 import types_pb2
from tests.client.asking import Asker
from tests.client.scripted import NUM_PROMPT_TOKENS, SEED, Context, ScriptedGateway

ANSWERS = ((100, 101, 102, 103), (200,), (300, 301, 302))
TEXTS = tuple("".join(f" {token_id}" for token_id in answer) + "~" for answer in ANSWERS)


class SamplesGateway(ScriptedGateway):
    """Brings a token of each sample in turn; the first try ends after `num_messages` of these and
    of ends, as `ending` says."""

    def __init__(self, num_messages: int = 0, *, stray: pb.GenerateResponse | None = None) -> None:
        super().__init__()
        self._num_messages = num_messages
        self._stray = stray

    def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> Iterator[pb.GenerateResponse]:
        self.requests.append(request)
        yield pb.GenerateResponse(
            started=pb.GenerateStarted(
                request_id="r", seed=SEED, num_prompt_tokens=NUM_PROMPT_TOKENS
            )
        )
        messages = list(_messages(request))
        if len(self.requests) == 1 and self._num_messages:
            yield from messages[: self._num_messages]
            context.abort(grpc.StatusCode.UNAVAILABLE, "broken")
        yield from messages
        if self._stray is not None:
            yield self._stray


def _messages(request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
    received = [list(each.token_ids) for each in request.received_samples] or [[]] * request.n
    assert len(received) == request.n == len(ANSWERS)
    for index in range(5):
        for sample, (answer, had) in enumerate(zip(ANSWERS, received, strict=True)):
            if len(had) <= index < len(answer):
                chunk = pb.GenerateChunk(
                    sample=sample,
                    first_index=index,
                    token_ids=[answer[index]],
                    text=f" {answer[index]}",
                )
                yield pb.GenerateResponse(chunk=chunk)
            if index == max(len(answer), 1):
                finished = pb.GenerateFinished(
                    sample=sample,
                    finish_reason=types_pb2.FINISH_REASON_LENGTH,
                    text="~",
                    usage=pb.Usage(
                        num_prompt_tokens=NUM_PROMPT_TOKENS, num_completion_tokens=len(answer)
                    ),
                    num_attempts=1,
                )
                yield pb.GenerateResponse(finished=finished)


@pytest.mark.parametrize("num_messages", range(11))
def test_all_answers_come_whole_wherever_it_breaks(asker: Asker, num_messages: int) -> None:
    with SamplesGateway(num_messages) as gateway:
        outcome = asker.generate(gateway.address, prompt="x", n=3)
        first, *others = gateway.requests
    assert outcome.error is None
    assert outcome.answers is not None
    assert tuple(answer.token_ids for answer in outcome.answers) == ANSWERS
    assert tuple(answer.text for answer in outcome.answers) == TEXTS
    assert outcome.answer == outcome.answers[0] and outcome.token_ids == ANSWERS[0]
    for sample, text in enumerate(TEXTS):
        assert "".join(c.text for c in outcome.chunks if c.sample == sample) == text
    assert first.n == 3 and not first.received_samples
    assert len(others) == min(num_messages, 1)
    for request in others:
        assert (request.n, request.sampling.seed) == (3, SEED)
        came = [list[int]() for _ in ANSWERS]
        for message in list(_messages(first))[:num_messages]:
            came[message.chunk.sample] += message.chunk.token_ids
        assert [list(each.token_ids) for each in request.received_samples] == came


@pytest.mark.parametrize(
    ("stray", "complaint"),
    [
        (pb.GenerateChunk(sample=3, token_ids=[5]), "sample 3 came, of 3 that were asked for"),
        (pb.GenerateChunk(sample=1, first_index=1, token_ids=[5]), "sample 1, which had ended"),
    ],
)
def test_what_belongs_to_no_sample_is_refused(
    asker: Asker, stray: pb.GenerateChunk, complaint: str
) -> None:
    with SamplesGateway(stray=pb.GenerateResponse(chunk=stray)) as gateway:
        outcome = asker.generate(gateway.address, prompt="x", n=3)
    assert isinstance(outcome.error, ServerError) and complaint in outcome.error.message


def test_numbers_that_no_message_holds(asker: Asker) -> None:
    for n in (-1, 2**32):
        outcome = asker.generate("127.0.0.1:1", prompt="x", n=n)
        assert isinstance(outcome.error, InvalidRequest) and outcome.error.field == "n"
