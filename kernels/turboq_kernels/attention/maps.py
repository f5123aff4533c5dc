"""Into the coordinates of stored keys and out of those of values, as matrices.

    folded = q A,  bias = q . a           `Codec.reading_query`
    out = acc U + mass u                  `Codec.unfold_output`

Static gains are in A and U. A codec whose transform is no array of its own has one matrix for all
heads, a constant that is made while a program is traced; others give one a head, made in the
program.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from turboq.codecs.base import Arrays, Codec
from turboq.codecs.scalar import ScalarCodec
from turboq.codecs.transformed import TransformedCodec
from turboq_kernels import sides

# Codecs that turn as their settings say (unless an array "transform" does), if these methods, which
# take vectors into the space of codes and out of it, are their own.
_KINDS = (ScalarCodec, TransformedCodec)
_LINEAR = ("fold_query", "unfold_output", "reading_query", "forward", "backward")


class Map(NamedTuple):
    """`matrix` and what belongs to its constant term, or None where that is zero."""

    matrix: Float[Array, "#N A Z"]
    constant: Float[Array, "#N _"] | None


def of_queries(codec: Codec, arrays: Arrays, heads: int) -> Map:
    """A [D, C] and a [D]."""
    if arrays and turns(codec, arrays):
        matrix = _constant(lambda: codec.fold_query(_zeros(codec), jnp.eye(codec.dim))["q"])
        return Map(matrix[None], arrays.get("mean"))

    def made() -> Map:
        count = heads if arrays else 1
        eye = jnp.broadcast_to(jnp.eye(codec.dim), (1, count, codec.dim, codec.dim))
        matrix, offset = sides.fold(codec, arrays, eye)
        return Map(matrix[0], None if offset is None else offset[0])

    return made() if arrays else _constant(made)


def of_outputs(codec: Codec, arrays: Arrays, heads: int) -> Map:
    """U [C, E] and u [E]."""
    assert codec.reading is not None
    coded = codec.reading.width
    if arrays and turns(codec, arrays):
        matrix = _constant(
            lambda: codec.unfold_output(_zeros(codec), jnp.eye(coded), jnp.zeros((coded,)))
        )
        return Map(matrix[None], arrays.get("mean"))

    def made() -> Map:
        count, unfold = heads if arrays else 1, sides.of_heads(codec.unfold_output)
        gain = sides.gains(codec, arrays, count)
        rows = jnp.broadcast_to(jnp.eye(coded), (1, count, coded, coded))
        rows = rows if gain is None else rows * gain[None, :, :, None]
        matrix = unfold(arrays, rows, jnp.zeros(rows.shape[:3], jnp.float32))[0]
        none = jnp.zeros((1, count, 1, coded), jnp.float32)
        mean = unfold(arrays, none, jnp.ones((1, count, 1), jnp.float32))[0, :, 0]
        return Map(matrix, None if not arrays and not mean.any() else mean)

    return made() if arrays else _constant(made)


def turns(codec: Codec, arrays: Arrays) -> bool:
    """Whether all heads are turned alike, by one matrix, after a mean of their own is removed."""
    base = next((kind for kind in _KINDS if isinstance(codec, kind)), None)
    return not arrays or (
        base is not None
        and codec.reading is not None
        and all(part.levels == "table" for part in codec.reading.parts)
        and all(getattr(type(codec), n, None) is getattr(base, n, None) for n in _LINEAR)
        and "transform" not in arrays
    )


def _zeros(codec: Codec) -> Arrays:
    """No mean; what else is fitted does not matter to a codec that `turns`."""
    return {name: jnp.zeros(shape) for name, shape in codec.array_shapes.items()}


def _constant[T](made: Callable[[], T]) -> T:
    with jax.ensure_compile_time_eval():
        return made()
