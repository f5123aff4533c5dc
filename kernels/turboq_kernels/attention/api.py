"""Dispatch: which implementation reads the packed cache."""

from __future__ import annotations

import functools

import jax
from jaxtyping import Array, Float, Int

from turboq import packing
from turboq.cache import LayerCache, Tail
from turboq.layer import KVLayer
from turboq_kernels.attention import base

IMPLEMENTATIONS = ("xla",)


@functools.partial(
    jax.jit, static_argnames=("scale", "window", "softcap", "implementation", "block_tokens")
)
def cache_attention(
    q: Float[Array, "B T H D"],
    layer: KVLayer,
    cache: LayerCache,
    tail: Tail,
    *,
    q_positions: Int[Array, "B T"],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    implementation: str | None = None,
    block_tokens: int = 1024,
) -> Float[Array, "B T H E"]:
    """Causal attention of T queries per sequence over a packed cache, sinks and recent window.

    softmax(softcap(scale * q . k_hat)) v_hat with one softmax over exact and quantized tokens.
    Query t (at position q_positions[b, t]) sees token s exactly if s < sinks or
    s > t - recent, quantized otherwise, never beyond itself or `window`. The queries' own
    keys and values must have been written: `cache, tail = turboq.cache.write(...)`.

    Temporary memory is one block: `block_tokens` unpacked K and V rows and logits per head.
    A query that sees no key gets zeros; unwritten slots never contribute.

    Args:
      implementation: "xla", or None for the first that supports the case. A named one never
        falls back.
      block_tokens: tokens unpacked at a time, reduced to a divisor of the capacity.

    Raises:
      ValueError: unknown implementation, or heads that do not match the layer.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{implementation=} must be None or one of {IMPLEMENTATIONS}")
    if q.shape[2] % layer.kv_heads:
        raise ValueError(
            f"{q.shape[2]} query heads must be a multiple of the layer's {layer.kv_heads} KV heads"
        )
    pages = cache.capacity // packing.PAGE
    wanted = max(1, block_tokens // packing.PAGE)
    block_pages = max(d for d in range(1, min(wanted, pages) + 1) if pages % d == 0)
    return base.cache_attention(
        q, layer, cache, tail, q_positions=q_positions, scale=scale, window=window,
        softcap=softcap, block_pages=block_pages,
    )  # fmt: skip
