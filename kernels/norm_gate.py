"""RMSNorm of heads, multiplied by a silu of their gates, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.gated_mul import activate
from baton.kernels.overlap import overlap


def norm_gate(
    x: Tensor,
    weight: Tensor,
    eps: float,
    gate: Tensor,
    *,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """silu(gate) · (x over its root mean square · weight), head by head.

    Args:
        x: [T, heads, size], contiguous.
        weight: [size], of any float dtype.
        eps: added to the mean of squares.
        gate: [T, heads, size]; tokens may be strided.
        out: [T, heads, size], contiguous; may be x.
        pdl: launched to overlap the end of the kernel before.

    Returns:
        out, or a new tensor of x's dtype.
    """
    num_tokens, num_heads, size = x.shape
    assert x.is_contiguous() and gate.shape == x.shape
    assert gate.stride()[1:] == (size, 1)
    if out is None:
        out = torch.empty_like(x)
    block = triton.next_power_of_2(size)
    heads_at_once = max(1, min(triton.next_power_of_2(num_heads), 1024 // block))
    if num_tokens <= 8:
        heads_at_once = max(1, heads_at_once // 8)
    if num_tokens:
        _norm_gate[(triton.cdiv(num_heads, heads_at_once), num_tokens)](
            x,
            weight,
            gate,
            out,
            gate.stride(0),
            num_heads,
            eps,
            SIZE=size,
            BLOCK=block,
            HEADS=heads_at_once,
            num_warps=max(1, heads_at_once * block // 256),
            **overlap(x, pdl=pdl),
        )
    return out


@triton.jit(do_not_specialize=["gate_stride"])
def _norm_gate(
    x,
    weight,
    gate,
    out,
    gate_stride,
    num_heads,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    at = tl.arange(0, BLOCK)
    inside = (head < num_heads)[:, None] & (at < SIZE)[None, :]
    place = head[:, None] * SIZE + at[None, :]
    scale = tl.load(weight + at, mask=at < SIZE, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    own = tl.load(x + token * num_heads * SIZE + place, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(gate + token * gate_stride + place, mask=inside, other=0.0).to(tl.float32)
    y = own * tl.rsqrt(tl.sum(own * own, 1) / SIZE + eps)[:, None] * scale[None, :]
    y = y * activate(z, "silu")
    tl.store(out + token * num_heads * SIZE + place, y.to(out.dtype.element_ty), mask=inside)
