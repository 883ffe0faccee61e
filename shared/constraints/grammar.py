"""A Constraint as a grammar of llguidance."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark

from baton.shared.constraints.schema import parse_schema
from baton.shared.rpc.errors import InvalidField
from baton.v1 import types_pb2

_JSON_SPACE = r"( |\n[ \t]{0,24})"
"""Between the parts of JSON: a space, or a new line and its indent. Models that may write white
space for ever do."""

Split = Callable[[str], Sequence[str | int]]
"""A text's parts: special tokens by id, and what is between them."""


def grammar_of(constraint: types_pb2.Constraint, split: Split) -> str:
    """`constraint`: one whose size is checked. Raises InvalidField for what is wrong with it before
    it is compiled."""
    kind = constraint.WhichOneof("kind")
    options = json_options(constraint)
    match kind:
        case "json_object":
            return LLMatcher.grammar_from_json_schema({"type": "object"}, overrides=options)
        case "json_schema":
            schema = parse_schema("constraint.json_schema", constraint.json_schema)
            return LLMatcher.grammar_from_json_schema(schema, overrides=options)
        case "regex":
            _check_text("constraint.regex", constraint.regex)
            return LLMatcher.grammar_from_regex(constraint.regex)
        case "choices":
            return LLMatcher.grammar_from_lark(_choices(constraint.choices.texts))
        case "lark":
            _check_text("constraint.lark", constraint.lark)
            return LLMatcher.grammar_from_lark(constraint.lark)
        case "gbnf":
            _check_text("constraint.gbnf", constraint.gbnf)
            return LLMatcher.grammar_from_lark(_lark_of_gbnf(constraint.gbnf))
        case "structural_tags":
            tags = _Tags(constraint.structural_tags, split, options)
            return LLMatcher.grammar_from_lark(tags.lark())
    raise InvalidField(
        "constraint", "is empty", limit="one of json_object, json_schema, regex, ..."
    )


def json_options(constraint: types_pb2.Constraint) -> Any:
    """Those of llguidance's JsonCompileOptions. Nothing is approximated."""
    options: dict[str, Any] = {"lenient": False, "coerce_one_of": False}
    if constraint.compact_json:
        return options | {"whitespace_flexible": False}
    return options | {"whitespace_pattern": _JSON_SPACE}


def _check_text(field: str, text: str) -> None:
    if not text:
        raise InvalidField(field, "is empty", limit="at least 1 character")


def _choices(texts: Sequence[str]) -> str:
    field = "constraint.choices"
    for index, text in enumerate(texts):
        if not text:
            raise InvalidField(f"{field}.texts[{index}]", "is empty", limit="at least 1 character")
    return "start: " + " | ".join(json.dumps(text) for text in texts)


def _lark_of_gbnf(gbnf: str) -> str:
    try:
        lark: str = any_to_lark(gbnf)
    except Exception as error:  # of any kind: it is a hand-written parser
        what = " ".join(str(error).split())[:200] or type(error).__name__
        raise InvalidField(
            "constraint.gbnf", f"cannot be read: {what}", limit="a GBNF grammar"
        ) from None
    return lark


class _Tags:
    """Structural tags in Lark.

    A lexeme that is `lazy` ends with the first trigger, so free text has none. Special tokens are
    no text at all: as triggers they need no lexeme.
    """

    def __init__(self, tags: types_pb2.StructuralTags, split: Split, json_options: Any) -> None:
        self._tags = tags
        self._split = split
        self._json_options = json_options
        self._field = "constraint.structural_tags"

    def lark(self) -> str:
        tags = self._tags
        rules = [rule for index, tag in enumerate(tags.tags) for rule in self._content(index, tag)]
        if tags.only_tags:
            starts = [
                f"tag{index}: {self._terms(tag.begin)} content{index}"
                for index, tag in enumerate(tags.tags)
            ]
        else:
            starts = self._triggered()
        every = " | ".join(f"tag{index}" for index in range(len(tags.tags)))
        if tags.only_tags:
            start = "any" if tags.at_most_one else "any (BETWEEN? any)*"
            rules.append(r"BETWEEN: /[ \t\n\r]{1,8}/")
        else:
            start = "any | FREE" if tags.at_most_one else "any* FREE"
            rules.append(r"FREE: /(.|\n)*/")
        return "\n".join([f"start: {start}", f"any: {every}", *starts, *rules])

    def _triggered(self) -> list[str]:
        """Rules of the tags' beginnings, each behind free text that ends with a trigger."""
        tags, field = self._tags, self._field
        if not tags.triggers:
            raise InvalidField(f"{field}.triggers", "are missing", limit="at least 1 text")
        rules = []
        for index, trigger in enumerate(tags.triggers):
            parts = self._split(trigger)
            if not parts or any(isinstance(part, int) for part in parts[1:]):
                problem = "is empty" if not parts else "has a special token behind its beginning"
                limit = "a text, or a special token and a text"
                raise InvalidField(f"{field}.triggers[{index}]", problem, limit=limit)
            if isinstance(parts[0], int):
                rules.append(f"trigger{index}: FREE {self._terms(trigger)}")
            else:
                rules.append(f"trigger{index}[lazy]: FREE {json.dumps(trigger)}")
        for number, tag in enumerate(tags.tags):
            index = self._trigger_of(number, tag)
            rest = self._terms(tag.begin[len(tags.triggers[index]) :])
            rules.append(f"tag{number}: trigger{index} {rest} content{number}")
        return rules

    def _trigger_of(self, number: int, tag: types_pb2.StructuralTag) -> int:
        """The longest that the tag begins with."""
        triggers = self._tags.triggers
        found = [index for index, trigger in enumerate(triggers) if tag.begin.startswith(trigger)]
        if not found:
            field = f"{self._field}.tags[{number}].begin"
            raise InvalidField(field, "begins with no trigger", limit="one of the triggers first")
        return max(found, key=lambda index: len(triggers[index]))

    def _content(self, number: int, tag: types_pb2.StructuralTag) -> list[str]:
        field = f"{self._field}.tags[{number}]"
        end = self._terms(tag.end)
        match tag.WhichOneof("content"):
            case "json_schema":
                schema = parse_schema(f"{field}.json_schema", tag.json_schema)
                schema = {**schema, "x-guidance": self._json_options}
                return [f"content{number}: %json {json.dumps(schema)} {end}"]
            case "regex":
                _check_text(f"{field}.regex", tag.regex)
                return [f"content{number}: /{_escaped(tag.regex)}/ {end}"]
            case "lark":
                _check_text(f"{field}.lark", tag.lark)
                return [f"content{number}: %lark {{\n{tag.lark}\n}} {end}"]
        # A text and nothing else.
        return [f"content{number}: {end or json.dumps('')}"]

    def _terms(self, text: str) -> str:
        return " ".join(
            f"<[{part}]>" if isinstance(part, int) else json.dumps(part)
            for part in self._split(text)
        )


def _escaped(regex: str) -> str:
    """As it stands between slashes."""
    return re.sub(r"\\.|/|\n", lambda match: _ESCAPES.get(match[0], match[0]), regex)


_ESCAPES = {"/": r"\/", "\n": r"\n"}
