"""Weighted wrap-around sums of KV blocks, the part of a block's digest that survives a copy."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.reference_sampling import random_bits

_NUM_SMS = 132


class DigestConfig(NamedTuple):
    """`group` sums (block, head) are made by one program, which so makes their weights once.

    `splits` > 1 gives a sum to several programs, which add to it.
    """

    group: int
    chunk: int
    splits: int
    num_warps: int
    table: bool = False


def block_sums(
    words: Tensor,
    block_ids: Tensor,
    *,
    out: Tensor | None = None,
    config: DigestConfig | None = None,
) -> Tensor:
    """Weighted sums of blocks, mod 2⁶⁴: Σ weight[i]·word[i], weights odd → int64 [n, num_heads].

    Args:
        words: int32 [num_blocks, num_heads, num_words], a view of the pool; words adjacent.
        block_ids: int32 or int64 [n], on the device, all valid.
        out: int64 [n, num_heads], contiguous.
    """
    _, num_heads, num_words = words.shape
    if words.dtype != torch.int32 or words.stride(2) != 1:
        raise ValueError("words must be int32 with adjacent words")
    num_sums = block_ids.numel() * num_heads
    if out is None:
        out = torch.empty(block_ids.numel(), num_heads, dtype=torch.int64, device=words.device)
    if num_sums == 0:
        return out
    config = config or _config(num_sums, num_words)
    weights = digest_weights(num_words, words.device) if config.table else words
    if config.splits > 1:
        out.zero_()
    num_chunks = triton.cdiv(num_words, config.chunk)
    _block_sums[(triton.cdiv(num_sums, config.group), config.splits)](
        words,
        block_ids,
        weights,
        out,
        num_sums,
        num_heads,
        num_words,
        words.stride(0),
        words.stride(1),
        triton.cdiv(num_chunks, config.splits) * config.chunk,
        GROUP=config.group,
        CHUNK=config.chunk,
        SPLIT=config.splits > 1,
        TABLE=config.table,
        num_warps=config.num_warps,
    )
    return out


@lru_cache(maxsize=8)
def digest_weights(num_words: int, device: torch.device) -> Tensor:
    """int64 [num_words], odd: the weights that block_sums computes, as a table."""
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    return random_bits(zero, num_words)[0] | 1


def _config(num_sums: int, num_words: int) -> DigestConfig:
    chunk = min(512, triton.next_power_of_2(num_words))
    group = min(8, triton.next_power_of_2(num_sums))
    programs = triton.cdiv(num_sums, group)
    # Making out zero first costs a launch, less than leaving processors idle.
    splits = 1 if programs >= 4 * _NUM_SMS else 4 * _NUM_SMS // programs
    # A program should have a few chunks over which its weights and its last sum pay.
    splits = max(1, min(splits, num_words // (8 * chunk)))
    return DigestConfig(group, chunk, splits, num_warps=8 if group * chunk >= 4096 else 4)


@triton.jit
def mix64(x):
    """The finaliser of SplitMix64 on uint64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit(do_not_specialize=["num_sums", "span"])
def _block_sums(
    words,
    block_ids,
    weights,
    out,
    num_sums,
    num_heads,
    num_words,
    stride_block,
    stride_head,
    span,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLIT: tl.constexpr,
    TABLE: tl.constexpr,
):
    sums = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    present = sums < num_sums
    block = tl.load(block_ids + sums // num_heads, mask=present, other=0).to(tl.int64)
    base = words + block * stride_block + (sums % num_heads).to(tl.int64) * stride_head
    start = tl.program_id(1) * span
    total = tl.zeros((GROUP, CHUNK), tl.int64)
    for first in range(start, min(start + span, num_words), CHUNK):
        index = first + tl.arange(0, CHUNK)
        inside = index < num_words
        if TABLE:
            weight = tl.load(weights + index, mask=inside, other=0)
        else:
            counter = (index + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
            weight = (mix64(counter) | 1).to(tl.int64, bitcast=True)
        word = tl.load(
            base[:, None] + index[None, :], mask=present[:, None] & inside[None, :], other=0
        )
        total += word.to(tl.int64) * weight[None, :]
    result = tl.sum(total, 1)
    if SPLIT:
        tl.atomic_add(out + sums, result, mask=present, sem="relaxed")
    else:
        tl.store(out + sums, result, mask=present)
