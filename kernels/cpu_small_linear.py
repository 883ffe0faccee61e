"""Products with weights of few bits on a CPU, as they are stored: in bfloat16, by torch's kernels.

    number = (code − zero) · scale + offset

Codes of four bits are one plane. Codes of eight are two, sixteen times the upper half and the lower
one, unless each row has one scale and nothing else: there is a product of their own. Scales are
rounded to bfloat16, as these kernels take them, and offsets to what is left then.

Few rows are multiplied by what is stored; many by a matrix that is expanded for them and dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOST_ROWS = 96
"""Of x, that are multiplied by what is stored. Measured with four bits of 3,072 x 576, one thread,
AVX-512: 96 rows take 7.4 ms, and 8.6 ms with expanding; 192 rows 16.7 and 12.5."""
_GROUPS = (256, 128, 64, 32)
"""Numbers of a row with one scale, as the kernel takes them."""
_ROWS = 16
"""Of a weight, in multiples."""
EIGHT_BITS_IN = 16
"""Columns of a weight of eight bits, in multiples: torch's kernel reads past the ends of others,
and dies or answers with what lay there."""
_BLOCK = 64
"""Rows of a weight that the kernel packs together, with AVX-512."""
_MIDDLE = 8
_pack: Any = getattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu", None)
_product: Any = getattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu", None)


@dataclass(frozen=True, slots=True)
class FourBits:
    """(code − 8) · scale + offset"""

    packed: Tensor
    """uint8 [N, K / 2], in the kernel's order"""
    scale_offset: Tensor
    """bfloat16 [K / group, N, 2]"""
    group: int
    can_expand: bool
    """The kernel's order is the one that is known here."""

    @property
    def num_bytes(self) -> int:
        return self.packed.nbytes + self.scale_offset.nbytes

    def product(self, x: Tensor) -> Tensor:
        y: Tensor = _product(x, self.packed, self.group, self.scale_offset)
        return y

    def expand(self) -> Tensor:
        codes = _unpacked(self.packed).to(torch.bfloat16).sub_(_MIDDLE)
        scale, offset = self.scale_offset.permute(2, 1, 0)[..., None]
        runs = codes.view(*scale.shape[:2], self.group)
        return runs.mul_(scale).add_(offset).view(codes.shape)


@dataclass(frozen=True, slots=True)
class EightBits:
    """code · scale"""

    codes: Tensor
    """int8 [N, K]"""
    scale: Tensor
    """bfloat16 [N]"""
    can_expand: bool = True

    @property
    def num_bytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes

    def product(self, x: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x, self.codes, self.scale)

    def expand(self) -> Tensor:
        return self.codes.to(torch.bfloat16).mul_(self.scale[:, None])


@dataclass(frozen=True, slots=True)
class SmallWeight:
    """[N, K], the sum of its planes."""

    planes: tuple[FourBits | EightBits, ...]
    columns: Tensor | None = None
    """int64 [K]: which of x's columns stands where; None: they are in order."""

    @property
    def num_bytes(self) -> int:
        own = sum(plane.num_bytes for plane in self.planes)
        return own if self.columns is None else own + self.columns.nbytes

    def product(self, x: Tensor) -> Tensor:
        """x bfloat16 [M, K] · weightᵀ → a new tensor [M, N]."""
        if self.columns is not None:
            x = x.index_select(1, self.columns)
        first, *others = self.planes
        if x.shape[0] > MOST_ROWS and all(plane.can_expand for plane in self.planes):
            weight = first.expand()
            for plane in others:
                weight += plane.expand()
            return torch.nn.functional.linear(x, weight)
        x = x.contiguous()
        y = first.product(x)
        for plane in others:
            y += plane.product(x)
        return y


def kernel_group(num_out: int, num_in: int, num_groups: int) -> int | None:
    """Numbers with one scale as the kernel will have them, where a weight's rows are in so many
    runs; None: it has none for them."""
    size = num_in // num_groups
    if _pack is None or _product is None or num_out % _ROWS or num_in % num_groups:
        return None
    return next((each for each in _GROUPS if size % each == 0), None)


def small_bytes(num_out: int, num_in: int, num_bits: int, group: int) -> int:
    """That planes of four bits will take."""
    plane = num_out * num_in // 2 + 4 * num_out * (num_in // group)
    return plane if num_bits <= 4 else 2 * plane


def four_bit_planes(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    offset: Tensor | None,
    *,
    num_bits: int,
    group: int,
) -> tuple[FourBits, ...]:
    """One of codes in a range of 16, two of others.

    Args:
        codes: int8 or uint8 [N, K].
        scale, zero, offset: [N or 1, groups]
        group: as `kernel_group` says.
    """
    num_out, num_in = codes.shape
    wide = codes.to(torch.int32)
    middle = torch.zeros_like(scale, dtype=torch.float32) if zero is None else zero.float()
    of_groups = (num_out, num_in // group)

    def by_group(numbers: Tensor) -> Tensor:
        repeats = of_groups[1] // numbers.shape[1]
        return numbers.float().repeat_interleave(repeats, 1).expand(of_groups)

    steps, middle = by_group(scale), by_group(middle)
    beside = torch.zeros(of_groups)
    if offset is not None:
        # What rounding takes from a scale is made up for in the middle of the codes.
        centre = (float(codes.min()) + float(codes.max())) / 2
        beside = by_group(offset) + centre * (steps - steps.bfloat16().float())
    if num_bits <= 4:
        return (_four_bits(wide, steps, -middle, beside, group),)
    # 16 · upper + lower = 16 · (upper + ½) + (lower − 8): both planes' results are small where
    # their sum is, and lose little when they are rounded.
    none = torch.zeros_like(steps)
    return (
        _four_bits(wide >> 4, 16 * steps, 0.5 - middle / 16, beside, group),
        _four_bits((wide & 15) - _MIDDLE, steps, none, none, group),
    )


def _four_bits(
    codes: Tensor, scale: Tensor, middle: Tensor, beside: Tensor, group: int
) -> FourBits:
    """(code + middle) · scale + beside: codes int32 [N, K] of a range of 16, others [N, groups]."""
    least, most = int(codes.min()), int(codes.max())
    # In the middle of the kernel's range, so that its offsets are small, and lose little.
    moved = _MIDDLE - (least + most + 1) // 2
    codes = codes + moved
    packed: Tensor = _pack(codes.contiguous(), 1)
    rounded = scale.bfloat16()
    offset = ((middle + (_MIDDLE - moved)) * rounded.float() + beside).bfloat16()
    scale_offset = torch.stack((rounded, offset), -1).transpose(0, 1).contiguous()
    return FourBits(packed, scale_offset, group, torch.equal(_unpacked(packed), codes.byte()))


def _unpacked(packed: Tensor) -> Tensor:
    """uint8 [N, K / 2] → uint8 [N, K]: of full blocks a byte has rows n and n + 32, of what is left
    neighbours."""
    num_out, half = packed.shape
    num_in, full = 2 * half, num_out - num_out % _BLOCK
    codes = torch.empty((num_out, num_in), dtype=torch.uint8)
    if full:
        blocks = packed[:full].view(-1, num_in, _BLOCK // 2).transpose(1, 2)
        target = codes[:full].view(-1, 2, _BLOCK // 2, num_in)
        torch.bitwise_and(blocks, 15, out=target[:, 0])
        torch.bitwise_right_shift(blocks, 4, out=target[:, 1])
    if full < num_out:
        pairs = packed[full:].reshape(num_in, -1).t()
        target = codes[full:].view(-1, 2, num_in)
        target[:, 0], target[:, 1] = pairs & 15, pairs >> 4
    return codes
