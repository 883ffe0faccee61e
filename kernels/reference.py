"""Every operation of the engine in plain torch: the CPU path, and the oracle of faster kernels.

In float32 on a CPU a token's bits must not depend on what else is in the step. Three rules do it:

- Only operations whose value at one element does not depend on the tensor's size are used. Sums,
  products, quotients and square roots are rounded exactly; `exp`, `log` and `log1p` are measured
  to be stable; `silu` and `sigmoid` are not (their vector and scalar loops differ), so silu,
  gelu and tanh are written with `exp`.
- Matrix products have enough rows: `plan_attention(min_rows=…)`, shared/engine/determinism.py.
- Attention works on key tiles of TILE positions, aligned at absolute positions, as a batch of
  equal products. Tiles are added one after another; a masked key adds exactly zero.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.kernels import reference_float8

TILE = 128
"""Keys per tile; a multiple of every block size."""
_SCRATCH_BYTES = 32 * 2**20
"""About how much memory gathered keys, and scores, may each take."""
_MIN_QUERIES, _MAX_QUERIES = 16, 128
"""Query tokens of a prompt chunk handled at once."""
_MAX_PRIMITIVES = 64
"""oneDNN compiles a product for each number of rows that it meets: 0.6 to 1.4 MiB each time, and
half a millisecond, little beside the step. By itself it keeps 1024 of them, which prompts of odd
lengths fill, in two caches: its own, and that of the layer between it and torch."""

_GELU_SLOPE = 2 * math.sqrt(2 / math.pi)
_GELU_CUBE = 0.044715

Activation = Literal["silu", "gelu_tanh", "sigmoid", "relu"]

_linear_packed = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_pack = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
_packs = {
    torch.float16: getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False),
    torch.bfloat16: getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False),
}


def pack_weight(weight: Tensor) -> Tensor:
    """Brings a weight [out, in] into the form that `linear` is fastest with.

    On a CPU that is oneDNN's blocked layout: twice the speed of the plain product for a step of 16
    rows, and bits that do not depend on the number of rows. In 16 bits not every CPU can: there
    the plain product is all.
    """
    has_onednn: bool = torch.backends.mkldnn.is_available()
    if _pack is None or not has_onednn or weight.device.type != "cpu":
        return weight
    if weight.dtype in _packs and not _packs[weight.dtype]():
        return weight
    for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        # Read at the first use, which this is.
        os.environ.setdefault(variable, str(_MAX_PRIMITIVES))
    packed: Tensor = _pack(weight, 16)
    return packed


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, in] times a weight from `pack_weight`, plus bias [out] → a new tensor [T, out]."""
    if _linear_packed is None or not weight.is_mkldnn:
        return torch.nn.functional.linear(x, weight, bias)
    packed: Tensor = _linear_packed(x, weight, bias, "none", [], "")
    return packed


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x [..., size] over its root mean square, times weight [size] → the same shape.

    A weight of a wider type than x is applied before the result is rounded. None: no weight.
    """
    wide = x.float()
    scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    wide = wide * scale
    if weight is None:
        return wide.to(x.dtype)
    if weight.dtype != x.dtype:
        return wide.mul_(weight).to(x.dtype)
    return wide.to(x.dtype).mul_(weight)


def norm_add(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> Tensor:
    """residual + `rms_norm` of x, [T, hidden] each; in the residual's memory."""
    return residual.add_(rms_norm(x, weight, eps))


def activate_and_mul(x: Tensor, activation: Activation = "silu") -> Tensor:
    """activation(gate) · up of x [T, 2 · size] = (gate, up) → [T, size]."""
    gate, up = x.chunk(2, -1)
    return activate(gate, activation).mul_(up)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """silu and gelu are x · sigmoid(c): c is x of silu, and 2 · √(2/π) · (x + 0.044715 x³) of
    gelu's approximation by tanh, since (1 + tanh(u)) / 2 = sigmoid(2u). sigmoid is that alone, relu
    max(x, 0). → a new tensor."""
    if activation == "relu":
        return x.clamp(min=0)
    if activation == "sigmoid":
        if x.dtype != torch.float32:
            return torch.sigmoid(x)
        return torch.neg(x).exp_().add_(1).reciprocal_()
    if activation == "silu":
        if x.dtype != torch.float32:
            return torch.nn.functional.silu(x)
        return torch.neg(x).exp_().add_(1).reciprocal_().mul_(x)
    if x.dtype != torch.float32:
        return torch.nn.functional.gelu(x, approximate="tanh")
    inner = (x * x).mul_(_GELU_CUBE).add_(1).mul_(x)
    return inner.mul_(-_GELU_SLOPE).exp_().add_(1).reciprocal_().mul_(x)


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """cap · tanh(x / cap) of every number, in x's memory where it is float32."""
    wide = x.float()
    # tanh(u) = 1 − 2 / (exp(2u) + 1)
    wide.mul_(2 / cap).exp_().add_(1).reciprocal_().mul_(-2 * cap).add_(cap)
    return wide.to(x.dtype)


