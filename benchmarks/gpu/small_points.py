"""Products with weights as they are stored, at shapes of Llama-3.1-8B, beside cuBLAS in bfloat16.

`python -m benchmarks.gpu.kernels --only small_linear`
"""

# ruff: noqa: B023

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional

from baton.kernels.small_linear import (
    SmallWeight,
    by_groups,
    expand,
    pack_nibbles,
    small_linear,
)
from benchmarks.gpu.gpu_timing import Point, num_sets_for

_BF16 = torch.bfloat16
_SHAPES = {"qkv": (6144, 4096), "gate, up": (28672, 4096), "down": (4096, 14336)}
_GROUPS = {"int4 g128": 128, "int8": 0, "fp8": 0, "fp8 blocks": 128}


def small_linear_points() -> Iterator[Point]:
    for name, (n, k) in _SHAPES.items():
        for form, group in _GROUPS.items():
            weight = _random(form, n, k, group)
            num_sets = num_sets_for(weight.num_bytes)
            weights = [weight, *(_random(form, n, k, group) for _ in range(num_sets - 1))]
            plain = [expand(each, _BF16) for each in weights[: num_sets_for(2 * n * k)]]
            for rows in (1, 2, 16, 32, 64, 128, 256):
                x = torch.randn(rows, k, dtype=_BF16, device="cuda")
                yield Point(
                    f"{name} {form} {rows}",
                    lambda i: small_linear(x, weights[i], pdl=True),
                    num_bytes=weight.num_bytes + 2 * rows * (n + k),
                    flop=2 * rows * n * k,
                    num_sets=num_sets,
                    library={"cuBLAS": lambda i: functional.linear(x, plain[i % len(plain)])},
                )
            yield Point(
                f"{name} {form} expanded",
                lambda i: expand(weights[i], _BF16),
                num_bytes=weight.num_bytes + 2 * n * k,
                num_sets=num_sets,
            )


def _random(form: str, n: int, k: int, group: int) -> SmallWeight:
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8, device="cuda")
    if form.startswith("int4"):
        codes = pack_nibbles(codes)
    elif form.startswith("fp8"):
        codes = codes.to(torch.float8_e4m3fn)
    scale = torch.rand(n, k // group if group else 1, device="cuda") / 64
    return by_groups(SmallWeight(codes, scale, None, k), _BF16)
