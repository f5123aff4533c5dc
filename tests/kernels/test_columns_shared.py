"""GPU kernels on a pool whose pages sequences share, in interpret mode, against XLA."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from columns_cases import HEADS, ROPES, SCALE, attend, inputs, make_layers
from tolerances import TOL

from turboq.cache import model_cache
from turboq.cache.layer import TokenPolicy
from turboq.cache.model_pool import ModelPool
from turboq.numbers.packing import PAGE
from turboq_kernels import columns

CHUNK, ONES = 270, np.uint32(2**32 - 1)
POLICY = TokenPolicy(sinks=3, recent=2)
# Keys after RoPE and heads apart; the default form, joined heads and keys before RoPE.
FORMS = {
    "apart": ({}, "columns"),
    "joined_before": ({"rope": ROPES["half"], "joined": HEADS}, "columns_decoded_float16"),
}

write = jax.jit(columns.write, static_argnames=("implementation", "interpret"))
by_kernel = functools.partial(columns.write, implementation="triton", interpret=True)


def shared(rng, layers):
    """A pool and a fork of 530 tokens of a sequence of 270: [page of both, page of its own, ...].

    What no token was written to is full of ones.
    """
    pool = ModelPool(layers, pages=5, rows=3, per_sequence=3)
    pool.words = [jnp.full_like(x, ONES) for x in pool.words]

    def extend(name, count):
        where = pool.step([name], [count])
        for i in range(len(layers)):
            _, k, v = inputs(rng, CHUNK, batch=1)
            pool.write(i, where, k, v)

    gone, a = pool.pager.create(), pool.pager.create()
    extend(gone, 10)
    extend(a, CHUNK)
    b = pool.pager.fork(a)
    pool.pager.drop(gone)
    extend(b, 260)
    first, *rest = pool.pager.pages_of(b)
    assert pool.pager.pages_of(a)[0] == first
    assert len(rest) == 2
    assert min(rest) < first < max(rest)
    return pool, [b, a]


@pytest.mark.parametrize("form", FORMS)
def test_steps_on_shared_pages_are_those_of_xla(form, rng):
    """A token of each, then one query token by the kernels of a step, and two by the general way."""
    options, within = FORMS[form]
    pool, names = shared(rng, make_layers(rng, POLICY, **options))
    where = pool.step(names, [1, 1])
    assert int(where.tables[0].min()) <= 0
    for i in range(len(pool.form.layers)):
        q, k, v = inputs(rng, 1)
        before = pool.state(i, where)
        full = dataclasses.replace(before[0].shared, room=jnp.array([531, 270], jnp.int32))
        full = dataclasses.replace(before[0], shared=full)
        late, late_words, _ = write(
            full, before[1], k, v, implementation="triton", interpret=True
        )
        np.testing.assert_array_equal(late.lengths, [531, 270])
        np.testing.assert_array_equal(late.overflow, [0, 1])
        *_, want, _ = model_cache.write(*before, k, v)
        *_, one, _ = model_cache.write(*before, k, v, jnp.array([1, 0], jnp.int32))
        state, words, tail = pool.write(i, where, k, v, by=by_kernel)
        np.testing.assert_array_equal(words, want)
        np.testing.assert_array_equal(late_words, one)
        np.testing.assert_array_equal(state.lengths, [531, 271])
        for tokens in (1, 2):
            q = jnp.concatenate([q, q[::-1]], axis=1)[:, :tokens]
            at = jnp.broadcast_to(state.lengths[:, None] - 1, q.shape[:2])
            run = functools.partial(attend, q, state, words, tail, q_positions=at, scale=SCALE)
            want_out = run(implementation="xla")
            got = run(implementation="triton", interpret=True)
            np.testing.assert_allclose(got, want_out, atol=TOL[within], err_msg=f"{tokens=}")


def test_a_token_takes_the_place_of_what_its_page_held(rng):
    """Pages of a sequence's own that hold what was there before, full of ones and of zeros."""
    form = model_cache.forms(make_layers(rng, POLICY))
    assert form is not None
    (state, _), (words,) = model_cache.init(form, batch=2, capacity=3 * PAGE)
    state = dataclasses.replace(state, lengths=jnp.array([531, 270], jnp.int32))
    _, k, v = inputs(rng, 1)
    _, over_zeros, _ = model_cache.write(state, words, k, v)
    written = np.asarray(over_zeros)
    for held in (0, ONES):
        _, got, _ = write(
            state, jnp.full_like(words, held), k, v, implementation="triton", interpret=True
        )
        bit = np.zeros(words.shape, np.uint32)
        _, xla, _ = model_cache.write(state, jnp.full_like(words, held), k, v)
        np.testing.assert_array_equal(got, xla)
    del bit, written
