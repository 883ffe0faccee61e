"""What a recurrent layer gives, gated and normalised before it is projected, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.overlap import overlap
from baton.kernels.reference_gated_norm import GatedNorm

MOST_GROUP = 1 << 14
"""Numbers that are normalised together: a program has them all."""
_NORMLESS_BLOCK = 1024
"""Numbers of a row that one program gates where there is no norm."""


@triton.jit
def _gated_norm_kernel(
    x_ptr,
    gate_ptr,
    weight_ptr,
    out_ptr,
    x_stride,
    gate_stride,
    size,
    group_size,
    eps,
    gate_scale,
    NORMS_FIRST: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Some groups of one row; without a weight_ptr nothing is normalised."""
    row = tl.program_id(1).to(tl.int64)
    offset = tl.arange(0, BLOCK)[None, :]
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)[:, None]
    columns = group * group_size + offset
    inside = (offset < group_size) & (columns < size)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    gate *= gate_scale
    activated = gate / (1.0 + tl.exp(-gate))
    if not NORMS_FIRST:
        x *= activated
    if weight_ptr is not None:
        x *= tl.rsqrt(tl.sum(x * x, axis=1) / group_size + eps)[:, None] * weight
    if NORMS_FIRST:
        x *= activated
    tl.store(out_ptr + row * size + columns, x.to(out_ptr.dtype.element_ty), mask=inside)


def gated_norm(
    x: Tensor, gate: Tensor, norm: GatedNorm, *, out: Tensor | None = None, pdl: bool = False
) -> Tensor:
    """See kernels/reference_gated_norm.py.

    Args:
        x, gate: [T, size], T ≤ 65,535; rows may be strided. Groups have at most MOST_GROUP numbers.
        out: [T, size], contiguous; not x or gate.
        pdl: launch while the previous kernel still runs.

    Returns:
        out, or a new tensor of x's dtype.
    """
    num_rows, size = x.shape
    assert x.stride(1) == gate.stride(1) == 1 and gate.shape == x.shape
    group = norm.group_size if norm.weight is not None else min(size, _NORMLESS_BLOCK)
    assert group <= MOST_GROUP and (norm.weight is None or size % group == 0)
    if out is None:
        out = torch.empty((num_rows, size), dtype=x.dtype, device=x.device)
    assert out.is_contiguous()
    if num_rows == 0:
        return out
    block = triton.next_power_of_2(group)
    # Of small groups a program has several, but where there are few rows.
    numbers = 256 if num_rows <= 8 else 1024
    num_groups = triton.cdiv(size, group)
    at_once = max(1, min(numbers // block, triton.next_power_of_2(num_groups)))
    _gated_norm_kernel[(triton.cdiv(num_groups, at_once), num_rows)](
        x,
        gate,
        norm.weight,
        out,
        x.stride(0),
        gate.stride(0),
        size,
        group,
        norm.eps,
        norm.gate_scale,
        NORMS_FIRST=norm.norms_first and norm.weight is not None,
        GROUPS=at_once,
        BLOCK=block,
        num_warps=max(1, min(16, at_once * block // 256)),
        **overlap(x, pdl=pdl),
    )
    return out


def why_no_gated_norm(group: int) -> str | None:
    """Why the kernel does not take groups of that size, if it does not."""
    if group <= MOST_GROUP:
        return None
    return f"{group} numbers are normalised together, and its kernels take {MOST_GROUP} at most"
