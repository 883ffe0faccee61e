"""Products with weights as they are stored, against float64; outputs poisoned, sizes awkward."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from baton.kernels import small_linear as kernels
from baton.kernels.small_linear import (
    MOST_ROWS,
    SmallWeight,
    by_groups,
    expand,
    pack_nibbles,
    small_linear,
    takes,
    takes_norm,
)
from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.operations import Norm
from baton.shared.engine.quantised.stored import StoredLinear, pack_stored
from baton.shared.engine.quantised.weight import QuantisedWeight
from baton.shared.engine.triton_operations import TritonOperations
from tests.kernels.test_engine import SMALL, maker

AssertClose = Callable[[Tensor, Tensor], None]
Poisoned = Callable[..., Tensor]
SHAPES = {"odd": (3, 70, 96, 3), "one scale": (17, 40, 200, 1), "halves": (5, 65, 128, 4)}
"""Rows, outputs, inputs, groups."""


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(
    kind: str, num_out: int, num_in: int, groups: int, device: torch.device, *, has_offset: bool
) -> tuple[SmallWeight, Tensor]:
    """And its numbers, float64."""
    scale = rand(num_out, groups, seed=1).abs() + 0.5
    offset = rand(num_out, groups, seed=2) if has_offset else None
    if kind == "float8":
        codes = rand(num_out, num_in, seed=3).to(torch.float8_e4m3fn)
    else:
        least, most = (-8, 8) if kind == "four bits" else (-128, 128)
        generator = torch.Generator().manual_seed(3)
        codes = torch.randint(least, most, (num_out, num_in), generator=generator).to(torch.int8)
    runs = codes.double().view(num_out, groups, -1) * scale.double()[..., None]
    if offset is not None:
        runs = runs + offset.double()[..., None]
    stored = pack_nibbles(codes) if kind == "four bits" else codes
    moved = None if offset is None else offset.to(device)
    weight = SmallWeight(stored.to(device), scale.to(device), moved, num_in)
    return weight, runs.view(num_out, num_in)


@pytest.mark.parametrize(
    ("kind", "shape", "has_offset", "split_k"),
    [
        ("four bits", "halves", True, 1),
        ("four bits", "halves", False, 2),
        ("four bits", "one scale", True, 2),
        ("int8", "odd", True, 3),
        ("int8", "one scale", False, None),
        ("float8", "odd", False, 1),
        ("float8", "one scale", False, 2),
    ],
)
def test_against_float64(
    kind: str,
    shape: str,
    has_offset: bool,
    split_k: int | None,
    dtype: torch.dtype,
    device: torch.device,
    poisoned: Poisoned,
    assert_close: AssertClose,
) -> None:
    rows, num_out, num_in, groups = SHAPES[shape]
    weight, numbers = make(kind, num_out, num_in, groups, device, has_offset=has_offset)
    assert takes(num_out, num_in, groups, is_packed=kind == "four bits")
    # Rows of it are strided.
    x = rand(rows, num_in + 8).to(device, dtype)[:, :num_in]
    bias, residual = rand(num_out, seed=5).to(device, dtype), rand(rows, num_out + 3, seed=6)
    residual = residual.to(device, dtype)[:, :num_out]
    out = poisoned(rows, num_out + 5, dtype=dtype)[:, :num_out]
    product = x.double().cpu() @ numbers.t()
    small_linear(x, weight, out=out, split_k=split_k)
    assert_close(out, product)
    expected = (product + bias.double().cpu()) * 0.25 + residual.double().cpu()
    got = small_linear(
        x, weight, bias, residual=residual, scale=0.25, out=residual, split_k=split_k
    )
    assert got is residual
    assert_close(got, expected)
    assert_close(expand(weight, dtype), numbers)


@pytest.mark.parametrize("has_offset", [False, True])
@pytest.mark.parametrize("kind", ["four bits", "int8", "float8"])
@pytest.mark.parametrize(
    ("rows", "num_out", "num_in", "groups"),
    [(1, 16, 128, 1), (2, 21, 160, 1), (1, 16, 256, 2), (1, 13, 320, 10)],
)
def test_few_rows(
    rows: int,
    num_out: int,
    num_in: int,
    groups: int,
    kind: str,
    has_offset: bool,
    device: torch.device,
    poisoned: Poisoned,
    assert_close: AssertClose,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They have a kernel of their own: whole blocks, parts of one, several scales in one."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    monkeypatch.delattr(kernels, "_multiply")
    weight, numbers = make(kind, num_out, num_in, groups, device, has_offset=has_offset)
    x = rand(rows, num_in + 8).to(device, dtype)[:, :num_in]
    bias, residual = (
        rand(*shape, seed=5).to(device, dtype) for shape in ((num_out,), (rows, num_out))
    )
    out = poisoned(rows, num_out, dtype=dtype)
    small_linear(x, weight, bias, residual=residual, scale=0.25, out=out)
    product = x.double().cpu() @ numbers.t()
    assert_close(out, (product + bias.double().cpu()) * 0.25 + residual.double().cpu())
    gain = rand(num_in, seed=9).to(device)
    assert takes_norm(rows, weight, dtype) and not takes_norm(3, weight, dtype)
    out = poisoned(rows, num_out, dtype=dtype)
    small_linear(x, weight, norm_weight=gain, eps=1e-3, out=out)
    normed = torch.nn.functional.rms_norm(x.double(), (num_in,), gain.double(), 1e-3)
    assert_close(out, normed.cpu() @ numbers.t())


def test_columns_in_another_order(device: torch.device, assert_close: AssertClose) -> None:
    weight, numbers = make("four bits", 40, 128, 4, device, has_offset=True)
    columns = torch.randperm(128, generator=torch.Generator().manual_seed(7))
    moved = SmallWeight(weight.codes, weight.scale, weight.offset, 128, columns.to(device))
    x = rand(4, 128, seed=8).to(device)
    expected = x.double().cpu()[:, columns] @ numbers.t()
    assert_close(small_linear(x, moved), expected)


@pytest.mark.parametrize("has_offset", [False, True])
def test_scales_by_groups(has_offset: bool, device: torch.device) -> None:
    """They may lie so (`by_groups`), and nothing changes."""
    weight, _ = make("four bits", 40, 128, 4, device, has_offset=has_offset)
    scale = weight.scale.t().contiguous().t()
    offset = None if weight.offset is None else weight.offset.t().contiguous().t()
    turned = replace(weight, scale=scale, offset=offset)
    x = rand(5, 128, seed=8).to(device)
    assert torch.equal(small_linear(x, turned), small_linear(x, weight))
    assert torch.equal(expand(turned, torch.float32), expand(weight, torch.float32))
    # Where nothing streams it stays as it is.
    assert by_groups(weight, torch.float32) is weight


def test_what_no_kernel_takes() -> None:
    assert not takes(8, 96, 3, is_packed=True) and takes(8, 96, 3, is_packed=False)
    assert not takes(8, 96, 12, is_packed=False) and not takes(8, 97, 1, is_packed=True)


# Layers and models


def int8_in_runs(num_out: int, groups: int, seed: int) -> QuantisedWeight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (num_out, 64), generator=generator).to(torch.int8)
    return QuantisedWeight(codes, rand(num_out, groups, seed=seed).abs() / 64, 8)


def unsigned(num_out: int, groups: int, seed: int) -> QuantisedWeight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (num_out, 64), generator=generator).to(torch.uint8)
    zero = torch.randint(0, 16, (num_out, groups), generator=generator).to(torch.int16)
    return QuantisedWeight(codes, rand(num_out, groups, seed=seed).abs() / 8, 4, zero=zero)


def float8(num_out: int, groups: int, seed: int) -> QuantisedWeight:
    codes = rand(num_out, 64, seed=seed).to(torch.float8_e4m3fn)
    return QuantisedWeight(codes, rand(num_out, groups, seed=seed).abs() / 8, 8)


@pytest.mark.parametrize("form", [int8_in_runs, unsigned, float8])
@pytest.mark.parametrize("num_rows", [2, MOST_ROWS + 1])
def test_a_layer_of_parts(
    num_rows: int,
    form: Callable[[int, int, int], QuantisedWeight],
    device: torch.device,
    assert_close: AssertClose,
) -> None:
    """With scales of runs of another length each: few rows by what is stored, many expanded."""
    parts = form(24, 4, 1), form(16, 2, 2)
    stored = pack_stored(parts, takes_float8=True)
    assert stored is not None and stored.is_packed == (form is unsigned)
    assert pack_stored((*parts, rand(8, 64)), takes_float8=True) is None
    assert (pack_stored(parts, takes_float8=False) is None) == (form is float8)
    stored = replace(
        stored,
        codes=stored.codes.to(device),
        scale=stored.scale.to(device),
        offset=None if stored.offset is None else stored.offset.to(device),
    )
    empty = torch.empty(0, device=device)
    layer = StoredLinear(empty, None, 40, 64, scale=0.5, stored=stored)
    numbers = torch.cat([part.expand(torch.float64) for part in parts])
    x, norm = rand(num_rows, 64, seed=3).to(device), Norm(rand(64, seed=4).to(device), 1e-5)
    ops = TritonOperations(use_skinny=False, keeps_small=True)
    expected = x.double().cpu() @ numbers.t() / 2
    assert_close(ops.linear(x, layer), expected)
    residual = rand(num_rows, 40, seed=5).to(device)
    whole = expected + residual.double().cpu()
    assert_close(ops.linear(x, layer, residual.clone()), whole)
    if num_rows <= MOST_ROWS:
        plain = ops.pack_linear(numbers.to(device, x.dtype), scale=0.5)
        for activation in ("silu", "gelu_tanh"):
            got = ops.norm_gate_up(x, norm, layer, activation)
            assert_close(got, ops.norm_gate_up(x, norm, plain, activation))


def test_a_model_of_stored_weights(tmp_path: Path, device: torch.device) -> None:
    """Four bits and eight in one model, prompt and decode, against the reference in float32."""
    sizes = {"hidden_size": 64, "intermediate_size": 32, "vocab_size": 40}
    make = maker(tmp_path, {**SMALL, **sizes})
    path = tmp_path / "model.safetensors"
    tensors, small = load_file(path), {}
    for name in [name for name in tensors if "proj" in name]:
        weight, module = tensors.pop(name), name.removesuffix(".weight")
        most = 7 if "mlp" in name else 127
        runs = weight.view(len(weight), -1, 16)
        scale = runs.abs().amax(-1) / most
        codes = (runs / scale[..., None]).round().to(torch.int8).view(weight.shape)
        small[f"{module}.weight_scale"] = scale
        if most == 7:
            eights = (codes.long() + 8).view(len(weight), -1, 8)
            words = (eights << torch.arange(0, 32, 4)).sum(-1)
            signed = torch.where(words >= 2**31, words - 2**32, words)
            small[f"{module}.weight_packed"] = signed.int()
        else:
            small[name] = codes
    save_file({**tensors, **small}, path)
    config = json.loads((tmp_path / "config.json").read_text())
    groups = {
        "mlp": {"targets": ["re:.*mlp.*"], "weights": {"num_bits": 4, "group_size": 16}},
        "all": {"targets": ["Linear"], "weights": {"num_bits": 8, "group_size": 16}},
    }
    method = {"quant_method": "compressed-tensors", "config_groups": groups}
    config["quantization_config"] = method
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = make("triton", device, dtype="float16")
    theirs = make("torch", torch.device("cpu"))
    assert "small weights" in ours.numerics
    rows = [BatchRow([5, 6, 7, 8, 9], 0, [[1]]), BatchRow([11], 0, [[2]])]
    for batch in (Batch(rows), Batch([BatchRow([10], 5, [[1]])])):
        got, expected = ours.logits(batch).cpu(), theirs.logits(batch)
        assert float((got - expected).norm() / expected.norm()) < 5e-3
