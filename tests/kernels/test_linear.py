"""skinny_linear against float64, in all its forms."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from baton.kernels import linear_table
from baton.kernels import skinny_linear as skinny_linear_module
from baton.kernels.linear_table import Config, choose, guess
from baton.kernels.reference_linear import skinny_linear_reference
from baton.kernels.skinny_linear import linear_work, skinny_linear

Check = Callable[[Tensor, Tensor], None]
Poisoned = Callable[..., Tensor]

FMA = Config("fma", 8, 256, num_warps=1, num_stages=2)
DOT = Config("dot", 16, 32)
DOT_SPLIT = Config("dot", 32, 16, split_k=3)
TMA = Config("tma", 16, 32, split_k=2)


def draw(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


PRODUCTS = [
    (FMA, 1, 40, 512),
    (FMA, 2, 19, 264),
    (FMA, 3, 8, 250),
    (FMA, 4, 24, 300),
    (DOT, 1, 48, 64),
    (DOT, 5, 33, 96),
    (DOT, 16, 16, 45),
    (DOT, 33, 17, 32),
    (Config("dot", 16, 32, block_m=16), 37, 20, 64),
    (DOT_SPLIT, 2, 32, 96),
    (DOT_SPLIT, 7, 70, 40),
    (DOT_SPLIT, 64, 33, 16),
    (TMA, 3, 48, 128),
    (TMA, 20, 24, 72),
    (None, 4, 30, 50),
    (None, 1, 30, 64),
]
AWKWARD = [(FMA, 3, 8, 250), (DOT, 5, 33, 96), (DOT_SPLIT, 7, 70, 40), (TMA, 20, 24, 72)]
"""One of each kind of kernel."""


@pytest.mark.parametrize(
    ("form", "config", "rows", "size_n", "size_k"),
    [
        *((form, *each) for form in ("plain", "all") for each in PRODUCTS),
        *((form, *each) for form in ("bias", "norm", "residual", "silu") for each in AWKWARD),
    ],
)
def test_products(
    form: str,
    config: Config | None,
    rows: int,
    size_n: int,
    size_k: int,
    device: torch.device,
    dtype: torch.dtype,
    poisoned: Poisoned,
    assert_close: Check,
) -> None:
    silu = form in ("silu", "all")
    x = draw(rows, size_k + 8, dtype=dtype, device=device)[:, :size_k]
    weight = draw(size_n * 2 if silu else size_n, size_k, dtype=dtype, device=device)
    weight *= size_k**-0.5
    bias = norm = residual = None
    if form in ("bias", "all"):
        bias = draw(weight.shape[0], dtype=dtype, device=device)
    if form in ("norm", "all"):
        norm = draw(size_k, dtype=dtype, device=device)
    if form in ("residual", "all"):
        residual = draw(rows, size_n, dtype=dtype, device=device)
    expected = skinny_linear_reference(
        x.double(),
        weight,
        bias,
        norm_weight=norm,
        eps=1e-5,
        residual=residual,
        activation="silu" if silu else None,
    )
    out = poisoned(rows, size_n + 3, dtype=dtype)[:, :size_n]
    for target in (out, residual):  # Written elsewhere, then in place.
        if target is not None:
            result = skinny_linear(
                x,
                weight,
                bias,
                norm_weight=norm,
                eps=1e-5,
                residual=residual,
                activation="silu" if silu else None,
                out=target,
                config=config,
            )
            assert result is target
            assert_close(target, expected)
    assert not linear_work(device).arrivals.any()


def test_streams_share_no_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft model's steps run beside those of the model."""
    made: list[tuple[Any, ...]] = []
    monkeypatch.setattr(skinny_linear_module, "_work_of_stream", lambda *key: made.append(key))
    for number in (1, 2):
        stream = SimpleNamespace(cuda_stream=number)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _, stream=stream: stream)
        linear_work(torch.device("cuda", 0))
    assert len(set(made)) == 2


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("config", [FMA, DOT, DOT_SPLIT])
@pytest.mark.parametrize("gated", [False, True])
def test_options_of_other_models(
    gated: bool,
    config: Config,
    device: torch.device,
    dtype: torch.dtype,
    poisoned: Poisoned,
    assert_close: Check,
) -> None:
    """A scale, gelu, and weights of the norm that are float32 whatever the rest is."""
    rows, size_n, size_k = 3, 33, 70
    x = draw(rows, size_k, dtype=dtype, device=device)
    weight = draw(size_n * (1 + gated), size_k, dtype=dtype, device=device) * size_k**-0.5
    options: dict[str, Any] = {
        "norm_weight": 1 + torch.randn(size_k, device=device) / 64,
        "eps": 1e-5,
        "residual": draw(rows, size_n, dtype=dtype, device=device),
        "activation": "gelu_tanh" if gated else None,
        "scale": 3.5,
    }
    bias = draw(weight.shape[0], dtype=dtype, device=device)
    expected = skinny_linear_reference(x.double(), weight, bias, **options)
    out = poisoned(rows, size_n, dtype=dtype)
    assert_close(skinny_linear(x, weight, bias, **options, out=out, config=config), expected)


def test_nothing_outside_is_written_or_read(
    device: torch.device, poisoned: Poisoned, assert_close: Check
) -> None:
    for config in (FMA, DOT, DOT_SPLIT):
        x = poisoned(4, 300, dtype=torch.float16)
        x[:3, :41] = torch.randn(3, 41, device=device).half()
        weight = draw(21, 41, dtype=torch.float16, device=device)
        whole = poisoned(5, 40, dtype=torch.float16)
        skinny_linear(x[:3, :41], weight, out=whole[1:4, 8:29], config=config)
        expected = skinny_linear_reference(x[:3, :41].double(), weight)
        assert_close(whole[1:4, 8:29], expected)
        written = torch.zeros_like(whole, dtype=torch.bool)
        written[1:4, 8:29] = True
        assert whole[~written].isnan().all()


def test_no_rows(device: torch.device) -> None:
    x = torch.empty(0, 64, device=device)
    assert skinny_linear(x, torch.empty(32, 64, device=device)).shape == (0, 32)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 32, 64, 100, 256])
@pytest.mark.parametrize("shape", [(6144, 4096), (4096, 14336), (128256, 4096), (5120, 5120)])
@pytest.mark.parametrize("fused", [False, True])
def test_choices_are_possible(rows: int, shape: tuple[int, int], fused: bool) -> None:
    config = choose(rows, *shape, torch.bfloat16, fused=fused)
    if config is not None:
        assert config.variant in ("fma", "dot", "tma")
        assert config.variant != "fma" or (rows <= 4 and config.split_k == 1)
        for block in (config.block_n, config.block_k):
            assert block & (block - 1) == 0


def test_what_was_measured_with_fewer_rows_or_far_more_is_not_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured = Config("dot", 128, 64)
    entries = tuple(linear_table._Entry(rows, 4096, 4096, False, measured) for rows in (8, 32))
    monkeypatch.setattr(linear_table, "_TABLE", entries)
    chosen = {M: choose(M, 4096, 4096, torch.bfloat16, fused=False) for M in (1, 2, 9, 32, 33, 128)}
    assert chosen[2] == chosen[9] == chosen[32] == measured
    assert chosen[1] == guess(1, 4096, 4096) and chosen[33] == guess(33, 4096, 4096)
    assert chosen[128] is None


def test_small_and_wide_products_are_left_to_the_library() -> None:
    assert guess(8, 256, 256) is None
    assert choose(8, 4096, 4096, torch.float32, fused=False) is None
    assert choose(257, 4096, 4096, torch.bfloat16, fused=False) is None
