"""Static per-channel integers against ONNX Runtime's rule in float64, and the RoPE envelope."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle_affine
import pytest
from tolerances import TOL

from turboq.codecs.per_channel import PerChannel, fit_per_channel, rope_pairs

encode = jax.jit(lambda codec, arrays, x: codec.encode(arrays, x), static_argnums=0)
decode = jax.jit(lambda codec, arrays, stored: codec.decode(arrays, stored), static_argnums=0)


def fitted(codec, x, **how):
    return {k: jnp.asarray(v) for k, v in fit_per_channel(codec, x, **how).items()}


def turned(x, angles, pairs):
    """x [n, D] with each pair of channels turned by angles [n, pairs]."""
    y = x.copy()
    a, b = x[:, pairs[:, 0]], x[:, pairs[:, 1]]
    y[:, pairs[:, 0]] = a * np.cos(angles) - b * np.sin(angles)
    y[:, pairs[:, 1]] = a * np.sin(angles) + b * np.cos(angles)
    return y


@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_is_the_operators_rule(bits, rng):
    """q = clip(rint(x / s)) with halves to even, saturation on both ends, exact bytes."""
    codec, half = PerChannel(dim=16, bits=bits), 2 ** (bits - 1)
    scale = np.geomspace(2.0**-6, 4, 16).astype(np.float32)
    q = rng.integers(-2 * half, 2 * half, (64, 16))
    x = (q.astype(np.float32) + rng.choice([-0.5, 0, 0.25, 0.5], q.shape)).astype(np.float32)
    exact = 2.0 ** np.round(np.log2(scale))  # powers of two: ties are exact ties
    arrays = {"channel_scale": jnp.asarray(exact, jnp.float32)}
    due = np.clip(np.rint(x.astype(np.float64)), -half, half - 1)
    assert np.mean(np.abs(x - np.trunc(x)) == 0.5) > 0.3
    assert due.min() == -half
    assert due.max() == half - 1
    stored = encode(codec, arrays, jnp.asarray(x * exact, jnp.float32))
    np.testing.assert_array_equal(stored["codes"].astype(jnp.int32) - half, due)
    np.testing.assert_array_equal(decode(codec, arrays, stored), (due * exact).astype(np.float32))
    data = codec.to_bytes(stored)
    if bits == 8:
        np.testing.assert_array_equal(data.view(np.int8), due)
    else:
        np.testing.assert_array_equal(data, (due[:, 0::2] + 8) + 16 * (due[:, 1::2] + 8))
    np.testing.assert_array_equal(codec.from_bytes(data)["codes"], stored["codes"])
    assert data.nbytes * 8 == 64 * codec.bits_per_vector


def test_ties_are_those_of_a_quotient(rng):
    """x = (q + 1/2) s in float32: a product with 1 / s would decide one in seven otherwise."""
    codec, scale = PerChannel(dim=16, bits=8), rng.uniform(0.01, 1, 16).astype(np.float32)
    x = ((rng.integers(-120, 120, (512, 16)) + 0.5).astype(np.float32) * scale).astype(np.float32)
    due = np.rint(x / scale) + 128
    assert np.mean(np.rint(x * (np.float32(1) / scale)) + 128 != due) > 0.1
    for part in (x, x[:1]):  # chunks of any length give equal codes
        stored = encode(codec, {"channel_scale": jnp.asarray(scale)}, jnp.asarray(part))
        np.testing.assert_array_equal(stored["codes"], due[: len(part)])


@pytest.mark.parametrize("rotation", ["identity", "hadamard"])
def test_affine_follows_float64(rotation, rng):
    """Per channel over all tokens: the fit is the rule of a block as long as the calibration."""
    codec = PerChannel(dim=64, bits=3, form="affine", rotation=rotation)
    x = (rng.normal(size=(100, 64)) * np.geomspace(0.1, 9, 64) + 4).astype(np.float32)
    arrays = fitted(codec, x)
    stored = encode(codec, arrays, jnp.asarray(x))
    y = x.astype(np.float64) @ codec.turn.matrix.T
    scale, zero = (np.asarray(arrays[f"channel_{n}"], np.float64)[None] for n in ("scale", "zero"))
    oracle_affine.check(y, stored["codes"], scale, zero, 3, 0, "float32")
    y_hat = zero + scale * np.asarray(stored["codes"])
    oracle_affine.close(decode(codec, arrays, stored), y_hat @ codec.turn.matrix)


def test_edges(rng):
    """Dead channels decode to zero (affine: their constant), huge vectors saturate; 0 is exact."""
    x = rng.normal(size=(50, 16))
    x[:, 2] = 0
    symmetric, affine = PerChannel(dim=16, bits=4), PerChannel(dim=16, bits=4, form="affine")
    probe = np.zeros((3, 16), np.float32)
    probe[1], probe[2, 7] = 3e38, -1e30
    arrays = fitted(symmetric, x)
    got = np.asarray(decode(symmetric, arrays, encode(symmetric, arrays, jnp.asarray(probe))))
    np.testing.assert_array_equal(got[0], 0)
    scale = np.asarray(arrays["channel_scale"])
    np.testing.assert_array_equal(got[1], 7 * scale)
    assert got[1, 2] == 0
    np.testing.assert_array_equal(got[2], np.where(np.arange(16) == 7, -8 * scale, 0))
    x[:, 2] = 5.5
    arrays = fitted(affine, x)
    got = decode(affine, arrays, encode(affine, arrays, jnp.asarray(probe)))
    np.testing.assert_array_equal(got[:, 2], np.float32(5.5))


def test_calibrated_maximum_is_the_last_level(rng):
    x = rng.normal(size=(200, 16))
    arrays = fit_per_channel(PerChannel(dim=16, bits=8), x)
    np.testing.assert_allclose(
        arrays["channel_scale"] * 128, np.abs(x).max(0), rtol=TOL["scale_f32"]
    )


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("form", ["symmetric", "affine"])
def test_envelope_holds_at_every_position(layout, form, rng):
    """Keys seen at small angles only: without the envelope a full turn saturates, with it none.

    Content with one large channel per pair, so the other is under-estimated without it.
    """
    codec, pairs = PerChannel(dim=16, bits=8, form=form), rope_pairs(layout, 12, 16)
    x = rng.normal(size=(400, 16)) * 0.1
    x[:, pairs[:, 0]] += 4
    seen = turned(x, rng.uniform(0, 0.05, (400, 6)), pairs)
    far = turned(x, rng.uniform(0, 2 * np.pi, (400, 6)), pairs).astype(np.float32)
    error = {}
    for how, given in (("plain", {}), ("envelope", {"rope_layout": layout, "rope_dim": 12})):
        arrays = fitted(codec, seen, **given)
        got = np.asarray(decode(codec, arrays, encode(codec, arrays, jnp.asarray(far))), np.float64)
        error[how] = np.abs(got - far)[:, pairs.ravel()].max()
        step = float(arrays["channel_scale"].max())
    assert error["envelope"] <= step + TOL["rotate_f32"]  # a whole step: +max has no level
    assert error["plain"] > 3
    plain = fit_per_channel(codec, seen)
    rest = [c for c in range(16) if c not in pairs]
    envelope = fit_per_channel(codec, seen, rope_layout=layout, rope_dim=12)
    for name in plain:  # channels beyond rope_dim are as without
        np.testing.assert_array_equal(envelope[name][rest], plain[name][rest])


def test_rope_pairs():
    np.testing.assert_array_equal(rope_pairs("half", 6, 8), [[0, 3], [1, 4], [2, 5]])
    np.testing.assert_array_equal(rope_pairs("interleaved", 6, 8), [[0, 1], [2, 3], [4, 5]])
    assert rope_pairs("none", 6, 8).shape == (0, 2)


def test_refusals(rng):
    codec = PerChannel(dim=16, bits=4)
    x = rng.normal(size=(4, 16))
    with pytest.raises(ValueError, match=r"must be \[n, 16\]"):
        fit_per_channel(codec, x[:, :8])
    with pytest.raises(ValueError, match="finite"):
        fit_per_channel(codec, x * np.nan)
    with pytest.raises(ValueError, match="rope_layout='neox' must be one of"):
        fit_per_channel(codec, x, rope_layout="neox")
    with pytest.raises(ValueError, match="rope_dim=18 must be even"):
        fit_per_channel(codec, x, rope_layout="half", rope_dim=18)
    with pytest.raises(ValueError, match="needs rotation='identity'"):
        fit_per_channel(PerChannel(dim=16, bits=4, rotation="walsh"), x, rope_layout="half")
    for other in (PerChannel(dim=16, bits=3), PerChannel(dim=16, bits=8, form="affine")):
        with pytest.raises(ValueError, match="must be symmetric with 4 or 8 bits"):
            other.to_bytes({"codes": jnp.zeros((1, 16), jnp.uint8)})
