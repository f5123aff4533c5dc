"""A token into the one pool by the TPU kernel: more heads than a search takes, races, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from columns_cases import DIM, ROPES, _fitted, inputs, make_layers
from jax.experimental.pallas import tpu as pltpu
from tolerances import TOL

from turboq.cache import columns as pools
from turboq.cache import model_cache
from turboq.cache.layer import TokenPolicy, uniform_layer
from turboq_kernels.columns import mosaic_tpu_append as append

LANES = model_cache.TPU_LANES


def state_of(layer, batch, capacity=300):
    (state,), (words,) = model_cache.init(
        model_cache.forms([layer]), batch=batch, capacity=capacity, lanes=LANES
    )
    return state, words


def of_heads(heads, policy):
    """A layer of so many heads alike."""
    (k, k_arrays), (v, v_arrays) = (
        _fitted(((8, 3), (8, 1)), tuple(range(heads)), side, "code", DIM) for side in (0, 1)
    )
    return uniform_layer(
        kv_heads=heads, k=k, v=v, policy=policy, k_arrays=k_arrays, v_arrays=v_arrays,
        rope=ROPES["half"],
    )  # fmt: skip


def both(state, words, k, v, counts, **options):
    put = functools.partial(append.append, **({"interpret": True} | options))
    if options:  # the race detector is not to be compiled away
        got = put(state, words, k, v, counts)
    else:
        got = jax.jit(put)(state, words, k, v, counts)
    return got, jax.jit(model_cache.put)(state, words, k, v, counts)


def same(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


def alike(form, got, want):
    """Of every head and sequence, whether two pools hold the same."""
    out = []
    for columns in (form.k, form.v):
        a, b = (np.asarray(pools.read(words, columns, DIM + 1, 8)) for words in (got, want))
        out += [*np.all(a == b, axis=(2, 3)).ravel()]
    return out


@pytest.mark.parametrize(("heads", "batch"), [(10, 3), (1, 5)])
def test_heads_of_one_search_and_of_several(heads, batch, rng):
    """16 vectors are searched at a time: 20 of one sequence, or 2 of each of five."""
    state, words = state_of(of_heads(heads, TokenPolicy(sinks=1, recent=16)), batch)
    s = append.specify(state, words, True)
    assert (s.parts, s.each) == ((2, 1) if heads == 10 else (1, 2))
    equal = []
    for _ in range(2):
        k, v = (rng.normal(size=(batch, 1, heads, DIM)).astype(np.float32) for _ in range(2))
        counts = jnp.arange(batch, dtype=jnp.int32) % 2
        got, want = both(state, words, k, v, counts)
        same((got[0].exact, got[0].lengths), (want[0].exact, want[0].lengths))
        equal += alike(state.form, got[1], want[1])
        state, words = want
    assert np.any(words)
    # Products in another order: two paths of one vector may leave as little as each other.
    assert np.mean(equal) >= TOL["window_equal"], np.mean(equal)


def test_copies_do_not_race(rng, capfd):
    """Nor read what nothing was written to: two tokens in pages that begin and go on."""
    layer = make_layers(rng, TokenPolicy(sinks=2, recent=3), rope=ROPES["half"], joined=3)[0]
    state, words = state_of(layer, 2)
    watched = pltpu.InterpretParams(
        detect_races=True, out_of_bounds_reads="raise", dma_execution_mode="on_wait"
    )
    for _ in range(2):
        _, k, v = inputs(rng, 1)
        got, want = both(state, words, k, v, None, interpret=watched)
        same(got, want)
        state, words = want
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("options", "lanes", "tokens", "says"),
    [
        ({}, LANES, 2, "one is appended"),
        ({}, 1, 1, "no multiple of 128"),
        ({"gain": "float16"}, LANES, 1, "float16 gain"),
    ],
)
def test_what_is_left_to_others(options, lanes, tokens, says, rng):
    layer = make_layers(rng, TokenPolicy(), **options)[0]
    (state,), (words,) = model_cache.init(
        model_cache.forms([layer]), batch=2, capacity=300, lanes=lanes
    )
    assert says in append.unsupported(state, words, tokens)
