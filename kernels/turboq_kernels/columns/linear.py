"""A layer of the one pool as a matrix: what each of its stored bits adds to a key or a value.

    x_hat = mean + gain * sum over lanes l of the head of  matrix[:, l] (bit_l - 1/2)

for `transform` with a window code (`turboq.numbers.window`), whose points lie evenly about zero.
Lanes count from `first`, a multiple of 128 at or before the layer's own: what lies there besides is
of other heads and layers, with zeros in the matrix. Bits per head are data, so one kernel reads all
plans of a geometry.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from turboq.cache.columns import NONE, Columns
from turboq.cache.model_cache import LayerForm
from turboq.codecs.base import Arrays
from turboq.codecs.transform_padded import PaddedTransform
from turboq.numbers import window

LANES = 128
GAIN_BITS = 4  # the most that a stored gain may have


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearSide:
    """K or V of a layer, W lanes."""

    matrix: Any  # float32 [D, W]; zero where a lane is none of this side's codes
    head: Any  # int32 [W]: the KV head of a code's lane, NONE of any other
    mean: Any  # float32 [N, D]
    gains: Any  # float32 [N, 16]: of every stored gain; ones without
    start: Any  # int32 [N]: the first of a head's lanes
    count: Any  # int32 [N]: how many follow each other
    tile_head: Any  # int32 [W / 128]: the first head that has lanes in a tile
    most: int = dataclasses.field(metadata={"static": True})  # no head has more lanes
    slots: int = dataclasses.field(metadata={"static": True})  # no tile has lanes of more heads


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearLayer:
    """A layer as kernels read it; `gain_weights` makes (gain of K) + 16 (gain of V) of its bits."""

    k: LinearSide
    v: LinearSide
    first: Any  # int32 [2], lanes of the pool, multiples of 128
    gain_lane: Any  # int32 [], a multiple of 128: where in K's lanes the gains begin
    gain_weights: Any  # int32 [N, lanes from there on]
    gain_lanes: Any  # int32 [2, N, 4]: lane of the pool of each bit of K's and V's gain, or NONE
    gained: bool = dataclasses.field(metadata={"static": True})


def unsupported(form: LayerForm) -> str | None:
    """Why a layer has no such form, or None."""
    if form.layer.latent:
        return "latent attention: queries meet values too"
    if form.layer.joint_heads is not None:
        return "joined heads: a key needs the bits of other heads and of values (--joint=none)"
    for codec, arrays in zip(form.codecs, (form.group.k_arrays, form.group.v_arrays), strict=True):
        if codec.quantizer != "window":
            return f"{codec.quantizer} codes are not linear in their bits; window codes are"
        if codec.gain == "float16":
            return "a float16 gain per vector; coded gains are read"
        if codec.gain == "code" and arrays["gains"].shape[-1] > 1 << GAIN_BITS:
            return f"{arrays['gains'].shape[-1]} gains; up to {1 << GAIN_BITS} are read"
    return None


def run_lanes(form: LayerForm, pool_lanes: int) -> tuple[int, int]:
    """Lanes that are read of the runs of K and V: any layer's, with what alignment adds."""
    k, v = (min(_up(most + LANES - 1), _up(pool_lanes)) for most in form.most)
    return k, v


