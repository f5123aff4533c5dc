"""What the encode kernels compute, in XLA and in their order: the oracle they are tested against.

The XLA path itself is the codec's own `encode` (`cache.contiguous.write`); this is the same from a
`turboq.codecs.writing.Writing` alone, as a kernel sees it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from turboq.codecs.scalar import dot
from turboq.codecs.writing import WriteTables, Writing
from turboq.numbers import codebook as codebooks
from turboq.numbers import scale as scales
from turboq_kernels.encode.types import word_fields


def encode(
    writing: Writing, tables: WriteTables, x: Float[Array, "B N T D"]
) -> tuple[tuple[UInt8[Array, "B N T w"], ...], tuple[Float[Array, "B N T"], ...]]:
    """Codes of every field of words, and the numbers of every field of `writing.rows`, float32."""

    def one(tables, x):
        return _of_head(writing, tables, x)

    return jax.vmap(jax.vmap(one), in_axes=(None, 0))(tables, x)


def _of_head(writing: Writing, tables: WriteTables, x: Float[Array, "T D"]):
    y = dot(x.astype(jnp.float32) - tables.mean[None, :], tables.matrix.T)
    u, gain, rows = y, jnp.ones(len(y), jnp.float32), []
    if writing.gain == "rms":
        u, gain = scales.unit_rms(y)
    elif writing.gain == "code":
        rms = jnp.sqrt(jnp.mean(jnp.square(y), axis=-1))
        edges = jnp.sqrt(tables.gains[1:] * tables.gains[:-1])
        index = jnp.sum(rms[:, None] > edges[None, :], axis=-1, dtype=jnp.int32)
        gain = tables.gains[index]
        u = y / gain[:, None]
        rows.append(index.astype(jnp.float32))
    pieces = [
        u[:, start : start + part.width]
        for start, part in zip(writing.starts, writing.parts, strict=True)
    ]
    codes = [codebooks.nearest(t, piece) for t, piece in zip(tables.levels, pieces, strict=True)]
    values = [codebooks.lookup(t, c) for t, c in zip(tables.levels, codes, strict=True)]
    residual = u
    if writing.parts and writing.gain == "rms":
        c = jnp.concatenate(values, axis=-1)
        scale = scales.vector_scale(writing.rule, u, c, gain).astype(writing.dtype)
        rows.append(scale.astype(jnp.float32))
        ratio = rows[-1] / jnp.where(gain == 0, 1.0, gain)
        residual = u - ratio[:, None] * c
    if writing.signs is not None:
        codes.append((dot(residual, tables.sketch.T) >= 0).astype(jnp.uint8))
        norm = jnp.sqrt(jnp.sum(residual * residual, axis=-1))
        gamma = (norm * gain * x.shape[-1] ** -0.5).astype(writing.dtype)
        rows.append(gamma.astype(jnp.float32))
    assert len(codes) == len(word_fields(writing)), (len(codes), writing)
    return tuple(codes), tuple(rows)
