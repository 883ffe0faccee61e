"""Attention of long prompt chunks, for GPUs of compute capability 9.0 and 16-bit types.

What kernels/prefill_attention.py computes with block_m 128, by warps that each have one job, so
that the tensor cores seldom wait for copies or exponentials:

    paged cache ─► copier, one warp ─► ring of keys   ▤ ▤ ▤ ─┬─► team 0, tokens  0 to  63 ─► out
                   (bulk copies,       ring of values ▤ ▤ ▤ ─┴─► team 1, tokens 64 to 127 ─► out
                    block by block)

A team, four warps, multiplies the next tile's keys while it turns the last tile's scores into
weights. A program works on items, an item being a tile of tokens and a head, one after another; the
copier runs ahead into the next item. All three walk the same items and tiles, and each counts the
tiles it has done: tile n is in place n % places of a ring. Tiles of keys that lie before the window
of all tokens are not visited, and only those at its beginning and at the diagonal are masked.

Every place has two barriers. `ready` is passed when the copied bytes are there, `free` when both
teams have done with them. Each is passed once a round, by which its phase flips: the teams wait for
phase n // places % 2 of `ready`, the copier for the other one of `free`, which in the first round
counts as passed. Keys are freed when their scores are known, values one tile later.

Gluon, in which this is written, is experimental: names move between releases of Triton. So only
known ones are used, and where they are not there, the kernel of prefill_attention.py does it all.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_TOKENS = gl.constexpr(128)
"""Of a tile: 64 for each team."""
_TEAM_REGISTERS, _COPIER_REGISTERS = gl.constexpr(232), gl.constexpr(40)
_RINGS = {64: (128, 2), 128: (128, 3), 256: (64, 2)}
"""Keys, or values, of a tile, and the places of a ring, by head_dim; measured for 64 and 128. 3
tiles of 128 take 229,696 of the 232,448 bytes that a program may have. With 256 dimensions the sums
of a team take 128 of a thread's registers, and scores of 64 keys are what fits beside them."""
TRAITS = ("window", "soft cap", "sinks")
"""What layers may have beside causal attention to all that is before."""
CHOSEN: dict[int, tuple[str, ...]] = {64: TRAITS, 128: TRAITS, 256: TRAITS}
"""Heads, with which of the TRAITS, that come here: those whose results and times were seen on a
GPU."""
_LAYOUT: Any = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
_LOG2E = 1.4426950408889634
_RELEASES = ("3.6", "3.7")


def problem() -> str | None:
    """Why this Triton cannot be used; None: it can."""
    if triton.knobs.runtime.interpret:
        return "Triton's interpreter does not run Gluon"
    if ".".join(triton.__version__.split(".")[:2]) not in _RELEASES:
        known = " and ".join(_RELEASES)
        return f"it is known to compile with Triton {known}, and this is {triton.__version__}"
    return None


def not_covered(
    head_dim: int, window: int, soft_cap: float, *, has_sinks: bool = False
) -> str | None:
    """Which trait of a layer does not come to this kernel; None: it comes with all."""
    if head_dim not in CHOSEN:
        return f"head_dim is {head_dim}, and the faster one takes {' or '.join(map(str, CHOSEN))}"
    traits = CHOSEN[head_dim]
    if window and "window" not in traits:
        return f"sliding_window is {window}, and the faster one takes none"
    if soft_cap and "soft cap" not in traits:
        return f"scores have a soft cap of {soft_cap}, and the faster one takes none"
    if has_sinks and "sinks" not in traits:
        return "scores have sinks beside them, and the faster one takes none"
    return None


_USABLE = problem() is None


@gluon.jit
def _num_rounds(num_items):
    """How many items this program works on."""
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    full = num_items // programs
    turn = gl.where(full % 2 == 1, programs - 1 - program, program)
    return full + gl.where(turn < num_items - full * programs, 1, 0)


@gluon.jit
def _item(tiles, turn, num_heads: gl.constexpr):
    """-> head, first token, number of tokens, slot, position of the first token.

    Tiles come longest first. Odd rounds deal them backwards, so that programs end together.
    """
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    item = turn * programs + gl.where(turn % 2 == 1, programs - 1 - program, program)
    tile = tiles + item // num_heads * 4
    first_token = gl.load(tile)
    num_tokens = gl.load(tile + 1)
    slot = gl.load(tile + 2)
    first_position = gl.load(tile + 3)
    # An idle tile copies one block, whatever the table names, and stores nothing.
    num_tokens = gl.where(slot < 0, 0, gl.minimum(num_tokens, _TOKENS))
    first_position = gl.where(num_tokens > 0, first_position, 0)
    return item % num_heads, first_token, num_tokens, gl.maximum(slot, 0), first_position


