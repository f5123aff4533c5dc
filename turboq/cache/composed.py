"""Joined layers as they are held: the turns of all units and the joint one are one matrix each way.

A unit is coded by a transform of its own, u = A (y - nu), y_hat = nu + S' c(u), of W <= D
coordinates. Behind the joint transform y = S^-1 (x - mean) of G heads, with A, S' and nu of all
their units on a diagonal each,

    u = A_c (x - center),        A_c = A S^-1  [W, C],      x_hat = center + S_c c(u),
    center = mean + S nu,        S_c = S S'    [C, W],      W coded coordinates of C in all,

so a layer holds 2 W C numbers of a group in the place of 2 C^2 and those of its units, and its
codecs code coordinates as they come (`turboq.codecs.coordinates`). Made in float64 where a plan's
arrays become a `KVLayer`, and held as float16 (`joint.as_arrays`); files have them apart. Keys that
turn with their position still do so about `mean` (`turboq.cache.joint`).

Layers with another codec than transforms keep all matrices apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from turboq.cache import joint
from turboq.cache.layer import HeadGroup, KVLayer
from turboq.codecs.base import Arrays, Codec
from turboq.codecs.coordinates import Coordinates
from turboq.codecs.transform import Transform

Unit = tuple[np.ndarray, np.ndarray, np.ndarray]  # A [W, D], S' [D, W], nu [D]; float64


def join(layer: KVLayer, heads: int, fitted: Mapping[str, Any]) -> KVLayer:
    """The layer, its units those of so many heads by the fitted `joint.ARRAYS`, as it is held.

    Raises:
      ValueError: S has no inverse.
    """
    if _composable(layer):
        found = _composed(fitted, heads, _units(layer, "k"), _units(layer, "v"))
    else:
        found = joint.arrays_of(fitted)
    return held(dataclasses.replace(layer, joint_heads=heads, joint=found))


def held(layer: KVLayer) -> KVLayer:
    """The layer with the codecs that `join` leaves, arrays or not; others as they are."""
    if layer.joint_heads is None or not _composable(layer):
        return layer

    def group(old: HeadGroup) -> HeadGroup:
        sides: dict[str, Any] = {}
        for side, codec, arrays in (("k", old.k, old.k_arrays), ("v", old.v, old.v_arrays)):
            assert isinstance(codec, Transform)
            sides[side] = Coordinates.of(codec)
            kept = sides[side].array_shapes
            sides[f"{side}_arrays"] = {name: a for name, a in arrays.items() if name in kept}
        return dataclasses.replace(old, **sides)

    return dataclasses.replace(layer, groups=tuple(group(g) for g in layer.groups))


def nbytes(layer: KVLayer) -> int:
    """Bytes of the arrays of `KVLayer.joint`, arrays there or not; 0 of heads apart."""
    if layer.joint_heads is None:
        return 0
    layer, heads = held(layer), layer.joint_heads
    one = layer.groups[0]
    groups, dim = joint.shapes(layer.kv_heads, heads, one.k.dim, one.v.dim)["mean"]
    widths = np.zeros(groups, int)
    for group in layer.groups:
        for h in group.heads:
            widths[h // heads] += _width(group.k) + _width(group.v)
    width = int(widths.max())
    matrices = len(joint.MATRICES) * width * dim
    return groups * (2 * matrices + 4 * (2 * dim + 3 * width))  # mean, center; scales, coded


def as_wide(layers: Sequence[KVLayer]) -> list[KVLayer]:
    """Layers that join alike with as many coordinates each, zeros in some: one program for all."""
    most: dict[Any, int] = {}
    for layer in layers:
        if layer.joint:
            most[_alike(layer)] = max(most.get(_alike(layer), 0), layer.joint["coded"].shape[1])
    return [_widened(x, most[_alike(x)]) if x.joint else x for x in layers]


def _alike(layer: KVLayer) -> Any:
    return layer.joint_heads, layer.joint["mean"].shape


def _widened(layer: KVLayer, width: int) -> KVLayer:
    old = {name: np.asarray(x) for name, x in layer.joint.items()}
    more = width - old["coded"].shape[1]
    if not more:
        return layer
    new = old | {
        "analysis": np.pad(old["analysis"], ((0, 0), (0, more), (0, 0))),
        "synthesis": np.pad(old["synthesis"], ((0, 0), (0, 0), (0, more))),
        **{
            name: np.pad(old[name], ((0, 0), (0, more)), constant_values=1.0)
            for name in ("analysis_scale", "synthesis_scale")
        },
        "coded": np.pad(old["coded"], ((0, 0), (0, more)), constant_values=old["mean"].shape[1]),
    }
    return dataclasses.replace(layer, joint={name: jnp.asarray(x) for name, x in new.items()})


def _composable(layer: KVLayer) -> bool:
    return all(isinstance(c, Transform) for g in layer.groups for c in (g.k, g.v))


def _width(codec: Codec) -> int:
    return codec.coded if isinstance(codec, Coordinates) else codec.dim


def _units(layer: KVLayer, side: str) -> dict[int, Unit]:
    """What the codec of every head does to its unit."""
    out: dict[int, Unit] = {}
    for group in layer.groups:
        codec: Transform = getattr(group, side)
        arrays: Arrays = getattr(group, f"{side}_arrays")
        a, s, nu = (
            np.asarray(jax.vmap(f)(arrays), np.float64)
            for f in (codec.analysis_of, codec.synthesis_of, codec.mean_of)
        )
        out |= {h: (a[i], s[i], nu[i]) for i, h in enumerate(group.heads)}
    return out


def _composed(
    fitted: Mapping[str, Any], heads: int, k: dict[int, Unit], v: dict[int, Unit]
) -> dict[str, Any]:
    """`KVLayer.joint`; a group of fewer coordinates than another has zeros for the others."""
    mean, synthesis = (np.asarray(fitted[name], np.float64) for name in joint.ARRAYS)
    analysis = joint.inverse(synthesis)
    groups, dim = mean.shape
    order = [
        [side[h] for side in (k, v) for h in range(j * heads, (j + 1) * heads)]
        for j in range(groups)
    ]
    width = max(sum(len(a) for a, _, _ in units) for units in order)
    coded, center = np.full((groups, width), dim, np.int32), mean.copy()
    down, up = np.zeros((groups, width, dim)), np.zeros((groups, dim, width))
    for j, units in enumerate(order):
        row = at = 0
        for a, s, nu in units:
            rows, to = slice(row, row + len(nu)), slice(at, at + len(a))
            down[j, to] = a @ analysis[j, rows]
            up[j, :, to] = synthesis[j, :, rows] @ s
            center[j] += synthesis[j, :, rows] @ nu
            coded[j, to] = row + np.arange(len(a))
            row, at = rows.stop, to.stop
    return joint.as_arrays(mean, center, down, up, coded)
