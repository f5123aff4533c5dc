"""`hadamard_per_head`: float64 oracle, what the search may and may not do, a planted structure."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from scipy import linalg
from tolerances import TOL

from turboq.codecs import HadamardPerHead
from turboq.codecs.fit_hadamard import fit_observed, search
from turboq.codecs.observed import Observed
from turboq.numbers import codebook
from turboq.numbers.rotation import Rotation

DIM = 16


def turn(arrays):
    """R [D, D], float64, by scipy's Hadamard matrix and a permutation matrix."""
    dim = len(arrays["signs"])
    permutation = np.eye(dim)[arrays["order"].astype(int)]
    return linalg.hadamard(dim) / np.sqrt(dim) @ np.diag(arrays["signs"]) @ permutation


def any_arrays(rng, scale=None):
    arrays = {
        "mean": rng.normal(size=DIM) * 10,
        "signs": rng.choice([-1.0, 1.0], DIM),
        "order": rng.permutation(DIM),
    }
    arrays |= {} if scale is None else {"scale": scale}
    return {n: np.asarray(a, np.float32) for n, a in arrays.items()}


@pytest.mark.parametrize("rule", ["raw", "unbiased", "head"])
def test_follows_float64(rule, rng):
    head = rule == "head"
    choice = {"scale": "head"} if head else {"scale_rule": rule, "scale_dtype": "float32"}
    codec = HadamardPerHead(dim=DIM, bits=3, **choice)
    arrays = any_arrays(rng, 0.7 if head else None)
    assert {n: a.shape for n, a in arrays.items()} == codec.array_shapes
    x = (rng.normal(size=(80, DIM)) * 0.7 + arrays["mean"]).astype(np.float32)
    stored = jax.jit(codec.encode)(arrays, jnp.asarray(x))
    z = x.astype(np.float64) - arrays["mean"]
    rms = np.full(len(x), 0.7) if head else np.sqrt(np.mean(z * z, axis=1))
    r = turn(arrays)
    u = z @ r.T / rms[:, None]
    table = codebook.lloyd_max("gaussian", 3)
    codes = np.argmin(np.abs(u[..., None] - table), axis=-1)
    wrong = np.asarray(stored["codes"]) != codes
    assert np.mean(wrong) <= 1 / wrong.size  # one value at a threshold
    c = table[np.asarray(stored["codes"])]
    scale = rms if head else oracles.scale(rule, u, c, rms)
    if not head:
        np.testing.assert_allclose(stored["scale"][:, 0], scale, rtol=TOL["scale_f32"])
    due = (c * scale[:, None]) @ r + arrays["mean"]
    got = jax.jit(codec.decode)(arrays, stored)
    np.testing.assert_allclose(got, due, atol=TOL["decode_f32"] * np.abs(due).max())


def test_default_choice_is_turboquant_with_a_mean(rng):
    codec = HadamardPerHead(dim=DIM, bits=2)
    arrays = any_arrays(rng) | {"order": np.arange(DIM), "mean": np.zeros(DIM)}
    signs = Rotation(kind="hadamard", dim=DIM, seed=5).signs
    arrays = {n: jnp.asarray(a, jnp.float32) for n, a in (arrays | {"signs": signs}).items()}
    x = jnp.asarray(rng.normal(size=(8, DIM)), jnp.float32)
    due = Rotation(kind="hadamard", dim=DIM, seed=5).apply(x)
    np.testing.assert_allclose(codec.rotate(arrays, x), due, atol=TOL["rotate_f32"])
    np.testing.assert_allclose(codec.rotate_back(arrays, due), x, atol=TOL["rotate_f32"])


def fit(codec, x, metric=None, **options):
    """Arrays of one head from vectors alone."""
    seen = Observed.of(x[None], queries=None if metric is None else metric[None])
    fitted = fit_observed(codec, seen, **options)
    return {name: fitted[name][0].astype(np.float32) for name in codec.array_shapes}


