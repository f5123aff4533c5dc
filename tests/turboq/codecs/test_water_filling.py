"""Bit allocation: brute force, and the closed forms of transform coding."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from tolerances import TOL

from turboq.codecs import distortion_curves
from turboq.codecs.distortion_curves import distortion_curve
from turboq.codecs.fit_basis import fit_basis
from turboq.codecs.water_filling import batched_rates
from turboq.numbers import codebook


def rates(variances, curve, **options):
    return batched_rates((variances[:, None] * curve)[None], **options)[0]


def falling(rng, n):
    return np.sort(rng.lognormal(sigma=2, size=n))[::-1]


@pytest.mark.parametrize("runs", [1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_equals_brute_force(runs, seed):
    v, curve = falling(np.random.default_rng(seed), 40), distortion_curve("scalar")[:5]
    table = rates(v, curve, runs=runs)
    best: dict[int, float] = {}
    for bits in itertools.product(range(5), repeat=5):
        levels = len({b for b in bits if b})
        if any(a < b for a, b in itertools.pairwise(bits)) or levels > runs:
            continue
        error = sum(v[8 * j : 8 * j + 8].sum() * curve[b] for j, b in enumerate(bits))
        best[8 * sum(bits)] = min(best.get(8 * sum(bits), np.inf), error)
    for size, error, segments in zip(table.bits, table.error, table.segments, strict=True):
        assert sum(w * b for w, b in segments) == size
        assert len(segments) <= runs
        spent = np.repeat([b for _, b in segments], [w for w, _ in segments])
        assert np.isclose(error, v @ curve[np.pad(spent, (0, 40 - len(spent)))])
        assert np.isclose(error, best[int(size)])
    for size in set(best) - {0} - set(table.bits.tolist()):  # no better than fewer bits
        assert best[size] >= table.error[table.at(size)] * (1 - 1e-12)


def test_any_costs_not_only_variances_times_a_curve():
    """A coordinate that gains nothing beyond 2 bits gets no more, however many there are."""
    costs = np.tile(0.3 ** np.arange(7), (16, 1))
    costs[8:, 2:] = costs[8:, 2:3]
    (table,) = batched_rates(costs[None])
    assert table.segments[-1] == ((8, 6), (8, 2))


def test_gain_of_transform_coding_at_high_rate():
    """Error ratio to equal bits is GM/AM of the variances where every b_i of the law is whole."""
    levels = np.repeat(4.0 ** np.array([3.0, 2.0, 1.0, 0.0]), 16)
    curve = 2.72 * 4.0 ** -np.arange(16.0)
    table = rates(levels, curve)
    size = 64 * 9 + 32  # b_i = 9.5 + 1/2 log2(v_i / GM) = 11, 10, 9, 8
    mean = np.exp(np.mean(np.log(levels)))
    due = 64 * mean * curve[0] * 4.0 ** -(size / 64)
    assert table.segments[table.at(size)] == ((16, 11), (16, 10), (16, 9), (16, 8))
    assert np.isclose(table.error[table.at(size)], due)


def test_basis_diagonalises_and_gain_is_half_log_of_arithmetic_over_geometric_mean():
    rng = np.random.default_rng(5)
    mix, half = rng.normal(size=(2, 24, 24))
    c, m = mix @ mix.T, half @ half.T + 0.5 * np.eye(24)
    basis = fit_basis(np.zeros(24), c, m, ridge=0.0)
    a, s, v = basis.analysis, basis.synthesis, basis.variances
    eye = np.eye(24)
    tol = TOL["transform_joint"]
    assert np.allclose(s @ a, eye, atol=tol)
    assert np.allclose(a @ c @ a.T, eye, atol=tol)
    assert np.allclose(s.T @ m @ s, np.diag(v), atol=tol * v[0])
    assert np.all(np.diff(v) <= 0)
    assert np.isclose(v.sum(), np.trace(m @ c))
    # det(M^1/2 C M^1/2) does not depend on the basis: the geometric mean is the best there is.
    log_det = np.linalg.slogdet(m)[1] + np.linalg.slogdet(c)[1]
    assert np.isclose(np.sum(np.log(v)), log_det, atol=1e-5)


def test_basis_of_a_head_that_never_varies():
    basis = fit_basis(np.ones(8), np.zeros((8, 8)), np.zeros((8, 8)))
    assert all(np.all(np.isfinite(x)) for x in (basis.analysis, basis.synthesis, basis.variances))


@pytest.mark.parametrize("bad", [np.full((8, 8), np.nan), np.triu(np.ones((8, 8)))])
def test_basis_refuses(bad):
    with pytest.raises(ValueError, match="metric"):
        fit_basis(np.zeros(8), np.eye(8), bad)


def test_the_smallest_size_is_named():
    table = rates(np.ones(8), distortion_curve("scalar"))
    with pytest.raises(ValueError, match="smallest, 8"):
        table.at(7)


def test_measured_curves():
    scalar = distortion_curve("scalar")
    assert scalar[0] == 1
    assert np.isclose(scalar[3], codebook.distortion("gaussian", codebook.lloyd_max("gaussian", 3)))
    trellis = distortion_curve("trellis", 4)
    # Below the scalar code by the trellis's gain, above Shannon's bound.
    shannon = 4.0 ** -np.arange(1, 7)
    assert np.all(trellis[1:7] < scalar[1:7])
    assert np.all(trellis[1:7] > shannon)
    window = distortion_curve("window", 16)
    assert np.all(window[2:5] < scalar[2:5])
    assert np.all(window[1:] > 4.0 ** -np.arange(1, 9))
    assert np.all(np.diff(window) < 0)
    with pytest.raises(ValueError, match="quantizer"):
        distortion_curve("vector")
    with pytest.raises(ValueError, match="states"):
        distortion_curve("window", 8)


@pytest.mark.parametrize(
    ("quantizer", "states", "free"), [("window", 16, False), ("trellis", 4, True)]
)
def test_committed_curves_are_those_of_the_codes(quantizer, states, free):
    """At 3 bits, measured now; as far as float32 sums and seven digits go."""
    committed = distortion_curve(quantizer, states, free)[3]
    measured = distortion_curves.measured(quantizer, states, free, 3)
    np.testing.assert_allclose(measured, committed, rtol=TOL["distortion_curve"])


@pytest.mark.parametrize("bad", [np.ones(12), -np.ones(8), np.array([np.inf] + [1.0] * 7)])
def test_rates_refuse(bad):
    with pytest.raises(ValueError, match="costs"):
        rates(bad, distortion_curve("scalar"))
