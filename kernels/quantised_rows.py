"""Activations made small: a scale for each row, or for each 128 numbers of one, and codes.

    number ≈ code · scale        scale = largest number / largest code

What makes the numbers, a norm or a gated activation, is part of it. A row's codes are made of that
row alone: neighbours change nothing. Codes hold no NaN and no infinity: of numbers that are not all
finite the scale is NaN, and so is what is made of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.float8_jit import magnitude_bits
from baton.kernels.gated_mul import activate
from baton.kernels.overlap import overlap
from baton.kernels.reference import Activation
from baton.kernels.reference_scaled import GROUP, InputScheme, QuantisedRows

_LEAST_BITS = tl.constexpr(0x0DA24260)
"""1e-30, of a row's largest number: what is less is nothing."""
_ROUNDS = tl.constexpr(12582912.0)
"""1.5 · 2²³: added and taken away it leaves the nearest whole number."""

MOST_COLUMNS = 65536
"""Of a row that a program makes small."""
_LIBRARYS_ROWS = 16
"""With groups the library takes multiples of it only."""
_KNOWN_BLOCK = 2048
_ROUNDS_TINY = tl.constexpr(24576.0)
"""The same of steps of 2⁻⁹."""
_SILU = tl.constexpr(
    """{
    .reg .f32 t;
    mul.ftz.f32 t, $1, 0fBFB8AA3B;
    ex2.approx.ftz.f32 t, t;
    add.ftz.f32 t, t, 0f3F800000;
    rcp.approx.ftz.f32 t, t;
    mul.ftz.f32 $0, $1, t;
    }"""
)
"""x / (1 + 2^(−x · log₂ e))."""


@triton.jit
def largest_of(bits):
    """The largest of some numbers, from that of their `magnitude_bits`; NaN: not all are finite.
    The processor's own maximum leaves NaN out."""
    largest = tl.maximum(bits, _LEAST_BITS).to(tl.float32, bitcast=True)
    return tl.where(bits >= 0x7F800000, float("nan"), largest)


