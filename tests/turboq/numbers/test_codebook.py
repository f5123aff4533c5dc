"""Codebooks against golden constants, quadrature, brute force and published tables."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from scipy import special
from tolerances import TOL

from turboq.numbers import codebook
from turboq.numbers import codebook_fitting as fitting

# Independent golden constants: positive centroids in unit-variance scale (two inner and two outer
# ones at 6 bits), distortion, entropy in bits.
GOLDEN = {
    ("gaussian", 2, None): ([0.452780035, 1.510417608], 0.117481847829, 1.911098766),
    ("gaussian", 3, None): (
        [0.245094179, 0.756005281, 1.343909279, 2.151945705],
        0.034547760789,
        2.824865214,
    ),
    ("gaussian", 4, None): (
        [
            *(0.12839503, 0.388048299, 0.656759119, 0.942340456),
            *(1.256231197, 1.618046386, 2.069017227, 2.732589571),
        ],
        0.009501008008,
        3.765328473,
    ),
    ("sphere", 3, 64): (
        [0.243753431, 0.750658106, 1.329342871, 2.111311447],
        0.033390834096,
        2.837904215,
    ),
    ("sphere", 3, 128): (
        [0.244424873, 0.75333016, 1.336598886, 2.131470844],
        0.033965925794,
        2.831409471,
    ),
    ("sphere", 4, 256): (
        [
            *(0.128133987, 0.387214043, 0.655187152, 0.939713725),
            *(1.251989019, 1.611168121, 2.05741121, 2.710566995),
        ],
        0.009407529429,
        3.769637865,
    ),
    ("sphere", 6, 64): (
        [0.03305458, 0.099209678, 3.088546817, 3.528362196],
        0.000615962891,
        5.730991555,
    ),
    ("gaussian", 6, None): (
        [0.033409506, 0.100278289, 3.240437055, 3.744101271],
        0.000644239665,
        5.710077554,
    ),
}


@pytest.mark.parametrize("key", GOLDEN)
def test_lloyd_max_hits_golden_constants(key):
    source, bits, dim = key
    centroids, error, entropy = GOLDEN[key]
    c = codebook.lloyd_max(source, bits, dim)
    half = c[c > 0]
    if bits == 6:
        half = np.concatenate([half[:2], half[-2:]])
    np.testing.assert_allclose(half, centroids, atol=TOL["golden_codebook"], rtol=0)
    np.testing.assert_array_equal(c, -c[::-1])
    got = codebook.distortion(source, c, dim), codebook.entropy(source, c, dim)
    np.testing.assert_allclose(got, [error, entropy], atol=TOL["golden_codebook"], rtol=0)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("source", "dim"), [("gaussian", None), ("sphere", 8), ("sphere", 80)])
def test_lloyd_max_is_a_fixed_point_by_quadrature(source, dim, bits):
    """Every centroid is the mean of its cell, which for a log-concave density is sufficient."""
    c = codebook.lloyd_max(source, bits, dim)
    assert c.shape == (2**bits,)
    assert np.all(np.diff(c) > 0)
    some = c if bits <= 3 else c[[0, 1, 2, len(c) // 2, len(c) // 2 + 1, -1]]
    mass, first, _ = (
        oracles.cell_moments(source, c, dim) if bits <= 3 else _some_cells(source, c, dim)
    )
    np.testing.assert_allclose(some, first / mass, atol=TOL["fixed_point"], rtol=0)


def _some_cells(source, c, dim):
    """Cells of six centroids only: 256 quadratures per moment would take seconds."""
    n = len(c)
    inner = oracles.cell_moments(source, c[[0, 1, 2, 3]], dim)[:, :3]
    middle = oracles.cell_moments(source, c[n // 2 - 1 : n // 2 + 3], dim)[:, 1:3]
    outer = oracles.cell_moments(source, c[-2:], dim)[:, -1:]
    return np.concatenate([inner, middle, outer], axis=1)


@pytest.mark.parametrize("bits", range(1, 9))
def test_distortion_lies_between_shannon_and_panter_dite(bits):
    """4^-b < D_b < (sqrt(3) pi / 2) 4^-b, and the sphere lies below the Gaussian."""
    d = codebook.distortion("gaussian", codebook.lloyd_max("gaussian", bits))
    assert 4.0**-bits < d < np.sqrt(3) * np.pi / 2 * 4.0**-bits
    for dim in (64, 128, 256):
        sphere = codebook.distortion("sphere", codebook.lloyd_max("sphere", bits, dim), dim)
        assert 4.0**-bits < sphere < d


def test_distortion_and_entropy_of_any_codebook_by_quadrature():
    """An asymmetric, non-optimal codebook: the moments of cells on both sides of zero."""
    c = np.array([-2.0, -0.7, -0.1, 0.9, 1.0, 3.0])
    for source, dim in (("gaussian", None), ("sphere", 64)):
        m0, m1, m2 = oracles.cell_moments(source, c, dim)
        expected = np.sum(m2 - 2 * c * m1 + c * c * m0)
        got = codebook.distortion(source, c, dim)
        np.testing.assert_allclose(got, expected, rtol=TOL["quadrature"])
        got = codebook.entropy(source, c, dim)
        np.testing.assert_allclose(got, -np.sum(m0 * np.log2(m0)), rtol=TOL["quadrature"])


@pytest.mark.parametrize("levels", [1, 2, 3, 8, 16, 64, 100, 256])
def test_nearest_and_lookup_equal_exhaustive_search(levels, rng):
    c = np.sort(rng.normal(size=levels)).astype(np.float32)
    t = (0.5 * (c[1:] + c[:-1])).astype(np.float32)
    u = np.concatenate([rng.normal(size=3000).astype(np.float32), c, [-100, 100]])
    u = u.astype(np.float32)
    u = u[np.min(np.abs(u[:, None] - t[None]), axis=1, initial=9) > TOL["tie_f32"]]
    codes = jax.jit(codebook.nearest)(jnp.asarray(c), jnp.asarray(u))
    assert codes.dtype == jnp.uint8
    np.testing.assert_array_equal(codes, oracles.nearest(c.astype(np.float64), u))
    np.testing.assert_array_equal(jax.jit(codebook.lookup)(jnp.asarray(c), codes), c[codes])


@pytest.mark.parametrize("levels", [4, 128])
def test_ties_take_the_lower_code_and_zero_has_no_sign(levels):
    c = jnp.arange(levels, dtype=jnp.float32) - (levels - 1) / 2  # thresholds are exact integers
    t = 0.5 * (c[1:] + c[:-1])
    assert codebook.nearest(c, t).tolist() == list(range(levels - 1))
    zeros = codebook.nearest(c, jnp.array([0.0, -0.0]))
    assert zeros.tolist() == [levels // 2 - 1] * 2


def error_of(w, x, c):
    return np.sum(w * np.min((x[:, None] - c) ** 2, axis=1))


@pytest.mark.parametrize("levels", [1, 2, 3, 5, 8])
def test_fit_histogram_is_globally_optimal(levels, rng):
    """Against the O(n^2 k) programme, on rough data where Lloyd's iteration stops early."""
    for case in range(6):
        x = np.sort(rng.standard_t(2, size=40)) + (1e4 if case == 5 else 0.0)
        w = np.where(rng.random(40) < 0.2, 0.0, rng.exponential(size=40) ** 3)
        c = fitting.fit_histogram(w, x, levels)
        best, centroids = oracles.kmeans_1d(w[w > 0], x[w > 0], levels)
        np.testing.assert_allclose(error_of(w, x, c), best, rtol=TOL["kmeans_error"])
        np.testing.assert_allclose(c, centroids, rtol=TOL["kmeans_error"])


