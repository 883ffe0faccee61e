"""Weights of a Hugging Face directory, from safetensors only.

Headers are read and compared with what the model needs before anything big is allocated; then the
model asks for one tensor after another.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from baton.shared.engine.config import ModelError
from baton.shared.engine.model_digest import find_weight_files

_DTYPES = {"F32": 4, "F16": 2, "BF16": 2}
_MAX_HEADER_BYTES = 100 * 2**20


class WeightFiles:
    """The tensors of a model directory.

    Attributes:
        files: the safetensors files, sorted by name.
        shapes: shape of each tensor by name.
    """

    def __init__(self, model_dir: Path) -> None:
        """Reads the headers.

        Raises:
            ModelError: files are missing, truncated or corrupt, or leave the directory.
        """
        self._listing, names = find_weight_files(model_dir)
        self.files = sorted({model_dir / name for name in names.values()} or {self._listing})
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file_of: dict[str, Path] = {}
        for path in self.files:
            for name, shape in _read_header(path).items():
                if names and names.get(name) != path.name:
                    raise ModelError(f"{path}: {name}: not where {self._listing.name} says")
                self.shapes[name] = shape
                self._file_of[name] = path
        for name, file_name in names.items():
            if name not in self.shapes:
                raise ModelError(f"{model_dir / file_name}: {name}: missing from the file")
        self._open: dict[Path, Any] = {}

    def check(
        self, shapes: Mapping[str, tuple[int, ...]], is_ignored: Callable[[str], bool]
    ) -> None:
        """Compares the files with the tensors that a model needs.

        Raises:
            ModelError: a tensor is missing, has another shape, or is neither needed nor ignored.
        """
        for name, shape in shapes.items():
            if name not in self.shapes:
                raise ModelError(f"{self._listing}: {name}: missing tensor")
            if self.shapes[name] != shape:
                found = list(self.shapes[name])
                raise ModelError(
                    f"{self._file_of[name]}: {name}: shape {found} where config.json "
                    f"makes it {list(shape)}"
                )
        for name in self.shapes:
            if name not in shapes and not is_ignored(name):
                raise ModelError(f"{self._file_of[name]}: {name}: unexpected tensor")

    def tensor(self, name: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Reads one tensor.

        Raises:
            ModelError: the file cannot be read.
        """
        path = self._file_of[name]
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt", device="cpu")
            tensor: torch.Tensor = self._open[path].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: {name}: {' '.join(str(error).split())}") from None
        # A copy: what is read is a view of the mapped file, which others may change.
        return tensor.to(device, dtype, copy=True)

    def close(self) -> None:
        """Unmaps the files; tensors that were read stay valid."""
        self._open.clear()


class DummyWeights:
    """Random weights of a model's shapes, the same for every engine with one kind of device.

    Norms are one and matrices small, so that activations stay in range at any depth.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = dict(shapes)

    def tensor(self, name: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        shape = self.shapes[name]
        if len(shape) == 1:
            value = 0.0 if name.endswith("bias") else 1.0
            return torch.full(shape, value, dtype=dtype, device=device)
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little")
        generator = torch.Generator(device).manual_seed(seed)
        weight = torch.empty(shape, dtype=dtype, device=device)
        return weight.normal_(std=0.02, generator=generator)

    def close(self) -> None:
        """There are no files."""


def _read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a file's tensors, after checking that every byte of each is there."""
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or header_bytes > min(file_bytes - 8, _MAX_HEADER_BYTES):
                raise ModelError(f"{path}: header: truncated or not a safetensors file")
            header = json.loads(file.read(header_bytes))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ModelError(f"{path}: header: not valid JSON") from None
    if not isinstance(header, dict):
        raise ModelError(f"{path}: header: must be an object")
    header.pop("__metadata__", None)

    shapes: dict[str, tuple[int, ...]] = {}
    spans = []
    for name, entry in header.items():
        shapes[name], span = _read_entry(path, name, entry)
        spans.append(span)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ModelError(f"{path}: header: tensors overlap or leave a gap at byte {end}")
        end = stop
    if 8 + header_bytes + end != file_bytes:
        raise ModelError(
            f"{path}: truncated or corrupt: {file_bytes} bytes where the header "
            f"promises {8 + header_bytes + end}"
        )
    return shapes


def _read_entry(path: Path, name: str, entry: Any) -> tuple[tuple[int, ...], tuple[int, int]]:
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, stop]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError
        if not isinstance(dtype, str):
            raise TypeError
    except (KeyError, TypeError, ValueError):
        raise ModelError(f"{path}: {name}: malformed header entry") from None
    if dtype not in _DTYPES:
        raise ModelError(f"{path}: {name}: dtype {dtype} is not one of {', '.join(_DTYPES)}")
    if stop - start != math.prod(shape) * _DTYPES[dtype]:
        raise ModelError(f"{path}: {name}: data_offsets do not match shape {shape}")
    return tuple(shape), (start, stop)
