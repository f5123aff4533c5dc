"""Steps of the Triton encode kernel: a float32 product on bfloat16 units, codes, words of bits.

A float32 number has 24 significant bits, which three bfloat16 numbers of 8 bits each hold exactly:
a = a0 + a1 + a2, every one cut from what the ones before left. Of the nine products the kernel adds
six, the small ones apart from a0 x0:

    a x = a0 x0 + (a0 x1 + a1 x0 + a0 x2 + a1 x1 + a2 x0) + at most 2**-20.9 |a x|

so the product is as exact as sums in float32 are, at six products of the matrix units (tf32 would
keep 11 bits).

Arrays are [tokens, channels] here: reductions of `turboq.numbers.scale` run along the last axis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from turboq.codecs.writing import Writing
from turboq_kernels.triton_memory import three

_UNROLLED = 16  # levels up to which steps are unrolled


def product(
    left: Callable[[Any], Array], right: Callable[[Any], Array], blocks: int, shape: tuple[int, int]
) -> Float[Array, "N C"]:
    """sum_k right(k) [N, K] left(k).T, left(k) being [C, K], float32; `shape` is (C, N)."""

    def step(k, carry):
        main, small = carry
        a, x = three(left(k)), three(right(k))
        for i, j in ((2, 0), (1, 1), (0, 2), (1, 0), (0, 1)):
            small += _dot(a[i], x[j])
        return main + _dot(a[0], x[0]), small

    zero = jnp.zeros(shape, jnp.float32)
    main, small = jax.lax.fori_loop(0, blocks, step, (zero, zero))
    return (main + small).T


def _dot(a: Array, x: Array) -> Float[Array, "C N"]:
    """a [C, K] x [N, K].T, summed in float32."""
    return jax.lax.dot_general(a, x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def count_up(steps: int, body: Callable, carry: Any) -> Any:
    """body(0, carry), body(1, ...), ...: unrolled if they are few."""
    if steps >= _UNROLLED:
        return jax.lax.fori_loop(0, steps, body, carry)
    for k in range(steps):
        carry = body(k, carry)
    return carry


def choose_gain(
    rms: Float[Array, "N"], gain_at: Callable[[Any], Array], gains: int
) -> tuple[Int[Array, "N"], Float[Array, "N"]]:
    """Index and value of the gain whose neighbourhood (on a logarithmic scale) holds rms."""

    def step(k, carry):
        index, gain = carry
        low, high = gain_at(k), gain_at(k + 1)
        above = rms > jnp.sqrt(high * low)
        return index + above.astype(jnp.int32), jnp.where(above, high, gain)

    first = (jnp.zeros(rms.shape, jnp.int32), jnp.zeros(rms.shape, jnp.float32) + gain_at(0))
    return count_up(gains - 1, step, first)


def choose_levels(
    u: Float[Array, "N C"], writing: Writing, tables: list[Callable[[Any], Array]]
) -> tuple[Int[Array, "N C"], Float[Array, "N C"]]:
    """Codes and their levels; of channels past the last part level 0."""
    channels = jnp.arange(u.shape[1], dtype=jnp.int32)
    most = max((2**part.bits for part in writing.parts), default=1)
    alike = len(writing.parts) == 1 and writing.parts[0].width == u.shape[1]

    def along(k, step: bool):
        """Of every channel level k, or the threshold between levels k and k + 1."""
        found = jnp.full(channels.shape, jnp.inf if step else 0.0, jnp.float32)
        for part, start, table in zip(writing.parts, writing.starts, tables, strict=True):
            last = 2**part.bits - 1
            low = table(jnp.minimum(k, last))
            value = 0.5 * (table(jnp.minimum(k + 1, last)) + low) if step else low
            if alike:
                return value
            inside = (channels >= start) & (channels < start + part.width)
            if step:
                inside &= k < last
            found = jnp.where(inside, value, found)
        return found[None, :]

    def step(k, carry):
        codes, values = carry
        above = u > along(k, True)
        return codes + above.astype(jnp.int32), jnp.where(above, along(k + 1, False), values)

    first = jnp.zeros(u.shape, jnp.float32) + along(0, False)
    return count_up(most - 1, step, (jnp.zeros(u.shape, jnp.int32), first))


def words_of(codes: Int[Array, "N C"], plane: int) -> UInt32[Array, "C"]:
    """Words of one plane, token n at bit n."""
    place = jnp.uint32(1) << jnp.arange(codes.shape[0], dtype=jnp.uint32)
    bits = ((codes >> plane) & 1).astype(jnp.uint32)
    return jnp.sum(bits * place[:, None], axis=0, dtype=jnp.uint32)
