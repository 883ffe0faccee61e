"""Which way of multiplying small inputs by small weights is fastest, from a table measured on the
GPU.

The table, scaled_table.json, is written by `python -m benchmarks.gpu.scaled_tune --write-table`.
Nothing is measured while serving: a choice depends on the shape only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROWS = (16, 32, 64, 128, 256)
"""Of x, for which the table has entries."""
TABLE = Path(__file__).with_name("scaled_table.json")
_SIMILAR = 1.25
"""N and K may differ by this factor from those of an entry that is used for them."""


@dataclass(frozen=True, slots=True)
class ScaledConfig:
    """How kernels/scaled_linear.py computes a product.

    block_m, block_n: rows of x and of the weight of a program.
    block_k: columns of a step.
    split_k: programs that share the columns of a tile; their sums are added in a fixed order.
    prefetch: steps whose weights are fetched to L2 before the previous kernel has ended.
    is_fast: 8-bit floats are added up by the tensor cores alone, with fewer bits, as the library
        does it: half as many registers.
    is_bulk: the bulk copy engine loads tiles, not threads.
    """

    block_m: int
    block_n: int
    block_k: int
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 4
    prefetch: int = 2
    is_fast: bool = False
    is_bulk: bool = False


@dataclass(frozen=True, slots=True)
class HopperConfig:
    """How kernels/hopper_scaled.py computes a product.

    block_m, block_n: rows of x and of the weight of a program; of a gate and of up so many each.
    places: steps that are held, or are under way, at a time.
    run: steps that are asked for, and multiplied, together, of which `places` are a multiple.
    split_k: programs that share the columns of a tile; their sums are added in a fixed order.
    num_warps: four for 64 rows of the weight, or for 128.
    is_fast: as of a `ScaledConfig`.
    """

    block_m: int
    block_n: int
    places: int
    run: int = 1
    split_k: int = 1
    num_warps: int = 4
    is_fast: bool = False


MANY_ROWS = ScaledConfig(128, 128, 128, num_warps=8, is_fast=True)
"""Where there is no product of the library's."""


@dataclass(frozen=True, slots=True)
class _Entry:
    rows: int
    n: int
    k: int
    group: int
    config: ScaledConfig | None
    hopper: HopperConfig | None
    gated: HopperConfig | None


def choose(M: int, N: int, K: int, *, group: int) -> ScaledConfig | None:
    """The configuration to multiply x [M, K] by a weight [N, K] with → None: use the library.

    group: rows and columns that share a scale; 0: all of a row.

    Known shapes (or similar ones) get the entry of the least M that is no less; others a guess.
    """
    if M > ROWS[-1]:
        return None
    entry = _entry(M, N, K, group)
    return guess(next(each for each in ROWS if M <= each), N, K) if entry is None else entry.config


def choose_hopper(M: int, N: int, K: int) -> HopperConfig | None:
    """As `choose`, for kernels/hopper_scaled.py, whose weights have a scale a row → None: what
    `choose` says is faster, or may be."""
    entry = _entry(M, N, K, 0)
    return None if entry is None else entry.hopper


def choose_gated(M: int, N: int, K: int) -> HopperConfig | None:
    """The same, of a product [gate, up] with what becomes of it → None: a product without is
    faster, or may be."""
    entry = _entry(M, N, K, 0)
    return None if entry is None else entry.gated


def _entry(M: int, N: int, K: int, group: int) -> _Entry | None:
    """The most similar one."""
    rows = next((each for each in ROWS if M <= each), None)
    return None if rows is None else _entry_of_rows(rows, N, K, group)


@cache
def _entry_of_rows(rows: int, N: int, K: int, group: int) -> _Entry | None:
    """Looked for once: launched steps ask for each product of each layer."""
    similar = [
        entry
        for entry in _TABLE
        if (entry.rows, entry.group) == (rows, group)
        and _ratio(entry.n, N) <= _SIMILAR
        and _ratio(entry.k, K) <= _SIMILAR
    ]
    return min(similar, key=lambda entry: _ratio(entry.n, N) * _ratio(entry.k, K), default=None)


def guess(M: int, N: int, K: int) -> ScaledConfig | None:
    """For a shape that was never measured, on a GPU with about 132 processors; None: the library,
    which of more rows was never far behind."""
    if M > 64:
        return None
    block_m = next(each for each in (16, 32, 64) if each >= M)
    tiles = -(-N // 64)
    split = 1
    while tiles * split < 200 and split < 4 and K // (2 * split) >= 1024:
        split *= 2
    return ScaledConfig(block_m, 64, 128, split)


def _ratio(a: int, b: int) -> float:
    return max(a, b) / min(a, b)


def _read(path: Path) -> list[dict[str, Any]]:
    """The entries of a table file; none if there is no file."""
    if not path.exists():
        return []
    entries: list[dict[str, Any]] = json.loads(path.read_text())["entries"]
    return entries


def _hopper(config: dict[str, Any] | None) -> HopperConfig | None:
    return None if config is None else HopperConfig(**config)


_TABLE = tuple(
    _Entry(
        rows=entry["m"],
        n=entry["n"],
        k=entry["k"],
        group=entry["group"],
        config=None if entry["config"] is None else ScaledConfig(**entry["config"]),
        hopper=_hopper(entry.get("hopper")),
        gated=_hopper(entry.get("gated")),
    )
    for entry in _read(TABLE)
)
