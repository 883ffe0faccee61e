"""gated_mul against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from baton.kernels.gated_mul import gated_mul
from baton.kernels.reference import Activation
from baton.kernels.reference_linear import gated_mul_reference

# Where exp(−gate) overflows, the result is zero.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
Check = Callable[[Tensor, Tensor], None]
Poisoned = Callable[..., Tensor]


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "sigmoid"])
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (1, 1500), (3, 70), (9, 1030), (70, 2100)])
def test_gated_mul(
    rows: int,
    size: int,
    activation: Activation,
    device: torch.device,
    dtype: torch.dtype,
    poisoned: Poisoned,
    assert_close: Check,
) -> None:
    x = (torch.randn(rows, 2 * size + 4, device=device) * 3).to(dtype)[:, : 2 * size]
    out = poisoned(rows, size + 2, dtype=dtype)[:, :size]
    assert gated_mul(x, activation=activation, out=out) is out
    assert_close(out, gated_mul_reference(x.double(), activation=activation))
    # Halves from elsewhere, with strides of their own.
    gate, up = x[:, :size].contiguous(), x[:, size:]
    out.fill_(float("nan"))
    assert gated_mul(gate, up, activation=activation, out=out) is out
    assert_close(out, gated_mul_reference(gate.double(), up, activation=activation))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_extremes(device: torch.device, activation: Activation) -> None:
    """No overflow where exp(−gate) has one; the limits are 0 and the gate itself."""
    x = torch.tensor([[-1e4, 1e4, 2.0, 3.0]], device=device)
    assert gated_mul(x, activation=activation).tolist() == [[0.0, 3e4]]
    assert gated_mul(x[:0], activation=activation).shape == (0, 2)
