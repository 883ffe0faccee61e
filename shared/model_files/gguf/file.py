"""A GGUF file: typed metadata, and tensors as they lie in it. The one module that reads the format.

The library that parses it is asked for when a file is opened. No torch here: the gateway reads the
metadata, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from baton.shared.model_files.fields import ModelError

Array = npt.NDArray[Any]
WEIGHTS = "model.gguf"
"""In a model directory."""


class GgufFile:
    """
    Attributes:
        path: as given.
    """

    def __init__(self, path: Path) -> None:
        """Raises ModelError: it is no whole GGUF file, or the library `gguf` is missing."""
        try:
            import gguf
        except ImportError:
            raise ModelError(
                f"{path}: GGUF files need the package gguf: pip install gguf"
            ) from None
        self.path = path
        try:
            self._reader = _whole_reader(gguf.GGUFReader)(path)
            # The library looks at what each tensor's numbers are only when they are asked for.
            self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        # What is read as a length or a type may be anything, and fail anywhere.
        except (ValueError, KeyError, IndexError, OverflowError, MemoryError, OSError) as error:
            reason = " ".join(str(error).split())
            raise ModelError(f"{path}: not a whole GGUF file: {reason}") from None
        if self.has("split.count") and self.integer("split.count") > 1:
            raise self.error("split.count", "a model in several files is not read: join them")

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

    def kind(self, name: str) -> str:
        """Of a tensor's numbers: F32, Q4_1, …"""
        return str(self._tensors[name].tensor_type.name)

    def shape(self, name: str) -> tuple[int, ...]:
        # The file counts the fastest dimension first.
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def stored(self, name: str) -> Array:
        """The file's own memory: floats of the tensor's shape, of bfloat16 and of blocks the bytes
        of each row, uint8 [rows, any]."""
        data: Array = self._tensors[name].data
        return data

    def error(self, what: str, problem: str) -> ModelError:
        return ModelError(f"{self.path}: {what}: {problem}")

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


def _whole_reader(base: Any) -> Any:
    """The library's reader, which says by how much a file is too short."""

    class WholeReader(base):  # type: ignore[misc]
        def _get(self, offset: int, dtype: Any, count: int = 1, **named: Any) -> Any:
            end = int(offset) + int(count) * np.dtype(dtype).itemsize
            if end > len(self.data):
                raise ValueError(f"it ends at byte {len(self.data)}, and {end} are needed")
            return super()._get(offset, dtype, count, **named)

    return WholeReader