class Rope(NamedTuple):
    """Angles of rotary pairs, by position or by token."""

    cos: Tensor
    """[N, 1, head_dim], a pair's at both of its places."""
    sin: Tensor
    """As `cos`; the first half is negated."""
    query_scale: Tensor | None = None
    """[N, 1, 1]: what turned queries are multiplied by."""


def pack_rope(
    cos: Tensor, sin: Tensor, dtype: torch.dtype, query_scale: Tensor | None = None
) -> Rope:
    """Brings the angles of rotary pairs, float32 [positions, head_dim / 2] each, and the scale of
    queries, float32 [positions], into the form of `rotary`, in the engine's dtype."""
    return Rope(
        torch.cat((cos, cos), -1)[:, None].to(dtype),
        torch.cat((-sin, sin), -1)[:, None].to(dtype),
        None if query_scale is None else query_scale[:, None, None].to(dtype),
    )


def take_rope(table: Rope, positions: Tensor) -> Rope:
    """The angles of a step's tokens, once for all layers; positions int [T]."""
    scale = table.query_scale
    return Rope(
        table.cos.index_select(0, positions),
        table.sin.index_select(0, positions),
        None if scale is None else scale.index_select(0, positions),
    )


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs (i, i + head_dim / 2) of x [T, heads, head_dim] → new tensor of that shape.

    cos, sin: [T, 1, head_dim], the angle of a pair at both of its places; the first half of `sin`
    is negated.
    """
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), -1)
    return swapped.mul_(sin).add_(x * cos)


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMS norms over single heads: of queries and keys before they are turned, and of values.

    q, k: [head_dim], None for no norm. Of values it has no weight.
    """

    eps: float
    q: Tensor | None = None
    k: Tensor | None = None
    has_value: bool = False


def rope_and_store(
    qkv: Tensor,
    rope: Rope,
    kv: Tensor,
    layer: int,
    plan: AttentionPlan,
    num_heads: int,
    norms: HeadNorms | None = None,
) -> Tensor:
    """Rotates queries and keys of qkv [≥ T, num_heads + 2 · num_kv_heads, head_dim], stores keys
    and values → query [≥ T, num_heads, head_dim]."""
    num_rotated = num_heads + kv.shape[1]
    turned, value = qkv[:, :num_rotated], qkv[:, num_rotated:]
    if norms is not None:
        query, key = turned[:, :num_heads], turned[:, num_heads:]
        query = query if norms.q is None else rms_norm(query, norms.q, norms.eps)
        key = key if norms.k is None else rms_norm(key, norms.k, norms.eps)
        turned = torch.cat((query, key), 1)
        value = rms_norm(value, None, norms.eps) if norms.has_value else value
    turned = rotary(turned, rope.cos, rope.sin)
    store_kv(turned[:, num_heads:], value, kv, layer, plan)
    return _scaled(turned[:, :num_heads], rope)


def rope_query(query: Tensor, rope: Rope, norms: HeadNorms | None = None) -> Tensor:
    """Of a layer that stores nothing: [T, num_heads, head_dim] → the same shape, rotated."""
    if norms is not None and norms.q is not None:
        query = rms_norm(query, norms.q, norms.eps)
    return _scaled(rotary(query, rope.cos, rope.sin), rope)


