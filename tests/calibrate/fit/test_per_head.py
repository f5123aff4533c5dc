"""Fitted arrays: every head its own, as good as the full sample, with errors as predicted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stat_cases import moments_of, statistics_of, with_codes
from tolerances import TOL

from turboq.codecs import PerHead
from turboq.errors import TurboqError
from turboq.numbers.codebook import distortion, fit_samples, lloyd_max
from turboq.numbers.rotation import Rotation
from turboq_calibrate.fit.per_head import fit_side, predicted_distortion

DIM = 32


def codec_of(**options):
    return PerHead(**{"dim": DIM, "bits": 3, "rotation": "identity"} | options)


def heads(rng, t=4000):
    """Three heads with different laws: normal, Laplace, and two modes; each with its own mean."""
    normal = rng.standard_normal((1, t, DIM))
    laplace = rng.laplace(size=(1, t, DIM))
    modes = rng.standard_normal((1, t, DIM)) * 0.3 + rng.choice([-2.0, 3.0], (1, t, DIM))
    x = np.stack([normal * 0.5, laplace * 4.0, modes], axis=2)
    return (x + rng.standard_normal((3, DIM)) * 10).astype(np.float32)


@pytest.fixture(scope="module")
def case():
    x = heads(np.random.default_rng(7))
    return x, statistics_of(x, Rotation(kind="identity", dim=DIM))


def decoded(codec, arrays, x):
    """The codec's own reconstruction, heads first."""
    by_head = jnp.asarray(np.moveaxis(x, 2, 0).reshape(x.shape[2], -1, codec.dim))
    arrays = {k: jnp.asarray(v) for k, v in arrays.items()}
    out = jax.jit(jax.vmap(lambda a, v: codec.decode(a, codec.encode(a, v))))(arrays, by_head)
    return np.asarray(out, np.float64), np.asarray(by_head, np.float64)


def coordinates(side, x, scale):
    """u [K, n] in float64: identity rotation, so from x alone."""
    y = np.moveaxis(x.astype(np.float64), 2, 0).reshape(x.shape[2], -1, DIM)
    y = y - side.arrays["center"].astype(np.float64)[:, None]
    if scale == "vector":
        return (y / np.sqrt(np.mean(y * y, axis=2, keepdims=True))).reshape(len(y), -1)
    return (y / np.sqrt(np.mean(y * y, axis=(1, 2), keepdims=True))).reshape(len(y), -1)


def mse(u, book):
    return np.mean((u - book[np.searchsorted((book[1:] + book[:-1]) / 2, u)]) ** 2)


