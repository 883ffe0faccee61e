"""The `openai` package against a whole stack, and the same answers over gRPC."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from baton_client import Client
from openai.types.chat import ChatCompletionMessageParam
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from tests.e2e.harness import Stack
from tests.http.conftest import DEMO

pytestmark = pytest.mark.e2e

_PROMPT = "In the beginning"
_MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Who made the earth?"}]
_NUM_TOKENS = 24


@pytest.fixture(scope="module")
def client(http: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://{http}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_one_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-9")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.9, "seed": 7}])
def test_the_same_text_over_http_and_grpc(
    client: openai.OpenAI, stack: Stack, sampling: dict[str, float]
) -> None:
    expected = stack.generate(_PROMPT, max_tokens=_NUM_TOKENS, **{"ignore_eos": False, **sampling})
    options = {"model": "demo", "prompt": _PROMPT, "max_tokens": _NUM_TOKENS, **sampling}
    whole = client.completions.create(**options)  # type: ignore[call-overload]
    stream = client.completions.create(**options, stream=True)  # type: ignore[call-overload]
    streamed = "".join(chunk.choices[0].text for chunk in stream)
    assert whole.choices[0].text == streamed == expected.text != ""
    assert whole.usage.prompt_tokens == expected.num_prompt_tokens
    assert whole.usage.completion_tokens == len(expected.token_ids)


def test_prompts_as_token_ids(client: openai.OpenAI, stack: Stack) -> None:
    prompts = [[5, 6, 7], [8, 9], [10]]
    answer = client.completions.create(
        model="demo", prompt=prompts, max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
    )
    expected = [stack.generate(prompt, max_tokens=8).text for prompt in prompts]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2]


def test_a_chat_streamed_and_whole(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model="demo", messages=_MESSAGES, temperature=0, max_completion_tokens=_NUM_TOKENS
    )
    text = whole.choices[0].message.content
    assert text and whole.choices[0].message.role == "assistant"
    chunks = list(
        client.chat.completions.create(
            model="demo",
            messages=_MESSAGES,
            temperature=0,
            max_tokens=_NUM_TOKENS,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *with_choice, last = chunks
    assert with_choice[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in with_choice) == text
    assert with_choice[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.choices == [] and last.usage is not None and whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens


def test_several_choices_streamed_and_whole(client: openai.OpenAI, stack: Stack) -> None:
    """Of a chat, and of prompts, whose choices come prompt by prompt."""
    whole = client.chat.completions.create(
        model="demo", messages=_MESSAGES, n=3, temperature=0.9, seed=7, max_tokens=_NUM_TOKENS
    )
    stream = client.chat.completions.create(
        model="demo",
        messages=_MESSAGES,
        n=3,
        temperature=0.9,
        seed=7,
        max_tokens=_NUM_TOKENS,
        stream=True,
        stream_options={"include_usage": True},
    )
    texts, reasons = ["", "", ""], ["", "", ""]
    *chunks, last = stream
    for chunk in chunks:
        [choice] = chunk.choices
        assert not reasons[choice.index]
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason or ""
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert len(set(texts)) == 3
    assert last.usage is not None and whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens < _NUM_TOKENS

    sampling = {"temperature": 0.9, "seed": 7, "ignore_eos": False}
    answer = client.completions.create(
        model="demo", prompt=[_PROMPT, "The heaven"], n=2, max_tokens=8, temperature=0.9, seed=7
    )
    expected = [
        result.text
        for prompt in (_PROMPT, "The heaven")
        for result in stack.samples(prompt, n=2, max_tokens=8, **sampling)
    ]
    assert [choice.text for choice in answer.choices] == expected


def test_the_same_chat_over_http_and_grpc(client: openai.OpenAI, stack: Stack) -> None:
    whole = client.chat.completions.create(
        model="demo", messages=_MESSAGES, temperature=0.9, seed=7, max_tokens=_NUM_TOKENS
    )
    messages = [{"role": "user", "content": "Who made the earth?"}]
    with Client(stack.processes["gateway"].address) as grpc_client:
        answer = grpc_client.generate(
            messages=messages, temperature=0.9, seed=7, max_tokens=_NUM_TOKENS
        ).result()
    assert answer.text == whole.choices[0].message.content != ""
    assert whole.usage is not None
    assert answer.usage.num_prompt_tokens == whole.usage.prompt_tokens


def test_parts_say_the_same_as_text(client: openai.OpenAI) -> None:
    def answer(messages: list[ChatCompletionMessageParam]) -> str | None:
        created = client.chat.completions.create(
            model="demo", messages=messages, temperature=0, max_tokens=8
        )
        return created.choices[0].message.content

    parts: list[ChatCompletionMessageParam] = [
        {"role": "user", "content": [{"type": "text", "text": "Who made the earth?"}]}
    ]
    assert answer(parts) == answer(_MESSAGES)


def test_a_chats_prompt_has_its_special_tokens_once(client: openai.OpenAI, http: str) -> None:
    rendered = "<|bos|><|user|>Who made the earth?<|end|><|assistant|>"
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    expected = tokenizer.encode(rendered, add_special_tokens=False).ids
    answer = client.chat.completions.create(model="demo", messages=_MESSAGES, max_tokens=1)
    assert answer.usage is not None and answer.usage.prompt_tokens == len(expected)
    raw = client.with_options(base_url=f"http://{http}").post(
        "/tokenize", cast_to=object, body={"messages": _MESSAGES}
    )
    assert json.loads(json.dumps(raw))["tokens"] == expected


def test_a_chat_without_limit_gets_the_room_that_is_left(client: openai.OpenAI) -> None:
    # Far beyond the 256 tokens that a prompt over gRPC gets without a limit.
    answer = client.chat.completions.create(
        model="demo", messages=_MESSAGES, temperature=0, stop=["\n"], extra_body={"min_p": 0}
    )
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage is not None
    stopped_early = answer.choices[0].finish_reason == "stop"
    assert stopped_early or answer.usage.total_tokens == 4096


def test_stops_and_cached_tokens(client: openai.OpenAI) -> None:
    prompt = "And God said, Let there be light: and there was light. " * 8
    first = client.completions.create(model="demo", prompt=prompt, max_tokens=16, temperature=0)
    text = first.choices[0].text
    stop = text[len(text) // 2 :][:3]
    again = client.completions.create(
        model="demo", prompt=prompt, max_tokens=16, temperature=0, stop=stop
    )
    assert again.choices[0].text == text[: text.index(stop)]
    assert again.choices[0].finish_reason == "stop"
    assert again.usage is not None and again.usage.prompt_tokens_details is not None
    assert (again.usage.prompt_tokens_details.cached_tokens or 0) >= 16


def test_errors_arrive_as_the_packages_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="demo", messages=_MESSAGES, max_tokens=100_000)
    assert caught.value.param == "max_tokens"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="demo", prompt="a", temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="demo", prompt="a", n=2, best_of=4)
    assert (caught.value.param, caught.value.code) == ("best_of", "unsupported_parameter")
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="demo", messages=_MESSAGES, n=129)
    assert caught.value.param == "n"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-9", messages=_MESSAGES)
    with pytest.raises(openai.InternalServerError) as late:
        client.completions.create(
            model="demo",
            prompt="a",
            max_tokens=4000,
            extra_body={"ignore_eos": True},
            extra_headers={"X-Request-Timeout": "0.2"},
        )
    assert late.value.status_code == 504


async def test_the_asynchronous_client_and_many_at_once(http: str, stack: Stack) -> None:
    prompts = [f"The {word}" for word in ("heaven", "earth", "sea", "light")]
    expected = [stack.generate(prompt, max_tokens=16, ignore_eos=False) for prompt in prompts]
    async with openai.AsyncOpenAI(base_url=f"http://{http}/v1", api_key="none") as client:

        async def answer(prompt: str) -> str:
            stream = await client.completions.create(
                model="demo", prompt=prompt, max_tokens=16, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        texts = await asyncio.gather(*map(answer, prompts))
    assert texts == [result.text for result in expected]
    stack.assert_idle()


def test_logprobs_of_a_chat(client: openai.OpenAI) -> None:
    """Streamed and whole, and as transformers has them."""
    options: dict[str, Any] = {
        "model": "demo",
        "messages": _MESSAGES,
        "temperature": 0.7,
        "seed": 3,
        "max_tokens": 12,
        "logprobs": True,
        "top_logprobs": 3,
    }
    [choice] = client.chat.completions.create(**options).choices
    assert choice.logprobs is not None and choice.logprobs.content is not None
    told = choice.logprobs.content
    streamed = [
        entry
        for chunk in client.chat.completions.create(**options, stream=True)
        for each in chunk.choices
        if each.logprobs is not None and each.logprobs.content is not None
        for entry in each.logprobs.content
    ]
    assert [each.model_dump() for each in streamed] == [each.model_dump() for each in told]
    assert _logprobs_of_a_response(client, options) == [each.model_dump() for each in told]
    text = b"".join(bytes(each.bytes or []) for each in told).decode()
    assert text.removesuffix("<|end|>") == choice.message.content
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    prompt = "<|bos|><|user|>Who made the earth?<|end|><|assistant|>"
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    answer_ids = [_id_of(each.token, tokenizer) for each in told]
    expected = _log_softmax([*prompt_ids, *answer_ids])[len(prompt_ids) - 1 :]
    for entry, token_id, row in zip(told, answer_ids, expected, strict=False):
        assert entry.logprob == pytest.approx(float(row[token_id]), abs=1e-4)
        best = row.topk(3).values.tolist()
        assert [each.logprob for each in entry.top_logprobs] == pytest.approx(best, abs=1e-4)


def _logprobs_of_a_response(
    client: openai.OpenAI, asked_of_chat: dict[str, Any]
) -> list[dict[str, Any]]:
    """The same asked of /v1/responses, streamed and whole."""
    about: dict[str, Any] = {
        "input": asked_of_chat["messages"],
        "max_output_tokens": asked_of_chat["max_tokens"],
        "include": ["message.output_text.logprobs"],
        "extra_body": {"seed": asked_of_chat["seed"]},
        **{name: asked_of_chat[name] for name in ("model", "temperature", "top_logprobs")},
    }
    [message] = client.responses.create(**about).output
    [part] = message.content
    events = list(client.responses.create(**about, stream=True))
    deltas = [
        entry
        for event in events
        if event.type == "response.output_text.delta"
        for entry in event.logprobs
    ]
    told = [each.model_dump() for each in part.logprobs]
    assert [each.model_dump() for each in deltas] == told
    return told


@pytest.mark.parametrize("num_new", [0, 1])
def test_an_echo_as_evaluation_harnesses_ask(client: openai.OpenAI, num_new: int) -> None:
    """Prompts as lists of ids, of unequal lengths; twice, since they are in the caches then."""
    prompts = [[1, *range(40, 75)], [1, 50, 60], [1, *range(300, 400)]]
    for _ in range(2):
        answer = client.completions.create(
            model="demo", prompt=prompts, max_tokens=num_new, temperature=0, logprobs=1, echo=True
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        for choice, prompt in zip(answer.choices, prompts, strict=True):
            columns = choice.logprobs
            assert columns is not None and columns.token_logprobs is not None
            assert columns.top_logprobs is not None and columns.tokens is not None
            assert len(columns.tokens) == len(columns.top_logprobs) == len(prompt) + num_new
            # The package says that these are numbers.
            assert [columns.token_logprobs[0], columns.top_logprobs[0]] == [None, None]
            rows = _log_softmax(prompt)
            expected = [float(rows[at - 1][prompt[at]]) for at in range(1, len(prompt))]
            got = columns.token_logprobs[1 : len(prompt)]
            assert got == pytest.approx(expected, abs=1e-4)
            for own, top, row in zip(got, columns.top_logprobs[1:], rows, strict=False):
                greatest = max(top.values())
                assert greatest == pytest.approx(float(row.max()), abs=1e-4)
                assert own <= greatest


def _log_softmax(token_ids: list[int]) -> torch.Tensor:
    model: Any = LlamaForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([token_ids])).logits[0], -1)


def _id_of(token: str, tokenizer: Tokenizer) -> int:
    [token_id] = tokenizer.encode(token, add_special_tokens=False).ids
    return int(token_id)
