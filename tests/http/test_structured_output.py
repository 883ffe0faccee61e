"""Answers under a constraint, as the `openai` package asks for them, and the same over gRPC."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import grpc
import openai
import pydantic
import pytest

from baton.v1 import types_pb2
from tests.e2e.harness import Stack

pytestmark = pytest.mark.e2e

_PROMPT = "In the beginning"


class Animal(pydantic.BaseModel):
    kind: Literal["wolf", "lamb", "fish"]
    age: int = pydantic.Field(ge=0, le=40)
    tame: bool
    others: list[Literal["old", "new"]] = pydantic.Field(max_length=2)


@pytest.fixture(scope="module")
def client(http: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://{http}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_package_parses_what_it_asked_for(client: openai.OpenAI) -> None:
    """Its strict schemas are made of pydantic models; streamed and whole it reads the same."""
    options: dict[str, Any] = {
        "model": "demo",
        "messages": [{"role": "user", "content": "Which animal?"}],
        "temperature": 0,
        "max_tokens": 400,
        "response_format": Animal,
    }
    whole = client.chat.completions.parse(**options)
    assert whole.choices[0].finish_reason == "stop"
    assert isinstance(whole.choices[0].message.parsed, Animal)
    with client.chat.completions.stream(**options) as stream:
        parsed = stream.get_final_completion().choices[0].message.parsed
    assert parsed == whole.choices[0].message.parsed


@pytest.mark.parametrize(
    ("extra", "constraint", "pattern"),
    [
        ({"guided_regex": "[0-9]{3}-[A-Z]"}, {"regex": "[0-9]{3}-[A-Z]"}, r"\d{3}-[A-Z]"),
        (
            {"structured_outputs": {"choice": ["yes", "no"]}},
            {"choices": types_pb2.Choices(texts=["yes", "no"])},
            "yes|no",
        ),
        (
            {"guided_grammar": 'root ::= "<" [a-c]+ ">" | "none"'},
            {"gbnf": 'root ::= "<" [a-c]+ ">" | "none"'},
            "<[a-c]+>|none",
        ),
    ],
    ids=["regex", "choice", "grammar"],
)
def test_the_same_text_over_http_and_grpc(
    client: openai.OpenAI,
    stack: Stack,
    extra: dict[str, Any],
    constraint: dict[str, Any],
    pattern: str,
) -> None:
    """Several samples of one prompt; what is ignored of ends does not make it go on."""
    options: dict[str, Any] = {"temperature": 0.9, "seed": 3, "max_tokens": 60}
    answer = client.completions.create(
        model="demo", prompt=_PROMPT, n=2, extra_body={**extra, "ignore_eos": True}, **options
    )
    expected = stack.samples(_PROMPT, n=2, constraint=types_pb2.Constraint(**constraint), **options)
    for choice, result in zip(answer.choices, expected, strict=True):
        assert choice.finish_reason == "stop" and re.fullmatch(pattern, choice.text)
        assert choice.text == result.text


def test_an_answer_that_is_cut_says_so(stack: Stack) -> None:
    constraint = types_pb2.Constraint(regex="[a-z ]{40}[0-9]")
    cut = stack.generate(_PROMPT, max_tokens=5, constraint=constraint)
    assert cut.finish_reason == types_pb2.FINISH_REASON_LENGTH and len(cut.token_ids) == 5
    whole = stack.generate(_PROMPT, max_tokens=60, constraint=constraint)
    assert whole.finish_reason == types_pb2.FINISH_REASON_STOP
    assert whole.text.startswith(cut.text) and re.fullmatch("[a-z ]{40}[0-9]", whole.text)


def test_a_constraint_goes_before_bans_and_biases(stack: Stack) -> None:
    """What it leaves is drawn, whatever else would have it otherwise."""
    constraint = types_pb2.Constraint(choices=types_pb2.Choices(texts=["yes"]))
    whole = stack.generate(_PROMPT, max_tokens=30, constraint=constraint)
    banned = stack.generate(
        _PROMPT,
        max_tokens=30,
        min_tokens=20,
        constraint=constraint,
        bad_words=["yes"],
        logit_bias={whole.token_ids[0]: -100.0},
    )
    assert banned.text == whole.text == "yes"
    assert banned.finish_reason == whole.finish_reason == types_pb2.FINISH_REASON_STOP


def test_what_cannot_be_followed_is_refused_in_each_protocol_s_form(
    client: openai.OpenAI, stack: Stack
) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "not": {}}}}
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "Which animal?"}],
            extra_body={
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": schema},
                }
            },
        )
    assert refusal.value.param == "response_format.json_schema.schema"
    assert "'not' at /properties/a" in refusal.value.message
    with pytest.raises(grpc.RpcError) as failure:
        stack.generate(_PROMPT, constraint=types_pb2.Constraint(json_schema=json.dumps(schema)))
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "constraint.json_schema" in str(failure.value.details())
    with pytest.raises(grpc.RpcError) as failure:
        stack.generate(
            _PROMPT,
            constraint=types_pb2.Constraint(choices=types_pb2.Choices(texts=["yes"])),
            received=stack.generate("no", max_tokens=4).token_ids,
        )
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "received_token_ids" in str(failure.value.details())
