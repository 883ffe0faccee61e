"""Soft caps: cap · tanh(x / cap), which keeps numbers within ±cap. Of logits, and of scores within
the kernels of attention."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_BLOCK = 2048


@triton.jit
def capped(x, CAP: tl.constexpr):
    """cap · tanh(x / cap) of a float32 block, by exp: where that overflows, the result is the cap.

    Off by about 1e-7 of the cap.
    """
    to_exponent: tl.constexpr = 2 * 1.4426950408889634 / CAP
    return CAP - 2 * CAP / (1.0 + tl.exp2(x * to_exponent))


@triton.jit
def _soft_cap_kernel(
    x_ptr, stride, size, CAP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    source = x_ptr + tl.program_id(1).to(tl.int64) * stride + columns
    x = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    tl.store(source, capped(x, CAP).to(x_ptr.dtype.element_ty), mask=inside)


def soft_cap(x: Tensor, cap: float, *, pdl: bool = False) -> Tensor:
    """cap · tanh(x / cap), in place.

    Args:
        x: [T, N], T ≤ 65,535; rows may be strided.
        cap: positive.
        pdl: launch while the previous kernel still runs.

    Returns:
        x.
    """
    num_rows, size = x.shape
    assert x.stride(1) == 1 and cap > 0
    if num_rows == 0:
        return x
    block = min(_BLOCK, triton.next_power_of_2(size))
    launch = {"launch_pdl": True} if pdl and x.is_cuda else {}
    _soft_cap_kernel[(triton.cdiv(size, block), num_rows)](
        x,
        x.stride(0),
        size,
        CAP=cap,
        BLOCK=block,
        PDL=bool(launch),
        num_warps=max(1, min(8, block // 256)),
        **launch,
    )
    return x
