"""How large constraints may be: one bound on all their texts, whatever they are made of."""

from __future__ import annotations

import json
from typing import Any

import pytest

from baton.shared.constraints.compiler import Compiler
from baton.shared.constraints.schema import check_values
from baton.shared.constraints.size import MAX_BYTES, check_size
from baton.shared.constraints.tokens import TokenTable
from baton.shared.rpc.errors import InvalidField
from baton.v1 import types_pb2

Constraint = types_pb2.Constraint
BIG = "x" * (MAX_BYTES + 1)
TAGS = "constraint.structural_tags"


def tags(num_tags: int, triggers: int = 1, **tag: str) -> types_pb2.Constraint:
    one = types_pb2.StructuralTag(**tag)
    return Constraint(
        structural_tags=types_pb2.StructuralTags(tags=[one] * num_tags, triggers=["<"] * triggers)
    )


def begins_after(**end: object) -> types_pb2.Constraint:
    return Constraint(regex="a", begin_after=types_pb2.BeginAfter(**end))  # type: ignore[arg-type]


def with_unknown_fields() -> types_pb2.Constraint:
    """As of a newer client, or of one that means no good."""
    field_100_of_bytes = b"\xa2\x06"
    length = b"\x80\x80\x40"  # 1 MiB
    message = Constraint.FromString(field_100_of_bytes + length + bytes(1 << 20))
    message.regex = "a"
    return message


@pytest.mark.parametrize(
    ("constraint", "field"),
    [
        (Constraint(json_schema=BIG), "constraint.json_schema"),
        (Constraint(regex=BIG), "constraint.regex"),
        (Constraint(lark=BIG), "constraint.lark"),
        (Constraint(gbnf=BIG), "constraint.gbnf"),
        (Constraint(choices=types_pb2.Choices(texts=["x" * 1024] * 257)), "constraint.choices"),
        (Constraint(choices=types_pb2.Choices(texts=["x"] * 1025)), "constraint.choices"),
        # In UTF-8, in which it is kept and sent.
        (Constraint(regex="é" * (MAX_BYTES // 2 + 1)), "constraint.regex"),
        # None is too large by itself.
        (tags(128, json_schema="x" * 2049), TAGS),
        (tags(128, regex="x" * 2049), TAGS),
        (tags(128, lark="x" * 2049), TAGS),
        (tags(128, begin="x" * 1025, end="x" * 1025), TAGS),
        (tags(2, regex=BIG), f"{TAGS}.tags[0].regex"),
        (tags(129), TAGS),
        (tags(1, triggers=129), f"{TAGS}.triggers"),
        (begins_after(text=BIG), "constraint.begin_after.text"),
        (
            begins_after(token_ids=types_pb2.TokenRun(token_ids=[1] * 257)),
            "constraint.begin_after.token_ids",
        ),
        (with_unknown_fields(), "constraint"),
    ],
)
def test_what_is_too_large_is_named(constraint: types_pb2.Constraint, field: str) -> None:
    with pytest.raises(InvalidField) as refusal:
        check_size(constraint)
    assert refusal.value.field == field and len(refusal.value.message) < 200


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint(regex=BIG[1:]),
        Constraint(choices=types_pb2.Choices(texts=["x" * 256] * 1024)),
        tags(128, begin="<", json_schema="x" * 2046),
        begins_after(text="x" * 256),
    ],
)
def test_what_is_as_large_as_may_be(constraint: types_pb2.Constraint) -> None:
    check_size(constraint)


def test_a_schema_s_values_are_counted_before_they_are_looked_at() -> None:
    schemas: tuple[Any, ...] = (
        {"enum": [[] for _ in range(5001)]},
        {"examples": [[] for _ in range(20_000)]},
        {"a": {"b": [{"c": list(range(150))} for _ in range(200)]}},
    )
    for schema in schemas:
        with pytest.raises(InvalidField, match="limit: (5000 enum|20000) values"):
            check_values("constraint.json_schema", schema)
    check_values("constraint.json_schema", {"examples": [[] for _ in range(19_998)]})


def test_refusals_repeat_little_of_the_constraint(table: TokenTable) -> None:
    """They are kept, and travel in trailers."""
    wrongs: tuple[Any, ...] = ({"if": {}}, {"pattern": "(a"}, {"format": "z" * 100_000})
    for wrong in wrongs:
        schema = {"properties": {"k" * 100_000: wrong}}
        constraint = Constraint(json_schema=json.dumps(schema))
        with pytest.raises(InvalidField) as refusal:
            Compiler(table).compile(constraint.SerializeToString())
        assert len(refusal.value.message) < 1200


def test_what_is_compiled_is_kept_by_its_digest(table: TokenTable) -> None:
    compiler = Compiler(table)
    constraint = Constraint(regex="a" * 10_000).SerializeToString()
    made = compiler.compile(constraint)
    assert compiler.compile(constraint) is made
    assert [len(key) for key in compiler._compiled] == [32]
