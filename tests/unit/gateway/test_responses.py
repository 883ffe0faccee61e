"""/v1/responses: its requests in the form of chat completions, its events, its errors."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import pytest

from baton.services.gateway.answer_parts import (
    Arguments,
    Content,
    Part,
    PlainParser,
    Reasoning,
    ToolCall,
)
from baton.services.gateway.openai.errors import HttpError, InvalidParam
from baton.services.gateway.openai.responses.reading import chat_form, responses_request
from baton.services.gateway.openai.responses.wire import ResponsesWire
from baton.services.gateway.openai.wire import Choice
from baton.services.gateway.tokenizer import TextCodec
from baton.shared.rpc.errors import EngineFailure, WorkerLost
from baton.v1 import inference_service_pb2 as pb
from tests.device import ROOT
from tests.unit.gateway.null_frontend import (
    NullFrontend,
    Script,
    ask,
    chunk,
    connect,
    endless,
    finished,
    num_refused,
    serving,
    started,
    typed_events,
    wait_until,
)

RESPONSES = "/v1/responses"
HELLO = {"input": "hello"}
LOGPROBS = {"include": ["message.output_text.logprobs"]}
WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "of a place",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    "strict": True,
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


# Requests


def chat_of(body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    form = chat_form(responses_request(body), body)
    return form.body, form.places


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def call(call_id: str, arguments: str = "{}") -> dict[str, Any]:
    return {"type": "function_call", "call_id": call_id, "name": "f", "arguments": arguments}


def as_chat(call_id: str, arguments: str = "{}") -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def thought(text: str) -> dict[str, Any]:
    content = [{"type": "reasoning_text", "text": text}]
    return {"type": "reasoning", "id": "rs_1", "summary": [], "content": content}


def said(text: str) -> dict[str, Any]:
    content = [{"type": "output_text", "text": text, "annotations": []}]
    return {"type": "message", "id": "msg_1", "role": "assistant", "content": content}


@pytest.mark.parametrize(
    ("body", "messages"),
    [
        ({"input": "a"}, [user("a")]),
        (
            {"instructions": "be brief", "input": "a"},
            [{"role": "system", "content": "be brief"}, user("a")],
        ),
        ({"input": [user("a"), {"role": "developer", "content": "b"}]}, None),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}]},
            [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
        ),
        (
            {"input": [user("a"), said("b"), user("c")]},
            [user("a"), {"role": "assistant", "content": "b"}, user("c")],
        ),
        (
            {"input": [{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}]},
            [{"role": "assistant", "content": "no"}],
        ),
        (
            {
                "input": [
                    user("a"),
                    thought("hm"),
                    said("b"),
                    call("c1", '{"x": 1}'),
                    call("c2"),
                    {"type": "function_call_output", "call_id": "c1", "output": "sun"},
                    {
                        "type": "function_call_output",
                        "call_id": "c2",
                        "output": [{"type": "input_text", "text": "rain"}],
                    },
                    call("c3"),
                ]
            },
            [
                user("a"),
                {
                    "role": "assistant",
                    "content": "b",
                    "reasoning_content": "hm",
                    "tool_calls": [as_chat("c1", '{"x": 1}'), as_chat("c2")],
                },
                {"role": "tool", "tool_call_id": "c1", "content": "sun"},
                {
                    "role": "tool",
                    "tool_call_id": "c2",
                    "content": [{"type": "text", "text": "rain"}],
                },
                {"role": "assistant", "content": None, "tool_calls": [as_chat("c3")]},
            ],
        ),
        (
            # Reasoning belongs to what follows it; what others have encrypted says nothing.
            {
                "input": [
                    thought("lost"),
                    user("a"),
                    {"type": "reasoning", "id": "r", "summary": [], "encrypted_content": "x"},
                    call("c1"),
                    thought("again"),
                    call("c2"),
                ]
            },
            [
                user("a"),
                {"role": "assistant", "content": None, "tool_calls": [as_chat("c1")]},
                {
                    "role": "assistant",
                    "content": None,
                    "reasoning_content": "again",
                    "tool_calls": [as_chat("c2")],
                },
            ],
        ),
    ],
)
def test_items_become_messages(body: dict[str, Any], messages: list[dict[str, Any]] | None) -> None:
    assert chat_of(body)[0]["messages"] == (body["input"] if messages is None else messages)


@pytest.mark.parametrize(
    ("given", "chat"),
    [
        ({"max_output_tokens": 7}, {"max_completion_tokens": 7}),
        ({"temperature": 0.5, "top_p": 0.9, "top_k": 3}, None),
        ({"seed": 5, "stop": ["x"], "chat_template_kwargs": {"a": 1}}, None),
        ({"presence_penalty": 1, "guided_regex": "a+"}, None),
        ({"reasoning": {"effort": "low", "summary": "auto"}}, {"reasoning_effort": "low"}),
        ({"text": {"format": {"type": "text"}}}, {"response_format": {"type": "text"}}),
        (
            {"text": {"format": {"type": "json_object"}, "verbosity": "low"}},
            {"response_format": {"type": "json_object"}},
        ),
        (
            {"text": {"format": {"type": "json_schema", "name": "n", "schema": {}}}},
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {}},
                }
            },
        ),
        ({"parallel_tool_calls": False, "tool_choice": "required"}, None),
        (
            {"tool_choice": {"type": "function", "name": "f"}},
            {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        ),
        (
            {"tools": [WEATHER]},
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {key: value for key, value in WEATHER.items() if key != "type"},
                    }
                ]
            },
        ),
        # What asks for nothing here.
        (
            {
                "store": False,
                "truncation": "disabled",
                "include": ["reasoning.encrypted_content"],
                "metadata": {"a": "b"},
                "user": "u",
                "prompt_cache_key": "k",
                "service_tier": "auto",
                "max_tool_calls": 3,
                "background": False,
                "previous_response_id": None,
            },
            {},
        ),
    ],
)
def test_fields_become_those_of_chat_completions(
    given: dict[str, Any], chat: dict[str, Any] | None
) -> None:
    body, _ = chat_of({**HELLO, **given})
    body.pop("messages")
    assert body == (given if chat is None else chat)


def test_allowed_tools_are_those_that_are_left() -> None:
    others = {**WEATHER, "name": "time"}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function"}]}
    allowed["tools"][0]["name"] = "time"  # type: ignore[index]
    body, places = chat_of({**HELLO, "tools": [WEATHER, others], "tool_choice": allowed})
    assert [tool["function"]["name"] for tool in body["tools"]] == ["time"]
    assert body["tool_choice"] == "required"
    assert places["tools[0].function"] == "tools[1]"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": 5}, "input"),
    ({"input": ["a"]}, "input[0]"),
    ({"input": [{}]}, "input[0].type"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"role": 5, "content": "a"}]}, "input[0].role"),
    ({"input": [{"role": "tool", "content": "a"}]}, "input[0].role"),
    ({"input": [{"role": "user", "content": [5]}]}, "input[0].content[0]"),
    ({"input": [{"role": "user", "content": [{}]}]}, "input[0].content[0].type"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
        "input[0].content[0].text",
    ),
    (
        {"input": [user("a"), {"role": "user", "content": [{"type": "input_image"}]}]},
        "input[1].content[0].type",
    ),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    ({"input": [{"type": "computer_call"}]}, "input[0].type"),
    ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input[0].arguments"),
    ({"input": [{"type": "function_call_output", "output": "f"}]}, "input[0].call_id"),
    ({"input": [{"role": "user", "content": ""}] * 4097}, "input"),
    ({"input": [{"role": "user", "content": [{}] * 2049}] * 2}, "input"),
    ({"instructions": 5}, "instructions"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": "a"}, "max_output_tokens"),
    ({"max_output_tokens": 2**32}, "max_output_tokens"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_k": -2}, "top_k"),
    ({"stream": 1}, "stream"),
    ({"text": "x"}, "text"),
    ({"text": {"format": 5}}, "text.format"),
    ({"reasoning": {"effort": 5}}, "reasoning.effort"),
    ({"tools": [5]}, "tools[0]"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [WEATHER, {"type": "computer_use_preview"}]}, "tools[1].type"),
    ({"tools": [{**WEATHER, "parameters": 5}]}, "tools[0].parameters"),
    ({"tool_choice": {"type": "file_search"}}, "tool_choice.type"),
    ({"tool_choice": {"type": "function"}}, "tool_choice.name"),
    ({"tool_choice": {"type": "allowed_tools", "tools": []}}, "tool_choice.mode"),
    (
        {
            "tools": [WEATHER],
            "tool_choice": {
                "type": "allowed_tools",
                "mode": "auto",
                "tools": [{"type": "function", "name": "g"}],
            },
        },
        "tool_choice.tools",
    ),
    ({"store": True}, "store"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"background": True}, "background"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"truncation": "auto"}, "truncation"),
    ({"top_logprobs": 5}, "top_logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"tools": [{**WEATHER, "parameters": {"a": [0] * 20_000}}]}, "tools[0]"),
    ({"input": [call("c", '{"a": ' + "[" * 64 + "]" * 64 + "}")]}, "input[0].arguments"),
    ({"n": 2}, "n"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"add_generation_prompt": False}, "add_generation_prompt"),
    ({"include_reasoning": False}, "include_reasoning"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"messages": [user("a")]}, "messages"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"logit_bias": {"x": 1}}, "logit_bias[x]"),
    ({"include": ["message.output_text.annotations"]}, "include[0]"),
    ({**LOGPROBS, "top_logprobs": -1}, "top_logprobs"),
    ({**LOGPROBS, "top_logprobs": 20, "max_output_tokens": 24_967}, "top_logprobs"),
    ({"include": "x"}, "include"),
    ({"metadata": {"a": 5}}, "metadata.a"),
    ({"metadata": {"a" * 65: "b"}}, "metadata"),
    ({"metadata": {"a": "b" * 513}}, "metadata.a"),
    ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
]


@pytest.mark.parametrize(("body", "param"), BAD)
async def test_a_field_out_of_its_range_is_named(
    address: str, frontend: NullFrontend, body: dict[str, Any], param: str
) -> None:
    reply = await ask(address, RESPONSES, {**HELLO, **body})
    assert (reply.status, reply.error["type"]) == (400, "invalid_request_error")
    assert reply.error["param"] == param and param in reply.error["message"]
    assert frontend.requests == []


async def test_what_the_common_path_refuses_has_the_names_of_this_one(address: str) -> None:
    """Ranges, lengths and templates are chat completions' affair; its names are not told."""
    long = await ask(address, RESPONSES, {**HELLO, "max_output_tokens": 5000, "stop": [""] * 4097})
    assert long.error["param"] == "stop"
    reply = await ask(address, RESPONSES, {"input": [user("x" * (1 << 20)), user("y")]})
    assert reply.error["param"] == "input" and reply.error["message"].startswith("input ")


