"""/v1/messages: its requests in the form of chat completions, its events, its errors."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

from baton.services.gateway import generate as path
from baton.services.gateway.answer_parts import Arguments, Content, Part, Reasoning, ToolCall
from baton.services.gateway.anthropic.reading import chat_form, prompt_request
from baton.services.gateway.anthropic.schema import MessagesRequest, Prompt
from baton.services.gateway.anthropic.wire import MessagesWire
from baton.services.gateway.identity import Identity
from baton.services.gateway.openai.errors import HttpError
from baton.services.gateway.openai.wire import Choice
from baton.services.gateway.tokenizer import TextCodec
from baton.shared.rpc.errors import EngineFailure, WorkerLost
from baton.v1 import inference_service_pb2 as pb
from tests.device import ROOT
from tests.scripted_model import chain
from tests.unit.gateway.null_frontend import (
    NullFrontend,
    Reply,
    ask,
    chunk,
    num_refused,
    serving,
    started,
    typed_events,
)
from tests.unit.gateway.scripted_frontend import ScriptedFrontend

MESSAGES = "/v1/messages"
USER = {"role": "user", "content": "hello"}
HELLO = {"max_tokens": 16, "messages": [USER]}
TOOL = {
    "name": "weather",
    "description": "of a place",
    "input_schema": {"type": "object", "properties": {"place": {"type": "string"}}},
}


@pytest.fixture(scope="module")
def codec() -> TextCodec | None:
    return TextCodec.load(ROOT / "models/demo")


@pytest.fixture
def frontend(codec: TextCodec) -> NullFrontend:
    return NullFrontend(codec)


@pytest.fixture
async def address(frontend: NullFrontend) -> AsyncIterator[str]:
    async with serving(frontend) as endpoint:
        yield endpoint.address


def error_of(reply: Reply) -> dict[str, Any]:
    """In Anthropic's shape, or the test fails."""
    body = json.loads(reply.body)
    assert body["type"] == "error" and set(body) == {"type", "error", "request_id"}
    assert set(body["error"]) == {"type", "message"}
    error: dict[str, Any] = body["error"]
    return error


# Requests


def chat_of(body: dict[str, Any], template: str | None = None) -> dict[str, Any]:
    return chat_form(prompt_request(MessagesRequest, body), body, template).body


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value, "cache_control": {"type": "ephemeral"}}


def part(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def use(call_id: str, **given: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": "f", "input": given}


def result(call_id: str, **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call_id, **more}


@pytest.mark.parametrize(
    ("body", "messages"),
    [
        ({}, [USER]),
        ({"system": "be brief"}, [{"role": "system", "content": "be brief"}, USER]),
        (
            {"system": [text("be"), text("brief")]},
            [{"role": "system", "content": [part("be"), part("brief")]}, USER],
        ),
        (
            {"messages": [{"role": "user", "content": [text("a"), text("b")]}]},
            [{"role": "user", "content": [part("a"), part("b")]}],
        ),
        (
            {
                "messages": [
                    USER,
                    {
                        "role": "assistant",
                        "content": [
                            {"type": "thinking", "thinking": "hm", "signature": "s"},
                            {"type": "redacted_thinking", "data": "xyz"},
                            text("I look."),
                            use("c1", place="où"),
                            use("c2"),
                        ],
                    },
                    {
                        "role": "user",
                        "content": [
                            result("c1", content="sun"),
                            result("c2", content=[part("rain")], is_error=True),
                            text("And?"),
                        ],
                    },
                    {"role": "assistant", "content": "Rain."},
                    {"role": "user", "content": [result("c2")]},
                ]
            },
            [
                USER,
                {
                    "role": "assistant",
                    "content": "I look.",
                    "reasoning_content": "hm",
                    "tool_calls": [
                        {
                            "id": "c1",
                            "type": "function",
                            "function": {"name": "f", "arguments": '{"place": "où"}'},
                        },
                        {
                            "id": "c2",
                            "type": "function",
                            "function": {"name": "f", "arguments": "{}"},
                        },
                    ],
                },
                {"role": "tool", "tool_call_id": "c1", "content": "sun"},
                {"role": "tool", "tool_call_id": "c2", "content": [part("Error: rain")]},
                {"role": "user", "content": [part("And?")]},
                {"role": "assistant", "content": "Rain."},
                {"role": "tool", "tool_call_id": "c2", "content": ""},
            ],
        ),
    ],
)
def test_blocks_become_messages(body: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    assert chat_of({**HELLO, **body})["messages"] == messages


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"content": "no such file"}, "Error: no such file"),
        ({}, "Error: "),
        ({"content": [part("no"), part("file")]}, [part("Error: no"), part("file")]),
        # It says so itself.
        ({"content": "<tool_use_error>no</tool_use_error>"}, None),
        ({"content": [part("ValueError: no")]}, None),
        ({"content": "sun", "is_error": False}, None),
    ],
)
def test_that_a_tool_failed_is_told(given: dict[str, Any], told: Any) -> None:
    message = {"role": "user", "content": [result("c1", **{"is_error": True, **given})]}
    [answer] = chat_of({**HELLO, "messages": [message]})["messages"]
    assert answer["content"] == (given["content"] if told is None else told)


