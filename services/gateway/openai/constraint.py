"""Which texts an answer may be, as OpenAI's clients say it (`response_format`), and vLLM's
(`structured_outputs`, `guided_json` and the like)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from pydantic_core import from_json

from baton.services.gateway.openai.errors import InvalidParam
from baton.services.gateway.openai.schema import Sampled
from baton.shared.constraints.schema import written
from baton.shared.constraints.size import MAX_BYTES, MAX_CHOICES, MAX_TAGS, MAX_TRIGGERS
from baton.shared.rpc.errors import InvalidField
from baton.v1 import types_pb2

_MAX_TAG_TEXT = 4 * MAX_BYTES
"""Characters of tags that are given as a text, in which JSON may escape what is counted."""


class Asked(NamedTuple):
    constraint: types_pb2.Constraint | None
    names: dict[str, str]
    """What the request calls the constraint's fields."""


def asked_constraint(request: Sampled) -> Asked:
    """Raises InvalidParam. It may write a large schema: once for each request is enough."""
    asked: list[tuple[str, Asked]] = []
    if request.response_format is not None:
        asked.append(("response_format", _of_response_format(request.response_format)))
    if request.structured_outputs is not None:
        asked.append(("structured_outputs", _of_structured_outputs(request.structured_outputs)))
    guided = {name: getattr(request, f"guided_{name}") for name in _GUIDED}
    asked += [
        (f"guided_{name}", _GUIDED[name](f"guided_{name}", value))
        for name, value in guided.items()
        if value is not None
    ]
    wanted = [(name, each) for name, each in asked if each.constraint is not None]
    if len(wanted) > 1:
        raise InvalidParam(wanted[1][0], f"is given beside {wanted[0][0]}: choose one")
    return wanted[0][1] if wanted else Asked(None, {})


def asked_field(request: Sampled) -> str:
    """Which field of a request that asks for a constraint does."""
    guided = [f"guided_{name}" for name in _GUIDED]
    given = [name for name in guided if getattr(request, name) is not None]
    # The others may be there and ask for nothing.
    is_format = (request.response_format or {}).get("type", "text") != "text"
    return next(iter(given), "response_format" if is_format else "structured_outputs")


def grammar_field(text: str) -> str:
    """Which of the two kinds of grammar this is: rules of GBNF have `::=`."""
    return "gbnf" if "::=" in text else "lark"


def _of_response_format(value: Mapping[str, Any]) -> Asked:
    path = "response_format"
    match value.get("type"):
        case "text":
            return Asked(None, {})
        case "json_object" if value.get("schema") is not None:
            # llama.cpp's form.
            return _json(f"{path}.schema", value["schema"])
        case "json_object":
            return Asked(types_pb2.Constraint(json_object=types_pb2.JsonObject()), {})
        case "json_schema":
            inner = value.get("json_schema")
            if not isinstance(inner, dict):
                raise InvalidParam(f"{path}.json_schema", "must be an object")
            if inner.get("schema") is None:
                raise InvalidParam(f"{path}.json_schema.schema", "is missing")
            # Strict or not: the answer is valid.
            return _json(f"{path}.json_schema.schema", inner["schema"])
        case "structural_tag":
            return _tags(path, value)
        case None:
            raise InvalidParam(f"{path}.type", "is missing")
        case other:
            problem = f"{str(other)[:40]!r} is not supported; choose from {', '.join(_TYPES)}"
            raise InvalidParam(f"{path}.type", problem)


_TYPES = ("text", "json_object", "json_schema", "structural_tag")


def _of_structured_outputs(value: Mapping[str, Any]) -> Asked:
    path = "structured_outputs"
    given = {name: each for name, each in value.items() if each is not None}
    for name, each in given.items():
        if name not in _STRUCTURED and name != "disable_any_whitespace":
            problem = "is not supported"
            if each is False:
                continue
            raise InvalidParam(f"{path}.{name}", problem, code="unsupported_parameter")
    kinds = [name for name in _STRUCTURED if name in given and given[name] is not False]
    if not kinds:
        return Asked(None, {})
    if len(kinds) > 1:
        raise InvalidParam(f"{path}.{kinds[1]}", f"is given beside {kinds[0]}: choose one")
    asked = _STRUCTURED[kinds[0]](f"{path}.{kinds[0]}", given[kinds[0]])
    if given.get("disable_any_whitespace") and asked.constraint is not None:
        asked.constraint.compact_json = True
    return asked


