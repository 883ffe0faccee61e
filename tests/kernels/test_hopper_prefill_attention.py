"""The kernel for capability 9.0: when it is chosen, that it compiles, what it computes there."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

import baton.kernels
from baton.kernels import hopper_prefill_attention as hopper
from baton.kernels import prefill_attention
from baton.kernels.prefill_attention import PrefillConfig, paged_prefill_attention
from tests.device import ROOT, process_environment
from tests.kernels import hopper_variants
from tests.kernels.hopper_variants import CHUNKS, Variant
from tests.kernels.prefill_cases import Check, PrefillCase, make_case

_BF16, _FP16 = torch.bfloat16, torch.float16
_TRITON = PrefillConfig(1, 128, 8, 3)


def _inputs(
    *, head_dim: int = 128, block_size: int = 16, dtype: torch.dtype = _BF16
) -> dict[str, Any]:
    return {
        "query": torch.zeros(130, 8, head_dim, dtype=dtype),
        "kv": torch.zeros(5, 2, 3, 2, block_size, head_dim, dtype=dtype),
        "block_m": 128,
        "window": 0,
    }


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the kernel could run here, and were chosen for plain layers only."""
    monkeypatch.setattr(hopper, "CHOSEN", {64: (), 128: ()})
    monkeypatch.setattr(hopper, "_USABLE", True)
    monkeypatch.setattr(hopper, "_processors", lambda _: 132)


@pytest.mark.parametrize("dtype", [_BF16, _FP16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_covers(on_hopper: None, head_dim: int, block_size: int, dtype: torch.dtype) -> None:
    inputs = _inputs(head_dim=head_dim, block_size=block_size, dtype=dtype)
    assert hopper.covers(**inputs)


@pytest.mark.parametrize(
    "change",
    [
        {"block_m": 64},
        {"window": 4096},
        {"soft_cap": 50.0},
        {"has_sinks": True},
        {"query": torch.zeros(130, 8, 128, dtype=_FP16)},
        {"kv": torch.zeros(2**17 * 5 * 2 * 3 + 1, dtype=_BF16)[1:].view(-1, 2, 3, 2, 16, 128)[:5]},
        # More keys and values than an int32 can count.
        {"kv": torch.zeros(1, dtype=_BF16).expand(2**20, 8, 32, 2, 16, 128)},
        _inputs(head_dim=96),
        _inputs(head_dim=256),
        _inputs(block_size=8),
        _inputs(block_size=256),
        _inputs(dtype=torch.float32),
    ],
    ids=[
        "short tiles", "window", "soft cap", "sinks", "mixed types", "unaligned", "huge pool",
        "head_dim 96", "head_dim 256", "block_size 8", "block_size 256", "float32",
    ],
)  # fmt: skip
def test_does_not_cover(on_hopper: None, change: dict[str, Any]) -> None:
    assert hopper.covers(**_inputs())
    assert not hopper.covers(**{**_inputs(), **change})


def test_traits_are_chosen_by_the_size_of_heads(
    on_hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hopper, "CHOSEN", {64: ("window", "sinks"), 256: ("window", "soft cap")})
    small, large = _inputs(head_dim=64), _inputs(head_dim=256)
    assert hopper.covers(**{**small, "window": 128}, has_sinks=True)
    assert not hopper.covers(**small, soft_cap=50.0)
    assert hopper.covers(**{**large, "window": 128}, soft_cap=50.0)
    assert not hopper.covers(**{**large, "window": 128}, has_sinks=True)
    assert not hopper.covers(**_inputs(head_dim=128))


def test_does_not_cover_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "_USABLE", True)
    assert not hopper.covers(**_inputs())


def test_is_not_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "_processors", lambda _: 132)
    assert hopper.covers(**_inputs()) is not triton.knobs.runtime.interpret


