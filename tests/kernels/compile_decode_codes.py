"""Compiles kernels/decode_float8.py for GPUs that need not be there.

    python -m tests.kernels.compile_decode_codes [CAPABILITY …]

Prints, as JSON, by capability and shape of heads, how the codes of keys lie in threads where they
become float16. To be run without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import sys

import torch

from baton.kernels import decode_attention
from baton.kernels.decode_plan import DecodeConfig, make_work, plan_decode
from baton.kernels.reference_float8 import codes_of
from tests.kernels.compiled import Compiled, on_gpu, recording

_META = torch.device("meta")
_ROWS, _KV_HEADS, _LAYERS = 32, 2, 3
_SHAPES = [(128, 16, 4), (80, 16, 2), (18, 2, 1)]
"""Dimensions of a head, tokens of a block, warps: whole vectors, padded ones, and such as are
copied two codes at a time."""
_CAST = re.compile(r'inline_asm "\{\\0A[^"]*mov\.b32 \{l, h\}, \$2.*?: tensor<\S+, (#.*)> -> ')


def _compile(capability: int, head_dim: int, block_size: int, num_warps: int) -> list[Compiled]:
    config = DecodeConfig(block_n=16 * num_warps, num_warps=num_warps, num_stages=2)
    ints = torch.empty(64, 64, dtype=torch.int32, device=_META)
    memory = torch.empty(
        9, _KV_HEADS, _LAYERS * 2 * block_size * (head_dim + 1), dtype=torch.uint8, device=_META
    )
    query = torch.empty(_ROWS, 8, head_dim, dtype=torch.bfloat16, device=_META)
    work = make_work(_ROWS, _KV_HEADS, 8, head_dim, _META, config=config, itemsize=1)
    decode_attention.shared_bytes = lambda _: 100_000  # type: ignore[assignment, attr-defined]
    decode_attention.casts_codes = lambda _: True  # type: ignore[assignment, attr-defined]
    with recording(capability) as kernels:
        plan_decode(ints[0, :_ROWS], ints[0], work)
        decode_attention.paged_decode_attention(
            on_gpu(query), on_gpu(codes_of(memory, block_size, head_dim)), 1, ints[0, :_ROWS],
            ints[0], ints, work, 1.0,
        )  # fmt: skip
    return [kernel for kernel in kernels if kernel.name == "attend_codes"]


def layouts(capabilities: list[int]) -> dict[str, list[str]]:
    report = {}
    for capability in capabilities:
        for shape in _SHAPES:
            [kernel] = _compile(capability, *shape)
            lines = kernel.kernel.asm["ttgir"].splitlines()
            casts = (_CAST.search(line) for line in lines if "prmt" not in line)
            report[f"{capability} {shape}"] = [cast[1] for cast in casts if cast]
    return report


if __name__ == "__main__":
    sys.stdout.write(json.dumps(layouts([int(each) for each in sys.argv[1:]] or [90])) + "\n")
