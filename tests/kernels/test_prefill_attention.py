from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from baton.kernels import reference_prefill
from baton.kernels.prefill_attention import (
    PrefillConfig,
    block_m_for,
    paged_prefill_attention,
    prefill_tiles,
)
from tests.kernels.prefill_cases import Check, make_case

Make = Callable[..., torch.Tensor]
_GPU = torch.cuda.is_available()
_CONFIG = PrefillConfig(1, 16, 4, 2)


@pytest.mark.parametrize(
    ("chunks", "heads", "kv_heads", "head_dim", "block_size", "block_m", "config"),
    [
        # A single token; a chunk alone; over a prefix; ends in the middle of blocks and tiles.
        ([(0, 1)], 2, 1, 64, 16, 16, _CONFIG),
        ([(0, 40), (37, 21)], 2, 2, 32, 16, 16, _CONFIG),
        ([(63, 33)], 2, 1, 128, 32, 32, _CONFIG),
        ([(50, 17), (16, 16)], 4, 2, 64, 64, 16, PrefillConfig(1, 32, 4, 2)),
        # Tiles of keys of several blocks.
        ([(70, 20)], 2, 1, 64, 16, 16, PrefillConfig(1, 64, 4, 2)),
        ([(33, 35)], 2, 1, 48, 16, 32, PrefillConfig(1, 32, 4, 2)),
        # All heads of a KV head in one product, also when they are no power of two.
        ([(45, 9), (3, 2)], 8, 2, 64, 16, 8, PrefillConfig(4, 32, 4, 2)),
        ([(20, 13)], 14, 2, 16, 32, 8, PrefillConfig(7, 32, 4, 2)),
        ([(20, 13)], 4, 1, 256, 16, 16, PrefillConfig(2, 32, 4, 1)),
        ([(20, 3)], 2, 1, 18, 16, 16, _CONFIG),
        # Tiles of which a program takes a part; some parts are empty.
        ([(20, 40), (0, 5)], 4, 1, 32, 16, 64, PrefillConfig(1, 16, 4, 2, tokens=16)),
        ([(33, 21)], 4, 1, 32, 16, 32, PrefillConfig(2, 32, 4, 1, tokens=8)),
    ],
)
def test_matches_the_reference(
    chunks: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    block_m: int,
    config: PrefillConfig,
    device: torch.device,
    dtype: torch.dtype,
    assert_close: Check,
) -> None:
    case = make_case(chunks, heads, kv_heads, head_dim, block_size, device, dtype)
    case.check(assert_close, block_m, config)


@pytest.mark.parametrize("window", [1, 7, 16, 33, 500])
def test_window(window: int, device: torch.device, dtype: torch.dtype, assert_close: Check) -> None:
    cached = 70
    forgotten = max(0, cached - window + 1)
    case = make_case([(cached, 37)], 2, 1, 32, 16, device, dtype, forgotten=forgotten)
    case.check(assert_close, 16, _CONFIG, window)


@pytest.mark.parametrize("window", [0, 33])
def test_soft_cap(
    window: int, device: torch.device, dtype: torch.dtype, assert_close: Check
) -> None:
    case = make_case([(70, 37)], 2, 1, 32, 16, device, dtype, forgotten=30 if window else 0)
    case.check(assert_close, 16, _CONFIG, window, soft_cap=0.5)


@pytest.mark.parametrize("window", [0, 33])
def test_sinks(window: int, device: torch.device, dtype: torch.dtype, assert_close: Check) -> None:
    case = make_case([(70, 37)], 4, 2, 32, 16, device, dtype, forgotten=30 if window else 0)
    sinks = torch.tensor([0.5, -3.0, 60.0, 2.0], device=device)
    case.check(assert_close, 16, _CONFIG, window, sinks=sinks)


def test_parts_of_tiles_in_a_window(
    device: torch.device, dtype: torch.dtype, assert_close: Check
) -> None:
    case = make_case([(70, 37)], 2, 1, 32, 16, device, dtype, forgotten=38)
    case.check(assert_close, 64, PrefillConfig(1, 16, 4, 2, tokens=16), window=33)


