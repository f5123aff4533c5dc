"""The decoder: pure functions over a dict of weights, with one attention plug point.

    x <- x + o(attend(q, k, v)),   x <- x + down(act(gate(n)) * up(n)),   n = RMS-normalised x

where a layer may normalise what is added too, or that alone (`LayerSpec.post_norms`, `pre_norms`),
and the n of both may be the same (`LayerSpec.parallel`).
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

from turboq.cache.exact_attention import attention, soft_cap
from turboq.cache.layer import latent_keys
from turboq.numbers import rope
from turboq_calibrate.models import (
    delta_net,
    experts,
    latent_attention,
    mamba,
    stream,
    streamed_experts,
)
from turboq_calibrate.models.primitives import (
    Params,
    add,
    gated_mlp,
    linear,
    normed,
    plain_mlp,
    pre_normed,
    residual,
    rms_norm,
)
from turboq_calibrate.models.spec import DeltaNet, LayerSpec, Mamba, ModelSpec
from turboq_calibrate.models.streamed_experts import Streamed

# attend(spec, q [B,T,H,Q], k [B,T,K,D], v [B,T,K,Dv], positions [B,T], state)
#   -> (out [B,T,H,Dv], state)        (queries of latent attention meet `met(spec, k, v)`)
# and of layers with logit sinks [H] those behind the state.
Attend = Callable[..., tuple[Array, Any]]
MIXERS = {DeltaNet: delta_net.mix, Mamba: mamba.mix}


def project_qkv(
    spec: LayerSpec, params: Params, x: Float[Array, "B T Z"], positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T H Q"], Float[Array, "B T K D"], Float[Array, "B T K Dv"]]:
    """Queries, keys and values as attention sees them: after bias, norms and rotation.

    Of latent attention queries are [B, T, H, E + D]: `latent_attention.project`.
    """
    n = pre_normed(spec, params, x, "attn_norm")
    if spec.latent is not None:
        q, k, v = latent_attention.project(spec, params, n)
        rotated = rotate(spec, (q[..., spec.v_head_dim :], k), positions)
        return jnp.concatenate([q[..., : spec.v_head_dim], rotated[0]], axis=-1), rotated[1], v
    q = _projected(spec, params, n, "q", spec.heads)
    if spec.borrows_cache_of is not None:
        k, v = stream.borrowed(spec, x)
        q = rotate(spec, (q,), positions)[0]
    else:
        k, v = _keys_and_values(spec, params, n)
        q, k = rotate(spec, (q, k), positions)
    if spec.query_growth is not None:
        by, every = spec.query_growth
        grown = 1.0 + by * jnp.log1p(jnp.floor(positions.astype(jnp.float32) / every))
        q = q * grown[:, :, None, None]
    return q, k, v


def _projected(
    spec: LayerSpec, params: Params, n: Float[Array, "B T M"], name: str, heads: int
) -> Float[Array, "B T h D"]:
    """Queries or keys by head, normalised where the layer does that."""
    y = linear(n, params, name)
    if spec.qk_norm == "projection":
        y = normed(spec, params, y, f"{name}_norm")
    y = y.reshape(*n.shape[:2], heads, spec.head_dim)
    return normed(spec, params, y, f"{name}_norm") if spec.qk_norm == "head" else y


def _keys_and_values(
    spec: LayerSpec, params: Params, n: Float[Array, "B T M"]
) -> tuple[Float[Array, "B T K D"], Float[Array, "B T K Dv"]]:
    k = _projected(spec, params, n, "k", spec.kv_heads)
    v = linear(n, params, "k" if spec.values_are_keys else "v")
    v = v.reshape(*n.shape[:2], spec.kv_heads, spec.v_head_dim)
    if spec.value_norm:
        v = rms_norm(v, jnp.ones(v.shape[-1:]), spec.norm_eps)
    return k, v


def rotate(
    spec: LayerSpec, parts: tuple[Array, ...], positions: Int[Array, "B T"]
) -> tuple[Array, ...]:
    """The layer's rotary embedding of queries and keys [B, T, heads, D]."""
    if spec.rope is None:
        return parts
    cos, sin = rope.tables(spec.rope, positions[:, :, None])
    if spec.rope_magnitude != 1.0:
        cos, sin = cos * spec.rope_magnitude, sin * spec.rope_magnitude
    return tuple(rope.apply(part, cos, sin, spec.rope.layout) for part in parts)