def _up(lanes: int) -> int:
    return -(-lanes // LANES) * LANES


@jax.jit(static_argnames="pool_lanes")
def linear_layer(form: LayerForm, *, pool_lanes: int) -> LinearLayer:
    """The matrices of a layer in a pool of so many lanes; once per plan.

    Raises:
      ValueError: no such form (`unsupported`).
    """
    reason = unsupported(form)
    if reason is not None:
        raise ValueError(reason)
    widths = run_lanes(form, pool_lanes)
    first = [
        jnp.minimum(form.first[i] // LANES * LANES, _up(pool_lanes) - widths[i]) for i in range(2)
    ]
    group, (k, v) = form.group, form.codecs
    gained = k.gain == "code" or v.gain == "code"
    # Gains are the first columns of a layer.
    lanes = min(_up(2 * GAIN_BITS * len(group.heads) + LANES - 1), widths[0])
    gain_lane = jnp.minimum((form.first[0] - first[0]) // LANES * LANES, widths[0] - lanes)
    weights = jnp.zeros((len(group.heads), lanes), jnp.int32)
    for codec, columns, worth in ((k, form.k, 1), (v, form.v, 1 << GAIN_BITS)):
        if codec.gain == "code":
            weights = weights + _gain_weights(codec, columns, first[0] + gain_lane, lanes) * worth
    slots = (LANES - 2) // form.fewest + 2
    return LinearLayer(
        k=_side(k, group.k_arrays, form.k, first[0], widths[0], slots),
        v=_side(v, group.v_arrays, form.v, first[1], widths[1], slots),
        first=jnp.stack(first),
        gain_lane=gain_lane,
        gain_weights=weights,
        gain_lanes=jnp.stack([_gain_lanes(c, at) for c, at in ((k, form.k), (v, form.v))]),
        gained=gained,
    )


def _side(
    codec: PaddedTransform, arrays: Arrays, columns: Columns, first: Array, width: int, slots: int
) -> LinearSide:
    codes = (columns.plane != NONE) & (columns.entry < codec.dim)
    each = jax.vmap(_columns)(arrays, jnp.asarray(columns.entry), jnp.asarray(columns.plane))
    lane = jnp.where(codes, columns.lane - first, width)  # dropped
    matrix = jnp.zeros((codec.dim, width), jnp.float32)
    heads = jnp.broadcast_to(jnp.arange(len(lane), dtype=jnp.int32)[:, None], lane.shape)
    gains = jnp.ones((len(lane), 1 << GAIN_BITS), jnp.float32)
    if codec.gain == "code":
        gains = jnp.pad(arrays["gains"], ((0, 0), (0, gains.shape[1])))[:, : gains.shape[1]]
    head = jnp.full(width, NONE, jnp.int32).at[lane].set(heads, mode="drop")
    tiles = jnp.where(head == NONE, len(lane) - 1, head).reshape(-1, LANES)
    return LinearSide(
        matrix=matrix.at[:, lane].set(jnp.moveaxis(each, 1, 0), mode="drop"),
        head=head,
        tile_head=jnp.min(tiles, axis=1),
        mean=arrays["mean"],
        gains=gains,
        start=jnp.min(jnp.where(codes, lane, jnp.iinfo(jnp.int32).max), axis=1),
        count=jnp.sum(codes, axis=1, dtype=jnp.int32),
        most=lane.shape[1],
        slots=min(slots, len(lane)),
    )


def _columns(arrays: Arrays, entry: Array, plane: Array) -> Float[Array, "D T"]:
    """What a bit of each column adds to x_hat, of one head."""
    step, own = arrays["step"], window.band(arrays["taps"])
    line = jnp.where(
        jnp.arange(len(step), dtype=jnp.int32)[:, None] == entry[None],
        (step[entry] * jnp.exp2(plane.astype(jnp.float32) - 1.0))[None],
        0.0,
    )
    values = jnp.where(plane[None] == 0, 2.0 * own[:, entry], line)
    return jnp.matmul(arrays["synthesis"], values, precision=jax.lax.Precision.HIGHEST)


def _gain_weights(codec: PaddedTransform, columns: Columns, first: Array, width: int) -> Array:
    """2^p at the lanes of bit p of every head's gain, int32 [N, W]."""
    gain = (columns.plane != NONE) & (columns.entry >= codec.dim)
    lane = jnp.where(gain, columns.lane - first, width)
    head = jnp.arange(len(lane), dtype=jnp.int32)[:, None]
    worth = jnp.left_shift(1, jnp.maximum(columns.plane, 0))
    return jnp.zeros((len(lane), width), jnp.int32).at[head, lane].set(worth, mode="drop")


def _gain_lanes(codec: PaddedTransform, columns: Columns) -> Array:
    """Lane of the pool of bit p of every head's gain, int32 [N, 4]; NONE where it has none."""
    gain = (columns.plane != NONE) & (columns.entry >= codec.dim)
    if codec.gain != "code":
        gain = jnp.zeros_like(gain)
    plane = jnp.where(gain, columns.plane, GAIN_BITS)  # dropped
    head = jnp.arange(len(plane), dtype=jnp.int32)[:, None]
    out = jnp.full((len(plane), GAIN_BITS), NONE, jnp.int32)
    return out.at[head, plane].set(columns.lane, mode="drop")
