"""Histograms: bins against their definition, quantiles against the full sample."""

import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import TOL

from turboq_calibrate.observe.histogram import FloatBins, scatter


def histogram(bins, x):
    """Counts of FloatBins over x [n]."""
    return np.asarray(scatter(bins.index(jnp.asarray(x))[:, None], bins.size))[0]


def test_scatter_counts_rows_apart(rng):
    index = rng.integers(0, 7, (500, 3)).astype(np.int32)
    counts = np.asarray(scatter(jnp.asarray(index), 7))
    for row in range(3):
        np.testing.assert_array_equal(counts[row], np.bincount(index[:, row], minlength=7))
    with pytest.raises(ValueError, match="must stay below"):
        scatter(jnp.zeros((1, 3), jnp.int32), 2**30)


@pytest.mark.parametrize("signed", [True, False])
def test_float_bins_follow_their_definition(rng, signed):
    bins = FloatBins(low=-4, high=3, mantissa_bits=2, signed=signed)
    x = (rng.standard_normal(4000) * 2.0 ** rng.integers(-7, 6, 4000)).astype(np.float32)
    edges = np.array([2.0**e * (1 + p / 4) for e in range(-4, 3) for p in range(4)] + [8.0])
    x = np.concatenate([x, edges, -edges, [0.0, -0.0, 1e30, -1e30, 1e-40]]).astype(np.float32)
    magnitude = np.searchsorted(edges, np.abs(x.astype(np.float64)), side="right")
    expected = magnitude if not signed else np.sign(x).astype(int) * magnitude + len(edges)
    np.testing.assert_array_equal(np.asarray(bins.index(jnp.asarray(x))), expected)
    assert bins.size == (2 * len(edges) + 1 if signed else len(edges) + 1)
    # A bin's value lies within it, so ranks of values are ranks of bins.
    inside = np.abs(bins.values) < 8
    again = np.asarray(bins.index(jnp.asarray(bins.values[inside], jnp.float32)))
    np.testing.assert_array_equal(again, np.flatnonzero(inside))


def test_non_finite_values_stay_in_range():
    bins = FloatBins(low=-4, high=4)
    index = np.asarray(bins.index(jnp.asarray([np.nan, np.inf, -np.inf], jnp.float32)))
    assert index.min() >= 0
    assert index.max() < bins.size


@pytest.mark.parametrize("mantissa_bits", [0, 3, 5])
def test_quantiles_have_the_stated_relative_error(rng, mantissa_bits):
    bins = FloatBins(low=-16, high=16, mantissa_bits=mantissa_bits)
    x = (rng.standard_t(2, 3001) * 0.3 + 0.1).astype(np.float32)
    counts = histogram(bins, x)
    for q in (0.0, 1e-3, 0.01, 0.25, 0.5, 0.9, 0.999, 1.0):
        exact = np.quantile(x.astype(np.float64), q, method="inverted_cdf")
        error = abs(bins.quantile(counts, q) - exact) / abs(exact)
        assert error <= bins.relative_error * (1 + TOL["float64"]), q
    assert bins.relative_error == pytest.approx(1 / (2 ** (mantissa_bits + 1) + 1))
    assert np.isnan(bins.quantile(np.zeros(bins.size, np.int64), 0.5))
    with pytest.raises(ValueError, match="between 0 and 1"):
        bins.quantile(counts, 1.1)


def test_bad_bins_are_refused():
    for bad in (
        {"low": 3, "high": 3},
        {"low": -200, "high": 0},
        {"low": 0, "high": 1, "mantissa_bits": 9},
    ):
        with pytest.raises(ValueError, match="needs"):
            FloatBins(**bad)
