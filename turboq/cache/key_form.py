"""How keys stand when they are stored: turned back to the start of their block of positions.

    x = R(-p0) k - (R(p - p0) - I) mu,   p0 = P floor(p / P), the first position of p's block

P = 1 is the key before its rotary embedding; no P at all is the key as it comes. A query at any
position meets all keys of a block as R(-p0) q, turned once per block, so a reader needs no rotary
embedding per key; the mean mu of unrotated keys, which a key carries as R(p - p0) mu within its
block, is taken off there and left to the codec as plain mu, so that what is coded has no part that
turns. mu is the codec's own `mean` array.

Source: this project's; Su et al. 2021 (arXiv 2104.09864) for R.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from turboq.cache.layer import KVLayer
from turboq.codecs.base import Arrays
from turboq.numbers.rope import Rope, rotate, unrotate


def to_stored(
    layer: KVLayer, arrays: Arrays, k: Float[Array, "B N T D"], positions: Int[Array, "#B T"]
) -> Float[Array, "B N T D"]:
    """Keys of the heads of `arrays` as a codec stores them, float32; without `rope` unchanged."""
    if layer.rope is None:
        return k
    at = positions[:, None]
    offset = at % layer.rope_block
    turned = unrotate(layer.rope, k, at - offset)
    return turned - swing(layer.rope, layer.rope_block, arrays, offset)


def from_stored(
    layer: KVLayer, arrays: Arrays, x: Float[Array, "B N T D"], positions: Int[Array, "#B T"]
) -> Float[Array, "B N T D"]:
    """The inverse of `to_stored`."""
    if layer.rope is None:
        return x
    at = positions[:, None]
    offset = at % layer.rope_block
    x = x + swing(layer.rope, layer.rope_block, arrays, offset)
    return rotate(layer.rope, x, at - offset)


def swing(
    rope: Rope, block: int, arrays: Arrays, offset: Int[Array, "B 1 T"]
) -> Float[Array, "#B #N #T D"] | float:
    """(R(offset) - I) mu of every head: what its mean turns within a block."""
    if block == 1:
        return 0.0
    mean = arrays["mean"].astype(jnp.float32)[None, :, None]
    shape = jnp.broadcast_shapes(mean.shape, (*offset.shape, 1))
    return rotate(rope, jnp.broadcast_to(mean, shape), offset) - mean
