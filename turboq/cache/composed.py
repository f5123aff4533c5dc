"""Joined layers as they are stored and held: the turns of all units and the joint one are one
matrix each way, of int8.

A unit is coded by a transform of its own, u = A (y - nu), y_hat = nu + S' c(u), of W <= D
coordinates (another codec takes it whole: A = S' = 1, nu = 0). Behind the joint transform
y = S^-1 (x - mean) of G heads, with A, S' and nu of all their units on a diagonal each,

    u = A_c (x - center),        A_c = A S^-1  [W, C],      x_hat = center + S_c c(u),
    center = mean + S nu,        S_c = S S'    [C, W],      W coded coordinates of C in all,

so a layer holds 2 W C numbers of a group in the place of 2 C^2 and those of its units, and its
codecs code coordinates as they come (`turboq.codecs.coordinates`). Keys that turn with their
position do so about `mean` (`turboq.cache.joint`).

Both are int8 times a number of each coordinate and one of each channel,

    A_c = alpha Q_a a,     S_c = s Q_s sigma,

a^2 what an error of a channel costs, the diagonal of H = (S S^T)^-1, as an error of any coordinate
of y costs alike (`turboq.codecs.fit_joint`); s^2 how a channel varies, the diagonal of its
covariance Sigma. Without them one step of int8 serves channels whose entries differ by orders of
magnitude. Both are rounded by what errors cost (`turboq.numbers.rounding`), Q_a under a Sigma a
and Q_s under s H s. Everything is made in float64 when a plan is; files hold what memory does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from turboq.cache import joint
from turboq.cache.layer import HeadGroup, KVLayer
from turboq.codecs.base import Codec
from turboq.codecs.coordinates import Coordinates
from turboq.codecs.transform import Transform
from turboq.numbers import rounding

SCALES = ("analysis_scale", "analysis_channels", "synthesis_scale", "synthesis_channels")

Shapes = dict[str, tuple[tuple[int, ...], str]]  # of an array, and its type
Unit = tuple[Codec, Mapping[str, Any]]  # of one side of one head, with fitted arrays
_Turns = tuple[np.ndarray, np.ndarray, np.ndarray]  # A [W, D], S' [D, W], nu [D]; float64


def held(codec: Codec) -> Codec:
    """What codes a unit of joined heads."""
    return Coordinates.of(codec) if isinstance(codec, Transform) else codec


def width(codec: Codec) -> int:
    """Coordinates that a unit with this codec has: rows of A_c, columns of S_c."""
    return codec.coded if isinstance(codec, Transform) else codec.dim


def places(k: Sequence[Codec], v: Sequence[Codec], heads: int) -> Int[np.ndarray, "J W"]:
    """`coded`: the coordinate of each row of A_c, C for none.

    Units of every head's keys and values; coordinates of a group in order, those of keys first.
    """
    none, rows = heads * (k[0].dim + v[0].dim), []
    for first in range(0, len(k), heads):
        at, own = 0, []
        for codec in (*k[first : first + heads], *v[first : first + heads]):
            own += range(at, at + width(codec))
            at += codec.dim
        rows.append(own)
    out = np.full((len(rows), max(map(len, rows))), none, np.int32)
    for row, own in zip(out, rows, strict=True):
        row[: len(own)] = own
    return out


def shapes(k: Sequence[Codec], v: Sequence[Codec], heads: int) -> Shapes:
    """Arrays of a layer with such units of every head, as files hold them."""
    (groups, w), dim = places(k, v, heads).shape, heads * (k[0].dim + v[0].dim)
    channels, rows = ((groups, dim), "float32"), ((groups, w), "float32")
    return {
        "mean": channels, "center": channels, "coded": ((groups, w), "int32"),
        "analysis": ((groups, w, dim), "int8"),
        "analysis_scale": rows, "analysis_channels": channels,
        "synthesis": ((groups, dim, w), "int8"),
        "synthesis_scale": rows, "synthesis_channels": channels,
    }  # fmt: skip


def compose(
    k: Sequence[Unit], v: Sequence[Unit], heads: int, fitted: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The arrays of `shapes` from those of units and of `fit_joint`.

    `fitted` may have `variances` [J, C] of the coordinates of y; else all are 1.

    Raises:
      ValueError: S has no inverse.
    """
    mean, turn = (np.asarray(fitted[name], np.float64) for name in joint.ARRAYS)
    variances = np.asarray(fitted.get("variances", np.ones(mean.shape)), np.float64)
    back = joint.inverse(turn)
    k_codecs, v_codecs = ([codec for codec, _ in side] for side in (k, v))
    coded, due = places(k_codecs, v_codecs, heads), shapes(k_codecs, v_codecs, heads)
    made = {name: np.zeros(shape, kind) for name, (shape, kind) in due.items()}
    made |= {"mean": mean.astype(np.float32), "coded": coded}
    for name in SCALES:
        made[name][:] = 1.0
    for j, group in enumerate(back):
        units = [u for side in (k, v) for u in side[j * heads : (j + 1) * heads]]
        analysis, synthesis, nu = _whole(units, turn[j], group)
        made["center"][j], w = mean[j] + nu, len(analysis)
        varies, costs = (turn[j] * variances[j]) @ turn[j].T, group.T @ group
        a, s = _sizes(costs), _sizes(varies)
        q, made["analysis_scale"][j, :w] = _rounded(analysis, a, varies)
        made["analysis"][j, :w], made["analysis_channels"][j] = q, a
        q, made["synthesis_scale"][j, :w] = _rounded(synthesis.T, s, costs)
        made["synthesis"][j, :, :w], made["synthesis_channels"][j] = q.T, s
    return made


