"""A new token in the coordinates that a codec codes, within `turboq_append` on a GPU.

    key    R(-p0) k - (R(p - p0) - I) mean                 `turboq.cache.key_form`
    apart  y = analysis (x - mean), x a key or a value
    joined y = scale (analysis (x - center)),  x all keys, then all values of the unit's group

the last of the unit's own rows, which follow each other in order (`turboq.cache.joint`). So no unit
passes memory, and a vector is coded by the program that makes it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from turboq.cache.layer import KVLayer
from turboq.numbers import rope as rotary
from turboq.numbers.rope import Rope
from turboq_kernels.triton_memory import load

_BLOCK = 32  # channels of a step of the product


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stands:
    """How a layer's keys and values are stored: turned within blocks, `joined` heads (0: apart)."""

    rope: Rope | None
    block: int
    joined: int


def stands(layer: KVLayer) -> Stands:
    return Stands(rope=layer.rope, block=layer.rope_block, joined=layer.joint_heads or 0)


def inputs(layer: KVLayer, k, v, positions: Int[Array, "B"]) -> dict[str, Any]:
    """What `coordinates` reads of all heads: k [B, K, 1, D], v and arrays of the layer."""
    out = {"k": k, "v": v, "joint": layer.joint}
    if layer.rope is None:
        return out
    offset = positions % layer.rope_block
    angles = jnp.stack([positions - offset, offset])
    return out | {"turns": turns(layer.rope, angles)}


def turns(rope: Rope, positions: Int[Array, "*n"]) -> Float[Array, "*n H 2"]:
    """Cosines and sines of `rope.tables`, in one launch."""
    return jnp.stack(rotary.tables(rope, positions), axis=-1)


def partner(rope: Rope, channels: Array) -> tuple[Array, Array, Array, Array]:
    """Of channels: their pair, its other channel, the sign of that one's sine, which do turn.

    R(p) x = x cos + sign other sin, and R(-p) with the sign reversed.
    """
    half, turning = rope.dim // 2, channels < rope.dim
    if rope.layout == "half":
        pair, second = channels % half, channels >= half
        other = jnp.where(second, channels - half, channels + half)
    else:
        pair, second, other = channels // 2, channels % 2 == 1, channels ^ 1
    return pair, jnp.where(turning, other, channels), jnp.where(second, 1.0, -1.0), turning


def coordinates(
    x: dict[str, Any], arrays, side: int, b, n, channel: Int[Array, "P"], coded: int, how: Stands
) -> Float[Array, "P"]:
    """y of K (side 0) or V of head n, or of the unit in its place; 0 where nothing is coded."""
    if how.joined:
        return _joined(x, arrays, side, b, n, channel, coded, how)
    mask = channel < coded

    def step(at, inside):
        token = _key(x, arrays["mean"], b, n, at, inside, how) if side == 0 else (
            load(x["v"], (b, n, 0, at), inside).astype(jnp.float32)
        )  # fmt: skip
        token -= load(arrays["mean"], (n, at), inside)
        rows = (n, channel[:, None], at[None, :])
        return load(arrays["analysis"], rows, mask[:, None] & inside[None, :]) * token[None, :]

    return jnp.sum(_over(x["kv"[side]].shape[3], channel.shape[0], step), axis=1)


def _joined(x, arrays, side: int, b, n, channel, coded: int, how: Stands) -> Float[Array, "P"]:
    joint, (group, place) = x["joint"], (n // how.joined, n % how.joined)
    k_dim, v_dim = x["k"].shape[3], x["v"].shape[3]
    values = how.joined * k_dim
    first = place * k_dim if side == 0 else values + place * v_dim
    width = joint["coded"].shape[1]
    every = jnp.arange(pl.next_power_of_2(width), dtype=jnp.int32)
    before = (load(joint["coded"], (group, every), every < width) < first) & (every < width)
    row = jnp.sum(before.astype(jnp.int32)) + channel
    there = (channel.astype(jnp.float32) < arrays["coded"][n]) & (channel < coded)

    def product(token, at, inside):
        token -= load(joint["center"], (group, at), inside)
        token *= load(joint["analysis_channels"], (group, at), inside)
        mask = there[:, None] & inside[None, :]
        rows = load(joint["analysis"], (group, row[:, None], at[None, :]), mask)
        return rows.astype(jnp.float32) * token[None, :]

    def of_key(h, at, inside):
        token = _key(x, joint["mean"], b, group * how.joined + h, at, inside, how)
        return product(token, h * k_dim + at, inside)

    def of_value(h, at, inside):
        head = group * how.joined + h
        token = load(x["v"], (b, head, 0, at), inside).astype(jnp.float32)
        return product(token, values + h * v_dim + at, inside)

    total = _over(k_dim, channel.shape[0], of_key, how.joined)
    total += _over(v_dim, channel.shape[0], of_value, how.joined)
    scale = load(joint["analysis_scale"], (group, row), there)
    return jnp.sum(total, axis=1) * scale


def _over(dim: int, rows: int, step, heads: int | None = None) -> Float[Array, "P _"]:
    """The sum of step(head, channels, which are real), or without heads of step(channels, real)."""
    # Half as many of joined heads, whose int8 numbers take more registers while they are turned
    # into float32: eight bytes were spilled.
    block = min(_BLOCK if heads is None else _BLOCK // 2, pl.next_power_of_2(dim))
    each = -(-dim // block)

    def body(i, total):
        # `//` chooses between two literals, which Pallas takes for one bit.
        head, place = (of(i, jnp.int32(each)) for of in (jax.lax.div, jax.lax.rem))
        at = place * block + jnp.arange(block, dtype=jnp.int32)
        inside = at < dim
        return total + (step(at, inside) if heads is None else step(head, at, inside))

    zero = jnp.zeros((rows, block), jnp.float32)
    return jax.lax.fori_loop(0, each * (heads or 1), body, zero)


def _key(x, mean, b, h, at, inside, how: Stands) -> Float[Array, "_"]:
    """Channels of a head's key as it is stored; `mean` has that of heads side by side."""
    k = load(x["k"], (b, h, 0, at), inside).astype(jnp.float32)
    if how.rope is None:
        return k
    pair, other, sign, turning = partner(how.rope, at)
    turning &= inside

    def turned(own, across, which: int, sign):
        cos, sin = (load(x["turns"], (which, b, pair, i), turning) for i in range(2))
        return own * cos + sign * across * sin

    whole = turned(k, load(x["k"], (b, h, 0, other), inside).astype(jnp.float32), 0, -sign)
    if how.block > 1:
        each, dim = max(how.joined, 1), x["k"].shape[3]
        group, first = h // each, h % each * dim
        own, across = (load(mean, (group, first + c), inside) for c in (at, other))
        whole -= turned(own, across, 1, sign) - own
    return jnp.where(turning, whole, k)
