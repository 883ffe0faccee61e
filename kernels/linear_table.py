"""Which way of multiplying by a weight is fastest, from a table measured on the GPU.

The table, linear_table.json, is written by `python -m benchmarks.gpu.kernels --tune`. Nothing is
measured while serving: a choice depends on the shape only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

M_BUCKETS = (1, 2, 4, 8, 16, 32, 40, 64, 128, 256)
"""Rows of x for which the table has entries; 40: eight sequences that verify four guesses each."""
TABLE = Path(__file__).with_name("linear_table.json")
_SIMILAR = 1.25
"""N and K may differ by this factor from those of an entry that is used for them."""
_MORE_ROWS = 4
"""Times M, an entry may have rows."""


@dataclass(frozen=True, slots=True)
class Config:
    """How kernels/skinny_linear.py computes a product.

    variant: "fma" (at most 4 rows, no tensor cores), "dot" (tensor cores), "tma" (tensor cores,
        weight tiles fetched by the tensor copy engine).
    block_n: rows of the weight per program (of gate and of up each with an activation).
    block_k: columns of the weight per step.
    block_m: rows of x per program, a power of two ≥ 16; 0 = the least that covers all rows, up to
        64. Not used by "fma".
    split_k: programs that share the columns of one tile; their sums are added in a fixed order.
    pdl: launch while the previous kernel still runs. Advice to the caller, who passes it on.
    prefetch: with pdl, steps whose weights are fetched to L2 before the previous kernel has ended.
    """

    variant: str
    block_n: int
    block_k: int
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 4
    block_m: int = 0
    pdl: bool = False
    prefetch: int = 2


@dataclass(frozen=True, slots=True)
class _Entry:
    rows: int
    n: int
    k: int
    fused: bool
    config: Config | None


def choose(M: int, N: int, K: int, dtype: torch.dtype, *, fused: bool) -> Config | None:
    """The configuration to multiply x [M, K] by a weight [N, K] with → None: use the library.

    fused: whether RMSNorm of x, or the addition to a residual, is to be part of it (whichever the
        weight has in a llama). For a norm, None means that a separate norm and then the best way
        without one (ask again with fused=False) take less time. An activation is part of it
        either way.

    Known shapes (or similar ones) get the entry of the least M that is no less; others a guess.
    """
    if dtype not in (torch.bfloat16, torch.float16) or M > M_BUCKETS[-1] or K % 8:
        return None
    # The same tile that covers M rows in one program: no entry for fewer rows, which would say
    # little of more, nor for many more.
    similar = [
        entry
        for entry in _TABLE
        if entry.fused == fused
        and M <= entry.rows <= _MORE_ROWS * M
        and _ratio(entry.n, N) <= _SIMILAR
        and _ratio(entry.k, K) <= _SIMILAR
    ]
    if not similar:
        return guess(M, N, K, fused=fused)
    best = min(similar, key=lambda entry: (entry.rows, _ratio(entry.n, N) * _ratio(entry.k, K)))
    return best.config


def guess(M: int, N: int, K: int, *, fused: bool = False) -> Config | None:
    """A configuration for a shape that was never measured, on a GPU with about 132 processors."""
    if M > 64 or N * K < 2**21:
        return None
    if M <= 2:
        return Config("fma", 8, 1024, num_warps=4, num_stages=2, pdl=True)
    if fused and M > 16:
        return None
    tiles = -(-N // 64)
    split = 1
    while tiles * split < 200 and split < 8 and K // (2 * split) >= 1024:
        split *= 2
    return Config("dot", 64, 128, split_k=split, num_warps=4, num_stages=4, pdl=True)


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
        rows=entry["m"],
        n=entry["n"],
        k=entry["k"],
        fused=entry["fused"],
        config=None if entry["config"] is None else Config(**entry["config"]),
    )
    for entry in load_table(TABLE)
)
