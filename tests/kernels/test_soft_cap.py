"""soft_cap against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from baton.kernels.soft_cap import soft_cap

# Where exp overflows, the result is the cap.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
Check = Callable[[Tensor, Tensor], None]


@pytest.mark.parametrize(("rows", "size", "cap"), [(1, 40, 30.0), (3, 5000, 30.0), (2, 70, 0.5)])
def test_soft_cap(
    rows: int, size: int, cap: float, device: torch.device, dtype: torch.dtype, assert_close: Check
) -> None:
    wide = (torch.randn(rows, size + 3, device=device) * 40).to(dtype)
    x, behind = wide[:, :size], wide[:, size:].clone()
    expected = cap * torch.tanh(x.double() / cap)
    assert soft_cap(x, cap) is x
    assert_close(x, expected)
    assert torch.equal(wide[:, size:], behind)
    assert soft_cap(x[:0], cap).shape == (0, size)


def test_extremes(device: torch.device) -> None:
    x = torch.tensor([[-1e30, 1e30, 0.0, float("inf"), float("-inf")]], device=device)
    assert soft_cap(x, 30.0).tolist() == [[-30.0, 30.0, 0.0, 30.0, -30.0]]
    assert soft_cap(torch.full((1, 2), float("nan"), device=device), 30.0).isnan().all()
