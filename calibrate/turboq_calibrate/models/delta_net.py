"""A gated delta-net: a layer that keeps one matrix per head instead of keys and values.

    q, k, v = silu(causal depthwise convolution of W_qkv n),   q, k / ||.||,   q / sqrt(Dk)
    g_t = -exp(log_decay) softplus(a_t + decay_bias),   beta_t = sigmoid(b_t)
    S_t = exp(g_t) S_{t-1} + k_t (beta_t (v_t - exp(g_t) S_{t-1}^T k_t))^T,   o_t = S_t^T q_t
    y_t = W_out (rms_norm(o_t) * silu(z_t))

Tokens go through S in chunks of C. With c_i the sum of g up to token i of a chunk, D_ij =
exp(c_i - c_j) for j <= i, and A the part of diag(beta) (K K^T * D) below its diagonal:

    U = (I + A)^-1 diag(beta) (V - diag(exp(c)) K S),   O = diag(exp(c)) Q S + (Q K^T * D) U
    S <- exp(c_C) S + (diag(exp(c_C - c)) K)^T U

Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks" (2024): the recurrence is equation 10, the
chunks are section 3.3; gates, convolution and output as Qwen3-Next and Qwen3.5 have them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from turboq_calibrate.models.primitives import Params, linear, rms_norm
from turboq_calibrate.models.spec import DeltaNet, LayerSpec

CHUNK = 64  # tokens
NORM_EPS = 1e-6  # under the root of the norms of q and k

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class State(NamedTuple):
    """What a sequence leaves behind: a matrix per head, and the convolution's last n inputs."""

    matrix: Float[Array, "B H Dk Dv"]
    inputs: Float[Array, "B n C"]
    counts: Int[Array, "B"] | None = None  # of the tokens that come next: those that are real


def empty(delta: DeltaNet, batch: int) -> State:
    """The state before the first token."""
    return State(
        jnp.zeros((batch, delta.value_heads, delta.key_dim, delta.value_dim), jnp.float32),
        jnp.zeros((batch, delta.kernel - 1, delta.channels), jnp.float32),
    )


def mix(
    spec: LayerSpec, params: Params, n: Float[Array, "B T M"], state: State | None = None
) -> tuple[Float[Array, "B T M"], State]:
    """What the layer adds to the residual stream, and the state behind the last real token."""
    delta = spec.delta
    assert delta is not None
    batch, time = n.shape[:2]
    state = empty(delta, batch) if state is None else state
    x = jnp.concatenate([state.inputs, linear(n, params, "delta_qkv")], axis=1)
    width = delta.key_heads * delta.key_dim
    q, k, v = jnp.split(jax.nn.silu(convolved(x, params["conv"])), [width, 2 * width], axis=-1)
    each = delta.value_heads // delta.key_heads
    q, k = (
        jnp.repeat(_unit(y.reshape(batch, time, delta.key_heads, delta.key_dim)), each, axis=2)
        for y in (q, k)
    )
    v = v.reshape(batch, time, delta.value_heads, delta.value_dim)
    rate = jnp.exp(params["log_decay"].astype(jnp.float32))
    a = linear(n, params, "delta_a") + params["decay_bias"].astype(jnp.float32)[None, None]
    g = -jax.nn.softplus(a) * rate[None, None]
    beta = jax.nn.sigmoid(linear(n, params, "delta_b"))
    inputs = x[:, time:]
    if state.counts is not None:
        real = jnp.arange(time, dtype=jnp.int32)[None, :] < state.counts[:, None]
        g, beta = (jnp.where(real[..., None], y, 0.0) for y in (g, beta))
        last = state.counts[:, None] + jnp.arange(delta.kernel - 1, dtype=jnp.int32)[None, :]
        inputs = jnp.take_along_axis(x, last[..., None], axis=1)
    out, matrix = delta_rule(q * delta.key_dim**-0.5, k, v, g, beta, state.matrix)
    z = linear(n, params, "delta_z").reshape(out.shape)
    y = rms_norm(out, params["delta_norm"], spec.norm_eps) * jax.nn.silu(z)
    y = linear(y.reshape(batch, time, -1), params, "delta_out")
    return y, State(matrix, inputs)


