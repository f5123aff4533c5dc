"""A layer of the one pool as a matrix: what each of its stored bits adds to a key or a value.

    x_hat = mean + sum over lanes l of  gain[unit of l] matrix[:, l] (bit_l - 1/2)

for `transform` with a window code (`turboq.numbers.window`), whose points lie evenly about zero.
A unit is what one codec stores: K or V of a head, or of joined heads (`turboq.cache.joint`) a part
of all their keys and values, so that a key of one is a sum over all units of its group. Lanes count
from `first`, a multiple of 128 at or before the layer's own: what lies there besides is of other
heads and layers, with zeros in the matrix. Bits per unit are data, so one kernel reads all plans of
a geometry.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from turboq.cache import joint
from turboq.cache.columns import NONE, Columns
from turboq.cache.layer import KVLayer
from turboq.cache.model_cache import LayerForm
from turboq.codecs.base import Arrays
from turboq.codecs.transform_padded import PaddedTransform
from turboq.numbers import window
from turboq.numbers.rope import rotate

LANES = 128
GAIN_BITS = 4  # the most that a stored gain may have
HIGHEST = jax.lax.Precision.HIGHEST


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearSide:
    """K or V of a layer, W lanes of U units; G heads of a group, K heads in all."""

    # float32 [G, D, W], zero where a lane is none of this side's codes; None: keys are decoded.
    matrix: Any
    unit: Any  # int32 [W]: of a code's lane, NONE of any other
    mean: Any  # float32 [K, D]
    gains: Any  # float32 [U, 16]: of every stored gain; ones without
    start: Any  # int32 [U]: the first of a unit's lanes
    count: Any  # int32 [U]: how many follow each other
    tile_unit: Any  # int32 [W / 128]: the first unit that has lanes in a tile
    slots: int = dataclasses.field(metadata={"static": True})  # no tile has lanes of more units


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearLayer:
    """A layer as kernels read it: J groups of query rows, each with units of its own.

    Heads by themselves are J = K groups; K has a unit of each, V another, in runs of lanes of
    their own. Of joined heads both sides are read from the same lanes and units: those that take
    the heads' keys' places, then those of values. `gain_weights` makes (gain of K) + 16 (gain of V)
    of the bits of a head, or the gain of a unit.
    """

    k: LinearSide
    v: LinearSide
    means: Any  # float32 [K, P, D], of keys at each offset within a block; P = 1: none turns
    longest: Any  # float32 [K]: no column of K's matrix of a head is longer
    sums: Any  # float32 [K, D, _]: of K's columns over each unit of a head's group (`units_of`)
    first: Any  # int32 [2], lanes of the pool, multiples of 128
    gain_lane: Any  # int32 [], a multiple of 128: where in K's lanes the gains begin
    gain_weights: Any  # int32 [U, lanes from there on]
    gain_lanes: Any  # int32 [2, U, 4]: lane of the pool of each bit of a unit's gain, or NONE
    gained: bool = dataclasses.field(metadata={"static": True})
    unit_groups: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    widest: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # as of `LayerForm`
    joined: bool = dataclasses.field(default=False, metadata={"static": True})
    # float32 [P, W] of joined heads, what a lane adds to its own unit: where keys may be decoded.
    own: Any = None
    # `mosaic_tpu_decoded.Operands` or `triton_decoded.Decoded`, where keys are decoded.
    decoded: Any = None

    @property
    def groups(self) -> int:
        return group_count(self.unit_groups)

    def as_decoded(self, decoded: Any) -> LinearLayer:
        """For the kernel that reads `decoded`: without the matrices that it was made of."""
        k, v = (dataclasses.replace(side, matrix=None) for side in (self.k, self.v))
        return dataclasses.replace(self, k=k, v=v, own=None, decoded=decoded)


def unsupported(form: LayerForm) -> str | None:
    """Why a layer has no such form, or None."""
    if form.layer.latent:
        return "latent attention: queries meet values too"
    for codec, arrays in zip(form.codecs, (form.group.k_arrays, form.group.v_arrays), strict=True):
        if codec.quantizer != "window":
            return f"{codec.quantizer} codes are not linear in their bits; window codes are"
        if codec.gain == "float16":
            return "a float16 gain per vector; coded gains are read"
        if codec.gain == "code" and arrays["gains"].shape[-1] > 1 << GAIN_BITS:
            return f"{arrays['gains'].shape[-1]} gains; up to {1 << GAIN_BITS} are read"
    return None


def unit_groups(form: LayerForm) -> tuple[int, ...]:
    """The group of query rows that reads each unit."""
    heads, joined = len(form.group.heads), form.layer.joint_heads
    if joined is None:
        return tuple(range(heads))
    return tuple(h // joined for h in range(heads)) * 2


def units_of(unit_groups: tuple[int, ...]) -> np.ndarray:
    """The unit at each place of every group [J, p]: of joined heads those of K, then those of V."""
    own = np.asarray(unit_groups)
    return np.stack([np.flatnonzero(own == j) for j in range(group_count(unit_groups))])


def group_count(unit_groups: tuple[int, ...]) -> int:
    """Groups of query rows."""
    return max(unit_groups) + 1


def run_lanes(form: LayerForm, pool_lanes: int) -> tuple[int, int]:
    """Lanes that are read for K and V: any layer's, with what alignment adds."""
    most = form.most if form.layer.joint_heads is None else (sum(form.most),) * 2
    k, v = (min(_up(n + LANES - 1), _up(pool_lanes)) for n in most)
    return k, v


