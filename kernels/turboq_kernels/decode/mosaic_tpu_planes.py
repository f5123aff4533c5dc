"""Levels as sums over bit planes, so that the matrix unit does the table look-up.

Any table of b-bit codes is a sum over the parities of subsets of the code's bits (Walsh transform):

    level(code) = level(0) + sum_S v_S Y_S(code),   Y_S = XOR of the bits in S, in {0, 1}
    v_S = -2 / 2**b sum_code (-1)**Y_S(code) level(code)

A plane of parities is one XOR of stored words (32 tokens at once), and one AND with 0x01010101 << j
turns it into int8 of value 2**j (-128 for j = 7), one for each of four tokens. The real weights v_S
multiply the query (K) or the finished sums (V): levels are never rounded. An odd-symmetric table
(level(~code) = -level(code), as of Lloyd-Max for a symmetric density) has v_S = 0 for even |S|;
affine levels and signed integers have single bits only.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from turboq.codecs.reading import Part

MAX_TABLE_BITS = 4
FLOATS = ("e4m3", "e5m2")  # not sums over few planes: decoded to bfloat16


def subsets(part: Part, symmetric: bool = False) -> tuple[int, ...]:
    """Bit masks S of the planes a part needs, single bits first. Empty for floats.

    `symmetric` says of a table that level(~code) = -level(code).
    """
    if part.levels in FLOATS:
        return ()
    singles = [1 << i for i in range(part.bits)]
    if part.levels != "table":
        return tuple(singles)
    every = sorted(range(1, 2**part.bits), key=lambda s: (s.bit_count(), s))
    if symmetric:
        return tuple(s for s in every if s.bit_count() % 2)
    return tuple(every)


def weights(
    part: Part, planes: tuple[int, ...], table: jax.Array | None, heads: int
) -> tuple[jax.Array, jax.Array]:
    """(v [N, planes], level(0) [N]), float32; `planes` are the part's `subsets`."""
    if part.levels == "table":
        assert table is not None
        v = jnp.matmul(table, _walsh(part.bits, planes), precision=jax.lax.Precision.HIGHEST)
        return v, table[:, 0]
    if part.levels == "sign":
        v, first = [2.0], -1.0
    else:
        v, first = [float(s) for s in planes], 0.0
        if part.levels == "int8":
            v[-1] = -128.0
    v = jnp.broadcast_to(jnp.asarray(v, jnp.float32), (heads, len(planes)))
    return v, jnp.full((heads,), first, jnp.float32)


@functools.cache
def _walsh(bits: int, planes: tuple[int, ...]) -> np.ndarray:
    codes = range(2**bits)
    signs = [[(-1.0) ** (s & c).bit_count() for s in planes] for c in codes]
    return (-2.0 / 2**bits * np.asarray(signs)).astype(np.float32)


def parity(words: list[jax.Array], subset: int) -> jax.Array:
    """Y_S of the stored planes `words` (uint32)."""
    return functools.reduce(jnp.bitwise_xor, [w for i, w in enumerate(words) if subset >> i & 1])


def decode_float(levels: str, code: jax.Array) -> jax.Array:
    """float32 of 8-bit float codes (int32); NaN codes, which unused slots may hold, are numbers."""
    mantissa, bias = (3, 7) if levels == "e4m3" else (2, 15)
    magnitude = code & 0x7F
    normal = jax.lax.bitcast_convert_type(
        (magnitude << (23 - mantissa)) + ((127 - bias) << 23), jnp.float32
    )
    tiny = magnitude.astype(jnp.float32) * 2.0 ** (1 - bias - mantissa)
    value = jnp.where(magnitude < 2**mantissa, tiny, normal)
    return jnp.where(code < 128, value, -value)