def _json(path: str, value: Any) -> Asked:
    [text] = _schemas([(path, value)])
    return Asked(types_pb2.Constraint(json_schema=text), {"constraint.json_schema": path})


def _schemas(schemas: Iterable[tuple[str, Any]]) -> Iterator[str]:
    """As JSON, which a schema may be already. Raises InvalidParam."""
    try:
        yield from written(_checked_kinds(schemas))
    except InvalidField as error:
        raise InvalidParam(error.field, error.message.removeprefix(error.field).lstrip()) from None


def _checked_kinds(schemas: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    for path, value in schemas:
        if not isinstance(value, str | dict | bool):
            raise InvalidParam(path, "must be a JSON schema")
        yield path, value


def _json_object(path: str, value: Any) -> Asked:
    if value is not True:
        raise InvalidParam(path, "must be true or false")
    return Asked(types_pb2.Constraint(json_object=types_pb2.JsonObject()), {})


def _regex(path: str, value: Any) -> Asked:
    return Asked(types_pb2.Constraint(regex=_text(path, value)), {"constraint.regex": path})


def _choice(path: str, value: Any) -> Asked:
    _check_texts(path, value, MAX_CHOICES)
    constraint = types_pb2.Constraint(choices=types_pb2.Choices(texts=value))
    return Asked(constraint, {"constraint.choices": path, "constraint.choices.texts": path})


def _grammar(path: str, value: Any) -> Asked:
    text = _text(path, value)
    constraint = types_pb2.Constraint()
    setattr(constraint, grammar_field(text), text)
    return Asked(constraint, {"constraint.gbnf": path, "constraint.lark": path})


def _tag_text(path: str, value: Any) -> Asked:
    """vLLM takes the object as a text."""
    if isinstance(value, str) and len(value) > _MAX_TAG_TEXT:
        raise InvalidParam(path, f"has {len(value)} characters; limit: {_MAX_TAG_TEXT}")
    try:
        read = from_json(value, allow_inf_nan=False) if isinstance(value, str) else value
    except ValueError:
        read = None
    if not isinstance(read, dict):
        raise InvalidParam(path, "must be an object")
    return _tags(path, read)


def _tags(path: str, value: Mapping[str, Any]) -> Asked:
    structures, triggers = value.get("structures"), value.get("triggers")
    if not isinstance(structures, list):
        raise InvalidParam(f"{path}.structures", "must be a list of objects")
    _check_number(f"{path}.structures", structures, MAX_TAGS)
    _check_texts(f"{path}.triggers", triggers, MAX_TRIGGERS)
    tags = types_pb2.StructuralTags(triggers=triggers)
    names = {
        "constraint.structural_tags": f"{path}.structures",
        "constraint.structural_tags.triggers": f"{path}.triggers",
    }
    for index, each in enumerate(structures):
        place = f"{path}.structures[{index}]"
        if not isinstance(each, dict):
            raise InvalidParam(place, "must be an object")
        tags.tags.add(
            begin=_text(f"{place}.begin", each.get("begin")),
            end=_text(f"{place}.end", each.get("end")),
        )
        names[f"constraint.structural_tags.tags[{index}]"] = place
        names[f"constraint.structural_tags.tags[{index}].json_schema"] = f"{place}.schema"
    texts = _schemas(
        (f"{path}.structures[{index}].schema", each.get("schema", {}))
        for index, each in enumerate(structures)
    )
    for tag, text in zip(tags.tags, texts, strict=True):
        tag.json_schema = text
    return Asked(types_pb2.Constraint(structural_tags=tags), names)


def _check_texts(path: str, value: Any, most: int) -> None:
    if isinstance(value, list):
        _check_number(path, value, most)
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise InvalidParam(path, "must be a list of texts")


def _check_number(path: str, value: list[Any], most: int) -> None:
    """Before anything walks them."""
    if len(value) > most:
        raise InvalidParam(path, f"has {len(value)} entries; limit: {most}")


def _text(path: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidParam(path, "must be a text")
    return value


_Read = Callable[[str, Any], Asked]
_GUIDED: dict[str, _Read] = {
    "json": _json,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
}
"""By what follows `guided_` in the name."""
_STRUCTURED: dict[str, _Read] = {
    **_GUIDED,
    "json_object": _json_object,
    "structural_tag": _tag_text,
}
