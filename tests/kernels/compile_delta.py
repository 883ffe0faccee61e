"""Compiles the gated delta rule and the convolution before it for GPUs that need not be there, at
qwen3_5's sizes.

    python -m tests.kernels.compile_delta [CAPABILITY [DTYPE ...]]

Prints, as JSON, what each takes of shared memory and spills of registers. Tensors have no memory.
To be run without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch
from torch import Tensor

from baton.kernels.causal_conv import causal_conv
from baton.kernels.gated_delta import gated_delta
from baton.kernels.gated_norm import gated_norm
from baton.kernels.reference_conv import Conv
from baton.kernels.reference_delta import DeltaGates
from baton.kernels.reference_gated_norm import GatedNorm
from baton.kernels.state_plan import DeviceStatePlan
from tests.kernels.compiled import SHARED_BYTES, Compiled, on_gpu, recording

_META = torch.device("meta")
_KEY_HEADS, _EACH, _KEY_DIM, _VALUE_DIM, _KERNEL = 16, 2, 128, 128, 4
_TOKENS = 96


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return on_gpu(torch.empty(shape, dtype=dtype, device=_META))


def compile_all(capability: int, dtype: torch.dtype) -> list[Compiled]:
    num_heads, wide, int32 = _KEY_HEADS * _EACH, torch.float32, torch.int32
    units = (_KEY_DIM, _KEY_DIM, _EACH * _VALUE_DIM)
    size, width = _KEY_HEADS * sum(units), sum(units)
    x = _empty(_TOKENS, size + num_heads * (_VALUE_DIM + 2), dtype=dtype)
    gates = DeltaGates(_empty(num_heads, dtype=wide), _empty(num_heads, dtype=wide))
    conv = Conv(_empty(_KERNEL, size, dtype=wide), None, _empty(size, dtype=int32))
    conv_state = _empty(5, _KEY_HEADS, 30, _KERNEL - 1, width, dtype=wide)
    state = _empty(5, _KEY_HEADS, 30, _EACH, _KEY_DIM, _VALUE_DIM, dtype=wide)
    slots, positions = _empty(_TOKENS, dtype=torch.int64), _empty(_TOKENS, dtype=int32)
    rows, tiles = _empty(3, 8, dtype=int32), _empty(4, 4, dtype=int32)
    plans = [
        DeviceStatePlan(slots, positions, 2),
        DeviceStatePlan(slots, positions, 32, rows, tiles, has_kept=True),
        DeviceStatePlan(slots, positions, 0, rows, tiles),
        DeviceStatePlan(slots, positions, 64, rows, tiles, has_kept=True, shared={}),
        DeviceStatePlan(slots, positions, 8, width=4),
        DeviceStatePlan(slots, positions, 64, width=4),
    ]
    num_standing = _empty(16, dtype=int32)
    pdl = capability == 90
    with recording(capability) as kernels:
        for plan in plans:
            qkv = causal_conv(x[:, :size], conv, conv_state, 3, plan, pdl=pdl)
            strength, decay = x[:, -2 * num_heads : -num_heads], x[:, -num_heads:]
            y = gated_delta(qkv, strength, decay, gates, state, 3, plan, pdl=pdl)
            plan.settle(num_standing)
        gate = x[:, size : size + num_heads * _VALUE_DIM]
        norm = GatedNorm(_empty(gate.shape[1], dtype=wide), _VALUE_DIM, 1e-6, norms_first=True)
        for num_tokens in (2, _TOKENS):
            gated_norm(y[:num_tokens].flatten(1), gate[:num_tokens], norm, pdl=pdl)
    return kernels


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("capability", nargs="?", type=int, default=90)
    parser.add_argument("dtypes", nargs="*")
    args = parser.parse_args()
    for name in args.dtypes or ["bfloat16", "float32"]:
        started_s = time.monotonic()
        kernels = compile_all(args.capability, getattr(torch, name))
        found = [
            {
                "name": each.name,
                "shared_bytes": each.shared,
                "spilled_bytes": each.spilled_bytes,
                "fits": each.shared <= SHARED_BYTES[args.capability],
            }
            for each in kernels
        ]
        seconds = round(time.monotonic() - started_s, 1)
        text = json.dumps({"dtype": name, "seconds": seconds, "kernels": found}, indent=1)
        print(text)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
