"""Attention of prompt chunks whose keys are shared by several programs, on a grid of fixed size.

What kernels/prefill_attention.py computes, from a list of work items (kernels/prefill_items.py)
that lies on the device, as does their number: one launch, captured once, serves every mixture of
chunks. So many programs as run at once take items, an item being also some heads, one after
another. Of a tile of several items each leaves its normalised sum and the logarithm (base 2) of its
weight, and whichever comes last adds them up.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.float8_jit import as_bytes, has_assembler, is_float8
from baton.kernels.overlap import overlap
from baton.kernels.prefill_attention import (
    _walk,
    block_m_for,
    load_queries,
    no_sums,
    prefill_config,
)
from baton.kernels.prefill_items import ITEM_FIELDS, most_places
from baton.kernels.shared_memory import shared_bytes

_LOG2E = 1.4426950408889634
_PROGRAMS_WITHOUT_GPU = 6
_ROWS_ADDED_UP = 16
"""At a time; as many as the smallest product has."""


@dataclass(frozen=True, slots=True)
class ItemConfig:
    """How the kernel runs."""

    block_m: int
    """Query tokens of an item at most."""
    pack: int
    """Heads of a KV head among the rows of a product."""
    block_n: int
    num_warps: int
    num_stages: int
    at_once: int = 8
    """Sums that are read together."""


def item_config(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    itemsize: int,
    device: torch.device,
    *,
    is_float8: bool = False,
) -> ItemConfig:
    """How chunks are cut, whatever their lengths. `itemsize`: bytes of a query's number.
    `is_float8`: as for `prefill_config`.

    On an H200, 64 rows of one head are as fast for 16 tokens as for 64, and faster than heads
    packed together. Of wider heads registers have room for 16 tokens of several.
    """
    block_m = block_m_for(64 if head_dim <= 128 else 16, head_dim, itemsize)
    group = num_heads // num_kv_heads
    config = prefill_config(
        block_m, group, head_dim, itemsize, shared_bytes(device), is_float8=is_float8
    )
    return ItemConfig(
        min(block_m, config.tokens or block_m),
        config.pack,
        config.block_n if head_dim <= 128 else min(config.block_n, 32),
        config.num_warps,
        config.num_stages,
    )


@dataclass(frozen=True, slots=True)
class ItemWork:
    """What items leave for those that add them up, and how they are cut; see `make_item_work`."""

    config: ItemConfig
    num_programs: int
    most_cuts: int
    """As of `cut_items`."""
    partial: Tensor
    """float32 [places, units, rows of a product, head_dim padded]; a unit is `pack` heads."""
    weight: Tensor
    """float32 [places, units, rows of a product]"""
    arrived: Tensor
    """int32 [places, units]: items of a tile that are done; zero between kernels."""


def make_item_work(
    config: ItemConfig,
    num_heads: int,
    head_dim: int,
    device: torch.device,
    *,
    num_programs: int | None = None,
) -> ItemWork:
    """Allocates what adding up needs. Launches that run one after another share it.

    `num_programs`: how many run at the most; None: as many as the device has room for.
    """
    units = num_heads // config.pack
    num_programs = num_programs or _num_programs(device)
    most_cuts = max(1, num_programs // units)
    places = most_places(most_cuts)
    block_m, block_d = _product_rows(config), _padded(head_dim)
    return ItemWork(
        config,
        num_programs,
        most_cuts,
        torch.empty(places, units, block_m, block_d, dtype=torch.float32, device=device),
        torch.empty(places, units, block_m, dtype=torch.float32, device=device),
        torch.zeros(places, units, dtype=torch.int32, device=device),
    )


@cache
def _num_programs(device: torch.device) -> int:
    """Two for each multiprocessor."""
    if device.type != "cuda":
        return _PROGRAMS_WITHOUT_GPU
    return 2 * int(torch.cuda.get_device_properties(device).multi_processor_count)


def _padded(head_dim: int) -> int:
    """Room for the halves that codes are multiplied in, too."""
    return max(32, int(triton.next_power_of_2(head_dim)))


def _product_rows(config: ItemConfig) -> int:
    return max(16, int(triton.next_power_of_2(config.block_m * config.pack)))


def split_prefill_attention(
    query: Tensor,
    kv: Tensor,
    layer: int,
    items: Tensor,
    num_items: Tensor,
    block_tables: Tensor,
    work: ItemWork,
    scale: float,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    out: Tensor,
    pdl: bool = False,
) -> Tensor:
    """As `paged_prefill_attention`, but for what follows.

    Args:
        items: int32 [most, 9], from `cut_items` with the `block_m`, `block_n` and `most_cuts` of
            `work` and this window.
        num_items: int32 [1], on the device: how many of them there are; the others are not read.
        out: [T, num_heads, head_dim]; only tokens in items are written.
        pdl: launch while the previous kernel still runs.
    """
    _, num_heads, head_dim = query.shape
    _, num_kv_heads, num_layers, _, block_size, _ = kv.shape
    config = work.config
    units = num_heads // config.pack
    _attend_items[(min(work.num_programs, items.shape[0] * units),)](
        query,
        as_bytes(kv),
        items,
        num_items,
        block_tables,
        out,
        sinks,
        work.partial,
        work.weight,
        work.arrived,
        layer,
        scale * _LOG2E,
        query.stride(0),
        query.stride(1),
        out.stride(0),
        out.stride(1),
        block_tables.stride(0),
        num_heads,
        num_kv_heads,
        num_layers,
        block_size,
        head_dim,
        window,
        PACK=config.pack,
        BLOCK_M=_product_rows(config),
        BLOCK_N=config.block_n,
        BLOCK_D=_padded(head_dim),
        STAGES=config.num_stages,
        SOFT_CAP=soft_cap * _LOG2E,
        FIELDS=ITEM_FIELDS,
        ROWS=_ROWS_ADDED_UP,
        AT_ONCE=config.at_once,
        FLOAT8=is_float8(kv),
        ASM=has_assembler(),
        num_warps=config.num_warps,
        **overlap(query, pdl=pdl),
    )
    return out


@triton.jit(do_not_specialize=["layer", "table_stride"])
def _attend_items(
    query,
    kv,
    items,
    num_items,
    block_tables,
    out,
    sinks,
    partial,
    weight,
    arrived,
    layer,
    scale,
    query_token_stride,
    query_head_stride,
    out_token_stride,
    out_head_stride,
    table_stride,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    num_layers: tl.constexpr,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    window: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    FIELDS: tl.constexpr,
    ROWS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    FLOAT8: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Row m of the products is token m // PACK of the item, head m % PACK of the unit."""
    UNITS: tl.constexpr = num_heads // PACK
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    count = tl.load(num_items) * UNITS
    for number in tl.range(tl.program_id(0), count, tl.num_programs(0), num_stages=1):
        entry = items + number // UNITS * FIELDS
        first_token = tl.load(entry).to(tl.int64)
        num_tokens = tl.load(entry + 1)
        slot = tl.load(entry + 2)
        first_position = tl.load(entry + 3)
        begin = tl.load(entry + 4)
        stop = tl.load(entry + 5)
        place = tl.load(entry + 6)
        first_place = tl.load(entry + 7)
        splits = tl.load(entry + 8)
        unit = number % UNITS
        first_head = unit * PACK
        kv_head = first_head // (num_heads // num_kv_heads)

        row = tl.arange(0, BLOCK_M)
        token = row // PACK
        head = first_head + row % PACK
        dim = tl.arange(0, BLOCK_D)
        real = (token < num_tokens)[:, None] & (dim < head_dim)[None, :]
        source = query + (first_token + token)[:, None] * query_token_stride
        own_tokens = (token < num_tokens)[:, None]
        queries = load_queries(
            source, head[:, None] * query_head_stride, own_tokens, head_dim, BLOCK_D, FLOAT8
        )
        position = first_position + token

        end = first_position + num_tokens
        # All tokens see the keys between these whole; `begin` is a multiple of BLOCK_N, and so is
        # `stop` unless it is the end.
        clear_end = tl.maximum(tl.minimum((first_position + 1) // BLOCK_N * BLOCK_N, stop), begin)
        if window > 0:
            low = tl.maximum(first_position - window + 1, 0)
            clear_start = tl.maximum(end - window, 0)
            clear_start = (clear_start + BLOCK_N - 1) // BLOCK_N * BLOCK_N
            clear_start = tl.minimum(tl.maximum(clear_start, begin), clear_end)
            first_masked = begin
            hole_size = clear_end - clear_start
        else:
            low = 0
            clear_start = begin
            first_masked = clear_end
            hole_size = 0

        table = block_tables + slot.to(tl.int64) * table_stride
        block_runs: tl.constexpr = num_kv_heads * num_layers * 2
        first_run = (kv_head * num_layers + layer) * 2
        acc = no_sums(BLOCK_M, BLOCK_D, FLOAT8)
        total = tl.zeros([BLOCK_M], tl.float32)
        # Finite, so that a tile of hidden keys gives exp2(−inf), never exp2(−inf + inf).
        peak = tl.full([BLOCK_M], -1.0e30, tl.float32)
        acc, total, peak = _walk(
            acc, total, peak, queries, kv, kv, table, first_run,
            clear_start, clear_end, 0, 0, low, end, position, scale,
            block_runs, num_layers * 2, block_size, head_dim, window, BLOCK_N, BLOCK_D, STAGES,
            False, False, SOFT_CAP, FLOAT8, ASM,
        )  # fmt: skip
        acc, total, peak = _walk(
            acc, total, peak, queries, kv, kv, table, first_run,
            first_masked, stop - hole_size, clear_start, hole_size, low, end, position, scale,
            block_runs, num_layers * 2, block_size, head_dim, window, BLOCK_N, BLOCK_D, 1, True,
            False, SOFT_CAP, FLOAT8, ASM,
        )  # fmt: skip

        if FLOAT8:
            acc = tl.interleave(acc[0], acc[1])
        if splits == 1:
            if sinks is not None:
                acc, total, peak = _with_sinks(acc, total, peak, sinks + head, token < num_tokens)
            # Rows behind the last token may have seen no key at all; they are not stored.
            acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
            target = out + (first_token + token)[:, None] * out_token_stride
            target += head[:, None] * out_head_stride + dim[None, :]
            tl.store(target, acc.to(out.dtype.element_ty), mask=real)
        else:
            # Of these keys a token may see none: its weight is next to nothing then.
            seen = total > 0.0
            total = tl.where(seen, total, 1.0)
            acc = acc / total[:, None]
            at = (place * UNITS + unit) * BLOCK_M + row
            tl.store(partial + at[:, None] * BLOCK_D + dim[None, :], acc)
            tl.store(weight + at, tl.where(seen, peak + tl.log2(total), -1.0e30))
            # The barrier puts the stores of all threads before the release of the one that adds.
            tl.debug_barrier()
            done = arrived + first_place * UNITS + unit
            if tl.atomic_add(done, 1, sem="acq_rel") == splits - 1:
                tl.store(done, 0)
                # A few rows at a time, so that there is room for many sums that are under way.
                for first_row in tl.range(0, num_tokens * PACK, ROWS, num_stages=1):
                    some = first_row + tl.arange(0, ROWS)
                    of_token = some // PACK
                    of_head = first_head + some % PACK
                    own, own_total, own_peak = _add_up(
                        partial, weight, first_place, splits, unit, some, UNITS, BLOCK_M, ROWS,
                        BLOCK_D, AT_ONCE,
                    )  # fmt: skip
                    if sinks is not None:
                        own, own_total, own_peak = _with_sinks(
                            own, own_total, own_peak, sinks + of_head, of_token < num_tokens
                        )
                    own = own / tl.where(own_total == 0.0, 1.0, own_total)[:, None]
                    own_target = out + (first_token + of_token)[:, None] * out_token_stride
                    own_target += of_head[:, None] * out_head_stride + dim[None, :]
                    inside = (of_token < num_tokens)[:, None] & (dim < head_dim)[None, :]
                    tl.store(own_target, own.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _with_sinks(acc, total, peak, sinks, is_real):
    """As if one more key had been attended to, whose value is zero."""
    sink = tl.load(sinks, mask=is_real, other=0.0) * 1.4426950408889634
    above = tl.maximum(peak, sink)
    fade = tl.exp2(peak - above)
    return acc * fade[:, None], total * fade + tl.exp2(sink - above), above


@triton.jit
def _add_up(
    partial,
    weight,
    first_place,
    splits,
    unit,
    row,
    UNITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Some rows of a tile's items → sums, their total weight and its peak, as of keys."""
    dim = tl.arange(0, BLOCK_D)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], -1.0e30, tl.float32)
    for start in tl.range(0, splits, AT_ONCE, num_stages=1):
        # Unrolled, so that the loads of several items are under way together.
        for ahead in tl.static_range(AT_ONCE):
            split = start + ahead
            at = ((first_place + split) * UNITS + unit) * BLOCK_M + row
            # .cg: other programs wrote these while this one ran; they are in the L2 cache.
            own = tl.load(weight + at, mask=(row < BLOCK_M) & (split < splits), other=-1.0e30,
                          cache_modifier=".cg")  # fmt: skip
            part = tl.load(
                partial + at[:, None] * BLOCK_D + dim[None, :],
                mask=(row < BLOCK_M)[:, None] & (split < splits),
                other=0.0,
                cache_modifier=".cg",
            )
            above = tl.maximum(peak, own)
            # Nothing that was seen weighs as little as nothing.
            share = tl.where(own > -1.0e29, tl.exp2(own - above), 0.0)
            fade = tl.exp2(peak - above)
            total = total * fade + share
            acc = acc * fade[:, None] + part * share[:, None]
            peak = above
    return acc, total, peak
