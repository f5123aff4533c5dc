"""Keys and values of several heads as one vector, turned into units that codecs store one by one.

    x = [k of G heads, v of the same heads],   y = S^-1 (x - mean),   x_hat = mean + S y

with k before RoPE, or relative to blocks of positions, its mean turned apart (`cache.key_form`).
C = G (D + E) coordinates, in falling order of what they are worth: the first D of y take the place
of the first head's keys, the next D of the second's, then E each those of values. All of a layer's
keys and values are linear images of one hidden state, so most of what one head holds others hold
too: together they need far fewer bits for the same loss. Codecs, pages and plans stay as they are;
only here is known that "K of head 0" is the largest part of them all. Exact tokens are kept as they
come.

S is made by `turboq.codecs.fit_joint`.

Source: transform coding of a vector source (Goyal 2001); that values of a layer follow from its
keys was used by prediction in Shutova et al. 2025 (AQUA-KV, arXiv 2501.19392).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from turboq.cache import key_form
from turboq.cache.layer import KVLayer
from turboq.errors import TurboqError

ARRAYS = ("mean", "synthesis")  # fitted ones
HIGHEST = jax.lax.Precision.HIGHEST


def shapes(kv_heads: int, heads: int, k_dim: int, v_dim: int) -> dict[str, tuple[int, ...]]:
    """Fitted arrays of a layer that joins `heads` of its `kv_heads` at a time."""
    groups, dim = kv_heads // heads, heads * (k_dim + v_dim)
    return {"mean": (groups, dim), "synthesis": (groups, dim, dim)}


def arrays_of(fitted: dict[str, Any]) -> dict[str, Any]:
    """The arrays that a `KVLayer` needs: the fitted ones and the inverse of S, float32.

    Raises:
      ValueError: S has no inverse.
    """
    synthesis = np.asarray(fitted["synthesis"], np.float64)
    try:
        analysis = np.linalg.inv(synthesis)
    except np.linalg.LinAlgError:
        raise ValueError("synthesis is singular: it must be invertible") from None
    if not np.all(np.isfinite(analysis)):
        raise ValueError("synthesis has no finite inverse")
    found = {"mean": fitted["mean"], "analysis": analysis, "synthesis": synthesis}
    return {name: jnp.asarray(x, jnp.float32) for name, x in found.items()}


def refuse(layer: KVLayer, cache: str) -> None:
    """Refuses joined keys and values where each side of a head is read by itself.

    Raises:
      TurboqError: says what is read where.
    """
    if layer.joint_heads is not None:
        raise TurboqError(
            f"{cache} reads each head by itself, and this plan joins keys and values of "
            f"{layer.joint_heads} heads: take a plan of --joint=none (joined transforms are read "
            "by turboq.cache.model_cache)"
        )


def units(layer: KVLayer) -> KVLayer:
    """The layer whose keys and values are the units: neither joined nor rotated."""
    return dataclasses.replace(layer, joint={}, joint_heads=None, rope=None)


def to_units(
    layer: KVLayer,
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K E"],
    positions: Int[Array, "#B T"],
) -> tuple[Float[Array, "B T K D"], Float[Array, "B T K E"]]:
    """Units of keys as they come and values; without a joint transform both unchanged."""
    if layer.joint_heads is None:
        return k, v
    k = key_form.to_stored(layer, _key_mean(layer, k), k.swapaxes(1, 2), positions).swapaxes(1, 2)
    x = _joined(k, v, layer.joint_heads) - layer.joint["mean"][None, None]
    y = jnp.einsum("btjc,jdc->btjd", x, layer.joint["analysis"], precision=HIGHEST)
    return _split(y, k.shape[2:], v.shape[2:])


def from_units(
    layer: KVLayer,
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K E"],
    positions: Int[Array, "#B T"],
) -> tuple[Float[Array, "B T K D"], Float[Array, "B T K E"]]:
    """The inverse of `to_units`."""
    if layer.joint_heads is None:
        return k, v
    y = _joined(k, v, layer.joint_heads)
    x = jnp.einsum("btjd,jcd->btjc", y, layer.joint["synthesis"], precision=HIGHEST)
    keys, values = _split(x + layer.joint["mean"][None, None], k.shape[2:], v.shape[2:])
    mean = _key_mean(layer, k)
    return key_form.from_stored(layer, mean, keys.swapaxes(1, 2), positions).swapaxes(1, 2), values


def _key_mean(layer: KVLayer, k: Float[Array, "B T K D"]) -> dict[str, Float[Array, "K D"]]:
    """The mean of every head's keys, as `turboq.cache.key_form` takes it off."""
    heads, dim = k.shape[2:]
    mean = layer.joint["mean"]
    return {"mean": mean[:, : heads // len(mean) * dim].reshape(heads, dim)}


def _joined(k: Array, v: Array, heads: int) -> Float[Array, "B T J C"]:
    groups = (*k.shape[:2], k.shape[2] // heads, -1)
    return jnp.concatenate([x.astype(jnp.float32).reshape(groups) for x in (k, v)], axis=-1)


def _split(x: Float[Array, "B T J C"], k: tuple[int, ...], v: tuple[int, ...]):
    keys, values = jnp.split(x, [k[0] * k[1] // x.shape[2]], axis=-1)
    return keys.reshape(*x.shape[:2], *k), values.reshape(*x.shape[:2], *v)
