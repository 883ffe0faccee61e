"""Numbers of a few bits out of the words that hold several of them."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 32


def unpack_columns(words: Tensor, num_bits: int, num_columns: int) -> Tensor:
    """words int32 [rows, any]: the numbers of a row one behind the other, lowest bits first, across
    the ends of words where these do not hold a whole number → uint8 [rows, num_columns]."""
    if _WORD % num_bits == 0:
        shifts = torch.arange(0, _WORD, num_bits, dtype=torch.int32, device=words.device)
        numbers = (words[..., None] >> shifts) & ((1 << num_bits) - 1)
        return numbers.flatten(1)[:, :num_columns].to(torch.uint8)
    starts = torch.arange(num_columns, device=words.device) * num_bits
    wide = words.to(torch.int64) & 0xFFFFFFFF
    # A word behind the last, for numbers that would begin in one and end in the next.
    wide = torch.nn.functional.pad(wide, (0, 1))
    first = starts // _WORD
    both = wide[:, first] | (wide[:, first + 1] << _WORD)
    return ((both >> (starts % _WORD)) & ((1 << num_bits) - 1)).to(torch.uint8)


def unpack_rows(words: Tensor, num_bits: int, num_rows: int) -> Tensor:
    """As `unpack_columns`, of columns: int32 [any, columns] → uint8 [num_rows, columns]."""
    return unpack_columns(words.t(), num_bits, num_rows).t()


def num_words(count: int, num_bits: int) -> int:
    """That so many numbers take."""
    return -(-count * num_bits // _WORD)


def nibbles(packed: Tensor) -> Tensor:
    """uint8 [..., n] → uint8 [..., 2 n], the lower half of each byte first."""
    return torch.stack((packed & 0xF, packed >> 4), -1).flatten(-2)
