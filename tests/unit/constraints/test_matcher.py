"""Masks along an answer: what they allow, and that they depend on the emitted tokens alone."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE

from baton.shared.constraints.compiler import compile_constraint
from baton.shared.constraints.matcher import AnswerMatcher, TokenNotAllowed
from baton.shared.constraints.tokens import TokenTable
from baton.shared.rpc.errors import InvalidField
from baton.v1 import types_pb2

Constraint = types_pb2.Constraint
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["wolf", "lamb"]},
        "ages": {"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": 3},
    },
    "required": ["name", "kind", "ages"],
    "additionalProperties": False,
}
JSON = Constraint(json_schema=json.dumps(SCHEMA))
COMPACT = Constraint(json_schema=json.dumps(SCHEMA), compact_json=True)


def matcher(table: TokenTable, constraint: Constraint, **options: Any) -> AnswerMatcher:
    return AnswerMatcher(compile_constraint(constraint, table), **options)


def allowed(mask: np.ndarray[Any, np.dtype[np.uint32]]) -> list[int]:
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    return [int(each) for each in np.flatnonzero(bits)]


def walk(matching: AnswerMatcher, table: TokenTable, seed: int, most: int = 200) -> list[int]:
    """An answer drawn at random from the masks, one by one, its end token included."""
    drawing = random.Random(seed)
    emitted: list[int] = []
    while len(emitted) < most:
        token = drawing.choice(allowed(matching.masks()[0]))
        emitted.append(token)
        if token in table.end_ids:
            return emitted
        matching.take([token])
    return emitted


def text_of(table: TokenTable, token_ids: list[int]) -> str:
    ids = [each for each in token_ids if each not in table.end_ids]
    return b"".join(table.token_bytes[each] for each in ids).decode()


@pytest.mark.parametrize("seed", range(6))
def test_what_masks_allow_is_valid(table: TokenTable, seed: int) -> None:
    answer = walk(matcher(table, COMPACT), table, seed)
    assert answer[-1] in table.end_ids
    read = json.loads(text_of(table, answer))
    assert list(read) == ["name", "kind", "ages"] and read["kind"] in ("wolf", "lamb")


@pytest.mark.parametrize("constraint", [JSON, COMPACT, Constraint(regex="(ab|cd){3,9}x+")])
@pytest.mark.parametrize("seed", range(3))
def test_masks_are_a_function_of_the_emitted_tokens(
    table: TokenTable, constraint: Constraint, seed: int
) -> None:
    """Those behind drafts, and those of a matcher that is told everything at once, are those that
    come one by one: after a new attempt, and whatever was guessed."""
    answer = walk(matcher(table, constraint), table, seed, most=40)
    answer = [each for each in answer if each not in table.end_ids]
    going, one_by_one = matcher(table, constraint), []
    for token in answer:
        one_by_one.append(going.masks()[0])
        going.take([token])
    one_by_one.append(going.masks()[0])
    for start in range(0, len(answer), 3):
        late = matcher(table, constraint)
        late.take(answer[:start])
        drafts = answer[start : start + 5]
        for _ in range(2):  # drafts leave nothing behind
            masks = late.masks(drafts)
            assert np.array_equal(masks, one_by_one[start : start + len(drafts) + 1])


def test_a_draft_that_is_not_allowed_stands_nowhere(table: TokenTable) -> None:
    going = matcher(table, COMPACT)
    [first] = allowed(going.masks()[0])
    wrong = next(each for each in range(6, 4096) if each != first)
    masks = going.masks([wrong, wrong])
    assert allowed(masks[0]) == [first] and len(masks) == 3
    assert going.num_allowed([wrong, first]) == 0
    assert going.num_allowed([first, *table.end_ids]) == 1


def test_forced_tokens_are_the_only_ones(table: TokenTable) -> None:
    """As many at once as one by one; the tokenizer's own tokens, not any that spell the text."""
    going = matcher(table, COMPACT)
    forced = going.forced(99)
    assert len(forced) >= 3 and forced == tuple(table.encode(b'{"name":"')[: len(forced)])
    masks = going.masks(forced)
    assert [allowed(mask) for mask in masks[:-1]] == [[each] for each in forced]
    for index, token in enumerate(forced):
        assert going.forced(99) == forced[index:]
        assert np.array_equal(going.masks()[0], masks[index])
        going.take([token])
    assert len(allowed(going.masks()[0])) > 1


