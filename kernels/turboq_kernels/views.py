"""One view of the two caches: head-pages and where they lie, whatever owns them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from turboq.cache import paged
from turboq.cache.contiguous import GroupBuffers, LayerCache
from turboq.cache.layer import HeadGroup, Leaves
from turboq.cache.paged import PagedView
from turboq.numbers import packing
from turboq_kernels import sides
from turboq_kernels.decode.types import Pages, contiguous_pages, pool_pages


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupView:
    """Stored K and V of one head group as head-pages, and its exact sinks.

    These are [B, N, sinks, D], or of a pool [rows, N, sinks, D] with the sequences in `rows` [B].
    """

    k: Leaves
    v: Leaves
    pages: Pages
    page: int
    heads: Int[Array, "R"]  # head (within the group) of every head-page
    k_sinks: Any
    v_sinks: Any
    rows: Any = None

    def sinks(self) -> tuple[Any, Any]:
        """Those of K and V of the sequences, [B, N, sinks, D]."""
        if self.rows is None:
            return self.k_sinks, self.v_sinks
        return paged.rows_of(self.k_sinks, self.rows), paged.rows_of(self.v_sinks, self.rows)


def of_group(cache: LayerCache | PagedView, group: HeadGroup, buffers: GroupBuffers) -> GroupView:
    """The head-pages of one group of a contiguous or paged cache; nothing is copied."""
    if isinstance(cache, PagedView):
        return _of_pool(cache, group, buffers)
    batch, n = cache.lengths.shape[0], len(group.heads)
    # Without the barrier XLA writes the cache twice, once per shape, and copies it for that.
    k, v = jax.lax.optimization_barrier((buffers.k, buffers.v))
    count = cache.slots // packing.PAGE
    return GroupView(
        k=sides.flat(k, group.k, packing.PAGE),
        v=sides.flat(v, group.v, packing.PAGE),
        pages=contiguous_pages(batch, n, count),
        page=packing.PAGE,
        heads=jnp.arange(batch * n * count, dtype=jnp.int32) // count % n,
        k_sinks=buffers.k_sinks,
        v_sinks=buffers.v_sinks,
    )


def _of_pool(cache: PagedView, group: HeadGroup, buffers: GroupBuffers) -> GroupView:
    n = len(group.heads)
    k, v = jax.lax.optimization_barrier((buffers.k, buffers.v))
    total = jax.tree.leaves(k)[0].shape[0]
    return GroupView(
        k=sides.flat(k, group.k, cache.page),
        v=sides.flat(v, group.v, cache.page),
        pages=pool_pages(cache.table, n),
        page=cache.page,
        heads=jnp.arange(total * n, dtype=jnp.int32) % n,
        k_sinks=buffers.k_sinks,
        v_sinks=buffers.v_sinks,
        rows=cache.rows,
    )
