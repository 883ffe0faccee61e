"""Keys and values of prompt chunks, widened from 8 bits for kernels of attention that take 16.

What a step's chunks see of one layer is written, row after row, to blocks that all layers share:

    codes and scales, by block table ─► stretches of 128 tokens, one after another ─► attention

What several chunks share is widened for each: once a chunk, where attention reads it for every tile
of tokens and head.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.float8_jit import as_bytes, codes_offset, scale_of, scales_offset, widened
from baton.kernels.overlap import overlap
from baton.kernels.reference_float8 import STRETCH_TOKENS

STRETCH_FIELDS = 4
_PART_TOKENS = 64
"""That a program widens at a time."""
_PROGRAMS_WITHOUT_GPU = 6


def num_stretches(num_keys: int) -> int:
    return -(-num_keys // STRETCH_TOKENS)


def cut_stretches(
    rows: Sequence[tuple[int, int, int]],
) -> tuple[npt.NDArray[np.int32], list[int]]:
    """Stretches of what chunks see, chunk after chunk.

    Args:
        rows: slot, position of the first token, and end of each chunk.

    Returns:
        int32 [N, 4], slot, first position, end of the row, position of the chunk's first token; and
        of each chunk the number of its first stretch.
    """
    stretches: list[tuple[int, int, int, int]] = []
    firsts = []
    for slot, position, end in rows:
        firsts.append(len(stretches))
        stretches += [(slot, first, end, position) for first in range(0, end, STRETCH_TOKENS)]
    return np.array(stretches, np.int32).reshape(-1, STRETCH_FIELDS), firsts


def widen_stretches(
    kv: Tensor,
    layer: int,
    block_tables: Tensor,
    stretches: Tensor,
    out: Tensor,
    *,
    window: int = 0,
    counted: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """Stretch i to the blocks from i · STRETCH_TOKENS / block_size on.

    Args:
        kv: [blocks + 1, num_kv_heads, num_layers, 2, block_size, head_dim], codes, with their
            scales behind them (reference_float8.py).
        layer: which layer of `kv`.
        block_tables: int32 [slots, blocks]; entries outside the keys that a chunk sees are not
            read.
        stretches: int32 [N, 4], from `cut_stretches`.
        out: [≥ N · STRETCH_TOKENS / block_size, num_kv_heads, 1, 2, block_size, head_dim]. What no
            token of a chunk sees is not written.
        window: a token at position p sees keys from p − window + 1 on; 0: all of them.
        counted: int32 [1], on the device: how many of the stretches count; None: all.
        pdl: launch while the previous kernel still runs.

    Returns:
        `out`.
    """
    _, num_kv_heads, num_layers, _, block_size, head_dim = kv.shape
    parts = num_kv_heads * 2 * (STRETCH_TOKENS // _PART_TOKENS)
    _widen[(min(len(stretches) * parts, _num_programs(kv.device)),)](
        out,
        as_bytes(kv),
        stretches,
        stretches if counted is None else counted,
        block_tables,
        layer,
        window,
        block_tables.stride(0),
        len(stretches),
        HEADS=num_kv_heads,
        LAYERS=num_layers,
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        STRETCH=STRETCH_TOKENS,
        FIELDS=STRETCH_FIELDS,
        TOKENS=_PART_TOKENS,
        BLOCK_D=triton.next_power_of_2(head_dim),
        COUNTED=counted is not None,
        num_warps=4,
        **overlap(kv, pdl=pdl),
    )
    return out


@cache
def _num_programs(device: torch.device) -> int:
    """As many as run at once: eight for each multiprocessor."""
    if device.type != "cuda":
        return _PROGRAMS_WITHOUT_GPU
    properties: Any = torch.cuda.get_device_properties(device)
    return 8 * int(properties.multi_processor_count)


@triton.jit(do_not_specialize=["layer", "window", "table_stride", "num_stretches"])
def _widen(
    out,
    kv,
    stretches,
    counted,
    block_tables,
    layer,
    window,
    table_stride,
    num_stretches,
    HEADS: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    STRETCH: tl.constexpr,
    FIELDS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COUNTED: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program takes parts, TOKENS keys or values of one head, one after another."""
    CUTS: tl.constexpr = STRETCH // TOKENS
    PARTS: tl.constexpr = HEADS * 2 * CUTS
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if COUNTED:
        num_stretches = tl.load(counted)
    dim = tl.arange(0, BLOCK_D)
    for number in tl.range(tl.program_id(0), num_stretches * PARTS, tl.num_programs(0)):
        stretch = number // PARTS
        run = number % PARTS // CUTS
        in_stretch = number % CUTS * TOKENS + tl.arange(0, TOKENS)
        entry = stretches + stretch * FIELDS
        slot = tl.load(entry)
        position = tl.load(entry + 1) + in_stretch
        end = tl.load(entry + 2)
        low = tl.where(window > 0, tl.load(entry + 3) - window + 1, 0)
        is_seen = (position >= low) & (position < end)
        table = block_tables + slot.to(tl.int64) * table_stride
        block = tl.load(table + position // BLOCK_SIZE, mask=is_seen, other=0)
        offset = position % BLOCK_SIZE
        # Keys and values of a head are beside each other in a layer.
        of_layer = (block.to(tl.int64) * HEADS + run // 2) * LAYERS + layer
        held = of_layer * 2 + run % 2
        source = kv + codes_offset(held, LAYERS * 2, BLOCK_SIZE, HEAD_DIM)
        scales = kv + scales_offset(held, LAYERS * 2, BLOCK_SIZE, HEAD_DIM)
        is_number = is_seen[:, None] & (dim < HEAD_DIM)[None, :]
        codes = tl.load(
            source[:, None] + (offset * HEAD_DIM)[:, None] + dim[None, :], mask=is_number, other=0
        )
        exponent = tl.load(scales + offset, mask=is_seen, other=0)
        numbers = widened(codes.to(tl.int32)) * scale_of(exponent)[:, None]
        # Stretches are whole blocks, so an offset is the same here and there.
        place = (stretch.to(tl.int64) * STRETCH + in_stretch) // BLOCK_SIZE * (HEADS * 2) + run
        target = out + ((place * BLOCK_SIZE + offset) * HEAD_DIM)[:, None] + dim[None, :]
        tl.store(target, numbers.to(out.dtype.element_ty), mask=is_number)
