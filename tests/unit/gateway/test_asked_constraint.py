"""What HTTP clients ask of an answer's text, as the contract has it, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from baton.services.gateway.openai.constraint import asked_constraint
from baton.services.gateway.openai.errors import InvalidParam, to_http_error
from baton.services.gateway.openai.schema import CompletionRequest, parse
from baton.shared.constraints.size import check_size
from baton.shared.rpc.errors import InvalidField
from baton.v1 import types_pb2

Constraint = types_pb2.Constraint
SCHEMA = {"type": "object", "properties": {"b": {}, "a": {"type": "integer"}}}
TAG: dict[str, Any] = {"begin": "<f>", "schema": SCHEMA, "end": "</f>"}
HALF = {"title": "x" * (1 << 17)}
TAGS: dict[str, Any] = {
    "type": "structural_tag",
    "structures": [TAG],
    "triggers": ["<f"],
}
AS_TAGS = Constraint(
    structural_tags=types_pb2.StructuralTags(
        triggers=["<f"],
        tags=[types_pb2.StructuralTag(begin="<f>", json_schema=json.dumps(SCHEMA), end="</f>")],
    )
)
JSON_OBJECT = Constraint(json_object=types_pb2.JsonObject())
AS_SCHEMA = Constraint(json_schema=json.dumps(SCHEMA))
CHOICES = Constraint(choices=types_pb2.Choices(texts=["yes", "no"]))


def strict(schema: Any, *, is_strict: bool = True) -> dict[str, Any]:
    return {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": schema, "strict": is_strict},
    }


def ask(**fields: Any) -> CompletionRequest:
    return parse(CompletionRequest, {"prompt": "a", **fields})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": None}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, JSON_OBJECT),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, AS_SCHEMA),
        ({"response_format": strict(SCHEMA)}, AS_SCHEMA),
        ({"response_format": strict(SCHEMA, is_strict=False)}, AS_SCHEMA),
        ({"response_format": TAGS}, AS_TAGS),
        ({"guided_json": SCHEMA}, AS_SCHEMA),
        ({"guided_json": json.dumps(SCHEMA)}, AS_SCHEMA),
        ({"guided_regex": "a+"}, Constraint(regex="a+")),
        ({"guided_choice": ["yes", "no"]}, CHOICES),
        ({"guided_grammar": 'start: "a"'}, Constraint(lark='start: "a"')),
        ({"guided_grammar": 'root ::= "a"'}, Constraint(gbnf='root ::= "a"')),
        ({"structured_outputs": {"json": SCHEMA, "regex": None}}, AS_SCHEMA),
        ({"structured_outputs": {"choice": ["yes", "no"], "json_object": False}}, CHOICES),
        ({"structured_outputs": {"structural_tag": json.dumps(TAGS)}}, AS_TAGS),
        ({"structured_outputs": {}}, None),
        (
            {"structured_outputs": {"json_object": True, "disable_any_whitespace": True}},
            Constraint(json_object=types_pb2.JsonObject(), compact_json=True),
        ),
        # Both ask for the same nothing.
        ({"response_format": {"type": "text"}, "guided_regex": "a"}, Constraint(regex="a")),
    ],
)
def test_what_is_asked(fields: dict[str, Any], expected: types_pb2.Constraint | None) -> None:
    assert asked_constraint(ask(**fields)).constraint == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "json_object"}, "response_format"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": ["text"]}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": strict([1])}, "response_format.json_schema.schema"),
        (
            {"response_format": {"type": "structural_tag", "format": {}}},
            "response_format.structures",
        ),
        (
            {"response_format": {**TAGS, "structures": [{"begin": 1}]}},
            "response_format.structures[0].begin",
        ),
        ({"guided_json": 7}, "guided_json"),
        ({"guided_regex": ["a"]}, "guided_regex"),
        ({"guided_choice": "yes"}, "guided_choice"),
        ({"guided_choice": ["a"] * 5000}, "guided_choice"),
        ({"guided_choice": ["a"] * 1025}, "guided_choice"),
        ({"structured_outputs": {"choice": [1] * 1025}}, "structured_outputs.choice"),
        ({"guided_choice": ["a", 1]}, "guided_choice[1]"),
        ({"response_format": strict({"enum": [[]] * 5001})}, "response_format.json_schema.schema"),
        ({"guided_json": {"title": "x" * (1 << 18)}}, "guided_json"),
        ({"guided_json": "x" * (1 << 18) + "x"}, "guided_json"),
        (
            {"response_format": {**TAGS, "structures": TAGS["structures"] * 129}},
            "response_format.structures",
        ),
        ({"response_format": {**TAGS, "triggers": ["<"] * 129}}, "response_format.triggers"),
        (
            {"response_format": {**TAGS, "structures": [{**TAG, "schema": HALF}] * 3}},
            "response_format.structures[1].schema",
        ),
        (
            {"structured_outputs": {"structural_tag": " " * (1 << 20) + " {}"}},
            "structured_outputs.structural_tag",
        ),
        # No text has it.
        (
            {"structured_outputs": {"structural_tag": '{"triggers": ["\\ud800"]}'}},
            "structured_outputs.structural_tag",
        ),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice"),
        (
            {"structured_outputs": {"whitespace_pattern": " "}},
            "structured_outputs.whitespace_pattern",
        ),
        ({"structured_outputs": {"choice": "yes"}}, "structured_outputs.choice"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
        ({"structural_tag": "x"}, "structural_tag"),
    ],
)
def test_refusals_name_the_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidParam) as refusal:
        asked_constraint(ask(**fields))
    assert refusal.value.param == param and refusal.value.status == 400


@pytest.mark.parametrize(
    ("fields", "field", "param"),
    [
        (
            {"response_format": strict(SCHEMA)},
            "constraint.json_schema",
            "response_format.json_schema.schema",
        ),
        ({"guided_regex": "a"}, "constraint.regex", "guided_regex"),
        ({"guided_choice": ["a"]}, "constraint.choices.texts[3]", "guided_choice"),
        ({"guided_grammar": "root ::="}, "constraint.gbnf", "guided_grammar"),
        (
            {"response_format": TAGS},
            "constraint.structural_tags.tags[0].json_schema",
            "response_format.structures[0].schema",
        ),
        (
            {"response_format": TAGS},
            "constraint.structural_tags.triggers[1]",
            "response_format.triggers",
        ),
        ({"guided_regex": "a"}, "sampling.stops[3]", "stop"),
    ],
)
def test_errors_of_the_contract_are_told_in_the_request_s_names(
    fields: dict[str, Any], field: str, param: str
) -> None:
    names = asked_constraint(ask(**fields)).names
    error = to_http_error(InvalidField(field, "is wrong", limit="less"), names)
    assert error.status == 400 and error.param == param
    assert error.message.startswith(param)


def test_schemas_are_written_in_the_bytes_that_they_have() -> None:
    """As they are counted: escaped, these would have six times as many."""
    schema = {"enum": ["é" * 100_000]}
    tags = {**TAGS, "structures": [{**TAG, "schema": schema}]}
    for fields in ({"guided_json": schema}, {"response_format": tags}):
        constraint = asked_constraint(ask(**fields)).constraint
        assert constraint is not None and constraint.ByteSize() < 201_000
        check_size(constraint)


def test_what_is_too_large_is_not_written_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ask(guided_json={"enum": [[]] * 1_000_000})

    def refuse(*args: Any, **options: Any) -> str:
        raise AssertionError("written")

    monkeypatch.setattr(json, "dumps", refuse)
    with pytest.raises(InvalidParam, match="1000000 enum values; limit: 5000"):
        asked_constraint(asked)
