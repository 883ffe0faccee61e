"""Where keys and values that are kept in 8 bits are widened, layer after layer, for the kernel of
attention that takes 16 (kernels/float8_widen.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baton.kernels.float8_widen import num_stretches
from baton.kernels.prefill_attention import widens
from baton.kernels.reference_float8 import STRETCH_TOKENS

_USUAL_BYTES, _MOST_BYTES = 2**28, 2**30
"""For many short rows, and for a long one: 65,536 and 262,144 tokens of 8 heads of 128. What sees
more than there is room for is attended to in 8 bits."""


@dataclass(frozen=True, slots=True)
class WidenedKeys:
    kv: list[Tensor | None]
    """By cache group, [blocks, num_kv_heads, 1, 2, block_size, head_dim], all in the same memory;
    None: the kernel does not take such a group."""
    block_tables: Tensor
    """int32 [blocks, blocks]: from each block on."""
    num_stretches: int
    """That there is room for."""
    blocks_each: int
    """Of a stretch."""


def make_widened_keys(
    pools: Sequence[Tensor],
    windows: Sequence[int],
    dtype: torch.dtype,
    *,
    longest: int,
    most_rows: int,
) -> WidenedKeys | None:
    """None: there is no such kernel here, or nothing is kept in 8 bits.

    Args:
        pools: of each cache group that grows, as kernels take them.
        windows: likewise, see `DevicePlan`.
        dtype: of what is multiplied.
        longest: tokens of a row at most. With fewer there is never more room.
    """
    are_widened = [widens(kv, dtype, window) for kv, window in zip(pools, windows, strict=False)]
    taken = [kv for kv, is_widened in zip(pools, are_widened, strict=True) if is_widened]
    if not taken:
        return None
    sizes = [2 * kv.shape[1] * kv.shape[5] for kv in taken]
    bytes_each = max(sizes) * STRETCH_TOKENS * dtype.itemsize
    of_row = num_stretches(longest)
    usual = min(most_rows * of_row, _USUAL_BYTES // bytes_each)
    most = max(1, min(max(of_row, usual), _MOST_BYTES // bytes_each))

    device, block_size = taken[0].device, taken[0].shape[4]
    blocks_each = STRETCH_TOKENS // block_size
    num_blocks = most * blocks_each
    memory = torch.empty(most * STRETCH_TOKENS * max(sizes), dtype=dtype, device=device)

    def room_of(kv: Tensor) -> Tensor:
        shape = (num_blocks, kv.shape[1], 1, 2, *kv.shape[4:])
        return memory[: math.prod(shape)].view(shape)

    counting = torch.arange(2 * num_blocks, dtype=torch.int32, device=device)
    return WidenedKeys(
        [
            room_of(kv) if is_widened else None
            for kv, is_widened in zip(pools, are_widened, strict=True)
        ],
        counting.as_strided((num_blocks, num_blocks), (1, 1)),
        most,
        blocks_each,
    )
