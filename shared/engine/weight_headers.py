"""What the headers of safetensors files say; no tensor is read."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from baton.shared.model_files.fields import ModelError, Repeated, each_once, shown

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "I64": torch.int64,
    "F64": torch.float64,
}
"""Of the numbers that files hold, as they spell them."""
FLOATS = ("F32", "F16", "BF16")
"""What plain weights, biases, norms and scales may be stored as."""
_MAX_HEADER_BYTES = 100 * 2**20


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of a tensor."""

    dtype: str
    """As safetensors spells it: F32, BF16, I8, …; of blocks as GGUF does: Q4_1, …"""
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, Header]:
    """A file's tensors, after checking that every byte of each is there."""
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or header_bytes > min(file_bytes - 8, _MAX_HEADER_BYTES):
                raise ModelError(f"{path}: header: truncated or not a safetensors file")
            header = json.loads(file.read(header_bytes), object_pairs_hook=each_once)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    except Repeated as error:
        raise ModelError(f"{path}: {shown(str(error))}: repeated in the header") from None
    except (ValueError, RecursionError):
        raise ModelError(f"{path}: header: not valid JSON") from None
    if not isinstance(header, dict):
        raise ModelError(f"{path}: header: must be an object")
    header.pop("__metadata__", None)

    tensors: dict[str, Header] = {}
    spans = []
    for name, entry in header.items():
        tensors[name], span = _read_entry(path, name, entry)
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
    return tensors


def _read_entry(path: Path, name: str, entry: Any) -> tuple[Header, tuple[int, int]]:
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, stop]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError
        if not isinstance(dtype, str):
            raise TypeError
    except (KeyError, TypeError, ValueError):
        raise ModelError(f"{path}: {name}: malformed header entry") from None
    if dtype not in DTYPES:
        raise ModelError(f"{path}: {name}: dtype {dtype} is not one of {', '.join(DTYPES)}")
    if stop - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ModelError(f"{path}: {name}: data_offsets do not match shape {shape}")
    return Header(dtype, tuple(shape)), (start, stop)