def exact_attend(
    spec: LayerSpec,
    q: Float[Array, "B T H Q"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K Dv"],
    positions: Int[Array, "B T"],
    state: Any,
    sinks: Float[Array, "H"] | None = None,
) -> tuple[Float[Array, "B T H Dv"], Any]:
    """Causal float32 attention over the tokens at hand: the default plug."""
    del positions  # both sides are the same tokens: only their order matters
    k = met(spec, k, v)
    out = attention(
        q, k, v, scale=spec.scale, window=spec.window, softcap=spec.softcap, sink_logits=sinks
    )
    return out, state


def met(spec: LayerSpec, k: Array, v: Array) -> Array:
    """The keys that queries meet."""
    return k if spec.latent is None else latent_keys(k, v)


def sinks_of(spec: LayerSpec, params: Params) -> tuple[Array, ...]:
    """What an attention plug is given behind its state."""
    return (params["sinks"].astype(jnp.float32),) if spec.logit_sinks else ()


def join_attention(
    spec: LayerSpec, params: Params, x: Float[Array, "B T Z"], out: Float[Array, "B T H Dv"]
) -> Float[Array, "B T Z"]:
    """The residual sum with the projected, perhaps gated, output of attention."""
    if spec.latent is not None:
        out = latent_attention.expand(spec, params, out)
    y = out.reshape(*x.shape[:2], -1)
    if spec.output_gate:
        gate = linear(pre_normed(spec, params, x, "attn_norm"), params, "attn_gate")
        y = y * jax.nn.sigmoid(gate)
    y = linear(y, params, "o")
    return add(spec, params, x, y, "attn_post_norm")


def join_feed_forward(
    spec: LayerSpec,
    params: Params,
    x: Float[Array, "B T Z"],
    before: Float[Array, "B T Z"] | None = None,
) -> Float[Array, "B T Z"]:
    """The residual sum with the MLP, or the chosen experts, of the normalised x.

    The MLP of a parallel layer reads what there was `before` attention.
    """
    read = before if spec.parallel else x
    assert read is not None
    if spec.experts is not None:
        y = experts.mixture(spec, params, read)
    else:
        mlp = gated_mlp if spec.gated else plain_mlp
        y = mlp(spec, params, pre_normed(spec, params, read, "mlp_norm"))
    return stream.leave(spec, params, add(spec, params, x, y, "mlp_post_norm"))


def attention_half(
    spec: LayerSpec,
    params: Params,
    x: Float[Array, "B T Z"],
    positions: Int[Array, "B T"],
    attend: Attend,
    state: Any = None,
) -> tuple[Float[Array, "B T Z"], Any]:
    """A layer up to its MLP; `state` is what `attend` carries (a cache, statistics, nothing).

    A recurrent layer does without `attend`; its state is its own (`recurrence.State`, None: zero).
    """
    if spec.recurrent is not None:
        mix = MIXERS[type(spec.recurrent)]
        y, state = mix(spec, params, pre_normed(spec, params, x, "attn_norm"), state)
        return add(spec, params, x, y, "attn_post_norm"), state
    q, k, v = project_qkv(spec, params, x, positions)
    out, state = attend(spec, q, k, v, positions, state, *sinks_of(spec, params))
    return join_attention(spec, params, stream.lend(spec, x, k, v), out), state


def layer(
    spec: LayerSpec,
    params: Params,
    x: Float[Array, "B T Z"],
    positions: Int[Array, "B T"],
    attend: Attend,
    state: Any = None,
) -> tuple[Float[Array, "B T Z"], Any]:
    """One decoder layer with all of its weights."""
    y, state = attention_half(spec, params, x, positions, attend, state)
    return join_feed_forward(spec, params, y, x), state


def join(
    spec: LayerSpec, params: Params, x: Float[Array, "B T Z"], out: Float[Array, "B T H Dv"]
) -> Float[Array, "B T Z"]:
    """What a layer does after attention."""
    return join_feed_forward(spec, params, join_attention(spec, params, x, out), x)


def embed(spec: ModelSpec, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T Z"]:
    """The stream that enters the first layer (of most families the embeddings)."""
    rows = params["layer_embedding"][tokens] if spec.own_input else None
    return stream.begin(spec, params, scaled(spec, params["embedding"][tokens]), rows)


def scaled(spec: ModelSpec, rows: Float[Array, "*A M"]) -> Float[Array, "*A M"]:
    """Rows of the embedding in float32, times the model's factor."""
    rows = rows.astype(jnp.float32)
    return rows if spec.embed_scale == 1.0 else rows * jnp.float32(spec.embed_scale)


def head(spec: ModelSpec, params: Params, x: Float[Array, "B T Z"]) -> Float[Array, "B T V"]:
    """Final norm and unembedding: logits in nats."""
    n = normed(spec, params, residual(spec, x), "norm")
    logits = linear(n, params, "unembedding")
    if spec.logit_scale != 1.0:
        logits = logits * jnp.float32(spec.logit_scale)
    return soft_cap(logits, spec.logit_softcap)


# One compiled function per (spec, attend, shapes): jit's own cache is the cache, so layers that
# share a LayerSpec share the executable. `attend` must therefore be one function, not a fresh
# closure per layer: what differs between layers belongs in `state`.
_STATIC = ("spec", "attend")
run_project = jax.jit(project_qkv, static_argnames=("spec",))
whole_layer = jax.jit(layer, static_argnames=_STATIC)
whole_layer_donated = jax.jit(layer, donate_argnames=("state",), static_argnames=_STATIC)
_attention = jax.jit(attention_half, static_argnames=_STATIC)
_attention_donated = jax.jit(attention_half, donate_argnames=("state",), static_argnames=_STATIC)
_join_attention = jax.jit(join_attention, static_argnames=("spec",))
_join = jax.jit(join, static_argnames=("spec",))
_feed_forward = jax.jit(join_feed_forward, static_argnames=("spec",))
run_embed = jax.jit(embed, static_argnames=("spec",))
run_head = jax.jit(head, static_argnames=("spec",))


def run_layer(
    spec: LayerSpec,
    params: Params,
    x: Float[Array, "B T Z"],
    positions: Int[Array, "B T"],
    attend: Attend,
    state: Any = None,
    *,
    donate: bool = False,
) -> tuple[Float[Array, "B T Z"], Any]:
    """One compiled decoder layer; experts that are not in memory are read as they are due.

    `donate` lets it overwrite `state` in place.
    """
    if not isinstance(params, Streamed):
        run = whole_layer_donated if donate else whole_layer
        return run(spec, params, x, positions, attend, state)
    run = _attention_donated if donate else _attention
    x, state = run(spec, params, x, positions, attend, state)
    return streamed_experts.feed_forward(spec, params, x), state


def run_parts(
    spec: LayerSpec,
    params: Params,
    x: Float[Array, "B T Z"],
    positions: Int[Array, "B T"],
    attend: Attend,
    state: Any = None,
) -> tuple[Float[Array, "B T Z"], Any]:
    """`run_layer` compiled around `attend`, which compiles itself: many attends share the rest.

    A recurrent layer starts from zero and hands out nothing.
    """
    if spec.recurrent is not None:
        return run_layer(spec, params, x, positions, exact_attend)[0], None
    q, k, v = run_project(spec, params, x, positions)
    out, state = attend(spec, q, k, v, positions, state, *sinks_of(spec, params))
    x = stream.lend(spec, x, k, v)
    if not isinstance(params, Streamed):
        return _join(spec, params, x, out), state
    x = _join_attention(spec, params, x, out)
    return streamed_experts.feed_forward(spec, params, x), state


def run_feed_forward(
    spec: LayerSpec, params: Params, x: Float[Array, "B T Z"], before: Float[Array, "B T Z"]
) -> Float[Array, "B T Z"]:
    """`join_feed_forward`, compiled, or with experts read as they are due."""
    if isinstance(params, Streamed):
        return streamed_experts.feed_forward(spec, params, x)
    return _feed_forward(spec, params, x, before)


def default_positions(tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """0, 1, 2, ... for every sequence."""
    return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], tokens.shape)
