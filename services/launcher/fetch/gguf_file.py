"""A GGUF file: typed metadata, and tensors as float32. The one module that reads the format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from baton.services.launcher.fetch.download import FetchError

Array = npt.NDArray[np.float32]


class GgufFile:
    def __init__(self, path: Path) -> None:
        """Raises FetchError when it is no whole GGUF file."""
        self._path = path
        try:
            self._reader = gguf.GGUFReader(path)
        # What is read as a length or a type may be anything, and fail anywhere.
        except (ValueError, KeyError, IndexError, OverflowError, MemoryError, OSError) as error:
            raise FetchError(f"{path.name}: not a whole GGUF file: {error}") from None
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    @property
    def tensor_names(self) -> set[str]:
        return set(self._tensors)

    def has(self, key: str) -> bool:
        return key in self._reader.fields

    def string(self, key: str, default: str | None = None) -> str:
        return str(self._value(key, str, default))

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._value(key, int, default)
        if value < 0:
            raise self.error(key, f"must not be negative, not {value}")
        return int(value)

    def boolean(self, key: str, default: bool) -> bool:
        return bool(self._value(key, bool, default))

    def number(self, key: str) -> float:
        """The shortest decimal that float32 rounds to what the file has: 1e-05 for
        9.99999974e-06."""
        return float(str(np.float32(self._value(key, float, None))))

    def strings(self, key: str) -> list[str]:
        return self._list(key, str)

    def integers(self, key: str) -> list[int]:
        return self._list(key, int)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Array:
        """Expanded. Raises FetchError: there is none of that name, or of another shape."""
        tensor = self._tensors.get(name)
        if tensor is None:
            raise self.error(name, "no such tensor")
        # The file counts the fastest dimension first.
        found = tuple(int(size) for size in reversed(tensor.shape))
        if found != shape:
            raise self.error(name, f"has the shape {list(found)}, not {list(shape)}")
        try:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise self.error(name, f"numbers of type {kind} cannot be expanded") from None
        values = np.ascontiguousarray(values, dtype=np.float32).reshape(shape)
        if not np.isfinite(values).all():
            raise self.error(name, "holds what is no finite number")
        return values

    def error(self, what: str, problem: str) -> FetchError:
        return FetchError(f"{self._path.name}: {what}: {problem}")

    def _value(self, key: str, kind: type, default: Any) -> Any:
        field = self._reader.fields.get(key)
        if field is None and default is not None:
            return default
        if field is None:
            raise self.error(key, "missing")
        value = field.contents()
        # True is an int to Python.
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(key, f"must be of type {kind.__name__}, not {str(value)[:40]!r}")
        return value

    def _list(self, key: str, kind: type) -> list[Any]:
        field = self._reader.fields.get(key)
        if field is None:
            raise self.error(key, "missing")
        values = field.contents()
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            raise self.error(key, f"must be a list of {kind.__name__}")
        return values
