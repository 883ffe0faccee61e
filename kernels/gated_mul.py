"""activation(gate) · up, for gate and up side by side, as one product gives them, or apart."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.reference import Activation


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """x · sigmoid(x), or x · sigmoid(2u), which is GELU by tanh(u), or sigmoid(x) alone, or
    max(x, 0); of a float32 block."""
    is_gated: tl.constexpr = ACTIVATION == "silu" or ACTIVATION == "gelu_tanh"
    tl.static_assert(is_gated or ACTIVATION == "sigmoid" or ACTIVATION == "relu")
    if ACTIVATION == "sigmoid":
        return 1.0 / (1.0 + tl.exp(-x))
    elif ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "relu":
        return tl.maximum(x, 0.0)
    else:
        u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x / (1.0 + tl.exp(-2.0 * u))


@triton.jit
def _gated_mul_kernel(
    x_ptr,
    up_ptr,
    out_ptr,
    x_stride,
    up_stride,
    out_stride,
    size,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Without an up_ptr, up is behind the gate."""
    row = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x_row = x_ptr + row * x_stride + columns
    gate = tl.load(x_row, mask=inside, other=0.0).to(tl.float32)
    up_row = x_row + size if up_ptr is None else up_ptr + row * up_stride + columns
    up = tl.load(up_row, mask=inside, other=0.0).to(tl.float32)
    y = (activate(gate, ACTIVATION) * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_stride + columns, y, mask=inside)


def gated_mul(
    x: Tensor,
    up: Tensor | None = None,
    *,
    activation: Activation = "silu",
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """activation(gate) · up.

    Args:
        x: [T, 2F] = (gate, up), T ≤ 65,535; beside an `up` the gate alone, [T, F]. Rows may be
            strided.
        up: [T, F]; rows may be strided.
        out: [T, F].
        pdl: launch while the previous kernel still runs.

    Returns:
        out, or a new tensor [T, F] of x's dtype.
    """
    num_rows, size = x.shape[0], x.shape[1] // (2 if up is None else 1)
    assert x.stride(1) == 1 and (up is None or (up.shape == x.shape and up.stride(1) == 1))
    if out is None:
        out = torch.empty((num_rows, size), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    # One row must occupy many processors, many rows few programs.
    block = 256 if num_rows <= 8 else 1024 if num_rows <= 64 else 2048
    block = min(block, triton.next_power_of_2(size))
    launch = {"launch_pdl": True} if pdl and x.is_cuda else {}
    _gated_mul_kernel[(triton.cdiv(size, block), num_rows)](
        x,
        up,
        out,
        x.stride(0),
        None if up is None else up.stride(0),
        out.stride(0),
        size,
        ACTIVATION=activation,
        BLOCK=block,
        PDL=bool(launch),
        num_warps=max(1, min(8, block // 256)),
        **launch,
    )
    return out
