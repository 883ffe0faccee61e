"""Which model a directory holds: its weight files, and the digest that tells models apart.

Nothing here imports torch: the gateway computes the same digest as the workers.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from baton.shared.model_files.fields import ModelError, Repeated, each_once, shown
from baton.shared.model_files.gguf.file import WEIGHTS

Progress = Callable[[str], None]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_ALONE = "*.safetensors"
_ALONE_INDEX = "*.safetensors.index.json"
_MOST_NAMES = 5
"""That an error tells."""
_CHUNK_BYTES = 16 * 2**20
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def find_weight_files(model_dir: Path) -> tuple[Path, dict[str, str]]:
    """The file that lists the tensors, and for a sharded model the file name of each tensor.

    Raises:
        ModelError: files are missing, or named outside of the directory.
    """
    listing = _find_listing(model_dir)
    return listing, _read_index(listing) if listing.suffix == ".json" else {}


def _find_listing(model_dir: Path) -> Path:
    """By its usual name, or the only one of another: auto-gptq names files by bits and group."""
    for name in (_SINGLE, WEIGHTS, _INDEX):
        if (model_dir / name).exists():
            return model_dir / name
    found: list[Path] = []
    for pattern in (_ALONE_INDEX, _ALONE):
        found = sorted(model_dir.glob(pattern))
        if len(found) == 1:
            return found[0]
    reason = f"no such file, nor {_INDEX}; only safetensors are read"
    if found:
        names = ", ".join(path.name for path in found[:_MOST_NAMES])
        reason = f"no such file, nor {_INDEX}, to say which is the model's of {names}"
    raise ModelError(f"{model_dir / _SINGLE}: {reason}")


def _read_index(index: Path) -> dict[str, str]:
    try:
        content = json.loads(index.read_bytes(), object_pairs_hook=each_once)
        weight_map = content["weight_map"]
    except Repeated as error:
        raise ModelError(f"{index}: weight_map: {shown(str(error))} is repeated") from None
    except (ValueError, RecursionError, KeyError, TypeError, OSError) as error:
        raise ModelError(f"{index}: weight_map: cannot be read: {type(error).__name__}") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: weight_map: must be an object with one entry per tensor")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or not _is_plain_name(file_name):
            raise ModelError(f"{index}: weight_map: {name}: not a safetensors file name")
        path = index.parent / file_name
        if not path.exists():
            raise ModelError(f"{path}: no such file, though {index.name} names it")
    return weight_map


def _is_plain_name(file_name: str) -> bool:
    plain = "/" not in file_name and "\\" not in file_name and "\0" not in file_name
    return plain and file_name.endswith(".safetensors")


def weight_paths(model_dir: Path) -> list[Path]:
    """The weight files, sorted by name. Raises ModelError as `find_weight_files`."""
    listing, names = find_weight_files(model_dir)
    return sorted({model_dir / name for name in names.values()} or {listing})


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    digest: str
    """Hex SHA-256 over config.json, the index if there is one, and the weight files, names and
    lengths included; for random weights over config.json alone, with `dummy-` before it."""
    files_stamp: str
    """Equal stamps mean equal digests, also of another process. Empty when that is not sure."""


def identify_model(model_dir: Path, files: Sequence[Path], progress: Progress) -> ModelIdentity:
    """Reads all of it; what `progress` raises ends that.

    Raises:
        ModelError: a file cannot be read.
    """
    digest = hashlib.sha256()
    paths = _identifying(model_dir, files)
    stamp = files_stamp(model_dir, files)
    try:
        total = sum(path.stat().st_size for path in paths)
        report = ProgressReport(progress, "hashing weights", total)
        for path in paths:
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    report.advance(len(chunk))
    except OSError as error:
        raise ModelError(f"{error.filename}: cannot be read: {error.strerror}") from None
    is_sure = files_stamp(model_dir, files) == stamp
    return ModelIdentity(digest.hexdigest(), stamp if is_sure else "")


def identify_dummy(model_dir: Path) -> ModelIdentity:
    """Of a model with random weights."""
    config = (model_dir / "config.json").read_bytes()
    digest = hashlib.sha256(b"dummy weights\0" + config).hexdigest()
    return ModelIdentity(f"dummy-{digest}", "")


def files_stamp(model_dir: Path, files: Sequence[Path]) -> str:
    """Hex SHA-256 over which files of which host these are, and when they were last changed: what
    one process has hashed, another need not.

    Raises:
        ModelError: a file is not there.
    """
    seen = []
    try:
        for path in _identifying(model_dir, files):
            found = path.stat()
            times = [found.st_mtime_ns, found.st_ctime_ns]
            seen.append([path.name, found.st_dev, found.st_ino, found.st_size, *times])
        fields = json.dumps([_BOOT_ID.read_text(), seen])
    except OSError as error:
        raise ModelError(f"{error.filename}: cannot be read: {error.strerror}") from None
    return hashlib.sha256(fields.encode()).hexdigest()


def _identifying(model_dir: Path, files: Sequence[Path]) -> list[Path]:
    listing = _find_listing(model_dir)
    # An index says which of several tensors of one name counts.
    return [model_dir / "config.json", *([] if listing in files else [listing]), *files]


class ProgressReport:
    """Says once a second how far something is; nothing when it takes less."""

    def __init__(self, progress: Progress, what: str, total: int) -> None:
        self._progress = progress
        self._what = what
        self._total = max(1, total)
        self._done = 0
        self._next_s = time.monotonic() + 1

    def advance(self, amount: int) -> None:
        self._done += amount
        if time.monotonic() >= self._next_s:
            self._progress(f"{self._what}: {100 * self._done // self._total}%")
            self._next_s = time.monotonic() + 1
