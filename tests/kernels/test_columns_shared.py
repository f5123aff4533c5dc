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
from turboq.cache.columns import BIT_OF, NONE
from turboq.cache.layer import TokenPolicy
from turboq.cache.model_cache import SharedPages
from turboq.cache.model_pool import ModelPool
from turboq.numbers.packing import PAGE, ROWS
from turboq_kernels import columns

CHUNK, ONES = 270, np.uint32(2**32 - 1)
LAYER = 1  # whose lanes are not the pool's first
POLICY = TokenPolicy(sinks=3, recent=2)
# Keys after RoPE and heads apart; the default form, joined heads and keys before RoPE. Layers, what
# they are off by, query tokens.
FORMS = {
    "apart": ({}, "columns", (1, 2)),
    "joined_before": ({"rope": ROPES["half"], "joined": HEADS}, "columns_decoded_float16", (1,)),
}

write = jax.jit(functools.partial(columns.write, implementation="triton", interpret=True))
xla_write = jax.jit(model_cache.write)


def forked(rng, layers):
    """A pool and a fork of 530 tokens of a sequence of 270: [page of both, page of its own, ...].

    What no token was written to is full of ones.
    """
    pool = ModelPool(layers, pages=5, rows=3, per_sequence=3)
    pool.words = [jnp.full_like(x, ONES) for x in pool.words]

    def extend(name, count):
        where = pool.step([name], [count])
        _, k, v = inputs(rng, CHUNK, batch=1)
        pool.write(LAYER, where, k, v)

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
    """A token of each; then one query token by the kernels of a step, two by the general way."""
    options, within, steps = FORMS[form]
    pool, names = forked(rng, make_layers(rng, POLICY, **options))
    where = pool.step(names, [1, 1])
    assert int(where.tables[0].min()) <= 0
    q, k, v = inputs(rng, 1)
    state, before = pool.state(LAYER, where)
    full = SharedPages(table=state.table, room=jnp.array([531, 270], jnp.int32))
    for shared in (full, state.shared):
        own = dataclasses.replace(state, shared=shared)
        _, want, _ = xla_write(own, before, k, v)
        after, words, tail = write(own, before, k, v)
        np.testing.assert_array_equal(words, want)
        np.testing.assert_array_equal(after.lengths, [531, 271 - (shared is full)])
        np.testing.assert_array_equal(after.overflow, [0, shared is full])
    for tokens in steps:
        q = jnp.concatenate([q, q[::-1]], axis=1)[:, :tokens]
        at = jnp.broadcast_to(after.lengths[:, None] - 1, q.shape[:2])
        run = functools.partial(attend, q, after, words, tail, q_positions=at, scale=SCALE)
        got, want = run(implementation="triton", interpret=True), run(implementation="xla")
        np.testing.assert_allclose(got, want, atol=TOL[within], err_msg=f"{tokens=}")


def test_a_token_takes_the_place_of_what_its_page_held(rng):
    """Pages of a sequence's own, full of ones: its bits are those over zeros, others are kept."""
    form = model_cache.forms(make_layers(rng, POLICY))
    assert form is not None
    (state, _), (zeros,) = model_cache.init(form, batch=2, capacity=3 * PAGE)
    lengths = jnp.array([530, 270], jnp.int32)
    state = dataclasses.replace(state, lengths=lengths)
    _, k, v = inputs(rng, 1)
    plain, over_ones = (
        np.asarray(write(state, words, k, v)[1]) for words in (zeros, jnp.full_like(zeros, ONES))
    )
    own = np.zeros(zeros.shape, np.uint32)
    for b, slot in enumerate(map(int, lengths)):
        bit = np.uint32(1) << np.uint32(BIT_OF[slot % PAGE // ROWS])
        for side in (state.form.k, state.form.v):
            own[b, slot // PAGE, slot % ROWS, side.lane[side.plane != NONE]] = bit
    np.testing.assert_array_equal(over_ones, plain | ~own)
    assert plain.any()