def test_all_ends_are_allowed_where_the_grammar_may_end_and_only_there(table: TokenTable) -> None:
    assert table.end_ids == (1, 5)
    going = matcher(table, Constraint(regex="a{1,2}"))
    assert not {1, 5} & set(allowed(going.masks()[0]))
    [a] = table.encode(b"a")
    going.take([a])
    assert {1, 5} < set(allowed(going.masks()[0]))
    going.take([a])
    assert allowed(going.masks()[0]) == [1, 5]


def test_an_ignored_end_comes_when_nothing_else_is_left(table: TokenTable) -> None:
    going = matcher(table, Constraint(regex="a{1,2}"), ignore_eos=True)
    [a] = table.encode(b"a")
    going.take([a])
    assert allowed(going.masks()[0]) == [a]
    going.take([a])
    assert allowed(going.masks()[0]) == [1, 5]


@pytest.mark.parametrize(
    "begin",
    [
        types_pb2.BeginAfter(text="</think>"),
        types_pb2.BeginAfter(token_ids=types_pb2.TokenRun(token_ids=[70, 71])),
        types_pb2.BeginAfter(text="<|system|>"),
    ],
    ids=["text", "tokens", "special token"],
)
def test_masks_begin_behind_what_is_free(table: TokenTable, begin: types_pb2.BeginAfter) -> None:
    constraint = Constraint(choices=types_pb2.Choices(texts=["yes"]), begin_after=begin)
    going = matcher(table, constraint)
    thoughts = table.encode(b"In the beginning")
    if begin.text == "</think>":
        end = table.encode(b"</think>")
    else:
        end = [70, 71] if begin.HasField("token_ids") else [2]
    assert len(allowed(going.masks()[0])) > 4096 - 3
    # Nothing valid has been said yet.
    assert not {1, 5} & set(allowed(going.masks()[0]))
    yes = table.encode(b"yes")
    drafts = [*thoughts, *end, *yes]
    masks = going.masks(drafts)
    assert allowed(masks[len(thoughts) + len(end)]) == [yes[0]]
    assert allowed(masks[-1]) == [1, 5]
    going.take([*thoughts, *end])
    assert allowed(going.masks()[0]) == [yes[0]]


def test_no_token_of_the_free_text_reaches_into_what_is_constrained(table: TokenTable) -> None:
    """The grammar would begin behind what such a token brings."""
    [newline] = table.encode(b"\n")
    # A token "xy" ends a text that ends with "x", and brings "y".
    pairs = [
        (each, text.decode())
        for each, text in enumerate(table.token_bytes)
        if len(text) == 2 and text.isalpha()
    ]
    token, pair = pairs[7]
    for before in ("</think", ""):
        begin = types_pb2.BeginAfter(text=before + pair[0])
        going = matcher(table, Constraint(json_schema="{}", begin_after=begin))
        going.take([newline])
        assert (token in allowed(going.masks()[0])) is bool(before)
        going.take(table.encode(before.encode()))
        free = allowed(going.masks()[0])
        assert token not in free and set(table.encode(pair[0].encode())) < set(free)
        masks = going.masks([token, token])
        assert len(masks) == 3, "what is not drawn leads nowhere"
        with pytest.raises(TokenNotAllowed):
            going.take([token])


def test_white_space_may_follow_the_free_text_in_the_same_token(table: TokenTable) -> None:
    [newlines] = [each for each, text in enumerate(table.token_bytes) if text == b"\n\n"]
    begin = types_pb2.BeginAfter(text="</think>\n")
    going = matcher(table, Constraint(json_schema='{"const": 7}', begin_after=begin))
    going.take(table.encode(b"</think>"))
    assert newlines in allowed(going.masks()[0])
    going.take([newlines])
    assert set(table.encode(b"7")) == set(allowed(going.masks()[0]))


