"""Pieces of a decoder layer: matrix product, norms, MLPs, residual sum. All in float32."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from turboq_calibrate.models.spec import LayerSpec, ModelSpec

Params = dict[str, Array]
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}

SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0  # gpt-oss


def linear(x: Float[Array, "*A I"], params: Params, name: str) -> Float[Array, "*A O"]:
    """x @ W^T (+ bias when the layer has one), in float32."""
    weight = params[name].astype(jnp.float32)
    y = jax.lax.dot_general(
        x, weight, (((x.ndim - 1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST
    )
    bias = params.get(f"{name}_bias")
    if bias is None:
        return y
    return y + jnp.broadcast_to(bias.astype(jnp.float32), y.shape)


def rms_norm(
    x: Float[Array, "*A N"], weight: Float[Array, "N"], eps: float, offset: float = 0.0
) -> Float[Array, "*A N"]:
    """(offset + weight) * x / sqrt(mean(x^2) + eps) over the last axis."""
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    factor = weight.astype(jnp.float32)
    if offset:
        factor = offset + factor
    return x * inverse * jnp.broadcast_to(factor, x.shape)


def layer_norm(
    x: Float[Array, "*A N"], weight: Float[Array, "N"], bias: Float[Array, "N"], eps: float
) -> Float[Array, "*A N"]:
    """weight * (x - mean(x)) / sqrt(var(x) + eps) + bias over the last axis."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    weight, bias = (jnp.broadcast_to(y.astype(jnp.float32), x.shape) for y in (weight, bias))
    return centred * inverse * weight + bias


def residual(spec: LayerSpec | ModelSpec, x: Float[Array, "*A Z"]) -> Float[Array, "*A M"]:
    """The residual stream alone (`stream`)."""
    return x if x.shape[-1] == spec.hidden else x[..., : spec.hidden]


def with_residual(
    spec: LayerSpec, x: Float[Array, "*A Z"], y: Float[Array, "*A M"]
) -> Float[Array, "*A Z"]:
    """`x` with another residual."""
    return y if x.shape == y.shape else jnp.concatenate([y, x[..., spec.hidden :]], axis=-1)


def pre_normed(spec: LayerSpec, params: Params, x: Array, name: str) -> Array:
    """What attention (`name` attn_norm) or the MLP (mlp_norm) reads of the residual stream."""
    x = residual(spec, x)
    if spec.parallel:
        name = "attn_norm"
    return normed(spec, params, x, name) if spec.pre_norms else x


def normed(spec: LayerSpec | ModelSpec, params: Params, x: Array, name: str) -> Array:
    """The norm of a layer, or the final one, with the weight `name`."""
    if spec.norm != "rms":
        bias = params[f"{name}_bias"] if spec.norm == "layer" else jnp.zeros_like(params[name])
        return layer_norm(x, params[name], bias, spec.norm_eps)
    return rms_norm(x, params[name], spec.norm_eps, spec.norm_offset)


def plain_mlp(spec: LayerSpec, params: Params, n: Float[Array, "*A M"]) -> Float[Array, "*A M"]:
    """down(act(up(n)))."""
    return linear(ACTIVATIONS[spec.activation](linear(n, params, "up")), params, "down")


def gated_mlp(
    spec: LayerSpec, params: Params, n: Float[Array, "*A M"], prefix: str = ""
) -> Float[Array, "*A M"]:
    """down(act(gate(n)) * up(n)) with the weights whose names begin with `prefix`."""
    gate, up = (linear(n, params, f"{prefix}{name}") for name in ("gate", "up"))
    if spec.activation == "clipped_swiglu":
        inner = clipped_swiglu(gate, up)
    else:
        inner = ACTIVATIONS[spec.activation](gate) * up
    return linear(inner, params, f"{prefix}down")


def clipped_swiglu(gate: Float[Array, "*A F"], up: Float[Array, "*A F"]) -> Float[Array, "*A F"]:
    """(u + 1) g sigmoid(1.702 g) with g at most 7 and u within -7 .. 7 (gpt-oss)."""
    gate, up = jnp.minimum(gate, SWIGLU_LIMIT), jnp.clip(up, -SWIGLU_LIMIT, SWIGLU_LIMIT)
    return (up + 1.0) * gate * jax.nn.sigmoid(SWIGLU_ALPHA * gate)


def add(
    spec: LayerSpec, params: Params, x: Float[Array, "*A Z"], y: Float[Array, "*A M"], norm: str
) -> Float[Array, "*A Z"]:
    """The residual sum x + y, with y normalised by weight `norm`, or scaled, where the layer does
    that."""
    y = normed(spec, params, y, norm) if spec.post_norms else y
    y = y if spec.residual_scale == 1.0 else y * jnp.float32(spec.residual_scale)
    return with_residual(spec, x, residual(spec, x) + y)
