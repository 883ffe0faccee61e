"""Layers whose weights stay small on a CPU: which quantised weights there is a product for.

Parts that are stored alike are one matrix; others are matrices beside each other, and those that no
kernel takes (8-bit floats, runs of 16 numbers) are expanded to the activations' dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baton.kernels import reference
from baton.kernels.cpu_small_linear import (
    EIGHT_BITS_IN,
    EightBits,
    SmallWeight,
    four_bit_planes,
    kernel_group,
    small_bytes,
)
from baton.shared.engine.linear import Linear
from baton.shared.engine.quantised.weight import QuantisedWeight

_INTEGERS = (torch.int8, torch.uint8)


@dataclass(frozen=True, slots=True)
class Piece:
    """Some of a layer's outputs."""

    product: Callable[[Tensor], Tensor]
    """x [T, in] → a new tensor [T, outputs]"""
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallLinear(Linear):
    """Of several pieces, whose outputs stand side by side; `weight` is empty."""

    pieces: tuple[Piece, ...]

    @property
    def is_small(self) -> bool:
        return True

    @property
    def num_bytes(self) -> int:
        return sum(piece.num_bytes for piece in self.pieces) + 2 * self.num_out * (
            self.bias is not None
        )

    def product(self, x: Tensor) -> Tensor:
        """x [T, in] · weightᵀ → a new tensor [T, out]"""
        if len(self.pieces) == 1:
            return self.pieces[0].product(x)
        return torch.cat([piece.product(x) for piece in self.pieces], 1)


def pack_small(
    parts: Sequence[Tensor | QuantisedWeight], dtype: torch.dtype
) -> tuple[Piece, ...] | None:
    """None: nothing would stay small."""
    joined = _packed([each for each in parts if isinstance(each, QuantisedWeight)])
    if joined is not None and all(isinstance(each, QuantisedWeight) for each in parts):
        return (joined,)
    alone = [_packed([each]) if isinstance(each, QuantisedWeight) else None for each in parts]
    if not any(alone):
        return None
    return tuple(
        _expanded(part, dtype) if piece is None else piece
        for part, piece in zip(parts, alone, strict=True)
    )


def stored_alike(
    parts: Sequence[Tensor | QuantisedWeight], run: int
) -> list[QuantisedWeight] | None:
    """The parts, if they are whole numbers of as many bits, in order, whose scales hold for so many
    of a row's or a multiple."""
    stored = [each for each in parts if isinstance(each, QuantisedWeight)]
    if len(stored) < len(parts) or len({each.num_bits > 4 for each in stored}) > 1:
        return None
    for each in stored:
        is_even = each.num_in % (run * each.scale.shape[1]) == 0
        if each.codes.dtype not in _INTEGERS or each.group_of is not None or not is_even:
            return None
    return stored


def _expanded(part: Tensor | QuantisedWeight, dtype: torch.dtype) -> Piece:
    weight = part if isinstance(part, Tensor) else part.expand(dtype)
    packed = reference.pack_weight(weight)
    return Piece(lambda x: reference.linear(x, packed, None), weight.nbytes)


def _packed(parts: Sequence[QuantisedWeight]) -> Piece | None:
    """All of them as one; None: no kernel takes that."""
    if not parts:
        return None
    num_out, num_in = sum(part.num_out for part in parts), parts[0].num_in
    bits, dtype = max(part.num_bits for part in parts), parts[0].codes.dtype
    if dtype not in _INTEGERS or any(part.codes.dtype != dtype for part in parts):
        return None
    if (bits > 4) != (min(part.num_bits for part in parts) > 4):
        return None
    columns = None
    if any(part.group_of is not None for part in parts):
        if len(parts) > 1:
            return None
        ordered = parts[0].in_order()
        if ordered is None:
            return None
        parts, columns = [ordered[0]], ordered[1]
    if bits == 8 and num_in % EIGHT_BITS_IN == 0 and all(_is_plain(part) for part in parts):
        return _eight_bits(parts, num_out, num_in, columns)
    groups = [kernel_group(num_out, num_in, part.scale.shape[1]) for part in parts]
    if any(group is None for group in groups):
        return None
    group = min(group for group in groups if group is not None)
    if parts[0].is_meta:
        return _on_paper(small_bytes(num_out, num_in, bits, group), columns)
    codes = torch.cat([part.codes for part in parts])
    # What one part has and another has not is zero there.
    has_zero = any(part.zero is not None for part in parts)
    has_offset = any(part.offset is not None for part in parts)
    planes = four_bit_planes(
        codes,
        _by_group([(part, part.scale) for part in parts], group),
        _by_group([(part, part.zero) for part in parts], group) if has_zero else None,
        _by_group([(part, part.offset) for part in parts], group) if has_offset else None,
        num_bits=bits,
        group=group,
    )
    weight = SmallWeight(planes, columns)
    return Piece(weight.product, weight.num_bytes)


def _is_plain(part: QuantisedWeight) -> bool:
    """A row has one scale, and nothing else."""
    has_more = part.zero is not None or part.offset is not None
    return part.codes.dtype == torch.int8 and part.scale.shape[1] == 1 and not has_more


def _eight_bits(
    parts: Sequence[QuantisedWeight], num_out: int, num_in: int, columns: Tensor | None
) -> Piece:
    if parts[0].is_meta:
        return _on_paper(num_out * (num_in + 2), columns)
    scales = [part.scale.bfloat16().expand(part.num_out, 1) for part in parts]
    codes = torch.cat([part.codes for part in parts]).contiguous()
    plane = EightBits(codes, torch.cat(scales).flatten().contiguous())
    weight = SmallWeight((plane,), columns)
    return Piece(weight.product, weight.num_bytes)


def _on_paper(num_bytes: int, columns: Tensor | None) -> Piece:
    return Piece(lambda x: x, num_bytes + (0 if columns is None else columns.nbytes))


def _by_group(parts: Sequence[tuple[QuantisedWeight, Tensor | None]], group: int) -> Tensor:
    """What is by group, float32 [all rows, in / group]."""
    rows = []
    for part, numbers in parts:
        count = part.num_in // group
        if numbers is None:
            rows.append(torch.zeros(part.num_out, count))
        else:
            repeated = numbers.float().repeat_interleave(count // numbers.shape[1], 1)
            rows.append(repeated.expand(part.num_out, count))
    return torch.cat(rows)
