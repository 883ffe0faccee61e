"""One token of each of many sequences through Mamba2's recurrence: the states of the rows' slots
are read and written once, and each row is computed whole: step size, decay, what comes in, what is
read, and the skip. It goes on through guesses behind the token; what is written is the state before
them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.overlap import overlap
from baton.kernels.reference_ssd import SsdWeights

_LINEAR_FROM = tl.constexpr(20.0)


@triton.jit
def step_size(dt, bias, scale, low, high):
    """clamp(softplus(scale · dt + bias)), of float32."""
    x = dt * scale + bias
    grown = tl.exp(tl.minimum(x, _LINEAR_FROM))
    whole = 1.0 + grown
    # log(1 + grown): what rounding took from the sum is made up for by the quotient.
    lost = whole - 1.0
    log1p = tl.where(lost > 0, tl.log(whole) * (grown / tl.where(lost > 0, lost, 1.0)), grown)
    soft = tl.where(x > _LINEAR_FROM, x, log1p)
    return tl.minimum(tl.maximum(soft, low), high)


@triton.jit
def decay_of(exponent):
    """exp of numbers below zero, near one to the last bit: what is off there by less than a bit,
    always to the same side, adds up over thousands of tokens."""
    x = tl.maximum(exponent, -0.25)
    near = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6)))))
    return tl.where(exponent > -0.25, 1.0 + near, tl.exp(exponent))


@triton.jit
def _ssd_step_kernel(
    x_ptr,
    dt_ptr,
    a_ptr,
    d_ptr,
    bias_ptr,
    states_ptr,
    slots_ptr,
    positions_ptr,
    num_standing_ptr,
    y_ptr,
    x_stride,
    dt_stride,
    slot_stride,
    head_stride,
    num_heads,
    heads_each,
    head_dim,
    state_size,
    dt_scale,
    dt_min,
    dt_max,
    WIDTH: tl.constexpr,
    SETTLES: tl.constexpr,
    LEAVES_PADDING: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_P rows of one head's state, of one sequence."""
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    if SETTLES:
        count = tl.load(num_standing_ptr + row)
        if count <= 1:
            return
    row *= WIDTH
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    in_p, in_n = p < head_dim, n < state_size
    inside = in_p[:, None] & in_n[None, :]
    # Weights, slots and states were there before the kernel that gives x began.
    a, d = tl.load(a_ptr + head), tl.load(d_ptr + head)
    bias = tl.load(bias_ptr + head)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    is_used = slot >= 0
    begins = False
    if not SETTLES:
        begins = tl.load(positions_ptr + row) == 0
    own = states_ptr + slot * slot_stride + head.to(tl.int64) * head_stride
    own += p[:, None] * state_size + n[None, :]
    state = tl.load(own, mask=inside & is_used & (begins == 0), other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if LEAVES_PADDING:
        if is_used == 0:
            return
    inner = num_heads * head_dim
    if SETTLES:
        for j in range(1, count):
            state, _, _ = _through(
                state, x_ptr, dt_ptr, a, bias, row + j, head, p, n, in_p, in_n, x_stride,
                dt_stride, num_heads, heads_each, head_dim, state_size, dt_scale, dt_min, dt_max,
            )  # fmt: skip
            # As a slot has it.
            state = state.to(states_ptr.dtype.element_ty).to(tl.float32)
        tl.store(own, state.to(states_ptr.dtype.element_ty), mask=inside & is_used)
    else:
        state, x, c = _through(
            state, x_ptr, dt_ptr, a, bias, row, head, p, n, in_p, in_n, x_stride,
            dt_stride, num_heads, heads_each, head_dim, state_size, dt_scale, dt_min, dt_max,
        )  # fmt: skip
        tl.store(own, state.to(states_ptr.dtype.element_ty), mask=inside & is_used)
        y = tl.where(is_used, tl.sum(state * c[None, :], axis=1) + d * x, 0.0)
        y_row = y_ptr + row * inner + head * head_dim + p
        tl.store(y_row, y.to(y_ptr.dtype.element_ty), mask=in_p)
        if WIDTH > 1:
            for j in range(1, WIDTH):
                state = state.to(states_ptr.dtype.element_ty).to(tl.float32)
                state, x, c = _through(
                    state, x_ptr, dt_ptr, a, bias, row + j, head, p, n, in_p, in_n, x_stride,
                    dt_stride, num_heads, heads_each, head_dim, state_size, dt_scale, dt_min,
                    dt_max,
                )  # fmt: skip
                is_real = tl.load(slots_ptr + row + j) >= 0
                y = tl.where(is_real, tl.sum(state * c[None, :], axis=1) + d * x, 0.0)
                tl.store(y_row + j * inner, y.to(y_ptr.dtype.element_ty), mask=in_p)


@triton.jit
def _through(
    state,
    x_ptr,
    dt_ptr,
    a,
    bias,
    token,
    head,
    p,
    n,
    in_p,
    in_n,
    x_stride,
    dt_stride,
    num_heads,
    heads_each,
    head_dim,
    state_size,
    dt_scale,
    dt_min,
    dt_max,
):
    """Takes a state through a token → the state, the token's x and c."""
    x_row = x_ptr + token * x_stride
    b_row = x_row + num_heads * head_dim + (head // heads_each) * state_size + n
    x = tl.load(x_row + head * head_dim + p, mask=in_p, other=0.0).to(tl.float32)
    b = tl.load(b_row, mask=in_n, other=0.0).to(tl.float32)
    c_row = b_row + (num_heads // heads_each) * state_size
    c = tl.load(c_row, mask=in_n, other=0.0).to(tl.float32)
    step = step_size(
        tl.load(dt_ptr + token * dt_stride + head).to(tl.float32), bias, dt_scale, dt_min, dt_max
    )
    return state * decay_of(step * a) + (step * x)[:, None] * b[None, :], x, c


def ssd_step(
    x: Tensor,
    dt: Tensor,
    weights: SsdWeights,
    states: Tensor,
    slots: Tensor,
    positions: Tensor,
    out: Tensor | None,
    *,
    width: int = 1,
    num_standing: Tensor | None = None,
    leaves_padding: bool = False,
    pdl: bool = False,
) -> None:
    """`reference_ssd.ssd` of rows of one token, or of `width`, of which all but the first are
    guesses.

    Args:
        x: [B · width, H · head_dim + 2 · groups · state_size]; rows may be strided.
        dt: [B · width, H]; rows may be strided.
        states: [slots, H, head_dim, state_size], of one layer; a head's numbers contiguous.
        slots: int [≥ B · width], where each token's row has its state, each row another slot; −1:
            no token, and zeros come out.
        positions: int [≥ B · width]; where a row's first is 0 a sequence begins, with a state of
            zeros.
        out: [B · width, H, head_dim], contiguous; None with `num_standing`.
        num_standing: int32 [B], as of `DeviceStatePlan`: nothing but that is done.
        leaves_padding: nothing comes out for rows without a slot: their places are others'.
        pdl: launch while the previous kernel still runs. That one must not have written states,
            slots or positions.
    """
    _, num_heads, head_dim, state_size = states.shape
    num_rows, groups = len(x) // width, weights.num_groups
    assert x.shape[1] == num_heads * head_dim + 2 * groups * state_size and x.stride(1) == 1
    assert dt.shape == (len(x), num_heads) and dt.stride(1) == 1
    assert states.stride()[2:] == (state_size, 1) and num_heads % groups == 0
    assert (out is None) == (num_standing is not None)
    if out is not None:
        assert out.shape == (len(x), num_heads, head_dim) and out.is_contiguous()
    if num_rows == 0:
        return
    block_n = triton.next_power_of_2(state_size)
    block_p = min(triton.next_power_of_2(head_dim), _rows_of_a_program(num_rows * num_heads))
    block_p = max(1, min(block_p, 8192 // block_n))
    _ssd_step_kernel[(triton.cdiv(head_dim, block_p), num_heads, num_rows)](
        x,
        dt,
        weights.a,
        weights.d,
        weights.dt_bias,
        states,
        slots,
        positions,
        num_standing,
        out,
        x.stride(0),
        dt.stride(0),
        states.stride(0),
        states.stride(1),
        num_heads,
        num_heads // groups,
        head_dim,
        state_size,
        weights.dt_scale,
        weights.dt_min,
        weights.dt_max,
        WIDTH=width,
        SETTLES=out is None,
        LEAVES_PADDING=leaves_padding,
        BLOCK_P=block_p,
        BLOCK_N=block_n,
        num_warps=4 if block_p * block_n >= 2048 else 2,
        **overlap(x, pdl=pdl),
    )


def _rows_of_a_program(num_states: int) -> int:
    """Few states must occupy many processors; of many, each program has enough to load at once."""
    return 16 if num_states <= 512 else 32
