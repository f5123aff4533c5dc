"""FP8 against ml_dtypes' casts, bit for bit, and its fitted scales against brute force."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tolerances import TOL

from turboq.codecs import check_finite_stored
from turboq.codecs.fit_scale import RATIOS, fit_scale
from turboq.codecs.fp8 import FORMATS, FP8, SCALES
from turboq.codecs.int_token_head import Int8TokenHead
from turboq.codecs.minifloat import MiniFloat, divide
from turboq.codecs.nvfp4 import NVFP4
from turboq.errors import TurboqError

ML = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
LARGEST = {name: float(ml_dtypes.finfo(kind).max) for name, kind in ML.items()}


def cast(name: str, v: np.ndarray) -> np.ndarray:
    """Codes by ml_dtypes after the stated saturation; NaN stays NaN."""
    return np.clip(v, -LARGEST[name], LARGEST[name]).astype(ML[name]).view(np.uint8)


def hard_values(number: MiniFloat, kind, rng: np.random.Generator) -> np.ndarray:
    """Float32: all values of the format, all midpoints, their neighbours, overflow, random bits."""
    grid = np.arange(1 << (number.bits - 1), dtype=np.uint8).view(kind).astype(np.float64)
    grid = np.unique(grid[np.isfinite(grid)])
    ties = (grid[1:] + grid[:-1]) / 2
    beyond = [number.largest * f for f in (1.01, 1.0625, 1.125, 1.25, 1.5, 2, 1e6)]
    v = np.concatenate([grid, ties, beyond, [np.inf, 1e-45, 1e-38, 3e38]]).astype(np.float32)
    v = np.concatenate([v, np.nextafter(v, np.float32(0)), np.nextafter(v, np.float32(np.inf))])
    bits = rng.integers(0, 1 << 32, 60_000, dtype=np.uint32).view(np.float32)
    normal = (rng.normal(size=60_000) * number.largest / 4).astype(np.float32)
    v = np.concatenate([v, bits[np.isfinite(bits)], normal, normal / 4096])
    return np.concatenate([v, -v])


@pytest.mark.parametrize("name", FORMATS)
def test_codes_equal_ml_dtypes(name, rng):
    v = hard_values(FORMATS[name], ML[name], rng)
    got = np.asarray(jax.jit(FORMATS[name].encode)(jnp.asarray(v)))
    np.testing.assert_array_equal(got, cast(name, v))
    assert FORMATS[name].largest == LARGEST[name]


@pytest.mark.parametrize("name", FORMATS)
def test_all_codes_decode_as_ml_dtypes(name):
    codes = np.arange(256, dtype=np.uint8)
    got = np.asarray(jax.jit(FORMATS[name].decode)(jnp.asarray(codes)))
    expected = codes.view(ML[name]).astype(np.float32)
    np.testing.assert_array_equal(got.view(np.uint32) >> 31, codes >> 7)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", FORMATS)
def test_saturation_and_nan(name):
    """Overflow, infinite or not, is the largest number; NaN is NaN with its sign."""
    number = FORMATS[name]
    v = jnp.asarray([np.inf, -np.inf, 1e38, -1e38, np.nan, -np.nan, 0.0, -0.0], jnp.float32)
    codes = jax.jit(number.encode)(v)
    top = number.code_of_largest
    nan = number.nan_code
    assert codes.tolist() == [top, top | 128, top, top | 128, nan, nan | 128, 0, 128]
    back = np.asarray(jax.jit(number.decode)(codes))
    np.testing.assert_array_equal(back[:4], np.array([1, -1, 1, -1]) * LARGEST[name])
    assert np.isnan(back[4:6]).all()


def test_division_is_correctly_rounded(rng):
    """Under jit and vmap too, where a plain x / 448 is a product with the reciprocal."""
    x = rng.normal(size=(50, 64)).astype(np.float32)
    y = np.abs(rng.normal(size=(50, 1))).astype(np.float32) + np.float32(0.1)
    for f in (jax.jit(divide), jax.jit(jax.vmap(divide))):
        np.testing.assert_array_equal(f(x, y), x / y)
    for c in (448.0, 127.0, 15.0, 7.0):
        by = jax.jit(lambda v, c=c: divide(v, jnp.float32(c)))
        np.testing.assert_array_equal(by(x), x / np.float32(c))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("scale", SCALES)
def test_codec_bytes_equal_the_float32_rule(name, scale, rng):
    dim = 64
    codec = FP8(dim=dim, format=name, scale=scale)
    size = 10.0 ** rng.uniform(-5, 4, size=(300, 1))
    x = (rng.normal(size=(300, dim)) * size).astype(np.float32)
    x[0], x[1], x[2] = 0, 1e-9, -3.0
    static = np.float32(0.37)
    arrays = {n: jnp.asarray(static) for n in codec.array_shapes}
    stored = jax.jit(codec.encode)(arrays, jnp.asarray(x))
    if scale == "token":
        s = np.abs(x).max(-1, keepdims=True) / np.float32(LARGEST[name])
        s = np.maximum(s, np.float32(1e-6))
        codes = cast(name, x * (np.float32(1) / s))
        np.testing.assert_array_equal(stored["scale"], s)
        expected = np.concatenate([codes, s.astype("<f4").view(np.uint8)], axis=-1)
    else:
        s = {"none": np.float32(1)}.get(scale, static)
        codes = expected = cast(name, x / s)
    stream = codec.to_bytes(stored)
    np.testing.assert_array_equal(stream, expected)
    assert stream.shape[-1] * 8 == codec.bits_per_vector
    again = codec.from_bytes(stream)
    assert {k: v.dtype for k, v in again.items()} == {k: v.dtype for k, v in stored.items()}
    np.testing.assert_array_equal(codec.to_bytes(again), stream)
    decoded = jax.jit(codec.decode)(arrays, stored)
    np.testing.assert_array_equal(decoded, codes.view(ML[name]).astype(np.float32) * s)


def test_bits_per_channel():
    for dim, dynamic in ((64, 8.5), (128, 8.25), (256, 8.125)):
        assert FP8(dim=dim, scale="token").bits_per_channel == dynamic
        assert Int8TokenHead(dim=dim).bits_per_channel == dynamic
        assert FP8(dim=dim, scale="head").bits_per_channel == 8
    calibrated = [scale for scale in SCALES if FP8(dim=64, scale=scale).calibrated]
    assert calibrated == ["tensor", "head"]
    assert NVFP4(dim=64).calibrated


def test_bad_input_shows_in_a_token_scale():
    x, encode = np.ones((3, 64), np.float32), jax.jit(FP8(dim=64).encode)
    for bad in (np.nan, np.inf):
        x[1, 5] = bad
        with pytest.raises(TurboqError, match="not finite"):
            check_finite_stored(encode({}, jnp.asarray(x)))


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"format": "e3m4"}, "format='e3m4' must be"), ({"scale": "channel"}, "scale='channel'")],
)
def test_bad_fields(fields, words):
    with pytest.raises(ValueError, match=words):
        FP8(dim=64, **fields)


def outliers(rng: np.random.Generator) -> np.ndarray:
    """Three heads [3, n, D]: normal; heavy-tailed; normal with one value 4000 times larger."""
    x = rng.normal(size=(3, 60, 64)) * np.array([1e-3, 1, 20])[:, None, None]
    x[1] *= np.exp(rng.normal(size=x[1].shape) * 2)
    x[2, 7, 9] = 8e4
    return x.astype(np.float32)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("scale", ["head", "tensor"])
def test_fitted_scales(name, scale, rng):
    x = outliers(rng)
    codec = FP8(dim=64, format=name, scale=scale)
    pooled = np.abs(x.reshape(1, -1) if scale == "tensor" else x.reshape(3, -1)).astype(np.float64)
    top = LARGEST[name]
    for method, peak in (("absmax", pooled.max(1)), ("percentile", np.percentile(pooled, 99.9, 1))):
        got = fit_scale(codec, x, method, 99.9)["scale"]
        assert got.dtype == np.float32
        assert got.shape == (3,)
        np.testing.assert_allclose(got, np.broadcast_to(peak / top, 3), rtol=TOL["scale_f32"])
    # Brute force with ml_dtypes' casts, in float64.
    tried = fit_scale(codec, x, "absmax")["scale"].astype(np.float64)[:, None] * RATIOS
    v = x.reshape(3, 1, -1) / tried[..., None]
    back = cast(name, v).view(ML[name]).astype(np.float64) * tried[..., None]
    error = np.mean((back - x.reshape(3, 1, -1)) ** 2, axis=-1)
    if scale == "tensor":
        error = np.broadcast_to(error.mean(0), error.shape)
    got = fit_scale(codec, x, "mse")["scale"].astype(np.float64)
    at = np.argmin(np.abs(tried / got[:, None] - 1), axis=1)
    np.testing.assert_allclose(tried[np.arange(3), at], got, rtol=TOL["scale_f32"])
    chosen = error[np.arange(3), at]
    np.testing.assert_allclose(chosen, error.min(1), rtol=TOL["fit_scale_mse"])
    assert np.all(chosen <= error[:, 0])


def test_fit_refuses_what_it_cannot_fit(rng):
    x = rng.normal(size=(2, 5, 64)).astype(np.float32)
    codec = FP8(dim=64, scale="head")
    np.testing.assert_array_equal(fit_scale(codec, x * 0, "mse")["scale"] > 0, True)
    np.testing.assert_array_equal(fit_scale(codec, x * 0)["scale"], 1)
    with pytest.raises(TypeError, match="no static scale"):
        fit_scale(FP8(dim=64), x)
    with pytest.raises(ValueError, match="method='max' must be one of"):
        fit_scale(codec, x, "max")
    with pytest.raises(ValueError, match=r"percentile=0\.0 must be"):
        fit_scale(codec, x, "percentile", 0.0)
    with pytest.raises(ValueError, match=r"must be \[K, n, D\] with D=128"):
        fit_scale(NVFP4(dim=128), x)
    x[1, 2, 3] = np.inf
    with pytest.raises(ValueError, match="1 samples are not finite"):
        fit_scale(codec, x)
