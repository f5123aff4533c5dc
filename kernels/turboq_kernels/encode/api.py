"""Dispatch of encode: (transform) + scale + code + pack + write at the next positions."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Int

from turboq.cache import contiguous as caches
from turboq.cache import paged as paged_cache
from turboq.cache.contiguous import LayerCache, Tail
from turboq.cache.layer import KVLayer
from turboq.cache.paged import PagedCache, Where
from turboq.numbers import packing
from turboq_kernels.encode import store

IMPLEMENTATIONS = ("xla", "mosaic_tpu", "triton")
# What None tries, in order, by the platform that runs the arrays.
_PREFERENCE = {"tpu": ("mosaic_tpu",), "gpu": ("triton",)}


def encode(
    layer: KVLayer,
    cache: LayerCache | PagedCache,
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K E"],
    *,
    counts: Int[Array, "B"] | None = None,
    where: Where | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[LayerCache | PagedCache, Tail]:
    """Appends T tokens (one, or a prefill chunk) to every sequence of a cache.

    Slots that are already written keep their bits. One by one and in chunks gives equal bytes. Of a
    contiguous cache's tokens the first counts[b] are real (default: all); a pool is told by `where`
    (`turboq.cache.paged.locate`). A kernel writes words in place if the cache is donated to the
    jitted function around this, and leaves scales, exact sinks and recent windows to XLA, but that
    one token of every sequence of a pool is written whole by one launch (on TPU without scales of
    float16).

    Args:
      implementation: a name of `IMPLEMENTATIONS` never falls back; None takes the present
        platform's kernel if it can encode all codecs of the layer, else "xla".
      interpret: run the named Pallas kernel in interpret mode (for tests on a CPU).

    Raises:
      ValueError: unknown implementation, or a named one that cannot encode a codec of the layer;
        a pool without `where` (or the other way round).
    """
    if isinstance(cache, LayerCache):
        if where is not None:
            raise ValueError("where is for a pool; a contiguous cache takes counts")
        name = choose(layer, packing.PAGE, implementation, interpret)
        by = None if name == "xla" else store.contiguous(name, interpret)
        return caches.write(layer, cache, k, v, counts, by)
    if where is None or counts is not None:
        raise ValueError("a pool takes where (turboq.cache.paged.locate), which holds the counts")
    name = choose(layer, cache.page, implementation, interpret)
    if name == "xla":
        return paged_cache.write(layer, cache, where, k, v)
    by = store.appending(name, layer, k.shape[1], interpret)
    if by is not None:
        return paged_cache.write(layer, cache, where, k, v, append=by)
    return paged_cache.write(layer, cache, where, k, v, store.pool(name, interpret))


def choose(layer: KVLayer, page: int, implementation: str | None, interpret: bool = False) -> str:
    """The implementation that `encode` takes.

    Raises:
      ValueError: unknown, or named and not able to.
    """
    if implementation is None:
        if interpret:
            raise ValueError(f"{interpret=} needs a named implementation: 'mosaic_tpu' or 'triton'")
        order = (*_PREFERENCE.get(jax.default_backend(), ()), "xla")
        return next(name for name in order if unsupported(layer, page, name) is None)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{implementation=} must be None or one of {IMPLEMENTATIONS} to encode")
    reason = unsupported(layer, page, implementation)
    if reason is not None:
        raise ValueError(f"{implementation=} cannot encode this case: {reason}; use 'xla' or None")
    return implementation


def unsupported(layer: KVLayer, page: int, name: str) -> str | None:
    """Why an implementation cannot encode some codec of a layer, or None."""
    if name == "xla":
        return None
    if layer.joint_heads is not None:
        return "joined heads: XLA writes them"
    if layer.rope is not None:
        return "keys before RoPE, or relative to a block: XLA writes them"
    codecs = (codec for group in layer.groups for codec in (group.k, group.v))
    reasons = (store.unsupported(name, codec, page) for codec in codecs)
    return next((reason for reason in reasons if reason is not None), None)
