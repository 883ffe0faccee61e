"""JSON schemas made up by chance, whose answers end even where a model would go on for ever."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import jsonschema  # type: ignore[import-untyped]

Schema = dict[str, Any]

_NAMES = (
    "name",
    "age",
    "city",
    "tags",
    "kind",
    "id",
    "when",
    "size",
    "ok",
    "ü",
    "a b",
    'q"',
    "x/y",
)
_WORDS = ("wolf", "lamb", "sea of glass", "née", "7", "", 'say "no"', "<|end|>", "a\nb")
_PATTERNS = ("^[a-z]{2,6}$", "^[A-Z]{3}-[0-9]{2}$", "^(yes|no|maybe so)$", "[0-9]{3}", "^\\w{1,5}$")
# Not `date`: the year 0 is one by RFC 3339, and none in Python.
_FORMATS = ("time", "date-time", "uuid", "ipv4", "email")


def make_schema(seed: int) -> Schema:
    """An object or array at the top, three levels deep at most."""
    making = random.Random(f"schema {seed}")
    definitions: dict[str, Schema] = {}
    if making.random() < 0.3:
        definitions["leaf"] = _leaf(making)
        definitions["part"] = _object(making, 1, definitions)
    top = making.choice((_object, _object, _object, _array, _any_of))
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"made {seed}"}
    return {
        **schema,
        **top(making, 2, definitions),
        **({"$defs": definitions} if definitions else {}),
    }


def is_valid(text: str, schema: Schema) -> bool:
    validator = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    try:
        return bool(validator.is_valid(json.loads(text)))
    except ValueError:
        return False


def _value(making: random.Random, depth: int, definitions: dict[str, Schema]) -> Schema:
    if definitions and making.random() < 0.2:
        return {"$ref": f"#/$defs/{making.choice(sorted(definitions))}"}
    if depth and making.random() < 0.45:
        return making.choice((_object, _array, _any_of))(making, depth - 1, definitions)
    return _leaf(making)


def _object(making: random.Random, depth: int, definitions: dict[str, Schema]) -> Schema:
    names = making.sample(_NAMES, making.randint(0, 4))
    required = [name for name in names if making.random() < 0.7]
    schema: Schema = {
        "type": "object",
        "properties": {name: _value(making, depth, definitions) for name in names},
        "additionalProperties": False,
    }
    return {**schema, "required": required} if required else schema


def _array(making: random.Random, depth: int, definitions: dict[str, Schema]) -> Schema:
    least = making.randint(0, 2)
    schema: Schema = {
        "type": "array",
        "items": _value(making, depth, definitions),
        "minItems": least,
        "maxItems": least + making.randint(0, 2),
    }
    if making.random() < 0.3:
        schema["prefixItems"] = [_leaf(making) for _ in range(making.randint(1, 2))]
        schema["maxItems"] += 2
    return schema


def _any_of(making: random.Random, depth: int, definitions: dict[str, Schema]) -> Schema:
    return {"anyOf": [_value(making, depth, definitions) for _ in range(making.randint(2, 3))]}


def _leaf(making: random.Random) -> Schema:
    kinds: tuple[Callable[[random.Random], Schema], ...] = (_text, _text, _number, _fixed, _simple)
    return making.choice(kinds)(making)


def _text(making: random.Random) -> Schema:
    match making.randrange(3):
        case 0:
            return {"type": "string", "pattern": making.choice(_PATTERNS), "maxLength": 12}
        case 1:
            return {"type": "string", "format": making.choice(_FORMATS), "maxLength": 48}
        case _:
            least = making.randint(0, 3)
            return {"type": "string", "minLength": least, "maxLength": least + making.randint(0, 9)}


def _number(making: random.Random) -> Schema:
    low = making.randint(-200, 200)
    schema: Schema = {"type": "integer", "minimum": low, "maximum": low + making.randint(0, 5000)}
    if making.random() < 0.2:
        schema |= {"multipleOf": making.choice((2, 5, 10)), "maximum": low + 5000}
    return schema


def _fixed(making: random.Random) -> Schema:
    values = [*making.sample(_WORDS, 3), making.randint(0, 99), None, True, {"a": [1]}]
    if making.random() < 0.3:
        return {"const": making.choice(values)}
    return {"enum": making.sample(values, making.randint(1, 4))}


def _simple(making: random.Random) -> Schema:
    if making.random() < 0.2:
        return {"type": ["boolean", "null"]}
    return {"type": making.choice(("boolean", "null"))}
