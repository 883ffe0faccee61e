"""The OpenAI endpoint's requests, answers and errors, over a gateway without workers."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from baton.services.gateway.openai.body import MAX_BODY_BYTES
from baton.services.gateway.openai.errors import InvalidParam
from baton.services.gateway.openai.schema import (
    UNSUPPORTED,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    parse,
)
from baton.services.gateway.tokenizer import TextCodec
from baton.shared.rpc.errors import (
    DeadlineExceeded,
    Draining,
    EngineFailure,
    InvalidField,
    NoTokenizer,
    Overloaded,
    WorkerLost,
)
from baton.v1 import inference_service_pb2 as pb
from tests.unit.gateway.null_frontend import (
    NullFrontend,
    Script,
    ask,
    chunk,
    connect,
    endless,
    events,
    num_refused,
    serving,
    started,
    wait_until,
)

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = {"prompt": "hello"}


@pytest.fixture
def frontend() -> NullFrontend:
    return NullFrontend()


@pytest.fixture
async def address(frontend: NullFrontend) -> AsyncIterator[str]:
    async with serving(frontend) as endpoint:
        yield endpoint.address


async def test_a_whole_answer(address: str, frontend: NullFrontend) -> None:
    reply = await ask(address, COMPLETIONS, HELLO)
    assert (reply.status, reply.headers["x-request-id"]) == (200, "r-1")
    body = json.loads(reply.body)
    assert body["object"] == "text_completion" and body["id"] == "cmpl-r-1"
    assert body["choices"] == [
        {"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "stop"}
    ]
    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    [request] = frontend.requests
    assert request.text == "hello" and request.sampling.max_tokens == 16


async def test_a_streamed_answer_ends_with_usage_and_done(address: str) -> None:
    options = {"include_usage": True}
    reply = await ask(address, COMPLETIONS, {**HELLO, "stream": True, "stream_options": options})
    assert reply.headers["content-type"].startswith("text/event-stream")
    *chunks, last, done = events(reply.body)
    assert [entry["choices"][0]["text"] for entry in chunks] == ["Hel", "lo", ""]
    assert [entry["choices"][0]["finish_reason"] for entry in chunks] == [None, None, "stop"]
    assert all(entry["usage"] is None for entry in chunks)
    assert last["choices"] == [] and last["usage"]["total_tokens"] == 5
    assert done == "[DONE]"


async def test_usage_comes_with_every_chunk_when_asked(address: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    reply = await ask(address, COMPLETIONS, {**HELLO, "stream": True, "stream_options": options})
    counts = [entry["usage"]["completion_tokens"] for entry in events(reply.body)[:-1]]
    assert counts == [1, 2, 2, 2]


async def test_without_the_option_no_chunk_has_usage(address: str) -> None:
    reply = await ask(address, COMPLETIONS, {**HELLO, "stream": True})
    assert all("usage" not in entry for entry in events(reply.body)[:-1])


async def test_several_prompts_are_several_choices(address: str, frontend: NullFrontend) -> None:
    reply = await ask(address, COMPLETIONS, {"prompt": [[1, 2], [3]]})
    body = json.loads(reply.body)
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert {choice["text"] for choice in body["choices"]} == {"Hello"}
    assert body["usage"]["prompt_tokens"] == 6
    prompts = [list(request.token_ids.token_ids) for request in frontend.requests]
    assert prompts == [[1, 2], [3]]
    reply = await ask(address, COMPLETIONS, {"prompt": ["a", "b", "c"], "stream": True})
    texts = {0: "", 1: "", 2: ""}
    for entry in events(reply.body)[:-1]:
        texts[entry["choices"][0]["index"]] += entry["choices"][0]["text"]
    assert texts == dict.fromkeys(range(3), "Hello")


async def test_every_sampling_field_arrives(address: str, frontend: NullFrontend) -> None:
    fields = {"temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125, "seed": 5}
    more = {"max_tokens": 9, "stop": ["a", "b"], "stop_token_ids": [1], "ignore_eos": True}
    assert (await ask(address, COMPLETIONS, {**HELLO, **fields, **more})).status == 200
    assert (await ask(address, COMPLETIONS, {**HELLO, "stop": "x", "top_k": -1})).status == 200
    first, second = (request.sampling for request in frontend.requests)
    assert (first.temperature, first.top_p, first.top_k, first.min_p) == (0.5, 0.25, 7, 0.125)
    assert (first.seed, first.max_tokens, first.ignore_eos) == (5, 9, True)
    assert (list(first.stops), list(first.stop_token_ids)) == (["a", "b"], [1])
    assert (list(second.stops), second.top_k) == (["x"], 0)
    assert not second.HasField("temperature") and not second.HasField("seed")


async def test_penalties_and_bans_arrive(address: str, frontend: NullFrontend) -> None:
    numbers = {"presence_penalty": 1, "frequency_penalty": -0.5, "repetition_penalty": 1.25}
    lists = {"bad_words": ["a", "b c"], "allowed_token_ids": [3, 1], "min_tokens": 2}
    bias = {"logit_bias": {"1": -100, "3": 2.5}}
    assert (await ask(address, COMPLETIONS, {**HELLO, **numbers, **lists, **bias})).status == 200
    neutral: dict[str, Any] = {
        "bad_words": [],
        "logit_bias": {},
        "allowed_token_ids": None,
        "min_tokens": 0,
    }
    assert (await ask(address, COMPLETIONS, {**HELLO, **neutral})).status == 200
    assert (await ask(address, COMPLETIONS, {**HELLO, "bad_words": "word"})).status == 200
    first, second, third = (request.sampling for request in frontend.requests)
    penalties = (first.presence_penalty, first.frequency_penalty, first.repetition_penalty)
    assert penalties == (1.0, -0.5, 1.25)
    assert (list(first.bad_words), list(first.allowed_token_ids)) == (["a", "b c"], [3, 1])
    assert first.min_tokens == 2
    assert dict(first.logit_bias) == {1: -100.0, 3: 2.5}
    assert not (second.bad_words or second.logit_bias or second.allowed_token_ids)
    assert list(third.bad_words) == ["word"]


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"logit_bias": {"5": "high"}}, "logit_bias[5]"),
        ({"logit_bias": {"5": True}}, "logit_bias[5]"),
        ({"logit_bias": {"a": 1}}, "logit_bias[a]"),
        ({"logit_bias": {"-1": 1}}, "logit_bias[-1]"),
        ({"logit_bias": {"05": 1}}, "logit_bias[05]"),
        ({"logit_bias": {str(2**32): 1}}, f"logit_bias[{2**32}]"),
        ({"logit_bias": [[5, 1]]}, "logit_bias"),
        ({"logit_bias": {str(each): 1 for each in range(5000)}}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [1, -1]}, "allowed_token_ids[1]"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"repetition_penalty": "1"}, "repetition_penalty"),
        ({"bad_words": [1]}, "bad_words"),
    ],
)
async def test_wrong_penalties_and_bans_are_named(
    address: str, given: dict[str, Any], param: str
) -> None:
    reply = await ask(address, COMPLETIONS, {**HELLO, **given})
    assert (reply.status, json.loads(reply.body)["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": [1, True]}, "prompt[1]"),
        ({"prompt": [1, -1]}, "prompt[1]"),
        ({"prompt": [[1], [1000]]}, "prompt[1][0]"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": [1] * 513}, "prompt"),
        ({"prompt": [1.5]}, "prompt[0]"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": "a", "max_tokens": -2}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 2**32}, "max_tokens"),
        ({"prompt": "a", "max_tokens": "16"}, "max_tokens"),
        ({"prompt": "a", "temperature": "hot"}, "temperature"),
        ({"prompt": "a", "top_k": -2}, "top_k"),
        ({"prompt": "a", "seed": 2**64}, "seed"),
        ({"prompt": "a", "stop": 5}, "stop"),
        ({"prompt": "a", "stop": ["x", 5]}, "stop"),
        ({"prompt": "a", "stop": ["x"] * 4097}, "stop"),
        ({"prompt": "a", "stop_token_ids": [1] * 4097}, "stop_token_ids"),
        ({"prompt": "a", "stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"prompt": "a", "stream": "yes"}, "stream"),
        ({"prompt": "a", "stream_options": {"include_usage": 5}}, "stream_options.include_usage"),
        ({"prompt": "a", "model": 5}, "model"),
    ],
)
async def test_a_field_out_of_its_range_is_named(
    address: str, frontend: NullFrontend, body: dict[str, Any], param: str
) -> None:
    reply = await ask(address, COMPLETIONS, body)
    assert reply.status == 400
    assert (reply.error["type"], reply.error["param"]) == ("invalid_request_error", param)
    assert param in reply.error["message"]
    assert frontend.requests == []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "function", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "images": ["aGk="]}]},
            "messages[0].images",
        ),
        ({"messages": [{"role": "assistant", "audio": {"id": "a"}}]}, "messages[0].audio"),
        ({"messages": [{"role": "user", "content": [{}]}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "messages[0].tool_calls[0].function",
        ),
        ({"messages": [{"role": "user", "content": "a"}] * 4097}, "messages"),
        (
            {"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": -2},
            "max_completion_tokens",
        ),
    ],
)
async def test_a_wrong_chat_is_named(address: str, body: dict[str, Any], param: str) -> None:
    reply = await ask(address, CHAT, body)
    assert reply.status == 400
    assert reply.error["param"] == param


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}, "image_url"),
        ({"type": "input_image", "image_url": "https://a.example/b.png"}, "input_image"),
        ({"type": "input_audio", "input_audio": {"data": "aGk=", "format": "wav"}}, "input_audio"),
        ({"type": "video_url", "video_url": {"url": "https://a.example/b.mp4"}}, "video_url"),
        ({"type": "file", "file": {"file_id": "f"}}, "file"),
        # By their field alone.
        ({"image_url": "https://a.example/b.png"}, "image_url"),
        ({"type": None, "audio_url": "https://a.example/b.wav"}, "audio_url"),
        ({"type": "z" * 100_000}, "z" * 40),
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
async def test_what_is_no_text_is_refused_by_name(
    address: str, frontend: NullFrontend, path: str, part: dict[str, Any], kind: str
) -> None:
    content = [{"type": "text", "text": "What is this?"}, part]
    reply = await ask(address, path, {"messages": [{"role": "user", "content": content}]})
    assert (reply.status, reply.error["param"]) == (400, "messages[0].content[1].type")
    assert reply.error["code"] == "unsupported_parameter"
    assert reply.error["message"] == (
        f"messages[0].content[1].type '{kind}' is not supported; only 'text' is"
    )
    assert frontend.requests == []


@pytest.mark.parametrize("field", sorted(UNSUPPORTED.keys() - CompletionRequest.model_fields))
async def test_what_the_engine_lacks_is_refused_unless_neutral(
    address: str, frontend: NullFrontend, field: str
) -> None:
    for neutral in (None, *UNSUPPORTED[field]):
        assert (await ask(address, COMPLETIONS, {**HELLO, field: neutral})).status == 200
    reply = await ask(address, COMPLETIONS, {**HELLO, field: [7]})
    assert (reply.status, reply.error["param"]) == (400, field)
    assert reply.error["code"] == "unsupported_parameter"


@pytest.mark.parametrize(
    ("body", "taken"),
    [
        ({"n": 1.0}, {}),
        ({"presence_penalty": 0.0, "min_tokens": 0.0}, {}),
        ({"max_tokens": 16.0}, {"max_tokens": 16}),
        ({"top_k": 7.0, "seed": -3.0}, {"top_k": 7, "seed": 2**64 - 3}),
        ({"top_k": -1.0}, {"top_k": 0}),
        ({"top_k": 1001}, {"top_k": 0}),
        ({"top_k": 2**32 - 1}, {"top_k": 0}),
        ({"top_k": 1000}, {"top_k": 1000}),
        ({"stop_token_ids": [5.0]}, {"stop_token_ids": [5]}),
    ],
)
async def test_numbers_that_are_meant_are_taken(
    address: str, frontend: NullFrontend, body: dict[str, Any], taken: dict[str, Any]
) -> None:
    assert (await ask(address, COMPLETIONS, {**HELLO, **body})).status == 200
    [request] = frontend.requests
    assert {name: getattr(request.sampling, name) for name in taken} == taken


async def test_token_ids_may_be_written_as_floats(address: str, frontend: NullFrontend) -> None:
    assert (await ask(address, COMPLETIONS, {"prompt": [1.0, 2.0]})).status == 200
    assert (await ask(address, COMPLETIONS, {"prompt": [[1.0], [2]]})).status == 200
    prompts = [list(request.token_ids.token_ids) for request in frontend.requests]
    assert prompts == [[1, 2], [1], [2]]


async def test_a_trailing_slash_does_not_matter(address: str) -> None:
    assert (await ask(address, COMPLETIONS + "/", HELLO)).status == 200
    for path in ("/v1/models/", "/v1/models/null/", "/health/", "/metrics/", "/version//"):
        assert (await ask(address, path)).status == 200, path
    assert (await ask(address, "/")).status == 404


async def test_head_is_answered_where_get_is(address: str) -> None:
    for path in ("/v1/models", "/v1/models/null", "/health", "/metrics", "/version"):
        reply = await ask(address, path, method="HEAD")
        assert (reply.status, reply.body) == (200, b""), path
    reply = await ask(address, COMPLETIONS, method="HEAD")
    assert (reply.status, reply.headers["allow"], reply.body) == (405, "POST", b"")


@pytest.mark.parametrize(
    ("encoding", "encode"),
    [
        ("gzip", gzip.compress),
        ("X-GZIP", gzip.compress),
        ("gzip", lambda body: gzip.compress(body[:5]) + gzip.compress(body[5:])),
        ("deflate", zlib.compress),
        ("identity", bytes),
        ("", bytes),
    ],
)
async def test_a_body_may_be_compressed_and_begin_with_a_mark(
    address: str, frontend: NullFrontend, encoding: str, encode: Callable[[bytes], bytes]
) -> None:
    body = codecs.BOM_UTF8 + json.dumps(HELLO).encode()
    headers = f"content-encoding: {encoding}\r\n"
    assert (await ask(address, COMPLETIONS, encode(body), headers=headers)).status == 200
    assert frontend.requests[0].text == "hello"


@pytest.mark.parametrize(
    ("encoding", "body", "status"),
    [
        # Hundreds of times larger than it comes.
        ("gzip", gzip.compress(b'{"prompt": "' + b"a" * (1 << 25) + b'"}'), 413),
        ("gzip", gzip.compress(b" " * (MAX_BODY_BYTES + 1)), 413),
        ("gzip", gzip.compress(b"{}")[:-4], 400),
        ("gzip", b"{}", 400),
        ("gzip", gzip.compress(b"{}") + b"rest", 400),
        ("deflate", b"\x00\x01", 400),
        ("br", b"{}", 415),
        ("gzip, gzip", gzip.compress(gzip.compress(b"{}")), 415),
    ],
    # A compressed body names the second of its making: no two processes would agree on these tests.
    ids=["inflates", "too long", "cut", "plain", "rest", "deflate", "br", "twice"],
)
async def test_what_a_compressed_body_must_not_be(
    address: str, frontend: NullFrontend, encoding: str, body: bytes, status: int
) -> None:
    headers = f"content-encoding: {encoding}\r\n"
    reply = await ask(address, COMPLETIONS, body, headers=headers)
    assert reply.status == status and reply.error["message"]
    assert frontend.requests == []


async def test_no_number_passes_for_a_switch(address: str) -> None:
    assert (await ask(address, COMPLETIONS, {**HELLO, "logprobs": True})).status == 400
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    assert (await ask(address, CHAT, {**chat, "logprobs": 1})).status == 400
    assert (await ask(address, COMPLETIONS, {**HELLO, "n": True})).status == 400


@pytest.mark.parametrize(
    ("kind", "body", "param"),
    [
        (CompletionRequest, {"stop": [1] * 100}, "stop"),
        (CompletionRequest, {"stop_token_ids": [-1] * 100}, "stop_token_ids[0]"),
        (DetokenizeRequest, {"tokens": ["a"] * 100}, "tokens[0]"),
        (ChatRequest, {"messages": [5] * 100}, "messages[0]"),
        (
            ChatRequest,
            {"messages": [{"role": "user", "content": [5] * 100}]},
            "messages[0].content",
        ),
    ],
)
def test_one_wrong_entry_of_a_list_is_told(
    kind: type[BaseModel], body: dict[str, Any], param: str
) -> None:
    """A report of a million would take seconds, which hold up every other client."""
    with pytest.raises(InvalidParam) as caught:
        parse(kind, body)
    assert caught.value.param == param
    assert isinstance(caught.value.__context__, ValidationError)
    assert caught.value.__context__.error_count() <= 2  # one for each arm of a union


async def test_unknown_fields_are_ignored(address: str) -> None:
    body = {**HELLO, "user": "me", "metadata": {"a": 1}, "no_such_field": [1]}
    assert (await ask(address, COMPLETIONS, body)).status == 200


@pytest.mark.parametrize(
    ("error", "status", "param"),
    [
        (InvalidField("sampling.max_tokens", "is 0", limit="x"), 400, "max_tokens"),
        (InvalidField("sampling.stops[3]", "has 0", limit="x"), 400, "stop"),
        (InvalidField("token_ids", "has 9", limit="x", context_length=8), 400, "prompt"),
        (InvalidField("text", "is empty", limit="x"), 400, "prompt"),
        (NoTokenizer("none"), 400, None),
        (Draining("leaving"), 503, None),
        (Overloaded("later"), 503, None),
        (WorkerLost("gone"), 503, None),
        (DeadlineExceeded("late"), 504, None),
        (EngineFailure("bad"), 500, None),
        (RuntimeError("secret"), 500, None),
    ],
)
async def test_failures_before_a_token_have_a_status(
    address: str, frontend: NullFrontend, error: Exception, status: int, param: str | None
) -> None:
    async def fail(request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse, None]:
        yield started()
        raise error

    frontend.script = fail
    for stream in (False, True):
        reply = await ask(address, COMPLETIONS, {**HELLO, "stream": stream})
        assert (reply.status, reply.error["param"]) == (status, param)
        assert "secret" not in reply.error["message"]


async def test_a_failure_after_a_token_is_the_streams_last_event(
    address: str, frontend: NullFrontend
) -> None:
    async def fail(request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse, None]:
        yield started()
        yield chunk("a")
        raise WorkerLost("gone")

    frontend.script = fail
    reply = await ask(address, COMPLETIONS, {**HELLO, "stream": True})
    first, last = events(reply.body)
    assert first["choices"][0]["text"] == "a"
    assert last["error"]["message"] == "gone" and last["error"]["type"] == "server_error"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_ends_the_request(
    address: str, frontend: NullFrontend, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    frontend.script = endless
    content = json.dumps({"prompt": ["a", "b"], "stream": stream}).encode()
    reader, writer = await connect(address)
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: t\r\ncontent-length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    await wait_until(lambda: frontend.num_in_flight == 2)
    if stream:
        # The answer has begun: nothing else may be sent for this request.
        await reader.readuntil(b"\r\n\r\n")
    writer.transport.abort()
    await wait_until(lambda: frontend.num_closed == 2)
    assert (await ask(address, "/version")).status == 200
    assert caplog.records == []


async def test_paths_methods_and_models_that_are_not_there(address: str) -> None:
    assert (await ask(address, "/nothing")).error["message"] == "unknown path: GET /nothing"
    reply = await ask(address, COMPLETIONS)
    assert (reply.status, reply.headers["allow"]) == (405, "POST")
    assert reply.error["type"] == "invalid_request_error"
    reply = await ask(address, COMPLETIONS, {**HELLO, "model": "gpt"})
    assert (reply.status, reply.error["code"]) == (404, "model_not_found")
    assert (await ask(address, "/v1/models/gpt")).status == 404
    assert (await ask(address, "/v1/models/null")).status == 200


def failing(error: Exception) -> Script:
    async def fail(request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse, None]:
        yield started()
        raise error

    return fail


async def test_what_is_refused_is_counted_once(address: str, frontend: NullFrontend) -> None:
    await ask(address, "/nowhere")
    await ask(address, COMPLETIONS, b"{")
    await ask(address, COMPLETIONS, {**HELLO, "model": "other"})
    assert num_refused(frontend) == {"404": 2, "400": 1}

    # These reach the frontend, which counts them itself.
    for error, status in ((NoTokenizer("no text"), 400), (ZeroDivisionError(), 500)):
        frontend.script = failing(error)
        assert (await ask(address, COMPLETIONS, HELLO)).status == status
    assert (await ask(address, "/health")).status == 200
    assert num_refused(frontend) == {"404": 2, "400": 1}


async def test_health_follows_the_workers_and_the_drain(
    address: str, frontend: NullFrontend
) -> None:
    reply = await ask(address, "/health")
    assert (reply.status, reply.body) == (200, b"")
    frontend.is_leaving = True
    assert (await ask(address, "/health")).status == 503
    frontend.is_leaving = False
    frontend.cluster.has_workers = False  # type: ignore[attr-defined]
    assert (await ask(address, "/health")).status == 503


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"prompt": "a",', "line 1 column"),
        (b'{"prompt":\n oops}', "line 2 column"),
        (b'{"a":' + b"[" * 100_000, "recursion limit exceeded"),
        (b'{"temperature": NaN}', "not valid JSON"),
        *(
            (b'{"tools": [{"a": %b}]}' % number, "not valid JSON")
            for number in (b"1e999", b"-1E+400", b"9" * 400 + b".0", b"9" * 250 + b"e99", b"1e0309")
        ),
        (b'{"prompt": "\\ud800"}', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[1]", "must be a JSON object"),
    ],
)
async def test_what_is_no_json_object_is_refused(address: str, body: bytes, words: str) -> None:
    reply = await ask(address, COMPLETIONS, body)
    assert (reply.status, reply.error["code"]) == (400, "invalid_json")
    assert words in reply.error["message"]


async def test_a_body_too_large_is_refused_even_in_chunks(
    address: str, frontend: NullFrontend
) -> None:
    body = b'{"prompt": "' + b"a" * MAX_BODY_BYTES + b'"}'
    assert (await ask(address, COMPLETIONS, body)).status == 413
    reader, writer = await connect(address)
    writer.write(f"POST {COMPLETIONS} HTTP/1.1\r\nhost: t\r\n".encode())
    writer.write(b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n")
    for _ in range(5):
        writer.write(b"100000\r\n" + b"a" * (1 << 20) + b"\r\n")
    writer.write(b"0\r\n\r\n")
    assert (await reader.readline()).split()[1] == b"413"
    writer.close()
    assert frontend.requests == []


async def test_a_deadline_may_be_given(address: str) -> None:
    good = await ask(address, COMPLETIONS, HELLO, headers="x-request-timeout: 1.5\r\n")
    assert good.status == 200
    for wrong in ("nan", "inf", "1e300", "0", "-1", "soon"):
        bad = await ask(address, COMPLETIONS, HELLO, headers=f"x-request-timeout: {wrong}\r\n")
        assert (bad.status, bad.error["param"]) == (400, "x-request-timeout")


async def test_a_model_without_tokenizer_says_so(address: str) -> None:
    for path in ("/tokenize", CHAT):
        body = (
            {"prompt": "a"}
            if path == "/tokenize"
            else {"messages": [{"role": "user", "content": "a"}]}
        )
        reply = await ask(address, path, body)
        assert (reply.status, reply.error["code"]) == (400, "no_tokenizer")


async def test_text_and_tokens(byte_level: TextCodec) -> None:
    async with serving(NullFrontend(byte_level)) as endpoint:
        reply = await ask(endpoint.address, "/tokenize", {"prompt": "hello"})
        token_ids = json.loads(reply.body)["tokens"]
        assert token_ids == byte_level.encode("hello")
        reply = await ask(endpoint.address, "/detokenize", {"tokens": token_ids})
        text = json.loads(reply.body)["prompt"]
        assert text == byte_level.decode(token_ids, skip_special=False)
        reply = await ask(endpoint.address, "/detokenize", {"tokens": [5000]})
        assert (reply.status, reply.error["param"]) == (400, "tokens")
        both = {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}
        for body in ({}, both):
            assert (await ask(endpoint.address, "/tokenize", body)).status == 400


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": [[1], [2]]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}),
        ("/v1/responses", {"input": "Hi"}),
    ],
)
async def test_a_schema_is_written_once(
    address: str, path: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many prompts there are; it may be large."""
    schema = {"type": "object", "title": "of this test"}
    written: list[Any] = []
    dumps = json.dumps

    def note(value: Any, *args: Any, **options: Any) -> str:
        if value == schema:
            written.append(value)
        return dumps(value, *args, **options)

    monkeypatch.setattr(json, "dumps", note)
    await ask(address, path, {"model": "null", "guided_json": schema, **fields})
    assert len(written) == 1
