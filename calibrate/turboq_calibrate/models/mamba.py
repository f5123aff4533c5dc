"""A Mamba-2 mixer: a layer that keeps one matrix per head instead of keys and values.

    z, r, dt = W_in n,   x, b, c = silu(causal depthwise convolution of r + bias)
    d_t = clip(softplus(dt_t + decay_bias)),   g_t = -exp(log_decay) d_t
    S_t = exp(g_t) S_{t-1} + b_t (d_t x_t)^T,   o_t = S_t^T c_t + skip x_t
    y_t = W_out rms_norm(o_t * silu(z_t))

b and c are of a group of heads, as is each norm. Source: Dao, Gu, "Transformers are SSMs" (2024),
sections 6 and 7; gate, norm and limits of d as Granite 4 has them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from turboq_calibrate.models import recurrence
from turboq_calibrate.models.primitives import Params, linear, rms_norm
from turboq_calibrate.models.recurrence import State
from turboq_calibrate.models.spec import LayerSpec, Mamba


def mix(
    spec: LayerSpec, params: Params, n: Float[Array, "B T M"], state: State | None = None
) -> tuple[Float[Array, "B T M"], State]:
    """What the layer adds to the residual stream, and the state behind the last real token."""
    mamba = spec.recurrent
    assert isinstance(mamba, Mamba)
    batch, time = n.shape[:2]
    state = recurrence.empty(mamba, batch) if state is None else state
    z, r, dt = jnp.split(
        linear(n, params, "mamba_in"), [mamba.inner, mamba.inner + mamba.channels], axis=-1
    )
    mixed, inputs = recurrence.convolution(params, r, state)
    width = mamba.groups * mamba.state_dim
    x, b, c = jnp.split(mixed, [mamba.inner, mamba.inner + width], axis=-1)
    x = x.reshape(batch, time, mamba.heads, mamba.head_dim)
    each = mamba.heads // mamba.groups
    b, c = (
        jnp.repeat(y.reshape(batch, time, mamba.groups, mamba.state_dim), each, axis=2)
        for y in (b, c)
    )
    step = jax.nn.softplus(dt + params["decay_bias"].astype(jnp.float32)[None, None])
    step = recurrence.of_real(state, jnp.clip(step, *mamba.step_limits))
    g = -jnp.exp(params["log_decay"].astype(jnp.float32))[None, None] * step
    out, matrix = recurrence.pass_through(c, b, x * step[..., None], g, state.matrix)
    out = out + params["skip"].astype(jnp.float32)[None, None, :, None] * x
    y = (out.reshape(batch, time, -1) * jax.nn.silu(z)).reshape(batch, time, mamba.groups, -1)
    y = rms_norm(y, jnp.ones(y.shape[-1:]), spec.norm_eps).reshape(batch, time, -1)
    y = y * params["mamba_norm"].astype(jnp.float32)[None, None]
    return linear(y, params, "mamba_out"), State(matrix, inputs, state.counts)
