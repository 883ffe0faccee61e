"""What a model wrote for arguments, where it is made an object of."""

from __future__ import annotations

import json

import pytest

from baton.services.gateway.answer_parts import Arguments, Part, ToolCall
from baton.services.gateway.anthropic.wire import MessagesWire
from baton.services.gateway.openai.tools import MadeCall, arguments_nesting, template_calls
from baton.services.gateway.openai.wire import Choice
from baton.services.gateway.strict_json import strict_json

NOT_READ = [
    '{"a": NaN}',
    '{"a": [-Infinity]}',
    '{"a": 1e999}',
    f'{{"a": {"9" * 4000}.5}}',
    f'{{"a": {"9" * 5000}}}',
    f'{{"a": {"[" * 1500}{"]" * 1500}}}',
    f'{{"a": {"[" * 300}{"]" * 300}}}',
    f'{{"a": {"[" * 100_000}',
    '{"a": "\\ud800"}',
    '{"a": "\ud800"}',
    '{"a": 1',
]


@pytest.mark.parametrize("text", NOT_READ, ids=range(len(NOT_READ)))
def test_what_could_not_be_written_again_stays_text(text: str) -> None:
    with pytest.raises(ValueError):
        strict_json(text)
    parts: list[Part] = [ToolCall(0, "id", "time"), Arguments(0, text)]
    body = MessagesWire("r", model="m", max_tokens=9).whole([Choice(parts=parts)])
    [block] = json.loads(body, parse_constant=pytest.fail)["content"]
    assert block["input"] == {"arguments": text}
    made = MadeCall.model_validate({"function": {"name": "time", "arguments": "{}"}})
    made.function.arguments = text
    [call] = template_calls([made], "tool_calls", arguments_nesting())
    assert call["function"]["arguments"] == text


def test_what_is_read() -> None:
    deep = f"{'[' * 150}{']' * 150}"
    text = f'{{"a": 1e99, "b": -0.5, "c": "ü\\n", "d": {deep}, "e": null, "f": {"9" * 400}}}'
    assert strict_json(text) == json.loads(text)


def test_a_stream_tells_arguments_as_they_come() -> None:
    """They are not read: whatever they are, so they go out."""
    wire, choice = MessagesWire("r", model="m", max_tokens=9), Choice(finish_reason="stop")
    wire.started(0, choice)
    deep = "[" * 100_000
    parts: list[Part] = [ToolCall(0, "a", "time"), Arguments(0, deep), ToolCall(1, "b", "time")]
    events = wire.came(0, choice, parts, ()) + wire.finished(0, choice)
    data = [json.loads(line[6:]) for line in events.decode().splitlines() if line[:5] == "data:"]
    assert [each["index"] for each in data if each["type"] == "content_block_stop"] == [0, 1]
    told = [each["delta"] for each in data if each["type"] == "content_block_delta"]
    assert told == [{"type": "input_json_delta", "partial_json": deep}]
