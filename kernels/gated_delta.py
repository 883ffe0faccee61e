"""The gated delta rule over rows of one token and over chunks of tokens.

As `gated_delta` of kernels/reference_delta.py, which says what it is. Rows of one token: one launch
that reads and writes the state once, with unit vectors, decay and strength made on the way; it goes
on through guesses behind the token, and leaves what the state was before them. Others: tile by
tile in matrix form (DeltaNet, arXiv 2406.06484; with decays, arXiv 2412.06464). With G the sums of
log decays up to each token of a tile, and β its strengths:

    A[i, j] = βᵢ · kᵢ·kⱼ · exp(Gᵢ − Gⱼ), j < i;   X = (I + A)⁻¹;   u = X (β v);   w = X (β k exp(G))

so that with the state S before the tile, and what it is told anew, d = u − w S,

    out = (q exp(G)) S + lower(q kᵀ exp(Gᵢ − Gⱼ)) d;   S ← exp(G_last) S + (k exp(G_last − G))ᵀ d

Three launches: u and w of all tiles; the states before tiles, row by row, and d; then what comes
out. States are float32; 16-bit operands are multiplied as such and added up in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.overlap import overlap
from baton.kernels.reference_delta import UNIT_EPS, DeltaGates
from baton.kernels.state_plan import TILE_TOKENS, DeviceStatePlan

MOST_DIM = 256
"""Of keys and of values."""
_EPS = tl.constexpr(UNIT_EPS)


def gated_delta(
    qkv: Tensor,
    strength: Tensor,
    decay: Tensor,
    gates: DeltaGates,
    state: Tensor,
    layer: int,
    plan: DeviceStatePlan,
    *,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """See kernels/reference_delta.py.

    Args:
        qkv: [T, C]; rows may be strided.
        strength, decay: [T, num_value_heads]; rows may be strided.
        state: float32 [num_slots + 1, num_key_heads, layers, value heads of each, key_dim,
            value_dim], of which what one layer has of a head is contiguous.
        out: [T, num_value_heads, value_dim], contiguous.
        pdl: launched to overlap the end of the kernel before.

    Returns:
        out, or a new tensor; zeros in padding at the end of the step.
    """
    _, num_key_heads, _, num_each, key_dim, value_dim = state.shape
    own = state[:, :, layer]
    assert own.stride()[2:] == (key_dim * value_dim, value_dim, 1) and own.dtype == torch.float32
    assert qkv.stride(1) == strength.stride(1) == decay.stride(1) == 1
    if out is None:
        out = plan.make_out(qkv, num_key_heads * num_each, value_dim)
    assert out.is_contiguous()
    if plan.num_padding:
        out[-plan.num_padding :].zero_()
    if plan.num_singles:
        _step(qkv, strength, decay, gates, own, plan, out, pdl=pdl)

        def again(qkv: Tensor, strength: Tensor, decay: Tensor, plan: DeviceStatePlan) -> None:
            _step(qkv, strength, decay, gates, own, plan, None, pdl=False)

        plan.note(again, qkv, strength, decay)
    if plan.rows is not None and plan.tiles is not None:
        _chunks(qkv, strength, decay, gates, own, plan, plan.rows, plan.tiles, out)
    return out


def why_no_delta(key_dim: int, value_dim: int) -> str | None:
    """Why the kernels do not take heads of these sizes, if they do not."""
    largest = max(key_dim, value_dim)
    if largest <= MOST_DIM:
        return None
    return f"a gated delta rule has heads of {largest}, and its kernels take {MOST_DIM} at most"


def _form(dtype: torch.dtype, dim: int) -> str:
    """What products of tiles are made of. Of small heads in float32: there is no time to win, and
    Triton's products of so few 16-bit columns were seen to reach beyond their memory."""
    if dtype == torch.float32 or dim <= 32:
        return "tf32x3"
    return "16 bits"


def _sizes(state: Tensor) -> dict[str, int]:
    _, num_key_heads, num_each, key_dim, value_dim = state.shape
    return {
        "KEY_HEADS": num_key_heads,
        "EACH": num_each,
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_K": max(16, triton.next_power_of_2(key_dim)),
    }


