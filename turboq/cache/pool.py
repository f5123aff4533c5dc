"""All layers of a model over one pool of pages: sequences that come, grow, fork and go.

Layers with a sliding window share a pool of their own (one per window), whose pages go back when no
query reaches them.

pool = Pool(layers, pages=1024, rows=64, per_sequence=32, page=256)
a = pool.pager.create()
where = pool.step([a], [512])                         # the prompt's pages
for i in range(len(layers)):                          # in the model's forward pass
    tail = pool.write(i, where, k, v)
    out = turboq_kernels.cache_attention(q, layers[i], pool.view(i, where), tail, ...)
b = pool.pager.fork(a)                                # shares the prompt's pages
"""

# pyright: strict, reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import jax
from jaxtyping import Array, Float

from turboq.cache import paged as paged_cache
from turboq.cache import windows as windows_
from turboq.cache.contiguous import Tail
from turboq.cache.layer import KVLayer
from turboq.cache.paged import PagedCache, PagedView, Residency, Where
from turboq.cache.pager import Evict, Pager
from turboq.numbers.packing import PAGE

# The old pool's buffers are given up: a step changes a few pages and copies none.
_write = jax.jit(paged_cache.write, donate_argnums=1)


class Pool:
    """A pager and the paged caches of all layers, which share page and row numbers.

    Args: those of `turboq.cache.pager.Pager`, and one `KVLayer` per layer. `pages` are those of the
      layers without a window; a window has as many at most, else

        rows * (pages of one sequence that decodes) + per_sequence,

      so that all rows decode while a prompt of any length comes in one step.

    Raises:
      ValueError: no layer, or a page size that does not suit one.

    Examples:
      >>> import jax.numpy as jnp
      >>> from turboq import Pool, TokenPolicy, TurboQuantMSE, uniform_layer
      >>> codec = TurboQuantMSE(dim=64, bits=3)
      >>> layer = uniform_layer(kv_heads=1, k=codec, v=codec, policy=TokenPolicy())
      >>> pool = Pool([layer], pages=8, rows=4, per_sequence=4, page=64)
      >>> one = pool.pager.create()
      >>> where = pool.step([one], [70])  # a prompt of 70 tokens takes two pages
      >>> tail = pool.write(0, where, jnp.ones((1, 70, 1, 64)), jnp.ones((1, 70, 1, 64)))
      >>> two = pool.pager.fork(one)  # shares them
      >>> pool.pager.length(two)
      70
    """

    def __init__(
        self,
        layers: Sequence[KVLayer],
        *,
        pages: int,
        rows: int,
        per_sequence: int,
        page: int = PAGE,
        evict: Evict | None = None,
    ):
        if not layers:
            raise ValueError(f"{len(layers)=} must be at least 1")
        self.layers = list(layers)
        windows = list(dict.fromkeys(layer.window for layer in layers))

        counts = [
            windows_.pool_pages(pages, window, rows=rows, per_sequence=per_sequence, page=page)
            for window in windows
        ]
        self.pager = Pager(
            pages=counts,
            windows=windows,
            rows=rows,
            per_sequence=per_sequence,
            page=page,
            recent=max(layer.ring for layer in layers),
            evict=evict,
        )
        self.caches: list[PagedCache] = [
            paged_cache.init(layer, pages=counts[pool], rows=rows, page=page, pool=pool)
            for layer in layers
            for pool in [windows.index(layer.window)]
        ]

    def step(self, names: Sequence[int], counts: Sequence[int]) -> Where:
        """Makes room for `counts[i]` more tokens of each sequence, copying what is shared.

        Raises:
          TurboqError: as `Pager.plan`.
        """
        step = self.pager.plan(names, counts)
        self.caches = [paged_cache.copy(cache, step) for cache in self.caches]
        return paged_cache.locate(step)

    def write(
        self, i: int, where: Where, k: Float[Array, "B T K D"], v: Float[Array, "B T K E"]
    ) -> Tail:
        """Stores the step's tokens in layer i (`turboq.cache.paged.write`)."""
        self.caches[i], tail = cast(
            tuple[PagedCache, Tail], _write(self.layers[i], self.caches[i], where, k, v)
        )
        return tail

    def view(self, i: int, where: Where) -> PagedView:
        """The step's sequences in layer i, its tokens included, for attention."""
        return paged_cache.view(self.caches[i], where)

    def residency(self) -> Residency:
        """Bytes of all layers: reserved, active, shared, exact tokens, fragmentation."""
        pools = range(len(self.pager.pools))
        return paged_cache.residency(self.caches, [self.pager.report(i) for i in pools])
