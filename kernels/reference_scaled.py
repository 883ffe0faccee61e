"""Torch references of products whose inputs are made small, too, and how that is described."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 128
"""Numbers of a row that have a scale together, where not all have."""
_LEAST = 1e-30


@dataclass(frozen=True, slots=True)
class InputScheme:
    """How the inputs of a layer are made small."""

    dtype: torch.dtype = torch.float8_e4m3fn
    """Of the codes; or int8."""
    group: int = 0
    """So many numbers of a row have a scale: `GROUP`, or 0 for all."""
    scale: Tensor | None = None
    """float32 [1]: of all rows; None: each is scaled by what it holds."""

    @property
    def largest_code(self) -> float:
        return 448.0 if self.dtype.is_floating_point else 127.0


@dataclass(frozen=True, slots=True)
class QuantisedRows:
    """number ≈ code · scale"""

    codes: Tensor
    """float8 or int8 [T, K]"""
    scale: Tensor
    """float32 [T, groups]; the rows of a group stand together."""
    num_padding: int = 0
    """How many of the rows, at the end, hold anything."""

    @property
    def num_rows(self) -> int:
        return len(self.codes) - self.num_padding

    def expand(self, dtype: torch.dtype) -> Tensor:
        """The numbers [T, K]."""
        num_rows, size = self.codes.shape
        runs = self.codes.to(dtype).view(num_rows, self.scale.shape[1], -1)
        return (runs * self.scale.to(dtype)[..., None]).view(num_rows, size)


def quantise_rows_reference(x: Tensor, scheme: InputScheme) -> QuantisedRows:
    """x [T, K] of any float dtype."""
    num_rows, size = x.shape
    most = scheme.largest_code
    runs = x.float().view(num_rows, -1, scheme.group or size)
    largest = runs.abs().amax(-1).clamp_min(_LEAST)
    # Of numbers that are not all finite nothing that is follows.
    largest = largest.masked_fill(~largest.isfinite(), float("nan"))
    if scheme.scale is not None:
        scale = scheme.scale.float().expand(num_rows, 1)
        inverse = 1 / scale
        scale = scale.where(largest.isfinite(), largest)
    else:
        scale, inverse = largest / most, most / largest
    scaled = (runs * inverse[..., None]).clamp(-most, most)
    if not scheme.dtype.is_floating_point:
        scaled = scaled.round()
    return QuantisedRows(scaled.to(scheme.dtype).view(num_rows, size), scale)