@triton.jit
def to_code(x, MOST: tl.constexpr, IS_FLOAT: tl.constexpr, CASTS: tl.constexpr):
    """The nearest code, as float32, of float32 numbers that are scaled already. CASTS: by the
    processor's own conversion; Triton's interpreter loses a carry into the exponent."""
    x = tl.minimum(tl.maximum(x, -MOST), MOST)
    if not CASTS:
        # The interpreter's minimum keeps NaN, too; a processor's does not.
        x = tl.where(x == x, x, 0.0)
    if not IS_FLOAT:
        return (x + _ROUNDS) - _ROUNDS
    elif CASTS:
        return x.to(tl.float8e4nv).to(tl.float32)
    else:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
        tiny = (x + _ROUNDS_TINY) - _ROUNDS_TINY
        return tl.where(tl.abs(x) < 0.015625, tiny, bits.to(tl.float32, bitcast=True))


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr, CASTS: tl.constexpr):
    """`activate`, in half as many instructions, of which there are too many beside what a row's
    bytes take. Numbers too small to be normal ones become zero."""
    if CASTS and ACTIVATION == "silu":
        return tl.inline_asm_elementwise(_SILU, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return activate(x, ACTIVATION)


@triton.jit
def _store_codes(out, x, inside, MOST: tl.constexpr, IS_FLOAT: tl.constexpr, CASTS: tl.constexpr):
    """The nearest codes of float32 numbers that are scaled already."""
    if IS_FLOAT and CASTS:
        tl.store(out, tl.minimum(tl.maximum(x, -MOST), MOST).to(tl.float8e4nv), mask=inside)
    elif IS_FLOAT:
        tl.store(out, to_code(x, MOST, IS_FLOAT, CASTS).to(tl.float8e4nv), mask=inside)
    else:
        tl.store(out, to_code(x, MOST, IS_FLOAT, CASTS).to(tl.int8), mask=inside)


@triton.jit(do_not_specialize=["scale_stride"])
def _quantise_kernel(
    x_ptr,
    norm_ptr,
    given_ptr,
    codes_ptr,
    scale_ptr,
    x_stride,
    scale_stride,
    size,
    eps,
    ACTIVATION: tl.constexpr,
    GROUP: tl.constexpr,
    MOST: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    CASTS: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    """A row. `given_ptr`: its scale, if it does not depend on what the row holds."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    if norm_ptr is not None:
        gain = tl.load(norm_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        if IS_EARLY:
            gdc_launch_dependents()
        gdc_wait()
        if not IS_EARLY:
            gdc_launch_dependents()
    x_row = x_ptr + row * x_stride + columns
    x = tl.load(x_row, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION is not None:
        up = tl.load(x_row + size, mask=inside, other=0.0).to(tl.float32)
        x = _activate(x, ACTIVATION, CASTS) * up
    if norm_ptr is not None:
        x *= tl.rsqrt(tl.sum(x * x, axis=0) / size + eps) * gain
    if GROUP:
        runs = tl.reshape(x, (BLOCK // GROUP, GROUP))
        largest = largest_of(tl.max(magnitude_bits(runs), axis=1))
        scale = largest / MOST
        x = tl.reshape(runs * (MOST / largest)[:, None], (BLOCK,))
        group = tl.arange(0, BLOCK // GROUP)
        at = scale_ptr + group.to(tl.int64) * scale_stride + row
        tl.store(at, scale, mask=group < size // GROUP)
    else:
        scale, inverse = _scale_of(tl.max(magnitude_bits(x), axis=0), given_ptr, MOST)
        x *= inverse
        tl.store(scale_ptr + row, scale)
    _store_codes(codes_ptr + row * size + columns, x, inside, MOST, IS_FLOAT, CASTS)


@triton.jit
def _scale_of(bits, given_ptr, MOST: tl.constexpr):
    """Of a row, from the largest of its `magnitude_bits`; and what makes codes of its numbers."""
    largest = largest_of(bits)
    if given_ptr is not None:
        given = tl.load(given_ptr)
        return tl.where(largest == largest, given, largest), 1.0 / given
    else:
        return largest / MOST, MOST / largest


@triton.jit(do_not_specialize=["num_parts"])
def _quantise_known_kernel(
    x_ptr,
    maxima_ptr,
    given_ptr,
    codes_ptr,
    scale_ptr,
    num_parts,
    size,
    MOST: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    CASTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK numbers of a row."""
    row = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    part = tl.arange(0, PARTS)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    bits = tl.load(maxima_ptr + row * num_parts + part, mask=part < num_parts, other=0)
    x = tl.load(x_ptr + row * size + columns, mask=inside, other=0.0).to(tl.float32)
    scale, inverse = _scale_of(tl.max(bits, axis=0), given_ptr, MOST)
    if tl.program_id(0) == 0:
        tl.store(scale_ptr + row, scale)
    out = codes_ptr + row * size + columns
    _store_codes(out, x * inverse, inside, MOST, IS_FLOAT, CASTS)


def quantise_rows(
    x: Tensor,
    scheme: InputScheme,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    activation: Activation | None = None,
    pdl: bool = False,
    is_early: bool = False,
) -> QuantisedRows:
    """f(x), made small.

    Args:
        x: [T, K], K at most `MOST_COLUMNS`; with an activation [T, 2K] = (gate, up). Rows may be
            strided.
        norm_weight: [K], of any float dtype; if given, f is RMSNorm with it and `eps`.
        activation: if given, f is activation(gate) · up.
        pdl: launch while the previous kernel still runs.
        is_early: let the next kernel, too, start while that one runs: it may read nothing before
            it waits but weights.
    """
    num_rows, size = x.shape[0], x.shape[1] // (1 if activation is None else 2)
    assert size <= MOST_COLUMNS and x.stride(1) == 1 and not (scheme.group and size % GROUP)
    num_padding = -num_rows % _LIBRARYS_ROWS if scheme.group else 0
    num_padded = num_rows + num_padding
    codes = torch.empty((num_padded, size), dtype=scheme.dtype, device=x.device)
    num_groups = size // scheme.group if scheme.group else 1
    # Column by column: so the library takes them.
    scale = torch.empty((num_groups, num_padded), dtype=torch.float32, device=x.device)
    if num_rows:
        block = triton.next_power_of_2(size)
        _quantise_kernel[(num_rows,)](
            x,
            norm_weight,
            scheme.scale,
            codes,
            scale,
            x.stride(0),
            num_padded,
            size,
            eps,
            ACTIVATION=activation,
            GROUP=scheme.group,
            MOST=scheme.largest_code,
            IS_FLOAT=scheme.dtype.is_floating_point,
            CASTS=x.is_cuda,
            BLOCK=block,
            IS_EARLY=is_early,
            num_warps=_num_warps(block, num_rows, is_gated=activation is not None),
            **overlap(x, pdl=pdl),
        )
    return QuantisedRows(codes, scale.t(), num_padding)


def quantise_known(
    x: Tensor, maxima: Tensor, scheme: InputScheme, *, pdl: bool = False
) -> QuantisedRows:
    """`quantise_rows` of numbers of whose parts the largest are known: so several programs share a
    row.

    Args:
        x: [T, K], contiguous.
        maxima: int32 [T, parts], each the largest of some numbers' `magnitude_bits`.
        scheme: without groups.
        pdl: launch while the previous kernel still runs, and let the next one, too, start then, as
            `is_early` of `quantise_rows` does.
    """
    num_rows, size = x.shape
    assert x.is_contiguous() and maxima.is_contiguous() and not scheme.group
    codes = torch.empty((num_rows, size), dtype=scheme.dtype, device=x.device)
    scale = torch.empty((1, num_rows), dtype=torch.float32, device=x.device)
    if num_rows:
        _quantise_known_kernel[(triton.cdiv(size, _KNOWN_BLOCK), num_rows)](
            x,
            maxima,
            scheme.scale,
            codes,
            scale,
            maxima.shape[1],
            size,
            MOST=scheme.largest_code,
            IS_FLOAT=scheme.dtype.is_floating_point,
            CASTS=x.is_cuda,
            BLOCK=_KNOWN_BLOCK,
            PARTS=triton.next_power_of_2(maxima.shape[1]),
            num_warps=4,
            **overlap(x, pdl=pdl),
        )
    return QuantisedRows(codes, scale.t())


def _num_warps(block: int, num_rows: int, *, is_gated: bool) -> int:
    """With few rows latency counts, with many work per thread, of which there is more where numbers
    are activated."""
    if num_rows <= 132:
        per_thread, most = 8, 16 if block <= 16384 else 32
    else:
        per_thread, most = 16 if is_gated else 32, 32
    return max(1, min(most, block // (32 * per_thread)))