def weighted_error(codec, arrays, x, metric):
    lifted = {n: jnp.asarray(a) for n, a in arrays.items()}
    back = jax.jit(lambda x: codec.decode(lifted, codec.encode(lifted, x)))
    e = np.asarray(back(jnp.asarray(x, jnp.float32))) - x
    return np.mean(np.einsum("nd,de,ne->n", e, metric, e))


@pytest.mark.parametrize("scale", ["vector", "head"])
def test_search_finds_a_planted_rotation(scale, rng):
    """x is what R^T makes of +-1, R one sign away from a candidate: only the right sign fits."""
    codec = HadamardPerHead(dim=DIM, bits=1, scale=scale)
    y = rng.choice([-1.0, 1.0], (400, DIM))
    signs = Rotation(kind="hadamard", dim=DIM, seed=2).signs.copy()
    signs[3] *= -1
    x = y @ (linalg.hadamard(DIM) / 4) * signs
    found = search(codec, x, candidates=8)
    np.testing.assert_array_equal(found.signs, signs)
    # One bit leaves (1 - sqrt(2 / pi))^2 of +-1 and, of anything Gaussian, 1 - 2 / pi.
    ratio = (1 - np.sqrt(2 / np.pi)) ** 2 / (1 - 2 / np.pi)
    assert found.error < 1.5 * ratio * found.start
    arrays = fit(codec, x, candidates=8)
    plain = arrays | {
        "signs": Rotation(kind="hadamard", dim=DIM).signs.astype(np.float32),
        "order": np.arange(DIM, dtype=np.float32),
    }
    errors = [weighted_error(codec, a, x, np.eye(DIM)) for a in (arrays, plain)]
    assert errors[0] < 1.5 * ratio * errors[1]


def test_search_reports_the_codecs_own_error(rng):
    x = rng.normal(size=(64, DIM)) * np.geomspace(1, 4, DIM)
    half = rng.normal(size=(DIM, DIM))
    metric = half @ half.T / DIM + np.eye(DIM)
    codec = HadamardPerHead(dim=DIM, bits=2, scale_rule="least_squares", scale_dtype="float32")
    found = search(codec, x, metric, candidates=4, swaps=8)
    arrays = fit(codec, x, metric, candidates=4, swaps=8)
    np.testing.assert_array_equal(arrays["signs"], found.signs)
    np.testing.assert_array_equal(arrays["order"], found.order)
    got = weighted_error(codec, arrays, x[48:], metric)
    np.testing.assert_allclose(got, found.error, rtol=TOL["search_error"])


def test_never_worse_than_the_plain_rotation_and_deterministic(rng):
    kept = 0
    for seed in range(6):
        x = np.random.default_rng(seed).normal(size=(40, DIM))
        codec = HadamardPerHead(dim=DIM, bits=2)
        found = search(codec, x, candidates=4, swaps=4)
        again = search(codec, x, candidates=4, swaps=4)
        np.testing.assert_array_equal(found.signs, again.signs)
        assert found.error == again.error <= found.start
        plain = np.array_equal(found.signs, Rotation(kind="hadamard", dim=DIM).signs)
        plain &= np.array_equal(found.order, np.arange(DIM))
        assert plain == (found.error == found.start)
        kept += plain
    # Noise has no structure: what was found on 30 tokens does not always hold on the other ten.
    assert 0 < kept < 6


def test_refusals():
    with pytest.raises(ValueError, match="scale_rule"):
        HadamardPerHead(dim=16, bits=2, scale="head", scale_rule="unbiased")
    with pytest.raises(ValueError, match="scale='token'"):
        HadamardPerHead(dim=16, bits=2, scale="token")
    codec = HadamardPerHead(dim=16, bits=2)
    with pytest.raises(ValueError, match="tokens"):
        search(codec, np.ones((7, 16)))
    with pytest.raises(ValueError, match="finite"):
        search(codec, np.full((9, 16), np.inf))
    constant = fit(codec, np.ones((9, 16)), candidates=1, swaps=1)
    np.testing.assert_array_equal(constant["mean"], np.ones(16))
