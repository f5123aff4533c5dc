"""Histograms: bins against their definition, quantiles and codebooks against the full sample."""

import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import TOL

from turboq.numbers.codebook import fit_histogram
from turboq_calibrate.observe.histogram import CodeBins, FloatBins, scatter
from turboq_calibrate.observe.statistics import CODE_BINS


def histogram(bins, x):
    """Counts of FloatBins over x [n]."""
    return np.asarray(scatter(bins.index(jnp.asarray(x))[:, None], bins.size))[0]


def test_scatter_counts_rows_apart(rng):
    index = rng.integers(0, 7, (500, 3)).astype(np.int32)
    weights = rng.integers(-9, 9, (500, 3)).astype(np.int32)
    counts = np.asarray(scatter(jnp.asarray(index), 7))
    sums = np.asarray(scatter(jnp.asarray(index), 7, jnp.asarray(weights)))
    for row in range(3):
        np.testing.assert_array_equal(counts[row], np.bincount(index[:, row], minlength=7))
        expected = np.bincount(index[:, row], weights[:, row].astype(np.float64), minlength=7)
        np.testing.assert_array_equal(sums[row], expected)
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
    code, offset = CODE_BINS.index(jnp.asarray([np.nan, np.inf, -np.inf], jnp.float32))
    assert np.asarray(code).min() >= 0
    assert np.asarray(code).max() < CODE_BINS.size
    assert np.abs(np.asarray(offset)[1:]).max() <= CODE_BINS.resolution // 2


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


def test_code_bins_keep_first_moments(rng):
    u = (rng.standard_t(3, 20_000)).astype(np.float32)
    u = np.concatenate([u, np.zeros(100, np.float32)])
    index, offset = CODE_BINS.index(jnp.asarray(u))
    counts = np.asarray(scatter(index[:, None], CODE_BINS.size))[0]
    moments = np.asarray(scatter(index[:, None], CODE_BINS.size, offset[:, None]))[0]
    where = np.floor(np.arcsinh(u.astype(np.float64)) / CODE_BINS.step) + CODE_BINS.size // 2
    moved = np.asarray(index) != where
    assert moved.mean() < TOL["code_bin_moved"]
    means = CODE_BINS.means(counts, moments)
    exact = np.bincount(np.asarray(index), u.astype(np.float64), CODE_BINS.size)
    used = counts > 0
    error = np.abs(means[used] - exact[used] / counts[used])
    width = CODE_BINS.step * np.sqrt(1 + means[used] ** 2)
    assert np.max(error / width) < TOL["code_bin_mean"]
    assert np.all(np.diff(means) > 0)


def test_code_bins_hold_a_constant_chunk():
    """All values of the largest chunk in one bin, as of a head of zeros: no overflow, mean 0."""
    n = CODE_BINS.values_per_chunk
    index, offset = CODE_BINS.index(jnp.zeros(1))
    assert abs(int(offset[0])) * n < 2**31
    means = CODE_BINS.means(np.full(CODE_BINS.size, n), np.full(CODE_BINS.size, n * int(offset[0])))
    assert means[int(index[0])] == 0.0


def mse(x, book):
    return np.mean((x - book[np.searchsorted((book[1:] + book[:-1]) / 2, x)]) ** 2)


def lloyd(x, book, rounds):
    """Lloyd's iteration on the sorted full sample: the fit that histograms are measured against."""
    total = np.concatenate([[0.0], np.cumsum(x)])
    for _ in range(rounds):
        cut = np.searchsorted(x, (book[1:] + book[:-1]) / 2)
        cut = np.concatenate([[0], cut, [len(x)]])
        n = np.diff(cut)
        book = np.where(n > 0, np.diff(total[cut]) / np.maximum(n, 1), book)
    return book


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("source", ["normal", "heavy", "two modes"])
def test_codebooks_from_histograms_match_the_full_sample(source, bits):
    rng = np.random.default_rng(5)
    x = {
        "normal": lambda: rng.standard_normal(300_000),
        "heavy": lambda: rng.standard_t(3, 300_000),
        "two modes": lambda: rng.standard_normal(300_000) + np.repeat([-2.0, 3.0], 150_000),
    }[source]()
    x = np.sort((x / np.sqrt(np.mean(x * x))).astype(np.float32).astype(np.float64))
    index, offset = CODE_BINS.index(jnp.asarray(x, jnp.float32))
    counts = np.asarray(scatter(index[:, None], CODE_BINS.size))[0]
    moments = np.asarray(scatter(index[:, None], CODE_BINS.size, offset[:, None]))[0]
    book = fit_histogram(counts, CODE_BINS.means(counts, moments), 2**bits)
    assert np.all(np.diff(book) > 0)
    best = mse(x, lloyd(x, book, 200))
    assert mse(x, book) < best * (1 + TOL["histogram_fit"])


def test_bad_bins_are_refused():
    for bad in (
        {"low": 3, "high": 3},
        {"low": -200, "high": 0},
        {"low": 0, "high": 1, "mantissa_bits": 9},
    ):
        with pytest.raises(ValueError, match="needs"):
            FloatBins(**bad)
    for bad in ({"size": 3}, {"step": 0.0}, {"resolution": 0}):
        with pytest.raises(ValueError, match="needs"):
            CodeBins(**bad)
