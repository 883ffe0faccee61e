"""What clients of other servers send and expect, by the reports of their users.

docs/compatibility.md says whose.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from baton.services.gateway.tokenizer import TextCodec
from baton.v1 import inference_service_pb2 as pb
from tests.unit.gateway.null_frontend import (
    NullFrontend,
    ask,
    chunk,
    events,
    finished,
    send,
    serving,
    started,
)

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = {"prompt": "hello"}
MESSAGES = [{"role": "user", "content": "hello"}]
NO_CALLS: tuple[Any, ...] = (None, [])


@pytest.fixture
def frontend(model_dir: Path) -> NullFrontend:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{{ raise_exception('Users begin') if messages[0].role == 'assistant' }}"
    (model_dir / "chat_template.jinja").write_text(template)
    return NullFrontend(TextCodec.load(model_dir))


@pytest.fixture
async def address(frontend: NullFrontend) -> AsyncIterator[str]:
    async with serving(frontend) as endpoint:
        yield endpoint.address


async def held_back(request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse, None]:
    """The text of the last token comes at the end only."""
    yield started()
    yield chunk("Hel", 0)
    yield finished("lo")


@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, HELLO), (CHAT, {"messages": MESSAGES})])
async def test_the_event_with_the_finish_reason_has_no_text(
    address: str, frontend: NullFrontend, path: str, body: dict[str, Any]
) -> None:
    """Some clients stop reading there."""
    frontend.script = held_back
    reply = await ask(address, path, {**body, "stream": True})
    choices = [entry["choices"][0] for entry in events(reply.body)[:-1]]
    texts = [choice.get("text", choice.get("delta", {}).get("content")) for choice in choices]
    assert texts[-3:] == ["Hel", "lo", "" if path == COMPLETIONS else None]
    assert [choice["finish_reason"] for choice in choices[-3:]] == [None, None, "stop"]


async def test_proxies_are_asked_to_pass_a_stream_on_as_it_comes(address: str) -> None:
    streamed = await ask(address, COMPLETIONS, {**HELLO, "stream": True})
    assert streamed.headers["x-accel-buffering"] == "no"
    assert "x-accel-buffering" not in (await ask(address, COMPLETIONS, HELLO)).headers


@pytest.mark.parametrize(
    ("stop", "taken"), [("", []), ([""], []), (["", "x", ""], ["x"]), ([], [])]
)
async def test_empty_stop_strings_ask_for_nothing(
    address: str, frontend: NullFrontend, stop: object, taken: list[str]
) -> None:
    assert (await ask(address, COMPLETIONS, {**HELLO, "stop": stop})).status == 200
    assert list(frontend.requests[0].sampling.stops) == taken


async def test_top_p_may_be_0(address: str, frontend: NullFrontend) -> None:
    assert (await ask(address, COMPLETIONS, {**HELLO, "top_p": 0})).status == 200
    assert frontend.requests[0].sampling.HasField("top_p")


async def test_minus_one_is_no_seed(address: str, frontend: NullFrontend) -> None:
    assert (await ask(address, COMPLETIONS, {**HELLO, "seed": -1})).status == 200
    assert not frontend.requests[0].sampling.HasField("seed")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {**HELLO, "max_tokens": -1}),
        (COMPLETIONS, {**HELLO, "max_tokens": -1.0}),
        (CHAT, {"messages": MESSAGES, "max_tokens": -1}),
        (CHAT, {"messages": MESSAGES, "max_completion_tokens": -1}),
        (CHAT, {"messages": MESSAGES, "max_tokens": 5, "max_completion_tokens": -1}),
    ],
)
async def test_minus_one_is_as_many_tokens_as_there_is_room_for(
    address: str, frontend: NullFrontend, path: str, body: dict[str, Any]
) -> None:
    frontend.defaults.sampling.max_tokens = 7
    assert (await ask(address, path, body)).status == 200
    [request] = frontend.requests
    assert request.clamp_max_tokens and request.sampling.max_tokens == 512


async def test_the_newer_name_of_max_tokens_counts(address: str, frontend: NullFrontend) -> None:
    body = {"messages": MESSAGES, "max_tokens": -1, "max_completion_tokens": 5}
    assert (await ask(address, CHAT, body)).status == 200
    [request] = frontend.requests
    assert not request.clamp_max_tokens and request.sampling.max_tokens == 5


async def test_an_empty_model_name_is_none(address: str) -> None:
    assert (await ask(address, COMPLETIONS, {**HELLO, "model": ""})).status == 200


@pytest.mark.parametrize("path", ["/v1//completions", "//v1/completions", "/v1///completions//"])
async def test_base_urls_may_end_with_a_slash(address: str, path: str) -> None:
    assert (await ask(address, path, HELLO)).status == 200


async def test_texts_may_be_listed_as_they_are(address: str, frontend: NullFrontend) -> None:
    contents: list[Any] = [
        ["hel", {"type": "text", "text": "lo"}],
        [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}],
    ]
    for content in contents:
        reply = await ask(address, CHAT, {"messages": [{"role": "user", "content": content}]})
        assert reply.status == 200
    first, second = (list(request.token_ids.token_ids) for request in frontend.requests)
    assert first == second


async def test_an_answer_may_be_sent_back_as_it_came(address: str) -> None:
    """With all the fields that clients' models of a message have."""
    empty: dict[str, Any] = {
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
    }
    for content in ("Hello", None, ""):
        for tool_calls in NO_CALLS:
            said: dict[str, Any] = {
                "role": "assistant",
                "content": content,
                "tool_calls": tool_calls,
                **empty,
            }
            body = {"messages": [*MESSAGES, said, *MESSAGES]}
            assert (await ask(address, CHAT, body)).status == 200, said


