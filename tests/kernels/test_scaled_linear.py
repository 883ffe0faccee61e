"""Activations made small, and products with them, against float64; outputs poisoned."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from baton.kernels import library_product
from baton.kernels import scaled_linear as scaled_linear_module
from baton.kernels.library_product import add_product
from baton.kernels.quantised_rows import quantise_known, quantise_rows
from baton.kernels.reference_scaled import (
    GROUP,
    InputScheme,
    QuantisedRows,
    quantise_rows_reference,
)
from baton.kernels.scaled_linear import scaled_linear, scaled_product
from baton.kernels.scaled_table import ROWS, ScaledConfig, choose
from baton.kernels.small_linear import FewConfig, SmallWeight, small_linear
from baton.shared.engine import device_choices, triton_operations
from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.quantised.stored import StoredLinear, pack_stored, scaled
from baton.shared.engine.quantised.weight import QuantisedWeight
from baton.shared.engine.reference_operations import ReferenceOperations
from baton.shared.engine.token_budgets import SHORT_CHUNKS
from baton.shared.engine.triton_operations import TritonOperations
from tests.kernels.test_engine import SMALL, maker

AssertClose = Callable[[Tensor, Tensor], None]
Poisoned = Callable[..., Tensor]
FLOAT8, INT8 = torch.float8_e4m3fn, torch.int8
SCHEMES = {
    "float8": InputScheme(),
    "float8 in groups": InputScheme(group=GROUP),
    "float8, scale given": InputScheme(scale=torch.tensor([0.01])),
    "int8": InputScheme(INT8),
}


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def on(device: torch.device, scheme: InputScheme) -> InputScheme:
    given = None if scheme.scale is None else scheme.scale.to(device)
    return InputScheme(scheme.dtype, scheme.group, given)


def make_weight(
    num_out: int, num_in: int, dtype: torch.dtype, group: int, device: torch.device
) -> tuple[SmallWeight, Tensor]:
    """And its numbers, float64."""
    codes = (rand(num_out, num_in, seed=3) * 30).clamp(-127, 127).to(dtype)
    shape = (-(-num_out // GROUP), num_in // GROUP) if group else (num_out, 1)
    scale = rand(*shape, seed=1).abs() + 0.5
    numbers = scale.double()
    if group:
        numbers = numbers.repeat_interleave(GROUP, 0)[:num_out].repeat_interleave(GROUP, 1)
    weight = SmallWeight(
        codes.to(device), scale.to(device), None, num_in, rows_per_scale=group or 1
    )
    return weight, codes.double() * numbers


# Codes of activations


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("form", ["plain", "norm", "gated"])
def test_codes_are_the_nearest(
    form: str, scheme: InputScheme, dtype: torch.dtype, device: torch.device
) -> None:
    size = 384
    x = rand(5, (2 if form == "gated" else 1) * size + 8)[:, :-8] * 3
    # A row of nothing, one of tiny numbers, and one with a number far from all others.
    x[1] = 0
    x[2] *= 1e-3
    x[3, 7] = 300
    x = x.to(device, dtype)
    gain = rand(size, seed=2).to(device)
    options: dict[str, Any] = {}
    wide = x.float()
    if form == "norm":
        options = {"norm_weight": gain, "eps": 1e-3}
        wide = rms_norm(wide, (size,), gain, 1e-3)
    elif form == "gated":
        options = {"activation": "silu"}
        wide = silu(wide[:, :size]) * wide[:, size:]
    scheme = on(device, scheme)
    got, expected = quantise_rows(x, scheme, **options), quantise_rows_reference(wide, scheme)
    assert got.num_rows == len(x)
    torch.testing.assert_close(got.scale[:5], expected.scale, rtol=1e-5, atol=0)
    # Sums of another order may round to the code beside it.
    codes = got.codes[:5].float()
    same = codes == expected.codes.float()
    assert float(same.float().mean()) > 0.99
    step = expected.codes.float().abs() / 8 + (1 if scheme.dtype == INT8 else 2**-9)
    assert bool(((codes - expected.codes.float()).abs() <= step).all())
    alone = quantise_rows(x[3:4], scheme, **options)
    assert torch.equal(alone.codes.view(torch.uint8)[0], got.codes.view(torch.uint8)[3])
    assert torch.equal(alone.scale[0], got.scale[3])


@pytest.mark.parametrize("form", ["plain", "norm", "gated"])
def test_codes_are_those_of_few_rows(form: str, dtype: torch.dtype, device: torch.device) -> None:
    """A step of many rows has other threads."""
    size = 17 * GROUP
    x = rand(140, (2 if form == "gated" else 1) * size).to(device, dtype)
    options: dict[str, Any] = {}
    if form == "norm":
        options = {"norm_weight": rand(size, seed=2).to(device), "eps": 1e-3}
    elif form == "gated":
        options = {"activation": "silu"}
    many, few = (quantise_rows(each, InputScheme(), **options) for each in (x, x[-5:]))
    torch.testing.assert_close(many.scale[-5:], few.scale, rtol=1e-5, atol=0)
    same = many.codes[-5:].view(torch.uint8) == few.codes.view(torch.uint8)
    if form == "norm":
        # Sums of another order.
        assert float(same.float().mean()) > 0.99
    else:
        assert same.all()


@pytest.mark.parametrize("name", ["float8", "float8, scale given", "int8"])
@pytest.mark.parametrize("size", [384, 4200])
def test_codes_of_numbers_whose_largest_are_known(
    size: int, name: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Are those that would be made without."""
    scheme, num_parts = on(device, SCHEMES[name]), 3
    x = rand(5, size).to(device, dtype)
    x[1] = 0
    x[2, size // 2] = float("nan")
    x[3, -1] = float("-inf")
    of_parts = x.float().abs().view(5, num_parts, -1).nan_to_num(float("inf"), float("inf")).amax(2)
    maxima = of_parts.view(torch.int32)
    got, expected = quantise_known(x, maxima, scheme), quantise_rows(x, scheme)
    torch.testing.assert_close(got.scale, expected.scale, rtol=0, atol=0, equal_nan=True)
    finite = [0, 1, 4]
    assert torch.equal(
        got.codes.view(torch.uint8)[finite], expected.codes.view(torch.uint8)[finite]
    )


def test_every_float8_is_met(device: torch.device) -> None:
    """Codes of numbers that are codes are these: subnormal ones, ties and carries too."""
    numbers = torch.arange(256, dtype=torch.uint8).view(FLOAT8).float()
    numbers = numbers[numbers.isfinite()]
    between = (numbers[:-1] + numbers[1:]) / 2
    x = torch.cat([numbers, between, torch.zeros(3)])[None].to(device)
    got = quantise_rows(x, InputScheme(scale=torch.ones(1, device=device)))
    assert torch.equal(got.codes.float(), x.to(FLOAT8).float())


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_made_so(
    bad: float, scheme: InputScheme, device: torch.device
) -> None:
    """Who draws a token sees that there is none; rows beside it are what they are."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    num_out, num_in = 32, 384
    weight, _ = make_weight(num_out, num_in, scheme.dtype, scheme.group, device)
    weight.scale.div_(1000)
    scheme = on(device, scheme)
    x = rand(3, num_in).to(device, dtype)
    x[1, 200] = bad
    rows = quantise_rows(x, scheme)
    assert rows.expand(torch.float32)[1].isnan().any()
    assert not quantise_rows_reference(x, scheme).expand(torch.float32)[1].isfinite().all()
    y = scaled_linear(rows, weight, dtype=dtype)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()
    one = small_linear(x[1:2], weight, inputs=scheme, config=FewConfig(4, 256, 4))
    assert one.isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["float8", "float8 in groups", "float8, scale given"])
@pytest.mark.parametrize("rows", [2, 32, 144, 256, 272, 512])
def test_what_is_not_finite_comes_out_of_every_product(
    rows: int, name: str, device: torch.device
) -> None:
    """Ours and the library's, added to a residual or not: all of that row, and no other."""
    num_out, num_in = 6144, 4096
    scheme = on(device, SCHEMES[name])
    weight, _ = make_weight(num_out, num_in, FLOAT8, scheme.group, device)
    weight.scale.div_(1000)
    x = rand(rows, num_in).to(device, torch.bfloat16)
    x[1, 200], x[rows // 2, -1] = float("inf"), float("nan")
    is_bad = torch.zeros(rows, dtype=torch.bool, device=device)
    is_bad[[1, rows // 2]] = True
    codes = quantise_rows(x, scheme)
    for residual in (None, torch.zeros(rows, num_out, dtype=torch.bfloat16, device=device)):
        y = scaled_product(codes, weight, residual=residual)
        assert y[is_bad].isnan().all() and y[~is_bad].isfinite().all()


def test_rows_of_large_models(device: torch.device) -> None:
    """Of more numbers than a hidden state has: gates of llama-70b have 28,672."""
    x = rand(2, 2 * 20096).to(device)
    got = quantise_rows(x, InputScheme(group=GROUP), activation="silu")
    expected = quantise_rows_reference(silu(x[:, :20096]) * x[:, 20096:], InputScheme(group=GROUP))
    torch.testing.assert_close(got.scale[:2], expected.scale, rtol=1e-5, atol=0)
    same = got.codes[:2].float() == expected.codes.float()
    assert float(same.float().mean()) > 0.99
    too_wide = SmallWeight(torch.empty(8, 2**17, dtype=INT8), torch.ones(8, 1), None, 2**17)
    assert scaled(too_wide, InputScheme(INT8)) is None


# Products


def test_warm_up_meets_all_rows_of_the_table() -> None:
    """Steps that are launched, not replayed, wait for no kernel either."""
    assert {next(each for each in ROWS if rows <= each) for rows in SHORT_CHUNKS} == {*ROWS}


def test_tiles_fit_where_there_is_less_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table measured on an H200 serves on all GPUs from compute capability 9.0 on: 12.0 has 99
    KiB for a program."""
    found = [
        config
        for rows in ROWS
        for n, k in ((4096, 4096), (4096, 14336), (6144, 4096), (28672, 4096))
        if (config := choose(rows, n, k, group=0)) is not None
    ]
    device = torch.device("cpu")
    stages = [scaled_linear_module._num_stages(each, each.block_k, device) for each in found]
    assert stages == [each.num_stages for each in found]
    monkeypatch.setattr(scaled_linear_module, "shared_bytes", lambda _: 101_376)
    for config in found:
        num_stages = scaled_linear_module._num_stages(config, config.block_k, device)
        tile_bytes = (config.block_m + config.block_n) * config.block_k
        assert num_stages >= 3 and (num_stages - 1) * tile_bytes < 101_376


@pytest.mark.parametrize(
    ("rows", "num_out", "num_in", "code", "group", "config"),
    [
        (1, 70, 96, FLOAT8, 0, ScaledConfig(16, 64, 128)),
        (21, 200, 256, FLOAT8, GROUP, ScaledConfig(16, 64, 128, split_k=2)),
        (21, 130, 384, INT8, 0, ScaledConfig(32, 128, 128, split_k=2)),
        (3, 70, 384, FLOAT8, 0, ScaledConfig(16, 64, 64, split_k=4)),
        (21, 70, 256, FLOAT8, 0, ScaledConfig(16, 64, 128, split_k=2, is_bulk=True)),
        (5, 200, 256, FLOAT8, GROUP, ScaledConfig(16, 64, 128, is_bulk=True)),
    ],
)
def test_against_float64(
    rows: int,
    num_out: int,
    num_in: int,
    code: torch.dtype,
    group: int,
    config: ScaledConfig,
    dtype: torch.dtype,
    device: torch.device,
    poisoned: Poisoned,
    assert_close: AssertClose,
) -> None:
    weight, numbers = make_weight(num_out, num_in, code, group, device)
    x = quantise_rows_reference(rand(rows, num_in) / 1000, InputScheme(code, group))
    wide = x.expand(torch.float64)
    x = QuantisedRows(x.codes.to(device), x.scale.t().contiguous().t().to(device))
    bias, residual = rand(num_out, seed=5).to(device, dtype), rand(rows, num_out + 3, seed=6)
    residual = residual.to(device, dtype)[:, :num_out]
    out = poisoned(rows, num_out + 5, dtype=dtype)[:, :num_out]
    product = wide @ numbers.t()
    scaled_linear(x, weight, out=out, config=config)

    def assert_right(actual: Tensor, expected: Tensor) -> None:
        # Tensor cores add 8-bit floats up with 14 bits.
        is_wide = code == FLOAT8 and actual.dtype == torch.float32
        assert_close(actual.half() if is_wide else actual, expected)

    assert_right(out, product)
    expected = (product + bias.double().cpu()) * 0.25 + residual.double().cpu()
    got = scaled_product(x, weight, bias, residual=residual, scale=0.25, dtype=dtype)
    assert_right(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("group", [0, GROUP])
@pytest.mark.parametrize("rows", [272, 4096])
def test_the_library_adds_to_a_residual(
    rows: int, group: int, device: torch.device, assert_close: AssertClose
) -> None:
    """Between columns that are not its own; a row's sum is that row's alone."""
    num_out, num_in = 640, 1536
    weight, numbers = make_weight(num_out, num_in, FLOAT8, group, device)
    x = quantise_rows(
        rand(rows, num_in).to(device, torch.bfloat16) / 1000, InputScheme(group=group)
    )
    around = rand(rows, num_out + 16, seed=6).to(device, torch.bfloat16)
    before = around.clone()
    residual = around[:, 8:-8]
    expected = x.expand(torch.float64).cpu() @ numbers.t() * 0.25 + residual.double().cpu()
    assert add_product(x, weight, residual, scale=0.25)
    # Tensor cores add 8-bit floats up with 14 bits.
    assert_close(residual, expected)
    assert torch.equal(around[:, :8], before[:, :8]) and torch.equal(around[:, -8:], before[:, -8:])
    one = before[:, 8:-8]
    others = QuantisedRows(x.codes.flip(0).contiguous(), x.scale.flip(0).t().contiguous().t())
    others.codes[-1], others.scale[-1] = x.codes[5], x.scale[5]
    one[-1] = before[5, 8:-8]
    assert add_product(others, weight, one, scale=0.25)
    assert torch.equal(one[-1], residual[5])


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch has none, nobody asks it for plans."""
    device = torch.device("cpu")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert library_product._library.__wrapped__(device) is None
    plan = library_product._plan.__wrapped__(device, 512, 256, 128, 128, has_blocks=False)
    assert plan is None


def test_a_library_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = SimpleNamespace(cublasLtGetVersion=lambda: 120_804)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: functions)
    monkeypatch.setattr(library_product, "_Library", lambda *_: pytest.fail("it is used"))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    functions.cublasLtCreate = lambda _: 0
    assert library_product._library.__wrapped__(torch.device("cpu")) is None


@pytest.mark.gpu
def test_what_the_library_does_not_add(device: torch.device) -> None:
    """Rows beside which there are others, memory that is not aligned, other types: nothing is
    touched, and whoever asked has another way."""
    weight, _ = make_weight(32, 256, FLOAT8, GROUP, device)
    for rows, residual in (
        (17, torch.zeros(17, 32, dtype=torch.bfloat16, device=device)),
        (32, torch.zeros(32, 32, dtype=torch.float16, device=device)),
        (32, torch.zeros(32, 36, dtype=torch.bfloat16, device=device)[:, :32]),
    ):
        x = quantise_rows(rand(rows, 256).to(device, torch.bfloat16), InputScheme(group=GROUP))
        assert not add_product(x, weight, residual) and not residual.any()
        dtype = residual.dtype
        got = scaled_product(x, weight, residual=residual, dtype=dtype)
        assert got.data_ptr() == residual.data_ptr() and got.any()


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("num_out", [32, 42])
def test_one_row(
    num_out: int,
    scheme: InputScheme,
    device: torch.device,
    poisoned: Poisoned,
    assert_close: AssertClose,
) -> None:
    """Its kernel makes it small itself, behind the norm, in front of the activation."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    rows, num_in = 1, 384
    weight, numbers = make_weight(num_out, num_in, scheme.dtype, scheme.group, device)
    numbers /= 1000
    weight.scale.div_(1000)
    scheme, config = on(device, scheme), FewConfig(4, 256, 4)
    x = rand(rows, num_in + 8).to(device, dtype)[:, :num_in]
    residual = rand(rows, num_out, seed=5).to(device, dtype)
    product = quantise_rows_reference(x, scheme).expand(torch.float64).cpu() @ numbers.t()
    out = poisoned(rows, num_out, dtype=dtype)
    small_linear(x, weight, residual=residual, inputs=scheme, scale=0.25, out=out, config=config)
    assert_close(out, product * 0.25 + residual.double().cpu())
    gain = rand(num_in, seed=9).to(device)
    normed = rms_norm(x.float(), (num_in,), gain, 1e-3)
    product = quantise_rows_reference(normed, scheme).expand(torch.float64).cpu() @ numbers.t()
    gate, up = product.chunk(2, 1)
    out = poisoned(rows, num_out // 2, dtype=dtype)
    small_linear(
        x,
        weight,
        norm_weight=gain,
        eps=1e-3,
        activation="silu",
        inputs=scheme,
        out=out,
        config=config,
    )
    # A code that is rounded to its neighbour, for sums of another order, is an eighth off.
    off = (out.double().cpu() - silu(gate) * up).norm() / (silu(gate) * up).norm()
    assert float(off) < 1e-2


def test_the_choice() -> None:
    """Few rows by our kernel, many by the library; what is like what was measured as that was."""
    assert choose(257, 6144, 4096, group=0) is None
    known = choose(1, 6144, 4096, group=0)
    assert known is not None and known.block_m == ROWS[0]
    assert choose(9, 6400, 4096, group=0) == known
    other = choose(32, 100, 256, group=GROUP)
    assert other is not None and other.block_m == 32 and other.split_k == 1
    assert choose(65, 100, 256, group=GROUP) is None


@pytest.mark.parametrize(("capability", "takes"), [((9, 0), True), ((10, 0), False)])
def test_which_gpus_have_blocks_in_the_library(
    capability: tuple[int, int], takes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of others it says that it multiplies none."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert scaled_linear_module._takes_blocks.__wrapped__(torch.device("cuda")) == takes
    assert not scaled_linear_module._takes_blocks.__wrapped__(torch.device("cpu"))


# Layers and models


def quantised(
    num_out: int, num_in: int, inputs: InputScheme | None, seed: int = 0
) -> QuantisedWeight:
    codes = rand(num_out, num_in, seed=seed).to(FLOAT8)
    scale = rand(num_out, 1, seed=seed + 1).abs()
    return QuantisedWeight(codes, scale, 8, inputs=inputs)


def test_which_weights_take_small_inputs() -> None:
    def packed(*parts: QuantisedWeight) -> SmallWeight:
        stored = pack_stored(parts, takes_float8=True)
        assert stored is not None
        return stored

    one = packed(quantised(8, 64, InputScheme()))
    assert scaled(one, InputScheme()) is one
    assert scaled(one, InputScheme(INT8)) is None and scaled(one, InputScheme(group=128)) is None
    assert scaled(packed(quantised(8, 48, None)), InputScheme()) is None
    by_block = rand(2, 2, seed=4).abs().repeat_interleave(128, 0)[:200]
    codes = rand(200, 256).to(FLOAT8)
    blocks = packed(QuantisedWeight(codes, by_block, 8))
    made = scaled(blocks, InputScheme(group=128))
    assert made is not None and made.scale.shape == (2, 2) and made.rows_per_scale == 128
    by_block[130] *= 2
    assert scaled(packed(QuantisedWeight(codes, by_block, 8)), InputScheme(group=128)) is None


@pytest.mark.usefixtures("few_programs")
def test_a_model_with_small_inputs(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks: prompt and decode, against a reference that makes activations small alike."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "vocab_size": 40, "head_dim": 128}
    sizes |= {"num_attention_heads": 1}
    make = maker(tmp_path, {**SMALL, **sizes})
    path = tmp_path / "model.safetensors"
    # What 16 bits hold: a weight that is rounded moves activations from code to code.
    tensors = {name: each.half().float() for name, each in load_file(path).items()}
    small = {}
    for name in [name for name in tensors if "proj" in name]:
        # So small that a code that is rounded to its neighbour, for sums of another order, does
        # not move all that comes behind it.
        weight, module = tensors.pop(name) / 8, name.removesuffix(".weight")
        blocks = weight.view(len(weight) // GROUP, GROUP, -1, GROUP)
        scale = blocks.abs().amax((1, 3)) / 448
        small[name] = (blocks / scale[:, None, :, None]).view_as(weight).to(FLOAT8)
        small[f"{module}.weight_scale_inv"] = scale
    save_file({**tensors, **small}, path)
    config = json.loads((tmp_path / "config.json").read_text())
    blocks_of = {"quant_method": "fp8", "weight_block_size": [GROUP, GROUP]}
    config["quantization_config"] = blocks_of
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = partial(TritonOperations, quantises_inputs=True)
    theirs = partial(ReferenceOperations, quantises_inputs=True)
    if device.type == "cpu":
        monkeypatch.setattr(
            triton_operations,
            "TritonOperations",
            lambda **options: ours(keeps_small=True, takes_float8=True),
        )
    monkeypatch.setattr(device_choices, "ReferenceOperations", lambda **options: theirs())
    dtype = "bfloat16" if device.type == "cuda" else "float16"
    runner = make("triton", device, dtype=dtype)
    reference = make("torch", torch.device("cpu"))
    assert "small weights and activations" in runner.numerics
    rows = [BatchRow([5, 6, 7, 8, 9], 0, [[1]]), BatchRow([11], 0, [[2]])]
    for batch in (Batch(rows), Batch([BatchRow([10], 5, [[1]])])):
        got, expected = runner.logits(batch).cpu().float(), reference.logits(batch)
        assert float((got - expected).norm() / expected.norm()) < 2e-2


def test_a_layer_of_a_step_is_that_of_its_rows(device: torch.device) -> None:
    """Whichever kernel has a row, it multiplies the same codes."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    parts = [quantised(64, 128, InputScheme())]
    stored = pack_stored(parts, takes_float8=True)
    assert stored is not None
    stored = SmallWeight(stored.codes.to(device), stored.scale.to(device), None, 128)
    layer = StoredLinear(
        torch.empty(0, device=device), None, 64, 128, inputs=InputScheme(), stored=stored
    )
    ops = TritonOperations(use_skinny=False, keeps_small=True, quantises_inputs=True)
    x = rand(20, 128, seed=8).to(device, dtype)
    x[1:] *= 100
    whole = ops.linear(x, layer)
    alone = ops.linear(x[:1], layer)
    assert float((whole[:1] - alone).abs().max() / alone.abs().max()) < 2e-3
