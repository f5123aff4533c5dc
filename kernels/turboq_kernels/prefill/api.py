"""A chunk of a prompt: attention to the packed history and to itself, then into the cache."""

# pyright: strict, reportUnknownMemberType=false

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from turboq.cache import contiguous as caches
from turboq.cache import overflow
from turboq.cache import paged as paged_cache
from turboq.cache.contiguous import LayerCache, Tail
from turboq.cache.layer import KVLayer
from turboq.cache.paged import PagedCache, PagedView, Where
from turboq.cache.simulate import round_exact
from turboq_kernels.attention import api as attention
from turboq_kernels.attention import base
from turboq_kernels.encode import encode


@functools.partial(jax.jit, static_argnames=attention.STATIC)
def prefill(
    q: Float[Array, "B T H Q"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K E"],
    layer: KVLayer,
    cache: LayerCache | PagedCache,
    *,
    counts: Int[Array, "B"] | None = None,
    where: Where | None = None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: Float[Array, "H"] | None = None,
    implementation: str | None = None,
    interpret: bool = False,
    splits: int | None = None,
    block_tokens: int = 1024,
) -> tuple[Float[Array, "B T H E"], LayerCache | PagedCache]:
    """(output, cache) of T new tokens per sequence: they see each other exactly, then are encoded.

    The history is read as `cache_attention` reads it: packed outside of sinks and of each query's
    recent window. `cache_attention` after `cache.contiguous.write` differs in that queries see the
    older tokens of their own chunk packed; here what enters the cache is not read back from it,
    which is what a prompt's quality wants and what costs least. Memory: "xla" holds T * (T +
    recent) logits per head, so long prompts go in chunks; kernels hold tiles.

    The first counts[b] tokens are real (a pool: `where.counts`); outputs of others are arbitrary.

    Args: as `turboq_kernels.attention.cache_attention` and `turboq_kernels.encode.encode`.

    Raises:
      ValueError: as those two.

    Examples:
      >>> import jax.numpy as jnp
      >>> from turboq import TokenPolicy, TurboQuantMSE, contiguous, uniform_layer
      >>> from turboq_kernels import prefill_attention
      >>> codec = TurboQuantMSE(dim=64, bits=3)
      >>> layer = uniform_layer(kv_heads=2, k=codec, v=codec, policy=TokenPolicy())
      >>> cache = contiguous.init(layer, batch=1, capacity=256)
      >>> k = v = jnp.ones((1, 10, 2, 64))  # [B, T, K, D]
      >>> q = jnp.ones((1, 10, 4, 64))  # [B, T, H, D]
      >>> out, cache = prefill_attention(q, k, v, layer, cache, scale=64**-0.5)
      >>> out.shape, cache.lengths.tolist()
      ((1, 10, 4, 64), [10])
    """
    attention.check(q, layer, implementation, window)
    options = base.Options(
        scale=scale, window=window, softcap=softcap, implementation=implementation,
        interpret=interpret, splits=splits, block_tokens=block_tokens,
    )  # fmt: skip
    if isinstance(cache, LayerCache):
        history, room = cache, jnp.int32(cache.capacity)
        counts_ = jnp.full(q.shape[:1], q.shape[1], jnp.int32) if counts is None else counts
    else:
        if where is None:
            raise ValueError("a pool takes where (turboq.cache.paged.locate)")
        history = paged_cache.view(cache, where, before=True)
        room, counts_ = where.room, where.counts
    steps = jnp.arange(q.shape[1], dtype=jnp.int32)[None, :]
    positions = history.lengths[:, None] + steps
    valid = steps < overflow.split(history.lengths, counts_, room)[0][:, None]
    out = base.cache_attention(
        q, layer, history, _tail(layer, history, k, v, jnp.where(valid, positions, -1)),
        q_positions=positions, options=options, sink_logits=sink_logits, own=True,
    )  # fmt: skip
    new, _ = encode(
        layer, cache, k, v, counts=counts, where=where,
        implementation=implementation, interpret=interpret,
    )  # fmt: skip
    return out, caches.settled(layer, new) if isinstance(new, LayerCache) else new


def _tail(
    layer: KVLayer,
    history: LayerCache | PagedView,
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K E"],
    positions: Int[Array, "B T"],
) -> Tail:
    """The ring as it was, and the chunk itself as the ring would hold it."""
    k, v = round_exact(layer.policy, k), round_exact(layer.policy, v)
    if not layer.ring:
        return Tail(k=k, v=v, positions=positions)
    groups = history.groups if isinstance(history, LayerCache) else history.own()
    ring_k, ring_v = caches.ring_of(layer, groups)
    before = caches.ring_positions(history.lengths, layer.ring)
    return Tail(
        k=jnp.concatenate([ring_k, k], axis=1),
        v=jnp.concatenate([ring_v, v], axis=1),
        positions=jnp.concatenate([before, positions], axis=1),
    )