SCHEMA = {"type": "json_schema", "schema": {"a": 1}}
FUNCTION = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a place",
        "parameters": TOOL["input_schema"],
    },
}


@pytest.mark.parametrize(
    ("given", "chat"),
    [
        ({"temperature": 0.5, "top_p": 0.9, "top_k": 3}, None),
        ({"stop_sequences": ["a", "b"]}, {"stop": ["a", "b"]}),
        ({"tools": [{**TOOL, "type": "custom", "cache_control": {}}]}, {"tools": [FUNCTION]}),
        ({"tool_choice": {"type": "auto"}}, {"tool_choice": "auto"}),
        ({"tool_choice": {"type": "none"}}, {"tool_choice": "none"}),
        (
            {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
            {"tool_choice": "required", "parallel_tool_calls": False},
        ),
        (
            {"tool_choice": {"type": "tool", "name": "f"}},
            {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        ),
        ({"output_config": {"effort": "low"}}, {"reasoning_effort": "low"}),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"a": 1}}}},
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "output", "schema": {"a": 1}, "strict": True},
                }
            },
        ),
        (
            {"output_format": SCHEMA},
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "output", "schema": {"a": 1}, "strict": True},
                }
            },
        ),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, {}),
        ({"context_management": {"edits": []}, "parallel_tool_calls": True}, {}),
        (
            {
                "context_management": {
                    "edits": [{"type": "clear_thinking_20251015", "keep": "all"}]
                },
                "continue_final_message": False,
                "thread": None,
            },
            {},
        ),
        ({"metadata": {"user_id": "u"}, "service_tier": "auto", "cache_control": {}}, {}),
    ],
)
def test_fields_become_those_of_chat_completions(
    given: dict[str, Any], chat: dict[str, Any] | None
) -> None:
    body = chat_of({**HELLO, **given})
    assert body.pop("messages") and body.pop("max_tokens") == 16
    assert body == (given if chat is None else chat)


@pytest.mark.parametrize(
    ("kind", "template", "switches"),
    [
        ("enabled", "{% if enable_thinking %}a{% endif %}", {"enable_thinking": True}),
        ("disabled", "{% if enable_thinking %}a{% endif %}", {"enable_thinking": False}),
        ("enabled", "{{ messages[0].thinking if thinking }}", {"thinking": True}),
        ("adaptive", "{% if enable_thinking %}a{% endif %}", None),
        ("disabled", "{% set thinking = 1 %}{{ messages[0].thinking }}", None),
        ("disabled", "{% if thinking %}", None),
    ],
)
def test_thinking_is_the_templates_switch_where_it_has_one(
    kind: str, template: str, switches: dict[str, bool] | None
) -> None:
    body = chat_of({**HELLO, "thinking": {"type": kind}}, template)
    assert body.get("chat_template_kwargs") == switches
    given = {"chat_template_kwargs": {"enable_thinking": 1, "thinking": 1}}
    body = chat_of({**HELLO, **given, "thinking": {"type": kind}}, template)
    assert body["chat_template_kwargs"] == given["chat_template_kwargs"]


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