def test_fit_histogram_reaches_lloyd_max_on_a_fine_gaussian():
    """16384 bins with exact Gaussian masses and means: the fitted codebook is Lloyd-Max."""
    edges = np.linspace(-8, 8, 16385)
    low = edges[:8193]  # the lower half, mirrored: differences near ndtr = 1 would cancel
    half = np.diff(special.ndtr(low))
    center = -np.diff(np.exp(-0.5 * low**2)) / np.sqrt(2 * np.pi) / half
    mass, mean = np.concatenate([half, half[::-1]]), np.concatenate([center, -center[::-1]])
    for bits in (2, 4):
        best = codebook.lloyd_max("gaussian", bits)
        got = fitting.fit_histogram(mass, mean, 2**bits)
        # A threshold can only sit on a bin edge, so centroids may move by about one bin.
        np.testing.assert_allclose(got, best, atol=edges[1] - edges[0], rtol=0)
        excess = codebook.distortion("gaussian", got) / codebook.distortion("gaussian", best)
        assert 1 <= excess < 1 + TOL["histogram_excess"]


def test_fit_histogram_with_few_distinct_values():
    c = fitting.fit_histogram(np.array([0, 3, 0, 1.0]), np.array([np.nan, -1, 0, 2.0]), 4)
    assert c.tolist() == [-1, 2, 2, 2]
    values = jnp.asarray(c, jnp.float32)
    got = codebook.lookup(values, codebook.nearest(values, jnp.array([-1.0, 2.0])))
    assert got.tolist() == [-1, 2]


def test_fit_samples_equals_histogram_of_distinct_values(rng):
    x = rng.integers(-20, 20, size=500) / 8
    w = rng.integers(1, 5, size=500).astype(float)
    values, inverse = np.unique(x, return_inverse=True)
    expected = fitting.fit_histogram(np.bincount(inverse, w), values, 8)
    np.testing.assert_allclose(fitting.fit_samples(x, w, 8), expected, rtol=TOL["kmeans_error"])
    repeated = np.repeat(x, w.astype(int))
    np.testing.assert_allclose(
        fitting.fit_samples(repeated, None, 8), expected, rtol=TOL["kmeans_error"]
    )


def test_fit_samples_above_the_exact_size(rng):
    x = rng.normal(size=3 * fitting.MAX_SAMPLES)
    c = fitting.fit_samples(x, None, 4)
    best = codebook.distortion("gaussian", codebook.lloyd_max("gaussian", 2))
    assert codebook.distortion("gaussian", c) < best * (1 + TOL["histogram_excess"])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: codebook.lloyd_max("laplace", 2), "source='laplace' must be one of"),
        (lambda: codebook.lloyd_max("sphere", 2), "dim=None must be an integer of at least 3"),
        (lambda: codebook.lloyd_max("gaussian", 9), "bits=9 must be"),
        (lambda: fitting.fit_histogram(np.zeros(3), np.arange(3), 2), "counts are all zero"),
        (lambda: fitting.fit_histogram(np.array([1, -1]), np.arange(2), 2), "not negative"),
        (lambda: fitting.fit_histogram(np.ones(2), np.array([1, 0]), 2), "ascending"),
        (lambda: fitting.fit_histogram(np.ones(2), np.arange(2), 0), "levels=0 must be 1..256"),
        (lambda: fitting.fit_histogram(np.ones(2), np.arange(3), 2), "must be equal"),
        (lambda: fitting.fit_samples(np.array([1, np.nan]), None, 2), "NaN or Inf"),
        (lambda: fitting.fit_samples(np.ones(2), np.zeros(2), 2), "at least one is needed"),
    ],
)
def test_bad_input_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
