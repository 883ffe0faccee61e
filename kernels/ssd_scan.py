"""Rows of many tokens through Mamba2's recurrence, as products of matrices.

A program takes one head, or some rows of its state, through one row of the step, tile by tile; the
state stays in its registers, in float32. What tokens of a tile give each other is a
product of c with b, weighted by how much decays in between; what comes from before the tile is a
product of c with the state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.reference_ssd import SsdWeights
from baton.kernels.ssd_step import decay_of, ssd_step, step_size
from baton.kernels.state_plan import TILE_TOKENS, DeviceStatePlan


@dataclass(frozen=True, slots=True)
class ScanConfig:
    block_p: int
    """Rows of a head's state that a program has."""
    num_warps: int = 4
    num_stages: int = 2


def scan_config(head_dim: int, state_size: int) -> ScanConfig:
    """What an H200 was fastest with, as far as a state fits into registers."""
    block_p = triton.next_power_of_2(head_dim)
    return ScanConfig(max(16, min(block_p, 64 if state_size <= 128 else 32)))


@triton.jit
def _ssd_scan_kernel(
    x_ptr,
    dt_ptr,
    a_ptr,
    d_ptr,
    bias_ptr,
    states_ptr,
    rows_ptr,
    tiles_ptr,
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
    HAS_KEPT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_P rows of one head's state, through one row of the step."""
    head = tl.program_id(1)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    n, t = tl.arange(0, BLOCK_N), tl.arange(0, CHUNK)
    in_p, in_n = p < head_dim, n < state_size
    inside = in_p[:, None] & in_n[None, :]
    a, d = tl.load(a_ptr + head), tl.load(d_ptr + head)
    bias = tl.load(bias_ptr + head)
    row = rows_ptr + tl.program_id(2) * 8
    slot = tl.load(row + 2).to(tl.int64)
    continues = (slot >= 0) & (tl.load(row + 3) == 0)
    tile = tiles_ptr + tl.load(row + 4) * 4
    inner = num_heads * head_dim
    of_head = states_ptr + head.to(tl.int64) * head_stride
    of_head += p[:, None] * state_size + n[None, :]
    own = of_head + slot * slot_stride
    state = tl.load(own, mask=inside & continues, other=0.0).to(tl.float32)
    dtype = x_ptr.dtype.element_ty
    b_column = inner + (head // heads_each) * state_size
    c_column = b_column + (num_heads // heads_each) * state_size
    for _ in range(tl.load(row + 5)):
        token = (tl.load(tile) + t).to(tl.int64)
        is_token = t < tl.load(tile + 1)
        dt = tl.load(dt_ptr + token * dt_stride + head, mask=is_token, other=0.0).to(tl.float32)
        step = tl.where(is_token, step_size(dt, bias, dt_scale, dt_min, dt_max), 0.0)
        exponent = step * a
        upto = tl.cumsum(exponent, axis=0)
        behind = tl.cumsum(exponent, axis=0, reverse=True) - exponent
        x_rows = x_ptr + token[:, None] * x_stride
        is_x, is_n = is_token[:, None] & in_p[None, :], is_token[:, None] & in_n[None, :]
        x = tl.load(x_rows + head * head_dim + p[None, :], mask=is_x, other=0.0)
        b = tl.load(x_rows + b_column + n[None, :], mask=is_n, other=0.0)
        c = tl.load(x_rows + c_column + n[None, :], mask=is_n, other=0.0)
        scores = tl.dot(c, tl.trans(b), input_precision=PRECISION)
        if PRECISION == "tf32x3":
            # A difference of long sums would round more than the rest does.
            later = tl.where(t[:, None] > t[None, :], exponent[:, None], 0.0)
            between = tl.cumsum(later, axis=0)
        else:
            between = upto[:, None] - upto[None, :]
        # A later token's share would overflow before it is left out.
        between = tl.where(t[:, None] >= t[None, :], between, -float("inf"))
        scores *= tl.exp(between) * step[None, :]
        y = tl.dot(c, tl.trans(state.to(dtype)), input_precision=PRECISION)
        y *= tl.exp(upto)[:, None]
        y += tl.dot(scores.to(dtype), x, input_precision=PRECISION)
        y += d * x.to(tl.float32)
        y_rows = y_ptr + token[:, None] * inner + head * head_dim + p[None, :]
        tl.store(y_rows, y.to(y_ptr.dtype.element_ty), mask=is_x)
        left = tl.exp(behind) * step
        added = tl.dot(tl.trans((x * left[:, None]).to(dtype)), b, input_precision=PRECISION)
        state = state * decay_of(tl.sum(exponent, axis=0)) + added
        if HAS_KEPT:
            kept_in = tl.load(tile + 3).to(tl.int64)
            kept = state.to(states_ptr.dtype.element_ty)
            tl.store(of_head + kept_in * slot_stride, kept, mask=inside & (kept_in >= 0))
        tile += 4
    tl.store(own, state.to(states_ptr.dtype.element_ty), mask=inside & (slot >= 0))


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    weights: SsdWeights,
    states: Tensor,
    rows: Tensor,
    tiles: Tensor,
    out: Tensor,
    *,
    has_kept: bool = False,
    config: ScanConfig | None = None,
) -> None:
    """`reference_ssd.ssd` of rows of any number of tokens; tokens of no row are left as they are.

    Args:
        x: [T, H · head_dim + 2 · groups · state_size]; rows may be strided.
        dt: [T, H]; rows may be strided.
        states: [slots, H, head_dim, state_size], of one layer; a head's numbers contiguous.
        rows, tiles, has_kept: as `DeviceStatePlan` has them.
        out: [T, H, head_dim], contiguous, of x's dtype.
    """
    _, num_heads, head_dim, state_size = states.shape
    num_rows, groups = len(rows), weights.num_groups
    assert x.shape[1] == num_heads * head_dim + 2 * groups * state_size and x.stride(1) == 1
    assert dt.shape == (len(x), num_heads) and dt.stride(1) == 1
    assert states.stride()[2:] == (state_size, 1) and num_heads % groups == 0
    assert out.is_contiguous() and out.dtype == x.dtype
    if num_rows == 0:
        return
    config = config or scan_config(head_dim, state_size)
    _ssd_scan_kernel[(triton.cdiv(head_dim, config.block_p), num_heads, num_rows)](
        x,
        dt,
        weights.a,
        weights.d,
        weights.dt_bias,
        states,
        rows,
        tiles,
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
        HAS_KEPT=has_kept,
        CHUNK=TILE_TOKENS,
        BLOCK_P=config.block_p,
        BLOCK_N=max(16, triton.next_power_of_2(state_size)),
        PRECISION="tf32x3" if x.dtype == torch.float32 else "tf32",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def ssd(
    x: Tensor,
    dt: Tensor,
    weights: SsdWeights,
    state: Tensor,
    layer: int,
    plan: DeviceStatePlan,
    *,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """See kernels/reference_ssd.py.

    Args:
        out: [T, H, head_dim], contiguous.
        pdl: launched to overlap the end of the kernel before.

    Returns:
        out, or a new tensor; zeros in padding at the end of the step.
    """
    states = state[:, :, layer]
    if out is None:
        out = torch.empty((len(x), *states.shape[1:3]), dtype=x.dtype, device=x.device)
    if plan.num_padding:
        out[-plan.num_padding :].zero_()
    single = plan.num_singles
    if single:
        ssd_step(
            x[:single],
            dt[:single],
            weights,
            states,
            plan.slots,
            plan.positions,
            out[:single],
            pdl=pdl,
        )
    if plan.rows is not None and plan.tiles is not None:
        ssd_scan(x, dt, weights, states, plan.rows, plan.tiles, out, has_kept=plan.has_kept)
    return out
