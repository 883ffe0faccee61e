"""How far what a kernel computes may be from the reference."""

from __future__ import annotations

import torch

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Of the largest number of the reference."""


def assert_close(actual: torch.Tensor, reference: torch.Tensor) -> None:
    """max |error| / max |reference|, where the reference is float64."""
    reference = reference.double().cpu()
    error = (actual.double().cpu() - reference).abs().max()
    assert not error.isnan(), "not every element was written, or a NaN got through"
    limit = TOLERANCE[actual.dtype] * max(float(reference.abs().max()), 1e-6)
    assert float(error) <= limit, f"max |error| {float(error):.3g} exceeds {limit:.3g}"
