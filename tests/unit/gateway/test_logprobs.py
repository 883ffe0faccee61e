"""Logprobs on their way through the gateway, and in the forms of its endpoints."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from baton.services.gateway import attempt as attempt_module
from baton.services.gateway.admission import MAX_PROMPT_LOGPROBS
from baton.services.gateway.links import Event, Events, Failed, PromptTold, Token
from baton.services.gateway.openai.logprobs import (
    MAX_LOGPROBS,
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprobs,
    TokenTexts,
    bound_logprobs,
)
from baton.services.gateway.tokenizer import TextCodec
from baton.shared.kv.sequence import FinishReason
from baton.shared.rpc.errors import Preempted
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import types_pb2
from baton.v1.prefill_service_pb2 import PrefillRequest
from tests.unit.gateway.null_frontend import (
    NullFrontend,
    ask,
    chunk,
    events,
    finished,
    serving,
    started,
)
from tests.unit.gateway.test_admission import LIMITS, admitted, refused, request
from tests.unit.gateway.whole_gateway import whole_gateway

DEMO = Path(__file__).parents[3] / "models/demo"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = (4, 5, 6, 7, 8)
MESSAGES = [{"role": "user", "content": "hi"}]


def told(logprob: float, *top: tuple[int, float]) -> types_pb2.TokenLogprobs:
    return types_pb2.TokenLogprobs(
        logprob=logprob,
        rank=1 + sum(each > logprob for _, each in top),
        top_token_ids=[token_id for token_id, _ in top],
        top_logprobs=[each for _, each in top],
    )


def told_of_prompt(first: int, *logprobs: float) -> types_pb2.PromptLogprobs:
    return types_pb2.PromptLogprobs(first_position=first, tokens=map(told, logprobs))


# What may be asked


async def test_no_token_at_all_is_for_who_asks_of_the_prompt() -> None:
    field, limit = await refused(request(max_tokens=0))
    assert (field, limit) == ("sampling.max_tokens", "at least 1")
    whole = await admitted(request(max_tokens=0, prompt_logprobs=0))
    assert whole.wants_no_token and whole.params.max_tokens == 1
    assert not (await admitted(request(max_tokens=1, prompt_logprobs=0))).wants_no_token


async def test_who_has_tokens_has_the_prompts_logprobs() -> None:
    message = request(received=[5], temperature=0, prompt_logprobs=2, logprobs=1)
    params = (await admitted(message)).params
    assert (params.prompt_logprobs, params.logprobs) == (None, 1)


async def test_a_prompts_logprobs_are_counted_before_anything_is_done() -> None:
    num_tokens = MAX_PROMPT_LOGPROBS // 21
    wide = LIMITS.__class__(100, 2 * num_tokens, None)
    assert (await admitted(request(prompt=[1] * num_tokens, prompt_logprobs=20), wide)).params
    over = request(prompt=[1] * (num_tokens + 1), prompt_logprobs=20)
    field, limit = await refused(over, wide)
    assert field == "sampling.prompt_logprobs" and str(MAX_PROMPT_LOGPROBS) in limit


async def test_prompts_of_one_request_are_counted_together() -> None:
    async with serving(NullFrontend()) as endpoint:
        body = {"prompt": [[1] * 500] * 60, "echo": True, "logprobs": 20, "max_tokens": 0}
        reply = await ask(endpoint.address, COMPLETIONS, body)
        assert (reply.status, reply.error["param"]) == (400, "logprobs")
        assert str(MAX_PROMPT_LOGPROBS) in reply.error["message"]


MOST = MAX_LOGPROBS // 21


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {"prompt": [1], "logprobs": 20, "max_tokens": MOST}, None),
        (COMPLETIONS, {"prompt": [1], "logprobs": 20, "max_tokens": MOST + 1}, "logprobs"),
        (
            COMPLETIONS,
            {"prompt": [[1]] * 4, "n": 5, "logprobs": 20, "max_tokens": MOST // 20},
            None,
        ),
        (
            COMPLETIONS,
            {"prompt": [[1]] * 4, "n": 5, "logprobs": 20, "max_tokens": MOST // 20 + 1},
            "logprobs",
        ),
        (CHAT, {"logprobs": True, "n": 128, "max_tokens": MAX_LOGPROBS // 128}, None),
        (CHAT, {"logprobs": True, "n": 128, "max_tokens": MAX_LOGPROBS}, "top_logprobs"),
    ],
)
@pytest.mark.parametrize("is_streamed", [False, True])
async def test_those_of_a_whole_answer_are_counted_before_anything_is_done(
    path: str, body: dict[str, Any], param: str | None, is_streamed: bool
) -> None:
    async def nobody_there(
        request: pb.GenerateRequest,
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        if frontend.requests:
            raise Preempted("no worker")
        yield pb.GenerateResponse()

    frontend = NullFrontend(TextCodec.load(DEMO))
    frontend.script = nobody_there
    async with serving(frontend) as endpoint:
        given = {"messages": MESSAGES} if path == CHAT else {}
        reply = await ask(endpoint.address, path, {**given, **body, "stream": is_streamed})
    if param is None or is_streamed:
        assert reply.status != 400 and frontend.requests
    else:
        assert (reply.status, reply.error["param"]) == (400, param)
        assert str(MAX_LOGPROBS) in reply.error["message"] and frontend.requests == []


def test_who_does_not_say_how_long_gets_as_many_tokens_as_there_may_be() -> None:
    sampling = types_pb2.SamplingParams(max_tokens=1 << 20)
    asked = pb.GenerateRequest(sampling=sampling, clamp_max_tokens=True, n=4)
    bound_logprobs([asked], 20)
    assert asked.sampling.max_tokens == MAX_LOGPROBS // (4 * 21)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {"prompt": "a", "logprobs": -1}, "logprobs"),
        (COMPLETIONS, {"prompt": "a", "logprobs": "5"}, "logprobs"),
        (COMPLETIONS, {"prompt": "a", "echo": 1}, "echo"),
        (COMPLETIONS, {"prompt": "a", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        (COMPLETIONS, {"prompt": "a", "top_logprobs": 3}, "top_logprobs"),
        (CHAT, {"messages": MESSAGES, "top_logprobs": 3}, "top_logprobs"),
        (CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        (CHAT, {"messages": MESSAGES, "logprobs": 1}, "logprobs"),
        (CHAT, {"messages": MESSAGES, "echo": True}, "echo"),
    ],
)
async def test_what_is_no_way_to_ask_is_named(path: str, body: dict[str, Any], param: str) -> None:
    frontend = NullFrontend(TextCodec.load(DEMO))
    async with serving(frontend) as endpoint:
        reply = await ask(endpoint.address, path, body)
        assert (reply.status, reply.error["param"]) == (400, param)
        assert frontend.requests == []


async def test_out_of_range_is_named_as_each_endpoint_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with whole_gateway(monkeypatch) as gateway:
        body = {"prompt": [1, 2], "max_tokens": 1}
        for fields, param in (
            ({"logprobs": 21}, "logprobs"),
            ({"prompt_logprobs": 21}, "prompt_logprobs"),
            ({"logprobs": 21, "echo": True}, "logprobs"),
            ({"max_tokens": 0}, "max_tokens"),
        ):
            reply = await gateway.ask_http(body | fields)
            assert (reply.status, reply.error["param"]) == (400, param), fields
        assert gateway.started == []


# On their way


async def hear(
    monkeypatch: pytest.MonkeyPatch, *attempts: Sequence[Event], max_tokens: int = 2
) -> tuple[list[pb.GenerateResponse], list[types_pb2.SamplingParams]]:
    """What a client hears when the workers say this in each attempt, and what they were asked."""
    asked = []

    async def say(
        channel: object, incarnation: str, message: PrefillRequest, events: Events, _: float
    ) -> None:
        asked.append(message.sequence.sampling)
        for event in attempts[message.sequence.key.attempt - 1]:
            events.put_nowait(event)
            while not events.empty():
                await asyncio.sleep(0)

    monkeypatch.setattr(attempt_module, "follow_prefill", say)
    async with whole_gateway(monkeypatch, worker_ids=("prefill-0", "decode-0")) as gateway:
        gateway.script = lambda sequence, events: None
        sampling = types_pb2.SamplingParams(
            max_tokens=max_tokens, seed=1, logprobs=1, prompt_logprobs=0
        )
        message = pb.GenerateRequest(token_ids=pb.TokenIds(token_ids=PROMPT), sampling=sampling)
        return await gateway.ask_grpc(message), asked


def of_prompt(responses: Sequence[pb.GenerateResponse]) -> list[tuple[int, list[float]]]:
    return [
        (each.prompt_logprobs.first_position, [one.logprob for one in each.prompt_logprobs.tokens])
        for each in responses
        if each.HasField("prompt_logprobs")
    ]


async def test_a_prompts_come_first_whoever_is_quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    first, last = told(-1.0, (9, -1.0)), told(-2.0, (7, -0.5))
    responses, _ = await hear(
        monkeypatch,
        [
            # Of the decode worker, which knows nothing of the prompt's.
            Token(0, 9, None, first),
            PromptTold(told_of_prompt(1, -1.0, -2.0)),
            PromptTold(told_of_prompt(3, -3.0, -4.0)),
            Token(0, 9, None, first),
            Token(1, 8, FinishReason.LENGTH, last),
        ],
    )
    kinds = [each.WhichOneof("message") for each in responses]
    assert kinds[:3] == ["started", "prompt_logprobs", "prompt_logprobs"]
    assert of_prompt(responses) == [(1, [-1.0, -2.0]), (3, [-3.0, -4.0])]
    chunks = [each.chunk for each in responses if each.HasField("chunk")]
    assert [t for each in chunks for t in each.token_ids] == [9, 8]
    assert [t for each in chunks for t in each.logprobs] == [first, last]


async def test_what_was_sent_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Failed(Preempted("planted"), None)
    first, second = told(-1.0), told(-2.0)
    responses, asked = await hear(
        monkeypatch,
        # Some of them came, and nobody has seen them: the rest is asked for with them.
        [PromptTold(told_of_prompt(1, -1.0, -2.0)), broken],
        [PromptTold(told_of_prompt(1, -9.0, -9.0, -3.0, -4.0)), Token(0, 9, None, first), broken],
        [Token(1, 8, FinishReason.LENGTH, second)],
    )
    assert of_prompt(responses) == [(1, [-1.0, -2.0]), (3, [-3.0, -4.0])]
    assert [each.HasField("prompt_logprobs") for each in asked] == [True, True, False]
    assert all(each.logprobs == 1 for each in asked)
    chunks = [each.chunk for each in responses if each.HasField("chunk")]
    assert [t for each in chunks for t in each.logprobs] == [first, second]


async def test_an_answer_without_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    responses, _ = await hear(
        monkeypatch,
        [PromptTold(told_of_prompt(1, -1.0, -2.0, -3.0, -4.0)), Token(0, 9, FinishReason.LENGTH)],
        max_tokens=0,
    )
    kinds = [each.WhichOneof("message") for each in responses]
    assert kinds == ["started", "prompt_logprobs", "finished"]
    last = responses[-1].finished
    assert last.finish_reason == types_pb2.FINISH_REASON_LENGTH
    assert last.usage.num_completion_tokens == 0 and last.num_attempts == 1


# Forms


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    codec = TextCodec.load(DEMO)
    assert codec is not None
    return codec


@pytest.fixture
def texts(codec: TextCodec) -> TokenTexts:
    return TokenTexts(codec)


def test_a_chats(codec: TextCodec, texts: TokenTexts) -> None:
    the, end = codec.encode(" the", add_special_tokens=False)[0], codec.special_ids["<|end|>"]
    form = ChatLogprobs(texts, 1)
    assert form.take() == "null"
    form.add([the, end], [told(-1.5, (the, -1.5), (5, -3.0)), told(float("-inf"), (the, -0.5))])
    first, last = json.loads(form.take())["content"]
    shown = {"token": " the", "logprob": -1.5, "bytes": list(b" the")}
    # One of the likeliest, though more came.
    assert first == {**shown, "top_logprobs": [shown]}
    assert (last["token"], last["bytes"], last["logprob"]) == ("<|end|>", list(b"<|end|>"), -9999.0)
    assert form.take() == "null"


def test_bytes_of_a_character_that_tokens_share(codec: TextCodec, texts: TokenTexts) -> None:
    token_ids = codec.encode("漢", add_special_tokens=False)
    assert len(token_ids) > 1
    form = ChatLogprobs(texts, 0)
    form.add(token_ids, [told(-1.0)] * len(token_ids))
    content = json.loads(form.take())["content"]
    assert bytes(byte for each in content for byte in each["bytes"]).decode() == "漢"
    assert all("\ufffd" in each["token"] for each in content)


def test_a_completions_columns(codec: TextCodec, texts: TokenTexts) -> None:
    token_ids = codec.encode("In the beginning")
    form = CompletionLogprobs(texts, 1)
    form.begin(token_ids[0])
    form.add(token_ids[1:], [told(-1.0, (5, -0.5)), told(-0.5, (token_ids[2], -0.5)), told(-3.0)])
    columns = json.loads(form.take())
    assert columns["tokens"] == ["<|bos|>", "In", " the", " beginning"]
    assert columns["token_logprobs"] == [None, -1.0, -0.5, -3.0]
    own = [{texts.text(5): -0.5, "In": -1.0}, {" the": -0.5}]
    assert columns["top_logprobs"] == [None, *own, {" beginning": -3.0}]
    assert columns["text_offset"] == [0, 7, 9, 13]
    # Offsets go on over events.
    form.add([5], [told(-1.0)])
    assert json.loads(form.take())["text_offset"] == [23]


def test_of_tokens_with_one_text_the_likeliest_stands(codec: TextCodec) -> None:
    """Who looks for the greatest, to see whether a token is the greedy one, finds it."""
    parts = codec.encode("漢", add_special_tokens=False)
    form = CompletionLogprobs(TokenTexts(codec), 2)
    form.add([parts[1]], [told(-4.0, (parts[0], -0.5), (parts[1], -4.0))])
    [top] = json.loads(form.take())["top_logprobs"]
    assert max(top.values()) == -0.5


def test_a_prompts_beside_the_answer(texts: TokenTexts) -> None:
    form = PromptLogprobs(texts, 1)
    form.add([5], [told(-2.0, (7, -0.5))])
    entries = json.loads(form.json())
    assert entries[0] is None
    assert entries[1]["5"] == {"logprob": -2.0, "rank": 2, "decoded_token": texts.text(5)}
    assert entries[1]["7"] == {"logprob": -0.5, "rank": 1, "decoded_token": texts.text(7)}


def test_without_a_tokenizer_tokens_are_named_by_their_ids() -> None:
    form = ChatLogprobs(TokenTexts(None), 0)
    form.add([5], [told(-2.0)])
    [entry] = json.loads(form.take())["content"]
    assert (entry["token"], entry["bytes"]) == ("token_id:5", None)


# Streams


def with_logprobs(text: str, index: int) -> pb.GenerateResponse:
    response = chunk(text, index)
    response.chunk.logprobs.append(told(-1.0 - index))
    return response


async def script(request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse, None]:
    """The second token's text comes with the third."""
    yield started(num_prompt_tokens=len(request.token_ids.token_ids))
    if request.sampling.HasField("prompt_logprobs"):
        yield pb.GenerateResponse(prompt_logprobs=told_of_prompt(1, -7.0))
        yield pb.GenerateResponse(prompt_logprobs=told_of_prompt(2, -8.0))
    for index, text in enumerate(("a", "", "bc")):
        yield with_logprobs(text, index)
    yield finished(num_tokens=3)