GOES_ON = {"messages": [USER, {"role": "assistant", "content": "{"}]}


def block(**given: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [part("a"), given]}]}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "a"}, "max_tokens"),
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [5]}, "messages[0]"),
    ({"messages": [{"content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    (block(), "messages[0].content[1].type"),
    (block(type="text"), "messages[0].content[1].text"),
    (block(type="image", source={}), "messages[0].content[1].type 'image'"),
    (block(type="document", source={}), "messages[0].content[1].type 'document'"),
    (block(type="tool_use"), "messages[0].content[1].type 'tool_use'"),
    (block(type="tool_result"), "messages[0].content[1].tool_use_id"),
    (
        block(type="tool_result", tool_use_id="c", content=[{"type": "image"}]),
        "messages[0].content[1].content[0].type 'image'",
    ),
    (
        {"messages": [USER, {"role": "assistant", "content": [{"type": "tool_use"}]}, USER]},
        "messages[1].content[0].id",
    ),
    # What goes on is a text.
    ({"messages": [USER, {"role": "assistant", "content": [use("c1")]}]}, "messages[1]"),
    ({"messages": [USER] * 4097}, "messages"),
    ({"system": 5}, "system"),
    ({"system": [{"type": "image"}]}, "system[0].type 'image'"),
    ({"stop_sequences": "x"}, "stop_sequences"),
    ({"stop_sequences": [5]}, "stop_sequences[0]"),
    ({"stream": "yes"}, "stream"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_k": -2}, "top_k"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
    ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ({"thinking": {"type": "on"}}, "thinking.type"),
    ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
    ({"output_config": {"format": {"type": "text"}}}, "output_config.format.type"),
    ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
    ({"output_config": {"effort": "huge"}}, "output_config.effort"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"chat_template_kwargs": "x", "thinking": {"type": "enabled"}}, "chat_template_kwargs"),
    ({**GOES_ON, "output_config": {"format": SCHEMA}}, "output_config.format"),
    ({**GOES_ON, "tools": [TOOL], "tool_choice": {"type": "any"}}, "tool_choice"),
    ({**GOES_ON, "tools": [{**TOOL, "strict": True}]}, "tools[0].strict"),
    ({"tools": [{**TOOL, "input_schema": {"a": nested(64)}}]}, "tools[0]"),
    (
        {"messages": [USER, {"role": "assistant", "content": [use("c", a=nested(64))]}, USER]},
        "messages[1].content[0].input",
    ),
    ({"n": 2}, "n"),
    ({"logprobs": True}, "logprobs"),
    ({"stop": ["x"]}, "stop"),
    ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
    ({"container": "c"}, "container"),
    ({"output_format": {"type": "text"}}, "output_format.type"),
    ({"output_format": {"type": "json_schema"}}, "output_format.schema"),
    ({"output_format": SCHEMA, "output_config": {"format": SCHEMA}}, "output_format"),
    ({"output_config": {"task_budget": {"total": 9}}}, "output_config.task_budget"),
    ({"thread": {"id": "t"}}, "thread"),
    (
        {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}},
        "context_management",
    ),
    ({"compaction": {"trigger": 5}}, "compaction"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"add_generation_prompt": False}, "add_generation_prompt"),
    ({"parallel_tool_calls": False}, "parallel_tool_calls"),
    ({"include_reasoning": False}, "include_reasoning"),
    ({"use_beam_search": True}, "use_beam_search"),
]


@pytest.mark.parametrize(("body", "said"), BAD)
async def test_a_field_out_of_its_range_is_named(
    address: str, frontend: NullFrontend, body: dict[str, Any], said: str
) -> None:
    given = {name: value for name, value in {**HELLO, **body}.items() if value is not None}
    reply = await ask(address, MESSAGES, given)
    error = error_of(reply)
    assert (reply.status, error["type"]) == (400, "invalid_request_error")
    assert error["message"].startswith(f"{said} "), error["message"]
    assert frontend.requests == []


# Events


def told(
    parts: Sequence[Part], finish_reason: str = "stop", *, stop: str | None = None, **wire: Any
) -> list[dict[str, Any]]:
    """The events of an answer that comes part by part."""
    about = {"model": "m", "max_tokens": len(parts), **wire}

    def choice() -> Choice:
        has_calls = any(isinstance(part, ToolCall) for part in parts)
        return Choice(parts=list(parts), has_calls=has_calls, num_prompt_tokens=3)

    streamed, whole = choice(), choice()
    writer = MessagesWire("r-1", **about)
    stream = writer.started(0, streamed)
    for each in parts:
        stream += writer.came(0, streamed, [each], [1])
    for one in (streamed, whole):
        one.finish_reason, one.num_completion_tokens = finish_reason, len(parts)
        one.num_cached_tokens, one.stop = 2, stop
    stream += writer.finished(0, streamed) + writer.ended([streamed])
    parsed = typed_events(stream, is_chunked=False)
    message = json.loads(MessagesWire("r-1", **about).whole([whole]))
    assert put_together(parsed) == message
    return parsed


def put_together(parsed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """As clients do it."""
    message: dict[str, Any] = {}
    for event in parsed:
        match event["type"]:
            case "message_start":
                message = json.loads(json.dumps(event["message"]))
            case "content_block_start":
                assert event["index"] == len(message["content"])
                message["content"].append({**event["content_block"], "written": ""})
            case "content_block_delta":
                last, delta = message["content"][event["index"]], event["delta"]
                match delta["type"]:
                    case "input_json_delta":
                        last["written"] += delta["partial_json"]
                    case "signature_delta":
                        last["signature"] += delta["signature"]
                    case kind:
                        name = kind.removesuffix("_delta")
                        last[name] += delta[name]
            case "content_block_stop":
                last = message["content"][event["index"]]
                written = last.pop("written")
                if last["type"] == "tool_use":
                    last["input"] = json.loads(written or "{}")
            case "message_delta":
                message |= {**event["delta"], "usage": event["usage"]}
    return message


def test_a_texts_events_are_in_their_order() -> None:
    parsed = told([Content("Hel"), Content(""), Content("lo\u2028")])
    assert [event["type"] for event in parsed] == [
        "message_start",
        "ping",
        "content_block_start",
        *["content_block_delta"] * 2,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    message = parsed[0]["message"]
    assert (message["content"], message["stop_reason"]) == ([], None)
    assert message["usage"]["input_tokens"] == 3
    assert parsed[-2]["usage"] == {
        "input_tokens": 1,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 2,
        "output_tokens": 3,
    }


def test_thinking_text_and_calls_are_blocks_in_their_order() -> None:
    parts: list[Part] = [
        Reasoning("h"),
        Reasoning("m"),
        Content("I look."),
        ToolCall(0, "callabc01", "weather"),
        Arguments(0, '{"place":'),
        Arguments(0, ' "here"}'),
        ToolCall(1, "callabc02", "time"),
    ]
    message = put_together(told(parts, "tool_calls"))
    assert message["content"] == [
        {"type": "thinking", "thinking": "hm", "signature": "r-1"},
        {"type": "text", "text": "I look."},
        {"type": "tool_use", "id": "callabc01", "name": "weather", "input": {"place": "here"}},
        {"type": "tool_use", "id": "callabc02", "name": "time", "input": {}},
    ]
    assert message["stop_reason"] == "tool_use"
    hidden = put_together(told(parts, "tool_calls", shows_thinking=False))
    assert hidden["content"][0] == {"type": "thinking", "thinking": "", "signature": "r-1"}
    assert hidden["content"][1:] == message["content"][1:]


@pytest.mark.parametrize(
    ("finish_reason", "stop", "max_tokens", "expected"),
    [
        ("stop", None, 1, ("end_turn", None)),
        ("stop", "x", 1, ("stop_sequence", "x")),
        ("length", None, 1, ("max_tokens", None)),
        # Lowered to the room that there was.
        ("length", None, 2, ("model_context_window_exceeded", None)),
    ],
)
def test_why_an_answer_ended(
    finish_reason: str, stop: str | None, max_tokens: int, expected: tuple[str, str | None]
) -> None:
    parsed = told([Content("a")], finish_reason, stop=stop, max_tokens=max_tokens)
    delta = parsed[-2]["delta"]
    assert (delta["stop_reason"], delta["stop_sequence"]) == expected


def test_arguments_that_are_no_object_are_not_lost() -> None:
    for written, expected in (('{"a": 1', '{"a": 1'), ("[1]", [1])):
        choice = Choice(parts=[ToolCall(0, "c", "f"), Arguments(0, written)], has_calls=True)
        message = json.loads(MessagesWire("r", model="m", max_tokens=9).whole([choice]))
        assert message["content"][0]["input"] == {"arguments": expected}


# The endpoint


async def test_whole_and_streamed_say_the_same(address: str, frontend: NullFrontend) -> None:
    reply = await ask(address, MESSAGES, HELLO)
    assert reply.headers["request-id"] == reply.headers["x-request-id"] == "r-1"
    whole = json.loads(reply.body)
    assert whole["content"] == [part("Hello")] and whole["id"] == "msg_r-1"
    streamed = await ask(address, MESSAGES, {**HELLO, "stream": True})
    assert put_together(typed_events(streamed.body)) == whole
    assert frontend.requests[0] == frontend.requests[1]


async def test_more_than_there_is_room_for_may_be_asked(
    address: str, frontend: NullFrontend
) -> None:
    assert (await ask(address, MESSAGES, {**HELLO, "max_tokens": 32_000})).status == 200
    [request] = frontend.requests
    assert request.sampling.max_tokens == 32_000 and request.clamp_max_tokens


async def test_a_prompt_is_counted(address: str, frontend: NullFrontend) -> None:
    body = {"messages": [USER], "system": "be brief"}
    reply = await ask(address, f"{MESSAGES}/count_tokens", body)
    await ask(address, MESSAGES, {**body, "max_tokens": 1})
    [request] = frontend.requests
    assert json.loads(reply.body) == {"input_tokens": len(request.token_ids.token_ids)}
    reply = await ask(address, f"{MESSAGES}/count_tokens", {"system": "be brief"})
    assert error_of(reply)["message"] == "messages is missing"


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (WorkerLost("gone"), 503, "overloaded_error"),
        (EngineFailure("broken"), 500, "api_error"),
        (ValueError("a bug"), 500, "api_error"),
        (HttpError(401, "who?"), 401, "authentication_error"),
        (HttpError(403, "not you"), 403, "permission_error"),
        (HttpError(413, "much"), 413, "request_too_large"),
        (HttpError(429, "often"), 429, "rate_limit_error"),
        (HttpError(504, "late"), 504, "timeout_error"),
    ],
)
async def test_each_status_has_its_name(
    address: str, frontend: NullFrontend, error: Exception, status: int, kind: str
) -> None:
    async def refuse(headers: Mapping[str, str]) -> Identity:
        raise error

    frontend.identify = refuse
    reply = await ask(address, MESSAGES, HELLO)
    assert (reply.status, error_of(reply)["type"]) == (status, kind)
    assert ("retry-after" in reply.headers) is (status == 503)
    assert num_refused(frontend) == {str(status): 1}


async def test_paths_methods_and_models_that_are_not_there(address: str) -> None:
    for where, body, status, kind in (
        (f"{MESSAGES}/batches", HELLO, 404, "not_found_error"),
        (MESSAGES, None, 405, "invalid_request_error"),
        (MESSAGES, {**HELLO, "model": "claude"}, 404, "not_found_error"),
        (MESSAGES, b"{", 400, "invalid_request_error"),
    ):
        reply = await ask(address, where, body)
        assert (reply.status, error_of(reply)["type"]) == (status, kind), where


async def test_an_error_within_a_stream_is_an_event(address: str, frontend: NullFrontend) -> None:
    async def script(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield started()
        yield chunk("a")
        raise WorkerLost("gone")

    frontend.script = script  # type: ignore[assignment]
    parsed = typed_events((await ask(address, MESSAGES, {**HELLO, "stream": True})).body)
    error = {"type": "overloaded_error", "message": "gone"}
    assert parsed[-1] == {"type": "error", "error": error, "request_id": "r-1"}
    assert [event["type"] for event in parsed[-3:-1]] == [
        *("content_block_start", "content_block_delta")
    ]


async def test_the_version_whose_streams_are_others_is_refused(address: str) -> None:
    for version in ("2023-06-01", "2026-10-21"):
        known = f"anthropic-version: {version}\r\nanthropic-beta: some-2030-01-01\r\n"
        assert (await ask(address, MESSAGES, HELLO, headers=known)).status == 200
    reply = await ask(address, MESSAGES, HELLO, headers="anthropic-version: 2023-01-01\r\n")
    assert error_of(reply)["message"].startswith("anthropic-version is 2023-01-01")


async def test_the_timeouts_header_is_the_same(address: str) -> None:
    reply = await ask(address, MESSAGES, HELLO, headers="x-request-timeout: soon\r\n")
    assert error_of(reply)["message"].startswith("x-request-timeout must be seconds")


@pytest.mark.parametrize("stop", ["yz", "y<|im_end|>"])
async def test_the_stop_sequence_is_told(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizers_by_kind: dict[str, Tokenizer],
    monkeypatch: pytest.MonkeyPatch,
    stop: str,
) -> None:
    """As the request has it, also where it names a token that has no text."""
    model_dir = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer.from_str(tokenizers_by_kind["byte_level"].to_str())
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=True)])
    tokenizer.save(str(model_dir / "tokenizer.json"))
    (model_dir / "chat_template.jinja").write_text("{{ messages[0].content }}")
    codec = TextCodec.load(model_dir)
    assert codec is not None

    def token(text: str) -> int:
        token_id = tokenizer.token_to_id(text)
        assert token_id is not None
        return token_id

    follows = token("<|im_end|>") if "im_end" in stop else token("z")
    script = chain([token("a"), token("x"), token("y"), follows, token("w")])
    frontend = ScriptedFrontend(codec, script)
    monkeypatch.setattr(path, "attempts", frontend.attempts)
    body = {"max_tokens": 9, "stop_sequences": ["no", stop]}
    async with serving(frontend) as http:
        given = {**body, "messages": [{"role": "user", "content": "a"}]}
        message = json.loads((await ask(http.address, MESSAGES, given)).body)
        streamed = await ask(http.address, MESSAGES, {**given, "stream": True})
    assert message["content"] == [part("x")]
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", stop)
    assert put_together(typed_events(streamed.body)) == message


def test_an_answer_goes_on_where_the_assistant_spoke_last() -> None:
    """So does the prompt that is counted."""
    body = {"max_tokens": 1, "messages": [USER, {"role": "assistant", "content": "I"}]}
    for kind in (MessagesRequest, Prompt):
        form = chat_form(prompt_request(kind, body), body, None)
        assert form.body["continue_final_message"] and len(form.messages) == 2
    assert "continue_final_message" not in chat_of({**body, "messages": [USER]})