def test_says_why_it_is_never_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(hopper, "CHOSEN", {64: (), 128: ()})
    why = prefill_attention.why_not_hopper
    assert why(128, 0, 0.0) is None
    assert "have sinks" in (why(128, 0, 0.0, has_sinks=True) or "")
    assert "head_dim is 256" in (prefill_attention.why_not_hopper(256, 0, 0.0) or "")
    assert "sliding_window is 4096" in (prefill_attention.why_not_hopper(128, 4096, 0.0) or "")
    assert "cap of 50.0" in (prefill_attention.why_not_hopper(64, 0, 50.0) or "")
    monkeypatch.setattr(triton, "__version__", "3.6.0+cu130.1")
    assert prefill_attention.why_not_hopper(128, 0, 0.0) is None
    monkeypatch.setattr(triton, "__version__", "4.0.0")
    assert "4.0.0" in (prefill_attention.why_not_hopper(128, 0, 0.0) or "")
    monkeypatch.setattr(prefill_attention, "_hopper", None)
    monkeypatch.setattr(prefill_attention, "_import_error", "no name tma")
    assert prefill_attention.why_not_hopper(128, 0, 0.0) == "no name tma"


def test_a_given_configuration_is_that_of_the_other_kernel(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, assert_close: Check
) -> None:
    """And what the kernel covers goes to it, as it is."""
    case = make_case([(0, 3)], 2, 1, 32, 16, device, torch.float32)
    seen: list[Any] = []
    other = SimpleNamespace(
        covers=lambda query, kv, *, block_m, **options: block_m == 16 and not any(options.values()),
        paged_prefill_attention=lambda *args, out, **options: seen.extend((*args, out, options)),
    )
    monkeypatch.setattr(prefill_attention, "_hopper", other)
    case.check(assert_close, 16, PrefillConfig(1, 16, 4, 2))
    assert not seen
    tiles, out = case.tiles(16), torch.zeros_like(case.query)
    args = (case.query, case.kv, 1, tiles, case.tables, 0.25)
    assert paged_prefill_attention(*args, block_m=16, out=out) is out
    options = seen.pop()
    assert len(seen) == 7
    assert all(given is got for given, got in zip((*args, out), seen, strict=True))
    assert options == {"window": 0, "soft_cap": 0.0, "sinks": None, "num_tiles": None}


def test_a_triton_without_gluon_has_the_other_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(baton.kernels, "hopper_prefill_attention")
    monkeypatch.delitem(sys.modules, "baton.kernels.hopper_prefill_attention")
    monkeypatch.setitem(sys.modules, "triton.experimental.gluon", None)
    spec = importlib.util.spec_from_file_location("fresh", prefill_attention.__file__)
    assert spec is not None and spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fresh", fresh)
    spec.loader.exec_module(fresh)
    assert fresh._hopper is None and prefill_attention._hopper is hopper


@pytest.mark.parametrize("variant", [("128", "16"), ("256", "16", "1024", "50", "1")], ids="-".join)
def test_compiles_once_for_all_steps(variant: tuple[str, ...], tmp_path: Path) -> None:
    """For a real GPU, though there may be none: not in this process, which interprets kernels."""
    command = [sys.executable, "-m", "tests.kernels.compile_hopper_prefill"]
    done = subprocess.run(
        [*command, "bfloat16", *variant],
        env=process_environment(TRITON_CACHE_DIR=str(tmp_path)),
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["kernels"] == 1
    assert report["shared"] <= 232_448
    assert report["spilled"] <= 300


def _check(case: PrefillCase, assert_close: Check, config: PrefillConfig | None = None) -> None:
    """As the engine gives it: queries lie among keys and values."""
    _, heads, head_dim = case.query.shape
    qkv = torch.full((len(case.query), heads + 2, head_dim), float("nan")).to(case.query)
    qkv[:, :heads] = case.query
    case.query = qkv[:, :heads]
    assert hopper.covers(case.query, case.kv, block_m=128, window=0)
    case.check(assert_close, 128, config)


@pytest.fixture
def hopper_device(device: torch.device) -> torch.device:
    if not hopper._processors(device):
        pytest.skip("a kernel for compute capability 9.0 only")
    return device


@pytest.mark.gpu
@pytest.mark.parametrize("config", [None, _TRITON], ids=["hopper", "triton"])
@pytest.mark.parametrize("dtype", [_BF16, _FP16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_matches_the_reference(
    hopper_device: torch.device, assert_close: Check,
    head_dim: int, block_size: int, dtype: torch.dtype, config: PrefillConfig | None,
) -> None:  # fmt: skip
    case = make_case(CHUNKS, 8, 2, head_dim, block_size, hopper_device, dtype)
    _check(case, assert_close, config)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (1, 1), (7, 1), (14, 2), (16, 2), (9, 3)])
def test_groups_of_heads(
    hopper_device: torch.device, assert_close: Check, heads: int, kv_heads: int
) -> None:
    """Of few items, and of numbers that the programs cannot share evenly."""
    for chunks in ([(0, 1)], [(5, 128)], CHUNKS):
        case = make_case(chunks, heads, kv_heads, 128, 16, hopper_device, _BF16)
        _check(case, assert_close)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257])
