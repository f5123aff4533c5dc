"""Values of sums over the bits of joined heads, in two steps: lanes to units, units to channels.

    x = S_v y + mean,    y[unit] = sum over the unit's lanes of own[:, l] acc[l]

`own` [P, Y] is what each of Y lanes adds to its own unit of at most P coordinates; S is what the
cache holds (`turboq.cache.composed`). One matrix from lanes to channels, G E of them, would be 2 to
4 times as large and as many products.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from turboq.cache.layer import KVLayer
from turboq_kernels.columns import queries
from turboq_kernels.columns.linear import HIGHEST, LinearLayer
from turboq_kernels.columns.types import Sums


def values(
    sums: Sums,
    made: LinearLayer,
    layer: KVLayer,
    own: Float[Array, "J *n Y"],
    place: Int[np.ndarray, "Y"],
) -> Float[Array, "B M E"]:
    """Sums of p x_hat, not yet normalised, as `queries.values`. `place`: of each lane's unit.

    Heads apart have units of their own, whose `own` is [J, 1, E, Y].
    """
    if not made.joined:
        return queries.values(sums, made, own)
    (batch, m, lanes), (heads, e) = sums.acc.shape, made.v.mean.shape
    groups, each, d = made.groups, heads // made.groups, made.means.shape[2]
    bits = sums.acc.reshape(batch, groups, m // groups, 1, lanes)
    of_unit = place[None] == np.arange(2 * each)[:, None]
    y = jnp.einsum("bjmpy,jcy->bjmpc", jnp.where(of_unit, bits, 0.0), own, precision=HIGHEST)
    parts = (y[..., :each, :d], y[..., each:, :e])  # units in the places of keys, then of values
    flat = jnp.concatenate([x.reshape(*x.shape[:3], -1) for x in parts], axis=-1)
    joint = layer.joint
    at = joint["coded"][None, :, None]
    u = jnp.take_along_axis(flat, at, axis=-1, mode="fill", fill_value=0)  # C: none
    u *= joint["synthesis_scale"][None, :, None]
    turn = joint["synthesis"][:, each * d :].reshape(groups, each, e, -1).astype(jnp.float32)
    rows = u.reshape(batch, groups, each, m // heads, -1)
    x = jnp.einsum("bjgrw,jgew->bjgre", rows, turn, precision=HIGHEST)
    x *= joint["synthesis_channels"][:, each * d :].reshape(groups, each, 1, e)[None]
    mean = jnp.repeat(made.v.mean, m // heads, axis=0)
    return x.reshape(batch, m, e) + sums.total[..., None] * mean[None]
