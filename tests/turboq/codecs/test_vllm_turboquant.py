"""vLLM's TurboQuant presets against float64 statements of the rule, in bytes and in values."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from tolerances import TOL

from turboq.codecs import check_finite_stored
from turboq.codecs.fp8 import FP8
from turboq.codecs.vllm_turboquant import (
    PRESETS,
    VLLMTurboQuantKey,
    VLLMTurboQuantValue,
    boundary_layers,
    centroids,
    preset,
    slot_bytes,
    slot_from_bytes,
    slot_to_bytes,
)
from turboq.errors import TurboqError
from turboq.numbers import codebook

SLOTS = {  # bytes by the engine's own arithmetic: k8v4, 4bit, k3v4, 3bit
    64: (100, 70, 62, 54),
    96: (148, 102, 90, 78),
    128: (196, 134, 118, 102),
    192: (292, 198, 174, 150),
    256: (388, 262, 230, 198),
}


@pytest.mark.parametrize("dim", SLOTS)
def test_slot_bytes(dim):
    assert tuple(slot_bytes(name, dim) for name in PRESETS) == SLOTS[dim]
    for name in PRESETS:
        k, v = preset(name, dim)
        assert (k.bits_per_vector + v.bits_per_vector) // 8 == slot_bytes(name, dim)


def lloyd(dim: int, bits: int) -> list[float]:
    """The engine's iteration in plain Python floats, 200-point trapezoid sums."""
    sigma = 1 / math.sqrt(dim)

    def density(x):
        return math.exp(-x * x * dim / 2) * math.sqrt(dim / (2 * math.pi))

    def integral(f, a, b):
        step = (b - a) / 200
        return (f(a) / 2 + f(b) / 2 + sum(f(a + i * step) for i in range(1, 200))) * step

    count, low, high = 2**bits, -3.5 * sigma, 3.5 * sigma
    c = [low + (high - low) * (i + 0.5) / count for i in range(count)]
    for _ in range(200):
        edges = [3 * low, *((a + b) / 2 for a, b in itertools.pairwise(c)), 3 * high]
        new = [
            integral(lambda x: x * density(x), a, b) / integral(density, a, b)
            for a, b in itertools.pairwise(edges)
        ]
        if max(abs(a - b) for a, b in zip(new, c, strict=True)) < 1e-10:
            break
        c = new
    return c


@pytest.mark.parametrize(("dim", "bits"), [(64, 3), (128, 4)])
def test_centroids_equal_the_original_iteration(dim, bits):
    """Float64 sums in another order: the same float32 up to its last place."""
    expected = np.array(lloyd(dim, bits))
    np.testing.assert_allclose(centroids(dim, bits), expected, rtol=TOL["hand_f32"], atol=1e-9)
    # It is a Lloyd-Max codebook of the Gaussian up to the trapezoid's error.
    exact = codebook.lloyd_max("gaussian", bits) / np.sqrt(dim)
    np.testing.assert_allclose(expected, exact, rtol=TOL["vllm_trapezoid"])


def data(dim: int, rng: np.random.Generator) -> np.ndarray:
    x = rng.normal(size=(300, dim)) * 10.0 ** rng.uniform(-3, 2, (300, 1)) + rng.normal(size=dim)
    x = x.astype(np.float32)
    x[0], x[1], x[2] = 0, 2.5, -1e-3
    x[3] = np.arange(dim) % 16  # quantises exactly and hits ties at other scales
    x[4, 5] = 40
    return x


@pytest.mark.parametrize(("dim", "bits"), [(64, 3), (128, 4), (256, 3)])
def test_keys_against_the_float64_rule(dim, bits, rng):
    codec = VLLMTurboQuantKey(dim=dim, bits=bits)
    x = data(dim, rng)
    stored = {k: np.asarray(v) for k, v in jax.jit(codec.encode)({}, jnp.asarray(x)).items()}
    table = centroids(dim, bits).astype(np.float64)
    norm = np.sqrt(np.sum(x.astype(np.float64) ** 2, -1, keepdims=True))
    y = x / (norm + 1e-8) @ scipy.linalg.hadamard(dim) / np.sqrt(dim)
    middles = (table[1:] + table[:-1]) / 2
    codes = np.searchsorted(middles, y, side="right")
    clear = np.abs(y[..., None] - middles).min(-1) > TOL["code_margin"] / np.sqrt(dim)
    assert np.mean(clear[5:]) > 1 - TOL["unclear_share"]
    np.testing.assert_array_equal(stored["codes"][clear], codes[clear])
    np.testing.assert_allclose(stored["norm"].astype(np.float64), norm, rtol=TOL["stored_float16"])
    c = table[stored["codes"]]
    back = c / np.sqrt(np.sum(c * c, -1, keepdims=True) + 1e-16) * stored["norm"].astype(float)
    expected = back @ scipy.linalg.hadamard(dim) / np.sqrt(dim)
    decoded = np.asarray(jax.jit(codec.decode)({}, stored), np.float64)
    size = np.abs(expected).max(-1, keepdims=True) + 1e-30
    assert np.max(np.abs(decoded - expected) / size) < TOL["decode_f32"]
    # Renormalised: the length is the stored float16 one.
    length = np.linalg.norm(decoded, axis=-1)
    np.testing.assert_allclose(length, stored["norm"][:, 0].astype(float), rtol=TOL["unit_f32"])


