"""Torch references of skinny_linear, rms_norm and silu_mul: same arguments, same results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def skinny_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    silu_mul: bool = False,
    out: Tensor | None = None,
    config: Any = None,
    pdl: bool = False,
) -> Tensor:
    """f(norm(x) · weightᵀ + bias) + residual, in float64, rounded once at the end.

    Shapes as in kernels.skinny_linear.skinny_linear; `config` and `pdl` have no effect.
    """
    wide = x.double()
    if norm_weight is not None:
        scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
        wide = wide * scale * norm_weight.double()
    y = wide @ weight.double().T
    if bias is not None:
        y += bias.double()
    if silu_mul:
        gate, up = y.chunk(2, -1)
        y = gate * torch.sigmoid(gate) * up
    if residual is not None:
        y += residual.double()
    return _deliver(y.to(x.dtype), out)


def rms_norm_reference(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """RMSNorm of x [T, H], or of the sum x + residual, which is stored into `residual`."""
    if residual is not None:
        residual.copy_(x.double() + residual.double())
        x = residual
    wide = x.double()
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return _deliver((wide * scale * weight.double()).to(x.dtype), out)


def silu_mul_reference(x: Tensor, *, out: Tensor | None = None, pdl: bool = False) -> Tensor:
    """silu(gate) · up of x [T, 2F] = (gate, up) → [T, F]."""
    gate, up = x.double().chunk(2, -1)
    return _deliver((gate * torch.sigmoid(gate) * up).to(x.dtype), out)


def _deliver(y: Tensor, out: Tensor | None) -> Tensor:
    return y if out is None else out.copy_(y)
