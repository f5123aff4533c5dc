"""The E8 codebook against the lattice's definition and exhaustive search."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import TOL

from turboq.codecs import e8
from turboq.numbers import distortion


def test_the_codebook_is_the_lowest_norms_of_e8():
    """By definition and theta series: 240 sigma_3(n) points of squared norm 2 n, each once."""
    p = e8.points().astype(np.float64)
    assert p.shape == (65536, 8)
    assert len(np.unique(p, axis=0)) == 65536
    whole = np.all(p == np.round(p), axis=1)
    half = np.all(p + 0.5 == np.round(p + 0.5), axis=1)
    assert np.all(whole ^ half)
    assert np.all(np.sum(p, axis=1) % 2 == 0)
    norm, count = np.unique(np.sum(p * p, axis=1), return_counts=True)
    sigma = [sum(d**3 for d in range(1, n + 1) if n % d == 0) for n in range(1, 6)]
    np.testing.assert_array_equal(norm, [0, 2, 4, 6, 8, 10, 12])
    np.testing.assert_array_equal(count, [1, *(240 * s for s in sigma), 8655])


def test_codes_and_points_are_inverse():
    p = e8.points()
    codes = np.asarray(e8.encode_points(jnp.asarray(p)))
    np.testing.assert_array_equal(codes[:, 0] + 256 * codes[:, 1].astype(int), np.arange(65536))
    np.testing.assert_array_equal(e8.decode_points(jnp.asarray(codes)), p)


@pytest.mark.parametrize("size", [0.3, 1.0, 1.6, 4.0])
def test_nearest_equals_exhaustive_search(size, rng):
    """Exact wherever the nearest of all 65536 is not in the part shell; else seldom worse."""
    x = (rng.normal(size=(300, 8)) * size / e8.STEP).astype(np.float32)
    x[0, :] = 0
    x[1] = [9, 0, 0, 0, 0, 0, 0, 0]
    x[2] = -2.5
    got = np.asarray(jax.jit(e8.nearest)(jnp.asarray(x)), np.float64)
    p = e8.points().astype(np.float64)
    assert np.all(np.any(np.all(got[:8, None] == p[None], axis=2), axis=1))
    gain = x @ p.T - 0.5 * np.sum(p * p, axis=1)
    reached = np.sum(got * x, -1) - 0.5 * np.sum(got * got, -1)
    worse = reached < gain.max(1) - TOL["path_error_f32"] * size
    part = np.sum(p[gain.argmax(1)] ** 2, -1) == 12
    assert not np.any(worse & ~part)
    assert np.mean(worse) <= (TOL["e8_missed"] if size <= 1 else TOL["e8_missed_far"])


def test_gaussian_snr(rng):
    """10.456 dB for 2^16 lowest norms; which part of the shell is taken moves 0.03 dB."""
    x = rng.normal(size=(40000, 8)).astype(np.float32)
    p = jax.jit(e8.nearest)(jnp.asarray(x / e8.STEP))
    error = np.mean((np.asarray(p, np.float64) * e8.STEP - x) ** 2)
    assert abs(-10 * np.log10(error) - 10.456) < TOL["e8_snr_db"]
    codec = e8.E8(dim=64)
    y = x[:16000].reshape(-1, 64)
    got = jax.jit(lambda y: codec.decode({}, codec.encode({}, y)))(jnp.asarray(y))
    error = np.mean((np.asarray(got, np.float64) - y) ** 2)
    assert codec.bits_per_channel == 2.25
    distortion.check_shannon(
        error * 64, bits_per_vector=codec.bits_per_vector, variances=np.ones(64), slack=0.0
    )
    assert error < 0.95 * 0.117482  # Lloyd-Max at 2 bits


def test_decode_is_the_table(rng):
    codec = e8.E8(dim=16, rotation="haar", seed=3, scale_rule="least_squares")
    codes = rng.integers(0, 256, (20, 4)).astype(np.uint8)
    scale = rng.uniform(0.5, 2, (20, 1)).astype(np.float16)
    index = codes[:, ::2] + 256 * codes[:, 1::2].astype(int)
    y = codec.tables["points"][index].reshape(20, 16) * scale.astype(np.float64)
    got = jax.jit(codec.decode)({}, {"points": jnp.asarray(codes), "scale": jnp.asarray(scale)})
    np.testing.assert_allclose(got, y @ codec.turn.matrix, rtol=0, atol=TOL["rotate_f32"])
