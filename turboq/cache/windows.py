"""Which pages a sliding window needs, and how a cache gives up the others.

A query at position t of a layer with window W sees the tokens t - W + 1 .. t. The next n queries of
a sequence of `length` tokens thus need W + n - 1 tokens, which lie on at most

    ceil((W + n - 2) / 256) + 1

pages, from the page of token max(length - W + 1, 0) on. A cache of such a layer holds so many
pages: for one token at a time its window and a page. Slot s then holds token `dropped` + s, where
`dropped` counts the tokens of the pages given up; pages move down when another one has left.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from turboq.numbers.packing import PAGE


def pages_held(window: int | None, tokens: int, *, new: int = 1, page: int = PAGE) -> int:
    """Pages that `new` queries at the end of up to `tokens` tokens need: all without a window."""
    pages = -(-tokens // page)
    return pages if window is None else min(pages, -(-(window + new - 2) // page) + 1)


def pool_pages(
    pages: int, window: int | None, *, rows: int, per_sequence: int, page: int = PAGE
) -> int:
    """Pages of the pool that sequences of up to `per_sequence` pages share: of a window those that
    `rows` of them need and, while one's prompt is written, all of its own."""
    if window is None:
        return pages
    return min(pages, rows * pages_held(window, per_sequence * page, page=page) + per_sequence)


def first_needed(window: int, length: Int[Array, "B"]) -> Int[Array, "B"]:
    """The first token of the first page that a query at position `length` needs."""
    return jnp.maximum(length - window + 1, 0) // PAGE * PAGE


def moved(x: Array, given_up: Int[Array, "B"], old: int, new: int, axis: int) -> Array:
    """`new` of the `old` pages along `axis` of x [B, ...] after given_up[b]; zeros follow.

    The axis may count entries of pages, any number of them in each.
    """
    if old == 0 or x.shape[axis] == 0:
        return x
    shape = x.shape
    x = x.reshape(*shape[:axis], old, shape[axis] // old, *shape[axis + 1 :])
    which = given_up[:, None] + jnp.arange(new, dtype=jnp.int32)[None]

    def one(x, which):
        return jnp.take(x, which, axis=axis - 1, mode="fill", fill_value=0)

    out = jax.vmap(one)(x, which)
    return out.reshape(*shape[:axis], new * (shape[axis] // old), *shape[axis + 1 :])
