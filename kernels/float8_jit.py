"""Keys and values in 8 bits for kernels: what kernels/reference_float8.py says, in registers.

Two codes lie beside each other as one number of 16 bits, and are moved as that: the copies to
shared memory, and those from there to where tensor cores take them, are the ones that keys and
values of 16 bits have. What is multiplied are then two halves, the even dimensions and the odd
ones. To bfloat16 a code is widened by moving its bits to their places, which makes 2⁻¹²⁰ times the
number, and one multiplication, for two codes at a time; `ASM` is False in Triton's interpreter,
which has no assembler. Of what was stored no code is no number: a vector that is not finite has
zeros, and an infinite scale. Of slots that may hold anything, moved bits are numbers all the same;
a cast makes NaN, so those must not be read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton.kernels import reference_float8

_WIDEN = tl.constexpr(
    """{
    .reg .b32 low, s, t, mask, up, zero;
    mov.b32 mask, 0x07F007F0;
    mov.b32 up, 0x7B807B80;
    mov.b32 zero, 0x80008000;
    shl.b32 low, $2, 8;
    and.b32 s, low, 0x80008000;
    shr.b32 t, low, 4;
    lop3.b32 t, t, mask, s, 0xEA;
    fma.rn.bf16x2 $0, t, up, zero;
    and.b32 s, $2, 0x80008000;
    shr.b32 t, $2, 4;
    lop3.b32 t, t, mask, s, 0xEA;
    fma.rn.bf16x2 $1, t, up, zero;
    }"""
)
"""(t & mask) | s is 0xEA."""
_SMALL_HALVES = tl.constexpr(
    """{
    .reg .b32 s, t;
    shl.b32 t, $2, 7;
    and.b32 t, t, 0x3F803F80;
    shl.b32 s, $2, 8;
    lop3.b32 $0, s, 0x80008000, t, 0xEA;
    shr.b32 t, $2, 1;
    and.b32 t, t, 0x3F803F80;
    lop3.b32 $1, $2, 0x80008000, t, 0xEA;
    }"""
)
"""(s & mask) | t is 0xEA."""
_CAST_NEIGHBOURS = tl.constexpr(
    """{
    .reg .b16 l, h;
    mov.b32 {l, h}, $2;
    cvt.rn.f16x2.e4m3x2 $0, l;
    cvt.rn.f16x2.e4m3x2 $1, h;
    }"""
)
_CAST_HALVES = tl.constexpr(
    """{
    .reg .b32 t;
    .reg .b16 l, h;
    prmt.b32 t, $2, 0, 0x3120;
    mov.b32 {l, h}, t;
    cvt.rn.f16x2.e4m3x2 $0, l;
    cvt.rn.f16x2.e4m3x2 $1, h;
    }"""
)


def is_float8(kv: Tensor) -> bool:
    return kv.dtype == reference_float8.DTYPE


def as_bytes(kv: Tensor) -> Tensor:
    """What kernels take of a pool: codes as bytes, by which they know them."""
    return kv.view(torch.uint8) if is_float8(kv) else kv


def has_assembler() -> bool:
    return not triton.knobs.runtime.interpret


def casts_codes(device: torch.device) -> bool:
    """Whether there is an instruction that makes float16 of codes."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


@triton.jit
def codes_offset(run, head_runs: tl.constexpr, block_size: tl.constexpr, head_dim: tl.constexpr):
    """Where in a pool, or in a block, the codes of a run begin, the keys or values of a head in a
    layer, of which a head has `head_runs` (reference_float8.py). Those of values are block_size ·
    head_dim bytes behind those of keys."""
    return run * (block_size * head_dim) + run // head_runs * (head_runs * block_size)


