"""Mixtures of experts: tokens are sorted by expert, and each expert multiplies its own.

    route       logits ─► top_k experts of each token, and their weights
    sort        (token, expert) pairs, expert by expert; for few tokens they stay as they are
    product     gate and up of x's rows, activated ─► one row for each pair
    product     down of those rows ─► one row for each pair, where the token has it
    combine     Σ weight · row, in the order in which the token's experts were chosen

An MLP that every token has goes along in steps of few tokens, as experts that each of them chose
with a weight of one: two launches less, and more that is read at a time.

With `pdl` each starts while the one before still runs, and waits for it; the second product has
asked for its first weights by then.

The host reads nothing: grids have as many programs as there may be tiles, and those that are not
needed end at once. An expert without tokens is not read. Nothing is added by atomics.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from baton.kernels import experts_table
from baton.kernels.expert_order import Order, order_of
from baton.kernels.experts_table import UNSORTED_TOKENS, Tiles
from baton.kernels.float8_jit import has_assembler
from baton.kernels.gated_mul import activate
from baton.kernels.overlap import overlap
from baton.kernels.reference_experts import ExpertActivation, Routes
from baton.kernels.routing import ClampedSwiglu
from baton.kernels.shared_memory import shared_bytes
from baton.kernels.skinny_linear_jit import prefetch_l2
from baton.kernels.small_experts import SmallExperts, small_sums, small_sums_of_a_row

_COMBINED = 1024


class ExpertWeights(NamedTuple):
    """Of all experts of a layer, contiguous."""

    gate_up: Tensor
    """[experts, 2 · size, hidden]: the gate's rows, then up's; without a gate [experts, size,
    hidden]."""
    down: Tensor
    """[experts, hidden, size]"""
    gate_up_bias: Tensor | None
    """[experts, 2 · size]"""
    down_bias: Tensor | None
    """[experts, hidden]"""


class SmallExpertWeights(NamedTuple):
    """As `ExpertWeights`, of few bits."""

    gate_up: SmallExperts
    down: SmallExperts
    gate_up_bias: Tensor | None
    down_bias: Tensor | None

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self if each is not None)


class SharedWeights(NamedTuple):
    """Of an MLP as large as some experts, without biases; contiguous."""

    gate_up: Tensor
    """[2 · (their number · size), hidden]: the gate's rows, then up's."""
    down: Tensor
    """[hidden, their number · size]"""


def takes_shared(num_tokens: int, size: int, shared_size: int) -> bool:
    """Whether `experts` of `size` take an MLP of `shared_size` along, in a step of so many
    tokens."""
    return num_tokens <= UNSORTED_TOKENS and shared_size % size == 0


def experts(
    x: Tensor,
    routes: Routes,
    weights: ExpertWeights | SmallExpertWeights,
    activation: ExpertActivation,
    residual: Tensor | None = None,
    *,
    shared: SharedWeights | None = None,
    shared_gate: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """Each token's experts, weighted and added up, plus the residual.

    Args:
        x: [T, hidden], the last dimension contiguous.
        routes: of `route`.
        residual: [T, hidden]; the result takes its memory.
        shared: what every token has besides; see `takes_shared`.
        shared_gate: float32 [T, 1], whose sigmoid that is multiplied by; rows may be strided.
        pdl: see above.
    """
    num_tokens, hidden = x.shape
    size = weights.down.shape[2]
    if num_tokens == 0:
        return torch.empty_like(x) if residual is None else residual
    num_shared = 0 if shared is None else shared.down.shape[1] // size
    num_pairs = num_tokens * (routes.experts.shape[1] + num_shared)
    order = order_of(routes, len(weights.down), pdl=pdl)
    assert shared is None or order is None
    inner = torch.empty((num_pairs, size), dtype=x.dtype, device=x.device)
    multiply_up(inner, x, weights, routes, order, activation, shared=shared, pdl=pdl)
    rows = torch.empty((num_pairs, hidden), dtype=x.dtype, device=x.device)
    multiply_down(rows, inner, weights, routes, order, shared=shared, pdl=pdl)
    return combine(rows, routes, residual, num_shared=num_shared, gate=shared_gate, pdl=pdl)


def gated_add(x: Tensor, gate: Tensor, residual: Tensor | None, *, pdl: bool = False) -> Tensor:
    """sigmoid(gate) · x + residual, in the residual's memory: x and residual [T, hidden], gate
    float32 [T, 1], whose rows may be strided."""
    out = torch.empty_like(x) if residual is None else residual
    return _add_up(out, x, None, residual, 1, gate, pdl=pdl)


def multiply_up(
    out: Tensor,
    x: Tensor,
    weights: ExpertWeights | SmallExpertWeights,
    routes: Routes,
    order: Order | None,
    activation: ExpertActivation,
    *,
    shared: SharedWeights | None = None,
    tiles: Tiles | None = None,
    pdl: bool = False,
) -> None:
    """out [pairs, size], in their order: gate and up of x [T, hidden], activated.

    `tiles`: if they are not to be chosen here.
    """
    _product(
        out, x, weights.gate_up, weights.gate_up_bias, None if shared is None else shared.gate_up,
        routes, order, activation, tiles, pdl=pdl,
    )  # fmt: skip


def multiply_down(
    out: Tensor,
    x: Tensor,
    weights: ExpertWeights | SmallExpertWeights,
    routes: Routes,
    order: Order | None,
    *,
    shared: SharedWeights | None = None,
    tiles: Tiles | None = None,
    pdl: bool = False,
) -> None:
    """out [pairs, hidden], where the tokens have them, of what `multiply_up` made."""
    _product(
        out, x, weights.down, weights.down_bias, None if shared is None else shared.down,
        routes, order, None, tiles, pdl=pdl,
    )  # fmt: skip


def combine(
    rows: Tensor,
    routes: Routes,
    residual: Tensor | None = None,
    *,
    num_shared: int = 0,
    gate: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """Σ weight · row of each token's pairs, [pairs, hidden], plus the residual [T, hidden], whose
    memory the result takes. The last `num_shared` of a token's pairs have a weight of one, or of
    the sigmoid of `gate`, float32 [T, 1]."""
    out = rows.new_empty(len(routes.weights), rows.shape[1]) if residual is None else residual
    return _add_up(out, rows, routes.weights, residual, num_shared, gate, pdl=pdl)


def _product(
    out: Tensor,
    x: Tensor,
    weight: Tensor | SmallExperts,
    bias: Tensor | None,
    shared: Tensor | None,
    routes: Routes,
    order: Order | None,
    activation: ExpertActivation | None,
    tiles: Tiles | None,
    *,
    pdl: bool,
) -> None:
    """The rows of x times their experts' weights.

    With an activation x has a row for each token, and out for each pair in their order; without one
    it is x that has those, and out has them by token.
    """
    num_tokens, top_k = routes.experts.shape
    num_pairs, num_out = out.shape
    num_experts, num_rows, num_in = weight.shape
    small = weight if isinstance(weight, SmallExperts) else None
    at_once, joins_runs = 1, False
    assert small is None or shared is None
    if isinstance(weight, SmallExperts):
        codes, is_a_row = weight.codes, order is None
        joins_runs = not is_a_row and weight.has_numbers_of(x.dtype)
        tiles = tiles or experts_table.guess_small(
            experts_table.kind_of(num_tokens),
            is_up=activation is not None,
            has_runs=weight.num_runs > 1 and not joins_runs,
            shared_bytes=shared_bytes(x.device),
        )
        block_k, at_once = weight.blocks(tiles.block_k, joins_runs=joins_runs, is_a_row=is_a_row)
        weight = codes.view(torch.uint8) if weight.kind == "float8" else codes
    else:
        tiles = tiles or _tiles(num_tokens, weight, num_out)
        block_k = min(tiles.block_k, max(16, triton.next_power_of_2(num_in)))
    num_tiles = num_pairs
    if order is not None:
        num_tiles = min(num_pairs, num_pairs // tiles.block_m + num_experts)
    descriptor = None
    if tiles.copies and small is None:
        descriptor = TensorDescriptor(
            weight, [num_experts * num_rows, num_in], [num_in, 1], [tiles.block_n, block_k]
        )
    num_columns = triton.cdiv(num_out, tiles.block_n)
    clamped = activation if isinstance(activation, ClampedSwiglu) else None
    _multiply[(triton.cdiv(num_tiles, tiles.group) * tiles.group * num_columns,)](
        out,
        x,
        weight,
        descriptor,
        bias,
        shared,
        routes.experts,
        None if order is None else order.pairs,
        None if order is None else order.ends,
        None if small is None else small.scale,
        None if small is None else small.offset,
        num_tiles,
        x.stride(0),
        out.stride(0),
        NUM_OUT=num_out,
        NUM_IN=num_in,
        NUM_EXPERTS=num_experts,
        TOP_K=top_k,
        SHARED=0 if shared is None else num_pairs // num_tokens - top_k,
        ACTIVATION="clamped" if clamped is not None else activation,
        SLOPE=0.0 if clamped is None else clamped.slope,
        LIMIT=0.0 if clamped is None else clamped.limit,
        COLUMNS=num_columns,
        GROUP=tiles.group,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=block_k,
        BLOCK_E=triton.next_power_of_2(num_experts),
        KIND=None if small is None else small.kind,
        NUM_RUNS=1 if small is None else small.num_runs,
        AT_ONCE=at_once,
        JOINS_RUNS=joins_runs,
        ASM=has_assembler() and x.dtype == torch.bfloat16,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **overlap(routes.experts, pdl=pdl),
    )


def _tiles(num_tokens: int, weight: Tensor, num_out: int) -> Tiles:
    num_experts, num_rows, num_in = weight.shape
    if weight.dtype == torch.float32:
        return experts_table.wide(num_tokens)
    is_up = num_rows != num_out
    tiles = experts_table.choose(num_tokens, num_experts, num_out, num_in, is_up=is_up)
    if tiles.copies and not _can_copy(weight):
        return experts_table.guess(experts_table.kind_of(num_tokens))
    return tiles


def _can_copy(weight: Tensor) -> bool:
    """The copy engine takes rows of whole 16 bytes, on a GPU that has one."""
    if weight.stride(1) * weight.element_size() % 16 or weight.data_ptr() % 16:
        return False
    return not weight.is_cuda or _capability(weight.device) >= 9


@cache
def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def _add_up(
    out: Tensor,
    rows: Tensor,
    weights: Tensor | None,
    residual: Tensor | None,
    num_shared: int,
    gate: Tensor | None,
    *,
    pdl: bool,
) -> Tensor:
    num_tokens, size = out.shape
    if num_tokens == 0:
        return out
    block = min(_COMBINED, triton.next_power_of_2(size))
    _combine[(triton.cdiv(size, block), num_tokens)](
        out,
        rows,
        weights,
        gate,
        residual,
        out.stride(0),
        rows.stride(0),
        0 if weights is None else weights.stride(0),
        0 if gate is None else gate.stride(0),
        0 if residual is None else residual.stride(0),
        SIZE=size,
        TOP_K=0 if weights is None else weights.shape[1],
        SHARED=num_shared,
        BLOCK=block,
        num_warps=4,
        **overlap(rows, pdl=pdl),
    )
    return out


@triton.jit(do_not_specialize=["num_tiles"])
def _multiply(
    out_ptr,
    x_ptr,
    weight_ptr,
    descriptor,
    bias_ptr,
    shared_ptr,
    chosen_ptr,
    pairs_ptr,
    ends_ptr,
    scale_ptr,
    offset_ptr,
    num_tiles,
    x_stride,
    out_stride,
    NUM_OUT: tl.constexpr,
    NUM_IN: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    LIMIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    KIND: tl.constexpr,
    NUM_RUNS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    JOINS_RUNS: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Some columns of one tile of pairs, which have one expert. KIND: the weight is of few bits,
    with scales and offsets beside it, and it is `small_sums` that multiplies. With an ACTIVATION it
    is gate and up, NUM_OUT of each, or up alone where it has no gate. Of a token's pairs the last
    SHARED are of what every token has: these read their part of one weight, as if it were an
    expert's."""
    IS_UP: tl.constexpr = ACTIVATION is not None
    IS_GATED: tl.constexpr = IS_UP and ACTIVATION != "relu2"
    PAIRS: tl.constexpr = TOP_K + SHARED
    program = tl.program_id(0)
    within = program % (GROUP * COLUMNS)
    tile = program // (GROUP * COLUMNS) * GROUP + within % GROUP
    first_column = within // GROUP * BLOCK_N
    if tile >= num_tiles:
        return
    row = tl.arange(0, BLOCK_M)
    column = first_column + tl.arange(0, BLOCK_N)
    # Of pairs that are not sorted: which of the token's it is, and where its expert stands.
    number = tile % PAIRS
    chosen_at = chosen_ptr + tile // PAIRS * TOP_K + tl.minimum(number, TOP_K - 1)
    if PDL:
        if not IS_UP and pairs_ptr is None and KIND is None:
            # The product before this one has waited for the routes: they are there already.
            own = tl.load(chosen_at) * NUM_OUT + column
            own = tl.minimum(tl.maximum(own, 0), NUM_EXPERTS * NUM_OUT - 1).to(tl.int64)
            ahead = weight_ptr + own * NUM_IN
            if SHARED > 0:
                theirs = tl.minimum(column, NUM_OUT - 1).to(tl.int64) * (SHARED * NUM_IN)
                theirs = shared_ptr + theirs + (number - TOP_K) * NUM_IN
                ahead = tl.where(number >= TOP_K, theirs, ahead)
            _prefetch(ahead, NUM_IN, BLOCK_N, BLOCK_K)
        if IS_UP and SHARED > 0:
            if number >= TOP_K:
                # This depends on no route.
                own = tl.minimum(column, NUM_OUT - 1) + (number - TOP_K) * NUM_OUT
                ahead = shared_ptr + own.to(tl.int64) * NUM_IN
                _prefetch(ahead, NUM_IN, BLOCK_N, BLOCK_K)
                if IS_GATED:
                    _prefetch(ahead + SHARED * NUM_OUT * NUM_IN, NUM_IN, BLOCK_N, BLOCK_K)
        gdc_wait()
        gdc_launch_dependents()
    if pairs_ptr is None:
        expert = tl.load(chosen_at)
        place = tile + row
        is_real = row == 0
        pair = place
    else:
        other = tl.arange(0, BLOCK_E)
        end = tl.load(ends_ptr + other, mask=other < NUM_EXPERTS, other=0)
        start = tl.load(ends_ptr + other - 1, mask=(other > 0) & (other < NUM_EXPERTS), other=0)
        # Those that only pad have no tiles.
        tiles_each = tl.where(other < NUM_EXPERTS, (end - start + BLOCK_M - 1) // BLOCK_M, 0)
        tiles_end = tl.cumsum(tiles_each, 0)
        expert = tl.sum((tiles_end <= tile).to(tl.int32), 0)
        if expert >= NUM_EXPERTS:
            return
        is_it = other == expert
        first_tile = tl.sum(tl.where(is_it, tiles_end - tiles_each, 0), 0)
        first = tl.sum(tl.where(is_it, start, 0), 0) + (tile - first_tile) * BLOCK_M
        place = first + row
        is_real = place < tl.sum(tl.where(is_it, end, 0), 0)
        pair = tl.load(pairs_ptr + place, mask=is_real, other=0)
    if IS_UP:
        source, target = pair // PAIRS, place
    else:
        source, target = place, pair

    inside = column < NUM_OUT
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + source.to(tl.int64)[:, None] * x_stride + k[None, :]
    rows_each: tl.constexpr = 2 * NUM_OUT if IS_GATED else NUM_OUT
    first_row = expert * rows_each + first_column
    weight = weight_ptr + expert.to(tl.int64) * (rows_each * NUM_IN)
    weight_stride, up_distance = NUM_IN, NUM_OUT * NUM_IN
    if SHARED > 0:
        # As a choice between numbers: two loops would have two rings in shared memory.
        is_own = number < TOP_K
        share = (number - TOP_K).to(tl.int64) * ((NUM_OUT if IS_UP else 1) * NUM_IN)
        weight = tl.where(is_own, weight, shared_ptr + share)
        if IS_GATED:
            up_distance = tl.where(is_own, NUM_OUT * NUM_IN, SHARED * NUM_OUT * NUM_IN)
        else:
            weight_stride = tl.where(is_own, NUM_IN, SHARED * NUM_IN)
    weight_at = weight + column[None, :] * weight_stride + k[:, None]
    if KIND is not None:
        own = expert.to(tl.int64) * rows_each + column
        width: tl.constexpr = NUM_IN // 2 if KIND == "int4" or KIND == "fp4" else NUM_IN
        offset_at = None
        if offset_ptr is not None:
            offset_at = offset_ptr + own * NUM_RUNS
        codes_at = weight_ptr + own[None, :] * width + k[:, None]
        if pairs_ptr is None and NUM_RUNS > 1:
            own_row = tile // PAIRS if IS_UP else tile
            x_at = x_ptr + own_row.to(tl.int64) * x_stride + k[None, :] + 0 * row[:, None]
            acc, up_acc = small_sums_of_a_row(
                x_at, row, codes_at, scale_ptr + own * NUM_RUNS, offset_at, NUM_OUT, inside,
                NUM_IN, NUM_RUNS, KIND, IS_GATED, BLOCK_M, BLOCK_N, BLOCK_K, ASM,
            )  # fmt: skip
        else:
            acc, up_acc = small_sums(
                x_at, is_real, codes_at, scale_ptr + own * NUM_RUNS, offset_at, NUM_OUT, inside,
                NUM_IN, NUM_RUNS, KIND, IS_GATED, BLOCK_M, BLOCK_N, BLOCK_K, AT_ONCE,
                JOINS_RUNS, ASM,
            )  # fmt: skip
    elif SHARED > 0 and descriptor is not None:
        if number < TOP_K:
            acc, up_acc = _sums(
                x_at, is_real, weight_at, up_distance, descriptor, first_row, inside,
                NUM_OUT, NUM_IN, IS_UP, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            acc, up_acc = _sums(
                x_at, is_real, weight_at, up_distance, None, first_row, inside,
                NUM_OUT, NUM_IN, IS_GATED, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    else:
        acc, up_acc = _sums(
            x_at, is_real, weight_at, up_distance, descriptor, first_row, inside,
            NUM_OUT, NUM_IN, IS_GATED, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if bias_ptr is not None:
        bias_at = bias_ptr + expert * rows_each + column
        acc += tl.load(bias_at, mask=inside, other=0.0).to(tl.float32)[None, :]
        if IS_GATED:
            up_bias = tl.load(bias_at + NUM_OUT, mask=inside, other=0.0)
            up_acc += up_bias.to(tl.float32)[None, :]
    if ACTIVATION == "clamped":
        gate = tl.minimum(acc, LIMIT)
        up = tl.minimum(tl.maximum(up_acc, -LIMIT), LIMIT)
        acc = gate / (1.0 + tl.exp(-SLOPE * gate)) * (up + 1.0)
    elif ACTIVATION == "relu2":
        acc = activate(acc, "relu") * acc
    elif ACTIVATION is not None:
        acc = activate(acc, ACTIVATION) * up_acc
    out_at = out_ptr + target.to(tl.int64)[:, None] * out_stride + column[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=is_real[:, None] & inside[None, :])


@triton.jit
def _sums(
    x_at, is_real, weight_at, up_distance, descriptor, first_row, inside,
    NUM_OUT: tl.constexpr, NUM_IN: tl.constexpr, IS_GATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Products of BLOCK_M rows with BLOCK_N rows of a weight, and with those of up, which are
    `up_distance` numbers further on. With a descriptor the copy engine brings the weight, from
    `first_row` on, and from NUM_OUT rows further on."""
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin in tl.range(0, NUM_IN, BLOCK_K):
        if NUM_IN % BLOCK_K == 0:
            x = tl.load(x_at + begin, mask=is_real[:, None], other=0.0)
            is_weight = inside[None, :]
        else:
            is_in = begin + k < NUM_IN
            x = tl.load(x_at + begin, mask=is_real[:, None] & is_in[None, :], other=0.0)
            is_weight = is_in[:, None] & inside[None, :]
        if descriptor is not None:
            # Beyond the sum it gives zeros, beyond an expert's rows what is not stored.
            weight = descriptor.load([first_row, begin]).T
        else:
            weight = tl.load(weight_at + begin, mask=is_weight, other=0.0)
        acc = tl.dot(x, weight, acc, input_precision="ieee")
        if IS_GATED:
            if descriptor is not None:
                weight = descriptor.load([first_row + NUM_OUT, begin]).T
            else:
                weight = tl.load(weight_at + up_distance + begin, mask=is_weight, other=0.0)
            up_acc = tl.dot(x, weight, up_acc, input_precision="ieee")
    return acc, up_acc


@triton.jit
def _prefetch(rows, NUM_IN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """What the first steps read of BLOCK_N rows of the weight, to the L2 cache."""
    item_bytes: tl.constexpr = rows.dtype.element_ty.primitive_bitwidth // 8
    if NUM_IN * item_bytes % 16 == 0:
        ahead: tl.constexpr = NUM_IN if NUM_IN < 2 * BLOCK_K else 2 * BLOCK_K
        length: tl.constexpr = ahead * item_bytes
        prefetch_l2(rows.to(tl.int64), tl.full([BLOCK_N], length, tl.int32))


@triton.jit
def _combine(
    out_ptr,
    rows_ptr,
    weights_ptr,
    gate_ptr,
    residual_ptr,
    out_stride,
    rows_stride,
    weights_stride,
    gate_stride,
    residual_stride,
    SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Some columns of one token."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    acc = tl.zeros([BLOCK], tl.float32)
    gate = 1.0
    if gate_ptr is not None:
        gate = 1.0 / (1.0 + tl.exp(-tl.load(gate_ptr + token * gate_stride)))
    for number in tl.static_range(TOP_K + SHARED):
        row = rows_ptr + (token * (TOP_K + SHARED) + number) * rows_stride + column
        own = tl.load(row, mask=inside, other=0.0).to(tl.float32)
        if number < TOP_K:
            own *= tl.load(weights_ptr + token * weights_stride + number)
        elif gate_ptr is not None:
            own *= gate
        acc += own
    if residual_ptr is not None:
        source = residual_ptr + token * residual_stride + column
        acc += tl.load(source, mask=inside, other=0.0).to(tl.float32)
    target = out_ptr + token * out_stride + column
    tl.store(target, acc.to(out_ptr.dtype.element_ty), mask=inside)
