"""Kernels that start while the one before still runs, and wait for its results by themselves:
programmatic dependent launch, compute capability 9.0.
"""

from __future__ import annotations

from torch import Tensor


def overlap(data: Tensor, *, pdl: bool) -> dict[str, bool]:
    """Options of a launch whose kernel has a PDL of its own; none of `data` that is no GPU's."""
    return {"PDL": True, "launch_pdl": True} if pdl and data.is_cuda else {"PDL": False}