@triton.jit
def scales_offset(run, head_runs: tl.constexpr, block_size: tl.constexpr, head_dim: tl.constexpr):
    """Where its scales begin. Those of values are block_size bytes behind those of keys."""
    return (run // head_runs + 1) * (head_runs * block_size * head_dim) + run * block_size


@triton.jit
def exponent_of(bits):
    """The largest of a vector's numbers, its sign left out, as the bits of a float32 → the exponent
    of its scale."""
    exponent = tl.maximum(((bits + 0x1FFFFF) >> 23) - 8, 1)
    return tl.where(bits >= 0x7F800000, 255, exponent)


@triton.jit
def magnitude_bits(x):
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def codes_of(x, exponent):
    """float32 → uint8: rounded to even, as torch does. No GPU is too old for this."""
    inverse = (tl.maximum(254 - exponent, 0) << 23).to(tl.float32, bitcast=True)
    scaled = (x * inverse).to(tl.int32, bitcast=True)
    bits = scaled & 0x7FFFFFFF
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2⁻⁶ codes are multiples of 2⁻⁹: the last place of a float32 beside 2¹⁴.
    below = bits.to(tl.float32, bitcast=True) + 16384.0
    code = tl.where(bits < 0x3C800000, below.to(tl.int32, bitcast=True) - 0x46800000, normal)
    code = tl.where(exponent == 255, 0, code)
    sign = tl.where(exponent == 255, 0, (scaled >> 24) & 0x80)
    return (code | sign).to(tl.uint8)


@triton.jit
def scale_of(exponent):
    """uint8 → float32."""
    return (exponent.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def halves(pairs, dtype: tl.constexpr, ASM: tl.constexpr):
    """int16 → the numbers of the lower bytes, and of the higher ones, before they are scaled."""
    if ASM and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            _WIDEN, "=r,=r,r", [pairs], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
        )
    else:
        bits = pairs.to(tl.int32)
        return widened(bits).to(dtype), widened(bits >> 8).to(dtype)


@triton.jit
def small_halves(pairs, CASTS: tl.constexpr, ASM: tl.constexpr):
    """`halves` in float16. Without CASTS they are 2⁻⁸ times as large: a code's bits, moved to their
    places, are that."""
    if ASM and CASTS:
        return tl.inline_asm_elementwise(
            _CAST_HALVES, "=r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    elif ASM:
        return tl.inline_asm_elementwise(
            _SMALL_HALVES, "=r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    else:
        lower, higher = halves(pairs, tl.float32, ASM)
        if CASTS:
            lower = tl.where((pairs & 0x7F) == 0x7F, float("nan"), lower)
            higher = tl.where((pairs & 0x7F00) == 0x7F00, float("nan"), higher)
        size: tl.constexpr = 1.0 if CASTS else 0.00390625
        return (lower * size).to(tl.float16), (higher * size).to(tl.float16)


@triton.jit
def neighbours(pairs, ASM: tl.constexpr):
    """int16 [..., D / 2] → in float16 the numbers of dimensions 4i and 4i + 1, and those of 4i + 2
    and 4i + 3, [..., D / 2] each: one instruction for two codes, where `small_halves` must first
    bring together what lies apart.

    Right only where a thread has elements 2i and 2i + 1 one after the other, as it has those of the
    left operand of a product, which is what the result must be."""
    if ASM:
        return tl.inline_asm_elementwise(
            _CAST_NEIGHBOURS, "=r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True,
            pack=2,
        )  # fmt: skip
    else:
        lower, higher = small_halves(pairs, True, ASM)
        A: tl.constexpr = pairs.shape[0]
        B: tl.constexpr = pairs.shape[1]
        C: tl.constexpr = pairs.shape[2]
        codes = tl.reshape(tl.join(lower, higher), (A, B, C // 2, 2, 2))
        first, second = tl.split(tl.permute(codes, (0, 1, 2, 4, 3)))
        return tl.reshape(first, (A, B, C)), tl.reshape(second, (A, B, C))


@triton.jit
def widened(code):
    """int32, of which the lowest byte is a code → float32, before it is scaled."""
    bits = ((code & 0x80) << 24) | ((code & 0x7F) << 20)
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2¹²⁰


@triton.jit
def score_halves(query, pairs, scale, ASM: tl.constexpr):
    """Products of queries, (even, odd) dimensions [M, D / 2] each, with keys, int16 [N, D / 2] and
    their scales float32 [N] → float32 [M, N]."""
    even, odd = halves(pairs, query[0].dtype, ASM)
    scores = tl.dot(query[0], tl.trans(even), input_precision="ieee")
    scores = tl.dot(query[1], tl.trans(odd), scores, input_precision="ieee")
    return scores * scale[None, :]


@triton.jit
def add_halves(acc, fade, weight, pairs, scale, dtype: tl.constexpr, ASM: tl.constexpr):
    """acc · fade [M, 1] + weights [M, N] times values, int16 [N, D / 2] and their scales float32
    [N]; acc are (even, odd) dimensions, float32 [M, D / 2] each, as is the result."""
    if dtype == tl.float16:
        # Weights times scales may be too small for it, or too large.
        wide_even, wide_odd = halves(pairs, tl.float32, ASM)
        even = (wide_even * scale[:, None]).to(dtype)
        odd = (wide_odd * scale[:, None]).to(dtype)
    else:
        even, odd = halves(pairs, dtype, ASM)
        weight *= scale[None, :]
    weight = weight.to(dtype)
    return (
        tl.dot(weight, even, acc[0] * fade, input_precision="ieee"),
        tl.dot(weight, odd, acc[1] * fade, input_precision="ieee"),
    )