def test_ends(hopper_device: torch.device, assert_close: Check, length: int) -> None:
    for cached in (0, 1, 63, 64, 100, 128, 383):
        case = make_case([(cached, length)], 4, 1, 64, 16, hopper_device, _BF16)
        _check(case, assert_close)


@pytest.mark.gpu
def test_long_chunk_is_the_same_every_time(
    hopper_device: torch.device, assert_close: Check
) -> None:
    case = make_case([(1000, 4100)], 32, 8, 128, 16, hopper_device, _BF16)
    _check(case, assert_close)
    tiles = case.tiles(128)

    def run() -> torch.Tensor:
        return hopper.paged_prefill_attention(
            case.query, case.kv, 1, tiles, case.tables, 0.1, out=torch.empty_like(case.query)
        )

    first = run()
    for _ in range(30):
        assert torch.equal(run(), first)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", hopper_variants.VARIANTS, ids=str)
def test_variants_match_the_reference(
    hopper_device: torch.device, monkeypatch: pytest.MonkeyPatch, variant: Variant
) -> None:
    """Those too that are not chosen yet."""
    monkeypatch.setattr(hopper, "CHOSEN", hopper_variants.ALL)
    hopper_variants.check(variant, hopper_device)


@pytest.mark.gpu
def test_idle_tiles_and_other_layers(hopper_device: torch.device, assert_close: Check) -> None:
    case = make_case(CHUNKS, 8, 2, 128, 32, hopper_device, _FP16, layers=5, layer=4)
    tiles = case.tiles(128)
    out = torch.full((len(case.query) + 40, 8, 128), float("nan"), dtype=_FP16).to(hopper_device)
    query = torch.full_like(out, float("nan"))
    query[: len(case.query)] = case.query
    # Of no row, and of no tokens; between others, at the start and at the end.
    idle = torch.tensor([[len(case.query), 30, -1, 4], [0, 0, 1, 9]], dtype=torch.int32).to(tiles)
    mixed = torch.cat((idle, tiles[:5], idle, tiles[5:], idle))
    paged_prefill_attention(query, case.kv, 4, mixed, case.tables, 0.1, block_m=128, out=out)
    expected = torch.empty_like(case.query)
    paged_prefill_attention(
        case.query, case.kv, 4, tiles, case.tables, 0.1, block_m=128, out=expected, config=_TRITON
    )
    assert_close(out[: len(case.query)], expected)
    assert out[len(case.query) :].isnan().all()


@pytest.mark.gpu
def test_huge_scores(hopper_device: torch.device, assert_close: Check) -> None:
    case = make_case([(200, 300)], 4, 2, 64, 16, hopper_device, _BF16)
    # Whole numbers: scores of some hundreds, yet exact, so that rounding does not move weights.
    case.kv[:, :, :, 0] = case.kv[:, :, :, 0].sign()
    case.query = case.query.sign() * 60
    _check(case, assert_close)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tiles", [0, 1, 3, 100])
def test_tiles_that_are_counted_on_the_device(
    hopper_device: torch.device, assert_close: Check, num_tiles: int
) -> None:
    """A grid for more of them than there are: the others have no tokens."""
    case = make_case(CHUNKS, 8, 2, 128, 16, hopper_device, _BF16)
    tiles = case.tiles(128)
    count = min(num_tiles, len(tiles))
    padded = torch.zeros(len(tiles) + 20, 4, dtype=torch.int32, device=hopper_device)
    padded[:count] = tiles[:count]
    counted = torch.tensor([count], dtype=torch.int32, device=hopper_device)
    out, expected = (torch.full_like(case.query, float("nan")) for _ in range(2))
    given = (case.query, case.kv, 1)
    hopper.paged_prefill_attention(*given, padded, case.tables, 0.1, out=out, num_tiles=counted)
    if count:
        hopper.paged_prefill_attention(*given, tiles[:count], case.tables, 0.1, out=expected)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())
