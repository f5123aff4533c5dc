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

Rows of A_c and columns of S_c are int8 times a number each, rounded by what errors cost
(`turboq.numbers.rounding`): of A_c under the covariance of x, of S_c under (S S^T)^-1, as an error
of any coordinate of y costs alike (`turboq.codecs.fit_joint`). A coordinate of `FINE` bits or more
has a second column of what the first's rounding left: its own error is not larger than that.
Everything is made in float64 when a plan is; files hold what memory does.
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

FINE = 5  # bits of a coordinate from which one column of int8 would be coarser than its code

Shapes = dict[str, tuple[tuple[int, ...], str]]  # of an array, and its type
Unit = tuple[Codec, Mapping[str, Any]]  # of one side of one head, with fitted arrays
_Turns = tuple[np.ndarray, np.ndarray, np.ndarray]  # A [W, D], S' [D, W], nu [D]; float64


def held(codec: Codec) -> Codec:
    """What codes a unit of joined heads."""
    return Coordinates.of(codec) if isinstance(codec, Transform) else codec


def widths(codec: Codec) -> tuple[int, int]:
    """Rows of A_c and columns of S_c that a unit with this codec has."""
    bits = _bits(codec)
    return len(bits), len(bits) + sum(b >= FINE for b in bits)


def places(
    k: Sequence[Codec], v: Sequence[Codec], heads: int
) -> tuple[Int[np.ndarray, "J W"], Int[np.ndarray, "J R"]]:
    """`coded` and `read`: of each row of A_c and each column of S_c its coordinate, C for none.

    Units of every head's keys and values. Coordinates of a group in order, those of keys first; of
    columns, those of `FINE` bits once more behind.
    """
    rows, columns = [], []
    for first in range(0, len(k), heads):
        at, own, fine = 0, [], []
        for codec in (*k[first : first + heads], *v[first : first + heads]):
            bits = _bits(codec)
            own += [at + i for i in range(len(bits))]
            fine += [at + i for i, b in enumerate(bits) if b >= FINE]
            at += codec.dim
        rows.append(own)
        columns.append(own + fine)
    none = heads * (k[0].dim + v[0].dim)
    return _padded(rows, none), _padded(columns, none)


def shapes(k: Sequence[Codec], v: Sequence[Codec], heads: int) -> Shapes:
    """Arrays of a layer with such units of every head, as files hold them."""
    rows, columns = places(k, v, heads)
    (groups, w), r, dim = rows.shape, columns.shape[1], heads * (k[0].dim + v[0].dim)
    return {
        "mean": ((groups, dim), "float32"), "center": ((groups, dim), "float32"),
        "analysis": ((groups, w, dim), "int8"), "analysis_scale": ((groups, w), "float32"),
        "coded": ((groups, w), "int32"),
        "synthesis": ((groups, dim, r), "int8"), "synthesis_scale": ((groups, r), "float32"),
        "read": ((groups, r), "int32"),
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
    rows, columns = places(k_codecs, v_codecs, heads)
    due = shapes(k_codecs, v_codecs, heads)
    made = {name: np.zeros(shape, kind) for name, (shape, kind) in due.items()}
    made |= {"mean": mean.astype(np.float32), "coded": rows, "read": columns}
    for name in ("analysis_scale", "synthesis_scale"):
        made[name][:] = 1.0
    for j, group in enumerate(back):
        units = [u for side in (k, v) for u in side[j * heads : (j + 1) * heads]]
        analysis, synthesis, nu = _whole(units, turn[j], group)
        made["center"][j] = mean[j] + nu
        covariance = (turn[j] * variances[j]) @ turn[j].T
        found = rounding.to_int8(analysis, rounding.Metric.of(covariance))
        w = len(analysis)
        made["analysis"][j, :w], made["analysis_scale"][j, :w] = found
        fine = columns[j, w:]  # their places among the rows, which are in order
        fine = np.searchsorted(rows[j, :w], fine[fine < mean.shape[1]])
        q, scale = _twice(synthesis.T, fine, rounding.Metric.of(group.T @ group))
        made["synthesis"][j, :, : len(q)], made["synthesis_scale"][j, : len(q)] = q.T, scale
    return made


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


def _twice(matrix: np.ndarray, fine: np.ndarray, metric: rounding.Metric):
    """Rows as int8 and their scales, then of `fine` ones what that has left."""
    q, scale = rounding.to_int8(matrix, metric)
    left = matrix[fine] - q[fine] * scale[fine, None].astype(np.float64)
    more, small = rounding.to_int8(left, metric)
    return np.concatenate([q, more]), np.concatenate([scale, small])


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
    """Layers that join alike with as many rows and columns each, zeros in some: one program."""
    most: dict[Any, tuple[int, int]] = {}
    for layer in layers:
        if layer.joint:
            w, r = most.get(_alike(layer), (0, 0))
            most[_alike(layer)] = (
                max(w, layer.joint["coded"].shape[1]), max(r, layer.joint["read"].shape[1])
            )  # fmt: skip
    return [_widened(x, *most[_alike(x)]) if x.joint else x for x in layers]


def _alike(layer: KVLayer) -> Any:
    return layer.joint_heads, layer.joint["mean"].shape


def _widened(layer: KVLayer, w: int, r: int) -> KVLayer:
    old = {name: np.asarray(x) for name, x in layer.joint.items()}
    rows, columns = (0, w - old["coded"].shape[1]), (0, r - old["read"].shape[1])
    if not (rows[1] or columns[1]):
        return layer
    none = old["mean"].shape[1]
    new = old | {
        "analysis": np.pad(old["analysis"], ((0, 0), rows, (0, 0))),
        "analysis_scale": np.pad(old["analysis_scale"], ((0, 0), rows), constant_values=1.0),
        "coded": np.pad(old["coded"], ((0, 0), rows), constant_values=none),
        "synthesis": np.pad(old["synthesis"], ((0, 0), (0, 0), columns)),
        "synthesis_scale": np.pad(old["synthesis_scale"], ((0, 0), columns), constant_values=1.0),
        "read": np.pad(old["read"], ((0, 0), columns), constant_values=none),
    }
    return dataclasses.replace(layer, joint={name: jnp.asarray(x) for name, x in new.items()})


def _bits(codec: Codec) -> list[int]:
    """Bits of every coordinate that a unit has; of codecs that take it whole as many as matter."""
    if isinstance(codec, Transform):
        return [bits for count, bits in codec.segments for _ in range(count)]
    return [FINE] * codec.dim


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


def _padded(rows: Sequence[Sequence[int]], none: int) -> Int[np.ndarray, "J n"]:
    out = np.full((len(rows), max(map(len, rows))), none, np.int32)
    for row, own in zip(out, rows, strict=True):
        row[: len(own)] = own
    return out


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
