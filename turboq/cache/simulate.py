"""Simulated quantization: what a plan does to K and V, in one parallel pass, nothing packed.

The numbers are those of the packed cache (a test holds them together); only the storage differs,
so a quality table over long windows needs one causal pass per plan instead of T decode steps.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from turboq.cache import joint
from turboq.cache.exact_attention import attention_over_segments, causal
from turboq.cache.key_form import from_stored, to_stored
from turboq.cache.layer import HeadGroup, KVLayer, TokenPolicy, in_head_order, stored_until
from turboq.codecs.base import Arrays, Codec


def quantize_dequantize(
    codec: Codec, arrays: Arrays, x: Float[Array, "B T K D"]
) -> Float[Array, "B T K D"]:
    """decode(encode(x)) for all heads; every leaf of `arrays` has a leading K axis.

    An incomplete last block is padded to encode it; no cache would read it.
    """
    tokens = x.shape[1]
    x = jnp.pad(x, ((0, 0), (0, -tokens % codec.block), (0, 0), (0, 0)))

    def one_head(head_arrays, head_x):
        return codec.decode(head_arrays, codec.encode(head_arrays, head_x))

    return jax.vmap(one_head, in_axes=(0, 2), out_axes=2)(arrays, x)[:, :tokens]


# K and V of one form, and layers alike, are traced once; nothing is left of the inner function.
_coded = jax.jit(quantize_dequantize, static_argnames=("codec",), inline=True)


@jax.jit
def simulate(
    layer: KVLayer,
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K E"],
    positions: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T K D"], Float[Array, "B T K E"]]:
    """Keys and values as a cache of this layer would return them (every token quantized).

    With `layer.rope` keys are encoded as they are stored (`turboq.cache.key_form`), at `positions`
    (default: 0..T-1, the index in its row). A layer that encodes blocks takes its tokens from the
    exact ring, so rounded to its dtype.

    Raises:
      ValueError: the number of heads differs from the layer's.
    """
    check_heads(layer, k.shape[2])
    if layer.joint_heads is not None:
        where = jnp.arange(k.shape[1], dtype=jnp.int32)[None] if positions is None else positions
        k, v = joint.to_units(layer, k, v, where)
        k, v = simulate(joint.units(layer), k, v)
        return joint.from_units(layer, k, v, where)
    if layer.block > 1:
        k, v = round_exact(layer.policy, k), round_exact(layer.policy, v)
    if positions is None:
        positions = jnp.arange(k.shape[1], dtype=jnp.int32)[None, :]

    def keys(group: HeadGroup) -> Array:
        x = take_heads(k, group.heads).swapaxes(1, 2)
        x = to_stored(layer, group.k_arrays, x, positions).swapaxes(1, 2)
        x = _coded(group.k, group.k_arrays, x).swapaxes(1, 2)
        return from_stored(layer, group.k_arrays, x, positions).swapaxes(1, 2)

    k_hat = jnp.concatenate([keys(g) for g in layer.groups], axis=2)
    v_hat = [_coded(g.v, g.v_arrays, take_heads(v, g.heads)) for g in layer.groups]
    v_hat = jnp.concatenate(v_hat, axis=2)
    return in_head_order(layer, k_hat, 2), in_head_order(layer, v_hat, 2)


def round_exact(policy: TokenPolicy, x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """`x` as the exact-token buffers hold it."""
    return x.astype(jnp.dtype(policy.exact_dtype)).astype(jnp.float32)


def simulated_attention(
    layer: KVLayer,
    q: Float[Array, "B T H Q"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K E"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: Float[Array, "H"] | None = None,
) -> Float[Array, "B T H E"]:
    """Causal attention of a whole window at positions 0..T-1 through a quantized cache.

    Query t sees token s exactly if s < sinks or s >= layer.stored_until(t + 1), else quantized.
    """
    exact, stored = ((layer.keys(k, v), v) for k, v in ((k, v), simulate(layer, k, v)))
    return attend_to(
        layer.policy, layer.block, q, exact, stored,
        scale=scale, window=window, softcap=softcap, sink_logits=sink_logits,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("policy", "block", "scale", "window", "softcap"))
def attend_to(
    policy: TokenPolicy,
    block: int,
    q: Float[Array, "B T H D"],
    exact: tuple[Float[Array, "B T K D"], Float[Array, "B T K E"]],
    stored: tuple[Float[Array, "B T K D"], Float[Array, "B T K E"]],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: Float[Array, "H"] | None = None,
) -> Float[Array, "B T H E"]:
    """`simulated_attention` from what `simulate` returned: one program for codecs of all kinds."""
    (k, v), (k_hat, v_hat) = exact, stored
    batch, t = k.shape[:2]
    positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (batch, t))
    if policy.sinks:
        sink = (positions < policy.sinks)[:, :, None, None]
        k_hat = jnp.where(sink, round_exact(policy, k), k_hat)
        v_hat = jnp.where(sink, round_exact(policy, v), v_hat)
    seen = causal(positions, window=window)
    if not policy.recent + block - 1:
        segments = [(k_hat, v_hat, seen)]
    else:

        def packed(at):
            old = positions[:, None, :] < stored_until(policy, block, at + 1)[:, :, None]
            return old | (positions < policy.sinks)[:, None, :]

        segments = [
            (k_hat, v_hat, lambda at: seen(at) & packed(at)),
            (round_exact(policy, k), round_exact(policy, v), lambda at: seen(at) & ~packed(at)),
        ]
    return attention_over_segments(
        q, segments, scale=scale, softcap=softcap, sink_logits=sink_logits, window=window
    )


def take_heads(x: Float[Array, "B T K D"], heads: tuple[int, ...]) -> Float[Array, "B T N D"]:
    """The given heads of `x`; no copy when they are all of them in order."""
    if heads == tuple(range(x.shape[2])):
        return x
    return x[:, :, jnp.array(heads)]


def check_heads(layer: KVLayer, kv_heads: int) -> None:
    """Refuses keys whose number of heads is not the layer's, and codecs without their arrays."""
    if kv_heads != layer.kv_heads:
        raise ValueError(f"{kv_heads=} in the keys, but the plan's layer has {layer.kv_heads}")
    layer.check_arrays()