def gain_lanes(heads: int, width: int) -> int:
    """Lanes that are read for gains, of K's `width`."""
    return min(_up(2 * GAIN_BITS * heads + LANES - 1), width)


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
    joined, groups = form.layer.joint_heads is not None, unit_groups(form)
    widths = run_lanes(form, pool_lanes)
    first = [
        jnp.minimum(form.first[0 if joined else i] // LANES * LANES, _up(pool_lanes) - widths[i])
        for i in range(2)
    ]
    group, (k, v) = form.group, form.codecs
    # Gains are the first columns of a layer.
    lanes = gain_lanes(len(group.heads), widths[0])
    gain_lane = jnp.minimum((form.first[0] - first[0]) // LANES * LANES, widths[0] - lanes)
    weights, lanes_of = [], []
    for codec, columns in ((k, form.k), (v, form.v)):
        weight = jnp.zeros((len(group.heads), lanes), jnp.int32)
        if codec.gain == "code":
            weight = _gain_weights(codec, columns, first[0] + gain_lane, lanes)
        weights.append(weight)
        lanes_of.append(_gain_lanes(codec, columns))
    slots = min((LANES - 2) // form.fewest + 2, len(groups))
    sides = [
        _side(k, group.k_arrays, form.k, first[0], widths[0], slots),
        _side(v, group.v_arrays, form.v, first[1], widths[1], slots),
    ]
    rest, own = jnp.zeros_like(sides[0].mean), None
    if joined:
        own = _own(*(side.matrix[0] for side in sides))
        sides, rest = _joined(form, *sides)
        lanes_of = [jnp.concatenate(lanes_of)] * 2
        weights = jnp.concatenate(weights)
    else:
        weights = weights[0] + (weights[1] << GAIN_BITS)
    longest, sums = _of_units(sides[0].matrix, sides[0].unit, units_of(groups))
    return LinearLayer(
        k=sides[0], v=sides[1], means=_means(form.layer, sides[0].mean, rest), longest=longest,
        sums=sums, first=jnp.stack(first), gain_lane=gain_lane,
        gain_weights=weights, gain_lanes=jnp.stack(lanes_of),
        gained=k.gain == "code" or v.gain == "code", unit_groups=groups,
        widest=form.widest, joined=joined, own=own,
    )  # fmt: skip


def _own(k: Float[Array, "D W"], v: Float[Array, "E W"]) -> Float[Array, "P W"]:
    """Both sides' units, which have lanes of their own."""
    most = max(len(k), len(v))
    k, v = (jnp.pad(x, ((0, most - len(x)), (0, 0))) for x in (k, v))
    return k + v


def _side(
    codec: PaddedTransform, arrays: Arrays, columns: Columns, first: Array, width: int, slots: int
) -> LinearSide:
    """The units of one side by themselves: what each of their bits adds to its own unit."""
    codes = (columns.plane != NONE) & (columns.entry < codec.dim)
    each = jax.vmap(_columns)(arrays, jnp.asarray(columns.entry), jnp.asarray(columns.plane))
    lane = jnp.where(codes, columns.lane - first, width)  # dropped
    matrix = jnp.zeros((codec.dim, width), jnp.float32)
    units = jnp.broadcast_to(jnp.arange(len(lane), dtype=jnp.int32)[:, None], lane.shape)
    gains = jnp.ones((len(lane), 1 << GAIN_BITS), jnp.float32)
    if codec.gain == "code":
        gains = jnp.pad(arrays["gains"], ((0, 0), (0, gains.shape[1])))[:, : gains.shape[1]]
    unit = jnp.full(width, NONE, jnp.int32).at[lane].set(units, mode="drop")
    return LinearSide(
        matrix=matrix.at[:, lane].set(jnp.moveaxis(each, 1, 0), mode="drop")[None],
        unit=unit,
        tile_unit=_tile_unit(unit, len(lane)),
        mean=arrays.get("mean", jnp.zeros((len(lane), codec.dim), jnp.float32)),
        gains=gains,
        start=jnp.min(jnp.where(codes, lane, jnp.iinfo(jnp.int32).max), axis=1),
        count=jnp.sum(codes, axis=1, dtype=jnp.int32),
        slots=slots,
    )


def _of_units(
    matrix: Float[Array, "G D W"], unit: Array, units: np.ndarray
) -> tuple[Float[Array, "K"], Float[Array, "K D p"]]:
    """`LinearLayer.longest` and `sums`."""
    there = unit[None, None] == jnp.asarray(units, jnp.int32)[..., None]  # [J, p, W]
    norms = jnp.sqrt(jnp.sum(jnp.square(matrix), axis=1))
    longest = jnp.max(jnp.where(jnp.any(there, axis=1)[:, None], norms[None], 0.0), axis=-1)
    sums = jnp.einsum("gdw,jpw->jgdp", matrix, there.astype(jnp.float32), precision=HIGHEST)
    return longest.reshape(-1), sums.reshape(-1, *sums.shape[2:])


def _means(
    layer: KVLayer, turning: Float[Array, "K D"], rest: Float[Array, "K D"]
) -> Float[Array, "K P D"]:
    """R(t) turning + rest at every offset t of a block."""
    if layer.rope is None:
        return (turning + rest)[:, None]
    offsets = jnp.arange(layer.rope_block, dtype=jnp.int32)[None]
    shape = (len(turning), layer.rope_block, turning.shape[1])
    return rotate(layer.rope, jnp.broadcast_to(turning[:, None], shape), offsets) + rest[:, None]


def _tile_unit(unit: Array, units: int) -> Array:
    return jnp.min(jnp.where(unit == NONE, units - 1, unit).reshape(-1, LANES), axis=1)


def _joined(form: LayerForm, k: LinearSide, v: LinearSide) -> tuple[list[LinearSide], Array]:
    """Keys and values of joined heads over all units, [k; v] = mean + S [units of k; of v].

    Also what the units' own means add to that of keys.
    """
    heads, each = len(form.group.heads), form.layer.joint_heads
    assert each is not None
    mean, center, turn = form.layer.joint["mean"], form.layer.joint["center"], _whole(form)
    groups, own = len(mean), np.arange(heads) // each
    d, e = k.matrix.shape[1], v.matrix.shape[1]
    # S by unit: [U, C, D] and [U, C, E] of the group that has it.
    cut = each * d
    of_k = jnp.moveaxis(turn[:, :, :cut].reshape(groups, -1, each, d), 2, 1).reshape(heads, -1, d)
    of_v = jnp.moveaxis(turn[:, :, cut:].reshape(groups, -1, each, e), 2, 1).reshape(heads, -1, e)

    def columns(turns, side):
        """[C, W]: what a lane of these units adds to all keys and values of its group."""
        there = (side.unit[None] == jnp.arange(heads, dtype=jnp.int32)[:, None])[:, None]
        lanes = jnp.where(there, side.matrix, 0.0)  # [U, D, W]
        return jnp.einsum("ucd,udw->cw", turns, lanes, precision=HIGHEST)

    whole = columns(of_k, k) + columns(of_v, v)
    means = center + jnp.stack([
        jnp.einsum("ucd,ud->c", of_k[own == j], k.mean[own == j], precision=HIGHEST)
        + jnp.einsum("ucd,ud->c", of_v[own == j], v.mean[own == j], precision=HIGHEST)
        for j in range(groups)
    ])  # fmt: skip
    unit = jnp.where(v.unit == NONE, k.unit, v.unit + heads)
    shared = {
        "unit": unit, "tile_unit": _tile_unit(unit, 2 * heads), "slots": k.slots,
        "gains": jnp.concatenate([k.gains, v.gains]),
        "start": jnp.concatenate([k.start, v.start]), "count": jnp.concatenate([k.count, v.count]),
    }  # fmt: skip
    turning = mean[:, :cut].reshape(heads, d)
    sides = [
        LinearSide(matrix=whole[:cut].reshape(each, d, -1), mean=turning, **shared),
        LinearSide(
            matrix=whole[cut:].reshape(each, e, -1), mean=means[:, cut:].reshape(heads, e), **shared
        ),
    ]
    return sides, means[:, :cut].reshape(heads, d) - turning


def _whole(form: LayerForm) -> Float[Array, "J C C"]:
    """S of all coordinates of the units; zeros where nothing is coded."""
    turn, coded = joint.synthesis_of(form.layer), form.layer.joint["coded"]

    def group(turn, coded):
        return jnp.zeros((len(turn), len(turn)), jnp.float32).at[:, coded].set(turn, mode="drop")

    return jax.vmap(group)(turn, coded)


def _columns(arrays: Arrays, entry: Array, plane: Array) -> Float[Array, "D T"]:
    """What a bit of each column adds to x_hat, of one head."""
    step, own = arrays["step"], window.band(arrays["taps"])
    line = jnp.where(
        jnp.arange(len(step), dtype=jnp.int32)[:, None] == entry[None],
        (step[entry] * jnp.exp2(plane.astype(jnp.float32) - 1.0))[None],
        0.0,
    )
    values = jnp.where(plane[None] == 0, 2.0 * own[:, entry], line)
    if "synthesis" not in arrays:  # coordinates of joined heads
        return values
    return jnp.matmul(arrays["synthesis"], values, precision=HIGHEST)


def _gain_weights(codec: PaddedTransform, columns: Columns, first: Array, width: int) -> Array:
    """2^p at the lanes of bit p of every unit's gain, int32 [U, W]."""
    gain = (columns.plane != NONE) & (columns.entry >= codec.dim)
    lane = jnp.where(gain, columns.lane - first, width)
    head = jnp.arange(len(lane), dtype=jnp.int32)[:, None]
    worth = jnp.left_shift(1, jnp.maximum(columns.plane, 0))
    return jnp.zeros((len(lane), width), jnp.int32).at[head, lane].set(worth, mode="drop")


def _gain_lanes(codec: PaddedTransform, columns: Columns) -> Array:
    """Lane of the pool of bit p of every unit's gain, int32 [U, 4]; NONE where it has none."""
    gain = (columns.plane != NONE) & (columns.entry >= codec.dim)
    if codec.gain != "code":
        gain = jnp.zeros_like(gain)
    plane = jnp.where(gain, columns.plane, GAIN_BITS)  # dropped
    head = jnp.arange(len(plane), dtype=jnp.int32)[:, None]
    out = jnp.full((len(plane), GAIN_BITS), NONE, jnp.int32)
    return out.at[head, plane].set(columns.lane, mode="drop")
