"""Codes of a few bits widened with few instructions: what kernels/small_linear.py multiplies.

Four bytes at a time, by moving bytes and one operation on floats, in the assembler's words; `ASM`
is False in Triton's interpreter, which has no assembler, and for types that need no tricks.

    four bits → bfloat16    the byte n beside 0x43 is 128 + n, of which 136 is subtracted
    four bits → float32     the byte n under 0x4B0000 is 2²³ + n, likewise
    float8 → bfloat16       moved to their places the bits are the number times 2⁻¹²⁰

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
    .reg .b32 t, a, b, c, d;
    and.b32 t, $4, 0x0F0F0F0F;
    prmt.b32 a, t, 0x4B000000, 0x7440;
    prmt.b32 b, t, 0x4B000000, 0x7441;
    prmt.b32 c, t, 0x4B000000, 0x7442;
    prmt.b32 d, t, 0x4B000000, 0x7443;
    add.rn.f32 $0, a, 0fCB000008;
    add.rn.f32 $1, b, 0fCB000008;
    add.rn.f32 $2, c, 0fCB000008;
    add.rn.f32 $3, d, 0fCB000008;
    }"""
)
_HIGH_TO_F32 = tl.constexpr(
    """{
    .reg .b32 t, a, b, c, d;
    shr.b32 t, $4, 4;
    and.b32 t, t, 0x0F0F0F0F;
    prmt.b32 a, t, 0x4B000000, 0x7440;
    prmt.b32 b, t, 0x4B000000, 0x7441;
    prmt.b32 c, t, 0x4B000000, 0x7442;
    prmt.b32 d, t, 0x4B000000, 0x7443;
    add.rn.f32 $0, a, 0fCB000008;
    add.rn.f32 $1, b, 0fCB000008;
    add.rn.f32 $2, c, 0fCB000008;
    add.rn.f32 $3, d, 0fCB000008;
    }"""
)
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
    elif ASM and dtype == tl.float32:
        text32: tl.constexpr = _HIGH_TO_F32 if UPPER else _LOW_TO_F32
        return tl.inline_asm_elementwise(
            text32, "=f,=f,=f,=f,r", [packed], dtype=tl.float32, is_pure=True, pack=4
        )
    else:
        if UPPER:
            packed = packed >> 4
        return ((packed & 0xF).to(tl.int8) - 8).to(dtype)


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
