"""Attention over the packed cache: the call a model makes, prefill or decode."""

# pyright: strict, reportUnknownMemberType=false

from __future__ import annotations

import functools

import jax
from jaxtyping import Array, Float, Int

from turboq.cache.contiguous import LayerCache, Tail
from turboq.cache.layer import KVLayer
from turboq.cache.paged import PagedView
from turboq_kernels.attention import base
from turboq_kernels.decode.api import IMPLEMENTATIONS as IMPLEMENTATIONS

STATIC = (
    "scale", "window", "softcap", "implementation", "interpret", "splits", "block_tokens",
)  # fmt: skip


@functools.partial(jax.jit, static_argnames=STATIC)
def cache_attention(
    q: Float[Array, "B T H D"],
    layer: KVLayer,
    cache: LayerCache | PagedView,
    tail: Tail,
    *,
    q_positions: Int[Array, "B T"],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: Float[Array, "H"] | None = None,
    implementation: str | None = None,
    interpret: bool = False,
    splits: int | None = None,
    block_tokens: int = 1024,
) -> Float[Array, "B T H E"]:
    """Causal attention of T queries per sequence over a packed cache, sinks and recent window.

    softmax(softcap(scale * q . k_hat)) v_hat with one softmax over exact and quantized tokens.
    Query t (at position q_positions[b, t]) sees token s exactly if s < sinks or
    s > t - recent, quantized otherwise, never beyond itself or `window`. The queries' own
    keys and values must have been written: `cache, tail = turboq.cache.contiguous.write(...)`, or
    `turboq.cache.paged.write` and its `view` for sequences of a shared pool.

    Temporary memory is one block: `block_tokens` unpacked K and V rows and logits per head.
    A query that sees no key gets zeros; unwritten slots never contribute.

    Args:
      sink_logits: a logit per query head that joins the denominator and no output (gpt-oss).
      implementation: "xla", "mosaic_tpu", "triton", or None for the first that supports the case
        on this platform. A named one never falls back.
      interpret: run the named Pallas kernel in interpret mode (checks on a CPU).
      splits: parts of the sequence read in parallel; None lets the implementation choose.
      block_tokens: tokens unpacked at a time by "xla".

    Raises:
      ValueError: unknown implementation, one that does not support the case, or heads that do not
        match the layer.

    Examples:
      >>> import jax.numpy as jnp
      >>> from turboq import TokenPolicy, TurboQuantMSE, contiguous, uniform_layer
      >>> from turboq_kernels import cache_attention
      >>> codec = TurboQuantMSE(dim=64, bits=3)
      >>> layer = uniform_layer(kv_heads=2, k=codec, v=codec, policy=TokenPolicy())
      >>> cache = contiguous.init(layer, batch=1, capacity=256)
      >>> k = v = jnp.ones((1, 10, 2, 64))  # [B, T, K, D]
      >>> cache, tail = contiguous.write(layer, cache, k, v)
      >>> q = jnp.ones((1, 1, 4, 64))  # [B, T, H, D]: one new query, two per KV head
      >>> out = cache_attention(
      ...     q, layer, cache, tail, q_positions=jnp.asarray([[9]]), scale=64**-0.5
      ... )
      >>> out.shape
      (1, 1, 4, 64)
    """
    check(q, layer, implementation, window)
    options = base.Options(
        scale=scale, window=window, softcap=softcap, implementation=implementation,
        interpret=interpret, splits=splits, block_tokens=block_tokens,
    )  # fmt: skip
    return base.cache_attention(
        q, layer, cache, tail, q_positions=q_positions, options=options, sink_logits=sink_logits
    )


def check(
    q: Float[Array, "B T H D"], layer: KVLayer, implementation: str | None, window: int | None
) -> None:
    """Refuses an unknown implementation, heads that the layer's do not divide, a wider window."""
    if layer.window is not None and (window is None or window > layer.window):
        raise ValueError(f"{window=} sees more than the {layer.window} tokens that the layer keeps")
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{implementation=} must be None or one of {IMPLEMENTATIONS}")
    if q.shape[2] % layer.kv_heads:
        raise ValueError(
            f"{q.shape[2]} query heads must be a multiple of the layer's {layer.kv_heads} KV heads"
        )