def _step(
    qkv: Tensor,
    strength: Tensor,
    decay: Tensor,
    gates: DeltaGates,
    state: Tensor,
    plan: DeviceStatePlan,
    out: Tensor | None,
    *,
    pdl: bool,
) -> None:
    """Of rows of one token and guesses. out: None where guesses are known to stand."""
    _, num_key_heads, num_each, _, value_dim = state.shape
    # Few rows: each state is in the hands of more processors.
    block_v, num_warps = (32, 2) if plan.num_rows <= 8 else (64, 4)
    block_v = min(max(16, triton.next_power_of_2(value_dim)), block_v)
    grid = (triton.cdiv(value_dim, block_v), num_key_heads * num_each, plan.num_rows)
    _delta_step[grid](
        qkv,
        strength,
        decay,
        gates.rate,
        gates.bias,
        state,
        plan.slots,
        plan.positions,
        plan.num_standing,
        out,
        qkv.stride(0),
        strength.stride(0),
        decay.stride(0),
        state.stride(0),
        state.stride(1),
        WIDTH=plan.width,
        SETTLES=out is None,
        LEAVES_PADDING=plan.shared is not None,
        BLOCK_V=block_v,
        num_warps=num_warps,
        **_sizes(state),
        **overlap(qkv, pdl=pdl),
    )


def _chunks(
    qkv: Tensor,
    strength: Tensor,
    decay: Tensor,
    gates: DeltaGates,
    state: Tensor,
    plan: DeviceStatePlan,
    rows: Tensor,
    tiles: Tensor,
    out: Tensor,
) -> None:
    _, num_key_heads, _, key_dim, value_dim = state.shape
    (num_tokens, num_heads, _), num_tiles = out.shape, len(tiles)

    def scratch(*shape: int, dtype: torch.dtype = qkv.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=qkv.device)

    keys = scratch(num_tokens, num_key_heads, key_dim)
    w = scratch(num_tokens, num_heads, key_dim)
    u = scratch(num_tokens, num_heads, value_dim)
    sums = scratch(num_tokens, num_heads, dtype=torch.float32)
    before = scratch(num_tiles, num_heads, key_dim, value_dim)
    form = _form(qkv.dtype, min(key_dim, value_dim))
    common: dict[str, Any] = {"TILE": TILE_TOKENS, "FORM": form, **_sizes(state)}
    whole_v = max(16, triton.next_power_of_2(value_dim))
    _delta_tiles[(num_heads, num_tiles)](
        qkv,
        strength,
        decay,
        gates.rate,
        gates.bias,
        tiles,
        keys,
        w,
        u,
        sums,
        qkv.stride(0),
        strength.stride(0),
        decay.stride(0),
        BLOCK_V=whole_v,
        num_warps=4,
        **common,
    )
    block_v = min(whole_v, 32)
    _delta_states[(triton.cdiv(value_dim, block_v), num_heads, len(rows))](
        keys,
        w,
        u,
        sums,
        rows,
        tiles,
        state,
        before,
        state.stride(0),
        state.stride(1),
        HAS_KEPT=plan.has_kept,
        BLOCK_V=block_v,
        num_warps=4,
        # Wide heads leave no room for tiles that come ahead.
        num_stages=3 if key_dim <= 128 else 1,
        **common,
    )
    block_v = min(whole_v, 128 if key_dim <= 128 else 64)
    _delta_out[(triton.cdiv(value_dim, block_v), num_heads, num_tiles)](
        qkv,
        keys,
        u,
        sums,
        tiles,
        before,
        out,
        qkv.stride(0),
        BLOCK_V=block_v,
        num_warps=4,
        **common,
    )


@triton.jit
def _log_decay(x, rate):
    """rate · −softplus(x)"""
    return -rate * (tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x))))


@triton.jit
def _unit(x):
    """Rows of [N, D], of length one."""
    return x * tl.rsqrt(tl.sum(x * x, 1) + _EPS)[:, None]


@triton.jit
def _product(a, b, dtype: tl.constexpr, FORM: tl.constexpr):
    """a · b, added up in float32; of operands in 16 bits, or with a precision of float32's."""
    if FORM == "16 bits":
        return tl.dot(a.to(dtype), b.to(dtype))
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=FORM)


