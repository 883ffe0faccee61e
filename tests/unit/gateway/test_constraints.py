"""Constraints that would take for ever, or all memory: refused, and the next one is answered."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from baton.services.gateway import constraints
from baton.services.gateway.constraints import ConstraintChecker
from baton.shared.rpc.errors import InvalidField, NoTokenizer
from baton.v1 import types_pb2
from models.dummy_model import SHAPES, write_dummy_model

DEMO = Path(__file__).parents[3] / "models" / "demo"
Constraint = types_pb2.Constraint

HOSTILE = {
    # A minute of compiling, and hundreds of megabytes.
    "multipleOf": Constraint(json_schema=json.dumps({"type": "integer", "multipleOf": 999_983})),
    "patterns": Constraint(
        json_schema=json.dumps(
            {"allOf": [{"type": "string", "pattern": f"a.*b{i}"} for i in range(300)]}
        )
    ),
    "a schema of itself": Constraint(json_schema='{"$ref": "#"}'),
}


@pytest_asyncio.fixture
async def checker(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ConstraintChecker]:
    monkeypatch.setattr(constraints, "_NUM_PROCESSES", 1)
    checker = ConstraintChecker(DEMO, 4096)
    yield checker
    await checker.close()


@pytest.mark.asyncio
async def test_hostile_constraints_are_refused_in_bounded_time(checker: ConstraintChecker) -> None:
    good = Constraint(regex="[a-z]+")
    await checker.check(good)
    for name in ("multipleOf", "a schema of itself"):
        hostile = HOSTILE[name]
        for _ in range(2):  # the second time it is known
            with pytest.raises(InvalidField) as refusal:
                async with asyncio.timeout(60):
                    await checker.check(hostile)
            assert refusal.value.field.startswith("constraint")
        await checker.check(Constraint(regex=f"after {name}"))
    await checker.check(good)


@pytest.mark.asyncio
async def test_who_gives_up_leaves_no_answer_to_the_next(checker: ConstraintChecker) -> None:
    await checker.check(Constraint(regex="a"))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await checker.check(HOSTILE["patterns"])
    await checker.check(Constraint(regex="b"))
    with pytest.raises(InvalidField, match="unclosed"):
        await checker.check(Constraint(regex="(b"))


@pytest.mark.asyncio
async def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((DEMO / "config.json").read_text())
    checker = ConstraintChecker(tmp_path, 4096)
    with pytest.raises(NoTokenizer):
        await checker.check(Constraint(regex="a"))
    await checker.close()


@pytest.mark.asyncio
async def test_a_model_whose_answers_no_token_ends(tmp_path: Path) -> None:
    """It was an engine's failure: no process of the compiler could start."""
    write_dummy_model(tmp_path, SHAPES["tiny"])
    checker = ConstraintChecker(tmp_path, SHAPES["tiny"].vocab_size)
    with pytest.raises(NoTokenizer, match="no token that ends an answer"):
        await checker.check(Constraint(regex="a"))
    await checker.close()
