"""Constraints, compiled: each by the gateway, which refuses what cannot be, and by its workers."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from llguidance import LLMatcher, LLParserLimits

from baton.shared.constraints.grammar import grammar_of, json_options
from baton.shared.constraints.schema import place_of_error, place_of_keyword
from baton.shared.constraints.size import check_size
from baton.shared.constraints.tokens import TokenTable
from baton.shared.rpc.errors import InvalidField
from baton.v1 import types_pb2

_LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=4_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    # They would tell the whole grammar.
    verbose_errors=False,
)
"""Work, not time: every machine refuses the same. `step_max_items` bounds a mask, to some 10 ms,
and so what the next token takes; tokens without a mask between them are not bounded. 4,000 items
are enough for an object of 250 optional properties. A state of the lexer takes about 2 kB."""
_MAX_COMPILED = 64
_MAX_SHOWN = 300
"""Characters of a schema's, or of llguidance's, in what a refusal says."""
_SCHEMA = "what llguidance supports of JSON Schema"


@dataclass(frozen=True, slots=True)
class CompiledConstraint:
    """What the matchers of all answers under one constraint start from."""

    grammar: LLMatcher
    """At its beginning; to be copied."""
    tokens: TokenTable
    accepts_empty: bool
    begin_after: tuple[int, ...] | bytes | None
    """The tokens, or the text, behind which the constrained text begins; None: it does at once."""
    overhanging: tuple[int, ...]
    """Tokens that have all of that text, and behind it what is not white space."""


class Compiler:
    """Keeps what was compiled last. From any thread."""

    def __init__(self, tokens: TokenTable) -> None:
        self._tokens = tokens
        self._compiled: OrderedDict[bytes, CompiledConstraint] = OrderedDict()
        """By the message's SHA-256."""
        self._lock = threading.Lock()

    def compile(self, constraint: bytes) -> CompiledConstraint:
        """`constraint`: the message, serialised. Raises InvalidField."""
        digest = hashlib.sha256(constraint).digest()
        with self._lock:
            known = self._compiled.get(digest)
            if known is not None:
                self._compiled.move_to_end(digest)
                return known
        made = compile_constraint(types_pb2.Constraint.FromString(constraint), self._tokens)
        with self._lock:
            self._compiled[digest] = made
            while len(self._compiled) > _MAX_COMPILED:
                self._compiled.popitem(last=False)
        return made


def compile_constraint(constraint: types_pb2.Constraint, tokens: TokenTable) -> CompiledConstraint:
    """Raises InvalidField, naming the place where llguidance's word allows it."""
    check_size(constraint)
    begin_after = _begin_after(constraint, tokens)
    grammar = LLMatcher(
        tokens.for_grammars, grammar_of(constraint, tokens.split), log_level=0, limits=_LIMITS
    )
    warnings = grammar.get_grammar_warnings()
    if grammar.is_error() or warnings:
        raise _refusal(constraint, tokens, grammar.get_error() or "; ".join(warnings))
    overhanging: tuple[int, ...] = ()
    if isinstance(begin_after, bytes):
        overhanging = tuple(
            token_id
            for token_id, text in enumerate(tokens.token_bytes)
            if begin_after in text and reaches_past(begin_after, text)
        )
    return CompiledConstraint(grammar, tokens, grammar.is_accepting(), begin_after, overhanging)


def reaches_past(end: bytes, text: bytes) -> bool:
    """Whether what follows it in the text is more than white space."""
    place = text.find(end)
    return place >= 0 and bool(text[place + len(end) :].strip())


def _begin_after(
    constraint: types_pb2.Constraint, tokens: TokenTable
) -> tuple[int, ...] | bytes | None:
    if not constraint.HasField("begin_after"):
        return None
    field = "constraint.begin_after"
    match constraint.begin_after.WhichOneof("end"):
        case "token_ids":
            run = tuple(constraint.begin_after.token_ids.token_ids)
            if max(run) >= tokens.vocab_size:
                limit = f"below the vocabulary's size, {tokens.vocab_size}"
                raise InvalidField(f"{field}.token_ids", f"has token {max(run)}", limit=limit)
            return run
        case "text":
            return constraint.begin_after.text.encode()
    raise InvalidField(field, "is empty", limit="token_ids or text")


def _refusal(constraint: types_pb2.Constraint, tokens: TokenTable, error: str) -> InvalidField:
    kind = constraint.WhichOneof("kind")
    if kind == "json_schema":
        return _schema_refusal("constraint.json_schema", constraint.json_schema, error)
    if kind == "structural_tags":
        # One of them by itself says where.
        options = json_options(constraint)
        for index, tag in enumerate(constraint.structural_tags.tags):
            content = tag.WhichOneof("content")
            if content is None:
                continue
            field = f"constraint.structural_tags.tags[{index}].{content}"
            text: str = getattr(tag, content)
            if content == "json_schema":
                problem = _error_of_schema(json.loads(text), options)
                if problem is not None:
                    return _schema_refusal(field, text, problem)
                continue
            alone = types_pb2.Constraint()
            setattr(alone, content, text)
            problem = _error_of(grammar_of(alone, tokens.split))
            if problem is not None:
                return InvalidField(field, f"cannot be used: {_one_line(problem)}", limit=content)
    return InvalidField(
        f"constraint.{kind}",
        f"cannot be used: {_one_line(error)}",
        limit=_LIMIT_OF.get(kind or "", "less"),
    )


_LIMIT_OF = {
    "regex": "a regular expression without look-around",
    "lark": "a grammar that llguidance reads",
    "gbnf": "a GBNF grammar",
    "choices": "fewer or shorter texts",
    "structural_tags": "tags that llguidance can follow",
}


def _schema_refusal(field: str, text: str, error: str) -> InvalidField:
    schema = json.loads(text)
    unknown = re.search(r'Unimplemented keys: \["([^"]+)"', error)
    if unknown is not None:
        keyword = unknown[1]
        place = place_of_keyword(schema, keyword)
        where = f" at {_one_line(place)}" if place else ""
        problem = f"has the keyword {_one_line(repr(keyword))}{where}, which is not supported"
        return InvalidField(field, problem, limit=_SCHEMA)
    place = place_of_error(schema, error, lambda part: _error_of_schema(part, {}))
    where = f" at {_one_line(place)}" if place else ""
    return InvalidField(field, f"cannot be used{where}: {_one_line(error)}", limit=_SCHEMA)


def _error_of_schema(schema: Any, options: Any) -> str | None:
    text = schema if isinstance(schema, dict) else json.dumps(schema)
    return _error_of(LLMatcher.grammar_from_json_schema(text, overrides=options))


def _error_of(grammar: str) -> str | None:
    """What is wrong with it, whatever the tokens are."""
    is_error, found = LLMatcher.validate_grammar_with_warnings(grammar, limits=_LIMITS)
    return found[0] if is_error else None


def _one_line(error: str) -> str:
    line = " ".join(error.replace("<non-verbose/>", "").split())
    return line if len(line) <= _MAX_SHOWN else line[:_MAX_SHOWN] + "…"
