"""The stream between layers: the residual, and beside it what some families carry to later layers.

    [ x | K, V that later layers read | input of this layer, of the next, ... ]

A layer that lends its cache leaves K and V in the stream, and borrowers find them there, so every
way to run layers one after another, forwards and backwards, shares caches without knowing of it.
Inputs of layers (Gemma 4's embeddings per layer) depend on the token alone; each layer reads the
first and turns the rest to the front, so that layers share one compiled function.

    input_i = (rms_norm_i(W_i x_0 / sqrt(M)) + sqrt(P) E_i[token]) / sqrt(2)
    y <- y + rms_norm(W_out (act(W_gate y) * input_i)),   y the residual behind the MLP
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from turboq_calibrate.models.primitives import (
    ACTIVATIONS,
    Params,
    linear,
    normed,
    residual,
    rms_norm,
    with_residual,
)
from turboq_calibrate.models.spec import LayerSpec, ModelSpec


def begin(
    spec: ModelSpec, params: Params, x: Float[Array, "*A M"], rows: Float[Array, "*A N"] | None
) -> Float[Array, "*A Z"]:
    """The stream that enters the first layer: scaled embeddings `x`, and `rows` of the layers'."""
    if not spec.shared and rows is None:
        return x
    parts = [x, jnp.zeros((*x.shape[:-1], spec.shared), jnp.float32)]
    if rows is not None:
        each = (*x.shape[:-1], len(spec.layers), spec.own_input)
        of_x = linear(x, params, "input_projection") * jnp.float32(spec.hidden**-0.5)
        of_x = rms_norm(of_x.reshape(each), params["input_norm"], spec.norm_eps)
        of_token = rows.astype(jnp.float32).reshape(each) * jnp.float32(spec.own_input**0.5)
        parts.append(((of_x + of_token) * jnp.float32(0.5**0.5)).reshape(*x.shape[:-1], -1))
    return jnp.concatenate(parts, axis=-1)


def borrowed(
    spec: LayerSpec, x: Float[Array, "B T Z"]
) -> tuple[Float[Array, "B T K D"], Float[Array, "B T K E"]]:
    """K and V that an earlier layer left."""
    k, v = _places(spec)
    shape = (*x.shape[:-1], spec.kv_heads, -1)
    return x[..., k].reshape(shape), x[..., v].reshape(shape)


def lend(
    spec: LayerSpec,
    x: Float[Array, "B T Z"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K E"],
) -> Float[Array, "B T Z"]:
    """The stream with K and V for later layers, where this layer lends them."""
    if not spec.lends:
        return x
    for at, part in zip(_places(spec), (k, v), strict=True):
        x = x.at[..., at].set(part.reshape(*x.shape[:-1], -1))
    return x


def _places(spec: LayerSpec) -> tuple[slice, slice]:
    assert spec.shared_at is not None
    middle = spec.shared_at + spec.kv_heads * spec.head_dim
    return slice(spec.shared_at, middle), slice(middle, middle + spec.kv_heads * spec.v_head_dim)


def leave(spec: LayerSpec, params: Params, x: Float[Array, "B T Z"]) -> Float[Array, "B T Z"]:
    """What a layer does behind its MLP: its own input, its scale; the next layer's input is due."""
    y = residual(spec, x)
    if spec.own_input:
        gate = ACTIVATIONS[spec.activation](linear(y, params, "input_gate"))
        due = x[..., spec.own_input_at :]
        added = linear(gate * due[..., : spec.own_input], params, "input_out")
        y = y + normed(spec, params, added, "input_post_norm")
        due = jnp.roll(due, -spec.own_input, axis=-1)
        x = jnp.concatenate([x[..., : spec.own_input_at], due], axis=-1)
    if spec.output_scale:
        y = y * params["output_scale"].astype(jnp.float32)[0]
    return with_residual(spec, x, y)
