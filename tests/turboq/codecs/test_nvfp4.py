"""NVFP4 against ml_dtypes' casts, bit for bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from turboq.codecs.fit_scale import fit_scale
from turboq.codecs.minifloat import E2M1
from turboq.codecs.nvfp4 import NVFP4

FP4, FP8 = ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e4m3fn


def test_e2m1_ties_go_to_even_codes():
    v = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.5, 6.0, 7.0, 1e9]
    encode, decode = jax.jit(E2M1.encode), jax.jit(E2M1.decode)
    codes = encode(jnp.asarray(v, jnp.float32))
    assert decode(codes).tolist() == [0, 1, 1, 2, 2, 4, 4, 6, 6, 6, 6]
    assert encode(jnp.asarray([-0.0, -0.2, -0.3, -9.0], jnp.float32)).tolist() == [8, 8, 9, 15]
    assert decode(jnp.arange(16, dtype=jnp.uint8)).tolist() == [
        *(0, 0.5, 1, 1.5, 2, 3, 4, 6),
        *(-0.0, -0.5, -1, -1.5, -2, -3, -4, -6),
    ]


def test_e2m1_equals_ml_dtypes(rng):
    near = np.array([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6], np.float32)
    near = np.concatenate([near, np.nextafter(near, np.float32(9)), np.nextafter(near, near * 0)])
    v = np.concatenate([near, -near, rng.uniform(-6, 6, 50_000), rng.normal(size=50_000) * 1e-3])
    v = v.astype(np.float32)
    got = jax.jit(E2M1.encode)(jnp.asarray(v))
    np.testing.assert_array_equal(got, v.astype(FP4).view(np.uint8))


def rule(x: np.ndarray, scale: np.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes, block scales, values) by the format's definition in float32 and ml_dtypes."""
    blocks = x.reshape(*x.shape[:-1], -1, 16)
    b = np.minimum(np.abs(blocks).max(-1) / (np.float32(6) * scale), np.float32(448)).astype(FP8)
    step = (b.astype(np.float32) * scale)[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        v = np.where(step == 0, np.copysign(np.float32(0), blocks), blocks / step)
    codes = np.clip(v, -6, 6).astype(FP4)
    values = (codes.astype(np.float32) * step).reshape(x.shape)
    return codes.view(np.uint8).reshape(x.shape), b.view(np.uint8), values


@pytest.mark.parametrize("dim", [64, 80, 128])
def test_codec_bytes_equal_the_rule(dim, rng):
    codec, scale = NVFP4(dim=dim), np.float32(0.0123)
    x = rng.normal(size=(400, dim)) * 10.0 ** rng.uniform(-4, 2, size=(400, 1))
    x = x.astype(np.float32)
    x[0], x[1, :16], x[2, 3], x[3] = 0, 0, -0.0, 1e6  # 1e6 saturates the block scale
    x[4] = -1e-9  # block scales round to zero
    x[5, ::2] = 1e-9
    arrays = {"scale": jnp.asarray(scale)}
    stored = jax.jit(codec.encode)(arrays, jnp.asarray(x))
    codes, blocks, values = rule(x, scale)
    np.testing.assert_array_equal(stored["block_scale"], blocks)
    np.testing.assert_array_equal(stored["codes"], codes)
    np.testing.assert_array_equal(jax.jit(codec.decode)(arrays, stored), values)
    stream = codec.to_bytes(stored)
    expected = np.concatenate([codes[:, ::2] | codes[:, 1::2] << 4, blocks], axis=-1)
    np.testing.assert_array_equal(stream, expected)
    assert stream.shape[-1] == dim // 2 + dim // 16
    assert codec.bits_per_channel == 4.5
    np.testing.assert_array_equal(codec.to_bytes(codec.from_bytes(stream)), stream)


def test_values_of_the_saturated_and_of_the_vanished():
    codec, arrays = NVFP4(dim=64), {"scale": jnp.float32(1)}
    x = jnp.stack([jnp.full(64, 1e6), jnp.full(64, -1e-4), jnp.zeros(64)])
    back = jax.jit(lambda a, x: codec.decode(a, codec.encode(a, x)))(arrays, x)
    np.testing.assert_array_equal(back[0], 448 * 6)
    np.testing.assert_array_equal(back[1:], 0)


def test_fitted_scale(rng):
    x = (rng.normal(size=(2, 50, 64)) * np.array([1e-2, 30])[:, None, None]).astype(np.float32)
    codec = NVFP4(dim=64)
    absmax = fit_scale(codec, x)["scale"]
    np.testing.assert_array_equal(absmax, (np.abs(x).max((1, 2)).astype(float) / 2688).astype("f4"))
    least = fit_scale(codec, x, "mse")["scale"]
    for head in range(2):
        errors = [
            np.mean((rule(x[head], s)[2] - x[head]) ** 2) for s in (absmax[head], least[head])
        ]
        assert errors[1] < errors[0]


def test_dim_must_hold_whole_blocks():
    with pytest.raises(ValueError, match="dim=72 must be a multiple of 16"):
        NVFP4(dim=72)
