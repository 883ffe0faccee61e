"""What other people's clients, as they are published, ask of a running server, and what they get.

    python ask.py http://127.0.0.1:8123 [http://127.0.0.1:4001 (LiteLLM as a proxy)]

Prints a table row for each thing asked, and ends with 1 if one of them failed. The model is one
that speaks no sense: what counts is that the client understood the answer.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import version
from typing import Any

import anthropic
import openai
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

MODEL = "demo"
QUESTION = "Who made the earth?"
MESSAGES = [{"role": "user", "content": QUESTION}]
NUM_TOKENS = 16

Asked = Iterator[tuple[str, Callable[[], Any]]]


class Weather(BaseModel):
    """The weather at a place."""

    place: str = Field(max_length=12)
    degrees: int = Field(ge=-60, le=60)


SCHEMA = {
    "type": "object",
    "properties": {
        "place": {"type": "string", "maxLength": 12},
        "degrees": {"type": "integer", "minimum": -60, "maximum": 60},
    },
    "required": ["place", "degrees"],
    "additionalProperties": False,
}
FUNCTION = {"name": "weather", "description": "Tells the weather", "parameters": SCHEMA}


def by_openai(url: str) -> Asked:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    about: dict[str, Any] = {"model": MODEL, "temperature": 0}
    chat = {**about, "messages": MESSAGES}
    tools = [{"type": "function", "function": FUNCTION}]
    named = {"type": "function", "function": {"name": "weather"}}

    def streamed() -> str:
        chunks = client.chat.completions.create(**chat, max_tokens=NUM_TOKENS, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    def structured() -> Any:
        answer = client.chat.completions.parse(**chat, max_tokens=96, response_format=Weather)
        return answer.choices[0].message.parsed

    def called() -> Any:
        answer = client.chat.completions.create(
            **chat, max_tokens=128, tools=tools, tool_choice=named, parallel_tool_calls=False
        )
        [call] = answer.choices[0].message.tool_calls
        return call.function.name, Weather.model_validate_json(call.function.arguments)

    def called_in_a_stream() -> Any:
        with client.chat.completions.stream(
            **chat,
            max_tokens=128,
            tools=tools,
            tool_choice="required",
            parallel_tool_calls=False,
        ) as stream:
            [call] = stream.get_final_completion().choices[0].message.tool_calls or []
        return call.function.name, json.loads(call.function.arguments)

    def answered() -> str:
        function = {"name": "weather", "arguments": '{"place": "here", "degrees": 3}'}
        call = {"id": "call00001", "type": "function", "function": function}
        turns = [
            *MESSAGES,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call00001", "content": "3 degrees"},
        ]
        answer = client.chat.completions.create(
            **about, messages=turns, tools=tools, max_tokens=NUM_TOKENS, tool_choice="none"
        )
        return said(answer.choices[0].message.content)

    yield (
        "chat",
        lambda: said(
            client.chat.completions.create(**chat, max_tokens=NUM_TOKENS).choices[0].message.content
        ),
    )
    yield "chat, streamed", lambda: said(streamed())
    yield (
        "chat, n=2",
        lambda: [
            said(choice.message.content)
            for choice in client.chat.completions.create(
                model=MODEL, messages=MESSAGES, max_tokens=NUM_TOKENS, n=2, seed=1
            ).choices
        ],
    )
    yield "chat, parse(response_format=Weather)", structured
    yield "chat, tools, tool_choice named", called
    yield "chat, tools, required, streamed", called_in_a_stream
    yield "chat, a tool's answer sent back", answered
    yield (
        "chat, logprobs, top_logprobs=2",
        lambda: [
            (token.token, round(token.logprob, 2), len(token.top_logprobs))
            for token in client.chat.completions.create(
                **chat, max_tokens=2, logprobs=True, top_logprobs=2
            )
            .choices[0]
            .logprobs.content
        ],
    )
    yield (
        "completions",
        lambda: said(
            client.completions.create(**about, prompt="In the beginning", max_tokens=NUM_TOKENS)
            .choices[0]
            .text
        ),
    )
    yield from _responses(client, about)


def _responses(client: openai.OpenAI, about: dict[str, Any]) -> Asked:
    tools = [{"type": "function", **FUNCTION, "strict": True}]

    def streamed() -> str:
        with client.responses.stream(
            **about, input=QUESTION, max_output_tokens=NUM_TOKENS
        ) as stream:
            kinds = [event.type.removeprefix("response.") for event in stream]
        return f"{len(kinds)} events, from {kinds[0]} to {kinds[-1]}"

    def called() -> Any:
        response = client.responses.create(
            **about,
            input=QUESTION,
            tools=tools,
            tool_choice="required",
            parallel_tool_calls=False,
            max_output_tokens=128,
        )
        [call] = response.output
        turns = [
            *MESSAGES,
            call.model_dump(),
            {"type": "function_call_output", "call_id": call.call_id, "output": "3 degrees"},
        ]
        after = client.responses.create(
            **about, input=turns, tools=tools, tool_choice="none", max_output_tokens=NUM_TOKENS
        )
        return call.name, json.loads(call.arguments), said(after.output_text)

    def stored() -> str:
        with suppress(openai.NotFoundError):
            client.responses.retrieve("resp_1")
            return "found"
        return "NotFoundError"

    yield (
        "responses.create",
        lambda: said(
            client.responses.create(
                **about, input=QUESTION, max_output_tokens=NUM_TOKENS, store=False
            ).output_text
        ),
    )
    yield "responses.stream", streamed
    yield (
        "responses.parse(text_format=Weather)",
        lambda: (
            client.responses.parse(
                **about, input=QUESTION, text_format=Weather, max_output_tokens=96
            ).output_parsed
        ),
    )
    yield "responses, tools, then the tool's output", called
    yield "responses.retrieve", stored


def by_anthropic(url: str) -> Asked:
    client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
    about: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": NUM_TOKENS}
    tool = {"name": "weather", "description": "Tells the weather", "input_schema": SCHEMA}
    tools = {"tools": [{**tool, "strict": True}], "extra_body": {"temperature": 0}}

    def streamed() -> Any:
        with client.messages.stream(**about) as stream:
            text = "".join(stream.text_stream)
            return said(text), stream.get_final_message().stop_reason

    def called() -> Any:
        asked = {**about, **tools, "max_tokens": 128}
        one = {"type": "any", "disable_parallel_tool_use": True}
        with client.messages.stream(**asked, tool_choice=one) as stream:
            message = stream.get_final_message()
        [use] = message.content
        answer = {"type": "tool_result", "tool_use_id": use.id, "content": "3 degrees"}
        turns = [
            *MESSAGES,
            {"role": "assistant", "content": message.content},
            {"role": "user", "content": [answer]},
        ]
        after = client.messages.create(
            **{**about, **tools, "messages": turns}, tool_choice={"type": "none"}
        )
        return message.stop_reason, use.name, use.input, said(after.content[0].text)

    def stopped() -> Any:
        message = client.messages.create(**{**about, "max_tokens": 400}, stop_sequences=[" "])
        return message.stop_reason, message.stop_sequence

    def refused() -> str:
        source = {"type": "url", "url": "https://a.example/b.png"}
        image = [{"role": "user", "content": [{"type": "image", "source": source}]}]
        try:
            client.messages.create(**{**about, "messages": image})
        except anthropic.BadRequestError as error:
            return f"BadRequestError: {error.body['error']['message']}"
        raise AssertionError("an image was taken")

    yield "messages.create", lambda: said(client.messages.create(**about).content[0].text)
    yield "messages.stream", streamed
    yield "messages, stop_sequences", stopped
    yield "messages, tools, streamed, then tool_result", called
    yield (
        "messages, output_config.format",
        lambda: json.loads(
            client.messages.create(
                **{**about, "max_tokens": 96},
                output_config={"format": {"type": "json_schema", "schema": SCHEMA}},
            )
            .content[0]
            .text
        ),
    )
    yield (
        "messages.count_tokens",
        lambda: client.messages.count_tokens(model=MODEL, messages=MESSAGES).input_tokens,
    )
    yield "messages with an image", refused


def by_langchain(url: str) -> Asked:
    about: dict[str, Any] = {"model": MODEL, "base_url": f"{url}/v1", "api_key": "none"}
    about |= {"temperature": 0, "max_tokens": 128, "max_retries": 0}
    tools = [{"type": "function", "function": FUNCTION}]
    turns = [
        HumanMessage(QUESTION),
        AIMessage("", tool_calls=[{"name": "weather", "args": {}, "id": "call00001"}]),
        ToolMessage("3 degrees", tool_call_id="call00001"),
    ]
    for name, more in (("", {}), (", responses", {"use_responses_api": True})):
        chat = ChatOpenAI(**about, **more)
        short = ChatOpenAI(**{**about, "max_tokens": NUM_TOKENS}, **more)
        yield f"invoke{name}", lambda short=short: said(short.invoke(QUESTION).text)
        yield (
            f"stream{name}",
            lambda short=short: said("".join(chunk.text for chunk in short.stream(QUESTION))),
        )
        yield (
            f"with_structured_output{name}",
            lambda chat=chat: chat.with_structured_output(Weather).invoke(QUESTION),
        )
        yield (
            f"with_structured_output(function_calling){name}",
            lambda chat=chat: chat.with_structured_output(
                Weather, method="function_calling"
            ).invoke(QUESTION),
        )
        yield (
            f"bind_tools(required){name}",
            lambda chat=chat: [
                (call["name"], call["args"])
                for call in chat.bind_tools(tools, tool_choice="required", strict=True)
                .invoke(QUESTION)
                .tool_calls
            ],
        )
        yield (
            f"a ToolMessage sent back{name}",
            lambda short=short: said(
                short.bind_tools(tools, tool_choice="none").invoke(turns).text
            ),
        )


def by_pydantic_ai(url: str) -> Asked:
    openai_provider = OpenAIProvider(base_url=f"{url}/v1", api_key="none")
    client = anthropic.AsyncAnthropic(base_url=url, api_key="none")
    models = {
        "OpenAIChatModel": OpenAIChatModel(MODEL, provider=openai_provider),
        "OpenAIResponsesModel": OpenAIResponsesModel(MODEL, provider=openai_provider),
        "AnthropicModel": AnthropicModel(
            MODEL, provider=AnthropicProvider(anthropic_client=client)
        ),
    }
    for name, model in models.items():

        def ask(kind: Any, model: Any = model, max_tokens: int = 160) -> Any:
            settings = {"max_tokens": max_tokens}
            return Agent(model, output_type=kind, model_settings=settings).run_sync(QUESTION).output

        yield f"{name}, text", lambda ask=ask: said(ask(str, max_tokens=NUM_TOKENS))
        yield f"{name}, output_type=Weather (a tool)", lambda ask=ask: ask(Weather)
        if name != "AnthropicModel":
            yield f"{name}, NativeOutput(Weather)", lambda ask=ask: ask(NativeOutput(Weather))


def by_litellm(proxy: str) -> Asked:
    client = openai.OpenAI(base_url=f"{proxy}/v1", api_key="sk-none", max_retries=0)
    other = anthropic.Anthropic(base_url=proxy, api_key="sk-none", max_retries=0)
    for model in ("by-chat-completions", "by-openai", "by-anthropic"):
        about = {"model": model, "max_tokens": NUM_TOKENS, "messages": MESSAGES}

        def chat(about: Any = about) -> str:
            return said(client.chat.completions.create(**about).choices[0].message.content)

        def chat_streamed(about: Any = about) -> str:
            chunks = client.chat.completions.create(**about, stream=True)
            return said(
                "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            )

        def response(model: str = model) -> str:
            answer = client.responses.create(
                model=model, input=QUESTION, max_output_tokens=NUM_TOKENS
            )
            return said(answer.output_text)

        def message(about: Any = about) -> str:
            with other.messages.stream(**about) as stream:
                return said("".join(stream.text_stream))

        yield f"{model}: chat completions", chat
        yield f"{model}: chat completions, streamed", chat_streamed
        yield f"{model}: responses", response
        yield f"{model}: messages, streamed", message


def said(text: str | None) -> str:
    """The text, in short. An answer without any is a failure."""
    assert text, "no text came"
    return text if len(text) <= 40 else f"{text[:40]}…"


def main() -> int:
    url, *proxies = sys.argv[1:]
    served = json.loads(urllib.request.urlopen(f"{url}/v1/models").read())["data"]
    assert [model["id"] for model in served] == [MODEL]
    clients: list[tuple[str, Asked]] = [
        (f"openai {version('openai')}", by_openai(url)),
        (f"anthropic {version('anthropic')}", by_anthropic(url)),
        (f"langchain-openai {version('langchain-openai')}", by_langchain(url)),
        (f"pydantic-ai-slim {version('pydantic-ai-slim')}", by_pydantic_ai(url)),
        *(("LiteLLM as a proxy", by_litellm(proxy)) for proxy in proxies),
    ]
    num_failed = 0
    print("| client | asked | got |\n|---|---|---|")
    for client, asked in clients:
        for what, ask in asked:
            try:
                got = repr(ask())
            except Exception as error:
                num_failed += 1
                got = f"**{type(error).__name__}**: {error}"[:300]
            got = got.replace("|", "\\|").replace("\n", " ")
            print(f"| {client} | {what} | {got} |", flush=True)
    return min(num_failed, 1)


if __name__ == "__main__":
    sys.exit(main())
