"""The compiled decode step of a CPU against plain torch, for both sets of instructions."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from baton.kernels import native as native_module
from baton.kernels import reference
from baton.kernels.cpu_attention import fused_attention, plan_fused_attention
from baton.kernels.native import (
    RUN,
    Native,
    NativeWeight,
    NoNative,
    _Weight,
    load_native,
    pack_tiles,
)
from baton.shared.engine.native_operations import NativeOperations, native_operations
from baton.shared.engine.quantised.weight import QuantisedWeight
from baton.shared.engine.reference_operations import ReferenceOperations

NUM_IN = 160


@pytest.fixture(scope="module", params=["as this CPU is", "AVX2"])
def native(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Native:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "AVX2":
            patch.setattr(native_module, "_FLAGS", [*native_module._FLAGS, "-march=haswell"])
        try:
            return load_native(tmp_path_factory.mktemp("native"))
        except NoNative as problem:
            pytest.skip(f"nothing can be compiled here, and torch computes: {problem}")


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight_of(
    num_out: int, num_in: int = NUM_IN, *, bits: int = 4, seed: int = 0, **more: Any
) -> tuple[NativeWeight, Tensor]:
    """A weight, and its numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (num_out, num_in), generator=generator).to(torch.uint8)
    scale = (rand(num_out, num_in // RUN, seed=seed + 1).abs() / 8 + 0.01).half().float()
    offset = (-(1 << (bits - 1)) * scale + rand(*scale.shape, seed=seed + 2) / 8).half().float()
    weight = pack_tiles(codes, scale, offset, num_bits=bits, **more)
    assert weight is not None
    numbers = codes.double().view(num_out, -1, RUN) * scale[..., None] + offset[..., None]
    return weight, numbers.flatten(1)


def made_small(x: Tensor) -> Tensor:
    """float64 [T, K]: what is multiplied of x, by the definition in native.c."""
    runs = x.float().view(x.shape[0], -1, RUN)
    most = runs.abs().amax(-1, keepdim=True)
    # 127 / most would be most's inverse times 127.
    steps = torch.full_like(most, 127) / most
    codes = (runs.double() * steps).round().nan_to_num()
    return (codes * (most / 127)).flatten(1)


def assert_rounded(found: Tensor, expected: Tensor, slack: float = 1e-4) -> None:
    """That it is expected, in float64, but for one rounding to bfloat16."""
    size = float(expected.abs().mean())
    assert found.dtype == torch.bfloat16 and found.shape == expected.shape
    assert bool(((found.double() - expected).abs() <= 2**-8 * expected.abs() + slack * size).all())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("num_out", [16, 40])
def test_products(native: Native, bits: int, num_out: int) -> None:
    """Of whole tiles and of parts, of few rows and many; a row's bits are the same in any company,
    and what is behind the results stays."""
    bias = rand(num_out, seed=7)
    weight, numbers = weight_of(num_out, bits=bits, bias=bias, times=0.5)
    x = rand(19, NUM_IN, seed=3).bfloat16()
    x[4] = 0
    expected = (made_small(x) @ numbers.t() + bias.double()) * 0.5
    found = native.linear(x, weight)
    assert_rounded(found, expected)
    for first, count in ((0, 1), (3, 2), (9, 8)):
        alone = native.linear(x[first : first + count], weight)
        assert torch.equal(alone, found[first : first + count])
    room = torch.full((5, num_out), 3.0).bfloat16()
    added = native.linear(x[:4], weight, residual=room[:4])
    assert added.data_ptr() == room.data_ptr() and bool((room[4] == 3).all())
    assert_rounded(added, expected[:4] + 3)


def test_codes_of_eight_bits_do_not_overflow(native: Native) -> None:
    codes = torch.full((16, NUM_IN), 255, dtype=torch.uint8)
    ones, none = torch.ones(16, NUM_IN // RUN), torch.zeros(16, NUM_IN // RUN)
    weight = pack_tiles(codes, ones, none, num_bits=8)
    assert weight is not None
    for x in (torch.ones(1, NUM_IN).bfloat16(), -torch.ones(1, NUM_IN).bfloat16()):
        assert_rounded(
            native.linear(x, weight), 255.0 * x.double().sum(1, keepdim=True).expand(1, 16)
        )


def test_what_is_not_finite_stays_so_and_does_not_reach_others(native: Native) -> None:
    weight, _ = weight_of(32)
    x = rand(3, NUM_IN, seed=3).bfloat16()
    up, down = weight_of(128, seed=1)[0], weight_of(NUM_IN, 64, bits=8, seed=5)[0]
    clean, clean_mlp = native.linear(x, weight), native.gated_mlp(x, up, down)
    for wrong in (float("nan"), float("inf"), float("-inf")):
        broken = x.clone()
        broken[1, 70] = wrong
        found = native.linear(broken, weight)
        assert not bool(found[1].isfinite().any())
        assert torch.equal(found[[0, 2]], clean[[0, 2]])
        found = native.gated_mlp(broken, up, down)
        assert not bool(found[1].isfinite().any())
        assert torch.equal(found[[0, 2]], clean_mlp[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norms_and_a_gated_mlp(native: Native, dtype: torch.dtype) -> None:
    gate_up, up_numbers = weight_of(128, seed=1)
    down, down_numbers = weight_of(NUM_IN, 64, bits=8, seed=5)
    x, norm = rand(9, NUM_IN, seed=3).bfloat16() * 4, (rand(NUM_IN, seed=4).to(dtype), 1e-5)
    normed = reference.rms_norm(x.float(), norm[0].float(), norm[1])
    inner = made_small(normed) @ up_numbers.t()
    assert_rounded(native.linear(x, gate_up, norm), inner, slack=2e-2)
    gate, up = inner.chunk(2, 1)
    middle = torch.nn.functional.silu(gate) * up
    expected = middle @ down_numbers.t() + x.double()
    found = native.gated_mlp(x, gate_up, down, norm, residual=x.clone())
    assert float((found.double() - expected).norm() / expected.norm()) < 1e-2
    alone = native.gated_mlp(x[2:3].clone(), gate_up, down, norm, residual=x[2:3].clone())
    assert torch.equal(alone, found[2:3])
    # So many that they are computed in several goes, in the memory of what they are computed from.
    many = rand(2 * 256 + 9, NUM_IN, seed=6).bfloat16()
    apart = [
        native.gated_mlp(many[at : at + 100], gate_up, down, norm, many[at : at + 100].clone())
        for at in range(0, len(many), 100)
    ]
    assert torch.equal(native.gated_mlp(many, gate_up, down, norm, residual=many), torch.cat(apart))


def test_where_there_is_no_memory_to_work_in_nothing_is_written(native: Native) -> None:
    weight, _ = weight_of(128)
    room, too_many = torch.ones(1, NUM_IN).bfloat16(), 1 << 52
    linear = (0, too_many, None, False, 0.0, None, room.data_ptr(), 1)
    with pytest.raises(MemoryError, match="native_linear: no memory"):
        native._linear(weight.address, *linear)
    # What is between is bounded, so that no number of tokens is too many.
    huge = _Weight(None, None, NUM_IN, too_many, False, 1.0)
    with pytest.raises(MemoryError, match="native_gated_mlp: no memory"):
        native._gated_mlp(
            weight.address, ctypes.addressof(huge), 0, 1, *linear[2:6], room.data_ptr(), 1
        )
    spans = torch.tensor([[0, too_many]])
    rows = torch.zeros(2, 1, 1, 1, dtype=torch.int64)
    with pytest.raises(MemoryError, match="native_attention: no memory"):
        native._attention(
            room.data_ptr(), 0, rows.data_ptr(), spans.data_ptr(), room.data_ptr(),
            1, 1, 1, 1, 16, 64, 1.0, 1,
        )  # fmt: skip
    assert bool((room == 1).all())


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("window", [None, 20])
def test_keys_are_stored_and_attended_to(native: Native, head_dim: int, window: int | None) -> None:
    """As torch's forms do; slots that no token may see hold NaN."""
    contexts, num_heads, layers, block = np.array([1, 16, 33, 70]), 6, 3, 16
    table = np.arange(20).reshape(4, 5)
    kv = rand(21, 2, layers, 2, block, head_dim, seed=1).bfloat16()
    kv[-1] = 0
    for row, context in enumerate(contexts):
        kv[table[row, context // block], :, :, :, context % block :] = float("nan")
    slots = table[np.arange(4), (contexts - 1) // block] * block + (contexts - 1) % block
    step = np.arange(5), contexts, table, slots
    plan = plan_fused_attention(*step, kv, num_heads=num_heads, window=window)
    angle = rand(4, head_dim // 2, seed=2)
    rope = reference.take_rope(
        reference.pack_rope(angle.cos(), angle.sin(), torch.bfloat16), torch.arange(4)
    )
    qkv, theirs = rand(4, num_heads + 4, head_dim, seed=3).bfloat16(), kv.clone()
    query = native.rope_and_store(qkv, rope.cos, rope.sin, kv, plan.slots[1], num_heads)
    expected = reference.rope_and_store(qkv, rope, theirs, 1, plan, num_heads)
    torch.testing.assert_close(query, expected, atol=0.02, rtol=0.01)
    torch.testing.assert_close(kv, theirs, atol=0.02, rtol=0.01, equal_nan=True)
    found = fused_attention(query, kv, 1, plan, 0.3, native.attend)
    attended = fused_attention(query, kv, 1, plan, 0.3)
    torch.testing.assert_close(found, attended, atol=0.02, rtol=0.02)
    # What a row sees and is no number reaches that row alone.
    kv[table[2, 1], :, 1, :, 3] = float("nan")
    spoilt = fused_attention(query, kv, 1, plan, 0.3, native.attend)
    assert bool(spoilt[2].isnan().all())
    others = [0, 1, 3]
    assert torch.equal(spoilt[others], found[others])


def test_what_c_would_misread_is_refused(native: Native) -> None:
    """And rows that do not lie one after another are brought together."""
    weight, x = weight_of(40)[0], rand(4, NUM_IN).bfloat16()
    room = rand(4, 80, seed=1).bfloat16()
    added = native.linear(x, weight, residual=room[:, :40])
    assert torch.equal(added, native.linear(x, weight, residual=room[:, :40].clone()))
    for wrong, more in (
        (x.float(), {}),
        (x[:, :128], {}),
        (x, {"residual": room.float()[:, :40]}),
        (x, {"residual": room}),
        (x, {"norm": (torch.ones(NUM_IN).half(), 1e-5)}),
        (x, {"norm": (torch.ones(128), 1e-5)}),
    ):
        with pytest.raises(ValueError, match="where bfloat16 .* is computed with"):
            native.linear(wrong, weight, **more)
    with pytest.raises(ValueError, match="40 are not twice 160"):
        native.gated_mlp(x, weight, weight)


def test_scales_that_float16_does_not_hold_are_left_to_torch() -> None:
    codes = torch.zeros(16, NUM_IN, dtype=torch.uint8)
    for scale in (1e-7, 1e6):
        scales = torch.full((16, NUM_IN // RUN), scale)
        assert pack_tiles(codes, scales, torch.zeros_like(scales), num_bits=4) is None
    scales = torch.full((16, NUM_IN // RUN), 0.1)
    scales[3, 1] = 0
    for offset, fits in ((0.3, True), (1e-7, False), (1e6, False)):
        offsets = torch.full_like(scales, offset)
        assert (pack_tiles(codes, scales, offsets, num_bits=4) is not None) == fits


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_form_of_codes_is_packed_as_it_is(
    native: Native, dtype: torch.dtype, bits: int
) -> None:
    """With zeros, with offsets, with neither; of runs, and of a whole row."""
    least = -(1 << (bits - 1)) if dtype == torch.int8 else 0
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(least, least + (1 << bits), (32, 128), generator=generator).to(dtype)
    zero = torch.randint(0, 8, (32, 2), generator=generator).to(torch.int16)
    x, ops = rand(2, 128, seed=3).bfloat16(), NativeOperations(native)
    for groups, more in (
        (1, {}),
        (4, {}),
        (2, {"zero": zero}),
        (4, {"offset": rand(32, 4, seed=2)}),
    ):
        scale = rand(32, groups, seed=1).abs() / 8 + 0.1
        weight = QuantisedWeight(codes, scale, bits, **more)  # type: ignore[arg-type]
        layer = ops._pack_small([weight], None, 1.0, torch.bfloat16)
        assert layer.is_small
        expected = made_small(x) @ weight.expand(torch.float64).t()
        found = ops.linear(x, layer).double()
        assert float((found - expected).norm() / expected.norm()) < 4e-3


def test_who_has_no_compiler_computes_with_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("BATON_CACHE_DIR", str(tmp_path))
    missing = "there is no C compiler no-such-compiler"
    for compiler, reason in (("no-such-compiler -m64", missing), ("false", "fails")):
        monkeypatch.setenv("CC", compiler)
        with pytest.raises(NoNative, match=reason):
            load_native(tmp_path)
        assert type(native_operations()) is ReferenceOperations
    assert "layers are computed by torch" in caplog.text
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".so")]
    monkeypatch.setattr(native_module, "_NEEDED", {"avx1024"})
    with pytest.raises(NoNative, match="the CPU has no avx1024"):
        load_native(tmp_path)


def test_code_that_others_may_have_put_there_is_not_loaded(
    native: Native, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is what was compiled with other arguments taken for it."""
    monkeypatch.setenv("CC", "cc -DOTHER")
    folder = tmp_path / "made" / "native"
    assert load_native(folder).name.startswith("native avx")
    (library,) = folder.iterdir()
    assert folder.stat().st_mode & 0o777 == library.stat().st_mode & 0o777 == 0o700
    for path in (folder, library):
        path.chmod(0o770)
        with pytest.raises(NoNative, match=f"others may write to {path}"):
            load_native(folder)
        path.chmod(0o700)
    # Cut short, as by a disk that was full, it is compiled anew.
    whole = library.read_bytes()

    def compile_again(_: object, target: Path) -> None:
        target.unlink()
        target.write_bytes(whole)
        target.chmod(0o700)

    with monkeypatch.context() as patch:
        patch.setattr(native_module, "_compile", compile_again)
        for left in (b"", whole[:1000], whole[:-1], b"no ELF" * 20):
            library.unlink()
            library.write_bytes(left)
            library.chmod(0o700)
            assert load_native(folder).name.startswith("native avx")
            assert library.read_bytes() == whole
    monkeypatch.setenv("CC", "cc")
    load_native(folder)
    assert len(list(folder.iterdir())) == 2
    owner = folder.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    if owner:
        with pytest.raises(NoNative, match="others may write"):
            load_native(folder)
