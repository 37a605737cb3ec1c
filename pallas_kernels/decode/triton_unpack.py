"""int8 and int4 as numbers of 16 bits, on GPU by Triton: four bytes in a few
instructions.

Triton's own conversions take several instructions a number, so many that a quantised
cache would be read no faster than a whole one. Here a byte is set into the last bits of
a number whose last bit counts 1 (128 in bfloat16, 1024 in float16), and what that is
too much is taken away again, both exactly: the trick of Kim et al., 2022,
arXiv:2211.10017.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton

# The low (shift: 0) or high (4) halves of four bytes, or the bytes, with signs turned.
TURNED = """{{
 .reg .b32 part, one, less;
 shr.u32 part, $2, {shift};
 and.b32 part, part, {bits};
 xor.b32 part, part, {sign};
 mov.b32 one, {one};
 mov.b32 less, {less};
 prmt.b32 $0, part, {big}, 0x4140;
 prmt.b32 $1, part, {big}, 0x4342;
 fma.rn.{kind}x2 $0, $0, one, less;
 fma.rn.{kind}x2 $1, $1, one, less;
}}"""
# bfloat16 holds seven bits in this way: the eighth goes into what is taken away.
SEVEN = """{{
 .reg .b32 seven, sign, one, less, more;
 and.b32 seven, $2, 0x7F7F7F7F;
 and.b32 sign, $2, 0x80808080;
 mov.b32 one, {one};
 prmt.b32 less, sign, 0xC3C3C3C3, 0x4140;
 prmt.b32 more, sign, 0xC3C3C3C3, 0x4342;
 prmt.b32 $0, seven, {big}, 0x4140;
 prmt.b32 $1, seven, {big}, 0x4342;
 fma.rn.{kind}x2 $0, $0, one, less;
 fma.rn.{kind}x2 $1, $1, one, more;
}}"""
BF16 = {"kind": "bf16", "big": "0x43434343", "one": "0x3F803F80"}  # 128, 1
F16 = {"kind": "f16", "big": "0x64646464", "one": "0x3C003C00"}  # 1024, 1
HALF = {"bits": "0x0F0F0F0F", "sign": "0x08080808"}
WHOLE = {"bits": "0xFFFFFFFF", "sign": "0x80808080"}
KNOWN = {
    ("bfloat16", 4): (TURNED, BF16 | HALF | {"less": "0xC308C308"}),  # -136
    ("bfloat16", 8): (SEVEN, BF16),
    ("float16", 4): (TURNED, F16 | HALF | {"less": "0xE408E408"}),  # -1032
    ("float16", 8): (TURNED, F16 | WHOLE | {"less": "0xE480E480"}),  # -1152
}


def instructions(dtype: Any, bits: int, shift: int, one: str | None = None) -> str:
    """PTX from four bytes $2 to four numbers $0, $1; one: the register of a factor."""
    text, numbers = KNOWN[jnp.dtype(dtype).name, bits]
    return text.format(shift=shift, **(numbers | ({"one": one} if one else {})))


def widened(a, bits: int, dtype, ones=None, interpret: Any = False) -> list[Any]:
    """int8 [columns,width] in dtype, or the low and high int4 of each byte; times
    `ones` [columns,1] of that type, if given."""
    if interpret or (jnp.dtype(dtype).name, bits) not in KNOWN:
        parts = [a]
        if bits == 4:
            wide = a.astype(jnp.int32)
            parts = [(wide << 28) >> 28, wide >> 4]  # low and high, with signs
        return [n.astype(dtype) * (1 if ones is None else ones) for n in parts]
    args, registers, one = [a], "=r,=r,r", None
    if ones is not None:
        args, registers, one = [a, jnp.broadcast_to(ones, a.shape)], "=r,=r,r,r,r", "$3"
    return [triton.elementwise_inline_asm(
        instructions(dtype, bits, shift, one), args=args, constraints=registers, pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(a.shape, dtype)])[0]
        for shift in ((0, 4) if bits == 4 else (0,))]
