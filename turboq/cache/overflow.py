"""Tokens that did not fit a cache: counted where they are written, refused where one can ask.

A compiled step cannot raise. It stores what fits, counts the rest per sequence (`overflow` of a
cache), and lengths stay what is stored. Whoever runs such steps asks now and then, or at the end:

    overflow.check(caches)                       # after a loop, outside jit: TurboqError
    step = checkify.checkify(step)               # or inside: step calls overflow.check(cache)
    error, out = jax.jit(step)(...); error.throw()

`greedy` and everything else in this project that loops over steps asks by itself.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jaxtyping import Array, Int

from turboq.errors import TurboqError

FIX = "create the cache with a larger capacity"


def split(
    lengths: Int[Array, "B"], counts: Int[Array, "B"], room: Int[Array, "B"] | Int[Array, ""]
) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """(how many of `counts` new tokens fit behind `lengths` into `room` slots, how many do not)."""
    fitting = jnp.minimum(counts, jnp.maximum(room - lengths, 0))
    return fitting, counts - fitting


def known(x: Any) -> np.ndarray | None:
    """The numbers of an array; None inside jit, or where other processes hold some of them."""
    if isinstance(x, jax.core.Tracer):
        return None
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return None
    return np.asarray(x)


def check(caches: Any) -> None:
    """Refuses caches (any pytree of contiguous or paged ones) to which a token did not fit.

    Inside jit it is a `checkify.check`, for functions under `jax.experimental.checkify.checkify`
    (JAX refuses it elsewhere); it must then be called where every device knows the counts.

    Raises:
      TurboqError: outside jit, some tokens are not stored.
    """
    for i, cache in enumerate(_caches(caches)):
        counts = known(cache.overflow)
        if counts is None:
            most = jnp.max(cache.overflow)
            text = "layer {layer}: {lost} tokens did not fit and are not stored: " + FIX
            checkify.check(most == 0, text, layer=jnp.int32(i), lost=most)
        elif counts.any():
            b = int(np.argmax(counts))
            raise TurboqError(
                f"layer {i}: {counts[b]} tokens of sequence {b} did not fit and are not stored"
                f" (of {np.count_nonzero(counts)} sequences in all): {FIX}"
            )


def _caches(tree: Any) -> list[Any]:
    """All caches of a pytree, in its order: whatever counts an `overflow`."""

    def is_cache(x: Any) -> bool:
        return hasattr(x, "overflow")

    return [x for x in jax.tree.leaves(tree, is_leaf=is_cache) if is_cache(x)]
