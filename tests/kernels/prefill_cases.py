"""Chunks over a paged pool for the tests of the prefill kernels; poison where nobody may look."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from baton.kernels import reference_prefill
from baton.kernels.prefill_attention import PrefillConfig, paged_prefill_attention, prefill_tiles
from tests.kernels.float8_pools import numbers_of

Check = Callable[[torch.Tensor, torch.Tensor], None]


@dataclass
class PrefillCase:
    """Chunks of (cached tokens, chunk tokens) over a pool that is NaN wherever nothing is."""

    query: torch.Tensor
    kv: torch.Tensor
    tables: torch.Tensor
    rows: np.ndarray
    start: np.ndarray
    first: np.ndarray

    def tiles(self, block_m: int) -> torch.Tensor:
        tiles = prefill_tiles(self.start, self.rows, self.first, block_m=block_m)
        return torch.from_numpy(tiles).to(self.query.device)

    def check(
        self,
        assert_close: Check,
        block_m: int,
        config: PrefillConfig | None = None,
        window: int = 0,
        layer: int = 1,
        soft_cap: float = 0.0,
        sinks: torch.Tensor | None = None,
    ) -> None:
        tiles, scale = self.tiles(block_m), self.query.shape[2] ** -0.5
        out = torch.full_like(self.query, float("nan"))
        paged_prefill_attention(
            self.query, self.kv, layer, tiles, self.tables, scale,
            block_m=block_m, window=window, soft_cap=soft_cap, sinks=sinks, out=out, config=config,
        )  # fmt: skip
        expected = reference_prefill.paged_prefill_attention(
            self.query.double(), numbers_of(self.kv), layer, tiles, self.tables, scale,
            block_m=block_m, window=window, soft_cap=soft_cap, sinks=sinks,
        )  # fmt: skip
        assert_close(out, expected)


def make_case(
    chunks: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    layers: int = 2,
    layer: int = 1,
    forgotten: int = 0,
) -> PrefillCase:
    """forgotten: tokens in front of each row whose keys are NaN, and whose blocks undefined."""
    needed = [-(-(cached + new) // block_size) for cached, new in chunks]
    num_blocks = sum(needed) + 2
    kv = torch.full(
        (num_blocks + 1, kv_heads, layers, 2, block_size, head_dim), float("nan"), dtype=dtype
    )
    free = torch.randperm(num_blocks).int()
    tables = torch.full((len(chunks) + 2, max(needed) + 1), 0x7EADBEEF, dtype=torch.int32)
    rows = np.random.default_rng().permutation(len(chunks) + 2)[: len(chunks)]
    for row, (cached, new), count in zip(rows.tolist(), chunks, needed, strict=True):
        tables[row, :count], free = free[:count], free[count:]
        index = torch.arange(forgotten, cached + new)
        blocks = tables[row, index // block_size].long()
        shape = (len(index), kv_heads, 2, head_dim)
        kv[blocks, :, layer, :, index % block_size] = torch.randn(shape).to(dtype)
        tables[row, : forgotten // block_size] = -0x7EADBEEF
    lengths = np.array([new for _, new in chunks])
    query = torch.randn(int(lengths.sum()), heads, head_dim).to(dtype)
    return PrefillCase(
        query.to(device),
        kv.to(device),
        tables.to(device),
        rows,
        np.concatenate(([0], np.cumsum(lengths))),
        np.array([cached for cached, _ in chunks]),
    )
