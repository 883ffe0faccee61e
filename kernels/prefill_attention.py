"""Attention of prompt chunks over the paged cache: causal, optionally within a window.

A program takes a tile of query tokens of one row and one head (or several heads of one KV head,
packed among the rows of the product) and walks first the keys that all its tokens see, without any
mask, then those at the two ends: on the diagonal, and where a window begins.
Keys are scored in powers of two, so that the softmax needs one multiply-add per score.
Long chunks on a GPU of compute capability 9.0 go to kernels/hopper_prefill_attention.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from baton.kernels.float8_jit import (
    add_halves,
    as_bytes,
    codes_offset,
    has_assembler,
    is_float8,
    scale_of,
    scales_offset,
    score_halves,
)
from baton.kernels.shared_memory import shared_bytes
from baton.kernels.soft_cap import capped

_hopper: ModuleType | None = None
_import_error = ""
try:
    from baton.kernels import hopper_prefill_attention as _hopper
except (ImportError, AttributeError) as error:
    # A release of Triton may be without the names that it uses.
    _import_error = str(error)

_LOG2E = 1.4426950408889634
_ROOMY = 160 * 1024
"""Shared memory of a program from which on tiles are wide; consumers' cards have less."""


@triton.jit
def _walk(
    acc,
    total,
    peak,
    query,
    kv,
    rows,
    table,
    first_run,
    first,
    last,
    hole,
    hole_size,
    low,
    end,
    position,
    scale,
    block_runs: tl.constexpr,
    head_runs: tl.constexpr,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    window: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    FLOAT8: tl.constexpr,
    ASM: tl.constexpr,
):
    """Attends to the keys from `first` on, `last` − `first` of them, but for a hole.

    `first`, `hole` (where it begins) and `hole_size` are multiples of BLOCK_N.

    A run is the block_size keys, or values, of one block, head and layer. MASKED: only keys from
    `low` to `end` may be read, and each row sees what its position allows. Block ids are read one
    tile ahead, so that the copies of a tile do not wait for them.

    FLOAT8: keys and values are codes, in pairs of even and odd dimensions, as `query` and `acc` are
    then, of BLOCK_D / 2 each; their scales are read a tile ahead likewise.
    """
    key = tl.arange(0, BLOCK_N)
    # Of elements that are moved: numbers, or pairs of codes.
    dims: tl.constexpr = head_dim // 2 if FLOAT8 else head_dim
    dim = tl.arange(0, BLOCK_D // 2 if FLOAT8 else BLOCK_D)
    run_size: tl.constexpr = block_size * dims
    # Of codes there are scales, too.
    held: tl.constexpr = block_size * (head_dim + 1) // 2 if FLOAT8 else run_size
    block_stride: tl.constexpr = block_runs * held
    if FLOAT8:
        codes = kv + codes_offset(first_run, head_runs, block_size, head_dim)
        elements = codes.to(tl.pointer_type(tl.int16))
    else:
        elements = kv + first_run * run_size
    # What scores must be multiplied by when they are known: capped ones are scaled before.
    rest = 1.0 if SOFT_CAP > 0 else scale
    low_number = low // block_size
    end_number = (end + block_size - 1) // block_size
    # Where one block holds a whole tile, a tile has one number and one offset.
    if block_size % BLOCK_N == 0:
        in_tile = 0
    else:
        in_tile = key // block_size
    start = first
    if MASKED and window > 0:
        start += tl.where(first >= hole, hole_size, 0)
    number = start // block_size + in_tile
    known = number < end_number
    if window > 0:
        known = known & (number >= low_number)
    block = tl.load(table + number, mask=known, other=0)
    if FLOAT8:
        k_exponent, v_exponent = _exponents(
            kv, block, first_run, start, low, end,
            block_runs, head_runs, block_size, head_dim, window, BLOCK_N, MASKED,
        )  # fmt: skip
    for step in tl.range(first, last, BLOCK_N, num_stages=STAGES):
        start = step
        ahead = step + BLOCK_N
        if MASKED and window > 0:
            start += tl.where(step >= hole, hole_size, 0)
            ahead += tl.where(step + BLOCK_N >= hole, hole_size, 0)
        if block_size % BLOCK_N == 0:
            offset = start % block_size
        else:
            offset = key % block_size
        number = ahead // block_size + in_tile
        known = number < end_number
        if window > 0:
            known = known & (number >= low_number)
        coming = tl.load(table + number, mask=known, other=0)
        if DESCRIPTOR:
            row = (block * block_runs + first_run) * block_size + offset
            keys = rows.load([row, 0])
        else:
            source = elements + block.to(tl.int64) * block_stride
            source += offset * dims
            if block_size % BLOCK_N == 0:
                source = source + key[:, None] * dims + dim[None, :]
            else:
                source = source[:, None] + dim[None, :]
            if MASKED:
                readable = (start + key < end)[:, None] & (dim < dims)[None, :]
                if window > 0:
                    readable = readable & (start + key >= low)[:, None]
                keys = tl.load(source, mask=readable, other=0)
            elif BLOCK_D == head_dim:
                keys = tl.load(source)
            else:
                keys = tl.load(source, mask=(dim < dims)[None, :], other=0)
        if FLOAT8:
            k_scale, v_scale = scale_of(k_exponent), scale_of(v_exponent)
            k_exponent, v_exponent = _exponents(
                kv, coming, first_run, ahead, low, end,
                block_runs, head_runs, block_size, head_dim, window, BLOCK_N, MASKED,
            )  # fmt: skip
            scores = score_halves(query, keys, k_scale, ASM)
        else:
            scores = tl.dot(query, tl.trans(keys), input_precision="ieee")
        if SOFT_CAP > 0:
            scores = capped(scores * scale, SOFT_CAP)
        if MASKED:
            column = (start + key)[None, :]
            visible = column <= position[:, None]
            if window > 0:
                visible = visible & (column > position[:, None] - window)
            scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1) * rest)
        weight = tl.exp2(scores * rest - higher[:, None])
        fade = tl.exp2(peak - higher)
        total = total * fade + tl.sum(weight, 1)
        if not FLOAT8:
            acc = acc * fade[:, None]
        if DESCRIPTOR:
            values = rows.load([row + block_size, 0])
        else:
            if MASKED:
                values = tl.load(source + run_size, mask=readable, other=0)
            elif BLOCK_D == head_dim:
                values = tl.load(source + run_size)
            else:
                values = tl.load(source + run_size, mask=(dim < dims)[None, :], other=0)
        if FLOAT8:
            acc = add_halves(acc, fade[:, None], weight, values, v_scale, query[0].dtype, ASM)
        else:
            acc = tl.dot(weight.to(values.dtype), values, acc, input_precision="ieee")
        peak = higher
        block = coming
    return acc, total, peak


