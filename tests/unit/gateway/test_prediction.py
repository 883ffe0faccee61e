"""`prediction`: from both doors to the worker, and what came of it back into usage."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from baton.services.gateway.admission import AdmittedRequest, Limits, admit
from baton.services.gateway.frontend import _by_position
from baton.services.gateway.links import Events, PredictionChecked, Token
from baton.shared.directory.workers import accepted_at
from baton.shared.kv.sequence import FinishReason, Sequence
from baton.shared.rpc.errors import InvalidField, NoTokenizer
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import types_pb2
from tests.unit.gateway.null_frontend import NullFrontend, ask, serving
from tests.unit.gateway.whole_gateway import TOKEN, whole_gateway

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LIMITS = Limits(vocab_size=1000, max_model_len=64, max_pool_tokens=None)


def request_with(prediction: pb.Prediction | None) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(token_ids=[1, 2]),
        sampling=types_pb2.SamplingParams(max_tokens=4),
        prediction=prediction,
    )


def of_ids(*token_ids: int) -> pb.Prediction:
    return pb.Prediction(token_ids=pb.TokenIds(token_ids=token_ids))


async def admitted(prediction: pb.Prediction | None, *, has_tokenizer: bool) -> AdmittedRequest:
    async def encode(text: str) -> list[int]:
        return [1, *text.encode()]

    async def encode_answer(text: str) -> list[int]:
        return list(text.encode())

    return await admit(
        request_with(prediction),
        LIMITS,
        encode=encode if has_tokenizer else None,
        encode_answer=encode_answer if has_tokenizer else None,
    )


async def test_what_is_predicted() -> None:
    for prediction, token_ids in (
        (None, ()),
        (of_ids(5, 6), (5, 6)),
        (of_ids(), ()),
        # As an answer is: no start token before it.
        (pb.Prediction(text="ab"), (97, 98)),
        (pb.Prediction(text=""), ()),
    ):
        assert (await admitted(prediction, has_tokenizer=True)).prediction_token_ids == token_ids


@pytest.mark.parametrize(
    ("prediction", "message"),
    [
        (pb.Prediction(), "prediction is empty; limit: text or token_ids"),
        (
            of_ids(5, 1000),
            r"prediction.token_ids\[1\] is 1000; limit: below the vocabulary's size, 1000",
        ),
        (of_ids(*[5] * 65), "prediction.token_ids has 65 tokens; limit: 64, the model's length"),
        (pb.Prediction(text="a" * 65), "prediction.text has 65 tokens; limit: 64, the model's"),
        (pb.Prediction(text="a" * (2 << 20)), "prediction.text has 2097152 bytes; limit: 1048576"),
    ],
)
async def test_predictions_that_are_refused(prediction: pb.Prediction, message: str) -> None:
    with pytest.raises(InvalidField, match=message):
        await admitted(prediction, has_tokenizer=True)


async def test_predicted_text_needs_a_tokenizer() -> None:
    with pytest.raises(NoTokenizer, match="prediction.text needs a tokenizer"):
        await admitted(pb.Prediction(text="a"), has_tokenizer=False)


async def test_it_reaches_the_worker_and_its_counts_the_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def script(sequence: Sequence, events: Events) -> None:
        assert sequence.prediction_token_ids == (5, 6, 7)
        assert sequence.params.speculate
        events.put_nowait(PredictionChecked(2, 1))
        events.put_nowait(PredictionChecked(0, 3))
        for index, reason in ((0, None), (1, FinishReason.LENGTH)):
            events.put_nowait(Token(index, TOKEN, reason))

    async with whole_gateway(monkeypatch) as gateway:
        gateway.script = script
        answer = await gateway.ask_grpc(request_with(of_ids(5, 6, 7)))
        usage = answer[-1].finished.usage
        accepted, rejected = (
            usage.num_accepted_prediction_tokens,
            usage.num_rejected_prediction_tokens,
        )
        assert (accepted, rejected) == (2, 4)
        with pytest.raises(grpc.aio.AioRpcError, match="prediction is empty"):
            await gateway.ask_grpc(request_with(pb.Prediction()))


async def test_who_wants_no_speculation(monkeypatch: pytest.MonkeyPatch) -> None:
    async with whole_gateway(monkeypatch) as gateway:
        for given in ({}, {"speculate": None}, {"speculate": True}, {"speculate": False}):
            body: dict[str, Any] = {"prompt": [1, 2], "max_tokens": 1, **given}
            assert (await gateway.ask_http(body)).status == 200
        wants = [sequence.params.speculate for _, sequence in gateway.started]
        assert wants == [True, True, True, False]
        reply = await gateway.ask_http({"prompt": [1], "speculate": "no"})
        assert (reply.status, reply.error["param"]) == (400, "speculate")


@pytest.fixture
def frontend() -> NullFrontend:
    return NullFrontend()


@pytest.fixture
async def address(frontend: NullFrontend) -> AsyncIterator[str]:
    async with serving(frontend) as endpoint:
        yield endpoint.address


@pytest.mark.parametrize(
    "content", ["a b", ["a ", "b"], [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]]
)
async def test_the_forms_that_http_knows(
    address: str, frontend: NullFrontend, content: object
) -> None:
    body = {"prompt": "x", "prediction": {"type": "content", "content": content}}
    reply = await ask(address, COMPLETIONS, body)
    assert json.loads(reply.body)["usage"]["completion_tokens_details"] == {
        "accepted_prediction_tokens": 0,
        "rejected_prediction_tokens": 0,
    }
    assert frontend.requests[-1].prediction.text == "a b"
    reply = await ask(address, COMPLETIONS, {"prompt": "x", "prediction": None})
    assert "completion_tokens_details" not in json.loads(reply.body)["usage"]
    assert not frontend.requests[-1].HasField("prediction")


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    ("prediction", "param"),
    [
        ("text", "prediction"),
        ({"content": "x"}, "prediction.type"),
        ({"type": "content"}, "prediction.content"),
        ({"type": "content", "content": None}, "prediction.content"),
        ({"type": "content", "content": 5}, "prediction.content"),
        ({"type": "draft", "content": "x"}, "prediction.type"),
        ({"type": "content", "content": [{"type": "image_url"}]}, "prediction.content[0].type"),
        ({"type": "content", "content": [{"type": "text"}]}, "prediction.content[0].text"),
        ({"type": "content", "content": ["x"] * 4097}, "prediction.content"),
    ],
)
async def test_wrong_forms_are_refused_by_name(
    address: str, frontend: NullFrontend, path: str, prediction: object, param: str
) -> None:
    body = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "prediction": prediction}
    reply = await ask(address, path, body)
    assert (reply.status, reply.error["param"]) == (400, param)
    assert frontend.requests == []


def test_counts_by_position_are_added_over_workers() -> None:
    counters = Counter({accepted_at(0): 3, accepted_at(1): 0, "num_steps": 9})
    counters.update({accepted_at(0): 4, accepted_at(1): 1, accepted_at(2): 0})
    assert _by_position(counters) == [7, 1, 0]
    assert _by_position(Counter()) == []
