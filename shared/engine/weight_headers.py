"""What the headers of safetensors files say; no tensor is read, and torch is not needed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.shared.model_files.fields import ModelError, Repeated, each_once, shown

ITEMSIZES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "F32"), 4),
    **dict.fromkeys(("I64", "F64"), 8),
}
"""Bytes of the numbers that files hold, by dtype as they spell it."""
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
    if dtype not in ITEMSIZES:
        raise ModelError(f"{path}: {name}: dtype {dtype} is not one of {', '.join(ITEMSIZES)}")
    if stop - start != math.prod(shape) * ITEMSIZES[dtype]:
        raise ModelError(f"{path}: {name}: data_offsets do not match shape {shape}")
    return Header(dtype, tuple(shape)), (start, stop)
