"""silu_mul against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from baton.kernels.reference_linear import silu_mul_reference
from baton.kernels.silu_mul import silu_mul

Check = Callable[[Tensor, Tensor], None]
Poisoned = Callable[..., Tensor]


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (1, 1500), (3, 70), (9, 1030), (70, 2100)])
def test_silu_mul(
    rows: int,
    size: int,
    device: torch.device,
    dtype: torch.dtype,
    poisoned: Poisoned,
    assert_close: Check,
) -> None:
    x = (torch.randn(rows, 2 * size + 4, device=device) * 3).to(dtype)[:, : 2 * size]
    out = poisoned(rows, size + 2, dtype=dtype)[:, :size]
    assert silu_mul(x, out=out) is out
    assert_close(out, silu_mul_reference(x.double()))


@pytest.mark.filterwarnings("ignore:overflow")
def test_extremes(device: torch.device) -> None:
    """No overflow where exp(−gate) has one; the limits are 0 and the gate itself."""
    x = torch.tensor([[-1e4, 1e4, 2.0, 3.0]], device=device)
    assert silu_mul(x).tolist() == [[0.0, 3e4]]
    assert silu_mul(x[:0]).shape == (0, 2)