def _scaled(query: Tensor, rope: Rope) -> Tensor:
    return query if rope.query_scale is None else query * rope.query_scale


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Where the tokens of one step are stored and what they attend to, in one cache group."""

    num_tokens: int
    slots: Tensor
    """int64 [num_layers, 2 (key, value), T · num_kv_heads]: rows of the cache taken as
    [blocks · num_kv_heads · num_layers · 2 · block_size, head_dim]. Where latents are kept, which
    are both, there is 1 in the place of 2, here and below."""
    units: list[QueryUnits]
    stored: Tensor | None = None
    """int64: which of the tokens `slots` is of; None: all of them, else T is how many they are."""

    def tokens_to_store(self, column: Tensor) -> Tensor:
        """Of [≥ num_tokens, …] the rows of those tokens."""
        return column[: self.num_tokens] if self.stored is None else column[self.stored]


@dataclass(frozen=True, slots=True)
class QueryUnits:
    """U units of `num_queries` consecutive tokens of one row each, with NT key tiles in all.

    All decoding rows are one such group; each stretch of a prompt chunk is a group of one unit.
    Units come with falling numbers of tiles; tiles are ordered by their place in their unit, then
    by unit.
    """

    tokens: Tensor
    """int64 [U · num_queries]: which of the step's tokens these are."""
    num_units: int
    num_queries: int
    units_with_tile: list[int]
    """By place: how many units have a tile there; they are the first ones."""
    unit_of_tile: Tensor
    """int64 [NT]"""
    rows: Tensor
    """int64 [num_layers, 2 (key, value), NT · num_kv_heads · blocks per tile]: rows of the cache
    taken as [blocks · num_kv_heads · num_layers · 2, block_size · head_dim]."""
    gathered: Tensor
    """[NT · num_kv_heads · blocks per tile, block_size · head_dim]: room for those rows."""
    tail: Tensor
    """int64 [U · num_kv_heads]: where in `gathered` each unit's last block is."""
    beyond_tail: Tensor
    """bool [U, 1, block_size, 1]: slots of that block behind the unit's last token."""
    first_masked: int
    """Tiles from this one on, in tile order, need the mask."""
    masked: Tensor
    """bool [NT − first_masked, 1, M or 1, TILE]: keys that are not visible."""
    num_rows: int
    """Rows of a product: M = queries · heads per KV head, padded to min_rows."""


def plan_attention(
    query_start: npt.NDArray[np.int64],
    context_lens: npt.NDArray[np.int64],
    block_table: npt.NDArray[np.int64],
    slot_mapping: npt.NDArray[np.int64],
    kv: Tensor,
    *,
    num_heads: int,
    min_rows: int,
    window: int | None = None,
    dtype: torch.dtype | None = None,
) -> AttentionPlan:
    """Prepares a step for all layers of a cache group, once.

    Args:
        query_start: [R + 1], rows of one token first, longest context first (see BatchColumns).
        context_lens: [R].
        block_table: [R, blocks], −1 in holes, which read as zeros, and beyond a row's context.
        slot_mapping: [T]; below zero: nothing is stored.
        kv: [blocks + 1, num_kv_heads, num_layers, 2, block_size, head_dim]; the last block is zero.
            Of latents there is 1 in the place of 2.
        num_heads: query heads.
        min_rows: matrix products get at least as many rows.
        window: positions that a token attends to, its own among them; None: all before it.
        dtype: what keys and values become before they are multiplied; None: that of `kv`.
    """
    slots, stored = plan_slots(slot_mapping, kv)
    return AttentionPlan(
        num_tokens=int(query_start[-1]),
        slots=slots,
        units=[
            _plan_units(
                span, block_table[span.rows], kv, num_heads, min_rows, window, dtype or kv.dtype
            )
            for span in spans(query_start, context_lens, kv, num_heads, window)
        ],
        stored=stored,
    )


def plan_slots(slot_mapping: npt.NDArray[np.int64], kv: Tensor) -> tuple[Tensor, Tensor | None]:
    """`slots` and `stored` of a plan."""
    _, num_kv_heads, num_layers, num_kinds, block_size, _ = kv.shape
    is_stored = slot_mapping >= 0
    stored = None if is_stored.all() else _to(kv, np.flatnonzero(is_stored))
    blocks, offsets = np.divmod(slot_mapping[is_stored], block_size)
    heads = blocks[:, None] * num_kv_heads + np.arange(num_kv_heads)
    slots = heads * (num_layers * num_kinds * block_size) + offsets[:, None]
    layers = np.arange(num_layers * num_kinds).reshape(num_layers, num_kinds, 1) * block_size
    return _to(kv, slots.reshape(-1) + layers), stored


