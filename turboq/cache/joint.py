"""Keys and values of several heads as one vector, turned into units that codecs store one by one.

    x = [k of G heads, v of the same heads],   y = S^-1 (x - mean),   x_hat = mean + S y

with k before RoPE, or relative to blocks of positions, its mean turned apart (`cache.key_form`).
C = G (D + E) coordinates, in falling order of what they are worth: the first D of y take the place
of the first head's keys, the next D of the second's, then E each those of values. All of a layer's
keys and values are linear images of one hidden state, so most of what one head holds others hold
too: together they need far fewer bits for the same loss. Codecs, pages and plans stay as they are;
only here is known that "K of head 0" is the largest part of them all. Exact tokens are kept as they
come.

S is made by `turboq.codecs.fit_joint`. Of units that transforms code, only the coordinates that
these code are ever made: what a layer holds is in `turboq.cache.composed`.

Source: transform coding of a vector source (Goyal 2001); that values of a layer follow from its
keys was used by prediction in Shutova et al. 2025 (AQUA-KV, arXiv 2501.19392).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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


def arrays_of(fitted: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of a `KVLayer` whose codecs take units whole: of the fitted ones, and S^-1.

    Raises:
      ValueError: S has no inverse.
    """
    mean, synthesis = (np.asarray(fitted[name], np.float64) for name in ARRAYS)
    ones, every = np.ones(mean.shape), np.broadcast_to(np.arange(mean.shape[1]), mean.shape)
    made = {
        "mean": mean, "center": mean, "analysis": inverse(synthesis), "synthesis": synthesis,
        "analysis_scale": ones, "analysis_channels": ones,
        "synthesis_scale": ones, "synthesis_channels": ones,
    }  # fmt: skip
    out = {name: jnp.asarray(x, jnp.float32) for name, x in made.items()}
    return out | {"coded": jnp.asarray(every, jnp.int32)}


def synthesis_of(layer: KVLayer) -> Float[Array, "J C W"]:
    """What each coordinate adds to keys and values, float32."""
    scale = layer.joint["synthesis_scale"][:, None] * layer.joint["synthesis_channels"][..., None]
    return layer.joint["synthesis"].astype(jnp.float32) * scale


def inverse(synthesis: Float[np.ndarray, "J C C"]) -> Float[np.ndarray, "J C C"]:
    """S^-1 of every group.

    Raises:
      ValueError: there is none.
    """
    try:
        analysis = np.linalg.inv(synthesis)
    except np.linalg.LinAlgError:
        raise ValueError("synthesis is singular: it must be invertible") from None
    if not np.all(np.isfinite(analysis)):
        raise ValueError("synthesis has no finite inverse")
    return analysis


def refuse(layer: KVLayer, cache: str) -> None:
    """Refuses joined keys and values where each side of a head is read by itself.

    Raises:
      TurboqError: says what is read where.
    """
    if layer.joint_heads is not None:
        raise TurboqError(
            f"{cache} reads each head by itself, and this plan joins keys and values of "
            f"{layer.joint_heads} heads: take a plan of --joint=none (joined transforms are read "
            "by turboq.cache.model_cache, with shared pages by turboq.ModelPool)"
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
    """Units of keys as they come and values; without a joint transform both unchanged.

    Coordinates that the layer's arrays do not have are 0.
    """
    if layer.joint_heads is None:
        return k, v
    k = key_form.to_stored(layer, _key_mean(layer, k), k.swapaxes(1, 2), positions).swapaxes(1, 2)
    x = _joined(k, v, layer.joint_heads) - layer.joint["center"][None, None]
    x *= layer.joint["analysis_channels"][None, None]
    analysis = layer.joint["analysis"].astype(jnp.float32)
    u = jnp.einsum("btjc,jwc->btjw", x, analysis, precision=HIGHEST)
    u *= layer.joint["analysis_scale"][None, None]
    return _split(_take(u, _places(layer)), k.shape[2:], v.shape[2:])


def from_units(
    layer: KVLayer,
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K E"],
    positions: Int[Array, "#B T"],
) -> tuple[Float[Array, "B T K D"], Float[Array, "B T K E"]]:
    """Keys and values of units as they are read: the inverse of `to_units` where all are coded."""
    if layer.joint_heads is None:
        return k, v
    u = _take(_joined(k, v, layer.joint_heads), layer.joint["coded"])
    u *= layer.joint["synthesis_scale"][None, None]
    synthesis = layer.joint["synthesis"].astype(jnp.float32)
    x = jnp.einsum("btjw,jcw->btjc", u, synthesis, precision=HIGHEST)
    x *= layer.joint["synthesis_channels"][None, None]
    keys, values = _split(x + layer.joint["center"][None, None], k.shape[2:], v.shape[2:])
    mean = _key_mean(layer, k)
    return key_form.from_stored(layer, mean, keys.swapaxes(1, 2), positions).swapaxes(1, 2), values


def _key_mean(layer: KVLayer, k: Float[Array, "B T K D"]) -> dict[str, Float[Array, "K D"]]:
    """The mean of every head's keys, as `turboq.cache.key_form` takes it off."""
    heads, dim = k.shape[2:]
    mean = layer.joint["mean"]
    return {"mean": mean[:, : heads // len(mean) * dim].reshape(heads, dim)}


def _places(layer: KVLayer) -> Int[Array, "J C"]:
    """Where `analysis` has each coordinate of the units; W where nothing is coded."""
    coded, dim = layer.joint["coded"], layer.joint["mean"].shape[1]
    groups, width = coded.shape
    group = jnp.arange(groups, dtype=jnp.int32)[:, None]
    numbers = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None], coded.shape)
    return jnp.full((groups, dim), width, jnp.int32).at[group, coded].set(numbers, mode="drop")


def _take(x: Float[Array, "B T J n"], index: Int[Array, "J m"]) -> Float[Array, "B T J m"]:
    """x at every group's own index; 0 behind the end."""
    return jax.vmap(
        lambda own, at: own.at[..., at].get(mode="fill", fill_value=0), in_axes=(2, 0), out_axes=2
    )(x, index)


def _joined(k: Array, v: Array, heads: int) -> Float[Array, "B T J C"]:
    groups = (*k.shape[:2], k.shape[2] // heads, -1)
    return jnp.concatenate([x.astype(jnp.float32).reshape(groups) for x in (k, v)], axis=-1)


def _split(x: Float[Array, "B T J C"], k: tuple[int, ...], v: tuple[int, ...]):
    keys, values = jnp.split(x, [k[0] * k[1] // x.shape[2]], axis=-1)
    return keys.reshape(*x.shape[:2], *k), values.reshape(*x.shape[:2], *v)