def convolved(x: Float[Array, "B S C"], weight: Float[Array, "C 1 k"]) -> Float[Array, "B S-k+1 C"]:
    """y_t = sum_j w_j x_{t+j}, channel by channel: x begins k - 1 tokens before y."""
    taps = weight.shape[2]
    time = x.shape[1] - taps + 1
    w = weight.astype(jnp.float32)
    return sum(
        (x[:, j : j + time] * w[None, None, :, 0, j] for j in range(taps)),
        start=jnp.zeros((x.shape[0], time, x.shape[2]), jnp.float32),
    )


def delta_rule(
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B T H Dk"],
    v: Float[Array, "B T H Dv"],
    g: Float[Array, "B T H"],
    beta: Float[Array, "B T H"],
    matrix: Float[Array, "B H Dk Dv"],
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H Dk Dv"]]:
    """o_t of every token and the matrix behind the last one; `g` is at most 0."""
    batch, time, heads = g.shape
    size = min(CHUNK, time)
    pad = -time % size  # such tokens have g = beta = 0: they leave the matrix as it is

    def chunks(y: Array) -> Array:
        y = jnp.pad(y, [(0, 0), (0, pad)] + [(0, 0)] * (y.ndim - 2))
        y = y.reshape(batch, -1, size, *y.shape[2:])
        return jnp.moveaxis(jnp.moveaxis(y, 3, 2), 1, 0)  # [N, B, H, C, ...]

    # Run again on the way back, or what is inside every chunk would be kept for it.
    matrix, out = jax.lax.scan(
        jax.checkpoint(_chunk, prevent_cse=False),
        matrix,
        tuple(chunks(y) for y in (q, k, v, g, beta)),
    )
    out = jnp.moveaxis(out, 0, 1).swapaxes(2, 3)  # [B, N, C, H, Dv]
    return out.reshape(batch, -1, heads, v.shape[3])[:, :time], matrix


def _chunk(
    matrix: Float[Array, "B H Dk Dv"], tokens: tuple[Array, ...]
) -> tuple[Float[Array, "B H Dk Dv"], Float[Array, "B H C Dv"]]:
    """One chunk; tokens are q, k, v [B, H, C, D] and g, beta [B, H, C]."""
    q, k, v, g, beta = tokens
    size = g.shape[-1]
    c = jnp.cumsum(g, axis=-1)
    upto = jnp.tril(jnp.ones((size, size), bool))
    apart = jnp.where(upto[None, None], c[..., :, None] - c[..., None, :], -jnp.inf)
    decay = jnp.exp(apart)
    since, until = jnp.exp(c)[..., None], jnp.exp(c[..., -1:] - c)[..., None]
    below = jnp.tril(_einsum("bhid,bhjd->bhij", k, k) * decay * beta[..., None], -1)
    new = (v - _einsum("bhid,bhde->bhie", k, matrix) * since) * beta[..., None]
    system = below + jnp.eye(size, dtype=jnp.float32)[None, None]
    u = jax.lax.linalg.triangular_solve(system, new, left_side=True, lower=True, unit_diagonal=True)
    out = _einsum("bhid,bhde->bhie", q, matrix) * since
    out = out + _einsum("bhij,bhje->bhie", _einsum("bhid,bhjd->bhij", q, k) * decay, u)
    kept = matrix * jnp.exp(c[..., -1])[..., None, None]
    return kept + _einsum("bhid,bhie->bhde", k * until, u), out


def _unit(x: Float[Array, "*A D"]) -> Float[Array, "*A D"]:
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + NORM_EPS)
