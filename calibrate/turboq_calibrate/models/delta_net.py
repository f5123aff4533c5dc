"""A gated delta-net: a layer that keeps one matrix per head instead of keys and values.

    q, k, v = silu(causal depthwise convolution of W_qkv n),   q, k / ||.||,   q / sqrt(Dk)
    g_t = -exp(log_decay) softplus(a_t + decay_bias),   beta_t = sigmoid(b_t)
    o_t by the delta rule (`recurrence`),   y_t = W_out (rms_norm(o_t) * silu(z_t))

Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks" (2024); gates, convolution and output as
Qwen3-Next and Qwen3.5 have them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from turboq_calibrate.models import recurrence
from turboq_calibrate.models.primitives import Params, linear, rms_norm
from turboq_calibrate.models.recurrence import State
from turboq_calibrate.models.spec import DeltaNet, LayerSpec

NORM_EPS = 1e-6  # under the root of the norms of q and k


def mix(
    spec: LayerSpec, params: Params, n: Float[Array, "B T M"], state: State | None = None
) -> tuple[Float[Array, "B T M"], State]:
    """What the layer adds to the residual stream, and the state behind the last real token."""
    delta = spec.recurrent
    assert isinstance(delta, DeltaNet)
    batch, time = n.shape[:2]
    state = recurrence.empty(delta, batch) if state is None else state
    mixed, inputs = recurrence.convolution(params, linear(n, params, "delta_qkv"), state)
    width = delta.key_heads * delta.key_dim
    q, k, v = jnp.split(mixed, [width, 2 * width], axis=-1)
    each = delta.value_heads // delta.key_heads
    q, k = (
        jnp.repeat(_unit(y.reshape(batch, time, delta.key_heads, delta.key_dim)), each, axis=2)
        for y in (q, k)
    )
    v = v.reshape(batch, time, delta.value_heads, delta.value_dim)
    rate = jnp.exp(params["log_decay"].astype(jnp.float32))
    a = linear(n, params, "delta_a") + params["decay_bias"].astype(jnp.float32)[None, None]
    g = recurrence.of_real(state, -jax.nn.softplus(a) * rate[None, None])
    beta = recurrence.of_real(state, jax.nn.sigmoid(linear(n, params, "delta_b")))
    q = q * delta.key_dim**-0.5
    out, matrix = recurrence.pass_through(q, k, v, g, state.matrix, beta)
    z = linear(n, params, "delta_z").reshape(out.shape)
    y = rms_norm(out, params["delta_norm"], spec.norm_eps) * jax.nn.silu(z)
    y = linear(y.reshape(batch, time, -1), params, "delta_out")
    return y, State(matrix, inputs, state.counts)


def _unit(x: Float[Array, "*A D"]) -> Float[Array, "*A D"]:
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + NORM_EPS)
