"""Tools and reasoning over the whole way but the workers: the `openai` package asks, a script
answers."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from openai.types.chat import ChatCompletionChunk
from tokenizers import AddedToken, Tokenizer

from baton.services.gateway import generate as path
from baton.services.gateway.chat_format import ChatFormat
from baton.services.gateway.generation import Generation
from baton.services.gateway.tokenizer import TextCodec
from baton.shared.kv.sequence import FinishReason
from baton.shared.rpc.errors import WorkerLost
from tests.unit.gateway.null_frontend import Reply, ask, serving
from tests.unit.gateway.scripted_frontend import ScriptedFrontend

TEMPLATE = """{% if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Write <tool_call>{"name": ..., "arguments": ...}</tool_call>.<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>
{% endif %}{{ m.content }}{% for call in m.tool_calls %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a place.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
TIME: Any = {"type": "function", "function": {"name": "time"}}
ASKED: Any = [{"role": "user", "content": "How is it in Ulm?"}]
THOUGHT = "<think>\nThe user asks.\n</think>\n\n"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'
MARKERS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>")
REQUIRED = {"tool_choice": "required"}
CHAT = "/v1/chat/completions"
REAL_ATTEMPTS = path.attempts
Runs = AsyncGenerator[list[int], None]


class Scripted(ScriptedFrontend):
    """Every answer is `text`, then the end, `run_length` tokens at a time."""

    def __init__(self, codec: TextCodec) -> None:
        assert codec.chat_template is not None
        end = codec.special_ids["<|im_end|>"]
        super().__init__(codec, {}, eos_token_ids=frozenset({end}), max_model_len=2000)
        self.chat_format = ChatFormat.choose(
            codec.chat_template, codec.special_ids, token_id=codec.token_id
        )
        self._end = end
        self.text = ""
        self.run_length = 1

    async def attempts(self, generation: Generation, *rest: object) -> Runs:
        assert self.codec is not None
        script = [*self.codec.encode(self.text, add_special_tokens=False), self._end]
        limit = generation.admitted.params.max_tokens
        reason = FinishReason.LENGTH if limit < len(script) else FinishReason.STOP
        # What earlier attempts emitted is there.
        script = script[len(generation.token_ids) : limit]
        for start in range(0, len(script), self.run_length):
            run = script[start : start + self.run_length]
            generation.token_ids += run
            if start + self.run_length >= len(script):
                generation.finish_reason = reason
            yield run


@pytest.fixture(scope="module", params=["special", "plain"])
def codec(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tokenizers_by_kind: dict[str, Tokenizer],
) -> TextCodec:
    """Of a vocabulary that has the markers as special tokens, or that has to spell them."""
    num_special = len(MARKERS) if request.param == "special" else 2
    tokenizer = tokenizers_by_kind["byte_level"]
    return codec_with(tokenizer, tmp_path_factory.mktemp("chat"), MARKERS[:num_special])


def codec_with(
    tokenizer: Tokenizer, directory: Path, special: Sequence[str], others: Sequence[str] = ()
) -> TextCodec:
    """`others`: tokens of their own that yield text."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    tokenizer.add_tokens([AddedToken(text, special=False) for text in others])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    codec = TextCodec.load(directory)
    assert codec is not None
    return codec


@pytest.fixture
def frontend(codec: TextCodec, monkeypatch: pytest.MonkeyPatch) -> Scripted:
    frontend = Scripted(codec)
    monkeypatch.setattr(path, "attempts", frontend.attempts)
    return frontend


@asynccontextmanager
async def client_of(frontend: Scripted) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        serving(frontend) as endpoint,
        openai.AsyncOpenAI(
            base_url=f"http://{endpoint.address}/v1", api_key="none", max_retries=0
        ) as client,
    ):
        yield client


def put_together(chunks: Sequence[ChatCompletionChunk]) -> dict[str, Any]:
    told: dict[str, Any] = {"content": "", "reasoning": "", "calls": [], "reason": None}
    for chunk in chunks:
        for choice in chunk.choices:
            told["content"] += choice.delta.content or ""
            told["reasoning"] += getattr(choice.delta, "reasoning_content", None) or ""
            told["reason"] = choice.finish_reason or told["reason"]
            for call in choice.delta.tool_calls or ():
                assert call.function is not None
                if call.id is not None:
                    assert call.type == "function" and call.function.arguments == ""
                    assert call.index == len(told["calls"])
                    told["calls"].append([call.id, call.function.name, ""])
                else:
                    told["calls"][call.index][2] += call.function.arguments or ""
    return told


@pytest.mark.parametrize("run_length", [1, 5])
async def test_a_call_whole_and_streamed(frontend: Scripted, run_length: int) -> None:
    frontend.text, frontend.run_length = f"{THOUGHT}I look.\n{CALL}", run_length
    options: Any = {"model": "null", "messages": ASKED, "tools": [WEATHER, TIME]}
    async with client_of(frontend) as client:
        whole = await client.chat.completions.create(**options)
        stream = await client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    [choice] = whole.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "I look."
    assert choice.message.reasoning_content == "The user asks."
    assert choice.message.tool_calls is not None
    [call] = choice.message.tool_calls
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Ulm"})
    told = put_together(chunks)
    assert told == {
        "content": "I look.",
        "reasoning": "The user asks.",
        "calls": [[call.id, "weather", call.function.arguments]],
        "reason": "tool_calls",
    }
    assert whole.usage is not None and whole.usage.completion_tokens_details is not None
    num_reasoning = whole.usage.completion_tokens_details.reasoning_tokens
    assert num_reasoning is not None and chunks[-1].usage == whole.usage
    if run_length == 1:
        codec = frontend.codec
        assert codec is not None
        thought = codec.encode(THOUGHT.strip(), add_special_tokens=False)
        begin = codec.encode("<think>", add_special_tokens=False)
        assert num_reasoning == len(thought) - len(begin)


@pytest.mark.parametrize("num_special", [2, len(MARKERS)])
async def test_reasoning_is_counted_alike_however_tokens_come_together(
    num_special: int,
    tokenizers_by_kind: dict[str, Tokenizer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Markers that are tokens count as such, whether they are special or, as Qwen3's, text."""
    markers = MARKERS[:num_special], MARKERS[num_special:]
    codec = codec_with(tokenizers_by_kind["byte_level"], tmp_path, *markers)
    frontend = Scripted(codec)
    monkeypatch.setattr(path, "attempts", frontend.attempts)
    frontend.text = f"{THOUGHT}I look.\n{CALL}"
    num_reasoning = len(codec.encode(THOUGHT.strip(), add_special_tokens=False)) - 1
    async with client_of(frontend) as client:
        for frontend.run_length in (1, 2, 3, 5, 200):
            answer = await client.chat.completions.create(
                model="null", messages=ASKED, tools=[WEATHER]
            )
            assert answer.choices[0].message.tool_calls
            assert answer.usage is not None
            assert answer.usage.completion_tokens_details is not None
            assert answer.usage.completion_tokens_details.reasoning_tokens == num_reasoning


async def test_content_is_null_when_there_are_only_calls(frontend: Scripted) -> None:
    frontend.text = f"\n{CALL}\n{CALL}\n"
    async with client_of(frontend) as client:
        options: Any = {"model": "null", "messages": ASKED, "tools": [WEATHER]}
        both = await client.chat.completions.create(**options)
        one = await client.chat.completions.create(**options, parallel_tool_calls=False)
        none = await client.chat.completions.create(**options, tool_choice="none")
    assert both.choices[0].message.content is None
    calls = both.choices[0].message.tool_calls or []
    assert len(calls) == 2 and calls[0].id != calls[1].id
    assert len(one.choices[0].message.tool_calls or ()) == 1
    assert none.choices[0].message.tool_calls is None
    assert none.choices[0].finish_reason == "stop"


async def test_a_loop_of_two_turns(frontend: Scripted) -> None:
    async with client_of(frontend) as client:
        frontend.text = CALL
        options: Any = {"model": "null", "tools": [WEATHER]}
        first = await client.chat.completions.create(messages=ASKED, **options)
        message = first.choices[0].message
        assert message.tool_calls is not None
        answer = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Rain."}
        messages: Any = [*ASKED, message.model_dump(exclude_none=True), answer]
        frontend.text = "It rains."
        second = await client.chat.completions.create(messages=messages, **options)
    assert second.choices[0].message.content == "It rains."
    assert second.choices[0].finish_reason == "stop"
    codec = frontend.codec
    assert codec is not None
    prompt = codec.decode(frontend.requests[-1].token_ids.token_ids, skip_special=False)
    assert prompt.startswith(f"<|im_start|>system\n{json.dumps(WEATHER)}\n")
    assert f"<|im_start|>assistant\n{CALL}<|im_end|>\n<|im_start|>tool\nRain.<|im_end|>" in prompt


async def test_responses_bring_the_same_and_take_it_back(frontend: Scripted) -> None:
    frontend.text = f"{THOUGHT}I look.\n{CALL}"
    tool: Any = {"type": "function", **WEATHER["function"]}
    options: Any = {"model": "null", "tools": [tool]}
    async with client_of(frontend) as client:
        whole = await client.responses.create(**options, input=ASKED)
        async with client.responses.stream(**options, input=ASKED) as stream:
            streamed = await stream.get_final_response()
        kinds = [item.type for item in whole.output]
        assert kinds == [item.type for item in streamed.output]
        assert kinds == ["reasoning", "message", "function_call"]
        call = whole.output[2]
        assert call.type == "function_call" and json.loads(call.arguments) == {"city": "Ulm"}
        assert whole.output_text == streamed.output_text == "I look."
        frontend.text = "It rains."
        answer = {"type": "function_call_output", "call_id": call.call_id, "output": "Rain."}
        turns: Any = [*ASKED, *(item.model_dump() for item in whole.output), answer]
        last = await client.responses.create(**options, input=turns)
    assert last.output_text == "It rains."
    prompt = _prompt(frontend)
    assert "<think>The user asks.</think>\nI look." in prompt
    assert '{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>' in prompt
    assert "<|im_start|>tool\nRain.<|im_end|>" in prompt


async def test_messages_bring_the_same_and_take_it_back(frontend: Scripted) -> None:
    frontend.text = f"{THOUGHT}I look.\n{CALL}"
    function = WEATHER["function"]
    tool: Any = {"name": "weather", "input_schema": function["parameters"]}
    options: Any = {"model": "null", "max_tokens": 400, "tools": [tool]}
    async with (
        serving(frontend) as endpoint,
        anthropic.AsyncAnthropic(
            base_url=f"http://{endpoint.address}", api_key="none", max_retries=0
        ) as client,
    ):
        whole = await client.messages.create(**options, messages=ASKED)
        async with client.messages.stream(**options, messages=ASKED) as stream:
            streamed = await stream.get_final_message()
        kept: list[Any] = []
        for message in (whole, streamed):
            kept = [block.model_dump() for block in message.content]
            thinking, text, use = kept
            assert (thinking["type"], thinking["thinking"]) == ("thinking", "The user asks.")
            assert (text["type"], text["text"]) == ("text", "I look.")
            assert (use["type"], use["name"], use["input"]) == (
                *("tool_use", "weather"),
                {"city": "Ulm"},
            )
            assert message.stop_reason == "tool_use"
        frontend.text = "It rains."
        answer = {"type": "tool_result", "tool_use_id": kept[2]["id"], "content": "Rain."}
        turns: Any = [
            *ASKED,
            {"role": "assistant", "content": kept},
            {"role": "user", "content": [answer]},
        ]
        last = await client.messages.create(
            **options, messages=turns, thinking={"type": "disabled"}
        )
    assert [block.type for block in last.content] == ["text"]
    prompt = _prompt(frontend)
    assert "<think>The user asks.</think>\nI look." in prompt
    assert '{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>' in prompt
    assert "<|im_start|>tool\nRain.<|im_end|>" in prompt
    # The template's switch.
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def _prompt(frontend: Scripted) -> str:
    """Of the last request, as the template wrote it."""
    assert frontend.codec is not None
    token_ids = list(frontend.requests[-1].token_ids.token_ids)
    return frontend.codec.decode(token_ids, skip_special=False)


async def test_a_call_goes_on_in_another_attempt(
    frontend: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the same call: no id, name or argument comes twice, and none is lost."""

    async def lost_twice(generation: Generation, cluster: object) -> Runs:
        async for run in frontend.attempts(generation):
            yield run
            if len(generation.token_ids) in (5, 20) and generation.num_attempts < 3:
                raise WorkerLost("decode-0 is gone")

    frontend.text = f"{THOUGHT}{CALL}"
    options: Any = {"model": "null", "messages": ASKED, "tools": [WEATHER], "stream": True}
    async with client_of(frontend) as client:
        undisturbed = [chunk async for chunk in await client.chat.completions.create(**options)]
        monkeypatch.setattr(path, "attempts", REAL_ATTEMPTS)
        monkeypatch.setattr(path, "run_attempt", lost_twice)
        chunks = [chunk async for chunk in await client.chat.completions.create(**options)]
    assert frontend.counters["extra_attempts"] == 2
    assert put_together(chunks) == put_together(undisturbed)
    assert len(put_together(chunks)["calls"]) == 1


async def test_what_is_cut_off_is_told(frontend: Scripted) -> None:
    frontend.text = CALL
    codec = frontend.codec
    assert codec is not None
    length = len(codec.encode(CALL[: CALL.index("Ulm")], add_special_tokens=False))
    async with client_of(frontend) as client:
        answer = await client.chat.completions.create(
            model="null", messages=ASKED, tools=[WEATHER], max_tokens=length
        )
    [choice] = answer.choices
    assert choice.finish_reason == "length" and choice.message.tool_calls is not None
    assert choice.message.tool_calls[0].function.arguments == '{"city": "'  # type: ignore[union-attr]


async def test_a_stop_text_finds_a_marker_and_none_of_its_letters(frontend: Scripted) -> None:
    frontend.text = f"{THOUGHT}I look.\n{CALL}"
    async with client_of(frontend) as client:
        options: Any = {"model": "null", "messages": ASKED, "tools": [WEATHER]}
        stopped = await client.chat.completions.create(**options, stop="</tool_call>")
        assert frontend.codec is not None
        if "<think>" in frontend.codec.special_ids:
            passed = await client.chat.completions.create(**options, stop="tool_c")
            assert passed.choices[0].finish_reason == "tool_calls"
    # The call was there before the stop.
    assert stopped.choices[0].finish_reason == "tool_calls"
    assert len(stopped.choices[0].message.tool_calls or ()) == 1


async def test_switches_reach_the_template(frontend: Scripted) -> None:
    frontend.text = "Rain."

    async def prompt(**options: Any) -> str:
        async with client_of(frontend) as client:
            await client.chat.completions.create(model="null", messages=ASKED, **options)
        assert frontend.codec is not None
        token_ids = frontend.requests[-1].token_ids.token_ids
        return frontend.codec.decode(token_ids, skip_special=False)

    closed = "assistant\n<think>\n\n</think>\n\n"
    off: Any = {"chat_template_kwargs": {"enable_thinking": False}}
    assert (await prompt(extra_body=off)).endswith(closed)
    assert (await prompt(reasoning_effort="none")).endswith(closed)
    assert (await prompt(reasoning_effort="high")).endswith("assistant\n")
    on: Any = {"chat_template_kwargs": {"enable_thinking": True, "other": "x"}}
    assert (await prompt(extra_body=on, reasoning_effort="none")).endswith("assistant\n")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"tools": {}}, "tools"),
    ({"tools": [WEATHER] * 513}, "tools"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a" * 129}}]}, "tools[0].function.name"),
    ({"tools": [TIME, TIME]}, "tools[1].function.name"),
    (
        {"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]},
        "tools[0].function.parameters",
    ),
    (
        {
            "tools": [
                {"type": "function", "function": {"name": "a", "parameters": {"type": "list"}}}
            ]
        },
        "tools[0].function.parameters.type",
    ),
    ({"tools": [TIME], "tool_choice": "any"}, "tool_choice"),
    ({"tools": [TIME], "tool_choice": 5}, "tool_choice"),
    ({"tools": [TIME], "tool_choice": {"type": "custom"}}, "tool_choice.type"),
    ({"tools": [TIME], "tool_choice": {"type": "function"}}, "tool_choice.function.name"),
    (
        {"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "b"}}},
        "tool_choice.function.name",
    ),
    ({"tool_choice": "required"}, "tool_choice"),
    (
        {"tools": [TIME], "tool_choice": "required", "guided_regex": "a"},
        "tool_choice",
    ),
    ({"functions": [{"name": "a"}]}, "functions"),
    ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
    ({"reasoning_effort": "huge"}, "reasoning_effort"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {str(i): 1 for i in range(33)}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs.messages"),
    ({"chat_template_kwargs": {"tools": None}}, "chat_template_kwargs.tools"),
    ({"chat_template_kwargs": {"add_generation_prompt": 1}}, "chat_template_kwargs.add_gen"),
    ({"chat_template_kwargs": {"raise_exception": 1}}, "chat_template_kwargs.raise_exception"),
    ({"chat_template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs.bos_token"),
    ({"chat_template_kwargs": {"a b": 1}}, "chat_template_kwargs.a b"),
    ({"chat_template_kwargs": {"a": [1]}}, "chat_template_kwargs.a"),
    ({"chat_template_kwargs": {"a": "x" * 257}}, "chat_template_kwargs.a"),
    ({"chat_template_kwargs": {"a": 1e300}}, "chat_template_kwargs.a"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
        "messages[0].tool_calls[0].function.name",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": 1}}]}]},
        "messages[0].tool_calls[0].function.name",
    ),
    (
        {
            "messages": [
                {"role": "assistant", "tool_calls": [{"type": "x", "function": {"name": "a"}}]}
            ]
        },
        "messages[0].tool_calls[0].type",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{}] * 4097}]},
        "messages",
    ),
    ({"messages": [{"role": "user", "content": "a", "tool_call_id": "b"}]}, "messages[0].tool_c"),
    ({"messages": [{"role": "tool", "tool_call_id": "b"}]}, "messages[0].content"),
    ({"messages": [{"role": "function", "content": "b"}]}, "messages[0].role"),
]


async def test_what_is_wrong_is_named(frontend: Scripted) -> None:
    async with serving(frontend) as endpoint:
        for body, param in BAD:
            reply: Reply = await ask(endpoint.address, CHAT, {"messages": ASKED, **body})
            assert reply.status == 400, body
            named = reply.error["param"]
            assert named == param or (named.startswith(param) and param[-1] not in "]"), (
                body,
                named,
            )
    assert frontend.requests == []


async def test_tools_need_a_template_and_a_format_that_know_them(frontend: Scripted) -> None:
    body = {"messages": ASKED, "tools": [TIME]}
    async with serving(frontend) as endpoint:
        frontend.chat_format = ChatFormat()
        reply = await ask(endpoint.address, CHAT, body)
        assert reply.status == 400 and "--tool-format" in reply.error["message"]
        assert reply.error["param"] == "tools"
        # Nothing is asked of the model by these.
        neutrals: list[dict[str, Any]] = [{"tool_choice": "none"}, {"tools": []}, {"tools": None}]
        for neutral in neutrals:
            reply = await ask(endpoint.address, CHAT, {**body, **neutral, "max_tokens": 1})
            assert reply.status == 200


async def test_calls_that_must_come_are_a_constraint(frontend: Scripted) -> None:
    strict: Any = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "array"}}}
    asked: list[tuple[dict[str, Any], list[str], bool, bool]] = [
        (REQUIRED, ["weather", "time"], True, False),
        (
            {"tool_choice": "required", "parallel_tool_calls": False},
            ["weather", "time"],
            True,
            True,
        ),
        (
            {"tool_choice": {"type": "function", "function": {"name": "time"}}},
            ["time"],
            True,
            True,
        ),
        # The form of what is said: calls say nothing.
        ({**REQUIRED, "response_format": schema}, ["weather", "time"], True, False),
        ({"tools": [strict, TIME]}, ["weather", "time"], False, False),
        ({"response_format": schema}, ["weather", "time", ""], True, True),
    ]
    async with serving(frontend) as endpoint:
        for body, names, only, at_most_one in asked:
            frontend.requests.clear()
            await ask(endpoint.address, CHAT, {"messages": ASKED, "tools": [WEATHER, TIME], **body})
            [request] = frontend.requests
            tags = request.constraint.structural_tags
            begins = [f'<tool_call>\n{{"name": "{name}", "arguments": ' for name in names if name]
            begins += [name for name in names if not name]
            assert [tag.begin for tag in tags.tags] == begins
            assert (tags.only_tags, tags.at_most_one) == (only, at_most_one)
            # The model may think before.
            assert request.constraint.begin_after.text == "</think>"
            if names[0] == "weather":
                # One that need not be valid is an object all the same.
                is_free = "response_format" in body and "tool_choice" not in body
                expected = {"type": "object"} if is_free else WEATHER["function"]["parameters"]
                assert json.loads(tags.tags[0].json_schema) == expected
        off = {"enable_thinking": False}
        body = {"tools": [WEATHER], "tool_choice": "required", "chat_template_kwargs": off}
        await ask(endpoint.address, CHAT, {"messages": ASKED, **body})
        assert not frontend.requests[-1].constraint.HasField("begin_after")
        await ask(endpoint.address, CHAT, {"messages": ASKED, "tools": [WEATHER]})
        assert not frontend.requests[-1].HasField("constraint")


async def test_a_prompt_is_counted_with_its_tools(frontend: Scripted) -> None:
    async with serving(frontend) as endpoint:
        bare = await ask(endpoint.address, "/tokenize", {"messages": ASKED})
        with_tools = await ask(
            endpoint.address, "/tokenize", {"messages": ASKED, "tools": [WEATHER]}
        )
        frontend.text = "Rain."
        answer = await ask(endpoint.address, CHAT, {"messages": ASKED, "tools": [WEATHER]})
    counts = [json.loads(reply.body)["count"] for reply in (bare, with_tools)]
    assert counts[0] < counts[1] == json.loads(answer.body)["usage"]["prompt_tokens"]


async def test_the_other_endpoints_tell_the_same_call(frontend: Scripted) -> None:
    frontend.text = f"{THOUGHT}I look.\n{CALL}"
    function = WEATHER["function"]
    named = {"name": "weather", "description": function["description"]}
    schema = function["parameters"]
    asked = {"model": "null", "max_tokens": 200, "messages": ASKED}
    tools = {
        "/v1/messages": {**asked, "tools": [{**named, "input_schema": schema}]},
        "/v1/responses": {
            "model": "null",
            "input": ASKED,
            "tools": [{"type": "function", **named, "parameters": schema}],
        },
    }
    async with serving(frontend) as endpoint:
        replies = {
            where: json.loads((await ask(endpoint.address, where, body)).body)
            for where, body in tools.items()
        }
        missing = await ask(
            endpoint.address, "/v1/messages", {**asked, "tool_choice": {"type": "any"}}
        )
    blocks = {block["type"]: block for block in replies["/v1/messages"]["content"]}
    assert blocks["text"]["text"] == "I look."
    assert (blocks["tool_use"]["name"], blocks["tool_use"]["input"]) == ("weather", {"city": "Ulm"})
    assert replies["/v1/messages"]["stop_reason"] == "tool_use"
    items = {item["type"]: item for item in replies["/v1/responses"]["output"]}
    assert json.loads(items["function_call"]["arguments"]) == {"city": "Ulm"}
    assert items["message"]["content"][0]["text"] == "I look."
    assert {"reasoning", "message", "function_call"} == set(items)
    assert missing.status == 400
