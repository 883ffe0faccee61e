"""JSON schemas: their size, before anything is made of them, and where in one a problem is.

Pure. Whether a schema can be followed is llguidance's to say; it names no place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from baton.shared.constraints.size import MAX_BYTES
from baton.shared.rpc.errors import InvalidField

_MAX_DEPTH = 64
_MAX_PROPERTIES = 1000
"""Of all objects in a schema together."""
_MAX_ENUM_VALUES = 5000
_MAX_NODES = 20_000
"""Values of any kind, from the whole schema down to single numbers."""
_MAX_TRIES = 200
"""Of finding a place."""

_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_SINGLE = (
    *("items", "additionalProperties", "additionalItems", "contains", "propertyNames", "not"),
    *("if", "then", "else", "unevaluatedItems", "unevaluatedProperties"),
)


def parse_schema(field: str, text: str) -> dict[str, Any]:
    """As an object, where it is `true`, too. Of a constraint whose size is checked.

    Raises InvalidField for what is no schema, or too large a one.
    """
    try:
        schema = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        what = "is nested too deep" if isinstance(error, RecursionError) else f"is no JSON: {error}"
        raise InvalidField(field, what, limit="a JSON Schema") from None
    if not isinstance(schema, dict | bool):
        raise InvalidField(
            field, f"is of type {type(schema).__name__}", limit="an object, or true or false"
        )
    if isinstance(schema, bool):
        if not schema:
            raise InvalidField(field, "is false: nothing is valid by it", limit="a JSON Schema")
        return {}
    check_values(field, schema)
    if "x-guidance" in schema:
        # It would tell llguidance to leave out what it does not know.
        raise InvalidField(field, "has the keyword x-guidance", limit="a JSON Schema")
    return schema


def written(schemas: Iterable[tuple[str, Any]]) -> Iterator[str]:
    """Each schema as JSON, which a text is already; before it stands its field. One by one, so that
    what is too large, alone or with those before it, is not written first. Raises InvalidField."""
    num_left = MAX_BYTES
    for field, schema in schemas:
        if isinstance(schema, str):
            text = schema
        else:
            check_values(field, schema)
            text = json.dumps(schema, ensure_ascii=False)
        # Characters: those are at least so many bytes.
        num_left -= len(text)
        if num_left < 0:
            problem, limit = "is too large", f"{MAX_BYTES} bytes, with all that is beside it"
            raise InvalidField(field, problem, limit=limit)
        yield text


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def check_values(field: str, schema: Any) -> None:
    """Raises InvalidField for too many, or too deep. Stops at the first that are too many."""
    num_nodes, num_properties, num_enum_values = 1, 0, 0
    level = [schema]
    for depth in range(_MAX_DEPTH + 2):
        if not level:
            return
        if depth > _MAX_DEPTH:
            break
        below: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                properties, values = node.get("properties"), node.get("enum")
                num_properties += len(properties) if isinstance(properties, dict) else 0
                num_enum_values += len(values) if isinstance(values, list) else 0
            elif not isinstance(node, list):
                continue
            num_nodes += len(node)
            for what, number, most in (
                ("properties", num_properties, _MAX_PROPERTIES),
                ("enum values", num_enum_values, _MAX_ENUM_VALUES),
                ("values", num_nodes, _MAX_NODES),
            ):
                if number > most:
                    raise InvalidField(field, f"has {number} {what}", limit=f"{most} {what}")
            below.extend(node.values() if isinstance(node, dict) else node)
        level = below
    raise InvalidField(field, "is nested too deep", limit=f"{_MAX_DEPTH} levels")


def place_of_keyword(schema: Any, keyword: str) -> str | None:
    """JSON pointer of the first subschema that has the keyword."""
    if isinstance(schema, dict):
        if keyword in schema:
            return ""
        for step, child in _subschemas(schema):
            below = place_of_keyword(child, keyword)
            if below is not None:
                return step + below
    return None


def place_of_error(schema: Any, error: str, error_of: Callable[[Any], str | None]) -> str:
    """JSON pointer of the innermost subschema that by itself, beside the whole's definitions, gives
    the error that the whole gives. Empty where none does."""
    place, node, num_tries = "", schema, 0
    definitions = {
        name: schema[name]
        for name in ("$defs", "definitions")
        if isinstance(schema, dict) and name in schema
    }
    while isinstance(node, dict):
        for step, child in _subschemas(node):
            num_tries += 1
            if num_tries > _MAX_TRIES:
                return place
            alone = {**definitions, **child} if isinstance(child, dict) else child
            is_definition = step.startswith(("/$defs/", "/definitions/"))
            if (not is_definition or node is schema) and error_of(alone) == error:
                place, node = place + step, child
                break
        else:
            return place
    return place


def _subschemas(node: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(how a JSON pointer goes on to it, subschema)."""
    for name in _MAPS:
        children = node.get(name)
        if isinstance(children, dict):
            for key, child in children.items():
                escaped = key.replace("~", "~0").replace("/", "~1")
                yield f"/{name}/{escaped}", child
    for name in _LISTS:
        children = node.get(name)
        if isinstance(children, list):
            for index, child in enumerate(children):
                yield f"/{name}/{index}", child
    for name in _SINGLE:
        child = node.get(name)
        if isinstance(child, dict):
            yield f"/{name}", child
