"""Blocks of 32 values as ggml stores them: the reference rules, operation by operation.

    q4_0 q5_0   m = first value of largest |x|, d = m / -2^(b-1), q = trunc(x / d + 2^(b-1) + 1/2)
    q4_1 q5_1   m = min x, d = (max x - m) / (2^b - 1),           q = trunc((x - m) / d + 1/2)
    q8_0        d = max |x| / 127,                                q = x / d, half away from zero
    iq4_nl      q = nearest of 16 values v to x / (m / -127),     d = sum x^3 v_q / sum x^2 v_q^2

1/d is taken of the float32 d and multiplied; what is stored is d in float16. Bytes depend on single
float32 roundings, which a compiler may change in three ways, each prevented where it matters:

* x * id + c fused to one rounding: a clip that never acts stands between product and sum;
* a division by a constant turned into a product: the divisor is a `where` of two numbers;
* float32 denormals read as zero: blocks below 2^-64 are compared as integers and scaled by 2^64.

So results equal the reference on any backend whose float32 product, sum and division are rounded
correctly; a test compares bytes on the CPU. Source: ggml-quants.c, quantize_row_*_ref.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8, UInt32

from turboq.codecs.base import Stored
from turboq.numbers import codebook

BLOCK = 32
IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

_SIGN = np.uint32(1 << 31)
_LIFT = 64  # blocks below 2^-64 are worked on times 2^64
_GRID = -149 + _LIFT  # float32 denormals are multiples of 2^-149: of 2^-85 once lifted
_NEVER = 256.0  # no code, offset included, is so large: clipping there changes nothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockType:
    """A rule of the module's table, and how many bits one code has."""

    rule: str
    bits: int

    @property
    def minimum(self) -> bool:
        return self.rule == "minmax"

    @property
    def nbytes(self) -> int:
        """Bytes of a block: float16 d, float16 m if any, codes."""
        return (4 if self.minimum else 2) + BLOCK * self.bits // 8


TYPES = {
    "q8_0": BlockType(rule="absmax", bits=8),
    "q5_0": BlockType(rule="signed", bits=5),
    "q5_1": BlockType(rule="minmax", bits=5),
    "q4_0": BlockType(rule="signed", bits=4),
    "q4_1": BlockType(rule="minmax", bits=4),
    "iq4_nl": BlockType(rule="values", bits=4),
}


@functools.partial(jax.jit, static_argnums=0)
def quantize(kind: BlockType, x: Float[Array, "*n D"]) -> Stored:
    """Codes [*n, D], scale [*n, D/32] and for q4_1 and q5_1 minimum [*n, D/32].

    Codes are the unsigned ones of the format; q8_0's signed bytes are stored with 128 added.
    """
    blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
    if kind.rule == "values":
        codes, scale, minimum = *_nearest_values(blocks), None
    elif kind.rule == "minmax":
        codes, scale, minimum = _minmax(blocks, 2**kind.bits - 1)
    else:
        codes, scale = _absmax(blocks) if kind.rule == "absmax" else _signed(blocks, kind.bits)
        minimum = None
    stored = {"codes": codes.astype(jnp.uint8).reshape(x.shape)}
    stored["scale"] = scale[..., 0].astype(jnp.float16)
    if minimum is not None:
        stored["minimum"] = minimum[..., 0].astype(jnp.float16)
    return stored


def dequantize(kind: BlockType, stored: Stored) -> Float[Array, "*n D"]:
    """d q, d q + m or d v_q; exact products, because d has 11 bits and q at most 8."""
    codes = stored["codes"]
    blocks = codes.reshape(*codes.shape[:-1], -1, BLOCK)
    if kind.rule == "values":
        values = _values_of(blocks)
    else:
        zero = 0 if kind.minimum else 2 ** (kind.bits - 1)
        values = blocks.astype(jnp.float32) - zero
    values = values * stored["scale"].astype(jnp.float32)[..., None]
    if kind.minimum:
        values = values + stored["minimum"].astype(jnp.float32)[..., None]
    return values.reshape(codes.shape)


def to_bytes(kind: BlockType, stored: Mapping[str, Any]) -> np.ndarray:
    """ggml's bytes, uint8 [*n, D/32 * nbytes], on the host.

    Per block and little-endian: d, m if any, the fifth bits as one uint32 (bit j is value j), then
    16 bytes whose low nibble is value j and whose high nibble is value j + 16 (q8_0: 32 bytes).
    """
    codes = np.asarray(stored["codes"])
    blocks = codes.reshape(*codes.shape[:-1], -1, BLOCK)
    parts = [_half_bytes(stored["scale"])]
    if kind.minimum:
        parts.append(_half_bytes(stored["minimum"]))
    if kind.bits == 8:
        parts.append(blocks ^ np.uint8(128))  # q + 128 -> q as int8
    else:
        if kind.bits == 5:
            parts.append(np.packbits(blocks >> np.uint8(4), axis=-1, bitorder="little"))
        low, high = np.split(blocks & np.uint8(15), 2, axis=-1)
        parts.append(low | (high << np.uint8(4)))
    return np.concatenate(parts, axis=-1).reshape(*codes.shape[:-1], -1)


