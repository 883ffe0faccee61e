"""The tensors of a GGUF file, by the names that a checkpoint has for them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from baton.shared.engine.quantised import gguf
from baton.shared.engine.weight_headers import Header
from baton.shared.model_files.fields import ModelError
from baton.shared.model_files.gguf.architectures import Stored, find_tensors, read_config
from baton.shared.model_files.gguf.file import WEIGHTS, GgufFile

_CPU = torch.device("cpu")
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GgufWeights:
    """Quantised tensors are read as their blocks' bytes, uint8 [rows, any], whatever their shape.

    Attributes:
        files: the file.
    """

    def __init__(self, model_dir: Path) -> None:
        """Raises ModelError: the file is not whole, or its tensors are not those of the model."""
        path = model_dir / WEIGHTS
        self.files = [path]
        self._file = GgufFile(path)
        num_tokens = len(self._file.strings("tokenizer.ggml.tokens"))
        architecture, config = read_config(self._file, num_tokens)
        self._stored = find_tensors(self._file, architecture, config)

    @property
    def names(self) -> Collection[str]:
        """Of all tensors, as the checkpoint calls them."""
        return self._stored.keys()

    def header(self, name: str) -> Header | None:
        """See `WeightSource`."""
        stored = self._stored.get(name)
        return None if stored is None else Header(self._file.kind(stored.name), stored.shape)

    def where(self, name: str) -> str:
        stored = self._stored.get(name)
        return str(self._file.path) + (f": {stored.name}" if stored is not None else "")

    def check_all_taken(self, taken: Collection[str], ignores: Callable[[str], bool]) -> None:
        """After a model has taken its tensors: none is left.

        Raises:
            ModelError: one is.
        """
        for name in self._stored:
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
        """See `WeightSource`; of blocks their bytes."""
        stored = self._stored.get(name)
        if stored is None:
            raise ModelError(f"{self.where(name)}: {name}: missing tensor")
        if stored.shape != shape:
            raise ModelError(
                f"{self.where(name)}: {name}: shape {list(stored.shape)} where config.json "
                f"makes it {list(shape)}"
            )
        plain = _PLAIN.get(self._file.kind(stored.name))
        if device.type == "meta":
            return torch.empty(shape, dtype=dtype or plain or torch.uint8, device=device)[part]
        # A copy: what is read is the mapped file, which others may change.
        numbers = torch.from_numpy(np.array(self._file.stored(stored.name)))
        if plain is not None:
            numbers = numbers.view(plain).view(shape)
            if not bool(numbers.isfinite().all()):
                raise ModelError(f"{self.where(name)}: holds what is no finite number")
        return _restored(numbers, stored)[part].to(device, dtype)

    def close(self) -> None:
        """The file stays mapped as long as this lives."""


def expanded_weights(weights: GgufWeights) -> dict[str, torch.Tensor]:
    """All tensors by the checkpoint's names, float32: for those who compute with other code.

    Raises:
        ModelError: one holds what is no number.
    """
    found = {}
    for name in weights.names:
        header = weights.header(name)
        assert header is not None
        if header.dtype in gguf.KINDS:
            quantised = gguf.read(name, (header.shape[0], header.shape[1]), _OnCpu(weights))
            found[name] = quantised.expand(torch.float32)
        else:
            found[name] = weights.read(name, header.shape, _CPU, torch.float32)
    return found


@dataclass(frozen=True, slots=True)
class _OnCpu:
    """As the forms of quantised weights ask for tensors."""

    weights: GgufWeights
    quantises_inputs = False

    def header(self, name: str) -> Header | None:
        return self.weights.header(name)

    def read(self, name: str, shape: tuple[int, ...], part: tuple[slice, ...] = ()) -> torch.Tensor:
        return self.weights.read(name, shape, _CPU, None, part)

    def read_known(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self.read(name, shape)

    def error(self, name: str, reason: str) -> ModelError:
        return ModelError(f"{self.weights.where(name)}: {name}: {reason}")


def _restored(numbers: torch.Tensor, stored: Stored) -> torch.Tensor:
    """As the checkpoint had it. llama.cpp turns neighbours, a checkpoint the two halves of a head:
    of each head rows 0, 2, … come first, then 1, 3, …"""
    if stored.is_plus_one:
        return numbers - 1
    if stored.num_heads is None:
        return numbers
    pairs = numbers.view(stored.num_heads, -1, 2, numbers.shape[1])
    return pairs.transpose(1, 2).reshape(numbers.shape)
