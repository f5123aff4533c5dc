"""A step of one token into a pool whose every byte is something: what is not written must stay."""

from __future__ import annotations

import dataclasses

import encode_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
from tolerances import TOL

from turboq.cache import paged
from turboq.cache.layer import HeadGroup, KVLayer, TokenPolicy, uniform_layer
from turboq.codecs import TurboQuantMSE, TurboQuantProd
from turboq.numbers import half

PAGES, ROWS, ROOM = 9, 5, 128  # pages and rows of the pool, slots of a sequence


def layer_of_many(*, simple: bool):
    """Heads 0 and 2 and head 1 stored differently; all alike if `simple`."""
    policy, mse = TokenPolicy(sinks=2, recent=3), TurboQuantMSE(dim=64, bits=2)
    learned, arrays = cases.make("per_head_head", dim=64, heads=3)
    if simple:
        return uniform_layer(kv_heads=3, k=learned, v=mse, k_arrays=arrays, policy=policy)
    prod = TurboQuantProd(dim=64, bits=3)
    transform, more = cases.make("transform_code", dim=64, heads=2)
    arrays = {name: a[:1] for name, a in arrays.items()}
    groups = (
        HeadGroup(heads=(0, 2), k=prod, v=transform, k_arrays={}, v_arrays=more),
        HeadGroup(heads=(1,), k=learned, v=mse, k_arrays=arrays, v_arrays={}),
    )
    return KVLayer(groups=groups, policy=policy)


def full(rng, layer, where, page=64, *, float16_bits=False):
    """A pool in which nothing is zero but bits behind sequences."""
    rows = page // 32
    before = jnp.zeros((PAGES, rows), jnp.uint32) - 1  # of every page and word row
    pages = where.table.reshape(-1)
    before = before.at[pages].set(paged._before(where.starts, 2, rows).reshape(-1, rows))

    def filled(x):
        if x.dtype == jnp.uint32:
            folded = x.shape[-2:]  # all word rows of a page
            mask = jnp.repeat(before, np.prod(folded) // rows, axis=1)
            mask = mask.reshape(PAGES, 1, 1, *folded)
            return jnp.asarray(rng.integers(0, 2**32, x.shape), jnp.uint32) & mask
        return half.like(jnp.asarray(rng.uniform(1.0, 2.0, x.shape), half.values(x).dtype), x)

    cache = paged.init(layer, pages=PAGES, rows=ROWS, page=page, float16_bits=float16_bits)
    groups = jax.tree.map(filled, cache.groups)
    return dataclasses.replace(cache, groups=groups, overflow=jnp.arange(3, 3 + ROWS))


def located(starts, counts, room=ROOM):
    """Sequences in rows and pages out of order."""
    order = jnp.asarray([[8, 1], [0, 7], [2, 6], [5, 3]], jnp.int32)
    each = (jnp.asarray(x, jnp.int32) for x in ([4, 0, 3, 1], starts, counts, [room] * 4))
    rows, starts, counts, room = each
    return paged.Where(tables=(order,), rows=rows, starts=starts, counts=counts, room=room)


def same(got, want):
    """Equal but for a code near a threshold; numbers within a unit of their type."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = half.values(a), half.values(b)
        if a.dtype == jnp.uint32:
            assert np.sum(np.asarray(a) != np.asarray(b)) <= TOL["unclear_words"]
        elif jnp.issubdtype(a.dtype, jnp.floating):
            unit = float(jnp.finfo(a.dtype).eps) if a.dtype != jnp.float32 else TOL["encode_f32"]
            a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
            np.testing.assert_allclose(a, b, rtol=unit)
        else:
            np.testing.assert_array_equal(a, b)
