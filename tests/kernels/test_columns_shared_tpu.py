"""TPU column kernels on pages that sequences share: as on pages of their own, in any order."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from columns_cases import DIM, GROUP, HEADS, ROPES, SCALE, attend, filled, make_layers

from turboq.cache.columns import BIT_OF
from turboq.cache.layer import TokenPolicy
from turboq.cache.model_cache import SharedPages
from turboq_kernels import columns

OPTIONS = {"implementation": "mosaic_tpu", "interpret": True}
HELD = 500  # in two pages of three


def used_before(words):
    """Ones where the next token goes, and in all of the page that nobody wrote."""
    row, bit = HELD % 8, BIT_OF[HELD % 256 // 8]
    words = words.at[:, HELD // 256, row].set(words[:, HELD // 256, row] | np.uint32(1 << bit))
    return words.at[:, 2].set(np.uint32(2**32 - 1))


def shared(rng, state, words):
    """The same pages elsewhere, among ones that are nobody's; and where they lie."""
    batch, count = words.shape[:2]
    table = rng.permutation(2 * batch * count)[: batch * count].reshape(batch, count)
    pool = jnp.full((1, 2 * batch * count, *words.shape[2:]), 2**32 - 1, jnp.uint32)
    pool = pool.at[0, table].set(words)
    places = jnp.asarray(table, jnp.int32)
    room = jnp.full((batch,), count * 256, jnp.int32)
    return dataclasses.replace(state, shared=SharedPages(table=places, room=room)), pool


@pytest.mark.parametrize("case", [{}, {"rope": "half", "joined": HEADS}], ids=["apart", "default"])
def test_a_step_on_shared_pages(rng, case):
    """What is written is what XLA writes, what is read what the same kernel reads elsewhere."""
    rope = case.get("rope") and ROPES[case["rope"]]
    layers = make_layers(rng, TokenPolicy(sinks=3, recent=2), rope, joined=case.get("joined"))
    held, words = filled(rng, layers, HELD, 768)
    state = held[0][0]
    clean = jnp.pad(words, [(0, 0)] * 3 + [(0, -words.shape[-1] % 128)])
    words = used_before(clean)
    k, v = (jnp.asarray(rng.normal(size=(2, 1, HEADS, DIM)), jnp.float32) for _ in range(2))
    q = jnp.asarray(rng.normal(size=(2, 1, GROUP * HEADS, DIM)), jnp.float32)
    new, own, tail = columns.write(state, words, k, v, **OPTIONS)
    _, due, _ = columns.write(state, clean, k, v, implementation="xla")
    mine = np.s_[:, :2, :, int(state.form.first[0]) : int(state.form.first[2])]
    np.testing.assert_array_equal(own[mine], due[mine])
    np.testing.assert_array_equal(own, words.at[mine].set(due[mine]))  # no other layer's
    elsewhere, pool = shared(rng, state, words)
    moved, pool, _ = columns.write(elsewhere, pool, k, v, **OPTIONS)
    np.testing.assert_array_equal(pool[0, np.asarray(moved.table)], own)
    untouched = np.setdiff1d(np.arange(pool.shape[1]), np.asarray(moved.table))
    assert np.all(np.asarray(pool)[0, untouched] == 2**32 - 1)
    at = new.lengths[:, None] - 1
    want, got = (
        attend(q, *of, tail, q_positions=at, scale=SCALE, **OPTIONS)
        for of in ((new, own), (moved, pool))
    )
    np.testing.assert_array_equal(got, want)
