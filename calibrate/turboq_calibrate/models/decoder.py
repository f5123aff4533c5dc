"""The decoder: pure functions over a dict of weights, with one attention plug point.

    x <- x + o(attend(q, k, v)),   x <- x + down(silu(gate(n)) * up(n)),   n = RMS-normalised x

Every use of attention is an `Attend` function: exact attention, capture of q, k, v, simulated
quantization, the packed cache. Arithmetic is float32 at HIGHEST precision on every device, whatever
type the weights are stored in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from turboq.cache.exact_attention import attention
from turboq.numbers import rope
from turboq_calibrate.models.spec import LayerSpec, ModelSpec

Params = dict[str, Array]
# attend(spec, q [B,T,H,D], k [B,T,K,D], v [B,T,K,Dv], positions [B,T], state)
#   -> (out [B,T,H,Dv], state)
Attend = Callable[[LayerSpec, Array, Array, Array, Array, Any], tuple[Array, Any]]


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
    x: Float[Array, "*A N"], weight: Float[Array, "N"], eps: float
) -> Float[Array, "*A N"]:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis."""
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return x * inverse * jnp.broadcast_to(weight.astype(jnp.float32), x.shape)


def project_qkv(
    spec: LayerSpec, params: Params, x: Float[Array, "B T M"], positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T H D"], Float[Array, "B T K D"], Float[Array, "B T K Dv"]]:
    """Queries, keys and values as attention sees them: after bias, QK-norm and rotation."""
    n = rms_norm(x, params["attn_norm"], spec.norm_eps)
    batch, time = x.shape[:2]
    q = linear(n, params, "q").reshape(batch, time, spec.heads, spec.head_dim)
    k = linear(n, params, "k").reshape(batch, time, spec.kv_heads, spec.head_dim)
    v = linear(n, params, "v").reshape(batch, time, spec.kv_heads, spec.v_head_dim)
    if spec.qk_norm:
        q = rms_norm(q, params["q_norm"], spec.norm_eps)
        k = rms_norm(k, params["k_norm"], spec.norm_eps)
    if spec.rope is not None:
        cos, sin = rope.tables(spec.rope, positions[:, :, None])
        layout = spec.rope.layout
        q, k = rope.apply(q, cos, sin, layout), rope.apply(k, cos, sin, layout)
    return q, k, v


def exact_attend(
    spec: LayerSpec,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K Dv"],
    positions: Int[Array, "B T"],
    state: Any,
) -> tuple[Float[Array, "B T H Dv"], Any]:
    """Causal float32 attention over the tokens at hand: the default plug."""
    del positions  # both sides are the same tokens: only their order matters
    out = attention(q, k, v, scale=spec.scale, window=spec.window, softcap=spec.softcap)
    return out, state


def feed_forward(
    spec: LayerSpec, params: Params, x: Float[Array, "B T M"]
) -> Float[Array, "B T M"]:
    """The gated MLP, before the residual sum."""
    n = rms_norm(x, params["mlp_norm"], spec.norm_eps)
    return linear(jax.nn.silu(linear(n, params, "gate")) * linear(n, params, "up"), params, "down")


def layer(
    spec: LayerSpec,
    params: Params,
    x: Float[Array, "B T M"],
    positions: Int[Array, "B T"],
    attend: Attend,
    state: Any = None,
) -> tuple[Float[Array, "B T M"], Any]:
    """One decoder layer; `state` is whatever `attend` carries (a cache, statistics, nothing)."""
    q, k, v = project_qkv(spec, params, x, positions)
    out, state = attend(spec, q, k, v, positions, state)
    x = x + linear(out.reshape(*x.shape[:2], -1), params, "o")
    return x + feed_forward(spec, params, x), state


def embed(spec: ModelSpec, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T M"]:
    """Token embeddings, float32."""
    return params["embedding"][tokens].astype(jnp.float32)


def head(spec: ModelSpec, params: Params, x: Float[Array, "B T M"]) -> Float[Array, "B T V"]:
    """Final norm and unembedding: logits in nats."""
    return linear(rms_norm(x, params["norm"], spec.norm_eps), params, "unembedding")


# One compiled function per (spec, attend, shapes): jit's own cache is the cache, so layers that
# share a LayerSpec share the executable. `attend` must therefore be one function, not a fresh
# closure per layer: what differs between layers belongs in `state`.
run_layer = jax.jit(layer, static_argnames=("spec", "attend"))
run_layer_donated = jax.jit(layer, static_argnames=("spec", "attend"), donate_argnames=("state",))
run_embed = jax.jit(embed, static_argnames=("spec",))
run_head = jax.jit(head, static_argnames=("spec",))


def default_positions(tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """0, 1, 2, ... for every sequence."""
    return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], tokens.shape)
