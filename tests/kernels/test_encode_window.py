"""Searches of window codes by kernels, interpreted, against XLA's and against every word."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from columns_cases import DIM, ROPES, inputs, make_layers, write
from tolerances import TOL

from turboq.cache import columns as pools
from turboq.cache import model_cache
from turboq.cache.layer import TokenPolicy
from turboq.numbers import window, window_gain
from turboq_kernels import columns
from turboq_kernels.encode import mosaic_tpu_window, triton_window

HEADS = 2
CASES = {  # states, segments of the two heads, coordinates with those that are not stored, gains
    "16 states, a chunk": (16, (((8, 3), (8, 1)), ((24, 2),)), 24, 16, 3),
    "16 states, wide": (16, (((64, 3), (64, 2)), ((56, 8), (8, 1))), 128, 16, 1),
    "64 states": (64, (((8, 4), (8, 2)), ((24, 1),)), 24, 16, 2),
    "256 states, few gains": (256, (((8, 2),), ((8, 4), (8, 1))), 16, 4, 2),
}


SEARCHES = {"mosaic_tpu": mosaic_tpu_window, "triton": triton_window}
by_kernel = pytest.mark.parametrize("kernel", SEARCHES)


@functools.cache
def search(kernel):
    return jax.jit(functools.partial(SEARCHES[kernel].encode, interpret=True))


def pool(layers, capacity):
    """As wide as TPU kernels want it."""
    lanes = model_cache.TPU_LANES
    return model_cache.init(model_cache.forms(layers), batch=2, capacity=capacity, lanes=lanes)


def rows(states, segments, width):
    """Of heads, and how many coordinates each stores."""
    own = [window.rows(states, one, width) for one in segments]
    stored = [sum(n for n, _ in one) for one in segments]
    return jax.tree.map(lambda *x: jnp.asarray(np.stack(x), jnp.float32), *own), stored


def case_of(name, rng, batch=2):
    states, segments, width, count, tokens = CASES[name]
    code, stored = rows(states, segments, width)
    y = rng.standard_t(4, (batch, HEADS, tokens, width)) * rng.lognormal(0, 0.4, (batch, 1, 1, 1))
    weights = rng.uniform(0.2, 2, (HEADS, width))
    for h, n in enumerate(stored):
        y[:, h, :, n:], weights[h, n:] = 0, 0
    gains = np.geomspace(0.1, 20, count)[None] * [[1.0], [1.3]]
    return code, *(jnp.asarray(x, jnp.float32) for x in (y, gains, weights))


def of_head(code, h):
    return jax.tree.map(lambda x: x[h], code)


def by_xla(code, y, gains, weights, h):
    flat = y[:, h].reshape(-1, y.shape[-1])
    return window_gain.encode(of_head(code, h), flat, gains[h], weights[h])


def error(code, y, gains, weights, h, codes, index):
    """Weighted error of codes [N, C], float64."""
    values = np.asarray(window.decode(of_head(code, h), jnp.asarray(codes)), np.float64)
    gain = np.asarray(gains, np.float64)[h, index][:, None]
    flat = np.asarray(y[:, h], np.float64).reshape(values.shape)
    return np.square(flat - gain * values) @ np.asarray(weights[h], np.float64)


@by_kernel
@pytest.mark.parametrize("name", CASES)
def test_codes_leave_what_those_of_xla_leave(name, kernel, rng):
    """Equal but for ties of float32: error and nearly all codes."""
    code, y, gains, weights = case_of(name, rng)
    codes, index = search(kernel)(code, y, gains, weights)
    equal = []
    for h in range(HEADS):
        due, due_index = by_xla(code, y, gains, weights, h)
        got = np.asarray(codes[:, h]).reshape(due.shape)
        got_index = np.asarray(index[:, h]).reshape(-1)
        np.testing.assert_allclose(
            error(code, y, gains, weights, h, got, got_index),
            error(code, y, gains, weights, h, due, due_index), rtol=TOL["window_error"],
        )  # fmt: skip
        equal += [*np.all(got == np.asarray(due), axis=1)]
    assert np.mean(equal) >= TOL["window_equal"], np.mean(equal)


@by_kernel
@pytest.mark.parametrize(("memory", "bits"), [(4, 2), (6, 1), (8, 1)])
def test_the_least_error_over_every_word(memory, bits, kernel, rng):
    """Any weights of the code, not only good ones; 8 coordinates in float64."""
    taps = np.tril(np.ones((8, memory + 1))[:, ::-1], memory)[:, ::-1] * rng.normal(size=memory + 1)
    taps *= np.arange(memory + 1)[None] <= np.arange(8)[:, None]
    step, last = np.full(8, 1.3), np.full(8, 2.0 ** (bits - 1) - 1)
    code = window.Rows(*(jnp.asarray(x, jnp.float32)[None] for x in (step, last, taps)))
    y, weights = rng.normal(size=(1, 1, 20, 8)) * 2, rng.uniform(0.2, 2, (1, 8))
    codes, _ = search(kernel)(
        code, jnp.asarray(y, jnp.float32), None, jnp.asarray(weights, jnp.float32)
    )  # fmt: skip
    words = np.array(list(itertools.product(range(2**bits), repeat=8)))

    def values(words):
        sign = 2.0 * (words & 1) - 1
        reach = [np.pad(sign, ((0, 0), (j, 0)))[:, :8] * taps[:, j] for j in range(memory + 1)]
        return sum(reach) + step * ((words >> 1) - last / 2)

    found = np.square(y[0, 0] - values(np.asarray(codes[0, 0]).astype(int))) @ weights[0]
    every = values(words)
    least = [np.min(np.square(one - every) @ weights[0]) for one in y[0, 0]]
    np.testing.assert_allclose(found, least, rtol=TOL["window_error"])


@by_kernel
def test_broken_vectors_as_by_xla_and_no_others(kernel, rng):
    """NaN (on a TPU as if it were 0), a coordinate a thousand steps out, Inf, zeros."""
    code, y, gains, weights = case_of("16 states, a chunk", rng)
    broken = y.at[0, 0, 0, 5].set(jnp.nan).at[0, 0, 1, 3].set(-3e3).at[0, 0, 2, 0].set(jnp.inf)
    broken = broken.at[1, 0, 0].set(0.0)
    codes, index = search(kernel)(code, broken, gains, weights)
    whole, _ = search(kernel)(code, y, gains, weights)
    held = jnp.nan_to_num(broken, posinf=jnp.inf) if kernel == "mosaic_tpu" else broken
    due, due_index = by_xla(code, held, gains, weights, 0)
    got, due = np.asarray(codes[:, 0]).reshape(due.shape), np.asarray(due)
    np.testing.assert_array_equal(np.asarray(index[:, 0]).reshape(-1), due_index)
    np.testing.assert_array_equal(got[0, :16] & 1, due[0, :16] & 1)  # places of NaN are anything
    np.testing.assert_array_equal(got[1], due[1])
    # 1e12 in common leave the others some bits of their precision.
    others = weights.at[:, 0].set(0.0)
    left, best = (
        error(code, jnp.where(jnp.isfinite(broken), broken, 0), gains, others, 0, x, due_index)[2]
        for x in (got, due)
    )
    assert left <= TOL["window_far"] * best
    np.testing.assert_array_equal(codes[1, 0, 1:], whole[1, 0, 1:])
    np.testing.assert_array_equal(codes[:, 1], whole[:, 1])


@pytest.mark.parametrize(
    ("tokens", "options"),
    [
        (3, {"rope": ROPES["partial"], "block": 256, "gain": "none"}),
        (2, {"gain": "float16"}),
        (1, {"rope": ROPES["half"], "block": 256, "joined": 3}),
        (1, {"rope": ROPES["partial"], "joined": 1}),
    ],
)  # fmt: skip
@by_kernel
def test_the_pool_holds_the_same_bits(tokens, options, kernel, rng):
    """Layers of other bits in every head, sinks, a ring; one sequence gets fewer tokens."""
    layers = make_layers(rng, TokenPolicy(sinks=2, recent=3), **options)
    states, (words,) = pool(layers, 300)
    _, k, v = inputs(rng, 45)
    state, words, _ = write(states[0], words, k, v)
    _, k, v = inputs(rng, tokens)
    counts = jnp.array([tokens, tokens - 1], jnp.int32)
    got, due = (
        jax.jit(functools.partial(columns.write, implementation=name, interpret=name != "xla"))(
            state, words, k, v, counts
        )
        for name in (kernel, "xla")
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(due), strict=True):
        np.testing.assert_array_equal(a, b)
    held = np.asarray(pools.read(got[1], state.form.k, DIM, 8))
    assert np.any(held[:, 0, 44 + tokens])
    assert not np.any(held[:, 1, 44 + tokens])


@by_kernel
def test_a_full_pool_counts_what_it_has_no_room_for(kernel, rng):
    """One launch, and XLA: tokens 256 and 257 of a pool of 256."""
    layers = make_layers(rng, TokenPolicy(sinks=2, recent=3))
    states, (words,) = pool(layers, 256)
    state = dataclasses.replace(states[0], lengths=jnp.array([255, 256], jnp.int32))
    _, k, v = inputs(rng, 1)
    got, due = (
        jax.jit(functools.partial(columns.write, implementation=name, interpret=name != "xla"))(
            state, words, k, v
        )
        for name in (kernel, "xla")
    )
    assert got[0].overflow.tolist() == [0, 1]
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(due), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_named_writer_never_falls_back(rng):
    layers = make_layers(rng, TokenPolicy())
    states, (words,) = model_cache.init(model_cache.forms(layers), batch=2, capacity=256)
    _, k, v = inputs(rng, 1)
    with pytest.raises(ValueError, match="must be None or one of"):
        columns.write(states[0], words, k, v, implementation="mosaic_gpu")
    assert triton_window.unsupported(264) == "264 coordinates are more than 256"
