"""Unpacking on NVIDIA registers: from bit planes of 32 tokens to 32 bfloat16 levels of one channel.

Codes of up to 4 bits: in every 4th bit of the planes lie the codes of 8 tokens, so two shifts and
two merges per plane give a word of 8 nibbles, and a nibble is what `prmt.b32` selects a byte with.
The 2**bits levels are split into their high and low bytes, 8 to a register pair, so that one
instruction looks up the high bytes of 4 tokens, one the low bytes, and two more interleave them:

    plane words -> nibbles -> prmt(high bytes), prmt(low bytes) -> prmt, prmt -> 4 bfloat16

about 1.8 integer instructions per level and no memory. A level table of 16 entries takes two
look-ups and, by the code's top bit, a permutation that picks from both.

Codes of 5..8 bits: three butterfly steps transpose 8 planes to bytes (1.5 instructions per code),
and two bytes at a time become two bfloat16: exactly, as no level has more than 8 significant bits.

All functions take uint32 arrays of any equal shape and work on each element alone. The order in
which they give the 32 tokens of a word is `bit_of_field`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

NIBBLE_BITS = 4  # codes up to this width are looked up, wider ones are computed
_NIBBLES = 0x11111111
_LOW_PAIR, _HIGH_PAIR = 0x5140, 0x7362  # prmt selectors: (a0, b0, a1, b1) and (a2, b2, a3, b3)


def bit_of_field(fields: Int[Array, "32"]) -> Int[Array, "32"]:
    """Bit j of a word whose token comes at field f = 8k + 2i + h: j = 8i + k + 4h."""
    return 8 * ((fields >> 1) & 3) + (fields >> 3) + 4 * (fields & 1)


def byte_tables(levels: list[Array]) -> list[Array]:
    """2..16 float32 levels as bfloat16 bytes: 4 words per 8 levels, what `prmt` selects from.

    [high 0-3, high 4-7, low 0-3, low 4-7], and for 16 levels the same again for 8..15. Missing
    levels are zero and never selected.
    """
    zero = jnp.zeros_like(levels[0], jnp.uint32)
    words = [
        jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
        for x in levels
    ]
    words += [zero] * (-len(words) % 8)
    out = []
    for first in range(0, len(words), 8):
        for half in (8, 0):
            for quad in (first, first + 4):
                packed = zero
                for i in range(4):
                    packed |= ((words[quad + i] >> half) & jnp.uint32(255)) << (8 * i)
                out.append(packed)
    return out


def lookup_words(
    planes: list[Array], tables: list[Array], asm: bool, together: bool = False
) -> list[Array]:
    """Planes of codes up to 4 bits -> 16 words of 2 bfloat16 levels, word 4k + i fields 8k+2i+h.

    `together` does the same on stacked arrays, which compiles faster in interpret mode.
    """
    bits = len(planes)
    selects = []  # per half of a nibble word: what picks a level, and which of 16's halves
    for k in range(4):
        aligned = [_shift(plane, p - k) for p, plane in enumerate(planes)]
        nibbles = aligned[0] & jnp.uint32(_NIBBLES)
        for p in range(1, min(bits, 3)):
            nibbles |= aligned[p] & jnp.uint32(_NIBBLES << p)
        both = [nibbles]
        if bits == 4:  # byte i of the lower or of the upper 8 levels: i or 4 + i
            upper = _shift(planes[3], 2 - k) & jnp.uint32(_NIBBLES << 2)
            both.append(upper | jnp.uint32(0x32103210))
        selects += [both, [x >> 16 for x in both]]

    def found(select, half=None):
        high = permute(tables[0], tables[1], select, asm)
        low = permute(tables[2], tables[3], select, asm)
        if half is not None:
            high = permute(high, permute(tables[4], tables[5], select, asm), half, asm)
            low = permute(low, permute(tables[6], tables[7], select, asm), half, asm)
        return permute(low, high, _LOW_PAIR, asm), permute(low, high, _HIGH_PAIR, asm)

    if not together:
        return [word for select in selects for word in found(*select)]
    low, high = found(*(jnp.stack(same) for same in zip(*selects, strict=True)))
    return [word for pair in zip(low, high, strict=True) for word in pair]


def byte_words(planes: list[Array], asm: bool) -> list[Array]:
    """Planes of codes of 5..8 bits -> 8 words of 4 codes: word k, byte i is bit 8i + k."""
    zero = jnp.zeros_like(planes[0])
    words = [*planes, *[zero] * (8 - len(planes))]
    for step, mask in ((4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555)):
        for i in range(8):
            if not i & step:
                low, high = words[i], words[i + step]
                words[i] = merge_bits(low, high << step, mask, asm)
                words[i + step] = merge_bits(low >> step, high, mask, asm)
    return words


def integer_words(words: list[Array], signed: bool, asm: bool) -> list[Array]:
    """Byte words -> 16 words of 2 bfloat16, in field order: the bytes as integers.

    The lower 7 bits x are the mantissa of 128 + x, from which 128 or 256 is subtracted: -128 and
    -256 differ in one bit of bfloat16, which is where the byte's top bit lies.
    """
    out = []
    for pair in _byte_pairs(words, asm):
        x = _and_xor(pair, 0x007F007F, 0x43004300, asm)
        shift = _and_xor(pair, 0x00800080, 0xC300C300 if signed else 0xC380C380, asm)
        x = _add_pairs(x, shift, asm)
        if not signed:
            x = _add_pairs(x, jnp.full_like(x, 0x43004300), asm)
        out.append(x)
    return out


def float_words(words: list[Array], e4m3: bool, asm: bool) -> list[Array]:
    """Byte words of e4m3 or e5m2 codes -> 16 words of 2 bfloat16, in field order.

    The magnitude is moved to where bfloat16 has the same exponent and mantissa bits; the factor
    2**(127 - 7) or 2**(127 - 15) then corrects the bias, also of subnormals. NaN and infinite codes
    become finite numbers.
    """
    shift, mask, power = (4, 0x07F007F0, 120) if e4m3 else (3, 0x0FE00FE0, 112)
    out = []
    for pair in _byte_pairs(words, asm, high=True):
        x = (pair & jnp.uint32(0x80008000)) | ((pair >> shift) & jnp.uint32(mask))
        out.append(_scale_pairs(x, power, asm))
    return out


def _byte_pairs(words: list[Array], asm: bool, high: bool = False) -> list[Array]:
    """Two bytes of fields 2w and 2w + 1 in the low (or high) bytes of 16 words' halves."""
    out = []
    for k in range(4):
        for i in range(4):
            select = ((4 + i) << 8) | i
            out.append(permute(words[k], words[k + 4], select << 4 if high else select, asm))
    return out


