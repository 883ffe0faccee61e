"""What is refused, and how it is named: before it is compiled, by it, and what would never end."""

from __future__ import annotations

import json
from typing import Any

import pytest

from baton.shared.constraints.compiler import Compiler, compile_constraint
from baton.shared.constraints.tokens import TokenTable
from baton.shared.rpc.errors import InvalidField
from baton.v1 import types_pb2

Constraint = types_pb2.Constraint


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def schema(value: Any) -> Constraint:
    return Constraint(json_schema=value if isinstance(value, str) else json.dumps(value))


def tags(**tag: Any) -> Constraint:
    triggers = tag.pop("triggers", ["<t>"])
    good = types_pb2.StructuralTag(begin="<t>a", regex="x", end="</t>")
    other = types_pb2.StructuralTag(**{"begin": "<t>b", "end": "</t>", **tag})
    return Constraint(
        structural_tags=types_pb2.StructuralTags(triggers=triggers, tags=[good, other])
    )


DEEP = {"type": "object", "properties": {"a/b": {"items": {"type": "string", "pattern": "(a"}}}}
REFUSED = {
    "no kind": (Constraint(), "constraint", "is empty"),
    "no JSON": (schema("{"), "constraint.json_schema", "is no JSON"),
    "NaN": (schema('{"const": NaN}'), "constraint.json_schema", "NaN"),
    "a list": (schema("[]"), "constraint.json_schema", "is of type list"),
    "false": (schema("false"), "constraint.json_schema", "is false"),
    "too deep": (schema(nested(40)), "constraint.json_schema", "nested too deep"),
    "very deep": (schema("[" * 9999 + "]" * 9999), "constraint.json_schema", "nested too deep"),
    "too large": (schema({"title": "x" * 300_000}), "constraint.json_schema", "300013 bytes"),
    "too many properties": (
        schema({"properties": {f"p{i}": {} for i in range(1001)}}),
        "constraint.json_schema",
        "1001 properties",
    ),
    "too many enum values": (
        schema({"enum": list(range(5001))}),
        "constraint.json_schema",
        "5001 enum values",
    ),
    "a pattern, deep": (
        schema(DEEP),
        "constraint.json_schema",
        "at /properties/a~1b/items: regex parse error",
    ),
    "a keyword": (
        schema({"anyOf": [{"type": "string"}, {"type": "object", "not": {}}]}),
        "constraint.json_schema",
        "has the keyword 'not' at /anyOf/1",
    ),
    "a property called as a keyword": (
        schema({"properties": {"not": {"type": "string"}, "b": {"if": {}}}}),
        "constraint.json_schema",
        "has the keyword 'if' at /properties/b",
    ),
    "a format": (
        schema({"$defs": {"x": {"format": "zzz"}}, "properties": {"a": {"$ref": "#/$defs/x"}}}),
        "constraint.json_schema",
        "Unknown format: zzz",
    ),
    "elsewhere": (schema({"$ref": "http://a/b"}), "constraint.json_schema", "http://a/b"),
    "lenient": (schema({"x-guidance": {"lenient": True}}), "constraint.json_schema", "x-guidance"),
    "lenient, in a grammar": (
        Constraint(lark='start: %json {"not": {}, "x-guidance": {"lenient": true}}'),
        "constraint.lark",
        "not",
    ),
    "a regex": (Constraint(regex="(a"), "constraint.regex", "unclosed group"),
    "look-around": (Constraint(regex="(?=a)b"), "constraint.regex", "look-ahead"),
    "no regex": (Constraint(regex=""), "constraint.regex", "is empty"),
    "a rule": (Constraint(lark="start: foo"), "constraint.lark", "foo"),
    "GBNF": (Constraint(gbnf="root ::= foo ["), "constraint.gbnf", "cannot be read"),
    "deep GBNF": (
        Constraint(gbnf="root ::= " + "(" * 3000 + '"a"' + ")" * 3000),
        "constraint.gbnf",
        "cannot be read",
    ),
    "no choice": (
        Constraint(choices=types_pb2.Choices()),
        "constraint.choices",
        "has 0 texts",
    ),
    "an empty choice": (
        Constraint(choices=types_pb2.Choices(texts=["a", ""])),
        "constraint.choices.texts[1]",
        "is empty",
    ),
    "no trigger": (tags(triggers=[]), "constraint.structural_tags.triggers", "are missing"),
    "an empty trigger": (
        tags(triggers=["<t>", ""]),
        "constraint.structural_tags.triggers[1]",
        "is empty",
    ),
    "no trigger of a tag": (
        tags(begin="<u>"),
        "constraint.structural_tags.tags[1].begin",
        "begins with no trigger",
    ),
    "a tag's schema": (
        tags(json_schema='{"properties": {"z": {"if": {}}}}'),
        "constraint.structural_tags.tags[1].json_schema",
        "has the keyword 'if' at /properties/z",
    ),
    "a tag's regex": (
        tags(regex="(a"),
        "constraint.structural_tags.tags[1].regex",
        "unclosed group",
    ),
    "nothing to begin after": (
        Constraint(regex="a", begin_after=types_pb2.BeginAfter()),
        "constraint.begin_after",
        "is empty",
    ),
    "an unknown token to begin after": (
        Constraint(
            regex="a",
            begin_after=types_pb2.BeginAfter(token_ids=types_pb2.TokenRun(token_ids=[4200])),
        ),
        "constraint.begin_after.token_ids",
        "has token 4200",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_field_and_place(table: TokenTable, name: str) -> None:
    constraint, field, problem = REFUSED[name]
    with pytest.raises(InvalidField) as refusal:
        compile_constraint(constraint, table)
    assert refusal.value.field == field
    assert problem in refusal.value.message and "\n" not in refusal.value.message
    assert len(refusal.value.message) < 600


def test_compiled_constraints_are_kept_and_not_all(table: TokenTable) -> None:
    compiler = Compiler(table)
    first = Constraint(regex="a").SerializeToString()
    kept = compiler.compile(first)
    assert compiler.compile(first) is kept
    for index in range(64):
        compiler.compile(Constraint(regex=f"b{index}").SerializeToString())
    assert compiler.compile(first) is not kept
