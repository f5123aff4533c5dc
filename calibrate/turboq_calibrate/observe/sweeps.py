"""The two jitted passes of capture over one chunk of one layer.

Sweep 1 runs the layer with an attention plug that also reduces q, k and v; sweep 2 needs the mean
that sweep 1 found, so it only projects k and v again from the stored input. One compile per
LayerSpec and chunk shape.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from turboq.numbers.rotation import Rotation
from turboq_calibrate.models import decoder
from turboq_calibrate.models.spec import LayerSpec
from turboq_calibrate.observe import reduce

Sides = dict[str, dict[str, Array]]


def _moments(skip: int, q: Array, k: Array, v: Array) -> Sides:
    # Inf and NaN are looked for in every token, skipped ones included: they reach later tokens.
    return {
        side: reduce.moments(x[:, skip:]) | {"finite": jnp.all(jnp.isfinite(x), axis=(0, 1, 3))}
        for side, x in (("k", k), ("v", v), ("q", q))
    }


@functools.partial(jax.jit, static_argnames=("spec", "skip"))
def moments_and_output(
    spec: LayerSpec,
    params: decoder.Params,
    x: Float[Array, "B T M"],
    positions: Int[Array, "B T"],
    *,
    skip: int,
) -> tuple[Float[Array, "B T M"], Sides]:
    """Sweep 1: the layer's output, and `reduce.moments` of k, v, q plus "finite" per head."""

    def attend(spec: LayerSpec, q, k, v, positions, state: Any):
        out, _ = decoder.exact_attend(spec, q, k, v, positions, None)
        return out, _moments(skip, q, k, v)

    return decoder.layer(spec, params, x, positions, attend, None)


@functools.partial(jax.jit, static_argnames=("spec", "skip"))
def moments_only(
    spec: LayerSpec,
    params: decoder.Params,
    x: Float[Array, "B T M"],
    positions: Int[Array, "B T"],
    *,
    skip: int,
) -> Sides:
    """Sweep 1 of the last layer, whose output nobody reads."""
    return _moments(skip, *decoder.project_qkv(spec, params, x, positions))


@functools.partial(jax.jit, static_argnames=("spec", "skip", "rotations"))
def codes(
    spec: LayerSpec,
    params: decoder.Params,
    x: Float[Array, "B T M"],
    positions: Int[Array, "B T"],
    center: dict[str, Array],
    scale: dict[str, Array],
    *,
    skip: int,
    rotations: tuple[Rotation, Rotation],
) -> Sides:
    """Sweep 2: `reduce.codes` of k and v."""
    _, k, v = decoder.project_qkv(spec, params, x, positions)
    return {
        side: reduce.codes(y[:, skip:], center[side], scale[side], rotation)
        for side, y, rotation in (("k", k, rotations[0]), ("v", v, rotations[1]))
    }
