"""rms_norm and rms_norm_add against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from baton.kernels.reference_linear import rms_norm_add_reference, rms_norm_reference
from baton.kernels.rms_norm import rms_norm, rms_norm_add

Check = Callable[[Tensor, Tensor], None]
Poisoned = Callable[..., Tensor]


@pytest.mark.parametrize(
    ("rows", "hidden"), [(1, 1), (1, 4096), (3, 70), (5, 576), (140, 33), (2, 16384)]
)
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(
    rows: int,
    hidden: int,
    with_residual: bool,
    device: torch.device,
    dtype: torch.dtype,
    poisoned: Poisoned,
    assert_close: Check,
) -> None:
    x = torch.randn(rows, hidden + 4, device=device).to(dtype)[:, :hidden]
    weight = torch.randn(hidden, device=device).to(dtype)
    residual = torch.randn(rows, hidden, device=device).to(dtype) if with_residual else None
    expected_sum = None if residual is None else x.double() + residual.double()
    wide_sum = None if expected_sum is None else expected_sum.to(dtype).double()
    expected = rms_norm_reference(x.double() if wide_sum is None else wide_sum, weight, 1e-5)
    out = poisoned(rows, hidden + 2, dtype=dtype)[:, :hidden]
    assert rms_norm(x, weight, 1e-5, residual=residual, out=out) is out
    assert_close(out, expected)
    if residual is not None:
        assert expected_sum is not None
        assert_close(residual, expected_sum)


@pytest.mark.parametrize(("rows", "hidden"), [(1, 3840), (3, 70), (140, 33)])
@pytest.mark.parametrize("wide_weight", [False, True])
def test_rms_norm_add(
    rows: int,
    hidden: int,
    wide_weight: bool,
    device: torch.device,
    dtype: torch.dtype,
    poisoned: Poisoned,
    assert_close: Check,
) -> None:
    x = torch.randn(rows, hidden + 4, device=device).to(dtype)[:, :hidden]
    residual = torch.randn(rows, hidden + 1, device=device).to(dtype)[:, :hidden]
    weight = 1 + torch.randn(hidden, device=device) / 64
    if not wide_weight:
        weight = weight.to(dtype)
    expected = rms_norm_add_reference(x.double(), weight, 1e-5, residual.double())
    out = poisoned(rows, hidden + 2, dtype=dtype)[:, :hidden]
    for target in (out, residual):
        assert rms_norm_add(x, weight, 1e-5, residual, out=target) is target
        assert_close(target, expected)
    assert rms_norm_add(x[:0], weight, 1e-5, residual[:0]).shape == (0, hidden)


def test_weights_of_float32(device: torch.device, dtype: torch.dtype, assert_close: Check) -> None:
    """1 + w is not rounded to the type of the rows."""
    x = torch.randn(3, 96, device=device).to(dtype)
    weight = 1 + torch.randn(96, device=device) / 1024
    assert_close(rms_norm(x, weight, 1e-6), rms_norm_reference(x.double(), weight, 1e-6))


def test_in_place_and_new(device: torch.device, assert_close: Check) -> None:
    x = torch.randn(4, 96, device=device)
    weight = torch.randn(96, device=device)
    expected = rms_norm_reference(x.double(), weight, 1e-6)
    assert_close(rms_norm(x, weight, 1e-6), expected)
    assert rms_norm(x, weight, 1e-6, out=x) is x
    assert_close(x, expected)
    assert rms_norm(x[:0], weight, 1e-6).shape == (0, 96)
