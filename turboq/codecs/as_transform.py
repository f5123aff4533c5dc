"""Codecs of one rotation and one table as the `transform` that stores and decodes the same.

    mean + scale R^T c(R (x - mean) / scale)  =  mean + S (gain * c(A (x - mean) / gain)),
    A = R,  S = R^T,  gain = scale

So TurboQuant and `per_head` lie in the pool of columns (`turboq.cache.model_cache`) beside learned
plans, bit for bit in their own bytes. Sizes are rounded in another order: a value at a threshold,
or a scale between two float16 numbers, may be stored as its neighbour.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from turboq.cache.layer import HeadGroup, KVLayer
from turboq.codecs.base import Arrays, Codec
from turboq.codecs.per_head import PerHead, inverse
from turboq.codecs.transform import Transform
from turboq.codecs.turboquant_mse import TurboQuantMSE


def layer_as_transforms(layer: KVLayer) -> KVLayer:
    """The layer with such codecs as transforms; others as they are."""

    def group(old: HeadGroup) -> HeadGroup:
        k, k_arrays = as_transform(old.k, old.k_arrays, len(old.heads))
        v, v_arrays = as_transform(old.v, old.v_arrays, len(old.heads))
        return dataclasses.replace(old, k=k, v=v, k_arrays=k_arrays, v_arrays=v_arrays)

    return dataclasses.replace(layer, groups=tuple(group(g) for g in layer.groups))


def as_transform(codec: Codec, arrays: Arrays, heads: int) -> tuple[Codec, Arrays]:
    """The transform and its arrays [heads, ...]; what is given where there is none.

    There is none of a scale that is no plain float16 root mean square, nor of dims in odd bytes.
    """
    if not isinstance(codec, TurboQuantMSE | PerHead) or codec.dim % 8:
        return codec, arrays
    static = isinstance(codec, PerHead) and codec.scale == "head"
    if codec.scale_rule != "raw" or not (static or codec.scale_dtype == "float16"):
        return codec, arrays

    def every(x):
        return jnp.broadcast_to(jnp.asarray(x, jnp.float32), (heads, *x.shape))

    turn = every(codec.turn.matrix)
    size = arrays["scale"][:, None, None] if static else jnp.ones((heads, 1, 1), jnp.float32)
    table = arrays["codebook"] if "codebook" in arrays else every(codec.codebook_of({}))
    transform = Transform(
        dim=codec.dim, segments=((codec.dim, codec.bits),), codebook="fitted",
        gain="none" if static else "float16",
    )  # fmt: skip
    return transform, {
        "mean": arrays.get("mean", jnp.zeros((heads, codec.dim), jnp.float32)),
        "analysis": turn * inverse(size),
        "synthesis": jnp.swapaxes(turn, 1, 2) * size,
        "codebook0": table,
    }
