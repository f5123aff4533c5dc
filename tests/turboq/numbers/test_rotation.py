"""Rotations against independently built matrices, and their reproducibility."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from tolerances import TOL

from turboq.numbers.rotation import KINDS, Rotation, haar_matrix, random_normals, random_words

DIMS = (64, 80, 96, 128, 256)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("kind", KINDS)
def test_matrix_is_orthogonal_and_transforms_equal_it(kind, dim, rng):
    rotation = Rotation(kind=kind, dim=dim, seed=3)
    matrix = rotation.matrix
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(dim), atol=TOL["orthogonal_f64"], rtol=0)
    x = rng.normal(size=(2, 7, dim)).astype(np.float32)
    y = jax.jit(rotation.apply)(jnp.asarray(x))
    back = jax.jit(rotation.invert)(y)
    assert y.dtype == back.dtype == jnp.float32
    np.testing.assert_allclose(y, x.astype(np.float64) @ matrix.T, atol=TOL["rotate_f32"], rtol=0)
    np.testing.assert_allclose(back, x, atol=TOL["rotate_f32"], rtol=0)
    np.testing.assert_allclose(
        rotation.invert(jnp.asarray(x)), x @ matrix, atol=TOL["rotate_f32"], rtol=0
    )


@pytest.mark.parametrize("dim", [8, 40, 96, 128, 512])
@pytest.mark.parametrize("kind", ["hadamard", "walsh"])
def test_hadamard_equals_kronecker_of_scipy_matrices(kind, dim):
    expected = oracles.rotation(kind, dim, seed=11)
    np.testing.assert_allclose(
        Rotation(kind=kind, dim=dim, seed=11).matrix,
        expected,
        atol=TOL["orthogonal_f64"],
        rtol=0,
    )
    assert np.max(np.abs(expected)) <= np.sqrt(2 / dim) * (1 + 1e-12)


def test_haar_equals_gram_schmidt_of_documented_normals():
    got = Rotation(kind="haar", dim=64, seed=5).matrix
    np.testing.assert_allclose(
        got, oracles.rotation("haar", 64, seed=5), atol=TOL["haar_f64"], rtol=0
    )


def test_random_words_are_philox_and_golden():
    """Pins the stream itself: a plain-integer Philox, and constants written down once."""
    seed = 20261122
    for stream, key in (("hadamard", 0), ("haar", 1), ("sketch_gaussian", 2)):
        assert list(random_words(seed, stream, 9)) == oracles.philox(seed + (key << 64), 9)
    assert [int(w) for w in random_words(0, "hadamard", 2)] == GOLDEN_WORDS
    signs = Rotation(kind="hadamard", dim=16, seed=0).signs
    assert "".join("+" if s > 0 else "-" for s in signs) == GOLDEN_SIGNS
    np.testing.assert_allclose(
        random_normals(0, "haar", (3,)), GOLDEN_NORMALS, rtol=TOL["golden_normal"]
    )


GOLDEN_WORDS = [213000021201967259, 4455796210202625458]
GOLDEN_SIGNS = "+++--+--++-+-+--"
GOLDEN_NORMALS = [0.8903241113278905, 0.6786855090559122, 0.44447124687356104]


def test_haar_entries_have_the_moments_of_the_sphere():
    """E r^2 = 1/d and E r^4 = 3/(d(d+2)); d^2 entries, weakly dependent, over four seeds."""
    dim = 128
    r = np.stack([haar_matrix(random_normals(s, "haar", (dim, dim))) for s in range(4)])
    fourth = np.mean(r**4) * dim * (dim + 2) / 3
    assert abs(fourth - 1) < TOL["haar_fourth_moment"]
    assert abs(np.mean(np.diagonal(r, axis1=1, axis2=2)) * np.sqrt(dim)) < TOL["haar_trace"]


def test_seeds_differ_and_identity_is_exact(rng):
    for kind in ("hadamard", "haar"):
        a, b = (Rotation(kind=kind, dim=64, seed=s).matrix for s in (0, 1))
        assert np.max(np.abs(a - b)) > 0.1
    x = jnp.asarray(rng.normal(size=(3, 64)), jnp.float32)
    identity = Rotation(kind="identity", dim=64)
    np.testing.assert_array_equal(identity.apply(x), x)
    np.testing.assert_array_equal(identity.invert(x), x)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "fourier"}, "fourier.*identity"),
        ({"dim": 0}, "dim=0"),
        ({"dim": 1 << 20}, "dim=1048576"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": True}, "seed=True"),
    ],
)
def test_bad_descriptions_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        Rotation(**({"kind": "haar", "dim": 64, "seed": 0} | change))
