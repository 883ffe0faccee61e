"""/v1/responses and /v1/messages against a whole stack, by their makers' own packages."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import openai
import pytest

from tests.e2e.harness import Stack

pytestmark = pytest.mark.e2e

_QUESTION = "Who made the earth?"
_NUM_TOKENS = 24


@pytest.fixture(scope="module")
def of_openai(http: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://{http}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def of_anthropic(http: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=f"http://{http}", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def expected(of_openai: openai.OpenAI) -> str:
    """What chat completions say."""
    answer = of_openai.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": _QUESTION}],
        temperature=0,
        max_tokens=_NUM_TOKENS,
    )
    assert answer.choices[0].message.content
    return answer.choices[0].message.content


def test_a_response_created_and_streamed(of_openai: openai.OpenAI, expected: str) -> None:
    response = of_openai.responses.create(
        model="demo", input=_QUESTION, temperature=0, max_output_tokens=_NUM_TOKENS, store=False
    )
    assert response.output_text == expected
    assert response.usage is not None and response.usage.output_tokens <= _NUM_TOKENS
    with of_openai.responses.stream(
        model="demo", input=_QUESTION, temperature=0, max_output_tokens=_NUM_TOKENS
    ) as stream:
        events = list(stream)
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == expected and len(deltas) > 1
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    assert last.response.status == response.status
    assert last.response.output_text == expected


def test_a_conversation_is_sent_back_as_it_came(of_openai: openai.OpenAI) -> None:
    question = {"role": "user", "content": _QUESTION}
    about = {"model": "demo", "temperature": 0, "max_output_tokens": 8}
    first = of_openai.responses.create(input=[question], **about)  # type: ignore[call-overload]
    items = [question, *(item.model_dump() for item in first.output), question]
    second = of_openai.responses.create(input=items, **about)  # type: ignore[call-overload]
    chat = of_openai.chat.completions.create(
        model="demo",
        temperature=0,
        max_tokens=8,
        messages=[
            {"role": "user", "content": _QUESTION},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": _QUESTION},
        ],
    )
    assert second.output_text == chat.choices[0].message.content
    assert second.usage.input_tokens == chat.usage.prompt_tokens  # type: ignore[union-attr]
    counted = of_openai.responses.input_tokens.count(model="demo", input=items)
    assert counted.input_tokens == second.usage.input_tokens


def test_responses_errors_arrive_as_the_packages_own(of_openai: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="not stored"):
        of_openai.responses.retrieve("resp_1")
    with pytest.raises(openai.NotFoundError, match="not stored"):
        of_openai.responses.delete("resp_1")
    with pytest.raises(openai.BadRequestError) as caught:
        of_openai.responses.create(model="demo", input="a", tools=[{"type": "web_search"}])
    assert caught.value.param == "tools[0].type"
    with pytest.raises(openai.BadRequestError) as caught:
        of_openai.responses.create(model="demo", input="a", max_output_tokens=100_000)
    assert caught.value.param == "max_output_tokens"
    assert caught.value.code == "context_length_exceeded"


def test_a_message_created_and_streamed(of_anthropic: anthropic.Anthropic, expected: str) -> None:
    about = {
        "model": "demo",
        "max_tokens": _NUM_TOKENS,
        "messages": [{"role": "user", "content": [{"type": "text", "text": _QUESTION}]}],
        "extra_body": {"temperature": 0},
    }
    message = of_anthropic.messages.create(**about)  # type: ignore[call-overload]
    assert [block.text for block in message.content] == [expected]
    with of_anthropic.messages.stream(**about) as stream:  # type: ignore[arg-type]
        texts = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(texts) == expected and len(texts) > 1
    assert final.stop_reason == message.stop_reason and final.stop_reason is not None
    assert final.usage.output_tokens == message.usage.output_tokens
    read = message.usage.cache_read_input_tokens or 0
    counted = of_anthropic.messages.count_tokens(model="demo", messages=about["messages"])  # type: ignore[arg-type]
    assert counted.input_tokens == message.usage.input_tokens + read


def test_the_stop_sequence_that_ended_it(of_anthropic: anthropic.Anthropic, expected: str) -> None:
    stop = expected[len(expected) // 2 :][:4]
    message = of_anthropic.messages.create(
        model="demo",
        max_tokens=100_000,
        timeout=60,
        system="",
        messages=[{"role": "user", "content": _QUESTION}],
        stop_sequences=["\ufffd\ufffd", stop],
        extra_body={"temperature": 0, "system": None},
    )
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    assert message.content[0].type == "text"
    assert message.content[0].text == expected[: expected.index(stop)]


def test_messages_errors_arrive_as_the_packages_own(
    of_anthropic: anthropic.Anthropic, stack: Stack
) -> None:
    messages: list[anthropic.types.MessageParam] = [{"role": "user", "content": "a"}]
    with pytest.raises(anthropic.NotFoundError):
        of_anthropic.messages.create(model="claude", max_tokens=1, messages=messages)
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\].content\[0\].type 'image'"):
        of_anthropic.messages.create(
            model="demo",
            max_tokens=1,
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "source": {"type": "url", "url": "http://a.example"}}
                    ],
                }
            ],
        )
    long = {"max_tokens": 4000, "extra_body": {"ignore_eos": True}}
    late = {"extra_headers": {"X-Request-Timeout": "0.4"}, "timeout": 60}
    with pytest.raises(anthropic.APIStatusError) as caught:
        of_anthropic.messages.create(model="demo", messages=messages, **long, **late)  # type: ignore[call-overload]
    assert caught.value.status_code == 504
    with (
        pytest.raises(anthropic.APIStatusError, match="timeout_error"),
        of_anthropic.messages.stream(model="demo", messages=messages, **long, **late) as stream,  # type: ignore[arg-type]
    ):
        assert list(stream)
    stack.assert_idle()
