"""Kernels run on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from baton.kernels import decode_plan
from tests.kernels import closeness, interpreter

_HAS_GPU = torch.cuda.is_available()
if not _HAS_GPU:
    interpreter.spare_work()
# The interpreter multiplies bfloat16 wrongly, and silently.
_DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if _HAS_GPU else [])


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if _HAS_GPU else "cpu")


@pytest.fixture(params=_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    value: torch.dtype = request.param
    return value


@pytest.fixture
def poisoned(device: torch.device) -> Callable[..., torch.Tensor]:
    """Makes tensors whose every element shows if it was not written."""

    def make(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        value = float("nan") if dtype.is_floating_point else 0x7EADBEEF
        return torch.full(shape, value, dtype=dtype, device=device)

    return make


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention of decode steps takes hundreds of programs, for a GPU's sake; the interpreter is as
    long over one that has no work as over others."""
    usual = decode_plan.decode_config

    def few(*sizes: int, **how: int) -> decode_plan.DecodeConfig:
        return replace(usual(*sizes, **how), programs=12)

    if not _HAS_GPU:
        monkeypatch.setattr(decode_plan, "decode_config", few)


@pytest.fixture
def assert_close() -> Callable[[torch.Tensor, torch.Tensor], None]:
    return closeness.assert_close
