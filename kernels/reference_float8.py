"""Keys and values in 8 bits, in plain torch: how numbers become codes, and codes numbers again.

A vector, what one head has of one token, is float8_e4m3 codes times a power of two, its scale: the
smallest with which none of its numbers is beyond 448. Of floats a finer scale would gain nothing,
and such a one multiplies without rounding: a code has four digits, so in any type of 16 bits the
product is what it was. A scale is kept as one byte, the exponent of a float32. Of a vector that is
not finite it is the highest one, which makes infinity, and its codes are zeros: all of it is NaN.

A run is the keys or values of one head and layer in a block. Of a head a block has the codes of all
its runs, one run after another, layer by layer, then their scales: uint8 [num_layers · 2 ·
block_size · (head_dim + 1)]. So a vector of 128 codes is a line of a GPU's cache, where layers come
in fours; behind scales it would lie across two, and each would be read twice.
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


def codes_of(heads: Tensor, block_size: int, head_dim: int) -> Tensor:
    """heads uint8 [..., num_layers · 2 · block_size · (head_dim + 1)] → their codes, [...,
    num_layers, 2, block_size, head_dim]: a view, from which `heads_of` and `exponents_of` find
    back."""
    num_layers = heads.shape[-1] // (2 * block_size * (head_dim + 1))
    codes = heads[..., : num_layers * 2 * block_size * head_dim].view(DTYPE)
    return codes.view(*heads.shape[:-1], num_layers, 2, block_size, head_dim)


def exponents_of(codes: Tensor) -> Tensor:
    """uint8 [..., num_layers, 2, block_size]: the scales of a view of heads' codes; a view, too."""
    *outer, num_layers, both, block_size, head_dim = codes.shape
    assert both == 2 and codes.stride(-4) == 2 * block_size * head_dim
    offset = codes.storage_offset() + num_layers * 2 * block_size * head_dim
    size = [*outer, num_layers, 2, block_size]
    stride = [*codes.stride()[:-4], 2 * block_size, block_size, 1]
    return codes.view(torch.uint8).as_strided(size, stride, offset)


def heads_of(codes: Tensor) -> Tensor:
    """uint8 [heads, num_layers · 2 · block_size · (head_dim + 1)]: what a view of all codes of a
    pool is of."""
    num_layers, _, block_size, head_dim = codes.shape[-4:]
    num_bytes = num_layers * 2 * block_size * (head_dim + 1)
    size = [codes.shape[:-4].numel(), num_bytes]
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
    """A view of heads' codes [..., num_layers, 2, block_size, head_dim] → the numbers, in a new
    tensor."""
    return _product(codes, exponents_of(codes), dtype)


def widen_runs(codes: Tensor, layer: int, which: int, runs: Tensor, out: Tensor) -> None:
    """runs int64 [n], of a pool taken as [heads · num_layers · 2], all of them one layer's keys
    (which = 0) or values (1) → out [n, block_size, head_dim]."""
    heads = heads_of(codes)
    num_layers, _, block_size, head_dim = codes.shape[-4:]
    number = runs // (num_layers * 2)
    of_run = layer * 2 + which
    first, size = of_run * block_size * head_dim, block_size * head_dim
    held = heads[:, first : first + size].index_select(0, number).view(DTYPE).view_as(out)
    first = num_layers * 2 * size + of_run * block_size
    exponents = heads[:, first : first + block_size].index_select(0, number)
    out.copy_(_product(held, exponents, out.dtype))


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
    numbers = widened(kv, out.dtype)[:, :, layer]
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
    num_layers, _, block_size, head_dim = codes.shape[-4:]
    held = codes_of(heads_of(codes), block_size, head_dim)
    run, token = rows // block_size, rows % block_size
    place = (run // (num_layers * 2), run // 2 % num_layers, run % 2, token)
    new_codes, exponents = quantised(tokens)
    held.view(torch.uint8)[place] = new_codes.view(torch.uint8)
    exponents_of(held)[place] = exponents


def _product(codes: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    scale = scales(exponents)[..., None].to(wide)
    return codes.to(wide).mul_(scale).to(dtype)