@pytest.mark.parametrize("longest", [5, 35])
def test_the_widest_heads(
    longest: int, device: torch.device, dtype: torch.dtype, assert_close: Check
) -> None:
    case = make_case([(20, longest)], 2, 1, 512, 16, device, dtype)
    case.check(assert_close, block_m_for(longest, 512, dtype.itemsize))


@pytest.mark.parametrize("longest", [5, 40, 70])
def test_chosen_configuration(
    longest: int, device: torch.device, dtype: torch.dtype, assert_close: Check
) -> None:
    case = make_case([(90, longest), (0, 3)], 4, 2, 64, 16, device, dtype)
    case.check(assert_close, block_m_for(longest, 64, dtype.itemsize))


@pytest.mark.parametrize("block_size", [32, 64])
def test_bulk_copies(
    block_size: int, device: torch.device, dtype: torch.dtype, assert_close: Check
) -> None:
    case = make_case([(150, 30)], 2, 1, 64, block_size, device, dtype)
    case.check(assert_close, 32, PrefillConfig(1, 32, 4, 2, descriptor=True))


def test_strided_query_other_layer_and_idle_tiles(
    device: torch.device, assert_close: Check
) -> None:
    case = make_case([(20, 5)], 2, 1, 32, 16, device, torch.float32, layers=3, layer=2)
    qkv = torch.randn(7, 4, 32, device=device)
    qkv[:5, :2] = case.query
    tiles = torch.cat((case.tiles(16), case.tiles(16)))
    tiles[1] = torch.tensor([5, 2, -1, 0], dtype=torch.int32)
    out = torch.full((7, 2, 32), float("nan"), device=device)
    args = (case.kv, 2, tiles, case.tables, 0.3)
    paged_prefill_attention(qkv[:, :2], *args, block_m=16, out=out, config=_CONFIG)
    wide = (case.kv.double(), *args[1:])
    expected = reference_prefill.paged_prefill_attention(case.query.double(), *wide, block_m=16)
    assert_close(out[:5], expected)
    assert out[5:].isnan().all()


def test_huge_scores(device: torch.device, dtype: torch.dtype, assert_close: Check) -> None:
    case = make_case([(40, 20)], 2, 1, 32, 16, device, dtype)
    # Whole numbers: scores of some hundreds, yet exact, so that rounding does not move weights.
    case.kv[:, :, :, 0] = case.kv[:, :, :, 0].sign()
    case.query = case.query.sign() * 60
    case.check(assert_close, 16, _CONFIG)


def test_tiles() -> None:
    start, rows, first = np.array([3, 8, 8, 41]), np.array([4, 2, 0]), np.array([100, 5, 64])
    tiles = prefill_tiles(start, rows, first, block_m=16)
    assert tiles.dtype == np.int32
    assert tiles.tolist() == [
        [3, 5, 4, 100],
        [40, 1, 0, 96],
        [24, 16, 0, 80],
        [8, 16, 0, 64],
    ]
    assert prefill_tiles(start[:1], rows[:0], first[:0], block_m=16).shape == (0, 4)


@pytest.mark.skipif(not _GPU, reason="too many steps for the interpreter")
@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256, 512])
def test_large(
    head_dim: int,
    block_size: int,
    device: torch.device,
    dtype: torch.dtype,
    assert_close: Check,
) -> None:
    chunks = [(0, 700), (1500, 513), (4000, 20)]
    case = make_case(chunks, 8, 2, head_dim, block_size, device, dtype)
    case.check(assert_close, block_m_for(700, head_dim, dtype.itemsize))
    case.check(assert_close, block_m_for(20, head_dim, dtype.itemsize))
    case = make_case([(1500, 513)], 8, 2, head_dim, block_size, device, dtype, forgotten=1200)
    block_m = block_m_for(513, head_dim, dtype.itemsize)
    for soft_cap in (0.0, 3.0):
        case.check(assert_close, block_m, window=300, soft_cap=soft_cap)
