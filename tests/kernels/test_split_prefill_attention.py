from __future__ import annotations

import numpy as np
import pytest
import torch

from baton.kernels import reference_prefill
from baton.kernels.prefill_attention import prefill_tiles
from baton.kernels.prefill_items import ITEM_FIELDS, cut_items, most_items, most_places
from baton.kernels.split_prefill_attention import (
    ItemConfig,
    item_config,
    make_item_work,
    split_prefill_attention,
)
from tests.kernels.float8_pools import numbers_of
from tests.kernels.prefill_cases import Check, PrefillCase, make_case

_SMALL = ItemConfig(16, 1, 16, 4, 2)
_POISON = 0x7EADBEEF


def check(
    case: PrefillCase,
    assert_close: Check,
    config: ItemConfig = _SMALL,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    is_split: bool = True,
    num_times: int = 1,
) -> None:
    """Several times: what adds up must be found as it was. Behind the tokens of the case there is
    one that is in no item, and behind the items there are others."""
    device, heads = case.query.device, case.query.shape[1]
    # Room for some cuts, whatever the heads.
    most = max(12, 3 * heads)
    work = make_item_work(config, heads, case.query.shape[2], device, num_programs=most)
    tiles = prefill_tiles(case.start, case.rows, case.first, block_m=config.block_m)
    cut = cut_items(
        tiles,
        block_n=config.block_n,
        most_cuts=work.most_cuts,
        window=window,
        least_keys=2 * config.block_n,
    )
    assert (int(cut[:, 8].max()) > 1) == is_split
    items = torch.full((len(cut) + 3, ITEM_FIELDS), _POISON, dtype=torch.int32, device=device)
    items[: len(cut)] = torch.from_numpy(cut)
    count = torch.tensor([len(cut)], dtype=torch.int32, device=device)
    work.partial.fill_(float("nan"))
    work.weight.fill_(float("nan"))
    query = torch.cat((case.query, case.query[:1]))
    scale = case.query.shape[2] ** -0.5
    expected = reference_prefill.paged_prefill_attention(
        case.query.double(), numbers_of(case.kv), 1, torch.from_numpy(tiles).to(device),
        case.tables, scale, block_m=config.block_m, window=window, soft_cap=soft_cap, sinks=sinks,
    )  # fmt: skip
    for _ in range(num_times):
        out = torch.full_like(query, float("nan"))
        split_prefill_attention(
            query, case.kv, 1, items, count, case.tables, work, scale,
            window=window, soft_cap=soft_cap, sinks=sinks, out=out,
        )  # fmt: skip
        assert_close(out[:-1], expected)
        assert out[-1].isnan().all()
        assert not work.arrived.any()


@pytest.mark.parametrize(
    ("chunks", "heads", "kv_heads", "head_dim", "block_size", "config"),
    [
        # A few tokens behind many, beside a prompt of its own; more heads than programs have units.
        ([(150, 5), (0, 3)], 2, 1, 64, 16, _SMALL),
        # Several tiles, of which the long ones are cut; keys of a tile in several blocks.
        ([(130, 40), (0, 20)], 2, 2, 32, 16, ItemConfig(16, 1, 32, 4, 1)),
        # Heads among the rows, and no power of two of them.
        ([(140, 7)], 6, 2, 16, 32, ItemConfig(8, 3, 16, 4, 2)),
        ([(20, 1), (129, 2)], 2, 1, 18, 128, ItemConfig(16, 2, 16, 4, 1, at_once=1)),
    ],
)
def test_matches_the_reference(
    chunks: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    config: ItemConfig,
    device: torch.device,
    dtype: torch.dtype,
    assert_close: Check,
) -> None:
    case = make_case(chunks, heads, kv_heads, head_dim, block_size, device, dtype)
    check(case, assert_close, config, num_times=2)


@pytest.mark.parametrize("window", [1, 33, 100])
def test_window_cap_and_sinks(window: int, device: torch.device, assert_close: Check) -> None:
    """Items whose keys some tokens no longer see, and others not yet."""
    cached = 170
    forgotten = max(0, cached - window + 1)
    case = make_case([(cached, 21)], 2, 1, 32, 16, device, torch.float32, forgotten=forgotten)
    sinks = torch.tensor([0.5, 60.0], device=device)
    check(case, assert_close, window=window, soft_cap=0.5, sinks=sinks, is_split=window > 1)


def test_chosen_configurations(
    device: torch.device, dtype: torch.dtype, assert_close: Check
) -> None:
    case = make_case([(300, 9), (0, 2)], 4, 2, 64, 16, device, dtype)
    check(case, assert_close, item_config(4, 2, 64, dtype.itemsize, device))
    case = make_case([(120, 3)], 2, 1, 256, 16, device, dtype)
    check(case, assert_close, item_config(2, 1, 256, dtype.itemsize, device))


def test_no_items(device: torch.device) -> None:
    work = make_item_work(_SMALL, 2, 16, device)
    items = torch.full((4, ITEM_FIELDS), _POISON, dtype=torch.int32, device=device)
    case = make_case([(0, 2)], 2, 1, 16, 16, device, torch.float32)
    out = torch.full_like(case.query, float("nan"))
    count = torch.zeros(1, dtype=torch.int32, device=device)
    split_prefill_attention(case.query, case.kv, 1, items, count, case.tables, work, 0.3, out=out)
    assert out.isnan().all()


def test_cuts() -> None:
    """Every key that a tile sees is in one of its items, places are its own, and none are missing,
    whatever the lengths."""
    source = np.random.default_rng(5)
    for trial in range(200):
        num_rows, block_m, most_cuts = source.integers(1, (9, 65, 20)).tolist()
        window = int(source.choice([0, 1, 40, 1000]))
        counts = source.integers(1, 150, num_rows)
        start = np.concatenate(([0], np.cumsum(counts)))
        first = source.integers(0, 3000, num_rows) * source.integers(0, 2, num_rows)
        tiles = prefill_tiles(start, np.arange(num_rows), first, block_m=block_m)
        items = cut_items(
            tiles,
            block_n=32,
            most_cuts=most_cuts,
            window=window,
            least_keys=int(trial % 2 * 64 + 1),
        )
        assert len(items) <= most_items(int(counts.sum()), num_rows, block_m, most_cuts)
        taken: list[int] = []
        for tile in tiles.tolist():
            own = sorted(each for each in items.tolist() if each[:4] == tile)
            own.sort(key=lambda each: each[4])
            low = max(0, tile[3] - window + 1) // 32 * 32 if window else 0
            assert [own[0][4], own[-1][5]] == [low, tile[3] + tile[1]]
            assert all(a[5] == b[4] and a[5] % 32 == 0 for a, b in zip(own, own[1:], strict=False))
            assert all(each[4] < each[5] and each[8] == len(own) for each in own)
            if len(own) > 1:
                assert [each[6] for each in own] == list(range(own[0][7], own[0][7] + len(own)))
                taken += [each[6] for each in own]
        assert len(taken) == len(set(taken))
        assert max(taken, default=-1) < most_places(most_cuts)
