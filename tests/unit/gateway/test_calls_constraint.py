"""Whatever a model draws under the constraint of its format is read as calls that are valid."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import numpy as np
import pytest

from baton.services.gateway.answer_parts import Arguments, Content, ToolCall
from baton.services.gateway.chat_format import ChatFormat
from baton.services.gateway.formats.choose import TOOL_FORMATS
from baton.services.gateway.formats.constraint import WITHOUT_STRICT
from baton.services.gateway.formats.source import merged
from baton.services.gateway.openai.chat_constraint import chat_constraint
from baton.services.gateway.openai.tools import Function, OfferedTools
from baton.shared.constraints.compiler import compile_constraint
from baton.shared.constraints.matcher import AnswerMatcher
from baton.shared.constraints.tokens import TokenTable
from baton.v1 import types_pb2

DEMO = Path(__file__).parents[3] / "models" / "demo"
TOOLS: dict[str, dict[str, Any]] = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"enum": ["Ulm", 'a "b"\n</tool_call>']},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["city", "days"],
        "additionalProperties": False,
    },
    "time": {"type": "object", "properties": {}, "additionalProperties": False},
}
FORMS = [
    *((name, "") for name in TOOL_FORMATS),
    ("mistral", "[TOOL_CALLS][ARGS]"),
    ("deepseek", "```json"),
]


@pytest.fixture(scope="module")
def table() -> TokenTable:
    table = TokenTable.load(DEMO, 4096)
    assert table is not None
    return table


def drawn(constraint: types_pb2.Constraint, table: TokenTable, seed: int, before: str = "") -> str:
    """A random answer, compact, that goes on after `before`."""
    constraint.compact_json = True
    matcher = AnswerMatcher(compile_constraint(constraint, table))
    drawing = random.Random(seed)
    emitted = table.encode(before.encode())
    matcher.take(emitted)
    while len(emitted) < 300:
        bits = np.unpackbits(matcher.masks()[0].view(np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits)
        ends = [int(each) for each in allowed if int(each) in table.end_ids]
        token = ends[0] if ends else int(drawing.choice(allowed))
        if ends:
            break
        emitted.append(token)
        matcher.take([token])
    return b"".join(table.token_bytes[each] for each in emitted).decode()


def calls(form: ChatFormat, text: str) -> list[tuple[str, Any]]:
    parser = form.reading("", TOOLS, is_constrained=True).new_parser("a")
    parts = merged([*parser.feed([], text), *parser.finish("")])
    names = [part.name for part in parts if isinstance(part, ToolCall)]
    arguments = [json.loads(part.text) for part in parts if isinstance(part, Arguments)]
    said = "".join(part.text for part in parts if isinstance(part, Content))
    assert not said or text.endswith(said)
    return list(zip(names, arguments, strict=True))


@pytest.mark.parametrize(("name", "template"), FORMS)
def test_calls_that_must_come(table: TokenTable, name: str, template: str) -> None:
    form = ChatFormat(name, template=template)
    seen = set()
    for seed in range(12):
        constraint = form.constraint(TOOLS, only_calls=True, is_parallel=True)
        made = calls(form, drawn(constraint, table, seed))
        assert made
        for called, arguments in made:
            jsonschema.validate(arguments, TOOLS[called])
            seen.add(called)
    assert seen == set(TOOLS)
    named = form.constraint({"time": TOOLS["time"]}, only_calls=True, is_parallel=False)
    assert calls(form, drawn(named, table, 0)) == [("time", {})]


@pytest.mark.parametrize(
    ("name", "template"), [form for form in FORMS if form[0] not in (*WITHOUT_STRICT, "harmony")]
)
def test_calls_that_may_come_are_valid(table: TokenTable, name: str, template: str) -> None:
    form = ChatFormat(name, template=template)
    constraint = form.constraint(TOOLS, only_calls=False, is_parallel=True)
    trigger = constraint.structural_tags.triggers[0]
    text = drawn(constraint, table, 1, before=trigger)
    [(called, arguments), *_] = calls(form, text)
    jsonschema.validate(arguments, TOOLS[called])
    # Without one, it may be anything.
    matcher = AnswerMatcher(compile_constraint(constraint, table))
    matcher.take(table.encode(b"I look for it {at} once."))


def test_an_answer_or_a_call(table: TokenTable) -> None:
    """What is strict beside what is said, where both have headers; and a form of the answer."""
    functions = [Function(name=name, parameters=TOOLS[name], strict=True) for name in TOOLS]
    offered = OfferedTools(functions, schemas=TOOLS)
    for name in ("harmony", "hermes"):
        form = ChatFormat(name, "harmony" if name == "harmony" else "none")
        asked = None
        if name == "hermes":
            asked = types_pb2.Constraint(json_schema='{"enum": ["yes"]}')
        seen = set()
        for seed in range(12):
            constraint, has_calls = chat_constraint(asked, offered, "", form)
            assert has_calls and constraint is not None
            assert constraint.HasField("begin_after") is (name == "harmony")
            constraint.ClearField("begin_after")
            text = drawn(constraint, table, seed)
            parser = form.reading("", TOOLS, is_constrained=True).new_parser("a")
            parts = merged([*parser.feed([], text), *parser.finish("")])
            # The empty answer is one.
            first, *rest = parts or [Content("")]
            seen.add(type(first))
            if isinstance(first, ToolCall):
                [arguments] = [part for part in rest if isinstance(part, Arguments)]
                jsonschema.validate(json.loads(arguments.text), TOOLS[first.name])
            elif asked is not None:
                assert first == Content('"yes"')
        assert seen == {Content, ToolCall}