def _add_pairs(a: Array, b: Array, asm: bool) -> Array:
    """Sums of the two bfloat16 in each word."""
    if asm:
        return _asm("add.rn.bf16x2 $0, $1, $2;", a, b)
    halves = []
    for shift in (0, 16):
        x, y = (jax.lax.bitcast_convert_type((w >> shift) << 16, jnp.float32) for w in (a, b))
        half = jax.lax.bitcast_convert_type((x + y).astype(jnp.bfloat16), jnp.uint16)
        halves.append(half.astype(jnp.uint32) << shift)
    return halves[0] | halves[1]


def _scale_pairs(x: Array, power: int, asm: bool) -> Array:
    """The two bfloat16 in each word times 2**power, subnormals too."""
    if asm:
        factor = (127 + power) << 7
        return _asm("mul.rn.bf16x2 $0, $1, $2;", x, jnp.full_like(x, factor << 16 | factor))
    halves = []
    for shift in (0, 16):  # a CPU takes subnormals for zero: from the fields
        exponent, mantissa = (x >> (shift + 7)) & jnp.uint32(255), (x >> shift) & jnp.uint32(127)
        mantissa += jnp.where(exponent > 0, jnp.uint32(128), jnp.uint32(0))
        exponent = jnp.maximum(exponent, jnp.uint32(1)).astype(jnp.float32)
        size = mantissa.astype(jnp.float32) * jnp.exp2(exponent + (power - 134.0))
        half = jax.lax.bitcast_convert_type(size.astype(jnp.bfloat16), jnp.uint16)
        halves.append(half.astype(jnp.uint32) << shift)
    return halves[0] | halves[1] | (x & jnp.uint32(0x80008000))


