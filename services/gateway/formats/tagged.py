"""Arguments that a model writes one by one, between tags: JSON is made of them.

    GLM           <arg_key>city</arg_key>\n<arg_value>Ulm</arg_value>
    Qwen3-Coder   <parameter=city>\nUlm\n</parameter>

A text is written as it is, so what an argument is follows from the tool's schema.
"""

from __future__ import annotations

import json

from baton.services.gateway.answer_parts import Part
from baton.services.gateway.formats.calls import Calls
from baton.services.gateway.formats.schema_types import SchemaTypes, types_of
from baton.services.gateway.formats.source import Source, Steps, texts_before


class TaggedArguments:
    """Of the call that has begun last."""

    def __init__(self, calls: Calls, tool: str) -> None:
        self._calls = calls
        self._types = SchemaTypes(calls.tools.get(tool, {}))
        self._num_written = 0

    def value(self, source: Source, key: str, *ends: str) -> Steps[bool]:
        """Reads a value up to one of `ends`; returns whether that came."""
        opening = ", " if self._num_written else "{"
        self._num_written += 1
        yield self._calls.arguments(f"{opening}{json.dumps(key, ensure_ascii=False)}: ")
        types = self._types.of(key)
        if types == {"string"}:
            yield self._calls.arguments('"')
            end = yield from texts_before(source, *ends, make=self._as_string, drops_partial=True)
            if end is not None:
                yield self._calls.arguments('"')
            return end is not None
        written: list[str] = []
        while True:
            if source.is_closed:
                source.drop_partial(ends)
            text, end = source.take_before(*ends)
            written.append(text)
            if end is not None or source.is_closed:
                break
            yield None
        text = "".join(written)
        # A value that is cut is no value yet: it goes out as it came.
        yield self._calls.arguments(text if end is None else _as_json(text, types))
        return end is not None

    def end(self) -> Part:
        return self._calls.arguments("}" if self._num_written else "{}")

    def _as_string(self, text: str) -> Part:
        return self._calls.arguments(json.dumps(text, ensure_ascii=False)[1:-1])


def _as_json(text: str, types: frozenset[str]) -> str:
    """`types`: what the schema allows; empty when it does not say."""
    bare = text.strip()
    if "boolean" in types and bare in ("True", "False"):
        bare = bare.lower()
    if "null" in types and bare == "None":
        bare = "null"
    try:
        value = json.loads(bare, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    is_allowed = not types or not types.isdisjoint(types_of(value))
    return bare if is_allowed or "string" not in types else json.dumps(text, ensure_ascii=False)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
