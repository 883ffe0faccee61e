"""Compiles kernels/hopper_scaled.py for capability 9.0, with or without a GPU.

    python -m tests.kernels.compile_hopper_scaled [ROWS …]

Of llama-8b's products, as an engine launches them. Prints, as JSON, by product and rows, the bytes
of shared memory that a program takes, what its threads put into memory for want of registers, and
whether all of them have multiplied before one stores to shared memory what it exchanges with
others: that lies where codes were. To be run without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import sys

import torch

from baton.kernels.hopper_scaled import hopper_scaled, hopper_scaled_gated
from baton.kernels.reference_scaled import QuantisedRows
from baton.kernels.scaled_table import ROWS, choose_gated, choose_hopper
from baton.kernels.small_linear import SmallWeight
from tests.kernels.compile_streamed_linear import SIZES
from tests.kernels.compiled import Compiled, on_gpu, recording

_FLOAT8 = torch.float8_e4m3fn


def compile_all(all_rows: list[int]) -> dict[str, dict[str, int]]:
    report = {}
    for name, (num_out, num_in) in SIZES.items():
        weight = SmallWeight(
            torch.empty(num_out, num_in, dtype=_FLOAT8), torch.empty(num_out, 1), None, num_in
        )
        for rows in all_rows:
            x = QuantisedRows(
                on_gpu(torch.empty(rows, num_in, dtype=_FLOAT8)), torch.empty(1, rows).t()
            )
            residual = None
            if name in ("o", "down"):
                residual = torch.empty(rows, num_out, dtype=torch.bfloat16)
            config = choose_hopper(rows, num_out, num_in)
            if config is not None:
                with recording(90) as kernels:
                    hopper_scaled(x, weight, residual=residual, config=config, pdl=True)
                report[f"{name} {rows}"] = _report(kernels)
            gated = choose_gated(rows, num_out, num_in) if name == "gate, up" else None
            if gated is not None:
                with recording(90) as kernels:
                    hopper_scaled_gated(x, weight, "silu", config=gated, pdl=True)
                report[f"{name} {rows}, gated"] = _report(kernels)
    return report


def _report(kernels: list[Compiled]) -> dict[str, int]:
    (kernel,) = kernels
    behind = kernel.ptx.rpartition("wgmma.wait_group")[2].partition("st.shared")[0]
    is_settled = "bar.sync" in behind
    return {
        "shared": kernel.shared, "spilled": kernel.spilled_bytes, "is_settled": is_settled,
    }  # fmt: skip


if __name__ == "__main__":
    rows = [int(each) for each in sys.argv[1:]] or [*ROWS]
    sys.stdout.write(json.dumps(compile_all(rows)) + "\n")
