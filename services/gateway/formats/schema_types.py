"""Which types a tool's JSON schema allows an argument."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote

_MAX_DEPTH = 16
"""Of schemas within schemas, references followed."""
_MAX_SCHEMAS = 256
"""Looked at for one argument: references may lead to more and more of them."""


class SchemaTypes:
    def __init__(self, schema: Mapping[str, Any]) -> None:
        """`schema`: of an object, the arguments. References lead to places within it."""
        self._root = schema
        self._num_left = 0

    def of(self, key: str) -> frozenset[str]:
        """None when that is not said plainly."""
        self._num_left = _MAX_SCHEMAS
        return self._common(self._types(each, 0) for each in self._named(self._root, key, 0))

    def _named(self, schema: Any, key: str, depth: int) -> Iterator[Any]:
        """What a schema and those that hold beside it say of an argument."""
        if not self._may_look(schema, depth):
            return
        properties = schema.get("properties")
        if isinstance(properties, Mapping) and key in properties:
            yield properties[key]
        for each in self._beside(schema):
            yield from self._named(each, key, depth + 1)

    def _types(self, schema: Any, depth: int) -> frozenset[str]:
        if not self._may_look(schema, depth):
            return frozenset()
        kind = schema.get("type")
        if isinstance(kind, str):
            return frozenset((kind,))
        if isinstance(kind, list):
            return frozenset(each for each in kind if isinstance(each, str))
        if isinstance(schema.get("enum"), list):
            return frozenset(name for value in schema["enum"] for name in types_of(value))
        if "const" in schema:
            return frozenset(types_of(schema["const"]))
        said = [self._types(each, depth + 1) for each in self._beside(schema)]
        for alternatives in (schema.get("anyOf"), schema.get("oneOf")):
            if isinstance(alternatives, list):
                said.append(frozenset().union(*(self._types(e, depth + 1) for e in alternatives)))
        return self._common(said)

    def _beside(self, schema: Mapping[str, Any]) -> Iterator[Any]:
        """The schemas that hold as well."""
        reference = schema.get("$ref")
        if isinstance(reference, str):
            yield self._referred(reference)
        every = schema.get("allOf")
        yield from every if isinstance(every, list) else ()

    def _referred(self, reference: str) -> Any:
        """None for what is elsewhere or not there."""
        start, *steps = reference.split("/")
        found: Any = self._root if start == "#" else None
        for step in steps:
            name = unquote(step).replace("~1", "/").replace("~0", "~")
            found = found.get(name) if isinstance(found, Mapping) else None
        return found

    def _may_look(self, schema: Any, depth: int) -> bool:
        self._num_left -= 1
        return isinstance(schema, Mapping) and depth < _MAX_DEPTH and self._num_left >= 0

    @staticmethod
    def _common(said: Iterable[frozenset[str]]) -> frozenset[str]:
        """What all allow that say anything."""
        plain = [types for types in said if types]
        return frozenset.intersection(*plain) if plain else frozenset()


def types_of(value: Any) -> tuple[str, ...]:
    match value:
        case None:
            return ("null",)
        case bool():
            return ("boolean",)
        case int():
            return ("integer", "number")
        case float():
            return ("number",)
        case str():
            return ("string",)
        case list():
            return ("array",)
        case _:
            return ("object",)
