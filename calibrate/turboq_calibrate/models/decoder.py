"""The decoder: pure functions over a dict of weights, with one attention plug point.

    x <- x + o(attend(q, k, v)),   x <- x + down(act(gate(n)) * up(n)),   n = RMS-normalised x

where a layer may normalise what is added once more (`LayerSpec.post_norms`).
Every use of attention is an `Attend` function: exact attention, capture of q, k, v, simulated
quantization, the packed cache. Arithmetic is float32 at HIGHEST precision on every device, whatever
type the weights are stored in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from turboq.cache.exact_attention import attention, soft_cap
from turboq.numbers import rope
from turboq_calibrate.models.spec import LayerSpec, ModelSpec

Params = dict[str, Array]
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
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
    x: Float[Array, "*A N"], weight: Float[Array, "N"], eps: float, offset: float = 0.0
) -> Float[Array, "*A N"]:
    """(offset + weight) * x / sqrt(mean(x^2) + eps) over the last axis."""
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    factor = weight.astype(jnp.float32)
    if offset:
        factor = offset + factor
    return x * inverse * jnp.broadcast_to(factor, x.shape)


def _normed(spec: LayerSpec, params: Params, x: Array, name: str) -> Array:
    return rms_norm(x, params[name], spec.norm_eps, spec.norm_offset)


def project_qkv(
    spec: LayerSpec, params: Params, x: Float[Array, "B T M"], positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T H D"], Float[Array, "B T K D"], Float[Array, "B T K Dv"]]:
    """Queries, keys and values as attention sees them: after bias, QK-norm and rotation."""
    n = _normed(spec, params, x, "attn_norm")
    batch, time = x.shape[:2]
    q = linear(n, params, "q").reshape(batch, time, spec.heads, spec.head_dim)
    k = linear(n, params, "k").reshape(batch, time, spec.kv_heads, spec.head_dim)
    v = linear(n, params, "v").reshape(batch, time, spec.kv_heads, spec.v_head_dim)
    if spec.qk_norm:
        q, k = _normed(spec, params, q, "q_norm"), _normed(spec, params, k, "k_norm")
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
    """The gated MLP of the normalised x."""
    n, act = _normed(spec, params, x, "mlp_norm"), ACTIVATIONS[spec.activation]
    return linear(act(linear(n, params, "gate")) * linear(n, params, "up"), params, "down")


def add(
    spec: LayerSpec, params: Params, x: Float[Array, "B T M"], y: Float[Array, "B T M"], norm: str
) -> Float[Array, "B T M"]:
    """The residual sum x + y, with y normalised by weight `norm` where the layer does that."""
    return x + (_normed(spec, params, y, norm) if spec.post_norms else y)


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
    return after_attention(spec, params, x, out), state


def after_attention(
    spec: LayerSpec, params: Params, x: Float[Array, "B T M"], out: Float[Array, "B T H Dv"]
) -> Float[Array, "B T M"]:
    """What a layer does with the output of its attention: both residual sums."""
    x = add(spec, params, x, linear(out.reshape(*x.shape[:2], -1), params, "o"), "attn_post_norm")
    return add(spec, params, x, feed_forward(spec, params, x), "mlp_post_norm")


def embed(spec: ModelSpec, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T M"]:
    """Token embeddings, float32, times the model's factor."""
    return scaled(spec, params["embedding"][tokens])


def scaled(spec: ModelSpec, rows: Float[Array, "*A M"]) -> Float[Array, "*A M"]:
    """Rows of the embedding in float32, times the model's factor."""
    rows = rows.astype(jnp.float32)
    return rows if spec.embed_scale == 1.0 else rows * jnp.float32(spec.embed_scale)


def head(spec: ModelSpec, params: Params, x: Float[Array, "B T M"]) -> Float[Array, "B T V"]:
    """Final norm and unembedding: logits in nats."""
    n = rms_norm(x, params["norm"], spec.norm_eps, spec.norm_offset)
    return soft_cap(linear(n, params, "unembedding"), spec.logit_softcap)


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