async def test_a_template_that_refuses_is_quoted(address: str) -> None:
    said = {"role": "assistant", "content": "Hello"}
    reply = await ask(address, CHAT, {"messages": [said]})
    assert (reply.status, reply.error["param"]) == (400, "messages")
    assert "Users begin" in reply.error["message"]


async def test_stream_options_without_a_stream_ask_for_nothing(address: str) -> None:
    for options in ({"include_usage": True}, {}, None):
        body = {**HELLO, "stream": False, "stream_options": options}
        assert (await ask(address, COMPLETIONS, body)).status == 200


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_a_request_that_offers_http_2_is_answered(address: str, is_chunked: bool) -> None:
    """As Java's HttpClient sends it. Some servers lose its body."""
    content = json.dumps(HELLO).encode()
    head = "connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAAAAI\r\n"
    if is_chunked:
        head += "transfer-encoding: chunked\r\n"
        content = f"{len(content):x}\r\n".encode() + content + b"\r\n0\r\n\r\n"
    else:
        head += f"content-length: {len(content)}\r\n"
    request = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: t\r\n{head}\r\n".encode() + content
    last = b"GET /version HTTP/1.1\r\nhost: t\r\nconnection: close\r\n\r\n"
    answered = await send(address, request + last)
    assert answered.count(b"HTTP/1.1 200 OK") == 2 and b'"text": "Hello"' in answered


async def test_a_stream_over_http_1_0_ends_with_the_connection(address: str) -> None:
    """As nginx asks by default."""
    content = json.dumps({**HELLO, "stream": True}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.0\r\nhost: t\r\ncontent-length: {len(content)}\r\n\r\n"
    head_back, _, body = (await send(address, head.encode() + content)).partition(b"\r\n\r\n")
    assert b" 200 " in head_back and b"chunked" not in head_back.lower()
    assert body.startswith(b"data: {") and body.endswith(b"data: [DONE]\n\n")


async def test_requests_may_follow_each_other_unanswered(address: str) -> None:
    content = json.dumps(HELLO).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: t\r\ncontent-length: {len(content)}\r\n"
    one = f"{head}\r\n".encode() + content
    last = f"{head}connection: close\r\n\r\n".encode() + content
    assert (await send(address, one + one + last)).count(b'"text": "Hello"') == 3
