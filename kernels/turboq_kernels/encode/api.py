"""Dispatch of encode: (transform) + scale + code + pack + write at the next positions."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from turboq import cache as caches
from turboq import paged_cache
from turboq.cache import LayerCache, Tail
from turboq.layer import KVLayer
from turboq.paged_cache import PagedCache, Where

IMPLEMENTATIONS = ("xla",)


def encode(
    layer: KVLayer,
    cache: LayerCache | PagedCache,
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K E"],
    *,
    counts: Int[Array, "B"] | None = None,
    where: Where | None = None,
    implementation: str | None = None,
) -> tuple[LayerCache | PagedCache, Tail]:
    """Appends T tokens (one, or a prefill chunk) to every sequence of a cache.

    Words that are already written are never encoded again: new codes are ORed into their own bits,
    so appending one by one and in chunks gives equal bytes. Of a contiguous cache's tokens the
    first counts[b] are real; a pool is told by `where` (`turboq.paged_cache.locate`).

    Args:
      implementation: "xla", or None. A named one never falls back.

    Raises:
      ValueError: unknown implementation, or a pool without `where` (or the other way round).
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"{implementation=} must be None or one of {IMPLEMENTATIONS} to encode")
    if isinstance(cache, LayerCache):
        if where is not None:
            raise ValueError("where is for a pool; a contiguous cache takes counts")
        return caches.write(layer, cache, k, v, counts)
    if where is None or counts is not None:
        raise ValueError("a pool takes where (turboq.paged_cache.locate), which holds the counts")
    return paged_cache.write(layer, cache, where, k, v)
