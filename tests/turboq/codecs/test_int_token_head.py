"""INT8 and INT4 per token and head against float32 and float64 statements of vLLM's rules."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from tolerances import TOL

from turboq.codecs import check_finite_stored
from turboq.codecs.int_token_head import Int4TokenHead, Int8TokenHead, vllm_signs
from turboq.errors import TurboqError


def test_int8_bytes_equal_the_float32_rule(rng):
    dim = 64
    codec = Int8TokenHead(dim=dim)
    x = (rng.normal(size=(400, dim)) * 10.0 ** rng.uniform(-4, 4, (400, 1))).astype(np.float32)
    x[0], x[1], x[2] = 0, 1e-9, -7.0
    x[3] = np.arange(dim) - 32 + 0.5  # absmax 31.5
    x[4] = np.r_[127.0, -127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, np.zeros(dim - 8)]  # ties, scale 1
    stored = jax.jit(codec.encode)({}, jnp.asarray(x))
    s = np.maximum(np.abs(x).max(-1, keepdims=True) / np.float32(127), np.float32(1e-6))
    codes = np.clip(np.rint(x * (np.float32(1) / s)), -128, 127).astype(np.int8)
    expected = np.concatenate([codes.view(np.uint8), s.astype("<f4").view(np.uint8)], axis=-1)
    stream = codec.to_bytes(stored)
    np.testing.assert_array_equal(stream, expected)
    assert codes[4, :8].tolist() == [127, -127, 0, 2, 2, 0, -2, -2]
    assert stream.shape[-1] == dim + 4 == codec.bits_per_vector // 8
    np.testing.assert_array_equal(codec.to_bytes(codec.from_bytes(stream)), stream)
    decoded = jax.jit(codec.decode)({}, stored)
    np.testing.assert_array_equal(decoded, codes.astype(np.float32) * s)


def twister(seed: int, count: int) -> list[int]:
    """MT19937 in plain integers (Matsumoto and Nishimura, ACM TOMACS 1998)."""
    state = [seed]
    for i in range(1, 624):
        state.append((1812433253 * (state[-1] ^ (state[-1] >> 30)) + i) & 0xFFFFFFFF)
    words = []
    while len(words) < count:
        for i in range(624):
            y = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7FFFFFFF)
            state[i] = state[(i + 397) % 624] ^ (y >> 1) ^ (0x9908B0DF if y & 1 else 0)
        for y in state:
            y ^= y >> 11
            y ^= (y << 7) & 0x9D2C5680
            y ^= (y << 15) & 0xEFC60000
            words.append(y ^ (y >> 18))
    return words[:count]


def test_signs_are_a_fair_bernoulli_of_the_twister():
    uniform = [(w & 0xFFFFFF) / 2**24 for w in twister(0x9E3779B9, 700)]
    np.testing.assert_array_equal(vllm_signs(700), [1.0 if u < 0.5 else -1.0 for u in uniform])
    # torch.manual_seed(0); torch.rand(3), as PyTorch's documentation of it prints everywhere.
    first = [(w & 0xFFFFFF) / 2**24 for w in twister(0, 3)]
    assert [round(u, 4) for u in first] == [0.4963, 0.7682, 0.0885]


def int4_rule(x: np.ndarray) -> tuple[np.ndarray, ...]:
    """(scale, -min/scale, y/scale) in float64 by the rule, y unnormalised."""
    dim = x.shape[-1]
    signs = [1.0 if w & 0xFFFFFF < 1 << 23 else -1.0 for w in twister(0x9E3779B9, dim)]
    y = (x.astype(np.float64) * signs) @ scipy.linalg.hadamard(dim)
    low, high = y.min(-1, keepdims=True), y.max(-1, keepdims=True)
    scale = np.maximum((high - low) / 15, 1e-6)
    return scale, -low / scale, y / scale


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_int4_against_the_float64_rule(dim, rng):
    codec = Int4TokenHead(dim=dim)
    x = rng.normal(size=(500, dim)) * 10.0 ** rng.uniform(-2, 3, (500, 1))
    x = x.astype(np.float32)
    x[0] = vllm_signs(dim) * 3  # one large coordinate: y = (3 D, 0, 0, ...)
    x[1] = vllm_signs(dim) * -3
    encoded = jax.jit(codec.encode)({}, jnp.asarray(x))
    stored = {k: np.asarray(v) for k, v in encoded.items()}
    scale, offset, steps = int4_rule(x)
    away = lambda v: np.sign(v) * np.floor(np.abs(v) + 0.5)  # noqa: E731
    unclear = lambda v: np.abs(np.abs(v) % 1 - 0.5) < TOL["int4_margin"]  # noqa: E731
    bits = stored["scale"].view(np.uint32)
    zero = np.clip(away(offset), 0, 15)
    clear = ~unclear(offset)
    assert np.mean(clear) > 1 - TOL["unclear_share"]
    np.testing.assert_array_equal((bits & 15)[clear], zero[clear])
    kept = (bits & ~np.uint32(15)).view(np.float32)
    np.testing.assert_allclose(kept, scale, rtol=TOL["int4_scale"])
    zero = (bits & 15).astype(np.float64)  # the codes follow from the zero point that was stored
    codes = np.clip(away(steps + zero), 0, 15)
    clear = ~unclear(steps + zero)
    assert np.mean(clear) > 1 - TOL["unclear_share"]
    np.testing.assert_array_equal(stored["codes"][clear], codes[clear])
    back = (stored["codes"] - zero) * kept.astype(np.float64)
    signs = vllm_signs(dim)
    expected = (back @ scipy.linalg.hadamard(dim)) * signs / dim
    decoded = jax.jit(codec.decode)({}, encoded)
    size = np.abs(expected).max(-1, keepdims=True)
    assert np.max(np.abs(decoded - expected) / size) < TOL["decode_f32"]
    # A vector along one row: every y on one side of zero or zero, so nothing is lost there.
    np.testing.assert_allclose(decoded[0], x[0], rtol=TOL["int4_scale"])
    stream = codec.to_bytes(encoded)
    nibbles = stored["codes"][:, ::2] | stored["codes"][:, 1::2] << 4
    np.testing.assert_array_equal(stream[:, : dim // 2], nibbles)
    np.testing.assert_array_equal(stream[:, dim // 2 :], stored["scale"].view(np.uint8))
    assert stream.shape[-1] == dim // 2 + 4 == codec.bits_per_vector // 8
    again = codec.from_bytes(stream)
    np.testing.assert_array_equal(codec.to_bytes(again), stream)


def test_int4_loses_what_lies_on_one_side_of_zero():
    """All y in 10..11: the zero point clips at 0, the codes at 15."""
    dim = 64
    y = np.linspace(10, 11, dim)
    x = (scipy.linalg.hadamard(dim) @ y) / dim * vllm_signs(dim)
    codec = Int4TokenHead(dim=dim)
    stored = jax.jit(codec.encode)({}, jnp.asarray(x[None], jnp.float32))
    assert int(stored["scale"].view(jnp.uint32)[0, 0]) & 15 == 0
    np.testing.assert_array_equal(stored["codes"], 15)
    back = scipy.linalg.hadamard(dim) @ (
        np.asarray(jax.jit(codec.decode)({}, stored))[0] * vllm_signs(dim)
    )
    np.testing.assert_allclose(back, 1.0, rtol=TOL["int4_scale"])


def test_int4_ties_and_hidden_zero_points():
    """Scale 1 exactly: halves go away from zero, in the zero point and in the codes."""
    codec = Int4TokenHead(dim=64)
    y = np.zeros((2, 64), np.float32)
    y[0, :8] = [-7, 8, -6.5, -5.5, -0.5, 0.5, 1.5, 7.5]  # z = 7
    y[1, :4] = [-6.5, 8.5, -6, 0]  # -min / s = 6.5: z = 7
    stored = jax.jit(codec.quantize)({}, jnp.asarray(y / 8))  # 8 = sqrt(D)
    codes = np.asarray(stored["codes"])
    assert codes[0, :8].tolist() == [0, 15, 1, 2, 7, 8, 9, 15]
    assert codes[1, :4].tolist() == [1, 15, 1, 7]
    np.testing.assert_array_equal(stored["scale"], 1 + 7 * 2.0**-23)
    back = jax.jit(codec.dequantize)({}, stored)
    np.testing.assert_array_equal(np.asarray(back) * 8, codes.astype(np.float32) - 7)


@pytest.mark.parametrize("codec", [Int8TokenHead(dim=64), Int4TokenHead(dim=64)])
def test_zero_and_bad_vectors(codec):
    x = np.zeros((3, 64), np.float32)
    x[1] = -0.0
    encode = jax.jit(codec.encode)
    stored = encode({}, jnp.asarray(x))
    check_finite_stored(stored)
    np.testing.assert_array_equal(jax.jit(codec.decode)({}, stored), 0)
    for bad in (np.nan, np.inf, -np.inf):
        x[2, 3] = bad
        with pytest.raises(TurboqError, match="1 of 3 entries of 'scale'"):
            check_finite_stored(encode({}, jnp.asarray(x)))


def test_bits_per_channel():
    for dim, four in ((64, 4.5), (128, 4.25), (256, 4.125)):
        assert Int4TokenHead(dim=dim).bits_per_channel == four
        assert Int8TokenHead(dim=dim).bits_per_channel == four + 4
    with pytest.raises(ValueError, match=r"expected uint8 \[..., 36\]"):
        Int4TokenHead(dim=64).from_bytes(np.zeros((2, 35), np.uint8))
