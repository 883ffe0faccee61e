"""Compiles the kernels of Mamba2's mixer for GPUs that need not be there, at sizes of models.

    python -m tests.kernels.compile_ssd [CAPABILITY [MODEL ...]]

Prints, as JSON, what each takes of shared memory and spills of registers. Tensors have no memory.
To be run without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from baton.kernels.gated_norm import gated_norm
from baton.kernels.reference_gated_norm import GatedNorm
from baton.kernels.reference_ssd import SsdWeights
from baton.kernels.ssd_scan import scan_config, ssd_scan
from baton.kernels.ssd_step import ssd_step
from tests.kernels.compiled import recording

SIZES = {
    "mamba2-2.7b": (80, 64, 128, 1),
    "nemotron-3-nano": (64, 64, 128, 8),
    "granite-4-h-tiny": (48, 64, 128, 1),
    "falcon-h1-34b": (32, 128, 256, 2),
}
"""Heads, their size, that of the state, groups."""


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def compile_all(capability: int, model: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    num_heads, head_dim, state_size, groups = SIZES[model]
    inner, wide = num_heads * head_dim, torch.float32
    a, d, dt_bias = (_empty(num_heads, dtype=wide) for _ in range(3))
    weights = SsdWeights(a, d, dt_bias, groups)
    states = _empty(9, num_heads, head_dim, state_size, dtype=wide)
    width = inner + 2 * groups * state_size
    with recording(capability) as kernels:
        for rows in (1, 32):
            x, dt = _empty(rows, width, dtype=dtype), _empty(rows, num_heads, dtype=dtype)
            slots, positions = _empty(rows, dtype=torch.int64), _empty(rows, dtype=torch.int32)
            out = _empty(rows, num_heads, head_dim)
            ssd_step(x, dt, weights, states, slots, positions, out)
            ssd_step(x, dt, weights, states, slots, positions, out, leaves_padding=True)
            if rows > 1:
                rest = weights, states, slots, positions
                ssd_step(x, dt, *rest, out, width=4)
                ssd_step(x, dt, *rest, None, width=4, num_standing=positions)
        for rows in (1, 8):
            of_rows = _empty(rows, 8, dtype=torch.int32), _empty(9, 4, dtype=torch.int32)
            x, dt = _empty(512, width, dtype=dtype), _empty(512, num_heads, dtype=dtype)
            out = _empty(512, num_heads, head_dim, dtype=dtype)
            for tiles_each in (0, 4):
                config = scan_config(head_dim, state_size, num_heads, rows, 9, dtype.itemsize)
                config = replace(config, tiles_each=tiles_each)
                ssd_scan(x, dt, weights, states, *of_rows, out, config=config)
        norm = GatedNorm(_empty(inner), inner // groups, 1e-5)
        gated_norm(_empty(32, inner, dtype=dtype), _empty(32, inner, dtype=dtype), norm)
    return [
        {
            "kernel": kernel.name,
            "model": model,
            "dtype": str(dtype),
            "shared": kernel.shared,
            "spilled": kernel.spilled_bytes,
        }
        for kernel in kernels
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("capability", nargs="?", type=int, default=90)
    parser.add_argument("models", nargs="*", help=f"of {', '.join(SIZES)}")
    args = parser.parse_args()
    report = [
        each
        for model in args.models or SIZES
        for dtype in (torch.bfloat16, torch.float32)
        for each in compile_all(args.capability, model, dtype)
    ]
    sys.stdout.write("\n".join(map(json.dumps, report)) + "\n")


if __name__ == "__main__":
    main()
