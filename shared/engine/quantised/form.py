"""What the forms of quantised weights have in common: what they ask of a loader, and checks."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from baton.shared.engine.quantised.scheme import Scheme
from baton.shared.engine.weight_headers import FLOATS, Header
from baton.shared.model_files.fields import ModelError


class TensorReader(Protocol):
    """What a form needs of whoever loads a model."""

    @property
    def quantises_inputs(self) -> bool:
        """Activations are made small where a checkpoint says so: its scales of them are read."""

    def header(self, name: str) -> Header | None:
        """None: nothing of that name is stored."""

    def read(self, name: str, shape: tuple[int, ...], part: tuple[slice, ...] = ()) -> Tensor:
        """As it is stored, on the device that computes."""

    def read_known(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A small tensor whose numbers decide how others are kept: as `read`, and on paper, too, it
        holds them, in the host's memory; unless these others are expanded anyway."""

    def error(self, name: str, reason: str) -> ModelError: ...


def header_of(reader: TensorReader, name: str, because: str) -> Header:
    header = reader.header(name)
    if header is None:
        raise reader.error(name, f"missing tensor, though {because}")
    return header


def read_words(
    reader: TensorReader, name: str, shape: tuple[int, ...], dtype: str, because: str
) -> Tensor:
    """A tensor that has to be there, of that dtype and shape."""
    check_words(reader, name, shape, dtype, because)
    return reader.read(name, shape)


def check_words(
    reader: TensorReader, name: str, shape: tuple[int, ...], dtype: str, because: str
) -> None:
    """Raises ModelError unless there is such a tensor."""
    header = header_of(reader, name, because)
    if header.dtype != dtype:
        raise reader.error(name, f"dtype {header.dtype} is not {dtype}")
    if header.shape != shape:
        raise reader.error(name, f"shape {list(header.shape)} is not {list(shape)}: {because}")


def read_scale(reader: TensorReader, name: str, because: str) -> Tensor:
    """Of any shape; of a float dtype, and finite."""
    header = header_of(reader, name, because)
    if header.dtype not in FLOATS:
        raise reader.error(name, f"dtype {header.dtype} is not one of {', '.join(FLOATS)}")
    scale = reader.read(name, header.shape)
    check_finite(reader, name, scale)
    return scale


def check_scales(
    reader: TensorReader, name: str, scale: Tensor, largest: float, *, is_signed: bool = False
) -> None:
    """What codes of up to `largest` are multiplied by: numbers, not all of them zero, none so large
    that a product is no number; below zero where it `is_signed`, as AutoRound makes them of whole
    numbers around zero."""
    check_finite(reader, name, scale)
    if scale.is_meta or not scale.numel():
        return
    numbers = scale.float()
    least, most = float(numbers.min()), float(numbers.max())
    if least < 0 and not is_signed:
        raise reader.error(name, f"{least:.6g} where no scale may be below zero")
    if not least and not most:
        raise reader.error(name, "all scales are 0, and so were all of the weight")
    largest_number = max(-least, most) * largest
    if largest_number > torch.finfo(scale.dtype).max:
        reason = f"of codes of up to {largest:g} a scale of {max(-least, most):.6g} makes no number"
        raise reader.error(name, reason)


def check_finite(reader: TensorReader, name: str, scale: Tensor) -> None:
    if not scale.is_meta and not bool(scale.isfinite().all()):
        raise reader.error(name, "holds what is no number")


def num_groups(reader: TensorReader, name: str, scheme: Scheme, num_in: int) -> int:
    """Of a row, as config.json has it; `name` is the tensor of the scales."""
    size = scheme.group_size
    if size is None or size == -1:
        return 1
    if num_in % size:
        raise reader.error(name, f"group_size {size} does not divide rows of {num_in}")
    return num_in // size


def powers_of_two(exponents: Tensor) -> Tensor:
    """uint8, exponents plus 127 → float32 of the same shape."""
    ones = torch.ones_like(exponents, dtype=torch.float32)
    return torch.ldexp(ones, exponents.to(torch.int32) - 127)


def read_exponents(reader: TensorReader, name: str, shape: tuple[int, ...], because: str) -> Tensor:
    """Powers of two in a byte each → float32."""
    exponents = read_words(reader, name, shape, "U8", because)
    if exponents.is_meta:
        return exponents
    if bool((exponents == _NO_NUMBER).any()):
        raise reader.error(name, "holds what is no number")
    return powers_of_two(exponents)


_NO_NUMBER = 255