@triton.jit
def _delta_step(
    qkv,
    strength,
    decay,
    rates,
    biases,
    state,
    slots,
    positions,
    num_standing,
    out,
    qkv_stride,
    strength_stride,
    decay_stride,
    slot_stride,
    head_stride,
    WIDTH: tl.constexpr,
    SETTLES: tl.constexpr,
    LEAVES_PADDING: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    EACH: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
):
    row, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    if SETTLES:
        count = tl.load(num_standing + row)
        if count <= 1:
            return
    row *= WIDTH
    key_head = head // EACH
    k_at, v_at = tl.arange(0, BLOCK_K), tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    is_key, is_value = k_at < KEY_DIM, v_at < VALUE_DIM
    inside = is_key[:, None] & is_value[None, :]
    # None of this was written by the kernel before.
    slot = tl.load(slots + row)
    continues = slot >= 0
    if not SETTLES:
        continues = continues & (tl.load(positions + row) > 0)
    own = state + slot * slot_stride + key_head * head_stride
    own += (head % EACH) * KEY_DIM * VALUE_DIM + k_at[:, None] * VALUE_DIM + v_at[None, :]
    s = tl.load(own, mask=inside & continues, other=0.0)
    rate, bias = tl.load(rates + head), tl.load(biases + head)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if LEAVES_PADDING:
        if slot < 0:
            return
    if SETTLES:
        for j in range(1, count):
            s, _ = _through(
                s, qkv, strength, decay, rate, bias, row + j, head, key_head, k_at, v_at, is_key,
                is_value, qkv_stride, strength_stride, decay_stride, KEY_HEADS, KEY_DIM, VALUE_DIM,
            )  # fmt: skip
        tl.store(own, s, mask=inside & continues)
    else:
        s, y = _through(
            s, qkv, strength, decay, rate, bias, row, head, key_head, k_at, v_at, is_key,
            is_value, qkv_stride, strength_stride, decay_stride, KEY_HEADS, KEY_DIM, VALUE_DIM,
        )  # fmt: skip
        y = y.to(out.dtype.element_ty)
        tl.store(out + (row * KEY_HEADS * EACH + head) * VALUE_DIM + v_at, y, mask=is_value)
        tl.store(own, s, mask=inside & (slot >= 0))
        if WIDTH > 1:
            for j in range(1, WIDTH):
                s, of_guess = _through(
                    s, qkv, strength, decay, rate, bias, row + j, head, key_head, k_at, v_at,
                    is_key, is_value, qkv_stride, strength_stride, decay_stride, KEY_HEADS,
                    KEY_DIM, VALUE_DIM,
                )  # fmt: skip
                own_out = out + ((row + j) * KEY_HEADS * EACH + head) * VALUE_DIM
                tl.store(own_out + v_at, of_guess.to(out.dtype.element_ty), mask=is_value)


@triton.jit
def _through(
    s,
    qkv,
    strength,
    decay,
    rate,
    bias,
    token,
    head,
    key_head,
    k_at,
    v_at,
    is_key,
    is_value,
    qkv_stride,
    strength_stride,
    decay_stride,
    KEY_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
):
    """Takes a state through a token → the state, and what comes out."""
    x = qkv + token * qkv_stride
    q = tl.load(x + key_head * KEY_DIM + k_at, mask=is_key, other=0.0).to(tl.float32)
    x += KEY_HEADS * KEY_DIM
    k = tl.load(x + key_head * KEY_DIM + k_at, mask=is_key, other=0.0).to(tl.float32)
    x += KEY_HEADS * KEY_DIM
    v = tl.load(x + head * VALUE_DIM + v_at, mask=is_value, other=0.0).to(tl.float32)
    q = q * (tl.rsqrt(tl.sum(q * q, 0) + _EPS) * (KEY_DIM**-0.5))
    k = k * tl.rsqrt(tl.sum(k * k, 0) + _EPS)
    beta = tl.load(strength + token * strength_stride + head).to(tl.float32)
    beta = 1.0 / (1.0 + tl.exp(-beta))
    forgets = tl.load(decay + token * decay_stride + head).to(tl.float32) + bias
    s = s * tl.exp(_log_decay(forgets, rate))
    change = (v - tl.sum(s * k[:, None], 0)) * beta
    s += k[:, None] * change[None, :]
    return s, tl.sum(s * q[:, None], 0)


