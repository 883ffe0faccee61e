"""Compiles kernels/streamed_linear.py for capability 9.0, with or without a GPU.

    python -m tests.kernels.compile_streamed_linear FORM [ROWS …]

Of llama-8b's products, as an engine launches them; FORM is fp8, int4 or int4-offsets. Prints, as
JSON, by product and rows, the bytes of shared memory that a program takes and what its threads put
into memory for want of registers. To be run without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch

from baton.kernels import streamed_linear
from baton.kernels.reference_scaled import GROUP, InputScheme
from baton.kernels.small_linear import SmallWeight, by_groups, small_linear, takes_norm
from tests.kernels.compiled import on_gpu, recording

SIZES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate, up": (28672, 4096), "down": (4096, 14336)}
_BF16 = torch.bfloat16


def compile_all(form: str, all_rows: list[int]) -> dict[str, dict[str, int]]:
    streamed_linear._runs_on = lambda _: True  # type: ignore[assignment]
    inputs = InputScheme() if form == "fp8" else None
    report = {}
    for name, (num_out, num_in) in SIZES.items():
        weight = by_groups(_weight(form, num_out, num_in), _BF16)
        for rows in all_rows:
            x = on_gpu(torch.empty(rows, num_in, dtype=_BF16))
            options: dict[str, Any] = {"inputs": inputs}
            if name in ("o", "down"):
                options["residual"] = torch.empty(rows, num_out, dtype=_BF16)
            elif takes_norm(rows, weight, _BF16, inputs):
                options |= {"norm_weight": torch.empty(num_in, dtype=_BF16), "eps": 1e-5}
            if name == "gate, up":
                options["activation"] = "silu"
            with recording(90) as kernels:
                small_linear(x, weight, pdl=True, **options)
            (kernel,) = kernels
            assert kernel.name == "streamed_kernel"
            report[f"{name} {rows}"] = {"shared": kernel.shared, "spilled": kernel.spilled_bytes}
    return report


def _weight(form: str, num_out: int, num_in: int) -> SmallWeight:
    if form.startswith("int4"):
        codes = torch.empty(num_out, num_in // 2, dtype=torch.uint8)
        scale = torch.empty(num_out, num_in // GROUP)
        return SmallWeight(codes, scale, scale if form == "int4-offsets" else None, num_in)
    codes = torch.empty(num_out, num_in, dtype=torch.float8_e4m3fn)
    return SmallWeight(codes, torch.empty(num_out, 1), None, num_in)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("form", choices=("fp8", "int4", "int4-offsets"))
    parser.add_argument("rows", nargs="*", type=int)
    args = parser.parse_args()
    report = compile_all(args.form, args.rows or [1])
    sys.stdout.write(json.dumps(report) + "\n")
