"""Typed access to a model directory's JSON files, and the one error that they end in."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class ModelError(Exception):
    """A model, or how it is to be run, cannot be used; one line naming file and field."""


class Fields:
    """One JSON object; remembers what was asked for, so that the rest can be named.

    Every method takes null for missing, and an assumed default for what the file does not hold. It
    raises ModelError, naming file and field, for a value of another type or out of range.
    """

    def __init__(self, path: Path, values: dict[str, Any], prefix: str = "") -> None:
        self.path = path
        self._values = values
        self._prefix = prefix
        self._assumed: dict[str, Any] = {}
        self._read: set[str] = set()
        self._inner: dict[str, Fields] = {}

    @classmethod
    def of_file(cls, path: Path) -> Fields:
        """Raises ModelError: no such file, or not one JSON object."""
        return cls(path, read_json_object(path))

    def assume(self, defaults: Mapping[str, Any]) -> None:
        """Fields that the file does not hold have these values from now on; null ones do not."""
        self._assumed.update(defaults)

    def error(self, name: str, reason: str) -> ModelError:
        return ModelError(f"{self.path}: {self._prefix}{name}: {reason}")

    def has(self, name: str) -> bool:
        """Whether the file holds the field, be it null."""
        return name in self._values

    def get(self, name: str) -> Any:
        self._read.add(name)
        return self._values.get(name, self._assumed.get(name))

    def says(self, name: str, value: Any) -> bool:
        """Whether the field has that value; only then it counts as read."""
        found = name in self._values and bool(self._values[name] == value)
        if found:
            self._read.add(name)
        return found

    def integer(
        self, name: str, *, default: int | None = None, least: int = 1, most: int = 2**63 - 1
    ) -> int:
        value = self._value(name, default, "an integer", int)
        if value < least:
            raise self.error(name, f"must be at least {least}, not {shown(value)}")
        if value > most:
            raise self.error(name, f"must be at most {most}, not {shown(value)}")
        return int(value)

    def number(self, name: str, *, default: float | None = None) -> float:
        """Finite and positive."""
        value = self._value(name, default, "a number", (int, float))
        # Not a number fails both comparisons; an integer may be larger than any float.
        if not 0 < value <= sys.float_info.max:
            raise self.error(name, f"must be finite and positive, not {shown(value)}")
        return float(value)

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of finite and positive ones."""
        values = self._value(name, None, "a list of numbers", list)
        # What holds for each is said of each, by the same code.
        return tuple(Fields(self.path, {name: each}, self._prefix).number(name) for each in values)

    def boolean(self, name: str, *, default: bool = False) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, not {shown(value)}")
        return value

    def string(self, name: str, *, default: str | None = None) -> str:
        return str(self._value(name, default, "a string", str))

    def strings(self, name: str) -> list[str] | None:
        """A list of strings; None when the field is missing."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(name, f"must be a list of strings, not {shown(value)}")
        return value

    def integers(self, name: str) -> list[int] | None:
        """A list of integers; None when the field is missing."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise self.error(name, f"must be a list of integers, not {shown(value)}")
        return value

    def token_id(self, name: str, vocab_size: int) -> int | None:
        value = self.get(name)
        if value is None or (not self.has(name) and value >= vocab_size):
            # The latter was assumed, for another vocabulary.
            return None
        return self._check_token_id(name, value, vocab_size)

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """One id or a list of them; none when the field is missing. Of those that were assumed, no
        others than the vocabulary's."""
        value = self.get(name)
        if value is None:
            return ()
        values = value if isinstance(value, list) else [value]
        if not self.has(name):
            return tuple(item for item in values if item < vocab_size)
        return tuple(self._check_token_id(name, item, vocab_size) for item in values)

    def object(self, name: str) -> Fields | None:
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(name, f"must be an object, not {shown(value)}")
        return self._within(value, name)

    def objects(self, name: str) -> dict[str, Fields]:
        """An object's values, themselves objects; none when the field is missing."""
        outer = self.object(name)
        if outer is None:
            return {}
        inner = {key: outer.object(key) for key in outer._values}
        return {key: each for key, each in inner.items() if each is not None}

    def only(self, name: str, *values: Any, because: str = "") -> None:
        """Reads a field of which nothing but missing, or one of these values, is implemented."""
        value = self.get(name)
        # True is 1 to Python, and not to whoever wrote the file.
        if value is None or any(value == each and type(value) is type(each) for each in values):
            return
        known = " or ".join(shown(each) for each in values) if values else "null"
        reason = f"; {because}" if because else ""
        raise self.error(name, f"only {known} is supported, not {shown(value)}{reason}")

    def unread(self, harmless: Iterable[str] = ()) -> list[str]:
        """Names of the fields that nobody asked for, inner objects' too; null ones left out."""
        skipped = self._read.union(harmless)
        own = [
            self._prefix + name
            for name, value in self._values.items()
            if name not in skipped and value is not None
        ]
        return own + [name for inner in self._inner.values() for name in inner.unread(harmless)]

    def _within(self, values: dict[str, Any], name: str) -> Fields:
        if name not in self._inner:
            self._inner[name] = Fields(self.path, values, f"{self._prefix}{name}.")
        return self._inner[name]

    def _value(self, name: str, default: Any, what: str, types: Any) -> Any:
        value = self.get(name)
        if value is None:
            value = default
        if value is None:
            raise self.error(name, "missing")
        if not isinstance(value, types) or isinstance(value, bool):
            raise self.error(name, f"must be {what}, not {shown(value)}")
        return value

    def _check_token_id(self, name: str, value: Any, vocab_size: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(name, f"must be a token id, not {shown(value)}")
        if not 0 <= value < vocab_size:
            raise self.error(name, f"token id {value} is outside the vocabulary of {vocab_size}")
        return value


def shown(value: Any) -> str:
    """A JSON value as one short line."""
    text = _one_line(json.dumps(value))
    return text if len(text) <= 60 else text[:57] + "..."


def read_json_object(path: Path) -> dict[str, Any]:
    """Raises ModelError, naming the file: it is missing, or does not hold one JSON object."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON: {_one_line(str(error))}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object, not {shown(value)}")
    return value


class Repeated(ValueError):
    """A JSON object has a name twice, which it tells."""


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's pairs, for `json.loads`, which else takes the last of a name.

    Raises:
        Repeated: a name comes twice.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise Repeated(next(name for name in names if names.count(name) > 1))
    return values


def _one_line(text: str) -> str:
    return " ".join(text.split())
