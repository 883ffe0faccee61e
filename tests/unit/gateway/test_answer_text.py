"""What an answer's text is, from the request over HTTP to the last event: workers are scripted."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest
from tokenizers import AddedToken, Tokenizer

from baton.services.gateway import generate as path
from baton.services.gateway import tokenizer as tokenizer_module
from baton.services.gateway.identity import ANONYMOUS
from baton.services.gateway.shared_prompt import SharedPrompt
from baton.services.gateway.tokenizer import TextCodec
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import types_pb2
from tests.scripted_model import chain
from tests.unit.gateway.null_frontend import ask, events, serving
from tests.unit.gateway.scripted_frontend import ScriptedFrontend

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"

TOOL = {"type": "function", "function": {"name": "f"}}
STRICT = {"type": "function", "function": {"name": "g", "strict": True}}

Ask = Callable[..., Any]


class Model:
    """A codec over a tokenizer, with what a test asks of ids."""

    def __init__(self, codec: TextCodec, tokenizer: Tokenizer) -> None:
        self.codec = codec
        self._tokenizer = tokenizer

    def __getitem__(self, token: str) -> int:
        token_id = self._tokenizer.token_to_id(token)
        assert token_id is not None, token
        return token_id

    def bytes_of(self, text: str | bytes) -> list[int]:
        raw = text.encode() if isinstance(text, str) else text
        return [self[f"<0x{byte:02X}>"] for byte in raw]


@pytest.fixture(scope="module")
def load(
    tmp_path_factory: pytest.TempPathFactory, tokenizers_by_kind: dict[str, Tokenizer]
) -> Callable[..., Model]:
    """A model directory of a kind of tokenizer, further tokens and further files."""

    def load(kind: str, *added: AddedToken, files: Mapping[str, Any] | None = None) -> Model:
        model_dir: Path = tmp_path_factory.mktemp(kind)
        tokenizer = Tokenizer.from_str(tokenizers_by_kind[kind].to_str())
        tokenizer.add_tokens(list(added))
        tokenizer.save(str(model_dir / "tokenizer.json"))
        files = {"chat_template.jinja": TEMPLATE, **(files or {})}
        for name, content in files.items():
            is_text = isinstance(content, str)
            (model_dir / name).write_text(content if is_text else json.dumps(content))
        codec = TextCodec.load(model_dir)
        assert codec is not None
        return Model(codec, tokenizer)

    return load


@pytest.fixture
async def answer(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Ask]:
    """Asks a scripted gateway, whole and streamed: (text, finish reason, completion tokens), and
    the pieces that the stream brought."""

    async def answer(
        model: Model,
        next_token: Mapping[int, int],
        *,
        endpoint: str = COMPLETIONS,
        eos: frozenset[int] = frozenset(),
        **body: Any,
    ) -> tuple[tuple[str, str, int], list[str]]:
        frontend = ScriptedFrontend(model.codec, next_token, eos_token_ids=eos)
        monkeypatch.setattr(path, "attempts", frontend.attempts)
        async with serving(frontend) as http:
            reply = await ask(http.address, endpoint, body)
            assert reply.status == 200, reply.body
            whole = json.loads(reply.body)
            options = {"stream": True, "stream_options": {"include_usage": True}}
            streamed = events((await ask(http.address, endpoint, {**body, **options})).body)
        *chunks, usage, _ = streamed
        choices = [chunk["choices"][0] for chunk in chunks]
        pieces = [
            choice["delta"].get("content", "") if "delta" in choice else choice["text"]
            for choice in choices
        ]
        choice = whole["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        assert "".join(pieces) == text
        assert choices[-1]["finish_reason"] == choice["finish_reason"]
        assert usage["usage"] == whole["usage"]
        return (
            (text, choice["finish_reason"], whole["usage"]["completion_tokens"]),
            list(filter(None, pieces)),
        )

    yield answer


async def test_a_byte_that_is_a_character_goes_out_at_once(
    load: Callable[..., Model], answer: Ask
) -> None:
    model = load("byte_fallback")
    newline, word = model["<0x0A>"], model["e"]
    script = {word: newline, newline: newline}
    stopped, _ = await answer(model, script, prompt=[word], stop=["\n"], max_tokens=400)
    assert stopped == ("", "stop", 1)
    whole, pieces = await answer(model, script, prompt=[word], max_tokens=5)
    assert whole == ("\n" * 5, "length", 5)
    assert pieces == ["\n"] * 5


@pytest.mark.parametrize("stop", ["é日", "日", "🏃"])
async def test_a_stop_of_several_bytes_stops_with_its_last_byte(
    load: Callable[..., Model], answer: Ask, stop: str
) -> None:
    model = load("byte_fallback")
    text = "aé日🏃!"
    written = model.bytes_of(text)
    begin = model["<s>"]
    got, pieces = await answer(
        model, chain([begin, *written]), prompt=[begin], stop=[stop], max_tokens=40
    )
    before = text[: text.index(stop)]
    assert got == (before, "stop", len((before + stop).encode()))
    assert "".join(pieces) == before


async def test_a_wrong_byte_spoils_only_itself(load: Callable[..., Model], answer: Ask) -> None:
    model = load("byte_fallback")
    begin, raw = model["<s>"], "é".encode() + b"\xff\xe6\x97" + b"!"
    script = chain([begin, *model.bytes_of(raw)])
    got, pieces = await answer(model, script, prompt=[begin], max_tokens=len(raw))
    assert got[0] == "é\ufffd\ufffd\ufffd!"
    assert pieces[0] == "é"


@pytest.mark.parametrize("kind", ["byte_fallback", "metaspace"])
async def test_prompt_and_text_together_are_what_the_model_wrote(
    load: Callable[..., Model], answer: Ask, kind: str
) -> None:
    model = load(kind, AddedToken("<|im_start|>", special=True))
    begin, word = model["<s>"], model["▁hand"]
    script = chain([model["▁"], word], [begin, word])
    after_text, _ = await answer(model, script, prompt=[begin, model["▁"]], max_tokens=1)
    assert after_text[0] == " hand"
    # Nothing of a text stands before it.
    first, _ = await answer(model, script, prompt=[begin], max_tokens=1)
    assert first[0] == "hand"


async def test_an_answer_goes_on_with_the_last_message(
    load: Callable[..., Model], answer: Ask
) -> None:
    model = load("byte_fallback", AddedToken("<|im_start|>", special=True))
    prompt = model.codec.encode("<|im_start|>e<|im_start|>re", add_special_tokens=False)
    word = model["▁hand"]
    messages = [{"role": "user", "content": "e"}, {"role": "assistant", "content": "re"}]
    asked = {"endpoint": CHAT, "messages": messages, "max_tokens": 1}
    got, _ = await answer(model, {prompt[-1]: word}, continue_final_message=True, **asked)
    # No text of its own: the space before a word is the answer's.
    assert got == (" hand", "length", 1)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"add_generation_prompt": True}, "continue_final_message"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages"),
        # What is there already is no part of the form.
        ({"response_format": {"type": "json_object"}}, "response_format"),
        (
            {"response_format": {"type": "text"}, "structured_outputs": {"regex": "a"}},
            "structured_outputs",
        ),
        ({"structured_outputs": {}, "guided_choice": ["a"]}, "guided_choice"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL, STRICT]}, "tools[1].function.strict"),
    ],
)
async def test_messages_that_do_not_go_on(
    load: Callable[..., Model], fields: dict[str, Any], param: str
) -> None:
    frontend = ScriptedFrontend(load("byte_level").codec, {})
    body = {"messages": [{"role": "assistant", "content": "e"}], "continue_final_message": True}
    async with serving(frontend) as http:
        reply = await ask(http.address, CHAT, {**body, **fields})
    assert (reply.status, reply.error["param"]) == (400, param)


async def test_a_chat_begins_its_own_text(
    load: Callable[..., Model], answer: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("byte_fallback", AddedToken("<|im_start|>", special=True))
    word, last = model["▁hand"], model.codec.encode("<|im_start|>e", add_special_tokens=False)[-1]
    messages = [{"role": "user", "content": "e"}]
    got, _ = await answer(model, {last: word}, endpoint=CHAT, messages=messages, max_tokens=1)
    assert got[0] == "hand"
    # Over gRPC too.
    frontend = ScriptedFrontend(model.codec, {last: word})
    monkeypatch.setattr(path, "attempts", frontend.attempts)
    request = pb.GenerateRequest(sampling=types_pb2.SamplingParams(max_tokens=1))
    request.messages.messages.add(role="user", content="e")
    responses = frontend.generate(request, identity=ANONYMOUS, time_left_s=None)
    assert "".join([each.chunk.text + each.finished.text async for each in responses]) == "hand"


async def test_a_character_that_the_prompt_begins_is_the_answers(
    load: Callable[..., Model], answer: Ask
) -> None:
    model = load("byte_fallback")
    first, second, third = model.bytes_of("日")
    word = model["e"]
    got, _ = await answer(model, chain([second, third]), prompt=[word, first, second], max_tokens=1)
    assert got[0] == "日"
    # Where it does not go on, the broken character is the prompt's.
    got, _ = await answer(model, {second: word}, prompt=[word, first, second], max_tokens=1)
    assert got[0] == "e"
    got, _ = await answer(
        model, {second: model["</s>"]}, prompt=[word, first, second], max_tokens=1
    )
    assert got[0] == ""


async def test_the_end_tokens_text_is_not_the_answers(
    load: Callable[..., Model], answer: Ask
) -> None:
    model = load("byte_level", AddedToken("<|im_end|>", special=False))
    end, letter = model["<|im_end|>"], model["x"]
    eos = frozenset({model["</s>"], end})
    script = {letter: end, model["a"]: letter}
    got, _ = await answer(model, script, eos=eos, prompt=[model["a"]], max_tokens=9)
    assert got == ("x", "stop", 2)
    # One that does not end the answer is text as any other.
    got, _ = await answer(
        model, script, eos=eos, prompt=[model["a"]], max_tokens=2, ignore_eos=True
    )
    assert got == ("x<|im_end|>", "length", 2)
    got, _ = await answer(model, script, prompt=[model["a"]], max_tokens=9, stop_token_ids=[end])
    assert got == ("x", "stop", 2)


@pytest.mark.parametrize("is_special", [True, False])
@pytest.mark.parametrize("is_eos", [True, False])
@pytest.mark.parametrize("ignore_eos", [True, False])
@pytest.mark.parametrize("stop", ["<|im_end|>", "y<|im_end|>", "y<|im_end|>z"])
async def test_a_stop_string_may_name_a_token_without_text(
    load: Callable[..., Model],
    answer: Ask,
    is_special: bool,
    is_eos: bool,
    ignore_eos: bool,
    stop: str,
) -> None:
    model = load("byte_level", AddedToken("<|im_end|>", special=is_special))
    end = model["<|im_end|>"]
    script = chain([model["a"], model["x"], model["y"], end, model["z"], model["w"]])
    eos = frozenset({end} if is_eos else ())
    got, _ = await answer(
        model,
        script,
        eos=eos,
        prompt=[model["a"]],
        stop=[stop],
        max_tokens=5,
        ignore_eos=ignore_eos,
    )
    ends_by_token = is_eos and not ignore_eos
    if stop == "y<|im_end|>z" and ends_by_token:
        assert got == ("xy", "stop", 3)
    else:
        text = "xy" if stop == "<|im_end|>" else "x"
        assert got == (text, "stop", 4 if stop.endswith("z") else 3)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "xy"),
        ({"skip_special_tokens": False}, "x<|tool|>y"),
        # What ends the answer is a special token: it is shown when both are asked.
        ({"include_stop_str_in_output": True}, "xy"),
        ({"include_stop_str_in_output": True, "skip_special_tokens": False}, "x<|tool|>y<|end|>"),
        ({"stop": ["y"]}, "x"),
        ({"stop": ["y"], "include_stop_str_in_output": True}, "xy"),
        ({"stop": ["<|tool|>"], "include_stop_str_in_output": True}, "x<|tool|>"),
        ({"stop": ["l|>y"], "skip_special_tokens": False}, "x<|too"),
    ],
)
async def test_special_tokens_and_stops_are_shown_on_request(
    load: Callable[..., Model], answer: Ask, fields: dict[str, Any], text: str
) -> None:
    model = load(
        "byte_level", AddedToken("<|tool|>", special=True), AddedToken("<|end|>", special=True)
    )
    end = model["<|end|>"]
    script = chain([model["a"], model["x"], model["<|tool|>"], model["y"], end])
    got, _ = await answer(
        model, script, eos=frozenset({end}), prompt=[model["a"]], max_tokens=9, **fields
    )
    assert got[:2] == (text, "stop")


async def test_a_stop_token_that_is_text_is_shown_on_request(
    load: Callable[..., Model], answer: Ask
) -> None:
    model = load("byte_level")
    script = chain([model["a"], model["x"], model["y"]])
    asked = {"prompt": [model["a"]], "max_tokens": 9, "stop_token_ids": [model["y"]]}
    assert (await answer(model, script, **asked))[0] == ("x", "stop", 2)
    got, _ = await answer(model, script, **asked, include_stop_str_in_output=True)
    assert got == ("xy", "stop", 2)


async def test_a_stop_is_not_found_within_a_token_without_text(
    load: Callable[..., Model], answer: Ask
) -> None:
    model = load("byte_level", AddedToken("<|im_end|>", special=True))
    script = chain([model["a"], model["x"], model["<|im_end|>"], model["y"]])
    got, _ = await answer(
        model, script, prompt=[model["a"]], stop=["im", "<", "x<", ">y"], max_tokens=3
    )
    assert got == ("xy", "length", 3)


async def test_an_empty_prompt_is_answered_from_the_start_token(
    load: Callable[..., Model], answer: Ask
) -> None:
    model = load("byte_level")
    script = {model["<s>"]: model["x"]}
    got, _ = await answer(model, script, prompt="", max_tokens=1)
    assert got == ("x", "length", 1)
    got, _ = await answer(model, script, prompt=[""], max_tokens=1)
    assert got[0] == "x"


async def test_parts_stay_parts_and_text_is_wrapped_for_a_template_of_parts(
    load: Callable[..., Model],
) -> None:
    source = "{% for m in messages %}{% for part in m.content %}[{{ part.text }}]{% endfor %}"
    source += "{% endfor %}"
    model = load("byte_level", files={"chat_template.jinja": source})
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    async with serving(ScriptedFrontend(model.codec, {})) as http:
        for content, prompt in ((parts, "[a][b]"), ("a", "[a]")):
            messages = [{"role": "user", "content": content}]
            reply = await ask(http.address, "/tokenize", {"messages": messages})
            expected = model.codec.encode(prompt, add_special_tokens=False)
            assert json.loads(reply.body)["tokens"] == expected


async def test_a_broken_template_is_not_blamed_on_the_messages(
    load: Callable[..., Model],
) -> None:
    model = load("byte_level", files={"chat_template.jinja": "{% for m in messages %}"})
    async with serving(ScriptedFrontend(model.codec, {})) as http:
        body = {"messages": [{"role": "user", "content": "a"}]}
        reply = await ask(http.address, CHAT, body)
        assert (reply.status, reply.error["param"]) == (400, None)
        assert reply.error["code"] == "no_chat_template"
        assert "line 1" in reply.error["message"]


async def test_an_answer_without_a_length_takes_the_room_that_is_left(
    load: Callable[..., Model],
) -> None:
    model = load("byte_level")
    letter = model["x"]
    frontend = ScriptedFrontend(model.codec, {}, max_model_len=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(path, "attempts", frontend.attempts)
        async with serving(frontend) as http:
            for prompt, num_tokens in ((25, 7), (31, 1), (10, 16)):
                reply = await ask(http.address, COMPLETIONS, {"prompt": [letter] * prompt})
                body = json.loads(reply.body)
                assert body["usage"]["completion_tokens"] == num_tokens
                assert body["choices"][0]["finish_reason"] == "length"
            messages = [{"role": "user", "content": "x"}]
            reply = await ask(http.address, CHAT, {"messages": messages})
            assert json.loads(reply.body)["usage"]["total_tokens"] == 32


@pytest.mark.parametrize(
    ("endpoint", "body", "param"),
    [
        (COMPLETIONS, {"prompt": [5] * 32}, "prompt"),
        (COMPLETIONS, {"prompt": [5] * 33}, "prompt"),
        (COMPLETIONS, {"prompt": [[5], [5] * 33]}, "prompt[1]"),
        (COMPLETIONS, {"prompt": "x" * 40}, "prompt"),
        (COMPLETIONS, {"prompt": [5] * 25, "max_tokens": 8}, "max_tokens"),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 40}]}, "messages"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 99},
            "max_completion_tokens",
        ),
    ],
)
async def test_a_request_beyond_the_context_says_so_as_clients_expect(
    load: Callable[..., Model], endpoint: str, body: dict[str, Any], param: str
) -> None:
    model = load("byte_level")
    async with serving(ScriptedFrontend(model.codec, {}, max_model_len=32)) as http:
        for stream in (False, True):
            reply = await ask(http.address, endpoint, {**body, "stream": stream})
            assert (reply.status, reply.error["param"]) == (400, param)
            assert reply.error["code"] == "context_length_exceeded"
            assert "maximum context length is 32 tokens" in reply.error["message"]
            assert reply.error["type"] == "invalid_request_error"


async def test_stops_are_prepared_once_for_all_answers(
    load: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes a walk through all special tokens. What one answer has met is not the others'."""
    model = load("byte_level", AddedToken("<|im_start|>", special=True))
    given: list[object] = []
    mark_tokens = tokenizer_module._mark_tokens

    def count(silent_ids: Any, stops: Any, shown: Any) -> Any:
        given.append(stops)
        return mark_tokens(silent_ids, stops, shown)

    monkeypatch.setattr(tokenizer_module, "_mark_tokens", count)
    frontend = ScriptedFrontend(model.codec, chain([model[each] for each in "abcde"]))
    monkeypatch.setattr(path, "attempts", frontend.attempts)
    body = {"prompt": [model["a"]], "n": 5, "stop": ["d", "<|im_start|>"], "max_tokens": 9}
    # The scripted attempts tell nobody that the prompt is computed.
    monkeypatch.setattr(SharedPrompt, "computed", AsyncMock())
    async with serving(frontend) as http:
        reply = await ask(http.address, COMPLETIONS, body)
    choices = json.loads(reply.body)["choices"]
    assert [(each["text"], each["finish_reason"]) for each in choices] == [("bc", "stop")] * 5
    assert len(given) == 1
