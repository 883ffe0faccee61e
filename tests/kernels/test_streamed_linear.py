"""Products of a few rows that stream codes to tensor cores: what is chosen, compiled, computed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from torch.nn.functional import gelu, rms_norm, silu

from baton.kernels import streamed_linear as kernels
from baton.kernels.reference_scaled import GROUP, InputScheme, quantise_rows_reference
from baton.kernels.skinny_linear import MAX_PARTIALS
from baton.kernels.small_linear import (
    SmallWeight,
    by_groups,
    small_linear,
    takes_activation,
    takes_norm,
)
from baton.kernels.streamed_linear import StreamConfig, streamed_config, streamed_linear
from tests.device import ROOT, process_environment
from tests.kernels.test_scaled_linear import make_weight, on, rand
from tests.kernels.test_small_linear import make

AssertClose = Callable[[Tensor, Tensor], None]
Poisoned = Callable[..., Tensor]
CONFIGS = {
    "one step": StreamConfig(16, 128, 2, ahead=1),
    "steps": StreamConfig(32, 64, 2, 2, ahead=2),
    "in turn": StreamConfig(16, 64, 1, ahead=4, programs=2),
    "split": StreamConfig(32, 64, 1, 2, ahead=1, split_k=2),
    "split, in turn": StreamConfig(16, 64, 2, 1, ahead=1, split_k=2, programs=3),
}
"""For rows of 256 bytes of codes."""


# What is chosen


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the kernel could run here."""
    monkeypatch.setattr(kernels, "_USABLE", True)
    monkeypatch.setattr(kernels, "_runs_on", lambda _: True)


