"""What a layer keeps in place of keys and values: one matrix per head, and a convolution's inputs.

    S_t = exp(g_t) S_{t-1} + k_t u_t^T,   o_t = S_t^T q_t
    u_t = v_t,   or by the delta rule   u_t = beta_t (v_t - exp(g_t) S_{t-1}^T k_t)

Tokens go through S in chunks of C. With c_i the sum of g up to token i of a chunk, D_ij =
exp(c_i - c_j) for j <= i, and A the part of diag(beta) (K K^T * D) below its diagonal:

    U = V,   or by the delta rule   U = (I + A)^-1 diag(beta) (V - diag(exp(c)) K S)
    O = diag(exp(c)) Q S + (Q K^T * D) U,   S <- exp(c_C) S + (diag(exp(c_C - c)) K)^T U

Sources: Yang, Kautz, Hatamizadeh, "Gated Delta Networks" (2024), equation 10 and section 3.3; Dao,
Gu, "Transformers are SSMs" (2024), section 6.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from turboq_calibrate.models.primitives import Params
from turboq_calibrate.models.spec import DeltaNet, Mamba

CHUNK = 64  # tokens

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class State(NamedTuple):
    """What a sequence leaves behind: a matrix per head, and the convolution's last n inputs."""

    matrix: Float[Array, "B H Dk Dv"]
    inputs: Float[Array, "B n C"]
    counts: Int[Array, "B"] | None = None  # of the tokens that come next: those that are real


def empty(kind: DeltaNet | Mamba, batch: int) -> State:
    """The state before the first token."""
    return State(
        jnp.zeros((batch, *kind.matrix), jnp.float32),
        jnp.zeros((batch, kind.kernel - 1, kind.channels), jnp.float32),
    )


def convolution(
    params: Params, x: Float[Array, "B T C"], state: State
) -> tuple[Float[Array, "B T C"], Float[Array, "B n C"]]:
    """silu of the causal depthwise convolution, and the inputs that the next tokens see."""
    before, time = state.inputs.shape[1], x.shape[1]
    x = jnp.concatenate([state.inputs, x], axis=1)
    y = convolved(x, params["conv"])
    if "conv_bias" in params:
        y = y + params["conv_bias"].astype(jnp.float32)[None, None]
    inputs = x[:, time:]
    if state.counts is not None:
        last = state.counts[:, None] + jnp.arange(before, dtype=jnp.int32)[None, :]
        inputs = jnp.take_along_axis(x, last[..., None], axis=1)
    return jax.nn.silu(y), inputs


def convolved(x: Float[Array, "B S C"], weight: Float[Array, "C 1 k"]) -> Float[Array, "B S-k+1 C"]:
    """y_t = sum_j w_j x_{t+j}, channel by channel: x begins k - 1 tokens before y."""
    taps = weight.shape[2]
    time = x.shape[1] - taps + 1
    w = weight.astype(jnp.float32)
    return sum(
        (x[:, j : j + time] * w[None, None, :, 0, j] for j in range(taps)),
        start=jnp.zeros((x.shape[0], time, x.shape[2]), jnp.float32),
    )


def of_real(state: State, x: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
    """`x`, and 0 of tokens that are padding."""
    if state.counts is None:
        return x
    real = jnp.arange(x.shape[1], dtype=jnp.int32)[None, :] < state.counts[:, None]
    return jnp.where(real[..., None], x, 0.0)


def pass_through(
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B T H Dk"],
    v: Float[Array, "B T H Dv"],
    g: Float[Array, "B T H"],
    matrix: Float[Array, "B H Dk Dv"],
    beta: Float[Array, "B T H"] | None = None,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H Dk Dv"]]:
    """o_t of every token and the matrix behind the last one; `g` is at most 0.

    With `beta` by the delta rule. A token with g = 0, and v or beta 0, leaves the matrix as it is.
    """
    batch, time, heads = g.shape
    size = min(CHUNK, time)
    pad = -time % size

    def chunks(y: Array) -> Array:
        y = jnp.pad(y, [(0, 0), (0, pad)] + [(0, 0)] * (y.ndim - 2))
        y = y.reshape(batch, -1, size, *y.shape[2:])
        return jnp.moveaxis(jnp.moveaxis(y, 3, 2), 1, 0)  # [N, B, H, C, ...]

    tokens = tuple(None if y is None else chunks(y) for y in (q, k, v, g, beta))
    matrix, out = jax.lax.scan(_chunk, matrix, tokens)
    out = jnp.moveaxis(out, 0, 1).swapaxes(2, 3)  # [B, N, C, H, Dv]
    return out.reshape(batch, -1, heads, v.shape[3])[:, :time], matrix


# Run again on the way back, or what is inside every chunk would be kept for it.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _chunk(
    matrix: Float[Array, "B H Dk Dv"], tokens: tuple[Array | None, ...]
) -> tuple[Float[Array, "B H Dk Dv"], Float[Array, "B H C Dv"]]:
    """One chunk; tokens are q, k, v [B, H, C, D], g [B, H, C] and the same of beta, or None."""
    q, k, v, g, beta = tokens
    assert q is not None
    assert k is not None
    assert v is not None
    assert g is not None
    size = g.shape[-1]
    c = jnp.cumsum(g, axis=-1)
    upto = jnp.tril(jnp.ones((size, size), bool))
    apart = jnp.where(upto[None, None], c[..., :, None] - c[..., None, :], -jnp.inf)
    decay = jnp.exp(apart)
    since, until = jnp.exp(c)[..., None], jnp.exp(c[..., -1:] - c)[..., None]
    u = v
    if beta is not None:
        below = jnp.tril(_einsum("bhid,bhjd->bhij", k, k) * decay * beta[..., None], -1)
        new = (v - _einsum("bhid,bhde->bhie", k, matrix) * since) * beta[..., None]
        system = below + jnp.eye(size, dtype=jnp.float32)[None, None]
        u = jax.lax.linalg.triangular_solve(
            system, new, left_side=True, lower=True, unit_diagonal=True
        )
    out = _einsum("bhid,bhde->bhie", q, matrix) * since
    out = out + _einsum("bhij,bhje->bhie", _einsum("bhid,bhjd->bhij", q, k) * decay, u)
    kept = matrix * jnp.exp(c[..., -1])[..., None, None]
    return kept + _einsum("bhid,bhie->bhde", k * until, u), out
