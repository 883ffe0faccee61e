"""RMSNorm of rows, with the addition of the residual stream, before or behind, in the same pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    weight_ptr,
    residual_ptr,
    out_ptr,
    x_stride,
    residual_stride,
    out_stride,
    hidden,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    # No kernel before this one writes weights.
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        # What is behind starts early: it loads weights while this waits and computes.
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual_row = residual_ptr + row * residual_stride + columns
        x += tl.load(residual_row, mask=inside, other=0.0).to(tl.float32)
        # What is normalised is what later layers will read.
        x_rounded = x.to(residual_ptr.dtype.element_ty)
        tl.store(residual_row, x_rounded, mask=inside)
        x = x_rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / hidden + eps)
    y = (x * scale * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_stride + columns, y, mask=inside)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """Rows over their root mean square, times weight.

    Args:
        x: [T, H], H ≤ 16,384; rows may be strided.
        weight: [H], of any float dtype; what is multiplied by it is not rounded before.
        eps: added to the mean of squares.
        residual: [T, H]; if given, x + residual is stored into it and normalised.
        out: [T, H], may be x.
        pdl: launch while the previous kernel still runs, and let the next one, too, start then: it
            may read nothing before it waits but weights (tests/kernels/test_overlap.py).

    Returns:
        out, or a new tensor [T, H] of x's dtype.
    """
    num_rows, hidden = x.shape
    assert hidden <= 16384 and x.stride(1) == 1
    if out is None:
        out = torch.empty((num_rows, hidden), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    block = triton.next_power_of_2(hidden)
    launch = {"launch_pdl": True} if pdl and x.is_cuda else {}
    _rms_norm_kernel[(num_rows,)](
        x,
        weight,
        x if residual is None else residual,
        out,
        x.stride(0),
        x.stride(0) if residual is None else residual.stride(0),
        out.stride(0),
        hidden,
        eps,
        HAS_RESIDUAL=residual is not None,
        BLOCK=block,
        PDL=bool(launch),
        num_warps=_num_warps(block, num_rows),
        **launch,
    )
    return out


@triton.jit
def _rms_norm_add_kernel(
    x_ptr,
    weight_ptr,
    residual_ptr,
    out_ptr,
    x_stride,
    residual_stride,
    out_stride,
    hidden,
    eps,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + row * residual_stride + columns, mask=inside, other=0.0)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / hidden + eps)
    y = residual.to(tl.float32) + x * scale * weight
    tl.store(out_ptr + row * out_stride + columns, y.to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm_add(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor,
    *,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """residual + `rms_norm` of x, rounded once.

    Args:
        x: [T, H], H ≤ 16,384; rows may be strided.
        weight: [H], of any float dtype.
        eps: added to the mean of squares.
        residual: [T, H]; rows may be strided.
        out: [T, H], may be x or residual.
        pdl: launch while the previous kernel still runs.

    Returns:
        out, or a new tensor [T, H] of x's dtype.
    """
    num_rows, hidden = x.shape
    assert hidden <= 16384 and x.stride(1) == 1 and residual.shape == x.shape
    if out is None:
        out = torch.empty((num_rows, hidden), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    block = triton.next_power_of_2(hidden)
    launch = {"launch_pdl": True} if pdl and x.is_cuda else {}
    _rms_norm_add_kernel[(num_rows,)](
        x,
        weight,
        residual,
        out,
        x.stride(0),
        residual.stride(0),
        out.stride(0),
        hidden,
        eps,
        BLOCK=block,
        PDL=bool(launch),
        num_warps=_num_warps(block, num_rows),
        **launch,
    )
    return out


def _num_warps(block: int, num_rows: int) -> int:
    """With few rows latency counts: 16 bytes a thread; with many, more work per thread."""
    per_thread = 8 if num_rows <= 132 else 16
    return max(1, min(16, block // (32 * per_thread)))
