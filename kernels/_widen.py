"""Stored elements of a quantised cache as numbers of the type that products are made in.

A register of four bytes becomes registers of two fp16 each. A byte b behind 0x64 is the fp16
1024 + b, so integers take a permutation and a subtraction, instead of a conversion each.
"""

from __future__ import annotations

import triton
import triton.language as tl

E4M3 = tl.constexpr("""{ .reg .b16 a, b; mov.b32 {a, b}, $2;
cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; }""")
E5M2 = tl.constexpr("{ prmt.b32 $0, 0, $2, 0x5040; prmt.b32 $1, 0, $2, 0x7060; }")
INT8 = tl.constexpr("""{ .reg .b32 x, m; xor.b32 x, $2, 0x80808080; mov.b32 m, 0x64646464;
prmt.b32 $0, x, m, 0x4140; prmt.b32 $1, x, m, 0x4342; mov.b32 m, 0x64806480;
sub.f16x2 $0, $0, m; sub.f16x2 $1, $1, m; }""")
INT4 = tl.constexpr("""{ .reg .b32 x, m; and.b32 x, $4, 0x0F0F0F0F; mov.b32 m, 0x64646464;
prmt.b32 $0, x, m, 0x4140; prmt.b32 $1, x, m, 0x4342;
shr.u32 x, $4, 4; and.b32 x, x, 0x0F0F0F0F;
prmt.b32 $2, x, m, 0x4140; prmt.b32 $3, x, m, 0x4342; mov.b32 m, 0x64086408;
sub.f16x2 $0, $0, m; sub.f16x2 $1, $1, m; sub.f16x2 $2, $2, m; sub.f16x2 $3, $3, m; }""")
# Of two pairs of bytes, the first ones and the second ones.
E4M3_PAIRS = tl.constexpr("""{ .reg .b32 x; .reg .b16 a, b; prmt.b32 x, $2, $2, 0x3120;
mov.b32 {a, b}, x; cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; }""")
E5M2_PAIRS = tl.constexpr("""{ .reg .b32 x; shl.b32 x, $2, 8; and.b32 $0, x, 0xFF00FF00;
and.b32 $1, $2, 0xFF00FF00; }""")
INT8_PAIRS = tl.constexpr("""{ .reg .b32 x, m; xor.b32 x, $2, 0x80808080; mov.b32 m, 0x64646464;
prmt.b32 $0, x, m, 0x4240; prmt.b32 $1, x, m, 0x4341; mov.b32 m, 0x64806480;
sub.f16x2 $0, $0, m; sub.f16x2 $1, $1, m; }""")

INT4_PAIRS = tl.constexpr("""{ .reg .b32 x, m; and.b32 x, $4, 0x0F0F0F0F; mov.b32 m, 0x64646464;
prmt.b32 $0, x, m, 0x4240; prmt.b32 $1, x, m, 0x4341;
shr.u32 x, $4, 4; and.b32 x, x, 0x0F0F0F0F;
prmt.b32 $2, x, m, 0x4240; prmt.b32 $3, x, m, 0x4341; mov.b32 m, 0x64086408;
sub.f16x2 $0, $0, m; sub.f16x2 $1, $1, m; sub.f16x2 $2, $2, m; sub.f16x2 $3, $3, m; }""")


@triton.jit
def from_bytes(raw, KIND: tl.constexpr, COMPUTE: tl.constexpr, ASM: tl.constexpr):
    """Elements of any kind but int4."""
    if ASM and KIND == "float8_e4m3fn":
        wide = tl.inline_asm_elementwise(E4M3, "=r,=r,r", [raw], tl.float16, True, 4)
    elif ASM and KIND == "float8_e5m2":
        wide = tl.inline_asm_elementwise(E5M2, "=r,=r,r", [raw], tl.float16, True, 4)
    elif ASM and KIND == "int8":
        wide = tl.inline_asm_elementwise(INT8, "=r,=r,r", [raw], tl.float16, True, 4)
    elif KIND == "float8_e4m3fn":
        wide = raw.to(tl.float8e4nv, bitcast=True).to(COMPUTE)
    elif KIND == "float8_e5m2":
        wide = raw.to(tl.float8e5, bitcast=True).to(COMPUTE)
    else:
        wide = raw.to(COMPUTE)
    return wide


@triton.jit
def from_nibbles(raw, COMPUTE: tl.constexpr, ASM: tl.constexpr):
    """Of int4: the values in the low and those in the high halves of the bytes."""
    if ASM:
        low, high = tl.inline_asm_elementwise(
            INT4, "=r,=r,=r,=r,r", [raw], (tl.float16, tl.float16), True, 4
        )
    else:
        low = ((raw & 15).to(tl.int8) - 8).to(COMPUTE)
        high = ((raw >> 4).to(tl.int8) - 8).to(COMPUTE)
    return low, high


@triton.jit
def from_pairs(raw, KIND: tl.constexpr, COMPUTE: tl.constexpr, ASM: tl.constexpr):
    """Of 16 bits each: the values in their first and in their second bytes."""
    if ASM:
        CODE: tl.constexpr = (
            E4M3_PAIRS
            if KIND == "float8_e4m3fn"
            else (E5M2_PAIRS if KIND == "float8_e5m2" else INT8_PAIRS)
        )
        low, high = tl.inline_asm_elementwise(
            CODE, "=r,=r,r", [raw], (tl.float16, tl.float16), True, 2
        )
    else:
        low = from_bytes((raw & 255).to(tl.uint8).to(tl.int8, bitcast=True), KIND, COMPUTE, False)
        raw = raw >> 8
        high = from_bytes((raw & 255).to(tl.uint8).to(tl.int8, bitcast=True), KIND, COMPUTE, False)
    return low, high


@triton.jit
def from_nibble_pairs(raw, COMPUTE: tl.constexpr, ASM: tl.constexpr):
    """Of int4, 16 bits each: the low halves of their first and second bytes, then the high ones."""
    if ASM:
        low, low_2, high, high_2 = tl.inline_asm_elementwise(
            INT4_PAIRS, "=r,=r,=r,=r,r", [raw], (tl.float16,) * 4, True, 2
        )
    else:
        low = ((raw & 15).to(tl.int8) - 8).to(COMPUTE)
        high = (((raw >> 4) & 15).to(tl.int8) - 8).to(COMPUTE)
        low_2 = (((raw >> 8) & 15).to(tl.int8) - 8).to(COMPUTE)
        high_2 = (((raw >> 12) & 15).to(tl.int8) - 8).to(COMPUTE)
    return low, low_2, high, high_2
