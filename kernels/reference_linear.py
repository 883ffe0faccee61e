"""Torch references of skinny_linear, rms_norm and gated_mul: same arguments, same results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from baton.kernels.reference import Activation


def skinny_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    activation: Activation | None = None,
    scale: float = 1.0,
    out: Tensor | None = None,
    config: Any = None,
    pdl: bool = False,
) -> Tensor:
    """f((norm(x) · weightᵀ + bias) · scale) + residual, in float64, rounded once at the end.

    Shapes as in kernels.skinny_linear.skinny_linear; `config` and `pdl` have no effect.
    """
    wide = x.double()
    if norm_weight is not None:
        wide = _normalised(wide, norm_weight, eps)
    y = wide @ weight.double().T
    if bias is not None:
        y += bias.double()
    y *= scale
    if activation is not None:
        y = _gated(y, activation)
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
    return _deliver(_normalised(x.double(), weight, eps).to(x.dtype), out)


def rms_norm_add_reference(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor,
    *,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """residual + RMSNorm of x, both [T, H]; rounded once."""
    y = residual.double() + _normalised(x.double(), weight, eps)
    return _deliver(y.to(x.dtype), out)


def gated_mul_reference(
    x: Tensor,
    up: Tensor | None = None,
    *,
    activation: Activation = "silu",
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """activation(gate) · up of x [T, 2F] = (gate, up), or of x = gate and up [T, F] → [T, F]."""
    both = x if up is None else torch.cat((x, up), 1)
    return _deliver(_gated(both.double(), activation).to(x.dtype), out)


def _normalised(wide: Tensor, weight: Tensor, eps: float) -> Tensor:
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return wide * scale * weight.double()


def _gated(wide: Tensor, activation: Activation) -> Tensor:
    gate, up = wide.chunk(2, -1)
    if activation == "sigmoid":
        return torch.sigmoid(gate) * up
    if activation == "silu":
        return gate * torch.sigmoid(gate) * up
    return torch.nn.functional.gelu(gate, approximate="tanh") * up


def _deliver(y: Tensor, out: Tensor | None) -> Tensor:
    return y if out is None else out.copy_(y)