@gluon.jit
def _seen(first_position, num_tokens, window, WINDOWED: gl.constexpr):
    """-> the first key that a token of the tile sees, and the end of those that its last one sees.

    At least one key, though the tile be idle.
    """
    low = gl.maximum(first_position - window + 1, 0) if WINDOWED else 0
    return low, gl.maximum(first_position + num_tokens, 1)


@gluon.jit
def _copy_tiles(
    rows, tiles, block_tables, key_ring, value_ring, window, layer, table_stride, num_items,
    num_heads: gl.constexpr, num_kv_heads: gl.constexpr, num_layers: gl.constexpr,
    block_size: gl.constexpr, WINDOWED: gl.constexpr,
):  # fmt: skip
    """The copier. `rows`: the pool as [keys and values, head_dim], copied a block at a time, or as
    much of one as a tile holds."""
    keys, keys_ready, keys_free = key_ring
    values, values_ready, values_free = value_ring
    places: gl.constexpr = keys.shape[0]
    tile_bytes: gl.constexpr = keys.shape[1] * keys.shape[2] * 2
    block_runs: gl.constexpr = num_kv_heads * num_layers * 2
    part_size: gl.constexpr = rows.block_type.shape[0]
    parts_per_block: gl.constexpr = block_size // part_size
    parts_per_tile: gl.constexpr = keys.shape[1] // part_size
    count = 0
    for turn in range(_num_rounds(num_items)):
        head, _, num_tokens, slot, first_position = _item(tiles, turn, num_heads)
        low, end = _seen(first_position, num_tokens, window, WINDOWED)
        num_parts = (end + part_size - 1) // part_size
        first_part = low // part_size
        table = block_tables + slot.to(gl.int64) * table_stride
        first_run = (head // (num_heads // num_kv_heads) * num_layers + layer) * 2
        for number in range(
            first_part // parts_per_tile * parts_per_tile, num_parts, parts_per_tile
        ):
            first_rows = ()
            for i in gl.static_range(parts_per_tile):
                # Behind the row's end its last block comes again, and before the window its first:
                # hidden, but memory that exists.
                part = gl.minimum(number + i, num_parts - 1)
                if WINDOWED:
                    part = gl.maximum(part, first_part)
                block = gl.load(table + part // parts_per_block)
                row = (block * block_runs + first_run) * block_size
                row += part % parts_per_block * part_size
                first_rows = first_rows + (row,)  # type: ignore[assignment]
            place = count % places
            phase = count // places % 2 ^ 1
            mbarrier.wait(keys_free.index(place), phase)
            mbarrier.expect(keys_ready.index(place), tile_bytes)
            for i in gl.static_range(parts_per_tile):
                held = keys.index(place).slice(i * part_size, part_size)
                tma.async_copy_global_to_shared(
                    rows, [first_rows[i], 0], keys_ready.index(place), held
                )
            mbarrier.wait(values_free.index(place), phase)
            mbarrier.expect(values_ready.index(place), tile_bytes)
            for i in gl.static_range(parts_per_tile):
                held = values.index(place).slice(i * part_size, part_size)
                tma.async_copy_global_to_shared(
                    rows, [first_rows[i] + block_size, 0], values_ready.index(place), held
                )
            count += 1


@gluon.jit
def _load_queries(query, strides, head, first_token, num_tokens, token, dim):
    source = (first_token.to(gl.int64) + token)[:, None] * strides[0]
    source += head * strides[1] + dim[None, :]
    return gl.load(query + source, mask=(token < num_tokens)[:, None], other=0.0)


@gluon.jit
def _multiply(queries, keys, layout: gl.constexpr):
    """-> scores, when they have been waited for."""
    none = gl.full([queries.shape[0], keys.shape[0]], 0.0, gl.float32, layout=layout)
    return warpgroup_mma(queries, keys.permute((1, 0)), none, use_acc=False, is_async=True)


@gluon.jit
def _capped(scores, CAP: gl.constexpr):
    """As that of kernels/soft_cap.py."""
    to_exponent: gl.constexpr = 2 * 1.4426950408889634 / CAP
    return CAP - 2 * CAP / (1.0 + gl.exp2(scores * to_exponent))


@gluon.jit
def _weigh(
    scores, peak, total, position, start, scale, window, WINDOWED: gl.constexpr,
    SOFT_CAP: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """-> weights, by how much the sums so far fade, the new peak and total."""
    if SOFT_CAP > 0:
        scores = _capped(scores * scale, SOFT_CAP)
    if MASKED:
        columns: gl.constexpr = gl.SliceLayout(0, scores.type.layout)
        column = (start + gl.arange(0, scores.shape[1], layout=columns))[None, :]
        visible = column <= position[:, None]
        if WINDOWED:
            visible = visible & (column > position[:, None] - window)
        scores = gl.where(visible, scores, float("-inf"))
    # What scores must be multiplied by when they are known: capped ones were scaled before.
    rest = 1.0 if SOFT_CAP > 0 else scale
    higher = gl.maximum(peak, gl.max(scores, 1) * rest)
    weight = gl.exp2(scores * rest - higher[:, None])
    fade = gl.exp2(peak - higher)
    return weight, fade, higher, total * fade + gl.sum(weight, 1)


@gluon.jit
def _clear_hidden(values, start, low, end, WINDOWED: gl.constexpr):
    """Weights of zero do not hide what unwritten slots may hold: zeros must be there.

    Both teams do it, and write the same; so neither has to wait for the other.
    """
    for i in gl.static_range(values.shape[0] // 16):
        first = start + i * 16
        # A window most often begins a key behind where a block ends.
        if not WINDOWED:
            _clear_part(values.slice(i * 16, 16), first, low, end, WINDOWED)
        elif (first < low) | (first + 16 > end):
            _clear_part(values.slice(i * 16, 16), first, low, end, WINDOWED)
    fence_async_shared()


@gluon.jit
def _clear_part(part, first, low, end, WINDOWED: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    key = first + gl.arange(0, part.shape[0], layout=gl.SliceLayout(1, layout))
    visible = key < end
    if WINDOWED:
        visible = visible & (key >= low)
    held = part.load(layout)
    part.store(gl.where(visible[:, None], held, gl.to_tensor(0.0).to(part.dtype)))


@gluon.jit
def _attend(
    TEAM: gl.constexpr, query, out, tiles, own, key_ring, value_ring, sinks, window, scale, strides,
    num_items, num_heads: gl.constexpr, WINDOWED: gl.constexpr, SOFT_CAP: gl.constexpr,
    SINKS: gl.constexpr,
):  # fmt: skip
    """A team. `own`: its queries of an item, then what it stores of it."""
    query_strides, out_strides = strides
    keys, keys_ready, keys_free = key_ring
    values, values_ready, values_free = value_ring
    places: gl.constexpr = keys.shape[0]
    tile_keys: gl.constexpr = keys.shape[1]
    block_m: gl.constexpr = own.shape[0]
    head_dim: gl.constexpr = own.shape[1]
    # Beside sums of more dimensions the next queries do not fit into registers.
    AHEAD: gl.constexpr = head_dim <= 128
    warps: gl.constexpr = gl.num_warps()
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, tile_keys, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, head_dim, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    acc_row_layout: gl.constexpr = gl.SliceLayout(1, acc_layout)
    copy_layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // head_dim, head_dim // 8], [warps, 1], [1, 0]
    )
    token = TEAM * block_m + gl.arange(0, block_m, layout=gl.SliceLayout(1, copy_layout))
    dim = gl.arange(0, head_dim, layout=gl.SliceLayout(0, copy_layout))

    count = 0
    rounds = _num_rounds(num_items)
    head, first_token, num_tokens, _, first_position = _item(tiles, 0, num_heads)
    if AHEAD:
        queries = _load_queries(query, query_strides, head, first_token, num_tokens, token, dim)
    for turn in range(rounds):
        next_head, next_token, next_tokens, _, next_position = _item(
            tiles, gl.minimum(turn + 1, rounds - 1), num_heads
        )
        if not AHEAD:
            queries = _load_queries(query, query_strides, head, first_token, num_tokens, token, dim)
        own.store(queries)
        fence_async_shared()

        low, end = _seen(first_position, num_tokens, window, WINDOWED)
        first_tile = low // tile_keys
        num_tiles = (end + tile_keys - 1) // tile_keys
        first = first_position + TEAM * block_m
        # All tokens of the team see the tiles between these whole.
        clear_start = first_tile + 1
        clear_end = gl.minimum((first + 1) // tile_keys, num_tiles)
        if WINDOWED:
            whole = gl.maximum(first + block_m - window, 0)
            clear_start = gl.maximum(clear_start, (whole + tile_keys - 1) // tile_keys)
            clear_start = gl.minimum(clear_start, num_tiles)
        position = first + gl.arange(0, block_m, layout=row_layout)
        # Finite, so that a tile of hidden keys gives exp2(−inf), never exp2(−inf + inf).
        peak = gl.full([block_m], -1.0e30, gl.float32, layout=row_layout)
        total = gl.full([block_m], 0.0, gl.float32, layout=row_layout)
        acc = gl.full([block_m, head_dim], 0.0, gl.float32, layout=acc_layout)

        place = count % places
        mbarrier.wait(keys_ready.index(place), count // places % 2)
        scores = _multiply(own, keys.index(place), score_layout)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        mbarrier.arrive(keys_free.index(place), count=1)
        weight, fade, peak, total = _weigh(
            scores,
            peak,
            total,
            position,
            first_tile * tile_keys,
            scale,
            window,
            WINDOWED,
            SOFT_CAP,
            True,
        )
        weights = gl.convert_layout(weight.to(own.dtype), weight_layout)
        if WINDOWED:
            if low % tile_keys != 0:
                mbarrier.wait(values_ready.index(place), count // places % 2)
                _clear_hidden(values.index(place), first_tile * tile_keys, low, end, WINDOWED)
        # Where the window begins, where nothing is hidden, on the diagonal.
        for stretch in gl.static_range(0 if WINDOWED else 1, 3):
            if stretch == 0:
                start_tile, end_tile = first_tile + 1, clear_start
            elif stretch == 1:
                start_tile, end_tile = clear_start, clear_end
            else:
                start_tile, end_tile = gl.maximum(clear_start, clear_end), num_tiles
            for tile in range(start_tile, end_tile):
                before = count % places
                phase_before = count // places % 2
                count += 1
                place = count % places
                mbarrier.wait(keys_ready.index(place), count // places % 2)
                scores = _multiply(own, keys.index(place), score_layout)
                mbarrier.wait(values_ready.index(before), phase_before)
                acc = warpgroup_mma(weights, values.index(before), acc, is_async=True)
                scores = warpgroup_mma_wait(1, deps=(scores,))
                mbarrier.arrive(keys_free.index(place), count=1)
                weight, fade, peak, total = _weigh(
                    scores,
                    peak,
                    total,
                    position,
                    tile * tile_keys,
                    scale,
                    window,
                    WINDOWED,
                    SOFT_CAP,
                    stretch != 1,
                )
                coming = gl.convert_layout(weight.to(own.dtype), weight_layout)
                # Naming what was computed meanwhile keeps the compiler from moving it behind.
                acc, weights, coming, total = warpgroup_mma_wait(
                    0, deps=(acc, weights, coming, total)
                )
                mbarrier.arrive(values_free.index(before), count=1)
                acc = acc * gl.convert_layout(fade, acc_row_layout)[:, None]
                weights = coming

        if AHEAD:
            # The next queries arrive while the last weights and the output are at work.
            queries = _load_queries(
                query, query_strides, next_head, next_token, next_tokens, token, dim
            )
        place = count % places
        mbarrier.wait(values_ready.index(place), count // places % 2)
        if end % tile_keys != 0:
            _clear_hidden(values.index(place), (num_tiles - 1) * tile_keys, low, end, WINDOWED)
        acc = warpgroup_mma(weights, values.index(place), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(values_free.index(place), count=1)
        count += 1

        if SINKS:
            # One more key, whose value is zero.
            sink = gl.load(sinks + head) * 1.4426950408889634
            above = gl.maximum(peak, sink)
            fade = gl.exp2(peak - above)
            total = (total * fade + gl.exp2(sink - above)) / fade
        # Rows behind the tile's last token are not stored.
        acc = acc / gl.convert_layout(gl.where(total == 0.0, 1.0, total), acc_row_layout)[:, None]
        own.store(acc.to(own.dtype))
        target = (first_token.to(gl.int64) + token)[:, None] * out_strides[0]
        target += head * out_strides[1] + dim[None, :]
        gl.store(out + target, own.load(copy_layout), mask=(token < num_tokens)[:, None])
        head, first_token, num_tokens = next_head, next_token, next_tokens
        first_position = next_position


@gluon.jit
def _ring(dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
    """-> the places, their barriers `ready` and `free`."""
    held = gl.allocate_shared_memory(dtype, shape, layout)
    ready = gl.allocate_shared_memory(gl.int64, [shape[0], 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [shape[0], 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(shape[0]):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    return held, ready, free


@gluon.jit(do_not_specialize=["layer", "table_stride", "num_items", "window"])
def _hopper_prefill_attention(
    query, rows, tiles, num_tiles, block_tables, out, sinks, window, layer, scale,
    query_token_stride, query_head_stride, out_token_stride, out_head_stride, table_stride,
    num_items, num_heads: gl.constexpr, num_kv_heads: gl.constexpr, num_layers: gl.constexpr,
    block_size: gl.constexpr, head_dim: gl.constexpr, WINDOWED: gl.constexpr, KEYS: gl.constexpr,
    PLACES: gl.constexpr, SOFT_CAP: gl.constexpr, SINKS: gl.constexpr, COUNTED: gl.constexpr,
):  # fmt: skip
    """On a grid of at most as many programs as run at once; `_item` says what each works on."""
    dtype: gl.constexpr = rows.dtype
    layout: gl.constexpr = rows.layout
    own = gl.allocate_shared_memory(dtype, [2, _TOKENS // 2, head_dim], layout)
    keys = _ring(dtype, [PLACES, KEYS, head_dim], layout)
    values = _ring(dtype, [PLACES, KEYS, head_dim], layout)
    fence_async_shared()
    strides = ((query_token_stride, query_head_stride), (out_token_stride, out_head_stride))
    if COUNTED:
        num_items = gl.load(num_tiles) * num_heads
    gl.warp_specialize(
        [
            (_attend, (
                0, query, out, tiles, own.index(0), keys, values, sinks, window,
                scale, strides, num_items, num_heads, WINDOWED, SOFT_CAP, SINKS,
            )),
            (_attend, (
                1, query, out, tiles, own.index(1), keys, values, sinks, window,
                scale, strides, num_items, num_heads, WINDOWED, SOFT_CAP, SINKS,
            )),
            (_copy_tiles, (
                rows, tiles, block_tables, keys, values, window, layer, table_stride, num_items,
                num_heads, num_kv_heads, num_layers, block_size, WINDOWED,
            )),
        ],
        [4, 1],
        [_TEAM_REGISTERS, _COPIER_REGISTERS],
    )  # fmt: skip


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors; 0: the kernel is not for that device."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return 0
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def covers(
    query: Tensor,
    kv: Tensor,
    *,
    block_m: int,
    window: int,
    soft_cap: float = 0.0,
    has_sinks: bool = False,
) -> bool:
    """Whether the kernel is there for these; arguments as in prefill_attention.py."""
    block_size, head_dim = kv.shape[4:]
    return (
        _USABLE
        and block_m == _TOKENS.value
        and not_covered(head_dim, window, soft_cap, has_sinks=has_sinks) is None
        and block_size in (16, 32, 64, 128)
        and kv.dtype in (torch.bfloat16, torch.float16)
        and query.dtype == kv.dtype
        # The copy engine wants rows as int32, and aligned memory.
        and kv.numel() // head_dim < 2**31
        and kv.data_ptr() % 16 == 0
        and _processors(query.device) > 0
    )


def paged_prefill_attention(
    query: Tensor,
    kv: Tensor,
    layer: int,
    tiles: Tensor,
    block_tables: Tensor,
    scale: float,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    out: Tensor,
    num_tiles: Tensor | None = None,
) -> Tensor:
    """As that of prefill_attention.py, with block_m 128, where it `covers` the arguments.

    `num_tiles`: int32 [1], on the device: how many of the tiles count; the others have no tokens.
    None: all.
    """
    _, num_heads, head_dim = query.shape
    _, num_kv_heads, num_layers, _, block_size, _ = kv.shape
    num_items = tiles.shape[0] * num_heads
    num_keys, places = _RINGS[head_dim]
    shape, part = [kv.numel() // head_dim, head_dim], [min(block_size, num_keys), head_dim]
    rows = TensorDescriptor(kv, shape, [head_dim, 1], part, _LAYOUT)
    _hopper_prefill_attention[(min(num_items, _processors(query.device)),)](
        query, rows, tiles, tiles if num_tiles is None else num_tiles, block_tables, out,
        query if sinks is None else sinks,
        window, layer, scale * _LOG2E,
        query.stride(0), query.stride(1), out.stride(0), out.stride(1), block_tables.stride(0),
        num_items, num_heads, num_kv_heads, num_layers, block_size, head_dim,
        WINDOWED=window > 0, KEYS=num_keys, PLACES=places, SOFT_CAP=soft_cap * _LOG2E,
        SINKS=sinks is not None, COUNTED=num_tiles is not None, num_warps=4,
    )  # fmt: skip
    return out