@pytest.fixture
async def address(codec: TextCodec) -> AsyncIterator[str]:
    frontend = NullFrontend(codec)
    frontend.script = script
    async with serving(frontend) as endpoint:
        yield endpoint.address


def choices_of(body: bytes) -> list[dict[str, Any]]:
    return [event["choices"][0] for event in events(body) if event != "[DONE]"]


async def test_they_come_with_their_tokens_not_with_the_text(address: str) -> None:
    body = {"messages": MESSAGES, "logprobs": True, "stream": True}
    reply = await ask(address, CHAT, body)
    seen = [
        (
            choice["delta"].get("content"),
            [each["logprob"] for each in choice["logprobs"]["content"]],
        )
        for choice in choices_of(reply.body)
        if choice["logprobs"] is not None
    ]
    assert seen == [("a", [-1.0]), ("", [-2.0]), ("bc", [-3.0])]


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_an_echo_whole_and_streamed(address: str, is_streamed: bool) -> None:
    body = {"prompt": [[5, 6, 7], [8, 9, 10]], "echo": True, "logprobs": 0, "stream": is_streamed}
    reply = await ask(address, COMPLETIONS, body)
    choices = choices_of(reply.body) if is_streamed else json.loads(reply.body)["choices"]
    for index, prompt in enumerate(([5, 6, 7], [8, 9, 10])):
        of_one = [choice for choice in choices if choice["index"] == index]
        columns = [choice["logprobs"] for choice in of_one if choice["logprobs"] is not None]
        logprobs = [value for each in columns for value in each["token_logprobs"]]
        assert logprobs == [None, -7.0, -8.0, -1.0, -2.0, -3.0]
        text = "".join(choice["text"] for choice in of_one)
        tokens = [value for each in columns for value in each["tokens"]]
        assert text == "".join(tokens[: len(prompt)]) + "abc"
        offsets = [value for each in columns for value in each["text_offset"]]
        assert offsets == [sum(map(len, tokens[:place])) for place in range(len(tokens))]


async def test_of_who_did_not_ask_nothing_is_told(address: str) -> None:
    reply = await ask(address, COMPLETIONS, {"prompt": [5, 6, 7]})
    [choice] = json.loads(reply.body)["choices"]
    assert choice["logprobs"] is None and "prompt_logprobs" not in choice
    assert choice["text"] == "abc"