def _and_xor(x: Array, mask: int, other: int, asm: bool) -> Array:
    """(x & mask) ^ other, one instruction (the compiler makes it two for want of a register)."""
    if asm:
        masks = (jnp.full_like(x, value) for value in (mask, other))
        return _asm("lop3.b32 $0, $1, $2, $3, 0x6A;", x, *masks)
    return (x & jnp.uint32(mask)) ^ jnp.uint32(other)


def merge_bits(ones: Array, zeros: Array, mask: int, asm: bool) -> Array:
    """(ones & mask) | (zeros & ~mask), one instruction."""
    if asm:
        return _asm(f"lop3.b32 $0, $1, $2, {hex(mask)}, 0xE4;", ones, zeros)
    return (ones & jnp.uint32(mask)) | (zeros & jnp.uint32(mask ^ 0xFFFFFFFF))


def permute(a: Array, b: Array, select: Array | int, asm: bool) -> Array:
    """prmt.b32: byte i of the result is byte (select >> 4i) & 7 of the 8 bytes (a, b)."""
    shape = a.shape if isinstance(select, int) else select.shape
    a, b = jnp.broadcast_to(a, shape), jnp.broadcast_to(b, shape)
    if not asm:
        return _fixed(a, b, select) if isinstance(select, int) else _permute(a, b, select)
    if isinstance(select, int):
        return _asm(f"prmt.b32 $0, $1, $2, {hex(select)};", a, b)
    return _asm("prmt.b32 $0, $1, $2, $3;", a, b, select)


def _asm(code: str, *args: Array) -> Array:
    """One instruction on uint32 arrays of one shape. Triton has no unsigned types."""
    signed = [jax.lax.bitcast_convert_type(x, jnp.int32) for x in args]
    (out,) = plgpu.elementwise_inline_asm(
        code, args=signed, constraints=",".join(["=r"] + ["r"] * len(args)), pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, jnp.int32)],
    )  # fmt: skip
    return jax.lax.bitcast_convert_type(out, jnp.uint32)


def exp2(x: Float[Array, "*s"], asm: bool) -> Float[Array, "*s"]:
    """2**x in one instruction (relative error 2**-22), subnormal results are zero."""
    if not asm:
        return jnp.exp2(x)
    (out,) = plgpu.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;", args=[x], constraints="=f,f", pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )  # fmt: skip
    return out


def _fixed(a: Array, b: Array, select: int) -> Array:
    """`_permute` with a selector known beforehand."""
    out = jnp.zeros_like(a)
    for i in range(4):
        byte = select >> 4 * i & 7
        word = b if byte >= 4 else a
        piece = _shift(word & jnp.uint32(255 << 8 * (byte & 3)), 8 * (i - (byte & 3)))
        out |= piece
    return out


def _permute(a: Array, b: Array, select: Array) -> Array:
    """`prmt.b32` in plain operations, all four bytes side by side."""
    places = jnp.arange(4, dtype=jnp.uint32).reshape(*[1] * a.ndim, 4)
    byte = (select[..., None] >> (places * jnp.uint32(4))) & jnp.uint32(7)
    word = jnp.where(byte >= 4, b[..., None], a[..., None])
    found = (word >> ((byte & jnp.uint32(3)) * jnp.uint32(8))) & jnp.uint32(255)
    return jnp.sum(found << (places * jnp.uint32(8)), axis=-1, dtype=jnp.uint32)


def _shift(x: Array, left: int) -> Array:
    if left == 0:
        return x
    return x << np.uint32(left) if left > 0 else x >> np.uint32(-left)
