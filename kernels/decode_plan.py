"""Cuts the keys of a decode step into work items for kernels/decode_attention.py, on the device.

A work item is a stretch of one row's keys. How many items there are at most follows from the padded
batch size alone, so one CUDA graph serves every mixture of lengths: an item holds its share of the
step's keys, however they are spread over rows, and items that are not needed are marked so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

ITEM_FIELDS = 8
"""An item: row, slot, first key, end of keys, first item of the row, items of the row, how many
keys at its end the row's first token does not see, one unused. A row of −1 marks an item that is
not used."""
_PLANNED_AT_ONCE = 32
_MOST_HEADS = 64
TEAM_KEYS = 16
"""Keys of a tile that a warp has to itself in decode_float8.py: as many as tensor cores take."""
_MOST_SUMS = 2048
"""Of such a warp: 64 registers of each thread."""
_LARGE_AT_ONCE = 528
"""Programs of four such warps, with heads of 128: four for each processor of an H100 or H200."""


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How the work is cut; the defaults of `decode_config` are for an H200."""

    block_n: int = 32
    """Keys of a tile; a power of two, at least 16."""
    num_warps: int = 4
    num_stages: int = 4
    programs: int = 384
    """About so many programs share the work where rows alone do not make as many."""
    fused: bool = True
    """The last program of a row combines its items; else a second kernel does."""
    least_tiles: int = 1
    """Of an item, where its row has so many."""
    overlaps: bool = True
    """The kernel behind may start when all programs have read their keys, not only when they have
    ended."""


def decode_config(
    num_rows: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    group: int = 1,
    width: int = 1,
    itemsize: int = 2,
) -> DecodeConfig:
    """The configuration for a padded batch of `num_rows`, of `width` tokens each; `group`: query
    heads of a KV head; `itemsize`: of a number in the cache."""
    if width > 1 and itemsize == 2 and head_dim <= 128:
        # Heads of several tokens make products that are worth tiles of more keys, of many rows.
        return DecodeConfig(block_n=32 if num_rows <= 8 else 64, num_stages=3, programs=256)
    # Few rows: one wave of programs ends sooner. More of them: the last ones to end are shorter.
    programs = 256 if num_rows <= 8 else 384
    # Of the widest heads a tile of 16 keys has as many bytes as one of 32 of the others.
    block_n = 32 if head_dim <= 256 else 16
    if itemsize == 1 and takes_teams(group * width, head_dim):
        is_wide = width == 1 and head_dim <= 128 and _fill_last_wave(num_rows * num_kv_heads)
        config = _of_many_teams(num_rows) if is_wide else _of_teams(programs)
    elif itemsize == 1:
        # As many bytes of a tile, and less ahead: more programs at once hide what widening takes.
        config = DecodeConfig(block_n=2 * block_n, num_stages=3, programs=programs)
    else:
        config = DecodeConfig(block_n=block_n, programs=programs)
    if num_rows * width == 1:
        # Items that are shorter take longer to add up. What is behind one row streams weights
        # through registers: it must not begin on processors that hold tiles. Of the memory that
        # these lie in the rest is the L1 cache, where loads under way have their room, and the
        # split stays until a processor is idle, which it is not while kernels overlap.
        config = replace(config, least_tiles=2, overlaps=False)
    return config


def _of_teams(programs: int) -> DecodeConfig:
    """Small programs, of which many hide what each waits for; more warps add up for longer."""
    return DecodeConfig(block_n=2 * TEAM_KEYS, num_warps=2, num_stages=3, programs=programs)


def _of_many_teams(num_rows: int) -> DecodeConfig:
    """Programs that take twice the room. Kernels start while others end, wherever there is room: of
    the small ones some processors would take twice their share, and leave others without any."""
    programs = 256 if num_rows == 1 else 384
    return DecodeConfig(block_n=4 * TEAM_KEYS, num_warps=4, num_stages=2, programs=programs)


