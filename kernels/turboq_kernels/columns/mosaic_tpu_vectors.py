"""A new token of every sequence in the coordinates that codecs code, within `turboq_append` on TPU.

    key    R(-p0) k - (R(p - p0) - I) mean                 `turboq.cache.key_form`
    apart  y = analysis (x - mean), x a key or a value
    joined y = scale (analysis (channels (x - center))),   x all keys, then all values of a group

Channels meet the one that they turn with, and cosines their channels, by products with ones and
zeros: exact, and the same for every layout of a rotary embedding.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from turboq.numbers.rope import Rope
from turboq_kernels.columns.triton_token import partner
from turboq_kernels.encode.mosaic_tpu_search import spread

_FINITE = 1e30  # coordinates further out count as if they were there


def make(x: dict[str, Any], room: dict[str, Any], s) -> None:
    """Vectors of all groups as they are stored, less their centre, into `room["vectors"]`."""
    (dim, _), held, out = s.dims, x["joint"], room["vectors"]
    for h in range(s.heads):
        room["keys"][h, : s.batch] = room["k"]["tokens"][:, h, :]
    keys = room["keys"][...]
    if s.rope is not None:
        flat = keys.reshape(-1, dim)
        cos, sin = _by_channel(x["cosines"], 0, s.rope, dim)
        keys = keys * cos[None] - _others(flat, s.rope).reshape(keys.shape) * sin[None]
    swing = s.rope if s.block > 1 else None
    if swing is not None:
        cos, sin = _by_channel(x["cosines"], 1, swing, dim)
    for side, first in enumerate((0, (s.joined or 1) * dim)):
        for h in range(s.heads):
            own = keys[h, : s.batch] if side == 0 else room["v"]["tokens"][:, h, :]
            group, place = divmod(h, s.joined) if s.joined else (h + side * s.heads, 0)
            width = s.dims[side]
            start = first + place * width if s.joined else 0
            at = slice(start, start + width)
            row = slice(group, group + 1)
            if swing is not None and side == 0:
                mean = held["mean"][row, at] if s.joined else held["k"][h : h + 1]
                turned = mean * cos + _others(mean, swing) * sin
                own -= (turned - mean)[: s.batch]
            if s.joined:
                own = (own - held["center"][row, at]) * held["analysis_channels"][row, at]
            else:
                own -= held["kv"[side]][h : h + 1]
            out[group, : s.batch, at] = own


def _by_channel(cosines, which: int, rope: Rope, dim: int) -> tuple[Array, Array]:
    """Cosines and signed sines of all channels: R(p) x = x cos + other sin. [B', D] each."""
    cos, sin = (table[which] for table in cosines)
    shape = (cos.shape[1], dim)
    row, channel = (jax.lax.broadcasted_iota(jnp.int32, shape, i) for i in range(2))
    pair, _, sign, turning = partner(rope, channel)
    taken = jnp.where(turning & (row == pair), 1.0, 0.0)
    still = jnp.where(turning[:1], 0.0, 1.0)
    return _product(cos, taken) + still, _product(sin, taken * sign)


def _others(x: Float[Array, "n D"], rope: Rope) -> Float[Array, "n D"]:
    """The channel that each turns with."""
    dim = x.shape[1]
    row, channel = (jax.lax.broadcasted_iota(jnp.int32, (dim, dim), i) for i in range(2))
    return _product(x, (row == partner(rope, channel)[1]).astype(jnp.float32))


def turn(x: dict[str, Any], room: dict[str, Any], i, s) -> None:
    """Coordinates [rows, B'] of group i into `room["turned"]`, finite."""
    own, turns, out = room["vectors"][i], x["turns"], room["turned"]
    if s.joined:
        y = _by_int8(turns["both"][...], own)
        scale = x["joint"]["analysis_scale"]
        y *= spread(_row(scale, i), jnp.ones((1, y.shape[1]), jnp.float32))
    else:
        k, v = (
            _product(turns[side][...], own[:, :dim], (1, 1))
            for side, dim in zip("kv", s.dims, strict=True)
        )
        rows = max(s.dims)
        k, v = (
            jnp.concatenate([y, jnp.zeros((rows - len(y), y.shape[1]))]) if len(y) < rows else y
            for y in (k, v)
        )
        y = jnp.where(i < s.heads, k, v)
    rows = y.shape[0]
    out[i, :rows] = jnp.where(y == y, jnp.clip(y, -_FINITE, _FINITE), 0.0)
    out[i, rows:] = jnp.zeros((out.shape[1] - rows, y.shape[1]), jnp.float32)


def _row(ref, i) -> Array:
    """Row i of a few."""
    row = jax.lax.broadcasted_iota(jnp.int32, ref.shape, 0)
    return jnp.sum(jnp.where(row == i, ref[...], 0.0), axis=0, keepdims=True)


def _by_int8(matrix, own: Float[Array, "B C"]) -> Float[Array, "W B"]:
    """matrix x, where an int8 matrix meets three parts of 8 bits of every number."""
    whole, parts = matrix.astype(jnp.float32).astype(jnp.bfloat16), []
    for _ in range(3):
        part = own.astype(jnp.bfloat16)
        parts.append(
            jax.lax.dot_general(
                whole, part, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
            )
        )
        own -= part.astype(jnp.float32)
    return parts[0] + parts[1] + parts[2]


def _product(a: Array, b: Array, axes: tuple[int, int] = (1, 0)) -> Array:
    return jax.lax.dot_general(
        a, b, (((axes[0],), (axes[1],)), ((), ())), precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