def from_bytes(kind: BlockType, data: np.ndarray) -> dict[str, np.ndarray]:
    """The inverse of `to_bytes`."""
    blocks = data.reshape(*data.shape[:-1], -1, kind.nbytes)
    head = 4 if kind.minimum else 2
    scales = np.moveaxis(np.ascontiguousarray(blocks[..., :head]).view("<f2"), -1, 0)
    if kind.bits == 8:
        codes = blocks[..., head:] ^ np.uint8(128)
    else:
        nibbles = blocks[..., -BLOCK // 2 :]
        codes = np.concatenate([nibbles & np.uint8(15), nibbles >> np.uint8(4)], axis=-1)
        if kind.bits == 5:
            fifth = np.unpackbits(blocks[..., head : head + 4], axis=-1, bitorder="little")
            codes = codes | (fifth << np.uint8(4))
    names = ("scale", "minimum") if kind.minimum else ("scale",)
    stored = {n: v.astype(np.float16, order="C") for n, v in zip(names, scales, strict=True)}
    return {"codes": codes.reshape(*data.shape[:-1], -1)} | stored


def _half_bytes(values) -> np.ndarray:
    """float16 [..., n] -> uint8 [..., n, 2]."""
    return np.ascontiguousarray(np.asarray(values)[..., None].astype("<f2")).view(np.uint8)


# --- the four rules, on blocks [..., 32]; scale and minimum are [..., 1] --------------------------


def _signed(x, bits: int):
    half = 2 ** (bits - 1)
    m, small = _largest(x)
    y, m = _lift(x, small), _lift(m, small)
    d = _step(-m, half, small)
    inverse, lost = _inverse(d, small)
    t = jnp.clip(y * inverse, -_NEVER, _NEVER)
    codes = jnp.clip(jnp.trunc(t + (half + 0.5)), 0, 2 * half - 1)
    return jnp.where(lost, 0.0, codes), _lower(d, small)


def _absmax(x):
    m, small = _largest(x)
    y, m = _lift(x, small), jnp.abs(_lift(m, small))
    d = _step(m, 127, small)
    inverse, lost = _inverse(d, small)
    size = jnp.clip(jnp.abs(y * inverse), 0.0, _NEVER)
    whole = jnp.floor(size)
    whole = whole + jnp.floor(2 * (size - whole))
    return 128 + jnp.where(lost, 0.0, jnp.sign(y) * whole), _lower(d, small)


def _minmax(x, levels: int):
    # As integers in the order of the floats, so that denormals keep their order; -0 counts as 0.
    bits = _bits(x)
    order = _order(jax.lax.bitcast_convert_type(x, jnp.int32))
    order = jnp.where(bits == _SIGN, 0, order)
    low, high = (
        jax.lax.bitcast_convert_type(_order(f(order, axis=-1, keepdims=True)), jnp.float32)
        for f in (jnp.min, jnp.max)
    )
    # Zeros of both signs as minimum: the last one's sign, as package gguf (C: the first one's).
    ranked = jnp.where(bits & ~_SIGN == 0, _places(x) + (bits >> np.uint32(31)), np.uint32(0))
    sign = jnp.max(ranked, axis=-1, keepdims=True) << np.uint32(31)
    low = _float(jnp.where(_bits(low) == 0, sign, _bits(low)))
    small = _largest(x)[1]
    y, low, high = (_lift(v, small) for v in (x, low, high))
    d = _step(high - low, levels, small)
    inverse, lost = _inverse(d, small)
    t = jnp.clip((y - low) * inverse, -_NEVER, _NEVER)
    codes = jnp.where(lost | jnp.isinf(d), 0.0, jnp.clip(jnp.trunc(t + 0.5), 0, levels))
    return codes, _lower(d, small), _lower(low, small)


def _nearest_values(x):
    m, _ = _largest(x)
    nothing = jnp.abs(m) < 1e-15  # ggml's GROUP_MAX_EPS: d = 0
    # Scaled by a power of two to a size near one, so that squares and cubes stay in range.
    exponent = (_bits(m) >> np.uint32(23)) & np.uint32(255)
    down = jnp.clip(254 - exponent.astype(jnp.int32), 1, 253)
    y, m = x * _power(down), m * _power(down)
    d = _step(-m, 127, jnp.zeros_like(nothing))
    t = y * jnp.where(nothing, 0.0, 1 / jnp.where(nothing, 1.0, d))
    codes = jnp.zeros(t.shape, jnp.uint8)
    for a, b in itertools.pairwise(IQ4_NL):
        codes += (t >= (a + b) / 2).astype(jnp.uint8)  # a tie takes the upper value
    v = _values_of(codes)
    top, bottom = _in_order((y * y) * v * y), _in_order((y * y) * v * v)
    scale = top / jnp.where(nothing, 1.0, bottom)
    return codes, jnp.where(nothing, 0.0, scale * _power(254 - down))


# --- helpers --------------------------------------------------------------------------------------


def _bits(x: Float[Array, "*n"]) -> UInt32[Array, "*n"]:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _float(bits: UInt32[Array, "*n"]) -> Float[Array, "*n"]:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _power(exponent) -> Array:
    """2^(exponent - 127) for exponent in 1..254."""
    return _float(exponent.astype(jnp.uint32) << np.uint32(23))


def _order(bits):
    """int32 bits of a float <-> int32 that sort like the floats."""
    return bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))


