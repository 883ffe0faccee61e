"""How the products of a mixture's experts are cut into tiles, from a table measured on the GPU.

The table, experts_table.json, is written by `python -m benchmarks.gpu.kernels --tune-experts`.
Nothing is measured while serving: a choice depends on shape and number of tokens only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

STEPS = (8, 64, 1024)
"""Steps of up to so many tokens, and those of more, are four kinds; a kind has tiles of its own.
All four are met while warming up."""
UNSORTED_TOKENS = STEPS[0]
"""Up to so many, each pair is a tile of its own: experts that several have come from the cache."""
TABLE = Path(__file__).with_name("experts_table.json")
_MANY_ROWS_BYTES = 160 * 1024
"""Of shared memory, what small weights' tiles for many rows take."""
_SIMILAR = 1.3
"""Sizes may differ by this factor from those of an entry that is used for them."""


class Tiles(NamedTuple):
    """
    block_m: pairs of a tile, a power of two ≥ 16. Of unsorted pairs one of them is real.
    block_n: columns; of gate and of up each.
    block_k: of the sum, what is added at a time.
    group: tiles that go through the columns together, so that an expert's weights stay in the
        cache; 1: one after another.
    copies: weights come by the tensor copy engine (compute capability 9.0).
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 4
    group: int = 1
    copies: bool = False


@dataclass(frozen=True, slots=True)
class _Entry:
    kind: int
    is_up: bool
    experts: int
    n: int
    k: int
    tiles: Tiles


def kind_of(num_tokens: int) -> int:
    """Of a step: 0 … len(STEPS)."""
    return sum(num_tokens > most for most in STEPS)


def choose(num_tokens: int, num_experts: int, num_out: int, num_in: int, *, is_up: bool) -> Tiles:
    """For 16-bit numbers. `is_up`: gate and up, `num_out` columns of each.

    Known shapes, or similar ones, get their entry; others a guess.
    """
    kind = kind_of(num_tokens)
    similar = [
        (distance, entry)
        for entry in _TABLE
        if (entry.kind, entry.is_up) == (kind, is_up)
        for distance in [
            max(
                _ratio(entry.n, num_out), _ratio(entry.k, num_in),
                _ratio(entry.experts, num_experts),
            )
        ]
        if distance <= _SIMILAR
    ]  # fmt: skip
    if similar:
        return min(similar, key=lambda each: each[0])[1].tiles
    return guess(kind)


def guess(kind: int) -> Tiles:
    """For a shape that was never measured, and for GPUs without an engine for copies."""
    # Of few rows the weights are what takes time: small programs, many of them.
    if kind < 2:
        return Tiles(16, 32, 128)
    return Tiles(64, 64, 64)


def guess_small(kind: int, *, is_up: bool, has_runs: bool, shared_bytes: int) -> Tiles:
    """For weights of few bits, as was fastest on an H200 for mixtures of two models.

    `has_runs`: sums are scaled run by run, for which a program with many rows has no registers.
    `shared_bytes`: what a program may have.
    """
    if kind < 2 and is_up:
        return Tiles(16, 32, 256, num_stages=3)
    if kind < 3:
        return Tiles(16, 64, 128)
    if has_runs:
        return Tiles(64, 64, 64)
    if shared_bytes < _MANY_ROWS_BYTES:
        return Tiles(64, 64, 64, num_stages=3)
    return Tiles(128, 64 if is_up else 128, 64, num_warps=8, num_stages=3)


def wide(num_tokens: int) -> Tiles:
    """For float32, which has no tensor cores here."""
    return guess(kind_of(num_tokens))._replace(block_k=32, num_stages=2)


def load_table(path: Path) -> list[dict[str, Any]]:
    """The entries of a table file; none if there is no file."""
    if not path.exists():
        return []
    entries: list[dict[str, Any]] = json.loads(path.read_text())["entries"]
    return entries


def _ratio(a: int, b: int) -> float:
    return max(a, b) / min(a, b)


_TABLE = tuple(
    _Entry(
        kind=entry["kind"],
        is_up=entry["is_up"],
        experts=entry["experts"],
        n=entry["n"],
        k=entry["k"],
        tiles=Tiles(**entry["tiles"]),
    )
    for entry in load_table(TABLE)
)
