"""Products of codes on compute capability 9.0: what is chosen, compiled, computed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from baton.kernels import hopper_scaled as kernels
from baton.kernels.hopper_scaled import hopper_scaled, hopper_scaled_gated
from baton.kernels.quantised_rows import quantise_known, quantise_rows
from baton.kernels.reference_scaled import (
    GROUP,
    InputScheme,
    QuantisedRows,
    quantise_rows_reference,
)
from baton.kernels.scaled_table import ROWS, HopperConfig, choose_gated, choose_hopper
from baton.kernels.skinny_linear import MAX_PARTIALS
from baton.kernels.small_linear import SmallWeight
from baton.shared.engine.operations import GatedLinears, Norm
from baton.shared.engine.quantised.stored import StoredLinear
from baton.shared.engine.triton_operations import TritonOperations
from tests.device import ROOT, process_environment
from tests.kernels.test_scaled_linear import make_weight, rand

AssertClose = Callable[[Tensor, Tensor], None]
Poisoned = Callable[..., Tensor]
FLOAT8 = torch.float8_e4m3fn
CONFIGS = {
    "whole": HopperConfig(32, 64, 3),
    "split unevenly": HopperConfig(16, 64, 2, split_k=4),
    "more places than steps": HopperConfig(32, 128, 5, split_k=2),
    "in runs": HopperConfig(32, 64, 4, run=2),
    "fast": HopperConfig(32, 64, 2, is_fast=True),
    "fast, in runs": HopperConfig(64, 64, 4, run=2, is_fast=True),
    "fast, split, eight warps": HopperConfig(64, 128, 3, split_k=2, num_warps=8, is_fast=True),
}
"""For rows of 768 columns, which are six steps."""
NUM_IN = 768


# What is chosen


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("num_out", [4096, 5120, 6144, 7680, 28672, 35840])
@pytest.mark.parametrize("num_in", [4096, 5120, 14336, 17920])
def test_configurations_fit(rows: int, num_out: int, num_in: int) -> None:
    """Of what was measured and what is like it: tiles have room in shared memory, and what splits
    leave where they are added up."""
    for parts, config in (
        (1, choose_hopper(rows, num_out, num_in)),
        (2, choose_gated(rows, num_out, num_in)),
    ):
        if config is None:
            continue
        step_bytes = (config.block_m + parts * config.block_n) * kernels.STEP
        assert config.places * (step_bytes + 8) + 1024 <= 232_448
        assert config.places % config.run == 0
        assert config.places > config.run or not config.is_fast
        # A tile's sums have room in the registers of a program.
        assert config.block_m * config.block_n * parts <= 128 * 32 * config.num_warps
        assert config.block_n >= 16 * config.num_warps
        tiles = -(-num_out // parts // config.block_n) * -(-rows // config.block_m)
        tile_size = config.block_m * config.block_n * parts
        assert config.split_k == 1 or config.split_k * tiles * tile_size <= MAX_PARTIALS


def test_what_it_covers(monkeypatch: pytest.MonkeyPatch) -> None:
    def weight(num_in: int, dtype: torch.dtype, group: int = 0) -> SmallWeight:
        return make_weight(128, num_in, dtype, group, torch.device("cpu"))[0]

    assert not kernels.covers(weight(256, FLOAT8), torch.bfloat16)
    monkeypatch.setattr(kernels, "_USABLE", True)
    assert not kernels.covers(weight(256, FLOAT8), torch.bfloat16)
    monkeypatch.setattr(kernels, "_runs_on", lambda _: True)
    assert kernels.covers(weight(256, FLOAT8), torch.bfloat16)
    assert kernels.covers(weight(256, FLOAT8), torch.float16)
    assert not kernels.covers(weight(256, FLOAT8), torch.float32)
    assert not kernels.covers(weight(256, FLOAT8, GROUP), torch.bfloat16)
    assert not kernels.covers(weight(256, torch.int8), torch.bfloat16)
    assert not kernels.covers(weight(192, FLOAT8), torch.bfloat16)


@pytest.mark.parametrize(
    "config",
    [
        HopperConfig(32, 64, 2, run=2, is_fast=True),
        HopperConfig(32, 64, 3, run=2),
        HopperConfig(8, 64, 2),
        HopperConfig(32, 64, 2, num_warps=8),
    ],
    ids=["nothing is freed", "unequal runs", "few rows", "many warps"],
)
def test_configurations_that_there_are_not(config: HopperConfig) -> None:
    """Told, where a kernel would wait forever, or add twice to a residual."""
    weight = make_weight(128, NUM_IN, FLOAT8, 0, torch.device("cpu"))[0]
    x, _ = codes_of(rand(40, NUM_IN), torch.device("cpu"))
    with pytest.raises(AssertionError):
        hopper_scaled(x, weight, config=config)


def test_compiles(tmp_path: Path) -> None:
    """For a real GPU, though there may be none: not in this process, which interprets kernels."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_hopper_scaled", "32", "256"],
        env=process_environment(TRITON_CACHE_DIR=str(tmp_path)),
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    reports = json.loads(done.stdout)
    assert reports
    for product, report in reports.items():
        assert report["shared"] <= 232_448, product
        assert report["spilled"] <= 256, product
        assert report["is_settled"], product