# Events


def told(parts: Sequence[Part], finish_reason: str = "stop") -> list[dict[str, Any]]:
    """The events of an answer that comes part by part."""
    wire, choice = ResponsesWire("r-1", told={"model": "m"}), Choice(num_prompt_tokens=3)
    stream = wire.started(0, choice)
    for part in parts:
        stream += wire.came(0, choice, [part], [1])
    choice.finish_reason, choice.num_completion_tokens = finish_reason, len(parts)
    choice.num_cached_tokens = 2
    stream += wire.finished(0, choice) + wire.ended([choice])
    parsed = typed_events(stream, is_chunked=False)
    assert [event["sequence_number"] for event in parsed] == list(range(len(parsed)))
    whole = json.loads(
        ResponsesWire("r-1", told={"model": "m"}).whole(
            [
                Choice(
                    parts=list(parts),
                    finish_reason=finish_reason,
                    num_prompt_tokens=3,
                    num_completion_tokens=len(parts),
                    num_cached_tokens=2,
                )
            ]
        )
    )
    assert _timeless(whole) == _timeless(parsed[-1]["response"])
    return parsed


def _timeless(response: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in response.items() if not name.endswith("_at")}


def kinds(parsed: Sequence[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in parsed]


BEGUN = ["created", "in_progress"]
TEXT = ["output_item.added", "content_part.added", "output_text.delta", "output_text.delta"]
TEXT_DONE = ["output_text.done", "content_part.done", "output_item.done"]


def test_a_texts_events_are_in_their_order() -> None:
    parsed = told([Content("Hel"), Content("lo\u2028")])
    assert kinds(parsed) == [*BEGUN, *TEXT, *TEXT_DONE, "completed"]
    created, item = parsed[0]["response"], parsed[-1]["response"]["output"][0]
    assert (created["status"], created["output"], created["usage"]) == ("in_progress", [], None)
    assert item["status"] == "completed" and item["content"][0]["text"] == "Hello\u2028"
    where = {"item_id": item["id"], "output_index": 0, "content_index": 0}
    assert all(where.items() <= event.items() for event in parsed[3:-2])
    assert parsed[-1]["response"]["usage"] == {
        "input_tokens": 3,
        "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 0},
        "output_tokens": 2,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 5,
    }


def test_reasoning_text_and_calls_are_items_in_their_order() -> None:
    parsed = told(
        [
            Reasoning("h"),
            Reasoning("m"),
            Content("I look."),
            ToolCall(0, "callabc01", "weather"),
            Arguments(0, '{"place":'),
            Arguments(0, ' "here"}'),
            ToolCall(1, "callabc02", "time"),
            Arguments(1, "{}"),
        ],
        "tool_calls",
    )
    thinking = ["output_item.added", "content_part.added"] + ["reasoning_text.delta"] * 2
    thinking += ["reasoning_text.done", "content_part.done", "output_item.done"]
    arguments = "function_call_arguments"
    first = ["output_item.added", *[f"{arguments}.delta"] * 2, f"{arguments}.done"]
    second = ["output_item.added", f"{arguments}.delta", f"{arguments}.done", "output_item.done"]
    text = [*TEXT[:3], *TEXT_DONE]
    assert kinds(parsed) == [
        *(*BEGUN, *thinking, *text, *first, "output_item.done", *second, "completed")
    ]
    output = parsed[-1]["response"]["output"]
    assert [item["type"] for item in output] == [
        *("reasoning", "message", "function_call", "function_call")
    ]
    assert output[0]["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert output[2]["call_id"] == "callabc01" and output[2]["name"] == "weather"
    assert output[2]["arguments"] == '{"place": "here"}'
    assert [event["output_index"] for event in parsed[2:-1]] == sorted(
        event["output_index"] for event in parsed[2:-1]
    )
    assert len({item["id"] for item in output}) == 4
    done = next(event for event in parsed if event["type"].endswith("arguments.done"))
    assert (done["name"], done["arguments"]) == ("weather", '{"place": "here"}')


def test_an_answer_that_is_cut_is_incomplete() -> None:
    parsed = told([Content("Hel"), Content("")], "length")
    response = parsed[-1]["response"]
    assert kinds(parsed)[-1] == response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["output"][0]["status"] == "incomplete" and response["completed_at"] is None


def test_an_answer_without_a_word_is_a_message() -> None:
    parsed = told([])
    assert kinds(parsed) == [*BEGUN, *TEXT[:2], *TEXT_DONE, "completed"]
    assert parsed[-1]["response"]["output"][0]["content"][0]["text"] == ""


def test_a_stream_that_breaks_tells_what_has_come() -> None:
    wire, choice = ResponsesWire("r-1", told={}), Choice()
    stream = wire.started(0, choice) + wire.came(0, choice, [Content("Hel")], [1])
    stream += wire.failed(HttpError(503, "gone", code="worker_lost"))
    last = typed_events(stream, is_chunked=False)[-1]
    assert last["type"] == "response.failed"
    response = last["response"]
    assert response["error"] == {"code": "server_error", "message": "gone"}
    assert response["status"] == "failed" and response["output"][0]["status"] == "incomplete"


def entries_of(*names: str) -> list[str]:
    return [json.dumps({"token": name, "logprob": -1.0}) for name in names]


class _Arriving:
    """Logprobs that are there as soon as their tokens are."""

    def __init__(self) -> None:
        self.new: list[str] = []

    def take_entries(self) -> list[str]:
        new, self.new = self.new, []
        return new


def test_logprobs_are_those_of_the_message_and_come_with_its_text() -> None:
    """Tokens of reasoning are counted by the parser, those of calls come before their parts."""
    logprobs: Any = _Arriving()
    parser: Any = PlainParser()
    choice = Choice(parser=parser, logprobs=logprobs)
    steps: list[tuple[str, int, list[Part]]] = [
        ("hm", 1, [Reasoning("hm")]),
        ("</think>", 2, []),
        ("Hel", 2, [Content("Hel")]),
        ("l", 2, []),
        ("o", 2, [Content("lo")]),
        ("<call>", 2, []),
        ("f", 2, [ToolCall(0, "callabc01", "f")]),
        ("{}", 2, [Arguments(0, "{}")]),
        ("</call>", 2, []),
        ("!", 2, [Content("!")]),
        ("<end>", 2, []),
    ]
    wires = [ResponsesWire("r-1", told={}), ResponsesWire("r-1", told={}, is_streamed=False)]
    streams = []
    for wire in wires:
        stream = wire.started(0, choice)
        for token, parser.num_reasoning_tokens, parts in steps:
            logprobs.new += entries_of(token)
            stream += wire.came(0, choice, parts, [1])
        choice.finish_reason = "stop"
        streams.append(stream)
    assert streams[1] == b""
    parsed = typed_events(streams[0] + wires[0].finished(0, choice), is_chunked=False)
    whole = json.loads(wires[1].whole([choice]))
    assert _timeless(whole) == _timeless(parsed[-1]["response"])
    said = [item["content"][0] for item in whole["output"] if item["type"] == "message"]
    tokens = [[each["token"] for each in part["logprobs"]] for part in said]
    # What ends a call is told from what follows when that comes.
    assert tokens == [["Hel", "l", "o"], ["</call>", "!", "<end>"]]
    deltas = [event for event in parsed if event["type"] == "response.output_text.delta"]
    assert [[each["token"] for each in event["logprobs"]] for event in deltas] == [
        *(["Hel"], ["l", "o"], ["</call>", "!"], ["<end>"])
    ]
    done = [event for event in parsed if event["type"] == "response.output_text.done"]
    assert [event["logprobs"] for event in done] == [part["logprobs"] for part in said]


# The endpoint


async def test_logprobs_of_an_answer(address: str, frontend: NullFrontend) -> None:
    frontend.script = with_logprobs
    body = {**HELLO, **LOGPROBS, "top_logprobs": 1, "max_output_tokens": 9}
    whole = json.loads((await ask(address, RESPONSES, body)).body)
    streamed = typed_events((await ask(address, RESPONSES, {**body, "stream": True})).body)[-1]
    assert _timeless(streamed["response"]) == _timeless(whole)
    [entry] = whole["output"][0]["content"][0]["logprobs"]
    assert (entry["logprob"], whole["top_logprobs"]) == (-0.5, 1)
    assert [each["logprob"] for each in entry["top_logprobs"]] == [-0.25]
    assert all(request.sampling.logprobs == 1 for request in frontend.requests)
    # Without `include` there are none.
    plain = json.loads((await ask(address, RESPONSES, HELLO)).body)
    assert plain["output"][0]["content"][0]["logprobs"] == []
    assert not frontend.requests[-1].sampling.HasField("logprobs")


async def with_logprobs(request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse, None]:
    yield started()
    first = chunk("a")
    if request.sampling.HasField("logprobs"):
        top = {"top_token_ids": [11], "top_logprobs": [-0.25]}
        first.chunk.logprobs.add(logprob=-0.5, rank=2, **top)
    yield first
    yield finished("", 1)


async def test_whole_and_streamed_say_the_same(address: str, frontend: NullFrontend) -> None:
    whole = json.loads((await ask(address, RESPONSES, HELLO)).body)
    reply = await ask(address, RESPONSES, {**HELLO, "stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["x-request-id"] == "r-1"
    assert _timeless(typed_events(reply.body)[-1]["response"]) == _timeless(whole)
    assert whole["object"] == "response" and whole["id"] == "resp_r-1"
    assert whole["output"][0]["content"][0]["text"] == "Hello"


async def test_a_response_tells_what_held_for_it(address: str, frontend: NullFrontend) -> None:
    frontend.defaults.sampling.top_p = 0.5
    given = {"metadata": {"a": "b"}, "instructions": "be", "temperature": 0, "user": "u"}
    body = json.loads((await ask(address, RESPONSES, {**HELLO, **given})).body)
    assert given.items() <= body.items()
    assert (body["top_p"], body["store"], body["model"]) == (0.5, False, "null")
    assert body["text"] == {"format": {"type": "text"}} and body["tools"] == []
    [request] = frontend.requests
    assert request.sampling.temperature == 0 and request.standalone_text


async def test_nothing_is_stored(address: str) -> None:
    for method, path in (
        ("GET", f"{RESPONSES}/resp_1"),
        ("DELETE", f"{RESPONSES}/resp_1"),
        ("GET", f"{RESPONSES}/resp_1/input_items"),
        ("POST", f"{RESPONSES}/resp_1/cancel"),
    ):
        reply = await ask(address, path, method=method)
        assert (reply.status, reply.error["code"]) == (404, "response_not_found"), path
        assert "not stored" in reply.error["message"]


async def test_the_input_is_counted(address: str, frontend: NullFrontend) -> None:
    reply = await ask(address, f"{RESPONSES}/input_tokens", HELLO)
    await ask(address, RESPONSES, HELLO)
    [request] = frontend.requests
    count = {"object": "response.input_tokens", "input_tokens": len(request.token_ids.token_ids)}
    assert json.loads(reply.body) == count


async def test_another_models_name_is_not_found(address: str) -> None:
    reply = await ask(address, RESPONSES, {**HELLO, "model": "gpt-9"})
    assert (reply.status, reply.error["code"]) == (404, "model_not_found")


def breaking(after: int, error: Exception) -> Script:
    async def script(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield started()
        for index in range(after):
            yield chunk("a", index)
        raise error

    return script  # type: ignore[return-value]


async def test_errors_before_and_within_a_stream(address: str, frontend: NullFrontend) -> None:
    body = {**HELLO, "stream": True}
    frontend.script = breaking(0, WorkerLost("gone"))
    before = await ask(address, RESPONSES, body)
    assert (before.status, before.error["code"]) == (503, "worker_lost")
    frontend.script = breaking(2, EngineFailure("the logits were not numbers"))
    within = typed_events((await ask(address, RESPONSES, body)).body)
    assert within[-1]["type"] == "response.failed"
    assert within[-1]["response"]["error"]["message"] == "the logits were not numbers"
    # What the frontend has counted is not counted as refused by HTTP.
    assert num_refused(frontend) == {}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("where", [RESPONSES, "/v1/messages"])
async def test_a_client_that_goes_away_ends_the_request(
    address: str, frontend: NullFrontend, where: str, stream: bool
) -> None:
    frontend.script = endless
    body = {**HELLO} if where == RESPONSES else {"messages": [user("a")], "max_tokens": 9}
    content = json.dumps({**body, "stream": stream}).encode()
    reader, writer = await connect(address)
    head = f"POST {where} HTTP/1.1\r\nhost: t\r\ncontent-length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    await wait_until(lambda: frontend.num_in_flight == 1)
    if stream:
        await reader.readuntil(b"\r\n\r\n")
    writer.transport.abort()
    await wait_until(lambda: frontend.num_closed == 1)


async def test_the_endpoints_requests_are_counted(address: str, frontend: NullFrontend) -> None:
    await ask(address, RESPONSES, HELLO)
    await ask(address, RESPONSES, {"input": 5})
    value = frontend.metrics.registry.get_sample_value(
        "baton_http_requests_total", {"endpoint": RESPONSES}
    )
    assert value == 1


def test_store_is_refused_with_a_reason() -> None:
    with pytest.raises(InvalidParam, match="no response is stored") as caught:
        responses_request({**HELLO, "store": True})
    assert caught.value.code == "unsupported_parameter"