def test_free_text_may_end_where_nothing_need_follow(table: TokenTable) -> None:
    tags = types_pb2.StructuralTags(
        triggers=["<call>"], tags=[types_pb2.StructuralTag(begin="<call>", regex="[0-9]", end="!")]
    )
    constraint = Constraint(structural_tags=tags, begin_after=types_pb2.BeginAfter(text="</think>"))
    assert {1, 5} < set(allowed(matcher(table, constraint).masks()[0]))


def test_tags_in_free_text(table: TokenTable) -> None:
    """Once a trigger is written, a tag follows; special tokens are tokens, not their letters."""
    tag = types_pb2.StructuralTag
    tags = types_pb2.StructuralTags(
        triggers=["<call>", "<|system|>"],
        tags=[
            tag(begin="<call>a:", json_schema='{"enum": [1, 2]}', end="</call>"),
            tag(begin="<call>b/", regex="x/y", end="<|end|>"),
            tag(begin="<|system|>", lark='start: "z"', end=""),
        ],
    )
    going = matcher(table, Constraint(structural_tags=tags))
    free = table.encode(b"Let me see: <ca")
    going.take(free)
    first = set(allowed(going.masks()[0]))
    assert {1, 2, 5} < first and 3 not in first  # the ends, and the special trigger
    going.take(table.encode(b"ll>"))
    texts = {table.token_bytes[each] for each in allowed(going.masks()[0])}
    assert {text[:1] for text in texts} == {b"a", b"b"}
    going.take(table.encode(b"b/x/y"))
    assert 5 in allowed(going.masks()[0])
    special = matcher(table, Constraint(structural_tags=tags))
    special.take([*table.encode(b"well"), 2])
    texts = {table.token_bytes[each] for each in allowed(special.masks()[0])}
    assert {text[:1] for text in texts} == {b"z"}
    special.take(table.encode(b"z"))
    assert {1, 2, 5} < set(allowed(special.masks()[0]))


def test_only_tags_and_at_most_one(table: TokenTable) -> None:
    tags = types_pb2.StructuralTags(
        tags=[types_pb2.StructuralTag(begin="<c>", regex="[0-9]{2}", end="</c>")],
        only_tags=True,
        at_most_one=True,
    )
    going = matcher(table, Constraint(structural_tags=tags))
    answer = walk(going, table, seed=1)
    assert answer[-1] in table.end_ids and len(text_of(table, answer)) == len("<c>42</c>")
    tags.at_most_one = False
    several = matcher(table, Constraint(structural_tags=tags))
    several.take(table.encode(b"<c>42</c>\n<c>17</c>"))
    assert 1 in allowed(several.masks()[0])


def test_received_tokens_that_do_not_fit_are_refused(table: TokenTable) -> None:
    going = matcher(table, COMPACT)
    with pytest.raises(TokenNotAllowed):
        going.take(table.encode(b"{]"))


@pytest.mark.parametrize("text", ["c", "ac", "a(c|d)", "ad"])
def test_a_text_that_only_an_end_token_can_write_is_refused(text: str) -> None:
    """c ends answers, of d there is no token."""
    tokenizer = Tokenizer(BPE(vocab={"a": 0, "b": 1, "c": 2}, merges=[]))
    going = matcher(TokenTable(tokenizer, 3, [2]), Constraint(regex=text))
    with pytest.raises(InvalidField, match="no text that the model's tokens can write"):
        while True:
            [token] = allowed(going.masks()[0])
            going.take([token])


@pytest.mark.parametrize(
    "kind",
    [
        Constraint(regex=r"\d{3}-[A-Z]{2}"),
        Constraint(choices=types_pb2.Choices(texts=["yes", "nö", "<|eos|>", '"quoted"\n'])),
        Constraint(lark='start: "a" /[0-9]{2}/ "z"'),
        Constraint(gbnf='root ::= "x" [0-9] [0-9] "y"'),
    ],
    ids=lambda each: each.WhichOneof("kind"),
)
def test_kinds_end_by_themselves(table: TokenTable, kind: Constraint) -> None:
    for seed in range(8):
        answer = walk(matcher(table, kind), table, seed, most=60)
        assert answer[-1] in table.end_ids
        if kind.WhichOneof("kind") == "choices":
            assert text_of(table, answer) in kind.choices.texts
