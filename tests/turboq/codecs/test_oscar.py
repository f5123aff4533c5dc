"""OSCAR-like codec: its transform, clipping and integers against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle_affine
import pytest
from scipy import linalg
from tolerances import TOL

from turboq.cache.layer import TokenPolicy
from turboq.codecs import oscar
from turboq.codecs.oscar import Oscar, bit_reversal, fit_oscar, score_weighted_moment

encode = jax.jit(lambda codec, arrays, x: codec.encode(arrays, x), static_argnums=0)
decode = jax.jit(lambda codec, arrays, stored: codec.decode(arrays, stored), static_argnums=0)


def moment(rng, dim, heads=()):
    a = rng.normal(size=(*heads, 200, dim)) * np.geomspace(0.05, 5, dim)
    return np.swapaxes(a, -1, -2) @ a / 200


def test_bit_reversal():
    np.testing.assert_array_equal(bit_reversal(8), [0, 4, 2, 6, 1, 5, 3, 7])
    np.testing.assert_array_equal(bit_reversal(12), [0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11])
    for dim in (1, 64, 80, 96):
        np.testing.assert_array_equal(np.sort(bit_reversal(dim)), np.arange(dim))


def test_transform_is_eigenvectors_hadamard_permutation(rng):
    """T^T = E H P with scipy's Hadamard; every new axis hears every eigenvector equally."""
    c = moment(rng, 16, heads=(2,))
    got = fit_oscar(c)["transform"].astype(np.float64)
    assert got.shape == (2, 16, 16)
    hadamard = linalg.hadamard(16) / 4
    for h in range(2):
        values, vectors = linalg.eigh(c[h])
        np.testing.assert_allclose(got[h] @ got[h].T, np.eye(16), atol=TOL["hand_f32"])
        spread = np.abs(got[h] @ vectors)
        np.testing.assert_allclose(spread, 0.25, atol=TOL["hand_f32"])
        # All new axes have the mean second moment, tr C / D.
        np.testing.assert_allclose(
            np.diagonal(got[h] @ c[h] @ got[h].T), values.mean(), rtol=TOL["rotate_f32"]
        )
        # Column i of E H goes where the bits of its rank from the end say; signs of E are free.
        place = [int(f"{i:04b}"[::-1], 2) for i in range(16)]
        signs = np.sign(got[h][place[15]] @ vectors)  # column 0 of H: all ones
        np.testing.assert_allclose(
            got[h][place], ((vectors * signs) @ hadamard)[:, ::-1].T, atol=TOL["hand_f32"]
        )


def test_moment_of_values_is_that_of_outputs(rng):
    s, v = rng.dirichlet(np.ones(20), size=12), rng.normal(size=(20, 8))
    due = v.T @ s.T @ s @ v / 12
    np.testing.assert_allclose(score_weighted_moment(s, v), due, atol=TOL["float64"])


@pytest.mark.parametrize(("group", "percent"), [(0, 96), (16, 92), (32, 100)])
def test_follows_float64(group, percent, rng):
    codec = Oscar(dim=64, group=group, clip_percent=percent)
    transform = fit_oscar(moment(rng, 64))["transform"]
    arrays = {"transform": jnp.asarray(transform)}
    x = (rng.normal(size=(60, 64)) * 2).astype(np.float32)
    stored = encode(codec, arrays, jnp.asarray(x))
    t = transform.astype(np.float64)
    y = x @ t.T
    limit = np.sort(np.abs(y), axis=1)[:, [min(percent * 64 // 100, 63)]]
    clipped = np.clip(y, -limit, limit)
    beyond = np.sum(np.abs(y) > limit, axis=1)
    np.testing.assert_array_equal(beyond, {96: 2, 92: 5, 100: 0}[percent])
    split = clipped.reshape(60, codec.groups, -1)
    packed = np.asarray(stored["codes"]).reshape(split.shape)
    scale, low = (np.asarray(stored[n], np.float64)[..., None] for n in ("scale", "minimum"))
    oracle_affine.check(split, packed, scale, low, 2, -1)
    oracle_affine.close(decode(codec, arrays, stored), (low + scale * packed).reshape(x.shape) @ t)


def test_permutation_matters_only_between_groups(rng):
    """Rows of T in another order: the same vectors from one group, others from four."""
    order = rng.permutation(64)
    t = fit_oscar(moment(rng, 64))["transform"]
    x = jnp.asarray(rng.normal(size=(20, 64)), jnp.float32)
    for group, same in ((0, True), (16, False)):
        codec = Oscar(dim=64, group=group)
        a, b = (
            np.asarray(decode(codec, arrays, encode(codec, arrays, x)))
            for arrays in ({"transform": jnp.asarray(t)}, {"transform": jnp.asarray(t[order])})
        )
        close = np.abs(a - b).max(axis=1) < TOL["rotate_f32"]
        assert np.mean(close) > 0.9 if same else not np.any(close)


def test_edges(rng):
    """Zero is exact; one entry along a new axis is clipped away, as OSCAR's rule says."""
    codec = Oscar(dim=64, clip_percent=96)
    t = fit_oscar(moment(rng, 64))["transform"]
    arrays = {"transform": jnp.asarray(t)}
    x = np.zeros((3, 64), np.float32)
    x[1] = t[5] * 3
    x[2] = 1e4
    got = np.asarray(decode(codec, arrays, encode(codec, arrays, jnp.asarray(x))))
    np.testing.assert_array_equal(got[0], 0)
    np.testing.assert_allclose(got[1], 0, atol=TOL["rotate_f32"])
    kept = Oscar(dim=64, clip_percent=100)
    got = np.asarray(decode(kept, arrays, encode(kept, arrays, jnp.asarray(x))))
    np.testing.assert_allclose(got[1], x[1], rtol=0, atol=3 * TOL["stored_float16"])
    assert np.all(np.isfinite(got))


def test_bits_constants_and_refusals():
    assert [Oscar(dim=d).bits_per_channel for d in (64, 128, 256)] == [2.5, 2.25, 2.125]
    assert Oscar(dim=256, group=128).bits_per_channel == 2.25
    assert TokenPolicy(sinks=oscar.SINKS, recent=oscar.RECENT).recent == 4 * oscar.SINKS == 256
    with pytest.raises(ValueError, match=r"clip_percent=49 must be 50\.\.100"):
        Oscar(dim=64, clip_percent=49)
    with pytest.raises(ValueError, match="must be 'identity'"):
        Oscar(dim=64, rotation="walsh")
    for bad, why in (
        (np.zeros((3, 4)), "must be"),
        (np.full((4, 4), np.nan), "finite"),
        (np.triu(np.ones((4, 4))), "symmetric"),
    ):
        with pytest.raises(ValueError, match=why):
            fit_oscar(bad)