# What is computed


@pytest.fixture
def hopper(device: torch.device) -> torch.device:
    if not kernels._runs_on(device):
        pytest.skip("a kernel for compute capability 9.0 only")
    return device


def codes_of(x: Tensor, device: torch.device) -> tuple[QuantisedRows, Tensor]:
    """And the numbers that they are, float64."""
    rows = quantise_rows_reference(x, InputScheme())
    scale = rows.scale.t().contiguous().t()
    return QuantisedRows(rows.codes.to(device), scale.to(device)), rows.expand(torch.float64)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 21, 70])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_against_float64(
    config: HopperConfig,
    rows: int,
    dtype: torch.dtype,
    hopper: torch.device,
    poisoned: Poisoned,
    assert_close: AssertClose,
) -> None:
    """Neither columns nor rows are whole tiles; 70 rows are several."""
    num_out = 200
    weight, numbers = make_weight(num_out, NUM_IN, FLOAT8, 0, hopper)
    x, wide = codes_of(rand(rows, NUM_IN) / 1000, hopper)
    bias = rand(num_out, seed=5).to(hopper, dtype)
    residual = rand(rows, num_out + 3, seed=6).to(hopper, dtype)[:, :num_out]
    product = wide @ numbers.t()
    out = poisoned(rows, num_out + 5, dtype=dtype)[:, :num_out]
    assert_close(hopper_scaled(x, weight, out=out, config=config), product)
    expected = (product + bias.double().cpu()) * 0.25 + residual.double().cpu()
    hopper_scaled(x, weight, bias, residual=residual, scale=0.25, out=residual, config=config)
    assert_close(residual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 21, 70])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gated(
    config: HopperConfig, rows: int, hopper: torch.device, assert_close: AssertClose
) -> None:
    weight, numbers = make_weight(2 * 200, NUM_IN, FLOAT8, 0, hopper)
    x, wide = codes_of(rand(rows, NUM_IN) / 1000, hopper)
    gate, up = (wide @ numbers.t()).bfloat16().double().chunk(2, 1)
    for _ in range(2):
        y, maxima = hopper_scaled_gated(x, weight, "silu", config=config, pdl=True)
    assert_close(y, silu(gate) * up)
    assert torch.equal(maxima.view(torch.float32).amax(1), y.float().abs().amax(1))
    got, expected = quantise_known(y, maxima, InputScheme()), quantise_rows(y, InputScheme())
    assert torch.equal(got.codes.view(torch.uint8), expected.codes.view(torch.uint8))
    assert torch.equal(got.scale, expected.scale)


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_row_does_not_depend_on_others(config: HopperConfig, hopper: torch.device) -> None:
    weight, _ = make_weight(400, NUM_IN, FLOAT8, 0, hopper)
    x, _ = codes_of(rand(40, NUM_IN), hopper)

    def product(count: int) -> Tensor:
        scale = x.scale.t()[:, :count].contiguous().t()
        some = QuantisedRows(x.codes[:count], scale)
        plain = hopper_scaled(some, weight, config=config, pdl=True)
        gated, maxima = hopper_scaled_gated(some, weight, "silu", config=config, pdl=True)
        return torch.cat([plain, gated, maxima.to(plain)], 1)

    all_rows = product(40)
    for _ in range(10):
        assert torch.equal(product(40), all_rows)
    for count in (1, 7, 33):
        assert torch.equal(product(count), all_rows[:count])
    # Of numbers that were not all finite the scale is none.
    x.scale[3] = float("nan")
    others = [row for row in range(40) if row != 3]
    after = product(40)
    assert torch.equal(after[others], all_rows[others])
    assert after[3, :600].isnan().all()