@pytest.mark.parametrize("bits", [3, 4])
def test_a_key_on_a_midpoint_takes_the_right_code(bits):
    table = centroids(64, bits)
    middles = (table[1:] + table[:-1]) / np.float32(2)
    below = np.nextafter(middles, np.float32(-1))
    below[np.abs(middles) < 1e-6] = -1e-6  # the middle is zero: below it is subnormal
    y = np.stack([middles, below])
    codec = VLLMTurboQuantKey(dim=64, bits=bits)
    codes = np.asarray(codec.quantize({}, jnp.asarray(y))["codes"])
    np.testing.assert_array_equal(codes[0], np.arange(1, 2**bits))
    np.testing.assert_array_equal(codes[1], np.arange(2**bits - 1))


@pytest.mark.parametrize(("dim", "bits"), [(64, 3), (128, 4)])
def test_values_equal_the_float32_rule(dim, bits, rng):
    """Codes from the unrounded float32 scale, exactly; scale and minimum in float16 only after."""
    codec = VLLMTurboQuantValue(dim=dim, bits=bits)
    x = data(dim, rng)
    stored = {k: np.asarray(v) for k, v in jax.jit(codec.encode)({}, jnp.asarray(x)).items()}
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    scale = np.maximum((high - low) / np.float32(2**bits - 1), np.float32(1e-8))
    codes = np.clip(((x - low) / scale + np.float32(0.5)).astype(np.int32), 0, 2**bits - 1)
    np.testing.assert_array_equal(stored["codes"], codes)
    np.testing.assert_array_equal(stored["scale"], scale.astype(np.float16))
    np.testing.assert_array_equal(stored["minimum"], low.astype(np.float16))
    rounded = scale.astype(np.float16).astype(np.float32)
    wrong = np.clip(np.floor((x[5:] - low[5:]) / rounded[5:] + 0.5), 0, 2**bits - 1)
    assert np.any(wrong != codes[5:])  # the rounded scale would give other codes
    expected = codes * scale.astype(np.float16).astype(float) + low.astype(np.float16).astype(float)
    decoded = jax.jit(codec.decode)({}, stored)
    size = np.abs(expected).max(-1, keepdims=True) + 1e-30
    assert np.max(np.abs(decoded - expected) / size) < TOL["hand_f32"]


def stream(codes: np.ndarray, bits: int) -> list[int]:
    """One vector's codes as one little-endian integer, in bytes."""
    number = sum(int(c) << (bits * i) for i, c in enumerate(codes))
    return list(number.to_bytes(math.ceil(len(codes) * bits / 8), "little"))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("dim", [8, 64])
def test_slots(name, dim, rng):
    k_codec, v_codec = preset(name, dim)
    x, z = rng.normal(size=(2, 3, 5, dim)).astype(np.float32)  # [3, 5, D] each
    k = jax.jit(k_codec.encode)({}, jnp.asarray(x))
    v = jax.jit(v_codec.encode)({}, jnp.asarray(z))
    slots = slot_to_bytes(name, dim, k, v)
    assert slots.shape == (3, 5, slot_bytes(name, dim))
    assert slots.dtype == np.uint8
    half = lambda a, at: list(np.asarray(a)[at].astype("<f2").tobytes())  # noqa: E731
    for at in np.ndindex(3, 5):
        if isinstance(k_codec, FP8):
            expected = list(np.asarray(k["codes"])[at])
        else:
            expected = stream(k["codes"][at], k_codec.bits) + half(k["norm"], at)
        expected += stream(v["codes"][at], v_codec.bits)
        expected += half(v["scale"], at) + half(v["minimum"], at)
        expected += [0] * (len(expected) % 2)
        assert slots[at].tolist() == expected
    for stored, back in zip((k, v), slot_from_bytes(name, dim, slots), strict=True):
        assert stored.keys() == back.keys()
        for field in stored:
            assert stored[field].dtype == back[field].dtype
            np.testing.assert_array_equal(stored[field], back[field])


def test_odd_slots_are_padded():
    assert slot_bytes("turboquant_k3v4_nc", 8) == 14  # 3 + 2 + 4 + 4 = 13


def test_bits_per_channel():
    for dim, key, value in ((64, 4.25, 4.5), (128, 4.125, 4.25), (256, 4.0625, 4.125)):
        assert VLLMTurboQuantKey(dim=dim, bits=4).bits_per_channel == key
        assert VLLMTurboQuantKey(dim=dim, bits=3).bits_per_channel == key - 1
        assert VLLMTurboQuantValue(dim=dim, bits=4).bits_per_channel == value
        assert VLLMTurboQuantValue(dim=dim, bits=3).bits_per_channel == value - 1


def test_boundary_layers():
    assert boundary_layers(30) == [0, 1, 28, 29]
    assert boundary_layers(5) == [0, 1, 3, 4]
    assert boundary_layers(4) == [0, 1, 2, 3]
    assert boundary_layers(3) == [0, 2]
    assert boundary_layers(1) == []
    assert boundary_layers(0) == []
    assert boundary_layers(30, 0) == []
    assert boundary_layers(30, 1) == [0, 29]
    with pytest.raises(ValueError, match="layers=-1"):
        boundary_layers(-1)


def test_refusals(rng):
    with pytest.raises(
        ValueError, match=r"preset 'turboquant_2bit' must be one of turboquant_k8v4"
    ):
        preset("turboquant_2bit", 64)
    for cls in (VLLMTurboQuantKey, VLLMTurboQuantValue):
        with pytest.raises(ValueError, match="bits=5 must be 3 or 4"):
            cls(dim=64, bits=5)
        x = rng.normal(size=(2, 64)).astype(np.float32)
        x[1, 1] = np.nan
        with pytest.raises(TurboqError, match="not finite"):
            check_finite_stored(jax.jit(cls(dim=64, bits=3).encode)({}, jnp.asarray(x)))