def _largest(x: Float[Array, "*n 32"]) -> tuple[Float[Array, "*n 1"], Bool[Array, "*n 1"]]:
    """First value of largest magnitude, and whether that is below 2^-64."""
    bits = _bits(x)
    size = bits & ~_SIGN
    largest = jnp.max(size, axis=-1, keepdims=True)
    # The sign of the first of equals: a minimum over (position, sign) where the size is largest.
    ranked = jnp.where(size == largest, _places(x) + (bits >> np.uint32(31)), np.uint32(2 * BLOCK))
    first = jnp.min(ranked, axis=-1, keepdims=True)
    small = largest < np.uint32((127 - _LIFT) << 23)
    return _float(largest | ((first & np.uint32(1)) << np.uint32(31))), small


def _places(x) -> np.ndarray:
    """Twice the position in the block, with leading axes of one."""
    return np.arange(0, 2 * BLOCK, 2, dtype=np.uint32).reshape((1,) * (x.ndim - 1) + (-1,))


def _lift(x, small):
    """x 2^64 where the block is small, denormals included; x elsewhere."""
    bits = _bits(x)
    size = bits & ~_SIGN
    denormal = _float(_bits(size.astype(jnp.float32) * 2.0**_GRID) | (bits & _SIGN))
    lifted = jnp.where(size < np.uint32(1 << 23), denormal, x * 2.0**_LIFT)
    return jnp.where(small, lifted, x)


def _lower(x, small):
    """The inverse of `_lift` up to what float16 holds (zero of either sign)."""
    return jnp.where(small, x * 2.0**-_LIFT, x)


def _step(m, n: int, small):
    """m / n rounded once, also where the unlifted quotient is denormal (a multiple of 2^-149)."""
    size = jnp.abs(m)
    d = size / jnp.where(size < jnp.inf, np.float32(n), np.float32(1))  # see the module's note
    units = (size * 2.0**-_GRID).astype(jnp.int32)  # used below n 2^23, where it is exact
    whole = units // n
    twice = 2 * (units - whole * n)
    whole += ((twice > n) | ((twice == n) & (whole % 2 == 1))).astype(jnp.int32)
    denormal = small & (d < 2.0 ** (-126 + _LIFT))
    d = jnp.where(denormal, whole.astype(jnp.float32) * 2.0**_GRID, d)
    return _float(_bits(d) | (_bits(m) & _SIGN))


def _inverse(d, small):
    """(1/d or 0, whether 1/d of the unlifted d overflows).

    The reference then converts an infinity or NaN to an integer, which C leaves undefined and x86
    makes zero. We store zero; d is zero in float16, so such a block decodes to zero anyhow.
    """
    inverse = jnp.where(d == 0, 0.0, 1 / jnp.where(d == 0, 1.0, d))
    lost = small & (jnp.abs(inverse) >= 2.0 ** (128 - _LIFT))
    return inverse, lost


def _values_of(codes: UInt8[Array, "*n"]) -> Float[Array, "*n"]:
    return codebook.lookup(jnp.asarray(IQ4_NL, jnp.float32), codes)


def _in_order(terms):
    """Sum of a block first to last, as the reference's loop adds."""
    terms = jax.lax.optimization_barrier(terms)  # or products would be fused into the sums
    total = terms[..., :1]
    for i in range(1, BLOCK):
        total = total + terms[..., i : i + 1]
    return total