SIZES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]


@pytest.mark.gpu
@pytest.mark.parametrize(("num_out", "num_in"), SIZES)
def test_chosen_configurations(
    num_out: int, num_in: int, hopper: torch.device, assert_close: AssertClose
) -> None:
    """As an engine launches them, one behind the other."""
    weight, numbers = make_weight(num_out, num_in, FLOAT8, 0, hopper)
    turned = numbers.to(hopper).t()
    for rows in (1, *ROWS):
        x, wide = codes_of(rand(rows, num_in) / 1000, hopper)
        product = (wide.to(hopper) @ turned).cpu()
        config = choose_hopper(rows, num_out, num_in)
        if config is not None:
            residual = rand(rows, num_out, seed=6).to(hopper, torch.bfloat16)
            expected = 2 * product + residual.double().cpu()
            for _ in range(2):
                hopper_scaled(x, weight, residual=residual, out=residual, config=config, pdl=True)
            assert_close(residual, expected)
        gated = choose_gated(rows, num_out, num_in)
        if gated is not None:
            y, _ = hopper_scaled_gated(x, weight, "silu", config=gated, pdl=True)
            gate, up = product.bfloat16().double().chunk(2, 1)
            assert_close(y, silu(gate) * up)


@pytest.mark.gpu
def test_an_mlp(hopper: torch.device) -> None:
    """As an engine computes it, with its norm, beside products of the same codes."""
    inputs, layers, turned = InputScheme(), [], []
    for num_out, num_in in SIZES[2:]:
        weight, numbers = make_weight(num_out, num_in, FLOAT8, 0, hopper)
        less = 30 * num_in**0.5
        weight.scale.div_(less)
        turned.append(numbers.to(hopper, torch.float32).t().div_(less))
        empty = torch.empty(0, dtype=torch.bfloat16, device=hopper)
        layers.append(StoredLinear(empty, None, num_out, num_in, inputs=inputs, stored=weight))
    ops = TritonOperations(
        overlaps=True, keeps_small=True, takes_float8=True, quantises_inputs=True
    )
    gain = rand(4096, seed=9).to(hopper, torch.bfloat16)
    for rows in (2, 16, 20, 64, 200):
        x = rand(rows, 4096).to(hopper, torch.bfloat16)
        residual = rand(rows, 4096, seed=6).to(x)
        normed = rms_norm(x.float(), (4096,), gain.float(), 1e-5)
        both = quantise_rows_reference(normed, inputs).expand(torch.float32) @ turned[0]
        gate, up = both.bfloat16().float().chunk(2, 1)
        rows_of = quantise_rows_reference(silu(gate) * up, inputs)
        expected = rows_of.expand(torch.float32) @ turned[1] + residual.float()
        got = ops.gated_mlp(x, Norm(gain, 1e-5), GatedLinears(*layers), residual=residual)
        # A code that is rounded to its neighbour, for sums of another order, is an eighth off.
        assert float((got.float() - expected).norm() / expected.norm()) < 2e-2