@triton.jit
def _exponents(
    kv,
    block,
    first_run,
    start,
    low,
    end,
    block_runs: tl.constexpr,
    head_runs: tl.constexpr,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    window: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Those of a tile's keys and of its values, zero where a key may not be read."""
    key = tl.arange(0, BLOCK_N)
    source = kv + block.to(tl.int64) * (block_runs * (block_size * (head_dim + 1)))
    source += scales_offset(first_run, head_runs, block_size, head_dim)
    if block_size % BLOCK_N == 0:
        source = source + start % block_size + key
    else:
        source = source + key % block_size
    # Also behind the last tile, of which nobody takes them.
    readable = start + key < end
    if MASKED and window > 0:
        readable = readable & (start + key >= low)
    return (
        tl.load(source, mask=readable, other=0),
        tl.load(source + block_size, mask=readable, other=0),
    )


@triton.jit
def load_queries(
    query,
    offset,
    is_real,
    head_dim: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FLOAT8: tl.constexpr,
):
    """Of heads at offsets [M, 1], as far as `is_real` [M, 1]: [M, BLOCK_D]; for keys in codes the
    even and the odd dimensions, [M, BLOCK_D / 2] each."""
    if FLOAT8:
        pair = tl.arange(0, BLOCK_D // 2)
        real = is_real & (pair < head_dim // 2)[None, :]
        even = tl.load(query + (offset + 2 * pair[None, :]), mask=real, other=0.0)
        odd = tl.load(query + (offset + 2 * pair[None, :] + 1), mask=real, other=0.0)
        return even, odd
    else:
        dim = tl.arange(0, BLOCK_D)
        real = is_real & (dim < head_dim)[None, :]
        return tl.load(query + (offset + dim[None, :]), mask=real, other=0.0)


@triton.jit
def no_sums(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, FLOAT8: tl.constexpr):
    if FLOAT8:
        return (
            tl.zeros([BLOCK_M, BLOCK_D // 2], tl.float32),
            tl.zeros([BLOCK_M, BLOCK_D // 2], tl.float32),
        )
    else:
        return tl.zeros([BLOCK_M, BLOCK_D], tl.float32)


@triton.jit(do_not_specialize=["layer"])
def _prefill_attention(
    query,
    kv,
    rows,
    tiles,
    block_tables,
    out,
    sinks,
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
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED_STAGES: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    FLOAT8: tl.constexpr,
    ASM: tl.constexpr,
):
    """Program (x, y): heads x · PACK and on, part y % PARTS of tile y // PARTS, which has TOKENS
    tokens. Row m of the products is token m // PACK."""
    tile = tiles + tl.program_id(1) // PARTS * 4
    first_token = tl.load(tile).to(tl.int64)
    num_tokens = tl.load(tile + 1)
    slot = tl.load(tile + 2)
    first_position = tl.load(tile + 3)
    if PARTS > 1:
        before = tl.program_id(1) % PARTS * TOKENS
        first_token += before
        num_tokens -= before
        first_position += before
    # An idle tile has no keys and stores nothing.
    num_tokens = tl.where(slot < 0, 0, tl.minimum(num_tokens, TOKENS))
    first_position = tl.where(num_tokens > 0, first_position, -1)
    first_head = tl.program_id(0) * PACK
    kv_head = first_head // (num_heads // num_kv_heads)

    row = tl.arange(0, BLOCK_M)
    token = row // PACK
    head = first_head + row % PACK
    dim = tl.arange(0, BLOCK_D)
    real = (token < num_tokens)[:, None] & (dim < head_dim)[None, :]
    source = query + (first_token + token)[:, None] * query_token_stride
    own = (token < num_tokens)[:, None]
    queries = load_queries(
        source, head[:, None] * query_head_stride, own, head_dim, BLOCK_D, FLOAT8
    )
    position = first_position + token

    end = tl.maximum(first_position + num_tokens, 0)
    clear_end = (first_position + 1) // BLOCK_N * BLOCK_N
    if window > 0:
        low = tl.maximum(first_position - window + 1, 0)
        first = low // BLOCK_N * BLOCK_N
        # Tokens further on no longer see all keys below clear_start.
        clear_start = tl.maximum(end - window, 0)
        clear_start = (clear_start + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        hole_size = tl.maximum(clear_end - clear_start, 0)
    else:
        low = 0
        first = 0
        clear_start = 0
        hole_size = clear_end

    table = block_tables + slot.to(tl.int64) * table_stride
    block_runs: tl.constexpr = num_kv_heads * num_layers * 2
    first_run = (kv_head * num_layers + layer) * 2
    acc = no_sums(BLOCK_M, BLOCK_D, FLOAT8)
    total = tl.zeros([BLOCK_M], tl.float32)
    # Finite, so that a tile of hidden keys gives exp2(−inf), never exp2(−inf + inf).
    peak = tl.full([BLOCK_M], -1.0e30, tl.float32)
    acc, total, peak = _walk(
        acc, total, peak, queries, kv, rows, table, first_run,
        clear_start, clear_end, 0, 0, low, end, position, scale,
        block_runs, num_layers * 2, block_size, head_dim, window, BLOCK_N, BLOCK_D, STAGES, False,
        DESCRIPTOR, SOFT_CAP, FLOAT8, ASM,
    )  # fmt: skip
    if window == 0:
        first = clear_end
        hole_size = 0
    acc, total, peak = _walk(
        acc, total, peak, queries, kv, rows, table, first_run,
        first, end - hole_size, clear_start, hole_size, low, end, position, scale,
        block_runs, num_layers * 2, block_size, head_dim, window, BLOCK_N, BLOCK_D, MASKED_STAGES,
        True, False, SOFT_CAP, FLOAT8, ASM,
    )  # fmt: skip

    if FLOAT8:
        acc = tl.interleave(acc[0], acc[1])
    target = out + (first_token + token)[:, None] * out_token_stride
    target += head[:, None] * out_head_stride + dim[None, :]
    if sinks is not None:
        # One more key, whose value is zero.
        sink = tl.load(sinks + head, mask=token < num_tokens, other=0.0) * 1.4426950408889634
        above = tl.maximum(peak, sink)
        fade = tl.exp2(peak - above)
        total = total * fade + tl.exp2(sink - above)
        acc = acc * fade[:, None]
    # Rows behind the tile's last token may have seen no key at all; they are not stored.
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(target, acc.to(out.dtype.element_ty), mask=real)


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """How the kernel runs; see `prefill_config` for what is chosen when none is given."""

    pack: int
    """Heads of a KV head among the rows of a product."""
    block_n: int
    num_warps: int
    num_stages: int
    descriptor: bool = False
    """Keys and values come by the bulk copy engine; needs block_n ≤ block_size."""
    masked_stages: int = 1
    """Pipeline depth of the stretches with a mask, which are one to three tiles long."""
    max_registers: int | None = None
    """Of a thread, so that two programs fit a multiprocessor."""
    tokens: int | None = None
    """Of a tile, that a program takes at most, if not all; divides a `block_m` that is larger."""


def prefill_config(
    block_m: int, group: int, head_dim: int, itemsize: int, shared: int, *, is_float8: bool = False
) -> PrefillConfig:
    """`group`: query heads per KV head. `shared`: bytes of shared memory that a program may have.
    `is_float8`: over keys of 8 bits, which are widened in registers.

    Chosen so that nothing spills on compute capability 9.0.
    """
    if itemsize == 4:
        # Products of float32 run outside the tensor cores and want their operands in registers.
        if head_dim > 256:
            return PrefillConfig(1, 16, 8, 1, tokens=16)
        return PrefillConfig(1, 32, 8 if block_m > 16 or head_dim > 128 else 4, 1)
    # Rows of a product that a program's registers have sums for.
    rows = 128 if head_dim <= 128 else 64 if head_dim <= 256 else 32
    if block_m <= 16:
        pack = max(p for p in range(1, group + 1) if group % p == 0 and p * block_m <= rows)
        if head_dim > 256 or (head_dim > 128 and shared < _ROOMY):
            return PrefillConfig(pack, 32, 8, 2)
        num_warps = 8 if pack * block_m * 2 > rows else 4
        return PrefillConfig(pack, 64, num_warps, 3 if head_dim <= 128 else 2)
    if head_dim > 256:
        return PrefillConfig(1, 32, 8, 2, tokens=32)
    if is_float8:
        return PrefillConfig(1, 64 if head_dim <= 128 else 32, 8, 2, tokens=min(block_m, 128))
    if head_dim > 128:
        if shared < _ROOMY:
            return PrefillConfig(1, 32, 8, 2, tokens=64)
        return PrefillConfig(1, 64, 8, 2)
    if block_m <= 64 or (head_dim > 64 and shared < _ROOMY):
        return PrefillConfig(1, 64, 4, 3, tokens=64)
    # Wide tiles of keys rescale the sums half as often.
    return PrefillConfig(1, 128, 8, 3)


def block_m_for(longest: int, head_dim: int, itemsize: int = 2) -> int:
    """Query tokens per tile for a launch whose longest chunk row has `longest` tokens.

    Rows of a handful of tokens are best launched apart from long ones: with 16 tokens a tile, the
    heads of a KV head share one reading of the keys. `itemsize`: bytes of an element.
    """
    if longest <= 32:
        return 16
    if itemsize == 4:
        return 32 if head_dim <= 128 else 16
    return 64 if longest <= 64 else 128


def prefill_tiles(
    query_start: npt.NDArray[np.integer[Any]],
    rows: npt.NDArray[np.integer[Any]],
    first_positions: npt.NDArray[np.integer[Any]],
    *,
    block_m: int,
) -> npt.NDArray[np.int32]:
    """Cuts chunk rows into tiles of at most `block_m` query tokens, most keys first.

    Args:
        query_start: [R + 1], where each row's tokens begin in `query`, and where the last end.
        rows: [R], slots of the batch state.
        first_positions: [R], position of each row's first token.
        block_m: as given to `paged_prefill_attention`.

    Returns:
        int32 [NT, 4]: index of the first token in `query`, number of tokens, slot, position of the
        first token.
    """
    starts = np.asarray(query_start).tolist()
    of_rows = zip(
        starts[:-1],
        starts[1:],
        np.asarray(rows).tolist(),
        np.asarray(first_positions).tolist(),
        strict=True,
    )
    # Not by arrays: of one prompt, which waits for it, this is over before numpy has begun.
    tiles = [
        (token, min(block_m, end - token), slot, position + token - first)
        for first, end, slot, position in of_rows
        for token in range(first, end, block_m)
    ]
    tiles.sort(key=lambda tile: tile[3] + tile[1], reverse=True)
    return np.array(tiles, np.int32).reshape(-1, 4)


def why_not_hopper(
    head_dim: int, window: int, soft_cap: float, *, has_sinks: bool = False
) -> str | None:
    """Why layers like that do without the kernel for compute capability 9.0, even there; None:
    they have it."""
    if _hopper is None:
        return _import_error
    reason: str | None = _hopper.problem() or _hopper.not_covered(
        head_dim, window, soft_cap, has_sinks=has_sinks
    )
    return reason


def widens(kv: Tensor, dtype: torch.dtype, window: int) -> bool:
    """Whether codes of that pool are widened for long chunks: where the kernel for compute
    capability 9.0 then takes them. `dtype`: of a query's number."""
    if _hopper is None or not is_float8(kv):
        return False
    like = kv.new_empty((1, 1, 1, 2, *kv.shape[4:]), dtype=dtype)
    return bool(_hopper.covers(like, like, block_m=128, window=window))


def is_wide(kv: Tensor, window: int, itemsize: int) -> bool:
    """Whether long chunks over that pool are faster in tiles of 128 tokens than cut into items:
    where there is the kernel for compute capability 9.0, and where codes have to be widened for
    each tile. `itemsize`: bytes of a query's number."""
    if is_float8(kv):
        return itemsize == 2 and kv.shape[5] <= 128
    return _hopper is not None and _hopper.covers(kv, kv, block_m=128, window=window)


def paged_prefill_attention(
    query: Tensor,
    kv: Tensor,
    layer: int,
    tiles: Tensor,
    block_tables: Tensor,
    scale: float,
    *,
    block_m: int,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    num_tiles: Tensor | None = None,
    config: PrefillConfig | None = None,
) -> Tensor:
    """Causal attention of chunk tokens over their row's blocks, which hold their own keys already.

    Args:
        query: [T, num_heads, head_dim], contiguous along head_dim.
        kv: [blocks + 1, num_kv_heads, num_layers, 2, block_size, head_dim], contiguous; or of such
            a shape codes, with their scales behind them (reference_float8.py). Slots that no token
            of a tile may see are never used, NaN included.
        layer: which layer of `kv`.
        tiles: int32 [NT, 4], from `prefill_tiles` with the same `block_m`; a tile without tokens,
            or of a slot below zero, is skipped.
        block_tables: int32 [slots, blocks]; entries outside a tile's visible keys are not read.
        scale: positive; of the scores.
        block_m: query tokens per tile, see `block_m_for`.
        window: a token at position p sees keys from p − window + 1 on; 0: all of them.
        soft_cap: scores become cap · tanh(score / cap); 0: they stay.
        sinks: float32 [num_heads]: of each head a score beside those of the keys, of a value that
            is zero.
        out: like `query`; only tokens in tiles are written.
        num_tiles: int32 [1], on the device: how many of the tiles count; the others have no tokens.
            None: all.
        config: for measurements: how the kernel of this file runs, which then does it everywhere.

    Returns:
        `out`, [T, num_heads, head_dim].
    """
    _, num_heads, head_dim = query.shape
    num_blocks, num_kv_heads, num_layers, _, block_size, _ = kv.shape
    if out is None:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if tiles.shape[0] == 0:
        return out
    if (
        config is None
        and _hopper is not None
        and _hopper.covers(
            query,
            kv,
            block_m=block_m,
            window=window,
            soft_cap=soft_cap,
            has_sinks=sinks is not None,
        )
    ):
        _hopper.paged_prefill_attention(
            query,
            kv,
            layer,
            tiles,
            block_tables,
            scale,
            window=window,
            soft_cap=soft_cap,
            sinks=sinks,
            out=out,
            num_tiles=num_tiles,
        )
        return out
    if config is None:
        group, itemsize = num_heads // num_kv_heads, query.element_size()
        config = prefill_config(
            block_m,
            group,
            head_dim,
            itemsize,
            shared_bytes(query.device),
            is_float8=is_float8(kv),
        )
    rows: Any = kv
    if config.descriptor and is_float8(kv):
        raise ValueError("bulk copies are of keys and values as they are, not of 8 bits")
    if config.descriptor:
        num_rows = num_blocks * num_kv_heads * num_layers * 2 * block_size
        if num_rows >= 2**31 or block_size % config.block_n:
            raise ValueError("bulk copies need a smaller pool, or block_n ≤ block_size")
        rows = TensorDescriptor(kv, [num_rows, head_dim], [head_dim, 1], [config.block_n, head_dim])
    tokens = min(config.tokens or block_m, block_m)
    parts = block_m // tokens
    _prefill_attention[(num_heads // config.pack, tiles.shape[0] * parts)](
        query,
        as_bytes(kv),
        as_bytes(rows) if rows is kv else rows,
        tiles,
        block_tables,
        out,
        sinks,
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
        TOKENS=tokens,
        PARTS=parts,
        BLOCK_M=max(16, triton.next_power_of_2(tokens * config.pack)),
        BLOCK_N=config.block_n,
        BLOCK_D=max(32 if is_float8(kv) else 16, triton.next_power_of_2(head_dim)),
        STAGES=config.num_stages,
        MASKED_STAGES=config.masked_stages,
        DESCRIPTOR=config.descriptor,
        SOFT_CAP=soft_cap * _LOG2E,
        FLOAT8=is_float8(kv),
        ASM=has_assembler(),
        num_warps=config.num_warps,
        maxnreg=config.max_registers,
    )
    return out
