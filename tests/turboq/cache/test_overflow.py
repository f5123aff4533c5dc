"""Tokens past the capacity: stored by nobody, counted, and refused by whoever can."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from kv_cases import make_layer, tokens

from turboq.cache import contiguous as kv_cache
from turboq.cache import overflow
from turboq.cache import paged as paged_cache
from turboq.cache.layer import TokenPolicy
from turboq.cache.pool import Pool
from turboq.errors import TurboqError
from turboq.numbers.packing import PAGE

STEPS = 20
LAYER = make_layer("turboquant", np.random.default_rng(1), TokenPolicy(sinks=2, recent=3))


def data(count):
    return tokens(np.random.default_rng(2), LAYER, count)


@functools.cache
def almost_full():
    """Two sequences of 250 and 100 tokens in 256 slots."""
    k, v = data(250)
    empty = kv_cache.init(LAYER, batch=2, capacity=PAGE)
    return kv_cache.write(LAYER, empty, k, v, jnp.array([250, 100], jnp.int32))[0]


def loop(cache, k, v, check=False):
    """One token after another, as a user's own decode loop under jit."""

    def step(cache, kv):
        cache, _ = kv_cache.write(LAYER, cache, kv[0][:, None], kv[1][:, None])
        if check:
            overflow.check([cache])
        return cache, None

    return jax.lax.scan(step, cache, (k.swapaxes(0, 1), v.swapaxes(0, 1)))[0]


def equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


@pytest.mark.parametrize("donate", [(), (0,)])
def test_a_compiled_loop_counts_what_does_not_fit(donate):
    k, v = data(STEPS)
    run = jax.jit(loop, donate_argnums=donate)
    got = run(jax.tree.map(jnp.copy, almost_full()), k, v)
    assert got.lengths.tolist() == [PAGE, 100 + STEPS]
    assert got.overflow.tolist() == [250 + STEPS - PAGE, 0]
    # What is stored is what the tokens that fit leave, and attention sees no more than that.
    fits = kv_cache.write(LAYER, almost_full(), k, v, jnp.array([PAGE - 250, STEPS], jnp.int32))[0]
    equal(got.groups, fits.groups)
    with pytest.raises(TurboqError, match=r"layer 1: 14 tokens of sequence 0 did not fit"):
        overflow.check({"caches": [fits, got]})
    overflow.check(fits)


def test_a_chunk_over_the_end_keeps_its_first_tokens():
    k, v = data(STEPS)
    got, tail = jax.jit(functools.partial(kv_cache.write, LAYER))(almost_full(), k, v)
    fits = kv_cache.write(LAYER, almost_full(), k, v, jnp.array([PAGE - 250, STEPS], jnp.int32))[0]
    equal(got.groups, fits.groups)
    assert int(tail.positions.max()) == PAGE - 1


def test_checkify_says_it_inside():
    k, v = data(STEPS)
    run = jax.jit(checkify.checkify(functools.partial(loop, check=True)))
    error, _ = run(almost_full(), k, v)
    with pytest.raises(Exception, match="layer 0: 1 tokens did not fit"):
        error.throw()
    error, _ = run(almost_full(), k[:, :6], v[:, :6])
    error.throw()


def test_outside_jit_nothing_is_written():
    k, v = data(STEPS)
    with pytest.raises(TurboqError, match=r"250 \+ 20 tokens do not fit a cache of capacity 256"):
        kv_cache.write(LAYER, almost_full(), k, v)
    with pytest.raises(TurboqError, match=r"250 \+ 7 tokens do not fit"):
        kv_cache.write(LAYER, almost_full(), k, v, jnp.array([7, 20], jnp.int32))


def test_a_pool_counts_and_leaves_other_sequences_alone():
    """A loop that goes on behind its step: the table's free entries are page 0, another's."""
    pool = Pool([LAYER], pages=6, rows=3, per_sequence=3, page=64)
    other, name = pool.pager.create(), pool.pager.create()
    k, v = data(60)
    pool.write(0, pool.step([other, name], [60, 60]), k, v)
    where = pool.step([name], [1])
    before = pool.caches[0]

    @jax.jit
    def run(cache, where, k, v):
        def step(state, kv):
            cache, where = state
            cache, _ = paged_cache.write(LAYER, cache, where, kv[0][:, None], kv[1][:, None])
            return (cache, dataclasses.replace(where, starts=where.starts + where.counts)), None

        return jax.lax.scan(step, (cache, where), (k.swapaxes(0, 1), v.swapaxes(0, 1)))[0]

    cache, after = run(before, where, k[:1, :STEPS], v[:1, :STEPS])
    row = int(where.rows[0])
    assert cache.overflow.tolist() == [STEPS - 4 if r == row else 0 for r in range(3)]
    assert paged_cache.view(cache, after).lengths.tolist() == [64]
    mine = int(where.table[0, 0])
    for old, new in zip(before.groups, cache.groups, strict=True):
        equal(
            *(
                jax.tree.map(lambda x: np.delete(np.asarray(x), mine, axis=0), (g.k, g.v))
                for g in (old, new)
            )
        )
    with pytest.raises(TurboqError, match=f"16 tokens of sequence {row} did not fit"):
        overflow.check(cache)
    with pytest.raises(TurboqError, match=r"80 \+ 1 tokens do not fit the 64 slots"):
        paged_cache.write(LAYER, cache, after, k[:1, :1], v[:1, :1])
    # A row begins anew with its sequence; a fork's row has what its parent's had.
    again = dataclasses.replace(where, starts=where.starts * 0)
    cleared, _ = paged_cache.write(LAYER, cache, again, k[:1, :1], v[:1, :1])
    overflow.check(cleared)
