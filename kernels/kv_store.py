"""The store of keys and values that are turned already, for models whose own code turns them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.float8_jit import (
    as_bytes,
    codes_of,
    codes_offset,
    exponent_of,
    is_float8,
    magnitude_bits,
    scales_offset,
)


@triton.jit(do_not_specialize=["layer"])
def _store_kv(
    key,
    value,
    slots,
    kv,
    layer,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    num_kv_heads: tl.constexpr,
    num_layers: tl.constexpr,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    FLOAT8: tl.constexpr,
):
    """One program stores HEADS heads of one token."""
    groups: tl.constexpr = (num_kv_heads + HEADS - 1) // HEADS
    token = (tl.program_id(0) // groups).to(tl.int64)
    slot = tl.load(slots + token)
    head = tl.program_id(0) % groups * HEADS + tl.arange(0, HEADS)
    dim = tl.arange(0, DIM)
    is_there = (head < num_kv_heads)[:, None] & (dim < head_dim)[None, :] & (slot >= 0)
    keys = tl.load(
        key + token * key_token_stride + head[:, None] * key_head_stride + dim[None, :],
        mask=is_there,
        other=0.0,
    )
    values = tl.load(
        value + token * value_token_stride + head[:, None] * value_head_stride + dim[None, :],
        mask=is_there,
        other=0.0,
    )
    run = ((slot // block_size * num_kv_heads + head) * num_layers + layer) * 2
    if FLOAT8:
        token = slot % block_size
        codes = kv + codes_offset(run, num_layers * 2, block_size, head_dim) + token * head_dim
        scales = kv + scales_offset(run, num_layers * 2, block_size, head_dim) + token
        is_head = (head < num_kv_heads) & (slot >= 0)
        _store_codes(codes, scales, keys.to(tl.float32), dim, is_there, is_head)
        codes += block_size * head_dim
        scales += block_size
        _store_codes(codes, scales, values.to(tl.float32), dim, is_there, is_head)
    else:
        place = (run * block_size + slot % block_size) * head_dim
        target = kv + place[:, None] + dim[None, :]
        tl.store(target, keys.to(kv.dtype.element_ty), mask=is_there)
        tl.store(target + block_size * head_dim, values.to(kv.dtype.element_ty), mask=is_there)


@triton.jit
def _store_codes(codes, scales, x, dim, is_there, is_head):
    """x float32 [HEADS, DIM] to where pointers [HEADS] say."""
    exponent = exponent_of(tl.max(magnitude_bits(x), 1))
    tl.store(codes[:, None] + dim[None, :], codes_of(x, exponent[:, None]), mask=is_there)
    tl.store(scales, exponent.to(tl.uint8), mask=is_head)


def store_kv(key: Tensor, value: Tensor, kv: Tensor, layer: int, slots: Tensor) -> None:
    """Writes keys and values to their slots.

    Args:
        key, value: [T, num_kv_heads, head_dim]; tokens and heads may be strided.
        kv: [blocks + 1, num_kv_heads, num_layers, 2, block_size, head_dim], contiguous; or of such
            a shape codes, with their scales behind them (reference_float8.py).
        layer: which layer of `kv`.
        slots: int64 [T], block id · block_size + offset; below zero: nothing is stored.
    """
    _, num_kv_heads, num_layers, _, block_size, head_dim = kv.shape
    num_tokens = len(key)
    assert key.shape == value.shape == (num_tokens, num_kv_heads, head_dim)
    assert key.stride(2) == value.stride(2) == 1 and len(slots) == num_tokens
    if num_tokens == 0:
        return
    dim = triton.next_power_of_2(head_dim)
    heads = min(triton.next_power_of_2(num_kv_heads), max(1, 1024 // dim))
    groups = triton.cdiv(num_kv_heads, heads)
    _store_kv[(num_tokens * groups,)](
        key,
        value,
        slots,
        as_bytes(kv),
        layer,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        num_kv_heads,
        num_layers,
        block_size,
        head_dim,
        HEADS=heads,
        DIM=dim,
        FLOAT8=is_float8(kv),
        num_warps=max(1, min(4, heads * dim // 256)),
    )