@pytest.mark.parametrize("scale", ["vector", "head"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_codebooks_match_a_fit_of_the_full_sample(case, scale, bits):
    x, side = case
    arrays = fit_side(side, codec_of(bits=bits, scale=scale))
    assert {k: v.shape for k, v in arrays.items()} == {
        "mean": (3, DIM),
        "codebook": (3, 2**bits),
    } | ({"scale": (3,)} if scale == "head" else {})
    assert all(v.dtype == np.float32 for v in arrays.values())
    assert np.all(np.diff(arrays["codebook"]) > 0)
    for head, u in enumerate(coordinates(side, x, scale)):
        best = mse(u, fit_samples(u, None, 2**bits))
        assert mse(u, arrays["codebook"][head].astype(np.float64)) < best * (
            1 + TOL["histogram_fit"]
        )


def test_means_and_scales_are_those_of_the_data(case):
    x, side = case
    arrays = fit_side(side, codec_of(scale="head"))
    y = x[0].astype(np.float64)
    spread = y.std(axis=0)
    assert np.max(np.abs(arrays["mean"] - y.mean(axis=0)) / spread) < TOL["fitted_mean"]
    rms = np.sqrt(np.mean((y - y.mean(axis=0)) ** 2, axis=(0, 2)))
    np.testing.assert_allclose(arrays["scale"], rms, rtol=TOL["covariance"])


def test_a_normal_head_gets_the_lloyd_max_codebook():
    x = np.random.default_rng(3).standard_normal((1, 20_000, 1, DIM)).astype(np.float32)
    side = statistics_of(x, Rotation(kind="identity", dim=DIM))
    for scale, source in (("vector", "sphere"), ("head", "gaussian")):
        codec = codec_of(scale=scale)
        arrays = fit_side(side, codec)
        exact = lloyd_max(source, 3, DIM)
        assert np.max(np.abs(arrays["codebook"][0] - exact)) < TOL["sampled_codebook"]
        expected = distortion(source, exact, DIM)
        predicted = predicted_distortion(side, codec, arrays)
        assert predicted[0] == pytest.approx(expected, rel=TOL["sampled_distortion"])


@pytest.mark.parametrize("scale", ["vector", "head"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_predictions_come_true(case, scale, bits):
    """What the histogram promises is what the codec does to the same vectors."""
    x, side = case
    codec = codec_of(bits=bits, scale=scale, scale_dtype="float32")
    arrays = fit_side(side, codec)
    predicted = predicted_distortion(side, codec, arrays)
    out, exact = decoded(codec, arrays, x)
    error = np.sum((out - exact) ** 2, axis=2)
    energy = np.sum((exact - arrays["mean"][:, None].astype(np.float64)) ** 2, axis=2)
    if scale == "vector":
        measured = np.mean(error / energy, axis=1)
    else:
        measured = error.sum(axis=1) / energy.sum(axis=1)
    np.testing.assert_allclose(predicted, measured, rtol=TOL["predicted_distortion"])


def test_rotated_statistics_fit_rotated_codecs(rng):
    """Heavy-tailed vectors: predictions hold with and without a rotation, which changes them."""
    x = (rng.standard_t(3, (1, 3000, 2, DIM)) ** 3 + 5.0).astype(np.float32)
    errors = {}
    for kind in ("identity", "hadamard"):
        codec = codec_of(rotation=kind, seed=4, bits=2, scale_dtype="float32")
        side = statistics_of(x, Rotation(kind=kind, dim=DIM, seed=4))
        arrays = fit_side(side, codec)
        out, exact = decoded(codec, arrays, x)
        error = np.sum((out - exact) ** 2, axis=2)
        energy = np.sum((exact - arrays["mean"][:, None].astype(np.float64)) ** 2, axis=2)
        errors[kind] = np.mean(error / energy, axis=1)
        predicted = predicted_distortion(side, codec, arrays)
        np.testing.assert_allclose(predicted, errors[kind], rtol=TOL["predicted_distortion"])
    assert np.all(errors["hadamard"] != errors["identity"])


def test_a_large_mean_costs_nothing(case):
    """The same heads 1000 times farther from zero keep their error."""
    x, side = case
    codec = codec_of(scale_dtype="float32")
    far = x + np.float32(4096)
    moved = statistics_of(far, Rotation(kind="identity", dim=DIM))
    near_error = predicted_distortion(side, codec, fit_side(side, codec))
    far_error = predicted_distortion(moved, codec, fit_side(moved, codec))
    np.testing.assert_allclose(far_error, near_error, rtol=TOL["far_mean"])


def test_a_constant_head_decodes_to_its_mean(rng):
    x = rng.standard_normal((1, 500, 2, DIM)).astype(np.float32)
    x[:, :, 1] = 0.75
    side = statistics_of(x, Rotation(kind="identity", dim=DIM))
    for scale in ("vector", "head"):
        codec = codec_of(scale=scale)
        arrays = fit_side(side, codec)
        gaussian = lloyd_max("gaussian", 3).astype(np.float32)
        np.testing.assert_array_equal(arrays["codebook"][1], gaussian)
        assert predicted_distortion(side, codec, arrays)[1] == 0.0
        out, exact = decoded(codec, arrays, x)
        np.testing.assert_allclose(out[1], exact[1], rtol=TOL["constant_head"])


def test_scale_rules_change_the_prediction(case):
    _, side = case
    arrays = fit_side(side, codec_of())
    raw = predicted_distortion(side, codec_of(), arrays)
    unbiased = predicted_distortion(side, codec_of(scale_rule="unbiased"), arrays)
    np.testing.assert_allclose(unbiased, raw / (1 - raw))


def test_bad_fits_are_refused(case, rng):
    _, side = case
    with pytest.raises(TurboqError, match=r"codec\.dim=16 but .* head dim 32"):
        fit_side(side, codec_of(dim=16))
    with pytest.raises(TurboqError, match=r"hadamard.* is not the statistics' .*identity"):
        fit_side(side, codec_of(rotation="hadamard"))
    x = rng.standard_normal((1, 3, 2, DIM)).astype(np.float32)
    few = statistics_of(x, Rotation(kind="identity", dim=DIM))
    fit_side(few, codec_of(bits=2))
    with pytest.raises(TurboqError, match="96 coordinates per head are too few for 3 bits"):
        fit_side(few, codec_of(bits=3))
    unseen = {k: v.copy() for k, v in few.arrays.items()}
    unseen["vector_counts"][1] = 0
    with pytest.raises(TurboqError, match=r"KV heads \[1\] were never seen"):
        fit_side(dataclasses.replace(few, arrays=unseen), codec_of(bits=2))


def test_stale_centers_are_visible(rng):
    """Sweep 2 around another mean is what the arrays say, not what the moments say."""
    x = rng.standard_normal((1, 400, 1, DIM)).astype(np.float32)
    center, scale = np.full((1, DIM), 0.25, np.float32), np.ones(1, np.float32)
    side = with_codes(moments_of(x), x, center, scale, Rotation(kind="identity", dim=DIM))
    np.testing.assert_array_equal(fit_side(side, codec_of())["mean"], center)
