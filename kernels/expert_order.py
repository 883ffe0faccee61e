"""The pairs (token, expert) of a step, sorted by expert: counted in chunks, then put in place."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.experts_table import UNSORTED_TOKENS
from baton.kernels.overlap import overlap
from baton.kernels.reference_experts import Routes

_CHUNK = 128
"""Pairs that a program sorts."""
_CHUNKS_AT_ONCE = 16
"""Of so many each program sees itself what lies before its own; more are summed up before."""


class Order(NamedTuple):
    """A step's pairs, sorted."""

    pairs: Tensor
    """int32 [T · top_k]: the pairs token · top_k + place, expert by expert, by rising number."""
    ends: Tensor
    """int32 [experts]: where each expert's end."""


def order_of(routes: Routes, num_experts: int, *, pdl: bool = False) -> Order | None:
    """None: there are so few tokens that their pairs stay as they are."""
    if len(routes.experts) <= UNSORTED_TOKENS:
        return None
    chosen = routes.experts
    num_pairs = chosen.numel()
    num_chunks = triton.cdiv(num_pairs, _CHUNK)
    block = max(16, triton.next_power_of_2(num_experts))
    launch = overlap(chosen, pdl=pdl)

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=chosen.device)

    counts = ints(num_chunks, block)
    order = Order(ints(num_pairs), ints(num_experts))
    _count[(num_chunks,)](
        counts, chosen, num_pairs, CHUNK=_CHUNK, BLOCK=block, num_warps=8, **launch
    )
    totals = None
    if num_chunks > _CHUNKS_AT_ONCE:
        totals = ints(block)
        _sum_up[(block // 16,)](
            totals, counts, num_chunks, CHUNKS=_CHUNKS_AT_ONCE, BLOCK=block, num_warps=4, **launch
        )
    _place[(num_chunks,)](
        order.pairs,
        order.ends,
        counts,
        totals,
        chosen,
        num_pairs,
        num_chunks,
        NUM_EXPERTS=num_experts,
        CHUNK=_CHUNK,
        CHUNKS=_CHUNKS_AT_ONCE,
        BLOCK=block,
        num_warps=8,
        **launch,
    )
    return order


@triton.jit(do_not_specialize=["num_pairs"])
def _count(
    counts_ptr, chosen_ptr, num_pairs, CHUNK: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """How many of a chunk's pairs each expert has."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    chunk = tl.program_id(0)
    pair = chunk * CHUNK + tl.arange(0, CHUNK)
    own = tl.load(chosen_ptr + pair, mask=pair < num_pairs, other=-1)
    expert = tl.arange(0, BLOCK)
    is_own = (own[:, None] == expert[None, :]).to(tl.int32)
    tl.store(counts_ptr + chunk * BLOCK + expert, tl.sum(is_own, 0))


@triton.jit(do_not_specialize=["num_chunks"])
def _sum_up(
    totals_ptr,
    counts_ptr,
    num_chunks,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Of 16 experts: how many pairs there are, and in place of each chunk's count what the chunks
    before it have."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    expert = tl.program_id(0) * 16 + tl.arange(0, 16)
    total = tl.zeros([16], tl.int32)
    for first in tl.range(0, num_chunks, 4 * CHUNKS):
        chunk = first + tl.arange(0, 4 * CHUNKS)
        at = counts_ptr + chunk[:, None] * BLOCK + expert[None, :]
        is_there = (chunk < num_chunks)[:, None]
        count = tl.load(at, mask=is_there, other=0)
        tl.store(at, total[None, :] + tl.cumsum(count, 0) - count, mask=is_there)
        total += tl.sum(count, 0)
    tl.store(totals_ptr + expert, total)


@triton.jit(do_not_specialize=["num_pairs", "num_chunks"])
def _place(
    pairs_ptr,
    ends_ptr,
    counts_ptr,
    totals_ptr,
    chosen_ptr,
    num_pairs,
    num_chunks,
    NUM_EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Puts a chunk's pairs where they belong: behind those of lower experts, and behind those of
    the same expert in earlier chunks. Without totals there are CHUNKS at most, as counted."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    chunk = tl.program_id(0)
    expert = tl.arange(0, BLOCK)
    if totals_ptr is not None:
        total = tl.load(totals_ptr + expert)
        before = tl.load(counts_ptr + chunk * BLOCK + expert)
    else:
        other = tl.arange(0, CHUNKS)
        at = counts_ptr + other[:, None] * BLOCK + expert[None, :]
        count = tl.load(at, mask=(other < num_chunks)[:, None], other=0)
        total = tl.sum(count, 0)
        before = tl.sum(tl.where((other < chunk)[:, None], count, 0), 0)
    end = tl.cumsum(total, 0)
    start = end - total + before
    pair = chunk * CHUNK + tl.arange(0, CHUNK)
    own = tl.load(chosen_ptr + pair, mask=pair < num_pairs, other=-1)
    is_own = (own[:, None] == expert[None, :]).to(tl.int32)
    rank = tl.cumsum(is_own, 0) - 1
    place = tl.sum(is_own * (start[None, :] + rank), 1)
    tl.store(pairs_ptr + place, pair, mask=pair < num_pairs)
    if chunk == 0:
        tl.store(ends_ptr + expert, end, mask=expert < NUM_EXPERTS)
