"""Compiles the kernels of latent attention for GPUs that need not be there, at deepseek's sizes.

    python -m tests.kernels.compile_latent [CAPABILITY [HEADS ...]]

Prints, as JSON, what each takes of shared memory and spills of registers. Tensors have no memory.
To be run without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch
from torch import Tensor

from baton.kernels import (
    hopper_latent_attention,
    latent_attention,
    latent_expand,
    latent_heads,
    prefill_attention,
)
from baton.kernels.decode_plan import make_work
from baton.kernels.latent_store import rope_and_store_latent
from tests.kernels.compiled import SHARED_BYTES, Compiled, on_gpu, recording

_META, _BF16 = torch.device("meta"), torch.bfloat16
_SCALE = 0.1
_ROWS, _TOKENS = 32, 48


def _empty(*shape: int, dtype: torch.dtype = _BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=_META)


def compile_all(capability: int, num_heads: int, rank: int = 512, rope: int = 64) -> list[Compiled]:
    modules: list[Any] = [latent_attention, latent_expand, prefill_attention]
    for module in modules:
        module.shared_bytes = lambda _: SHARED_BYTES[capability]
    hopper: Any = hopper_latent_attention
    hopper._processors = lambda _: 132 if capability == 90 else 0
    is_hopper, key_dim, value_dim = capability == 90, 128, 128
    kv = _empty(9, 1, 27, 1, 16, rank + rope)
    tables, int32 = _empty(64, 64, dtype=torch.int32), torch.int32
    query = _empty(_TOKENS, num_heads, key_dim + rope)
    turned = query[..., key_dim:]
    with recording(capability) as kernels:
        angles = _empty(99, rope // 2, dtype=torch.float32)
        rope_and_store_latent(
            query, _empty(_TOKENS, 1536 + rank + rope)[:, 1536:], _empty(rank), 1e-6, angles,
            angles, _empty(_TOKENS, dtype=int32), _empty(_TOKENS, dtype=torch.int64), kv, 3,
            pdl=is_hopper,
        )  # fmt: skip
        config = latent_attention.latent_decode_config(_ROWS, num_heads, kv)
        latent_attention.latent_decode_attention(
            _empty(num_heads, _ROWS, rank).transpose(0, 1), turned[:_ROWS], kv, 3,
            _empty(_ROWS, dtype=int32), tables,
            make_work(_ROWS, 1, num_heads, rank, _META, config=config), _SCALE, pdl=is_hopper,
        )  # fmt: skip
        key, value = _empty(num_heads, key_dim, rank), _empty(num_heads, rank, value_dim)
        for num_rows in (1, 9, _ROWS, latent_heads.MOST_ROWS):
            latent_heads.store_and_absorb(
                on_gpu(_empty(num_rows, num_heads, key_dim + rope)),
                _empty(num_rows, rank + rope), _empty(rank), 1e-6, angles, angles,
                _empty(num_rows, dtype=int32), _empty(num_rows, dtype=torch.int64), kv, 3, key,
                pdl=is_hopper,
            )  # fmt: skip
            attended = on_gpu(_empty(num_rows, num_heads, rank))
            latent_heads.of_latents(attended, value, pdl=is_hopper)
        work = make_work(1, 1, num_heads, rank, _META, config=config)
        attended = on_gpu(_empty(1, num_heads, rank))
        latent_heads.add_up_values(attended, value, work, pdl=is_hopper)
        tiles = _empty(3, 4, dtype=int32)
        latent_attention.latent_chunk_attention(
            _empty(_TOKENS, num_heads, rank), turned, kv, 3, tiles, tables, _SCALE, block_m=16,
            out=_empty(_TOKENS, num_heads, rank),
        )  # fmt: skip
        at_once = latent_expand.heads_at_once(num_heads)
        expanded = latent_expand.expand_latents(
            kv, 3, tables, 5, 99, _empty(at_once, key_dim, rank), _empty(at_once, rank, value_dim)
        )
        latent_expand.expand_stretches(
            kv, 3, tables, _empty(5, 3, dtype=int32), latent_expand.STRETCH_TOKENS,
            _empty(at_once, key_dim, rank), _empty(at_once, rank, value_dim),
        )  # fmt: skip
        for block_m in (16, 64, 128):
            prefill_attention.paged_prefill_attention(
                query[:, :at_once], expanded, 0, tiles, tables, _SCALE, block_m=block_m
            )
    return kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("capability", nargs="?", type=int, default=90)
    parser.add_argument("heads", nargs="*", type=int)
    args = parser.parse_args()
    report = [
        {
            "kernel": kernel.name,
            "heads": num_heads,
            "shared": kernel.shared,
            "spilled": kernel.spilled_bytes,
        }
        for num_heads in args.heads or (16, 128)
        for kernel in compile_all(args.capability, num_heads)
    ]
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