@dataclass(frozen=True, slots=True)
class Span:
    """Units of `num_queries` tokens, one of each row in `rows`, which end before `visible` [U]."""

    first_token: npt.NDArray[np.int64]
    """[U]"""
    num_queries: int
    rows: npt.NDArray[np.int64]
    visible: npt.NDArray[np.int64]


def _num_tiles(
    first_query: npt.NDArray[np.int64], visible: npt.NDArray[np.int64], window: int | None
) -> npt.NDArray[np.int64]:
    """[U]: tiles from the first key that a unit's first token sees to its last token's own."""
    return -(-visible // TILE) - _first_tile(first_query, window)


def _first_tile(first_query: npt.NDArray[np.int64], window: int | None) -> npt.NDArray[np.int64]:
    first_key = first_query * 0 if window is None else first_query - window + 1
    return np.maximum(first_key, 0) // TILE


def spans(
    query_start: npt.NDArray[np.int64],
    context_lens: npt.NDArray[np.int64],
    kv: Tensor,
    num_heads: int,
    window: int | None,
) -> Iterator[Span]:
    """Cuts a step into units that need about _SCRATCH_BYTES; arguments as of `plan_attention`."""
    # Of one tile.
    scores_bytes = num_heads * TILE * 4
    itemsize = 4 if kv.dtype == reference_float8.DTYPE else kv.element_size()
    keys_bytes = kv.shape[1] * TILE * kv.shape[5] * itemsize
    starts = query_start.tolist()
    num_single = int(np.count_nonzero(np.diff(query_start) == 1))
    singles = context_lens[:num_single]
    num_tiles = _num_tiles(singles - 1, singles, window)
    # Those with most tiles first: with a window that need not be the longest.
    order = np.argsort(-num_tiles, kind="stable")
    first = 0
    while first < num_single:
        at_once = max(1, _SCRATCH_BYTES // (keys_bytes * int(num_tiles[order[first]])))
        rows = order[first : first + at_once]
        yield Span(rows, 1, rows, context_lens[rows])
        first += len(rows)
    for row in range(num_single, len(context_lens)):
        one = np.array([row])
        first_query = context_lens[one] - (starts[row + 1] - starts[row])
        most_tiles = int(_num_tiles(first_query, context_lens[one], window)[0])
        at_once = _SCRATCH_BYTES // (scores_bytes * most_tiles)
        at_once = min(max(at_once, _MIN_QUERIES), _MAX_QUERIES)
        end = starts[row + 1]
        for first in range(starts[row], end, at_once):
            num_queries = min(at_once, end - first)
            visible = context_lens[one] - (end - first - num_queries)
            yield Span(np.array([first]), num_queries, one, visible)


def _plan_units(
    span: Span,
    block_table: npt.NDArray[np.int64],
    kv: Tensor,
    num_heads: int,
    min_rows: int,
    window: int | None,
    dtype: torch.dtype,
) -> QueryUnits:
    """Plans a span's units; block_table [U, blocks] holds the ids of its rows."""
    visible, num_queries = span.visible, span.num_queries
    num_blocks_and_zero, num_kv_heads, num_layers, num_kinds, block_size, head_dim = kv.shape
    num_units = len(visible)
    heads_per_kv = num_heads // num_kv_heads
    blocks_per_tile = TILE // block_size
    first_query = visible - num_queries
    first_tile = _first_tile(first_query, window)
    num_tiles = _num_tiles(first_query, visible, window)
    max_tiles = int(num_tiles.max())
    has_tile = np.arange(max_tiles)[:, None] < num_tiles
    place_in_unit, unit_of_tile = np.nonzero(has_tile)
    tile_number = first_tile[unit_of_tile] + place_in_unit

    # Whole tiles, as many as the longest row has, or as the table's width makes.
    whole = max(block_table.shape[1], -(-int(visible.max()) // block_size))
    table = np.full((num_units, -(-whole // blocks_per_tile) * blocks_per_tile), -1)
    num_blocks = -(-visible // block_size)
    listed = np.arange(block_table.shape[1]) < num_blocks[:, None]
    table[:, : block_table.shape[1]][listed] = block_table[listed]
    table[table < 0] = num_blocks_and_zero - 1
    blocks = table.reshape(num_units, -1, blocks_per_tile)[unit_of_tile, tile_number]

    heads = np.arange(num_kv_heads)[:, None]
    keys = (blocks[:, None, :] * num_kv_heads + heads) * (num_layers * num_kinds)
    layers = np.arange(num_layers * num_kinds).reshape(num_layers, num_kinds, 1)

    tile_of_unit = np.zeros((max_tiles, num_units), np.int64)
    tile_of_unit[has_tile] = np.arange(len(tile_number))
    last_block = num_blocks - 1
    tail_tile = tile_of_unit[num_tiles - 1, np.arange(num_units)]
    tail = (tail_tile[:, None] * num_kv_heads + heads.T) * blocks_per_tile
    tail += (last_block % blocks_per_tile)[:, None]
    slots = np.arange(block_size) + (last_block * block_size)[:, None]

    first_masked = 0
    if window is None:
        first_masked = int(has_tile[: int(first_query.min() + 1) // TILE].sum())
    key_position = tile_number[first_masked:, None] * TILE + np.arange(TILE)
    query = first_query[unit_of_tile[first_masked:], None] + np.arange(num_queries)
    masked = key_position[:, None, :] > query[:, :, None]
    if window is not None:
        masked |= key_position[:, None, :] <= query[:, :, None] - window
    if num_queries > 1:
        masked = np.repeat(masked, heads_per_kv, axis=1)
    return QueryUnits(
        tokens=_to(kv, (span.first_token[:, None] + np.arange(num_queries)).reshape(-1)),
        num_units=num_units,
        num_queries=num_queries,
        units_with_tile=has_tile.sum(1).tolist(),
        unit_of_tile=_to(kv, unit_of_tile),
        rows=_to(kv, keys.reshape(-1) + layers),
        gathered=kv.new_empty(keys.size, block_size * head_dim, dtype=dtype),
        tail=_to(kv, tail.reshape(-1)),
        beyond_tail=_to(kv, (slots >= visible[:, None])[:, None, :, None]),
        first_masked=first_masked,
        masked=_to(kv, masked[:, None]),
        num_rows=max(num_queries * heads_per_kv, min_rows),
    )


def store_kv(key: Tensor, value: Tensor, kv: Tensor, layer: int, plan: AttentionPlan) -> None:
    """Writes the step's keys and values, [≥ T, num_kv_heads, head_dim] each, to their slots.

    kv: [blocks + 1, num_kv_heads, num_layers, 2, block_size, head_dim]; in 8 bits a view of codes
        with their scales behind them (reference_float8.py), here and below.
    """
    for which, column in enumerate((key, value)):
        tokens = plan.tokens_to_store(column).reshape(-1, kv.shape[5])
        if kv.dtype == reference_float8.DTYPE:
            reference_float8.store(tokens, kv, plan.slots[layer, which])
        else:
            kv.view(-1, kv.shape[5]).index_copy_(0, plan.slots[layer, which], tokens)


def paged_attention(
    query: Tensor,
    kv: Tensor,
    layer: int,
    plan: AttentionPlan,
    scale: float,
    cap: float = 0.0,
    sinks: Tensor | None = None,
    *,
    value_dim: int | None = None,
) -> Tensor:
    """Causal attention of query [≥ T, num_heads, head_dim] over the blocks → the same shape.

    `cap`: scores go through `soft_cap` with it; 0: they do not. `sinks` float32 [num_heads]: each
    head's score of something that every token sees, whose value is zero. The step's own keys and
    values are stored before. Rows of `query` behind T have the first one's result.
    kv: [blocks + 1, num_kv_heads, num_layers, 2, block_size, head_dim]; what lies in slots behind
    a row's context is never used, NaN included. With `value_dim`, [..., 1, block_size, head_dim]:
    so many of a key's first numbers are its value → [≥ T, num_heads, value_dim].
    """
    num_kv_heads = kv.shape[1]
    _, num_heads, head_dim = query.shape
    value_dim = value_dim or head_dim
    out = query.new_empty(*query.shape[:2], value_dim)
    scaled = query * scale
    for units in plan.units:
        num_tokens = units.num_units * units.num_queries
        shape = (units.num_units, units.num_queries, num_kv_heads, -1, head_dim)
        by_head = scaled.index_select(0, units.tokens).view(shape).transpose(1, 2).flatten(2, 3)
        attended = _attend(by_head, kv, layer, units, cap, sinks, value_dim)
        by_token = attended.view(units.num_units, num_kv_heads, units.num_queries, -1, value_dim)
        by_token = by_token.transpose(1, 2).reshape(num_tokens, num_heads, value_dim)
        out.index_copy_(0, units.tokens, by_token)
    if len(out) > plan.num_tokens:
        out[plan.num_tokens :] = out[0]
    return out


def _attend(
    query: Tensor,
    kv: Tensor,
    layer: int,
    units: QueryUnits,
    cap: float,
    sinks: Tensor | None,
    value_dim: int,
) -> Tensor:
    """query [U, num_kv_heads, M, head_dim], scaled → [U, num_kv_heads, M, value_dim]."""
    num_units, num_kv_heads, num_rows, head_dim = query.shape
    if num_rows < units.num_rows:
        padding = (0, 0, 0, units.num_rows - num_rows)
        query = torch.nn.functional.pad(query, padding)
    by_tile = query.index_select(0, units.unit_of_tile)
    keys = _gather(kv, layer, 0, units)
    scores = bmm(by_tile.flatten(0, 1), keys.transpose(1, 2)).float()
    scores = scores.view(-1, num_kv_heads, units.num_rows, TILE)
    real = scores[:, :, :num_rows]
    if cap:
        soft_cap(real, cap)  # In place: they are float32.
    real[units.first_masked :].masked_fill_(units.masked, float("-inf"))
    highest = _over_tiles(torch.maximum, real.amax(-1, keepdim=True), units)
    if sinks is not None:
        # [num_kv_heads, M, 1]: of each query token the heads that share keys and values.
        sinks = sinks.view(num_kv_heads, -1).repeat(1, units.num_queries)[..., None]
        highest = torch.maximum(highest, sinks)
    real.sub_(highest.index_select(0, units.unit_of_tile)).exp_()
    total = _over_tiles(torch.add, real.sum(-1, keepdim=True), units)
    if sinks is not None:
        total = total + (sinks - highest).exp_()

    # Of latents the keys are there still.
    values = _gather(kv, layer, 1, units) if kv.shape[3] == 2 else keys
    # A masked key's weight is zero, but zero times NaN is not.
    block_size = kv.shape[4]
    tail = units.gathered.index_select(0, units.tail).view(-1, num_kv_heads, block_size, head_dim)
    tail.masked_fill_(units.beyond_tail, 0)
    units.gathered.index_copy_(0, units.tail, tail.view(-1, block_size * head_dim))
    partial = bmm(scores.to(values.dtype).flatten(0, 1), values[..., :value_dim])
    partial = partial.view(*by_tile.shape[:-1], value_dim)
    sums = _over_tiles(torch.add, partial[:, :, :num_rows], units)
    return (sums / total).to(query.dtype)


def _gather(kv: Tensor, layer: int, which: int, units: QueryUnits) -> Tensor:
    """Copies the keys (which = 0) or values (1) of all tiles: [NT · num_kv_heads, TILE, head_dim].

    The next call reuses the memory.
    """
    if kv.dtype == reference_float8.DTYPE:
        out = units.gathered.view(-1, *kv.shape[4:])
        reference_float8.widen_runs(kv, layer, which, units.rows[layer, which], out)
    else:
        rows = kv.view(-1, units.gathered.shape[1])
        torch.index_select(rows, 0, units.rows[layer, which], out=units.gathered)
    return units.gathered.view(-1, TILE, kv.shape[5])


def _over_tiles(combine: Callable[..., Tensor], partial: Tensor, units: QueryUnits) -> Tensor:
    """Folds [NT, …] over each unit's tiles, in their order → [U, …]."""
    start = units.num_units
    result = partial[:start]
    for num_units in units.units_with_tile[1:]:
        head = result[:num_units]
        combine(head, partial[start : start + num_units], out=head)
        start += num_units
    return result


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """[B, M, K] times [B, K, N]; a lone product is doubled.

    Threads share a batch out product by product, but split a lone one, which changes its bits.
    """
    if a.shape[0] == 1:
        return torch.bmm(a.expand(2, -1, -1), b.expand(2, -1, -1))[:1]
    return torch.bmm(a, b)


def _to(like: Tensor, array: npt.NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(like.device, non_blocking=True)
