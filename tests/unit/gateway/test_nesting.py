"""How much of tools and of calls' arguments reaches a template."""

from __future__ import annotations

import json
from typing import Any

import pytest

from baton.services.gateway.openai.chat import template_messages
from baton.services.gateway.openai.errors import InvalidParam
from baton.services.gateway.openai.nesting import MAX_DEPTH, Nesting
from baton.services.gateway.openai.schema import ChatRequest, TokenizeRequest, parse

USER = {"role": "user", "content": "a"}


def nested(depth: int) -> Any:
    value: Any = 0
    for index in range(depth - 1):
        value = [value] if index % 2 else {"a": value}
    return value


def tool(name: str, parameters: dict[str, Any], description: str = "") -> dict[str, Any]:
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


def refusal(body: dict[str, Any]) -> str | None:
    """The field, in a request that reaches the template."""
    try:
        request = parse(ChatRequest, {"messages": [USER], **body})
        template_messages(request.messages, "")
    except InvalidParam as error:
        return error.param
    return None


def calling(*arguments: Any) -> dict[str, Any]:
    calls = [{"function": {"name": "f", "arguments": each}} for each in arguments]
    return {"messages": [USER, {"role": "assistant", "tool_calls": calls}]}


ARGUMENTS = "messages[1].tool_calls[{}].function.arguments"
MANY = {"a": [0] * 15_000}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [tool("f", {"a": nested(MAX_DEPTH - 3)})]}, None),
        ({"tools": [tool("f", {"a": nested(MAX_DEPTH - 2)})]}, "tools[0]"),
        # The last of those that are too much together.
        ({"tools": [tool("f", MANY)]}, None),
        ({"tools": [tool("f", MANY), tool("g", {}), tool("h", MANY)]}, "tools[2]"),
        ({"tools": [tool("f", {}, "x" * 500_000)]}, None),
        ({"tools": [tool("f", {}, "x" * 500_000), tool("g", {"x" * 30_000: 0})]}, "tools[1]"),
        (calling({"a": nested(MAX_DEPTH - 1)}), None),
        (calling({}, {"a": nested(MAX_DEPTH)}), ARGUMENTS.format(1)),
        (calling(json.dumps({"a": nested(MAX_DEPTH)})), ARGUMENTS.format(0)),
        (calling(*[MANY] * 4), None),
        (calling(*[json.dumps(MANY)] * 5), ARGUMENTS.format(4)),
        # No JSON: a text as any other.
        (calling("[" * 5000), None),
    ],
)
def test_what_is_too_much_for_a_template_is_named(body: dict[str, Any], param: str | None) -> None:
    assert refusal(body) == param


def test_a_prompt_that_is_counted_has_the_same_bounds() -> None:
    body = {"messages": [USER], "tools": [tool("f", {"a": nested(MAX_DEPTH)})]}
    with pytest.raises(InvalidParam, match=r"tools\[0\] is nested too deep; limit: 64 levels"):
        parse(TokenizeRequest, body)


def test_what_is_refused_is_not_walked_through() -> None:
    class Unseen(list[Any]):
        def __iter__(self) -> Any:
            raise AssertionError("walked through")

    with pytest.raises(InvalidParam, match="makes it 11 values in all; limit: 10"):
        Nesting(max_values=10).add("tools[0]", [Unseen() for _ in range(10)])
