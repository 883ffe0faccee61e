"""GGUF's blocks: runs of a row's numbers, each in some bytes with its scale.

The layouts are llama.cpp's; the numbers are those of the package gguf, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from baton.shared.engine.quantised.form import TensorReader, check_finite
from baton.shared.engine.quantised.weight import QuantisedWeight

_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True, slots=True)
class Blocks:
    """A type of blocks."""

    size: int
    """Numbers of a block."""
    num_bytes: int
    num_bits: int
    run: int
    """Numbers that have a scale together."""
    take: Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]]
    """Bytes uint8 [N, num_bytes] → codes [N, size], scales and offsets float32 [N, groups]."""


def holds(module: str, reader: TensorReader) -> bool:
    header = reader.header(f"{module}.weight")
    return header is not None and header.dtype in KINDS


def read(name: str, shape: tuple[int, int], reader: TensorReader) -> QuantisedWeight:
    """Of a tensor whose header has one of `KINDS`.

    Raises:
        ModelError: it has another shape, or holds what is no number.
    """
    header = reader.header(name)
    assert header is not None
    kind, (num_out, num_in) = KINDS[header.dtype], shape
    stored = reader.read(name, shape)
    if stored.is_meta:
        codes, _, offset = kind.take(torch.zeros(1, kind.num_bytes, dtype=torch.uint8))
        paper = QuantisedWeight.on_paper(*shape, kind.num_bits, num_in // kind.run, codes.dtype)
        return paper if offset is None else replace(paper, offset=paper.scale)
    codes, scale, offset = kind.take(stored.reshape(-1, kind.num_bytes))
    for each in (scale, offset):
        if each is not None:
            check_finite(reader, name, each)
    return QuantisedWeight(
        codes.reshape(num_out, num_in),
        scale.reshape(num_out, -1),
        kind.num_bits,
        offset=None if offset is None else offset.reshape(num_out, -1),
    )


def _halves(block: Tensor, first: int) -> Tensor:
    """The float16 at that byte of each block → float32 [N, 1]."""
    return block[:, first : first + 2].contiguous().view(torch.float16).float()


def _signed(block: Tensor) -> Tensor:
    return block.contiguous().view(torch.int8)


def _nibbles(block: Tensor) -> Tensor:
    """The lower halves of all bytes, then the upper ones."""
    return torch.cat((block & 0xF, block >> 4), 1)


def _shifts(block: Tensor, num_bits: int) -> Tensor:
    """To each number of so many bits in a byte: uint8 [8 / num_bits, 1]."""
    return torch.arange(0, 8, num_bits, dtype=torch.uint8, device=block.device)[:, None]


def _fifth_bits(block: Tensor) -> Tensor:
    """Of 32 numbers, in four bytes → [N, 32], 0 or 16."""
    return ((block[:, :, None] >> _shifts(block, 1).view(-1)) & 1).flatten(1) << 4


def _q4_0(block: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    return _less(_nibbles(block[:, 2:]), 8), _halves(block, 0), None


def _q4_1(block: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    return _nibbles(block[:, 4:]), _halves(block, 0), _halves(block, 2)


def _q5_0(block: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    codes = _nibbles(block[:, 6:]) | _fifth_bits(block[:, 2:6])
    return _less(codes, 16), _halves(block, 0), None


def _q5_1(block: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    codes = _nibbles(block[:, 8:]) | _fifth_bits(block[:, 4:8])
    return codes, _halves(block, 0), _halves(block, 2)


def _q8_0(block: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    return _signed(block[:, 2:]), _halves(block, 0), None


def _iq4_nl(block: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    values = torch.tensor(_IQ4_NL, dtype=torch.int8, device=block.device)
    return values[_nibbles(block[:, 2:]).int()], _halves(block, 0), None


def _q2_k(block: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """16 runs of 16, each with four bits of scale and of minimum."""
    scales = block[:, :16]
    codes = _pairs(block[:, 16:80])
    scale = _halves(block, 80) * (scales & 0xF).float()
    return codes, scale, -(_halves(block, 82) * (scales >> 4).float())


def _q3_k(block: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """16 runs of 16; the third bit of each number, and the upper ones of scales, lie apart."""
    bits = _shifts(block, 1)
    third = ((block[:, None, :32] >> bits) & 1).flatten(1)
    codes = _less(_pairs(block[:, 32:96]) | (third << 2), 4)
    packed = block[:, 96:108]
    low = torch.cat((packed[:, :8] & 0xF, packed[:, :8] >> 4), 1)
    shifts = _shifts(block, 2)
    high = ((packed[:, None, 8:] >> shifts) & 3).flatten(1)
    scales = _less(low | (high << 4), 32)
    return codes, _halves(block, 108) * scales.float(), None


def _q4_k(block: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """8 runs of 32, with six bits of scale and of minimum."""
    codes = _runs_of_nibbles(block[:, 16:])
    return codes, *_six_bits(block)


def _q5_k(block: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    bits = _shifts(block, 1)
    fifth = ((block[:, None, 16:48] >> bits) & 1).flatten(1) << 4
    codes = _runs_of_nibbles(block[:, 48:]) | fifth
    return codes, *_six_bits(block)


def _q6_k(block: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """16 runs of 16; two upper bits of each number lie apart."""
    low = block[:, :128].view(-1, 2, 1, 64) >> _shifts(block, 4)
    shifts = _shifts(block, 2)
    high = (block[:, 128:192].view(-1, 2, 1, 32) >> shifts) & 3
    codes = (low & 0xF).flatten(1) | (high.flatten(1) << 4)
    return _less(codes, 32), _halves(block, 208) * _signed(block[:, 192:208]).float(), None


def _less(codes: Tensor, middle: int) -> Tensor:
    return (codes.to(torch.int16) - middle).to(torch.int8)


def _pairs(block: Tensor) -> Tensor:
    """uint8 [N, 64] → [N, 256]: of each 32 bytes the lowest two bits of all, then the next."""
    shifts = _shifts(block, 2)
    return ((block.reshape(-1, 2, 1, 32) >> shifts) & 3).flatten(1)


def _runs_of_nibbles(block: Tensor) -> Tensor:
    """uint8 [N, 128] → [N, 256]: of each 32 bytes the lower halves, then the upper ones."""
    shifts = _shifts(block, 4)
    return ((block.reshape(-1, 4, 1, 32) >> shifts) & 0xF).flatten(1)


def _six_bits(block: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and offsets [N, 8] of Q4_K and Q5_K."""
    first, second, third = (block[:, at : at + 4] for at in (4, 8, 12))
    scales = torch.cat((first & 63, (third & 0xF) | ((first >> 6) << 4)), 1)
    least = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), 1)
    return _halves(block, 0) * scales.float(), -(_halves(block, 2) * least.float())


KINDS = {
    "Q4_0": Blocks(32, 18, 4, 32, _q4_0),
    "Q4_1": Blocks(32, 20, 4, 32, _q4_1),
    "Q5_0": Blocks(32, 22, 8, 32, _q5_0),
    "Q5_1": Blocks(32, 24, 8, 32, _q5_1),
    "Q8_0": Blocks(32, 34, 8, 32, _q8_0),
    "IQ4_NL": Blocks(32, 18, 8, 32, _iq4_nl),
    "Q2_K": Blocks(256, 84, 4, 16, _q2_k),
    "Q3_K": Blocks(256, 110, 4, 16, _q3_k),
    "Q4_K": Blocks(256, 144, 4, 32, _q4_k),
    "Q5_K": Blocks(256, 176, 8, 32, _q5_k),
    "Q6_K": Blocks(256, 210, 8, 16, _q6_k),
}
"""By their names in the file. IQ4_NL's codes are looked up, and need more bits than the file's."""
