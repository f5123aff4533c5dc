"""PolarQuant: angle densities and codebooks, the transform, its error and its bits."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats
from tolerances import TOL

from turboq.codecs.polarquant import PolarQuant, angle_codebook
from turboq.numbers import distortion


def cells(level):
    """Density of psi at a level, and the cells of its codebook."""
    power = 2 ** (level - 1) - 1
    c = angle_codebook(level, 2)
    edges = np.concatenate([[0], (c[1:] + c[:-1]) / 2, [np.pi / 2]])
    mass = integrate.quad(lambda t: np.sin(2 * t) ** power, 0, np.pi / 2)[0]
    return (lambda t: np.sin(2 * t) ** power / mass), c, list(itertools.pairwise(edges))


def closed_form():
    """2 - 2 prod_l E cos(angle error): radii are kept, so blocks differ by angles alone."""
    product = np.sinc(1 / 16)  # a uniform error within +- pi / 16
    for level in (2, 3, 4):
        f, c, pairs = cells(level)
        product *= sum(
            integrate.quad(lambda t, a=a, f=f: np.cos(t - a) * f(t), *p)[0]
            for a, p in zip(c, pairs, strict=True)
        )
    return 2 - 2 * product


@pytest.mark.parametrize("level", [2, 3, 4])
def test_angle_codebooks_are_centroids_of_the_right_density(level, rng):
    f, c, pairs = cells(level)
    for a, (low, high) in zip(c, pairs, strict=True):
        first = integrate.quad(lambda t: t * f(t), low, high, epsabs=1e-13)[0]
        mass = integrate.quad(f, low, high, epsabs=1e-13)[0]
        assert abs(first / mass - a) < TOL["fixed_point"]
    np.testing.assert_allclose(c + c[::-1], np.pi / 2, atol=TOL["fixed_point"])
    # The density itself: angles of two norms of 2^(level-1) Gaussian coordinates.
    half = 2 ** (level - 1)
    x = np.linalg.norm(rng.normal(size=(4000, 2, half)), axis=2)
    cdf = np.vectorize(lambda t: integrate.quad(f, 0, t)[0])
    grid = np.linspace(0, np.pi / 2, 200)
    smooth = np.interp(np.arctan2(x[:, 1], x[:, 0]), grid, cdf(grid))
    assert stats.kstest(smooth, "uniform").pvalue > TOL["rare"]


def test_first_level_is_uniform():
    np.testing.assert_allclose(
        angle_codebook(1, 4), (np.arange(16) + 0.5) * np.pi / 8, rtol=TOL["f64"]
    )


def test_codec_equals_the_recursion(rng):
    """Codes by exhaustive search of float64 angles; decode by the formula of the paper."""
    codec = PolarQuant(dim=32, rotation="haar", seed=5, scale_dtype="float32")
    x = rng.normal(size=(200, 32)) * 9
    stored = {k: np.asarray(v) for k, v in encoded(codec, x).items()}
    r = x @ codec.turn.matrix.T
    for level in range(1, 5):
        a, b = r[:, ::2], r[:, 1::2]
        angle = np.arctan2(b, a) % (2 * np.pi)
        c = angle_codebook(level, 4 if level == 1 else 2)
        off = np.abs(angle[..., None] - c)
        best = np.sort(off, axis=-1)
        size = np.hypot(a, b)  # an error of the rotation turns a short pair by more
        clear = (best[..., 1] - best[..., 0]) * size > 9 * TOL["code_margin"]
        assert np.mean(clear) > 1 - TOL["unclear_share"]
        np.testing.assert_array_equal(
            stored[f"angles{level}"][clear], off.argmin(-1)[clear], err_msg=str(level)
        )
        r = size
    np.testing.assert_allclose(stored["radius"], r, rtol=TOL["scale_f32"])
    y = np.zeros((200, 32))
    for j in range(32):
        i, value = j % 16, stored["radius"][:, j // 16].astype(np.float64)
        for level in range(4, 0, -1):
            psi = angle_codebook(level, 4 if level == 1 else 2)[
                stored[f"angles{level}"][:, j >> level]
            ]
            value = value * (np.sin(psi) if i >> (level - 1) & 1 else np.cos(psi))
        y[:, j] = value
    got = jax.jit(codec.decode)({}, stored)
    atol = TOL["decode_f32"] * np.abs(x).max()
    np.testing.assert_allclose(got, y @ codec.turn.matrix, rtol=0, atol=atol)


def encoded(codec, x):
    return jax.jit(codec.encode)({}, jnp.asarray(x, jnp.float32))


def test_error_reaches_its_closed_form(rng):
    """Relative to a vector's power; the norm is kept; above Shannon at 3.875 bits."""
    codec = PolarQuant(dim=64, scale_dtype="float32")
    x = rng.normal(size=(2000, 64)).astype(np.float32)
    got = np.asarray(jax.jit(codec.decode)({}, encoded(codec, x)), np.float64)
    np.testing.assert_allclose(
        np.sum(got**2, 1), np.sum(x.astype(np.float64) ** 2, 1), rtol=TOL["rule_limit_f32"]
    )
    relative = np.sum((got - x) ** 2, 1) / np.sum(x * x, 1, dtype=np.float64)
    allowed = TOL["standard_errors"] * np.std(relative) / np.sqrt(len(x))
    assert abs(np.mean(relative) - closed_form()) < allowed
    distortion.check_shannon(
        np.mean((got - x) ** 2) * 64, bits_per_vector=3.875 * 64, variances=np.ones(64)
    )


def test_quadrants_and_edges(rng):
    """Axes, signs and zeros of a pair: level 1 covers the full circle."""
    codec = PolarQuant(dim=16, rotation="identity", levels=1, first_bits=8, scale_dtype="float32")
    x = np.zeros((6, 16), np.float32)
    x[:, :8] = rng.normal(size=(6, 8))
    x[0], x[1] = 0.0, -0.0
    x[2, :8] = [1, 0, 0, 1, -1, 0, 0, -1]
    stored = encoded(codec, x)
    got = np.asarray(jax.jit(codec.decode)({}, stored))
    step = np.pi / 256 * np.repeat(np.linalg.norm(x.reshape(6, 8, 2), axis=2), 2, axis=1)
    assert np.all(np.abs(got - x) <= step * (1 + TOL["scale_f32"]))
    np.testing.assert_array_equal(stored["angles1"][0], stored["angles1"][1])


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_bits(dim):
    assert PolarQuant(dim=dim).bits_per_channel == 3.875


@pytest.mark.parametrize(("dim", "levels"), [(24, 4), (64, 0), (64, 7), (64, True)])
def test_bad_levels_are_named(dim, levels):
    with pytest.raises(ValueError, match=r"levels=.* must be 1..6 with 2\*\*levels dividing"):
        PolarQuant(dim=dim, levels=levels)
