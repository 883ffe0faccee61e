"""Codes of a few bits widened with few instructions: what kernels/small_linear.py multiplies.

Four bytes at a time, by moving bytes and one operation on floats, in the assembler's words; `ASM`
is False in Triton's interpreter, which has no assembler, and for types that need no tricks.

    four bits → bfloat16    the byte n beside 0x43 is 128 + n, of which 136 is subtracted
    four bits → float32     the byte n under 0x3F is 1/2 + n / 256: left so, see `nibbles_raised`
    fp4 → bfloat16          moved to their places the bits are the number times 2⁻¹²⁶
    float8 → bfloat16       likewise, times 2⁻¹²⁰

All are exact; a float8 that is no number becomes 480.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOW_TO_BF16 = tl.constexpr(
    """{
    .reg .b32 t, one, less;
    mov.b32 one, 0x3F803F80;
    mov.b32 less, 0xC308C308;
    and.b32 t, $2, 0x0F0F0F0F;
    prmt.b32 $0, t, 0x43434343, 0x4140;
    prmt.b32 $1, t, 0x43434343, 0x4342;
    fma.rn.bf16x2 $0, $0, one, less;
    fma.rn.bf16x2 $1, $1, one, less;
    }"""
)
_HIGH_TO_BF16 = tl.constexpr(
    """{
    .reg .b32 t, one, less;
    mov.b32 one, 0x3F803F80;
    mov.b32 less, 0xC308C308;
    shr.b32 t, $2, 4;
    and.b32 t, t, 0x0F0F0F0F;
    prmt.b32 $0, t, 0x43434343, 0x4140;
    prmt.b32 $1, t, 0x43434343, 0x4342;
    fma.rn.bf16x2 $0, $0, one, less;
    fma.rn.bf16x2 $1, $1, one, less;
    }"""
)
_LOW_TO_F32 = tl.constexpr(
    """{
    .reg .b32 t;
    and.b32 t, $4, 0x0F0F0F0F;
    prmt.b32 $0, t, 0x3F000000, 0x7044;
    prmt.b32 $1, t, 0x3F000000, 0x7144;
    prmt.b32 $2, t, 0x3F000000, 0x7244;
    prmt.b32 $3, t, 0x3F000000, 0x7344;
    }"""
)
_HIGH_TO_F32 = tl.constexpr(
    """{
    .reg .b32 t;
    shr.b32 t, $4, 4;
    and.b32 t, t, 0x0F0F0F0F;
    prmt.b32 $0, t, 0x3F000000, 0x7044;
    prmt.b32 $1, t, 0x3F000000, 0x7144;
    prmt.b32 $2, t, 0x3F000000, 0x7244;
    prmt.b32 $3, t, 0x3F000000, 0x7344;
    }"""
)


def _fp4_to_bf16(raised: str) -> tl.constexpr:
    """`raised` puts the codes of a word into the upper halves of p's bytes."""
    return tl.constexpr(
        f"""{{
    .reg .b32 p, a, b, s, t, up, zero;
    mov.b32 up, 0x7F007F00;
    mov.b32 zero, 0x80008000;
    {raised}
    prmt.b32 a, p, 0, 0x1404;
    prmt.b32 b, p, 0, 0x3424;
    and.b32 s, a, 0x80008000;
    shr.b32 t, a, 6;
    and.b32 t, t, 0x01C001C0;
    or.b32 t, t, s;
    fma.rn.bf16x2 $0, t, up, zero;
    and.b32 s, b, 0x80008000;
    shr.b32 t, b, 6;
    and.b32 t, t, 0x01C001C0;
    or.b32 t, t, s;
    fma.rn.bf16x2 $1, t, up, zero;
    }}"""
    )


_LOW_FP4_TO_BF16 = _fp4_to_bf16("shl.b32 p, $2, 4;")
_HIGH_FP4_TO_BF16 = _fp4_to_bf16("mov.b32 p, $2;")
_FLOAT8_TO_BF16 = tl.constexpr(
    """{
    .reg .b32 a, b, s, t, up, zero;
    mov.b32 up, 0x7B807B80;
    mov.b32 zero, 0x80008000;
    prmt.b32 a, $2, 0, 0x1404;
    prmt.b32 b, $2, 0, 0x3424;
    and.b32 s, a, 0x80008000;
    and.b32 t, a, 0x7F007F00;
    shr.b32 t, t, 4;
    or.b32 t, t, s;
    fma.rn.bf16x2 $0, t, up, zero;
    and.b32 s, b, 0x80008000;
    and.b32 t, b, 0x7F007F00;
    shr.b32 t, t, 4;
    or.b32 t, t, s;
    fma.rn.bf16x2 $1, t, up, zero;
    }"""
)


@triton.jit
def nibbles(packed, UPPER: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """uint8 → codes of four bits, from −8 to 7, in `dtype`."""
    if ASM and dtype == tl.bfloat16:
        text: tl.constexpr = _HIGH_TO_BF16 if UPPER else _LOW_TO_BF16
        return tl.inline_asm_elementwise(
            text, "=r,=r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    else:
        if UPPER:
            packed = packed >> 4
        return ((packed & 0xF).to(tl.int8) - 8).to(dtype)


@triton.jit
def nibbles_raised(packed, UPPER: tl.constexpr, ASM: tl.constexpr):
    """uint8 → of codes of four bits 1/2 + (code + 8) / 256, float32: `lowered` takes it from sums
    of products, which costs less than to take it from each."""
    if ASM:
        text: tl.constexpr = _HIGH_TO_F32 if UPPER else _LOW_TO_F32
        return tl.inline_asm_elementwise(
            text, "=f,=f,=f,=f,r", [packed], dtype=tl.float32, is_pure=True, pack=4
        )
    if UPPER:
        packed = packed >> 4
    return 0.5 + (packed & 0xF).to(tl.float32) / 256


@triton.jit
def lowered(sums, ones):
    """Σ code · x of the sums of raised codes, and of x."""
    return 256.0 * sums - 136.0 * ones


@triton.jit
def twice_fp4(packed, UPPER: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """uint8 → twice the floats of four bits, in `dtype`: of a sign, two bits of exponent and one
    behind the point."""
    if ASM and dtype == tl.bfloat16:
        text: tl.constexpr = _HIGH_FP4_TO_BF16 if UPPER else _LOW_FP4_TO_BF16
        return tl.inline_asm_elementwise(
            text, "=r,=r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    else:
        code = ((packed >> 4) if UPPER else packed) & 0xF
        low = (code & 1).to(tl.int32)
        exponent = ((code >> 1) & 3).to(tl.int32)
        # From exponent 1 on there is a one before the point.
        twice = tl.where(exponent == 0, low, (2 + low) << tl.maximum(exponent - 1, 0))
        return tl.where((code & 8) != 0, -twice, twice).to(dtype)


@triton.jit
def bytes_of(code, IS_FLOAT: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """int8, or the bits of float8 as uint8 → `dtype`."""
    if ASM and IS_FLOAT and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            _FLOAT8_TO_BF16, "=r,=r,r", [code], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    else:
        if IS_FLOAT:
            code = code.to(tl.float8e4nv, bitcast=True)
        return code.to(dtype)
