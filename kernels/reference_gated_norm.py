"""What a recurrent layer gives, gated and normalised before it is projected: in plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from baton.kernels.reference import activate


@dataclass(frozen=True, slots=True)
class GatedNorm:
    """norm(x · silu(gate)), or norm(x) · silu(gate), or x · silu(gate) alone."""

    weight: Tensor | None
    """[size]; None: no norm."""
    group_size: int
    """Each group of so many numbers is normalised by itself."""
    eps: float
    norms_first: bool = False
    gate_scale: float = 1.0
    """Of the gate, before its activation."""


def gated_norm(x: Tensor, gate: Tensor, norm: GatedNorm) -> Tensor:
    """x and gate [T, size], whose rows may be strided → a new tensor of x's dtype, rounded once."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    activated = activate(gate.to(wide.dtype) * norm.gate_scale, "silu")
    if norm.weight is None:
        return activated.mul_(wide).to(x.dtype)
    if not norm.norms_first:
        wide = activated.mul_(wide)
    grouped = wide.unflatten(-1, (-1, norm.group_size))
    scale = grouped.square().mean(-1, keepdim=True).add_(norm.eps).rsqrt_()
    normed = (grouped * scale).flatten(-2).mul_(norm.weight)
    if norm.norms_first:
        normed = normed.mul_(activated)
    y: Tensor = normed.to(x.dtype)
    return y
