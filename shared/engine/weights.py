"""Weights of a Hugging Face directory, from safetensors only.

Headers are read, and what a model takes is compared with them, before anything big is allocated
(model_loader.py); then the model takes one tensor after another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Set
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from baton.shared.engine.model_digest import find_weight_files
from baton.shared.engine.weight_headers import Header, read_header
from baton.shared.model_files.fields import ModelError

_DTYPES = {
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
"""Of the numbers that files hold, as they spell them (`ITEMSIZES`)."""
_STD = 0.02
"""Of dummy weights."""


class WeightSource(Protocol):
    """Where a model's tensors come from."""

    def header(self, name: str) -> Header | None:
        """None: nothing of that name is stored."""

    def where(self, name: str) -> str:
        """What an error says before a tensor's name."""

    def read(
        self,
        name: str,
        shape: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype | None = None,
        part: tuple[slice, ...] = (),
    ) -> torch.Tensor:
        """A new tensor on the device; on `meta` of the right size, and nothing is read.

        Args:
            shape: of the whole tensor.
            dtype: of the result; None: as it is stored.
            part: what to take of the first dimensions.

        Raises:
            ModelError: there is no such tensor, it has another shape, or cannot be read.
        """


class WeightFiles:
    """The tensors of a model directory.

    Attributes:
        files: the safetensors files, sorted by name.
    """

    def __init__(self, model_dir: Path) -> None:
        """Reads the headers.

        Raises:
            ModelError: files are missing, truncated or corrupt, or leave the directory.
        """
        self._listing, names = find_weight_files(model_dir)
        self.files = sorted({model_dir / name for name in names.values()} or {self._listing})
        self._headers: dict[str, Header] = {}
        self._file_of: dict[str, Path] = {}
        for path in self.files:
            for name, header in read_header(path).items():
                # A shard may hold more than the index assigns to it.
                if not names or names.get(name) == path.name:
                    self._headers[name] = header
                    self._file_of[name] = path
        for name, file_name in names.items():
            if name not in self._headers:
                raise ModelError(f"{model_dir / file_name}: {name}: missing from the file")
        self._open: dict[Path, Any] = {}

    @property
    def names(self) -> Set[str]:
        """Of all tensors."""
        return self._headers.keys()

    def header(self, name: str) -> Header | None:
        return self._headers.get(name)

    def where(self, name: str) -> str:
        return str(self._file_of.get(name, self._listing))

    def check_all_taken(self, taken: Collection[str], ignores: Callable[[str], bool]) -> None:
        """After a model has taken its tensors: what is left must be of no meaning.

        Args:
            ignores: of a tensor's name.

        Raises:
            ModelError: a tensor was neither taken nor is it ignored.
        """
        for name in self._headers:
            if name not in taken and not ignores(name):
                raise ModelError(f"{self.where(name)}: {name}: unexpected tensor")

    def read(
        self,
        name: str,
        shape: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype | None = None,
        part: tuple[slice, ...] = (),
    ) -> torch.Tensor:
        """See `WeightSource`."""
        header = self._headers.get(name)
        if header is None:
            raise ModelError(f"{self._listing}: {name}: missing tensor")
        if header.shape != shape:
            raise ModelError(
                f"{self.where(name)}: {name}: shape {list(header.shape)} where config.json "
                f"makes it {list(shape)}"
            )
        dtype = dtype or _DTYPES[header.dtype]
        if device.type == "meta":
            return torch.empty(shape, dtype=dtype, device=device)[part]
        path = self._file_of[name]
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt", device="cpu")
            file = self._open[path]
            tensor: torch.Tensor = file.get_slice(name)[part] if part else file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: {name}: {' '.join(str(error).split())}") from None
        # A copy: what is read is a view of the mapped file, which others may change.
        return tensor.to(device, dtype, copy=True)

    def close(self) -> None:
        """Unmaps the files; tensors that were read stay valid."""
        self._open.clear()


class DummyWeights:
    """Random weights of a model's shapes, the same for every engine with one kind of device.

    Weights of norms are one and matrices small, so that activations stay in range at any depth.
    """

    def __init__(self, *, are_tokens_apart: bool = False) -> None:
        """`are_tokens_apart`: embeddings are large beside what layers add, most of which tokens
        have in common: so that routers give them to different experts."""
        self._embedding_std = 1.0 if are_tokens_apart else _STD

    def header(self, name: str) -> None:
        """Nothing is stored; what is asked for is made."""

    def where(self, name: str) -> str:
        return "dummy weights"

    def check_all_taken(self, taken: Collection[str], ignores: Callable[[str], bool]) -> None:
        """There is nothing else."""

    def read(
        self,
        name: str,
        shape: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype | None = None,
        part: tuple[slice, ...] = (),
    ) -> torch.Tensor:
        """See `WeightSource`; float32 unless a dtype is given."""
        if device.type == "meta":
            return torch.empty(shape, dtype=dtype or torch.float32, device=device)[part]
        # A convolution's channels, [C, 1, K], are made at once.
        if len(shape) == 3 and shape[1] > 1:
            # Of all experts: each has random numbers of its own, so that one alone can be made.
            first, *rest = part or (slice(None),)
            each = [
                self.read(f"{name}.{index}", shape[1:], device, dtype, tuple(rest))
                for index in range(shape[0])[first]
            ]
            return each[0][None] if len(each) == 1 else torch.stack(each)
        weight = torch.empty(shape, dtype=dtype or torch.float32, device=device)
        if len(shape) == 1 or name.endswith("bias"):
            return weight.fill_(0.0 if name.endswith("bias") else 1.0)[part]
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little")
        generator = torch.Generator(device).manual_seed(seed)
        std = self._embedding_std if name.endswith("embed_tokens.weight") else _STD
        return weight.normal_(std=std, generator=generator)[part]

    def close(self) -> None:
        """There are no files."""