def _fill_last_wave(programs: int) -> bool:
    """Whether so many programs take fewer places if they take twice the room: of a last wave of
    small ones less than half would be filled."""
    return -(-programs // _LARGE_AT_ONCE) % 2 == 1


class Scratch:
    """What items leave for those that add them up, of works that are never under way together: each
    has the first part of what the largest needs."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def floats(self, count: int, device: torch.device) -> Tensor:
        """float32 [count]. Ask for the largest first: the smaller ones then lie in it."""
        if self._memory is None or self._memory.numel() < count:
            self._memory = torch.empty(count, dtype=torch.float32, device=device)
        return self._memory[:count]


@dataclass(slots=True)
class DecodeWork:
    """Device buffers of one padded batch size (and one window); see `make_work`."""

    config: DecodeConfig
    num_heads: int
    items: Tensor
    """int32 [items, 8]: see ITEM_FIELDS."""
    row_items: Tensor
    """int32 [rows, 2]: a row's first item and how many it has."""
    partial: Tensor
    """float32 [items, num_heads · width, head_dim]; of each KV head token by token."""
    weight: Tensor
    """float32 [items, num_heads · width]: log2 of the sum of exp of an item's scores."""
    arrived: Tensor
    """int32 [rows, num_kv_heads]: items of the row that are done; zero between kernels."""
    width: int = 1
    """Tokens of a row, each with its heads, that share a reading of its keys."""
    window: int | None = None
    """What the plan was made for."""

    @property
    def num_rows(self) -> int:
        return self.row_items.shape[0]


def takes_width(width: int, num_kv_heads: int, num_heads: int) -> bool:
    """Whether the heads of so many tokens fit into one product."""
    return width * (num_heads // num_kv_heads) <= _MOST_HEADS


def team_block(num_heads: int, head_dim: int) -> tuple[int, int]:
    """Rows and columns of the products of so many heads in decode_float8.py."""
    return max(8, triton.next_power_of_2(num_heads)), max(32, triton.next_power_of_2(head_dim))


def takes_teams(num_heads: int, head_dim: int) -> bool:
    """Whether a warp has registers for the sums of so many heads: of codes and 16-bit types each
    warp has keys of its own then (decode_float8.py)."""
    return math.prod(team_block(num_heads, head_dim)) <= _MOST_SUMS


def make_work(
    num_rows: int,
    num_kv_heads: int,
    num_heads: int,
    head_dim: int,
    device: torch.device,
    *,
    width: int = 1,
    num_items: int | None = None,
    config: DecodeConfig | None = None,
    itemsize: int = 2,
    scratch: Scratch | None = None,
) -> DecodeWork:
    """Allocates what decode attention over `num_rows` padded rows needs.

    That is about 4 · head_dim bytes for each head of each item. Layers share it, for they run one
    after another. Cache groups of different windows, and steps that may run at the same time, need
    one each.

    Args:
        width: tokens of a row, as `takes_width` allows.
        num_items: upper bound of the items of a step, more than `num_rows`; without it, room for
            `config.programs` programs' worth of items or one a row, whichever is more, and for one
            more a row, which the rounding of shares to whole tiles needs.
        config: instead of that of `decode_config`.
        itemsize: as for `decode_config`.
        scratch: where its sums lie, with those of others; None: in memory of its own.

    Raises:
        ValueError: heads that do not share KV heads evenly, or too few items.
    """
    group = num_heads // num_kv_heads
    config = config or decode_config(
        num_rows, num_kv_heads, head_dim, group=group, width=width, itemsize=itemsize
    )
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not share {num_kv_heads} KV heads evenly")
    if num_items is None:
        num_items = num_rows + max(num_rows, triton.cdiv(config.programs, num_kv_heads))
    if num_items <= num_rows:
        raise ValueError(f"{num_items} items are not more than {num_rows} rows")
    if width > 1 and not takes_width(width, num_kv_heads, num_heads):
        raise ValueError(f"rows of {width} tokens have too many heads for a KV head")
    num_heads_of_row = num_heads * width
    num_sums = num_items * num_heads_of_row * head_dim
    memory = (scratch or Scratch()).floats(num_sums, device)
    return DecodeWork(
        config=config,
        num_heads=num_heads,
        items=torch.full((num_items, ITEM_FIELDS), -1, dtype=torch.int32, device=device),
        row_items=torch.zeros(num_rows, 2, dtype=torch.int32, device=device),
        partial=memory.view(num_items, num_heads_of_row, head_dim),
        weight=torch.empty(num_items, num_heads_of_row, dtype=torch.float32, device=device),
        arrived=torch.zeros(num_rows, num_kv_heads, dtype=torch.int32, device=device),
        width=width,
    )


def plan_decode(
    rows: Tensor,
    context_lens: Tensor,
    work: DecodeWork,
    *,
    back: Tensor | None = None,
    num_drafts: Tensor | None = None,
    window: int = 0,
    leaves_padding: bool = False,
) -> None:
    """Lists the items of a step in `work`, for all layers with this window.

    Args:
        rows: int32 [B], the slot of each row, −1 for none; B is what `work` was made for.
        context_lens: int32 [slots], at least 1 for a slot in `rows`.
        back: int32 [B], fewer than the context: how many keys at its end a row does not see, for
            its token is not the slot's last one. None: it sees them all.
        num_drafts: int32 [slots], of work with a width: tokens of the slot behind a row's first
            one, its last keys theirs. Padding behind them sees all that they see.
        window: a row sees its last `window` keys only; 0 means all of them.
        leaves_padding: rows of −1 have no items, and nothing is written for them.
    """
    num_rows, num_items = work.num_rows, work.items.shape[0]
    if rows.shape != (num_rows,):
        raise ValueError(f"planned for {num_rows} rows, got {tuple(rows.shape)}")
    work.window = window
    _plan[(triton.cdiv(num_items, _PLANNED_AT_ONCE),)](
        rows,
        context_lens,
        back,
        num_drafts,
        work.items,
        work.row_items,
        num_rows,
        num_items,
        window,
        TILE=work.config.block_n,
        LEAST=work.config.least_tiles,
        ROWS=triton.next_power_of_2(num_rows),
        ITEMS=_PLANNED_AT_ONCE,
        FIELDS=ITEM_FIELDS,
        HAS_BACK=back is not None,
        HAS_DRAFTS=num_drafts is not None,
        LEAVES_PADDING=leaves_padding,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["num_rows", "num_items", "window"])
def _plan(
    rows,
    context_lens,
    back,
    num_drafts,
    items,
    row_items,
    num_rows,
    num_items,
    window,
    TILE: tl.constexpr,
    LEAST: tl.constexpr,
    ROWS: tl.constexpr,
    ITEMS: tl.constexpr,
    FIELDS: tl.constexpr,
    HAS_BACK: tl.constexpr,
    HAS_DRAFTS: tl.constexpr,
    LEAVES_PADDING: tl.constexpr,
):
    """Writes ITEMS entries of the list; every program finds out by itself where rows begin."""
    row = tl.arange(0, ROWS)
    slot = tl.load(rows + row, mask=row < num_rows, other=-1)
    length = tl.load(context_lens + slot, mask=slot >= 0, other=0)
    if HAS_BACK:
        length -= tl.load(back + row, mask=slot >= 0, other=0)
    drafts = tl.zeros_like(length)
    if HAS_DRAFTS:
        drafts = tl.load(num_drafts + slot, mask=slot >= 0, other=0)
    first_key = tl.where(window > 0, tl.maximum(length - drafts - window, 0), 0)
    tiles = tl.cdiv(length, TILE) - first_key // TILE
    # The sum over rows of ceil(tiles / per_item) is at most (num_items − num_rows) + num_rows.
    per_item = tl.maximum(tl.cdiv(tl.sum(tiles), num_items - num_rows), LEAST)
    has_items = slot >= 0 if LEAVES_PADDING else row < num_rows
    splits = tl.where(has_items, tl.maximum(tl.cdiv(tiles, per_item), 1), 0)
    if LEAVES_PADDING:
        # Nor is there anything to add up, whatever an earlier step had here.
        tl.store(row_items + row * 2 + 1, 0, mask=(row < num_rows) & (slot < 0))
    ends = tl.cumsum(splits)[None, :]

    item = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    is_before = ends <= item[:, None]
    row = tl.sum(is_before.to(tl.int32), 1)
    first_item = tl.max(tl.where(is_before, ends, 0), 1)
    is_used = row < num_rows
    slot = tl.load(rows + row, mask=is_used, other=-1)
    length = tl.load(context_lens + slot, mask=slot >= 0, other=0)
    if HAS_BACK:
        length -= tl.load(back + row, mask=slot >= 0, other=0)
    drafts = tl.zeros_like(length)
    if HAS_DRAFTS:
        drafts = tl.load(num_drafts + slot, mask=slot >= 0, other=0)
    first_key = tl.where(window > 0, tl.maximum(length - drafts - window, 0), 0)
    first_tile = first_key // TILE
    tiles = tl.cdiv(length, TILE) - first_tile
    splits = tl.maximum(tl.cdiv(tiles, per_item), 1)
    split = item - first_item
    begin = (first_tile + split * tiles // splits) * TILE
    end = (first_tile + (split + 1) * tiles // splits) * TILE

    is_item = item < num_items
    entry = items + item * FIELDS
    tl.store(entry, tl.where(is_used, row, -1), mask=is_item)
    tl.store(entry + 1, slot, mask=is_item)
    tl.store(entry + 2, tl.maximum(begin, first_key), mask=is_item)
    tl.store(entry + 3, tl.minimum(end, length), mask=is_item)
    tl.store(entry + 4, first_item, mask=is_item)
    tl.store(entry + 5, splits, mask=is_item)
    tl.store(entry + 6, drafts, mask=is_item)
    is_first = is_item & is_used & (split == 0)
    tl.store(row_items + row * 2, first_item, mask=is_first)
    tl.store(row_items + row * 2 + 1, splits, mask=is_first)
