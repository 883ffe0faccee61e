"""Compiles kernels/hopper_prefill_attention.py for capability 9.0, with or without a GPU.

    python -m tests.kernels.compile_hopper_prefill [dtype head_dim block_size [window cap sinks]]

Prints, as JSON, the bytes of shared memory that it takes, what its threads put into memory for want
of registers, and how many kernels steps of all kinds need. To be run without TRITON_INTERPRET: a
kernel is compiled or interpreted for the whole process.
"""

from __future__ import annotations

import argparse
import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from baton.kernels import hopper_prefill_attention as hopper
from tests.kernels.compiled import Compiled

Kernel = Any


def compile_all(
    dtype: torch.dtype,
    head_dim: int,
    block_size: int,
    window: int = 0,
    soft_cap: float = 0.0,
    *,
    has_sinks: bool = False,
) -> list[Kernel]:
    """The kernels, by steps of one engine: of few tiles and many, in any layer. How many tiles
    count is found on the device, which takes the most of the kernel's code."""
    pretend = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
    )
    triton.runtime.driver.set_active(pretend)
    hopper._processors = lambda _: 132  # type: ignore[assignment]
    kernel, found = hopper._hopper_prefill_attention, {}
    launch = kernel.run

    def compile_only(*args: Any, **options: Any) -> None:
        compiled = launch(*args, **{**options, "warmup": True})
        found[id(compiled)] = compiled

    kernel.run = compile_only
    num_heads, num_kv_heads = 32, 8
    sinks = torch.zeros(num_heads) if has_sinks else None
    kv = torch.zeros(9, num_kv_heads, 3, 2, block_size, head_dim, dtype=dtype)
    tables = torch.zeros(5, 7, dtype=torch.int32)
    for num_tiles, num_tokens, layer in ((1, 80, 0), (1, 128, 1), (3, 320, 2), (16, 2048, 1)):
        qkv = torch.zeros(num_tokens, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
        tiles = torch.zeros(num_tiles, 4, dtype=torch.int32)
        query = qkv[:, :num_heads]
        out = torch.empty(query.shape, dtype=dtype)
        hopper.paged_prefill_attention(
            query, kv, layer, tiles, tables, 0.125,
            window=window, soft_cap=soft_cap, sinks=sinks, out=out, num_tiles=tiles[0, :1],
        )  # fmt: skip
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dtype", nargs="?", default="bfloat16")
    parser.add_argument("head_dim", nargs="?", type=int, default=128)
    parser.add_argument("block_size", nargs="?", type=int, default=16)
    parser.add_argument("window", nargs="?", type=int, default=0)
    parser.add_argument("cap", nargs="?", type=float, default=0.0)
    parser.add_argument("sinks", nargs="?", type=int, choices=(0, 1), default=0)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    kernels = compile_all(
        dtype, args.head_dim, args.block_size, args.window, args.cap, has_sinks=bool(args.sinks)
    )
    report = {
        "kernels": len(kernels),
        "shared": max(each.metadata.shared for each in kernels),
        "spilled": max(Compiled("", 90, each).spilled_bytes for each in kernels),
    }
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
