"""Keys and values in 8 bits, in plain torch: how numbers become codes, and codes numbers again.

A vector, what one head has of one token, is float8_e4m3 codes times a power of two, its scale: the
smallest with which none of its numbers is beyond 448. Of floats a finer scale would gain nothing,
and such a one multiplies without rounding: a code has four digits, so in any type of 16 bits the
product is what it was. A scale is kept as one byte, the exponent of a float32. Of a vector that is
not finite it is the highest one, which makes infinity, and its codes are zeros: all of it is NaN.

A run, the keys or values of one head and layer in a block, is the codes of its tokens, one after
another, then their scales: uint8 [block_size · head_dim + block_size].
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPE = torch.float8_e4m3fn
STRETCH_TOKENS = 128
"""Of keys and values that are widened together: a multiple of every block size that the kernel of
16 bits takes."""
_SMALLEST_ABOVE = 0x1FFFFF
"""Added to the bits of a float32, it raises the exponent of those above 1.75 times a power of 2, as
448 is."""
_TOP_EXPONENT = 8
"""Of 448."""
_INFINITE = 0x7F800000
NOT_FINITE = 255


def codes_of(runs: Tensor, block_size: int) -> Tensor:
    """runs uint8 [..., block_size · (head_dim + 1)] → their codes, [..., block_size, head_dim]: a
    view, from which `runs_of` and `exponents_of` find back."""
    head_dim = runs.shape[-1] // block_size - 1
    codes: Tensor = runs[..., : block_size * head_dim].unflatten(-1, (block_size, head_dim))
    return codes.view(DTYPE)


def exponents_of(codes: Tensor) -> Tensor:
    """uint8 [..., block_size]: the scales of a view of codes; a view, too."""
    *outer, block_size, head_dim = codes.shape
    size = [*outer, block_size]
    offset = codes.storage_offset() + block_size * head_dim
    return codes.view(torch.uint8).as_strided(size, [*codes.stride()[:-2], 1], offset)


def runs_of(codes: Tensor) -> Tensor:
    """uint8 [runs, block_size · (head_dim + 1)]: what a view of all codes of a pool is of."""
    block_size, head_dim = codes.shape[-2:]
    num_bytes = block_size * (head_dim + 1)
    size = [codes.shape[:-2].numel(), num_bytes]
    return codes.view(torch.uint8).as_strided(size, [num_bytes, 1], codes.storage_offset())


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., head_dim] → codes of that shape and uint8 [...], the exponents of their scales."""
    wide = x.float()
    bits = wide.abs().amax(-1).view(torch.int32)
    exponent = ((bits + _SMALLEST_ABOVE) >> 23).sub_(_TOP_EXPONENT).clamp_(min=1)
    exponent.masked_fill_(bits >= _INFINITE, NOT_FINITE)
    inverse = (254 - exponent).clamp_(min=0).bitwise_left_shift_(23).view(torch.float32)
    codes = (wide * inverse[..., None]).masked_fill_((exponent == NOT_FINITE)[..., None], 0)
    return codes.to(DTYPE), exponent.to(torch.uint8)


def scales(exponents: Tensor) -> Tensor:
    """uint8 → float32; zero for 0, as an unwritten block has it."""
    return (exponents.int() << 23).view(torch.float32)


def widened(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """A view of codes [..., block_size, head_dim] → the numbers, in a new tensor."""
    return _product(codes, exponents_of(codes), dtype)


def widen_runs(runs: Tensor, out: Tensor) -> None:
    """runs uint8 [n, block_size · (head_dim + 1)] → out [n, block_size, head_dim]."""
    num_runs, block_size, head_dim = out.shape
    num_codes = block_size * head_dim
    codes = runs[:, :num_codes].view(DTYPE).view(num_runs, block_size, head_dim)
    out.copy_(_product(codes, runs[:, num_codes:], out.dtype))


def widen_stretches(
    kv: Tensor,
    layer: int,
    block_tables: Tensor,
    stretches: Tensor,
    out: Tensor,
    *,
    window: int = 0,
    counted: Tensor | None = None,
) -> Tensor:
    """As that of float8_widen.py."""
    block_size = kv.shape[4]
    numbers = widened(kv[:, :, layer], out.dtype)
    used = stretches if counted is None else stretches[: int(counted)]
    for number, (slot, first, end, position) in enumerate(used.tolist()):
        low = max(position - window + 1, first) if window else first
        for key in range(low, min(first + STRETCH_TOKENS, end)):
            block = int(block_tables[slot, key // block_size])
            place = (number * STRETCH_TOKENS + key - first) // block_size
            out[place, :, 0, :, key % block_size] = numbers[block, :, :, key % block_size]
    return out


def store(tokens: Tensor, codes: Tensor, rows: Tensor) -> None:
    """Writes vectors [n, head_dim] to rows, int64 [n], of a pool taken as [runs · block_size]."""
    block_size, head_dim = codes.shape[-2:]
    runs = runs_of(codes)
    run, token = rows // block_size, rows % block_size
    new_codes, exponents = quantised(tokens)
    held = runs[:, : block_size * head_dim].unflatten(1, (block_size, head_dim))
    held[run, token] = new_codes.view(torch.uint8)
    runs[:, block_size * head_dim :][run, token] = exponents


def _product(codes: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    scale = scales(exponents)[..., None].to(wide)
    return codes.to(wide).mul_(scale).to(dtype)