@triton.jit
def _delta_tiles(
    qkv,
    strength,
    decay,
    rates,
    biases,
    tiles,
    keys,
    w,
    u,
    sums,
    qkv_stride,
    strength_stride,
    decay_stride,
    TILE: tl.constexpr,
    FORM: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    EACH: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """What needs no state. Tokens that a tile lacks have no strength and forget nothing."""
    head, tile = tl.program_id(0), tiles + tl.program_id(1) * 4
    count = tl.load(tile + 1)
    if count == 0:
        return
    key_head = head // EACH
    t = tl.arange(0, TILE)
    real = t < count
    token = tl.load(tile).to(tl.int64) + t
    k_at, v_at = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    is_key = real[:, None] & (k_at < KEY_DIM)[None, :]
    is_value = real[:, None] & (v_at < VALUE_DIM)[None, :]
    dtype = w.dtype.element_ty

    forgets = tl.load(decay + token * decay_stride + head, mask=real, other=0.0).to(tl.float32)
    log = _log_decay(forgets + tl.load(biases + head), tl.load(rates + head))
    total = tl.cumsum(tl.where(real, log, 0.0), 0)
    tl.store(sums + token * (KEY_HEADS * EACH) + head, total, mask=real)
    beta = tl.load(strength + token * strength_stride + head, mask=real, other=0.0).to(tl.float32)
    beta = tl.where(real, 1.0 / (1.0 + tl.exp(-beta)), 0.0)

    x = qkv + token[:, None] * qkv_stride + (KEY_HEADS + key_head) * KEY_DIM + k_at[None, :]
    k = _unit(tl.load(x, mask=is_key, other=0.0).to(tl.float32))
    k16 = k.to(dtype)
    if head % EACH == 0:
        at = (token * KEY_HEADS + key_head)[:, None] * KEY_DIM + k_at[None, :]
        tl.store(keys + at, k16, mask=is_key)
    earlier = t[:, None] > t[None, :]
    between = tl.exp(tl.where(earlier, total[:, None] - total[None, :], 0.0))
    a = tl.where(earlier, _product(k16, tl.trans(k16), dtype, FORM) * between * beta[:, None], 0.0)
    x = _inverse(a, t, TILE, FORM)

    w_tile = _product(x, k * (beta * tl.exp(total))[:, None], dtype, FORM)
    at = (token * (KEY_HEADS * EACH) + head)[:, None]
    tl.store(w + at * KEY_DIM + k_at[None, :], w_tile.to(dtype), mask=is_key)
    v = qkv + token[:, None] * qkv_stride + 2 * KEY_HEADS * KEY_DIM + head * VALUE_DIM
    v = tl.load(v + v_at[None, :], mask=is_value, other=0.0).to(tl.float32)
    u_tile = _product(x, v * beta[:, None], dtype, FORM)
    tl.store(u + at * VALUE_DIM + v_at[None, :], u_tile.to(dtype), mask=is_value)


@triton.jit
def _inverse(a, t, TILE: tl.constexpr, FORM: tl.constexpr):
    """(I + a)⁻¹ of a [TILE, TILE] below the diagonal, by substitution of ever larger blocks: of

        [ P 0 ]                    [ P⁻¹             0   ]
        [ L Q ]  the inverse is    [ −Q⁻¹ L P⁻¹      Q⁻¹ ],

    and with X the inverse of the blocks P and Q alone, X − X L X. No powers of `a`, which grow
    where keys repeat.
    """
    row, column = t[:, None], t[None, :]
    x = tl.where(row == column, 1.0, tl.where(row // 2 == column // 2, -a, 0.0))
    tl.static_assert(TILE == 64)
    x = _merged(x, a, row, column, 2, FORM)
    x = _merged(x, a, row, column, 4, FORM)
    x = _merged(x, a, row, column, 8, FORM)
    x = _merged(x, a, row, column, 16, FORM)
    return _merged(x, a, row, column, 32, FORM)


@triton.jit
def _merged(x, a, row, column, SIZE: tl.constexpr, FORM: tl.constexpr):
    """From the inverse of blocks of that size to that of blocks of twice the size."""
    is_pair = (row // (2 * SIZE) == column // (2 * SIZE)) & (row // SIZE > column // SIZE)
    lower = tl.where(is_pair, a, 0.0)
    precision: tl.constexpr = "tf32x3" if FORM == "tf32x3" else "tf32"
    lower = tl.dot(x, lower, input_precision=precision)
    return x - tl.dot(lower, x, input_precision=precision)


@triton.jit
def _delta_states(
    keys,
    w,
    u,
    sums,
    rows,
    tiles,
    state,
    before,
    slot_stride,
    head_stride,
    TILE: tl.constexpr,
    FORM: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    EACH: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Goes through a row: leaves the state before each tile in `before`, what it is told anew in
    `u`, and the state behind the row in its slot."""
    head, row = tl.program_id(1), rows + tl.program_id(2) * 8
    key_head = head // EACH
    first, end = tl.load(row), tl.load(row) + tl.load(row + 1)
    slot, begins = tl.load(row + 2).to(tl.int64), tl.load(row + 3)
    first_tile, num_tiles = tl.load(row + 4), tl.load(row + 5)
    t, k_at = tl.arange(0, TILE), tl.arange(0, BLOCK_K)
    v_at = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (k_at < KEY_DIM)[:, None] & (v_at < VALUE_DIM)[None, :]
    in_head = k_at[:, None] * VALUE_DIM + v_at[None, :]
    own = state + key_head * head_stride + (head % EACH) * KEY_DIM * VALUE_DIM + in_head
    s = tl.load(own + slot * slot_stride, mask=inside & (begins == 0), other=0.0)
    dtype = w.dtype.element_ty
    for index in range(num_tiles):
        number = first_tile + index
        count = tl.minimum(end - first, TILE)
        if HAS_KEPT:
            count = tl.load(tiles + number * 4 + 1)
        at_tile = before + (number.to(tl.int64) * (KEY_HEADS * EACH) + head) * KEY_DIM * VALUE_DIM
        tl.store(at_tile + in_head, s.to(dtype), mask=inside)
        real, token = t < count, first.to(tl.int64) + t
        at = (token * (KEY_HEADS * EACH) + head)[:, None]
        is_key = real[:, None] & (k_at < KEY_DIM)[None, :]
        is_value = real[:, None] & (v_at < VALUE_DIM)[None, :]
        w_tile = tl.load(w + at * KEY_DIM + k_at[None, :], mask=is_key, other=0.0)
        u_at = u + at * VALUE_DIM + v_at[None, :]
        told = tl.load(u_at, mask=is_value, other=0.0).to(tl.float32)
        told -= _product(w_tile, s, dtype, FORM)
        tl.store(u_at, told.to(dtype), mask=is_value)
        k_of = keys + (token * KEY_HEADS + key_head)[:, None] * KEY_DIM + k_at[None, :]
        k = tl.load(k_of, mask=is_key, other=0.0)
        total = tl.load(sums + token * (KEY_HEADS * EACH) + head, mask=real, other=0.0)
        last = tl.load(sums + (first + count - 1).to(tl.int64) * (KEY_HEADS * EACH) + head)
        left = tl.where(real, tl.exp(last - total), 0.0)
        s = s * tl.exp(last) + _product(tl.trans(k), told * left[:, None], dtype, FORM)
        if HAS_KEPT:
            to = tl.load(tiles + number * 4 + 3).to(tl.int64)
            tl.store(own + to * slot_stride, s, mask=inside & (to >= 0))
        first += count
    tl.store(own + slot * slot_stride, s, mask=inside & (slot >= 0))


@triton.jit
def _delta_out(
    qkv,
    keys,
    u,
    sums,
    tiles,
    before,
    out,
    qkv_stride,
    TILE: tl.constexpr,
    FORM: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    EACH: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    head, number = tl.program_id(1), tl.program_id(2)
    count = tl.load(tiles + number * 4 + 1)
    if count == 0:
        return
    key_head = head // EACH
    t, k_at = tl.arange(0, TILE), tl.arange(0, BLOCK_K)
    v_at = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    real = t < count
    token = tl.load(tiles + number * 4).to(tl.int64) + t
    is_key = real[:, None] & (k_at < KEY_DIM)[None, :]
    is_value = real[:, None] & (v_at < VALUE_DIM)[None, :]
    dtype = u.dtype.element_ty
    q = qkv + token[:, None] * qkv_stride + key_head * KEY_DIM + k_at[None, :]
    q = _unit(tl.load(q, mask=is_key, other=0.0).to(tl.float32)) * (KEY_DIM**-0.5)
    at = (token * (KEY_HEADS * EACH) + head)[:, None]
    k = keys + (token * KEY_HEADS + key_head)[:, None] * KEY_DIM + k_at[None, :]
    k = tl.load(k, mask=is_key, other=0.0)
    told = tl.load(u + at * VALUE_DIM + v_at[None, :], mask=is_value, other=0.0)
    s = before + (number.to(tl.int64) * (KEY_HEADS * EACH) + head) * KEY_DIM * VALUE_DIM
    inside = (k_at < KEY_DIM)[:, None] & (v_at < VALUE_DIM)[None, :]
    s = tl.load(s + k_at[:, None] * VALUE_DIM + v_at[None, :], mask=inside, other=0.0)
    total = tl.load(sums + token * (KEY_HEADS * EACH) + head, mask=real, other=0.0)
    y = _product(q, s, dtype, FORM) * tl.exp(total)[:, None]
    seen = (t[:, None] >= t[None, :]) & real[:, None]
    between = tl.exp(tl.where(seen, total[:, None] - total[None, :], 0.0))
    scores = tl.where(seen, _product(q, tl.trans(k), dtype, FORM) * between, 0.0)
    y += _product(scores, told, dtype, FORM)
    tl.store(out + at * VALUE_DIM + v_at[None, :], y.to(out.dtype.element_ty), mask=is_value)
