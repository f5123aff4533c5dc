"""Fits of `per_head`: every head its own, as good as the best of the full sample."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import TOL

from turboq.codecs import PerHead
from turboq.codecs.observed import Observed
from turboq.numbers.codebook import distortion, fit_samples, lloyd_max

DIM = 32


def codec_of(**options):
    return PerHead(**{"dim": DIM, "bits": 3, "rotation": "identity"} | options)


def heads(n=4000) -> np.ndarray:
    """Three heads with different laws: normal, Laplace, and two modes; each with its own mean."""
    rng = np.random.default_rng(7)
    normal = rng.standard_normal((n, DIM))
    laplace = rng.laplace(size=(n, DIM))
    modes = rng.standard_normal((n, DIM)) * 0.3 + rng.choice([-2.0, 3.0], (n, DIM))
    x = np.stack([normal * 0.5, laplace * 4.0, modes])
    return (x + rng.standard_normal((3, 1, DIM)) * 10).astype(np.float32)


def relative_error(codec, arrays, x) -> np.ndarray:
    """E[|x_hat - x|^2 / |x - mean|^2] of every head, by the codec itself."""
    lifted = {k: jnp.asarray(v) for k, v in arrays.items()}
    run = jax.jit(jax.vmap(lambda a, x: codec.decode(a, codec.encode(a, x))))
    out, exact = np.asarray(run(lifted, jnp.asarray(x)), np.float64), x.astype(np.float64)
    energy = np.sum((exact - arrays["mean"][:, None].astype(np.float64)) ** 2, axis=2)
    return np.mean(np.sum((out - exact) ** 2, axis=2) / energy, axis=1)


def mse(u, book):
    return np.mean((u - book[np.searchsorted((book[1:] + book[:-1]) / 2, u)]) ** 2)


@pytest.mark.parametrize("scale", ["vector", "head"])
@pytest.mark.parametrize("bits", [1, 2, 3, 5])
def test_codebooks_are_the_best_of_what_they_see(scale, bits):
    """The exact k-means of every third coordinate (2^15 of them or more), judged on all."""
    x = heads()
    arrays = codec_of(bits=bits, scale=scale).fit(Observed.of(x))
    assert np.all(np.diff(arrays["codebook"]) > 0)
    y = x.astype(np.float64)
    y = y - y.mean(axis=1, keepdims=True)
    axis = 2 if scale == "vector" else (1, 2)
    u = (y / np.sqrt(np.mean(y * y, axis=axis, keepdims=True))).reshape(3, -1)
    for own, book in zip(u, arrays["codebook"].astype(np.float64), strict=True):
        best = mse(own, fit_samples(own[::3], None, 2**bits))
        assert mse(own, book) < best * (1 + TOL["codebook_by_histogram"])


def test_means_and_scales_are_those_of_all_tokens():
    """The moments decide, which may be over far more tokens than the sample."""
    x = heads()
    whole = Observed.of(x)
    arrays = codec_of(scale="head").fit(whole)
    y = x.astype(np.float64)
    mean = y.mean(axis=1)
    np.testing.assert_allclose(arrays["mean"], mean, atol=TOL["fitted_mean"])
    rms = np.sqrt(np.mean((y - mean[:, None]) ** 2, axis=(1, 2)))
    np.testing.assert_allclose(arrays["scale"], rms, rtol=TOL["covariance"])


def test_a_normal_head_gets_the_lloyd_max_codebook():
    x = np.random.default_rng(3).standard_normal((1, 20_000, DIM)).astype(np.float32)
    for scale, source in (("vector", "sphere"), ("head", "gaussian")):
        codec = codec_of(scale=scale, scale_dtype="float32", rotation="hadamard")
        arrays = codec.fit(Observed.of(x))
        exact = lloyd_max(source, 3, DIM)
        # A twentieth of the coordinates: sqrt(20) times the deviation.
        limit = TOL["sampled_codebook"] * 20**0.5
        assert np.max(np.abs(arrays["codebook"][0] - exact)) < limit
        if scale == "vector":
            expected = distortion(source, exact, DIM)
            measured = relative_error(codec, arrays, x)[0]
            assert measured == pytest.approx(expected, rel=TOL["sampled_distortion"])


def test_a_large_mean_costs_nothing():
    """The same heads 4096 farther from zero keep their error."""
    x, codec = heads(1000), codec_of(scale_dtype="float32")
    far = x + np.float32(4096)
    near_error = relative_error(codec, codec.fit(Observed.of(x)), x)
    far_error = relative_error(codec, codec.fit(Observed.of(far)), far)
    np.testing.assert_allclose(far_error, near_error, rtol=TOL["far_mean"])


def test_a_constant_head_decodes_to_its_mean():
    x = heads(500)
    x[1] = 0.75
    for scale in ("vector", "head"):
        codec = codec_of(scale=scale)
        arrays = codec.fit(Observed.of(x))
        gaussian = lloyd_max("gaussian", 3).astype(np.float32)
        np.testing.assert_array_equal(arrays["codebook"][1], gaussian)
        own = {k: jnp.asarray(v[1]) for k, v in arrays.items()}
        out = codec.decode(own, codec.encode(own, jnp.asarray(x[1])))
        np.testing.assert_allclose(out, x[1], rtol=TOL["constant_head"])
