"""Rotation + integers per token against float64, and its edges."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle_affine
import pytest
from tolerances import TOL

from turboq.codecs.affine import codes, levels
from turboq.codecs.int_affine import IntAffine

encode = jax.jit(lambda codec, arrays, x: codec.encode(arrays, x), static_argnums=0)
decode = jax.jit(lambda codec, arrays, stored: codec.decode(arrays, stored), static_argnums=0)


CODECS = [
    IntAffine(dim=64, bits=4),
    IntAffine(dim=64, bits=2, group=16, rotation="identity", scale_dtype="float32"),
    IntAffine(dim=96, bits=3, rotation="walsh", rotation_block=32, group=48),
]


@pytest.mark.parametrize("codec", CODECS, ids=lambda c: f"{c.dim}-{c.bits}")
def test_follows_float64(codec, rng):
    x = (rng.normal(size=(40, codec.dim)) * 3 + 1).astype(np.float32)
    stored = encode(codec, {}, jnp.asarray(x))
    size = codec.turn.dim
    y = (x.reshape(40, -1, size).astype(np.float64) @ codec.turn.matrix.T).reshape(x.shape)
    split = y.reshape(40, codec.groups, -1)
    packed = np.asarray(stored["codes"]).reshape(split.shape)
    scale, low = (np.asarray(stored[n], np.float64)[..., None] for n in ("scale", "minimum"))
    oracle_affine.check(split, packed, scale, low, codec.bits, -1, codec.scale_dtype)
    y_hat = (low + scale * packed).reshape(40, -1, size)
    oracle_affine.close(decode(codec, {}, stored), (y_hat @ codec.turn.matrix).reshape(x.shape))


@pytest.mark.parametrize(("bits", "group", "per_channel"), [(4, 0, 4.25), (2, 32, 3.0)])
def test_all_in_bits(bits, group, per_channel):
    assert IntAffine(dim=128, bits=bits, group=group).bits_per_channel == per_channel


def test_edges():
    """Constant groups have no spread and keep their value; extremes are levels."""
    codec = IntAffine(dim=64, bits=2, rotation="identity", scale_dtype="float32")
    x = np.zeros((4, 64), np.float32)
    x[1], x[2, 5], x[3, 7], x[3, 8] = 2.5, -3.0, 1.5e38, -1.5e38
    stored = encode(codec, {}, jnp.asarray(x))
    np.testing.assert_allclose(stored["scale"][:, 0], [0, 0, 1, 1e38], rtol=TOL["scale_f32"])
    got = np.asarray(decode(codec, {}, stored), np.float64)
    np.testing.assert_array_equal(got[:3], x[:3])
    np.testing.assert_allclose(got[3, 7:9], x[3, 7:9], rtol=TOL["scale_f32"])
    assert np.all(np.isfinite(got))


@pytest.mark.parametrize("axis", [-1, -2])
def test_nan_shows_in_long_groups(axis):
    """In its own group only; a plain minimum over 64 or more entries loses it on a CPU."""
    y = jnp.zeros((128, 128)).at[5, 5].set(jnp.nan)
    _, minimum = levels(y, 4, "float16", axis=axis)
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(np.asarray(minimum))), [5])


def test_codes_are_nearest_for_the_stored_minimum():
    """Two steps above a minimum that float16 rounds: codes for the exact one would miss by two."""
    low = 1000.2  # float16 holds 1000.0 and 1000.5
    y = jnp.asarray(low + 0.1 * np.arange(16), jnp.float32)[None]
    scale, minimum = levels(y, 4, "float16", axis=-1)
    assert minimum[0, 0] == 1000
    got = 1000 + np.float64(scale[0, 0]) * np.asarray(codes(y, scale, minimum, 4), np.float64)
    np.testing.assert_allclose(got[:, :14], y[:, :14], rtol=TOL["stored_float16"] / 1000 * 16)


@pytest.mark.parametrize("group", [1, 24, -8, 128])
def test_bad_groups_are_named(group):
    with pytest.raises(ValueError, match=f"group={group} must be 0"):
        IntAffine(dim=64, bits=4, group=group)
