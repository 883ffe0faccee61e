"""Pools of keys and values in 8 bits for the tests of kernels; poison where nothing is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from baton.kernels import reference_float8


def empty_pool(shape: Sequence[int], device: torch.device) -> Tensor:
    """[blocks + 1, num_kv_heads, num_layers, 2, block_size, head_dim]: codes that are no numbers,
    with scales that are none."""
    *heads, num_layers, _, block_size, head_dim = shape
    num_bytes = num_layers * 2 * block_size * (head_dim + 1)
    memory = torch.full((*heads, num_bytes), 0xFF, dtype=torch.uint8)
    return reference_float8.codes_of(memory.to(device), block_size, head_dim)


def quantised_pool(kv: Tensor) -> Tensor:
    """A pool of numbers, NaN where nothing is, in 8 bits: there it stays empty."""
    pool = empty_pool(kv.shape, kv.device)
    codes, exponents = reference_float8.quantised(kv)
    is_there = ~kv.isnan().all(-1)
    pool.view(torch.uint8)[is_there] = codes.view(torch.uint8)[is_there]
    reference_float8.exponents_of(pool).copy_(exponents)
    return pool


def numbers_of(pool: Tensor) -> Tensor:
    """What kernels attend to, float64."""
    if pool.dtype != reference_float8.DTYPE:
        return pool.double()
    return reference_float8.widened(pool, torch.float64)
