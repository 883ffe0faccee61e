"""The variants of the kernel for capability 9.0, and what each must compute as the reference does.

    python -m tests.kernels.hopper_variants [I/N]

checks all, or every Nth from the Ith on, on the GPU of this machine; also those that the engine
does not choose yet. A variant takes some 15 s to compile.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from baton.kernels import hopper_prefill_attention as hopper
from baton.kernels.prefill_attention import paged_prefill_attention
from tests.kernels.closeness import assert_close
from tests.kernels.prefill_cases import PrefillCase, make_case

ALL: dict[int, tuple[str, ...]] = dict.fromkeys((64, 128, 256), hopper.TRAITS)
"""For hopper.CHOSEN: whatever the kernel can."""
WINDOWS = (1, 64, 128, 1024, 4096)
# Ends in the middle of tiles and blocks; a row of one token; a whole tile; nothing cached.
CHUNKS = [(0, 700), (1500, 513), (1000, 20), (63, 65), (127, 1), (0, 1), (128, 128), (37, 129)]


@dataclass(frozen=True)
class Variant:
    head_dim: int
    traits: tuple[str, ...] = ()
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    heads: int = 8
    kv_heads: int = 2

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        traits = "+".join(self.traits) or "plain"
        heads = f"{self.heads}:{self.kv_heads}"
        return f"{self.head_dim} {traits} {heads} /{self.block_size} {dtype}".replace(" ", "-")


_W, _C, _S = hopper.TRAITS
VARIANTS = (
    Variant(256),
    Variant(256, (_W,)),
    Variant(64, (_W, _S)),
    Variant(64, (_S,)),
    Variant(128, (_W,)),
    Variant(256, (_W, _C), heads=7, kv_heads=1),
    Variant(128, (_C,)),
    Variant(256, (_C,), block_size=128),
    Variant(64, (_W,), block_size=64),
    Variant(128, (_W, _C, _S), dtype=torch.float16),
    Variant(256, (_W, _C, _S), dtype=torch.float16),
    Variant(64, (_W, _C, _S), dtype=torch.float16),
    Variant(256, (_W,), block_size=64, heads=4, kv_heads=2),
    Variant(256, (_W,), block_size=128),
    Variant(128, (_W,), block_size=128, heads=9, kv_heads=3),
    Variant(256, block_size=32, heads=14, kv_heads=2),
)


def check(variant: Variant, device: torch.device) -> None:
    """hopper.CHOSEN must be `ALL`."""
    sinks = 3 * torch.randn(variant.heads, device=device) if _S in variant.traits else None
    options: dict[str, Any] = {"soft_cap": 1.5 if _C in variant.traits else 0.0, "sinks": sinks}
    for case, window in _cases(variant, device):
        covered = hopper.covers(
            case.query, case.kv, block_m=128, window=window, has_sinks=sinks is not None
        )
        assert covered
        case.check(assert_close, 128, window=window, **options)
    _check_rows_are_alone(case, window, options)


def _cases(variant: Variant, device: torch.device) -> Iterator[tuple[PrefillCase, int]]:
    """With their windows."""

    def case(chunks: list[tuple[int, int]], forgotten: int = 0) -> PrefillCase:
        made = make_case(
            chunks, variant.heads, variant.kv_heads, variant.head_dim, variant.block_size,
            device, variant.dtype, forgotten=forgotten,
        )  # fmt: skip
        # As the engine gives it: queries lie among keys and values.
        heads = variant.heads + 2
        qkv = torch.full((len(made.query), heads, variant.head_dim), float("nan"))
        qkv = qkv.to(made.query)
        qkv[:, : variant.heads] = made.query
        made.query = qkv[:, : variant.heads]
        return made

    if _W not in variant.traits:
        for chunks in ([(0, 1)], [(5, 128)], [(1000, 1100)], CHUNKS):
            yield case(chunks), 0
        return
    for window in WINDOWS:
        # Rows that begin before the window is full, and as it is.
        near = [
            (max(0, window - 1), 129),
            (window, 65),
            (max(0, window - 70), 200),
            (0, 1),
            (3, 70),
        ]
        yield case(near), window
        # What lies before the windows is gone.
        ends = [(200, 300), (263, 1), (264, 129), (327, 64), (328, 513)]
        yield case([(window + cached, new) for cached, new in ends], 201), window
        yield case(CHUNKS), window


def _check_rows_are_alone(case: PrefillCase, window: int, options: dict[str, Any]) -> None:
    """A row's result is the same every time, whatever shares the step."""

    def run(tiles: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(case.query)
        paged_prefill_attention(
            case.query, case.kv, 1, tiles, case.tables, 0.1,
            block_m=128, window=window, out=out, **options,
        )  # fmt: skip
        return out

    tiles = case.tiles(128)
    together = run(tiles)
    alone = torch.zeros_like(together)
    for slot in case.rows.tolist():
        alone += run(tiles[tiles[:, 2] == slot])
    assert torch.equal(alone, together), "a row depends on what shares the step"
    for _ in range(10):
        assert torch.equal(run(tiles), together), "another result than before"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shard", nargs="?", default="0/1", metavar="I/N")
    hopper.CHOSEN = ALL
    first, step = map(int, parser.parse_args().shard.split("/"))
    failures = 0
    for variant in VARIANTS[first::step]:
        start, said = time.monotonic(), "as the reference"
        try:
            check(variant, torch.device("cuda"))
        except Exception as error:
            failures += 1
            said = f"FAILED: {type(error).__name__} {error}"
        sys.stdout.write(f"{variant}: {said}, {time.monotonic() - start:.1f} s\n")
        sys.stdout.flush()
    return failures


if __name__ == "__main__":
    sys.exit(main())
