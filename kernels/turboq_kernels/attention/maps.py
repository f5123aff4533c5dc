"""Into the coordinates of stored keys and out of those of values, as matrices.

    folded = q A,  bias = q . a           `Codec.reading_query`
    out = acc U + mass u                  `Codec.unfold_output`

Static gains are in A and U. A codec without arrays has one matrix for all heads, a constant that
is made while a program is traced; others give one a head, made in the program.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from turboq.codecs.base import Arrays, Codec
from turboq_kernels import sides


class Map(NamedTuple):
    """`matrix` and what belongs to its constant term, or None where that is zero."""

    matrix: Float[Array, "#N A Z"]
    constant: Float[Array, "#N _"] | None


def of_queries(codec: Codec, arrays: Arrays, heads: int) -> Map:
    """A [D, C] and a [D]."""

    def made() -> Map:
        count = heads if arrays else 1
        eye = jnp.broadcast_to(jnp.eye(codec.dim), (1, count, codec.dim, codec.dim))
        matrix, offset = sides.fold(codec, arrays, eye)
        return Map(matrix[0], None if offset is None else offset[0])

    return _constant(made, arrays)


def of_outputs(codec: Codec, arrays: Arrays, heads: int) -> Map:
    """U [C, E] and u [E]."""
    assert codec.reading is not None
    coded = codec.reading.width

    def made() -> Map:
        count, unfold = heads if arrays else 1, sides.of_heads(codec.unfold_output)
        gain = sides.gains(codec, arrays, count)
        rows = jnp.broadcast_to(jnp.eye(coded), (1, count, coded, coded))
        rows = rows if gain is None else rows * gain[None, :, :, None]
        matrix = unfold(arrays, rows, jnp.zeros(rows.shape[:3], jnp.float32))[0]
        none = jnp.zeros((1, count, 1, coded), jnp.float32)
        mean = unfold(arrays, none, jnp.ones((1, count, 1), jnp.float32))[0, :, 0]
        return Map(matrix, None if not arrays and not mean.any() else mean)

    return _constant(made, arrays)


def _constant(made, arrays: Arrays) -> Map:
    if arrays:
        return made()
    with jax.ensure_compile_time_eval():
        return made()