def _on_paper(
    kind: str, num_out: int, num_in: int, group: int, *, has_offset: bool = False
) -> SmallWeight:
    width, dtype = num_in, {"int8": torch.int8, "float8": torch.float8_e4m3fn}.get(kind)
    if dtype is None:
        width, dtype = num_in // 2, torch.uint8
    scale = torch.empty(num_out, num_in // group if group else 1, device="meta")
    codes = torch.empty(num_out, width, dtype=dtype, device="meta")
    return SmallWeight(codes, scale, scale if has_offset else None, num_in)


FOUR_BITS = _on_paper("four bits", 4096, 4096, 128)
FLOAT8 = _on_paper("float8", 4096, 4096, 0)


def test_takes_few_rows(on_hopper: None) -> None:
    bf16 = torch.bfloat16
    for weight in (FOUR_BITS, _on_paper("four bits", 4096, 4096, 128, has_offset=True)):
        for rows in (1, 2, 16):
            assert streamed_config(rows, weight, bf16) is not None
            assert takes_norm(rows, weight, bf16) == (rows == 1)
            assert takes_activation(rows, weight, bf16)
        assert streamed_config(17, weight, bf16) is None
    # What a row is multiplied by, and in which order, is the same beside others.
    assert len({streamed_config(rows, FOUR_BITS, bf16) for rows in range(2, 17)}) == 1
    for scheme in (InputScheme(), InputScheme(scale=torch.ones(1))):
        assert streamed_config(1, FLOAT8, bf16, scheme) is not None
        assert takes_norm(1, FLOAT8, bf16, scheme)
        assert streamed_config(2, FLOAT8, bf16, scheme) is None
    assert streamed_config(1, FLOAT8, bf16) is None


def test_float16_is_not_multiplied_by_a_norms_weight_first(on_hopper: None) -> None:
    """It may be beyond 65504 then, or below 2⁻²⁴, though its norm is not."""
    assert not takes_norm(1, FOUR_BITS, torch.float16)
    assert takes_activation(1, FOUR_BITS, torch.float16)
    # Codes are made in float32.
    assert takes_norm(1, FLOAT8, torch.float16, InputScheme())


@pytest.mark.parametrize("num_out", [2112, 4096, 28672, 57344, 128256, 152064])
@pytest.mark.parametrize("num_in", [1024, 3584, 4096, 8192, 14336, 28672])
def test_configurations_fit(on_hopper: None, num_out: int, num_in: int) -> None:
    """Steps that are loaded ahead, and programs, come out even; x has room in shared memory, and
    what splits leave where they are added up."""
    found = []
    for rows in (1, 16):
        weight = _on_paper("four bits", num_out, num_in, 128)
        found.append((rows, weight, streamed_config(rows, weight, torch.bfloat16)))
    weight = _on_paper("float8", num_out, num_in, 0)
    found.append((1, weight, streamed_config(1, weight, torch.bfloat16, InputScheme())))
    for rows, weight, config in found:
        if config is None:
            continue
        steps, rest = divmod(weight.codes.shape[1], config.split_k * config.warps_k * config.step)
        assert rest == 0 and steps % config.ahead == 0 and num_out % config.block_n == 0
        columns = 8 if rows == 1 else rows
        exchanged = 4 * config.warps_k * config.block_n * columns
        assert 2 * rows * num_in // config.split_k + exchanged <= 232_448
        assert config.split_k == 1 or config.split_k * num_out * columns <= MAX_PARTIALS


@pytest.mark.parametrize(
    ("weight", "dtype", "inputs"),
    [
        (FOUR_BITS, torch.float32, None),
        (_on_paper("int8", 4096, 4096, 0), torch.bfloat16, InputScheme(torch.int8)),
        (_on_paper("four bits", 4096, 4096, 32), torch.bfloat16, None),
        (_on_paper("four bits", 4096, 4096, 0, has_offset=True), torch.bfloat16, None),
        (_on_paper("four bits", 4104, 4096, 128), torch.bfloat16, None),
        (_on_paper("float8", 4096, 4128, 0), torch.bfloat16, InputScheme()),
        (_on_paper("float8", 4096, 4096, 128), torch.bfloat16, InputScheme(group=GROUP)),
        (_on_paper("float8", 1024, 4096, 0), torch.bfloat16, InputScheme()),
    ],
    ids=[
        "float32", "int8", "short runs", "offset of a row", "odd rows", "odd columns", "blocks",
        "few rows",
    ],
)  # fmt: skip
def test_does_not_take(
    on_hopper: None, weight: SmallWeight, dtype: torch.dtype, inputs: InputScheme | None
) -> None:
    for rows in (1, 8):
        assert streamed_config(rows, weight, dtype, inputs) is None


def test_scales_lie_by_groups_where_it_streams(on_hopper: None) -> None:
    weight = _on_paper("four bits", 4096, 4096, 128)
    weight = replace(weight, scale=rand(4096, 32), offset=rand(4096, 32, seed=1))
    turned = by_groups(weight, torch.bfloat16)
    assert turned.offset is not None and weight.offset is not None
    assert torch.equal(turned.scale, weight.scale) and torch.equal(turned.offset, weight.offset)
    assert turned.scale.stride() == turned.offset.stride() == (1, 4096)
    others = [
        FLOAT8,
        _on_paper("four bits", 4096, 4096, 0),
        _on_paper("four bits", 4096, 4096, 32),
        # One row streams, two do not.
        _on_paper("four bits", 2112, 2048, 128),
    ]
    assert all(by_groups(other, torch.bfloat16) is other for other in others)
    assert by_groups(FOUR_BITS, torch.float32) is FOUR_BITS


def test_is_for_hopper_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_USABLE", True)
    assert streamed_config(1, FOUR_BITS, torch.bfloat16) is None
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert "interpreter" in (kernels.problem() or "")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert kernels.problem() is None
    monkeypatch.setattr(triton, "__version__", "4.0.0")
    assert "4.0.0" in (kernels.problem() or "")


# Many rows with offsets: nothing has more registers.
@pytest.mark.parametrize(("form", "rows"), [("fp8", "1"), ("int4", "1"), ("int4-offsets", "16")])
def test_compiles(form: str, rows: str, tmp_path: Path) -> None:
    """For a real GPU, though there may be none: not in this process, which interprets kernels."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_streamed_linear", form, rows],
        env=process_environment(TRITON_CACHE_DIR=str(tmp_path)),
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for product, report in json.loads(done.stdout).items():
        assert report["shared"] <= 232_448, product
        assert report["spilled"] <= 64, product


# What is computed


@pytest.fixture
def stream_device(device: torch.device) -> torch.device:
    if not kernels._runs_on(device):
        pytest.skip("a kernel for compute capability 9.0 only")
    return device


NUM_IN = 512
KINDS = {"groups": (4, False), "offsets": (4, True), "one scale": (1, False)}
"""Groups of a row, whether they have offsets."""


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "config", "dtype"),
    [
        *((13, each, torch.bfloat16) for each in CONFIGS.values()),
        *((rows, CONFIGS["steps"], torch.float16) for rows in (1, 3, 16)),
        (1, CONFIGS["split, in turn"], torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize(("groups", "has_offset"), KINDS.values(), ids=KINDS)
def test_against_float64(
    groups: int,
    has_offset: bool,
    dtype: torch.dtype,
    rows: int,
    config: StreamConfig,
    stream_device: torch.device,
    poisoned: Poisoned,
    assert_close: AssertClose,
) -> None:
    device, num_out = stream_device, 96
    weight, numbers = make("four bits", num_out, NUM_IN, groups, device, has_offset=has_offset)
    # Rows of all but one are strided; gated results are not beyond what float16 holds.
    x = (rand(rows, weight.num_in + 8) / 4).to(device, dtype)[:, : weight.num_in]
    bias = rand(num_out, seed=5).to(device, dtype)
    residual = rand(rows, num_out + 3, seed=6).to(device, dtype)[:, :num_out]
    out = poisoned(rows, num_out + 5, dtype=dtype)[:, :num_out]
    product = x.double().cpu() @ numbers.t()
    assert_close(streamed_linear(x, weight, out, config=config), product)
    expected = (product + bias.double().cpu()) * 0.25 + residual.double().cpu()
    streamed_linear(x, weight, residual, config=config, bias=bias, residual=residual, scale=0.25)
    assert_close(residual, expected)
    out = poisoned(rows, num_out // 2, dtype=dtype)
    gate, up = product.chunk(2, 1)
    assert_close(streamed_linear(x, weight, out, config=config, activation="silu"), silu(gate) * up)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [CONFIGS["one step"], CONFIGS["in turn"]], ids=str)
@pytest.mark.parametrize("has_offset", [False, True])
def test_norm(
    has_offset: bool,
    config: StreamConfig,
    stream_device: torch.device,
    poisoned: Poisoned,
    assert_close: AssertClose,
) -> None:
    device, dtype = stream_device, torch.bfloat16
    weight, numbers = make("four bits", 64, NUM_IN, 2, device, has_offset=has_offset)
    x = rand(1, weight.num_in).to(device, dtype)
    for gain in (rand(weight.num_in, seed=9).to(device), rand(weight.num_in, seed=9).to(x)):
        out = poisoned(1, 64, dtype=dtype)
        streamed_linear(x, weight, out, config=config, norm_weight=gain, eps=1e-3)
        normed = rms_norm(x.double(), (weight.num_in,), gain.double(), 1e-3)
        assert_close(out, normed.cpu() @ numbers.t())


_SCHEMES = {
    "by row": InputScheme(),
    "scale given": InputScheme(scale=torch.tensor([0.01])),
}


@pytest.mark.gpu
@pytest.mark.parametrize("programs", [0, 2])
@pytest.mark.parametrize("scheme", _SCHEMES.values(), ids=_SCHEMES)
def test_small_inputs(
    scheme: InputScheme,
    programs: int,
    stream_device: torch.device,
    poisoned: Poisoned,
    assert_close: AssertClose,
) -> None:
    device, dtype, num_in, num_out = stream_device, torch.bfloat16, 512, 96
    config = StreamConfig(32, 128, 2, 2, ahead=2, programs=programs)
    weight, numbers = make_weight(num_out, num_in, scheme.dtype, 0, device)
    numbers /= 1000
    weight.scale.div_(1000)
    scheme = on(device, scheme)
    x = rand(1, num_in).to(device, dtype)
    residual = rand(1, num_out, seed=5).to(device, dtype)
    product = quantise_rows_reference(x, scheme).expand(torch.float64).cpu() @ numbers.t()
    out = poisoned(1, num_out, dtype=dtype)
    streamed_linear(x, weight, out, config=config, residual=residual, inputs=scheme, scale=0.25)
    assert_close(out, product * 0.25 + residual.double().cpu())
    gain = rand(num_in, seed=9).to(device)
    normed = rms_norm(x.float(), (num_in,), gain, 1e-3)
    product = quantise_rows_reference(normed, scheme).expand(torch.float64).cpu() @ numbers.t()
    gate, up = product.chunk(2, 1)
    options: dict[str, Any] = {"norm_weight": gain, "eps": 1e-3, "inputs": scheme}
    out = poisoned(1, num_out // 2, dtype=dtype)
    streamed_linear(x, weight, out, config=config, activation="silu", **options)
    # A code that is rounded to its neighbour, for sums of another order, is an eighth off.
    off = (out.double().cpu() - silu(gate) * up).norm() / (silu(gate) * up).norm()
    assert float(off) < 1e-2
    for bad in (float("nan"), float("inf")):
        x[0, 200] = bad
        streamed_linear(
            x, weight, out := poisoned(1, num_out, dtype=dtype), config=config, inputs=scheme
        )
        assert out.isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_row_does_not_depend_on_others(config: StreamConfig, stream_device: torch.device) -> None:
    weight, _ = make("four bits", 96, NUM_IN, 4, stream_device, has_offset=True)
    x = rand(16, weight.num_in).to(stream_device, torch.bfloat16)

    def product(x: Tensor) -> Tensor:
        return streamed_linear(x, weight, x.new_empty((len(x), 96)), config=config)

    all_rows = product(x)
    for _ in range(10):
        assert torch.equal(product(x), all_rows)
    for count in (2, 7, 9):
        assert torch.equal(product(x[:count]), all_rows[:count])
    x[3] = float("nan")
    others = [row for row in range(16) if row != 3]
    assert torch.equal(product(x)[others], all_rows[others])


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 13])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_scales_by_groups(config: StreamConfig, rows: int, stream_device: torch.device) -> None:
    weight, _ = make("four bits", 96, NUM_IN, 4, stream_device, has_offset=True)
    assert weight.offset is not None
    scale, offset = (each.t().contiguous().t() for each in (weight.scale, weight.offset))
    turned = replace(weight, scale=scale, offset=offset)
    x = rand(rows, NUM_IN).to(stream_device, torch.bfloat16)
    for activation in (None, "silu"):
        products = [
            streamed_linear(
                x, each, x.new_empty((rows, 48 if activation else 96)), config=config,
                activation=activation,
            )
            for each in (weight, turned)
        ]  # fmt: skip
        assert torch.equal(*products)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize(
    ("num_out", "num_in"), [(2560, 1024), (4096, 4096), (20480, 4096), (3584, 14336)]
)
def test_chosen_configurations(
    num_out: int,
    num_in: int,
    rows: int,
    stream_device: torch.device,
    poisoned: Poisoned,
    assert_close: AssertClose,
) -> None:
    """As an engine launches them, one behind the other."""
    device, dtype = stream_device, torch.bfloat16
    weight, numbers = make("four bits", num_out, num_in, num_in // 128, device, has_offset=False)
    weight, numbers = by_groups(weight, dtype), numbers.to(device)
    assert weight.scale.stride(0) == 1
    assert streamed_config(rows, weight, dtype) is not None
    x = rand(rows, num_in).to(device, dtype)
    residual = rand(rows, num_out, seed=5).to(device, dtype)
    expected = 2 * (x.double() @ numbers.t()) + residual.double()
    for _ in range(2):
        small_linear(x, weight, residual=residual, out=residual, pdl=True)
    gated = small_linear(
        x, weight, activation="gelu_tanh", out=poisoned(rows, num_out // 2, dtype=dtype), pdl=True
    )
    assert_close(residual, expected)
    gate, up = (x.double() @ numbers.t()).chunk(2, 1)
    assert_close(gated, gelu(gate, approximate="tanh") * up)
