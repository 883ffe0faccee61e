"""Which texts the answer to a chat may be: of what the request asks for, of its tools, and of how
the model writes."""

from __future__ import annotations

import json
from typing import NamedTuple

from baton.services.gateway.chat_format import ChatFormat
from baton.services.gateway.formats.constraint import WITHOUT_STRICT
from baton.services.gateway.openai.constraint import Asked
from baton.services.gateway.openai.errors import InvalidParam
from baton.services.gateway.openai.tools import OfferedTools
from baton.shared.answer_formats import HARMONY
from baton.v1 import types_pb2

_TAGS = "constraint.structural_tags"
_ANY_TEXT = r"(.|\n)*"


class Constrained(NamedTuple):
    constraint: types_pb2.Constraint | None
    has_calls: bool
    """Calls, if there are any, are written as the constraint has them."""


def constraint_names(asked: Asked, tools: OfferedTools) -> dict[str, str]:
    """What the request calls the fields of the constraint."""
    if not tools.functions or asked.constraint is None and not tools.is_constrained:
        return asked.names
    places = {name: f"tools[{index}]" for index, name in enumerate(tools.schemas)}
    names = {"constraint": "tool_choice", _TAGS: "tools", **asked.names}
    for index, name in enumerate(tools.constrained):
        names[f"{_TAGS}.tags[{index}].json_schema"] = f"{places[name]}.function.parameters"
    for kind in ("json_schema", "regex", "lark"):
        if f"constraint.{kind}" in asked.names:
            names[f"{_TAGS}.tags[{len(tools.constrained)}].{kind}"] = asked.names[
                f"constraint.{kind}"
            ]
    return names


def chat_constraint(
    asked: types_pb2.Constraint | None, tools: OfferedTools, prompt: str, chat_format: ChatFormat
) -> Constrained:
    """Raises InvalidParam."""
    if asked is not None and tools.must_call:
        raise InvalidParam("tool_choice", "is given beside a form of the answer: choose one")
    if asked is None and tools.is_strict and chat_format.tools == HARMONY:
        # Its markers are no text in which a call could be looked for: it is calls, or an answer.
        asked = types_pb2.Constraint(regex=_ANY_TEXT)
    constraint, has_calls = asked, False
    if tools.is_constrained or (asked is not None and tools.functions):
        constraint, has_calls = _of_tools(tools, chat_format, is_alone=asked is None), True
    if asked is not None and (has_calls or chat_format.answer_begin):
        constraint = _with_answer(constraint if has_calls else None, asked, chat_format)
    begin_after = chat_format.begin_after(prompt)
    if constraint is not None and begin_after is not None:
        constraint.begin_after.CopyFrom(begin_after)
    return Constrained(constraint, has_calls)


def _of_tools(
    tools: OfferedTools, chat_format: ChatFormat, *, is_alone: bool
) -> types_pb2.Constraint:
    must_be_tags = tools.must_call or not is_alone
    if not must_be_tags and chat_format.tools in WITHOUT_STRICT:
        index = next(i for i, function in enumerate(tools.functions) if function.strict)
        problem = f"is not supported for calls as this model writes them ({chat_format.tools})"
        path = f"tools[{index}].function.strict"
        raise InvalidParam(path, problem, code="unsupported_parameter")
    return chat_format.constraint(
        tools.constrained, only_calls=must_be_tags, is_parallel=tools.is_parallel and is_alone
    )


def _with_answer(
    calls: types_pb2.Constraint | None, asked: types_pb2.Constraint, chat_format: ChatFormat
) -> types_pb2.Constraint:
    """An answer as asked for, or a call."""
    tag = types_pb2.StructuralTag(begin=chat_format.answer_begin)
    match asked.WhichOneof("kind"):
        case "json_object":
            tag.json_schema = '{"type": "object"}'
        case "json_schema":
            tag.json_schema = asked.json_schema
        case "regex":
            tag.regex = asked.regex
        case "lark":
            tag.lark = asked.lark
        case "choices":
            tag.lark = "start: " + " | ".join(
                json.dumps(text, ensure_ascii=False) for text in asked.choices.texts
            )
        case other:
            raise InvalidParam(
                "tools", f"are given beside a constraint of kind {other}: choose one"
            )
    tags = [*(calls.structural_tags.tags if calls else ()), tag]
    return types_pb2.Constraint(
        structural_tags=types_pb2.StructuralTags(tags=tags, only_tags=True, at_most_one=True),
        compact_json=asked.compact_json,
    )
