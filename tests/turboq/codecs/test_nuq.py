"""Non-uniform per-channel codes with exact outliers, against float64 and exhaustive search."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle_affine
import pytest
from tolerances import TOL

from turboq.codecs.nuq import NUQ, fit_nuq
from turboq.numbers import codebook

encode = jax.jit(lambda codec, arrays, x: codec.encode(arrays, x), static_argnums=0)
decode = jax.jit(lambda codec, arrays, stored: codec.decode(arrays, stored), static_argnums=0)


def heavy(rng, n, dim):
    """Channels of many sizes and means with heavy tails."""
    x = rng.standard_t(3, (n, dim)) * np.geomspace(0.2, 8, dim) + rng.normal(size=dim) * 5
    return x.astype(np.float32)


def fitted(codec, x, weights=None):
    return {k: jnp.asarray(v) for k, v in fit_nuq(codec, x, weights).items()}


@pytest.mark.parametrize(("dim", "bits", "count"), [(64, 3, 1), (256, 2, 3)])
def test_follows_float64(dim, bits, count, rng):
    """The `count` largest normalised deviations come back in float16, the rest as centroids."""
    codec = NUQ(dim=dim, bits=bits)
    x = heavy(rng, 100, dim)
    arrays = fitted(codec, x)
    stored = encode(codec, arrays, jnp.asarray(x))
    center, scale, table = (
        np.asarray(arrays[n], np.float64) for n in ("channel_center", "channel_scale", "codebook")
    )
    u = (x - center) / scale
    order = np.argsort(-np.abs(u), axis=1)[:, :count]
    assert codec.outliers == count == stored["index"].shape[1]
    np.testing.assert_array_equal(np.sort(stored["index"], axis=1), np.sort(order, axis=1))
    due = center + scale * table[np.argmin(np.abs(u[..., None] - table), axis=-1)]
    value = np.take_along_axis(x, order, axis=1).astype(np.float16)
    np.put_along_axis(due, order, value.astype(np.float64), axis=1)
    t = codebook.thresholds(table)
    clear = np.min(np.abs(u[..., None] - t), axis=-1) > TOL["tie_f32"] * np.maximum(1, np.abs(u))
    got = np.asarray(decode(codec, arrays, stored))
    assert np.mean(clear) > 1 - TOL["unclear_share"]
    oracle_affine.close(got[clear], due[clear])


def test_normalisation_and_codebook(rng):
    """The central 99 % of each channel fill [-1, 1]; the table is a fixed point of k-means."""
    codec = NUQ(dim=16, bits=2)
    x = heavy(rng, 500, 16).astype(np.float64)
    weights = rng.uniform(0.1, 3, x.shape)
    arrays = fit_nuq(codec, x, weights)
    low, high = np.quantile(x, [0.005, 0.995], axis=0)
    np.testing.assert_allclose(
        arrays["channel_center"], (low + high) / 2, rtol=TOL["scale_f32"], atol=1e-6
    )
    np.testing.assert_allclose(arrays["channel_scale"], (high - low) / 2, rtol=TOL["scale_f32"])
    inside = (x >= low) & (x <= high)
    u = ((x - (low + high) / 2) / ((high - low) / 2))[inside]
    w = (weights * ((high - low) / 2) ** 2)[inside]
    table = arrays["codebook"].astype(np.float64)
    assert np.all(np.diff(table) > 0)
    codes = np.argmin(np.abs(u[:, None] - table), axis=1)
    means = [np.average(u[codes == k], weights=w[codes == k]) for k in range(4)]
    np.testing.assert_allclose(table, means, atol=TOL["hand_f32"])


def test_outliers_pay(rng):
    """Heavy tails: the error with 1 % exact is far below that without, by more than their bits."""
    x = heavy(rng, 300, 64)
    error = {}
    for permille in (0, 10):
        codec = NUQ(dim=64, bits=3, outlier_permille=permille)
        arrays = fitted(codec, x)
        stored = encode(codec, arrays, jnp.asarray(x))
        assert set(stored) == {f.name for f in codec.fields}
        got = np.asarray(decode(codec, arrays, stored), np.float64)
        error[permille] = np.mean(((got - x) / np.std(x, axis=0)) ** 2)
    assert error[10] < error[0] / 2


@pytest.mark.parametrize(("dim", "due"), [(64, 22 / 64), (128, 46 / 128), (256, 72 / 256)])
def test_all_in_bits(dim, due):
    assert NUQ(dim=dim, bits=3).bits_per_channel == 3 + due
    assert NUQ(dim=dim, bits=3, outlier_permille=0).bits_per_channel == 3


def test_edges(rng):
    """Dead channels, one huge entry, an all-huge vector, NaN: finite or reported as an outlier."""
    codec = NUQ(dim=16, bits=3, value_dtype="float32")
    x = rng.normal(size=(100, 16))
    x[:, 4] = 2.5
    arrays = fitted(codec, x)
    probe = np.zeros((5, 16), np.float32)
    probe[:, 4] = 2.5
    probe[1, 9], probe[2], probe[3, 4], probe[4, 11] = -3e38, 1e30, 2.625, np.nan
    stored = encode(codec, arrays, jnp.asarray(probe))
    got = np.asarray(decode(codec, arrays, stored))
    assert got[0, 4] == 2.5
    assert got[1, 9] == probe[1, 9]
    assert got[3, 4] == 2.625  # a deviation from a constant is an outlier, however small
    assert np.all(np.isfinite(got[:4]))
    assert np.isnan(stored["value"][4, 0])
    still = fitted(codec, np.ones((10, 16)))
    np.testing.assert_array_equal(still["codebook"], 0)
    ones = jnp.ones((1, 16))
    np.testing.assert_array_equal(decode(codec, still, encode(codec, still, ones)), ones)


def test_before_and_after_rope(rng):
    """Keys with a constant: before RoPE a channel holds it, after RoPE the position smears it."""
    x = rng.normal(size=(400, 16)) * 0.3
    x[:, :8] += 6
    angle = np.arange(400)[:, None] / 10000.0 ** (np.arange(8) / 8)

    def turn(y, sign):
        a, b, c, s = y[:, :8], y[:, 8:], np.cos(angle), sign * np.sin(angle)
        return np.concatenate([a * c - b * s, a * s + b * c], axis=1)

    codec, error = NUQ(dim=16, bits=3), {}
    for name, keys, back in (("pre", x, lambda y: turn(y, 1)), ("post", turn(x, 1), lambda y: y)):
        arrays = fitted(codec, keys)
        got = decode(codec, arrays, encode(codec, arrays, jnp.asarray(keys, jnp.float32)))
        error[name] = np.mean((back(np.asarray(got, np.float64)) - turn(x, 1)) ** 2)
    assert error["pre"] < error["post"] / 4


def test_refusals(rng):
    x = rng.normal(size=(10, 16))
    with pytest.raises(ValueError, match="must be at most 256"):
        NUQ(dim=264, bits=3)
    with pytest.raises(ValueError, match=r"outlier_permille=51 must be 0\.\.50"):
        NUQ(dim=16, bits=3, outlier_permille=51)
    with pytest.raises(ValueError, match="weights"):
        fit_nuq(NUQ(dim=16, bits=3), x, np.ones((10, 8)))
    with pytest.raises(ValueError, match="weights need rotation='identity'"):
        fit_nuq(NUQ(dim=16, bits=3, rotation="hadamard"), x, np.ones((10, 16)))
    with pytest.raises(ValueError, match="finite"):
        fit_nuq(NUQ(dim=16, bits=3), x * np.inf)
