"""GPTQ's files: whole numbers of 2, 3, 4 or 8 bits packed along the inputs.

qweight    int32 [in · bits / 32, out]
qzeros     int32 [groups, out · bits / 32]; in the first format less one
scales     [groups, out]
g_idx      int32 [in]: the group of each column, where they are out of order
"""

from __future__ import annotations

import torch
from torch import Tensor

from baton.shared.engine.quantised.bits import num_words, unpack_columns, unpack_rows
from baton.shared.engine.quantised.form import (
    TensorReader,
    check_scales,
    num_groups,
    read_words,
)
from baton.shared.engine.quantised.packed import read_group_of
from baton.shared.engine.quantised.scheme import Scheme
from baton.shared.engine.quantised.weight import QuantisedWeight
from baton.shared.engine.weight_headers import FLOATS

_WORD = 32
_ODD_BITS = 3
"""Numbers that go across the ends of words."""
_LESS_IN_3_WORDS = (0x24924924, 0x92492492, 0x49249249)
"""What gptqmodel takes from such words for the first format: that of the first and of the last are
exchanged, for whoever takes one from each number."""


def read(
    module: str,
    shape: tuple[int, int],
    scheme: Scheme,
    reader: TensorReader,
    *,
    zeros_are_less_one: bool,
) -> QuantisedWeight:
    num_out, num_in = shape
    bits, scale_name = scheme.num_bits, f"{module}.scales"
    because = f"config.json makes the weight {list(shape)} of {bits} bits"
    words = read_words(
        reader, f"{module}.qweight", (num_words(num_in, bits), num_out), "I32", because
    )
    count = num_groups(reader, scale_name, scheme, num_in)
    scale = read_scales(scale_name, (count, num_out), scheme, reader)
    zeros = read_words(
        reader, f"{module}.qzeros", (count, num_words(num_out, bits)), "I32", because
    )
    group_of = read_group_of(f"{module}.g_idx", num_in, count, reader, scheme)
    has_zeros = not scheme.is_symmetric
    if has_zeros and zeros_are_less_one and bits == _ODD_BITS:
        reason = "of 3 bits and zeros anywhere tools disagree in GPTQ's first format: write gptq_v2"
        raise reader.error(f"{module}.qzeros", reason)
    if words.is_meta:
        return QuantisedWeight.on_paper(
            *shape,
            bits,
            count,
            torch.uint8 if has_zeros else torch.int8,
            scale=scale.dtype,
            zero=torch.uint8 if has_zeros else None,
            group_of=group_of,
        )
    codes = unpack_rows(words, bits, num_in).t().contiguous()
    zero = None
    if has_zeros:
        zero = _zeros(zeros, bits, num_out, are_less_one=zeros_are_less_one).t().contiguous()
    else:
        middle = _check_middle(f"{module}.qzeros", zeros, bits, num_out, reader)
        codes = (codes.to(torch.int16) - middle).to(torch.int8)
    return QuantisedWeight(codes, scale.t().contiguous(), bits, zero=zero, group_of=group_of)


def _zeros(words: Tensor, bits: int, num_out: int, *, are_less_one: bool) -> Tensor:
    """uint8 [groups, out]"""
    if are_less_one:
        # One is taken from each by a subtraction from words: a zero of 0 borrows from its neighbour
        # what it gets back here.
        words = words + sum(1 << at for at in range(0, _WORD, bits))
    return unpack_columns(words, bits, num_out)


def _check_middle(name: str, words: Tensor, bits: int, num_out: int, reader: TensorReader) -> int:
    """The zero of symmetric numbers. Files lie about their format: here it is known where zeros
    must be, and so what the file holds.

    Raises:
        ModelError: they are elsewhere.
    """
    middle = 1 << (bits - 1)
    stored = unpack_columns(words, bits, num_out)
    if any(bool((stored == zero).all()) for zero in (middle, middle - 1)):
        return middle
    if bits == _ODD_BITS:
        less = torch.tensor(_LESS_IN_3_WORDS, device=words.device).repeat(-(-words.shape[1] // 3))
        moved = (words + less[: words.shape[1]]).to(torch.int32)
        if bool((unpack_columns(moved, bits, num_out) == middle).all()):
            return middle
    found = f"zeros {int(stored.min())} to {int(stored.max())}"
    raise reader.error(name, f"{found} are neither {middle} nor {middle - 1}: config.json says sym")


def read_scales(name: str, shape: tuple[int, int], scheme: Scheme, reader: TensorReader) -> Tensor:
    """[groups, out]"""
    header = reader.header(name)
    if header is not None and header.dtype not in FLOATS:
        raise reader.error(name, f"dtype {header.dtype} is not one of {', '.join(FLOATS)}")
    because = f"config.json says group_size {scheme.group_size}"
    scale = read_words(reader, name, shape, header.dtype if header else "F16", because)
    check_scales(reader, name, scale, 2**scheme.num_bits, is_signed=scheme.is_symmetric)
    return scale
