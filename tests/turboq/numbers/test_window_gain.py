"""The searched gain of window codes against exhaustive search and a float64 minimum of E."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from turboq.numbers import window, window_gain

SEGMENTS = ((8, 4), (8, 2), (8, 1))
GAINS = np.geomspace(0.3, 4.0, 16).astype(np.float32)
CODE = window.rows(16, SEGMENTS)
WEIGHTS = np.geomspace(3.0, 0.3, 24).astype(np.float32)
ENCODE = jax.jit(window_gain.encode)


@pytest.fixture(name="y", scope="module")
def _y():
    """Heavy tails and vectors of very different sizes."""
    rng = np.random.default_rng(3)
    return (rng.standard_t(4, (300, 24)) * rng.lognormal(0, 0.4, (300, 1))).astype(np.float32)


@pytest.fixture(name="every", scope="module")
def _every(y):
    """Weighted error of every vector at every gain, each by its own search. [N, G]"""
    search = jax.jit(window.encode)
    values = [
        g * np.asarray(window.decode(CODE, search(CODE, jnp.asarray(y / g), jnp.asarray(WEIGHTS))))
        for g in GAINS
    ]
    return np.stack([np.square(y - x) @ WEIGHTS for x in values], axis=1)


def encoded(y):
    codes, index = ENCODE(CODE, jnp.asarray(y), jnp.asarray(GAINS), jnp.asarray(WEIGHTS))
    return np.asarray(codes), np.asarray(index)


def test_the_gain_is_the_best_of_those_around_the_minimum(y, every):
    codes, index = encoded(y)
    back = GAINS[index][:, None] * np.asarray(window.decode(CODE, jnp.asarray(codes)))
    error = np.square(y - back) @ WEIGHTS
    np.testing.assert_allclose(error, every[np.arange(len(y)), index], rtol=1e-4)
    best = np.asarray(window_gain.best_gain(CODE, y, WEIGHTS))
    first = np.clip((best[:, None] > GAINS).sum(axis=1) - 4, 0, 8)
    tried = np.take_along_axis(every, first[:, None] + np.arange(8), axis=1)
    np.testing.assert_allclose(error, tried.min(axis=1), rtol=1e-4)
    # What the search is for: close to all gains tried, and far below the root mean square's gain.
    assert error.mean() < 1.005 * every.min(axis=1).mean()
    rms = np.sqrt(np.mean(y * y, axis=1))
    near = np.searchsorted(np.sqrt(GAINS[1:] * GAINS[:-1]), rms)
    ratio = error / every[np.arange(len(y)), near]
    assert np.exp(np.mean(np.log(ratio))) < 0.95


def test_the_best_gain_is_the_minimum_of_its_formula(y):
    step, w = CODE.step.astype(np.float64), WEIGHTS.astype(np.float64)
    reach = 0.8 * (0.5 * step * CODE.last + np.abs(CODE.taps.astype(np.float64)).sum(axis=1))

    def lost(g, x):
        over = np.maximum(np.abs(x.astype(np.float64)) - g * reach, 0.0)
        return np.sum(w * (g * g * step**2 / 48 + over**2))

    found = window_gain.best_gain(CODE, y[:40], WEIGHTS)
    for gain, x in zip(found, y[:40], strict=True):
        least = scipy.optimize.minimize_scalar(
            lost, args=(x,), bounds=(1e-3, 50.0), method="bounded", options={"xatol": 1e-7}
        )
        assert lost(gain, x) <= least.fun * (1 + 1e-5)
    ours = window_gain.best_gain(CODE, jnp.asarray(y), jnp.asarray(WEIGHTS))
    np.testing.assert_allclose(ours, window_gain.best_gain(CODE, y, WEIGHTS), rtol=1e-5)


def test_one_vector_and_many_are_stored_alike(y):
    codes, index = encoded(y)
    for n in (0, 7):
        one, gain = encoded(y[n : n + 1])
        np.testing.assert_array_equal(one[0], codes[n])
        assert gain[0] == index[n]


def test_vectors_out_of_reach_take_the_outermost_gains():
    y = np.zeros((4, 24), np.float32)
    y[1], y[2], y[3] = 1e30, np.inf, 1e-30
    assert encoded(y)[1].tolist() == [0, 15, 15, 0]
    y[0] = np.nan
    codes, index = encoded(y)  # whatever it is, a code
    assert index.max() < 16
    assert (codes <= 15).all()