def _rounded(matrix: np.ndarray, channels: np.ndarray, metric: np.ndarray):
    """Q and rows: matrix ~ rows Q channels; an error e of a row costs e metric e^T."""
    own = rounding.Metric.of(metric * np.outer(channels, channels))
    return rounding.to_int8(matrix / channels, own)


def _sizes(metric: np.ndarray) -> np.ndarray:
    """The root of the diagonal; 1 where that is 0."""
    diagonal = np.diag(metric)
    return np.sqrt(np.where(diagonal > 0, diagonal, 1.0))


def _whole(units: Sequence[Unit], turn: np.ndarray, back: np.ndarray) -> _Turns:
    """A_c [W, C], S_c [C, W] and S nu [C] of a group."""
    down, up, nu, at = [], [], np.zeros(len(turn)), 0
    for codec, arrays in units:
        own = slice(at, at + codec.dim)
        a, s, mean = _turns(codec, arrays)
        down.append(a @ back[own])
        up.append(turn[:, own] @ s)
        nu += turn[:, own] @ mean
        at = own.stop
    return np.concatenate(down), np.concatenate(up, axis=1), nu


def join(layer: KVLayer, heads: int, fitted: Mapping[str, Any]) -> KVLayer:
    """The layer, its units those of so many heads by the fitted `joint.ARRAYS`, as it is held.

    Raises:
      ValueError: S has no inverse.
    """
    k, v = (_units(layer, side) for side in "kv")
    arrays = {n: jnp.asarray(x) for n, x in compose(k, v, heads, fitted).items()}
    return held_layer(dataclasses.replace(layer, joint_heads=heads, joint=arrays))


def held_layer(layer: KVLayer) -> KVLayer:
    """The layer with the codecs that code its units, arrays or not; of heads apart as it is."""
    if layer.joint_heads is None:
        return layer
    return dataclasses.replace(layer, groups=tuple(_group_held(g) for g in layer.groups))


def nbytes(layer: KVLayer) -> int:
    """Bytes of the arrays of `KVLayer.joint`, arrays there or not; 0 of heads apart."""
    if layer.joint_heads is None:
        return 0
    k, v = ([codec for codec, _ in _units(layer, side)] for side in "kv")
    stored = shapes(k, v, layer.joint_heads).values()
    return sum(int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in stored)


def as_wide(layers: Sequence[KVLayer]) -> list[KVLayer]:
    """Layers that join alike with as many coordinates each, zeros in some: one program."""
    most: dict[Any, int] = {}
    for layer in layers:
        if layer.joint:
            most[_alike(layer)] = max(most.get(_alike(layer), 0), layer.joint["coded"].shape[1])
    return [_widened(x, most[_alike(x)]) if x.joint else x for x in layers]


def _alike(layer: KVLayer) -> Any:
    return layer.joint_heads, layer.joint["mean"].shape


def _widened(layer: KVLayer, width: int) -> KVLayer:
    old = {name: np.asarray(x) for name, x in layer.joint.items()}
    more = (0, width - old["coded"].shape[1])
    if not more[1]:
        return layer
    fill = {"coded": old["mean"].shape[1], "analysis_scale": 1.0, "synthesis_scale": 1.0}
    new = {name: np.pad(old[name], ((0, 0), more), constant_values=x) for name, x in fill.items()}
    new["analysis"] = np.pad(old["analysis"], ((0, 0), more, (0, 0)))
    new["synthesis"] = np.pad(old["synthesis"], ((0, 0), (0, 0), more))
    return dataclasses.replace(layer, joint={n: jnp.asarray(x) for n, x in (old | new).items()})


def _turns(codec: Codec, arrays: Mapping[str, Any]) -> _Turns:
    """What a codec does to a unit."""
    if not isinstance(codec, Transform):
        return np.eye(codec.dim), np.eye(codec.dim), np.zeros(codec.dim)
    own = {name: jnp.asarray(values) for name, values in arrays.items()}
    a, s, nu = (
        np.asarray(of(own), np.float64)
        for of in (codec.analysis_of, codec.synthesis_of, codec.mean_of)
    )
    return a, s, nu


def _units(layer: KVLayer, side: str) -> list[Unit]:
    """Codec and arrays of every head's unit, in order of heads; {} where the layer has none."""
    found: dict[int, Unit] = {}
    for group in layer.groups:
        codec, arrays = getattr(group, side), getattr(group, f"{side}_arrays")
        for i, head in enumerate(group.heads):
            found[head] = codec, {name: x[i] for name, x in arrays.items()}
    return [found[head] for head in sorted(found)]


def _group_held(group: HeadGroup) -> HeadGroup:
    sides: dict[str, Any] = {}
    for side in ("k", "v"):
        sides[side] = held(getattr(group, side))
        kept = sides[side].array_shapes
        arrays = getattr(group, f"{side}_arrays")
        sides[f"{side}_arrays"] = {name: a for name, a in arrays.items() if name in kept}
    return dataclasses.replace(group, **sides)
