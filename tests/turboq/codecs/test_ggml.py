"""llama.cpp's cache types: bytes against package gguf; iq4_nl against its rule, stated twice."""

from __future__ import annotations

import functools
import platform

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from tolerances import TOL

import turboq_kernels
from turboq.cache import contiguous as kv_cache
from turboq.cache.layer import TokenPolicy, uniform_layer
from turboq.cache.simulate import simulated_attention
from turboq.codecs import check_finite_stored, ggml_blocks
from turboq.codecs.ggml import KINDS, Ggml, attn_rot, mainline
from turboq.errors import TurboqError

DIM = 64
TYPES = [kind for kind in KINDS if kind != "f16"]
BITS = {"q8_0": 8.5, "q5_0": 5.5, "q5_1": 6.0, "q4_0": 4.5, "q4_1": 5.0, "iq4_nl": 4.5}


OFFSETS = ((8, 8.5), (16, 16.5), (15, 0.5), (31, 0.5))  # (steps, added before truncation)


def near_codes(rng: np.random.Generator, steps: int, offset: float) -> np.ndarray:
    """Values whose x / d + offset is one code when rounded twice and another when fused.

    Half a float32 step below code k, where a product rounded first becomes a tie and goes up.
    """
    x = np.zeros((128, 2, 32), np.float32)
    largest = rng.normal(size=(128, 2, 1)).astype(np.float32)
    largest = np.abs(largest) if offset == 0.5 else largest
    x[..., :1] = largest
    d = largest / np.float32(steps if offset == 0.5 else -steps)
    codes = np.arange(1, 31) % (steps if offset == 0.5 else 2 * steps) + 1
    below = np.nextafter(codes.astype(np.float32), np.float32(0)).astype(np.float64)
    due = (codes + below) / 2 - offset
    near = (due / (np.float32(1) / d).astype(np.float64)).astype(np.float32)
    x[..., 1:31] = np.where(np.abs(near) < np.abs(largest), near, np.float32(0))
    return x.reshape(128, DIM)


@functools.cache
def blocks() -> dict[str, np.ndarray]:
    """Vectors [n, 64] float32 of every kind the issue names, NaN-free."""
    rng = np.random.default_rng(20261122)
    normal = lambda n: rng.normal(size=(n, DIM))  # noqa: E731
    power = lambda n, low, high: 10.0 ** rng.uniform(low, high, (n, 1))  # noqa: E731
    sign = np.where(rng.random((64, DIM)) < 0.5, 1.0, -1.0)
    tie = normal(256)
    tie[:, 5], tie[:, 40] = 4.0, -4.0  # one block each
    tie[:128, 9], tie[128:, 9] = -4.0, 4.0  # and both signs in the first
    signed_zero = np.where(sign > 0, 0.0, -0.0)
    sets = {
        "random": normal(4096),
        "student": rng.standard_t(3, size=(2048, DIM)) * power(2048, -6, 3),
        "constant": np.ones((64, DIM)) * rng.normal(size=(64, 1)),
        "half grid": np.round(normal(512) * 4) / 4,  # exact .5 codes after scaling
        "float16": normal(512).astype(np.float16),
        "tie of the largest": tie,
        "zero": np.stack([np.zeros(DIM), np.full(DIM, -0.0)]),
        "signed zeros": np.concatenate([signed_zero, signed_zero + (normal(64) > 1)]),
        "one-hot": np.eye(DIM) * rng.choice([-1.0, 1.0], (DIM, 1)) * 3.7,
        "half denormal scale": normal(512) * power(512, -7, -3),
        "denormal": normal(1024) * power(1024, -38.5, -36),
        "small and denormal": normal(512) * 10.0 ** rng.uniform(-45, 3, (512, DIM)),
        "huge": normal(512) * power(512, 3, 37.5),
        "rounded twice": np.concatenate([near_codes(rng, *case) for case in OFFSETS]),
        "largest": sign * np.finfo(np.float32).max,
    }
    return {name: x.astype(np.float32) for name, x in sets.items()}


def lost() -> np.ndarray:
    """Blocks so small that 1/d overflows: the reference's codes are undefined in C."""
    rng = np.random.default_rng(5)
    tiny = rng.integers(-40, 40, size=(512, DIM)) * 2.0**-149
    return np.concatenate(
        [tiny, rng.normal(size=(512, DIM)) * 10.0 ** rng.uniform(-45, -37, (512, 1))]
    ).astype(np.float32)


def encoded(codec: Ggml, x: np.ndarray) -> tuple[dict, np.ndarray]:
    stored = jax.tree.map(np.asarray, jax.jit(codec.encode)({}, jnp.asarray(x)))
    return stored, codec.to_bytes(stored)


def decoded(codec: Ggml, stored: dict) -> np.ndarray:
    return np.asarray(jax.jit(codec.decode)({}, jax.tree.map(jnp.asarray, stored)))


def gguf_bytes(x: np.ndarray, kind: str) -> np.ndarray:
    with np.errstate(all="ignore"):  # huge blocks overflow float16, tiny ones 1/d
        quantized = gguf.quants.quantize(x, gguf.GGMLQuantizationType[kind.upper()])
    return np.ascontiguousarray(quantized).view(np.uint8).reshape(len(x), -1)


def gguf_values(data: np.ndarray, kind: str) -> np.ndarray:
    with np.errstate(all="ignore"):  # an infinite scale times code zero
        return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind.upper()])


def assert_same_floats(got: np.ndarray, expected: np.ndarray):
    """Bit for bit, signs of zero included; one NaN is like another."""
    same = (got.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(got) & np.isnan(expected))
    assert got.shape == expected.shape
    assert np.all(same), f"{np.sum(~same)} of {same.size} values differ"


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_and_values_equal_gguf(kind):
    codec, x = Ggml(dim=DIM, type=kind), np.concatenate(list(blocks().values()))
    names = np.repeat(list(blocks()), [len(v) for v in blocks().values()])
    stored, data = encoded(codec, x)
    assert data.dtype == np.uint8
    assert data.shape == (len(x), codec.nbytes)
    if kind != "iq4_nl":  # gguf cannot quantize to it
        wrong = np.any(data != gguf_bytes(x, kind), axis=-1)
        assert not wrong.any(), {str(n): int(c) for n, c in zip(*_count(names[wrong]), strict=True)}
    values = decoded(codec, stored)
    assert_same_floats(values, gguf_values(data, kind))
    back = codec.from_bytes(data)
    assert back.keys() == stored.keys() == {f.name for f in codec.fields}
    for name, found in back.items():
        assert found.dtype == stored[name].dtype
        np.testing.assert_array_equal(found.view(np.uint8), stored[name].view(np.uint8), name)


def _count(names):
    return np.unique(names, return_counts=True)


@pytest.mark.parametrize("kind", TYPES)
def test_blocks_too_small_for_a_scale_decode_to_zero(kind):
    """Where C leaves codes undefined ours are those of x86, and nothing but zero comes out."""
    x = lost()
    stored, data = encoded(Ggml(dim=DIM, type=kind), x)
    values = decoded(Ggml(dim=DIM, type=kind), stored)
    np.testing.assert_array_equal(values, np.zeros_like(x))
    if kind != "iq4_nl" and platform.machine() in ("x86_64", "AMD64"):
        np.testing.assert_array_equal(data, gguf_bytes(x, kind))


@pytest.mark.parametrize("kind", TYPES)
def test_every_byte_pattern_decodes_as_gguf_does(kind):
    """Random bytes reach codes that no quantizer writes (q8_0's -128) and every scale."""
    codec = Ggml(dim=DIM, type=kind)
    data = np.random.default_rng(3).integers(0, 256, (2048, codec.nbytes), np.uint8)
    stored = codec.from_bytes(data)
    np.testing.assert_array_equal(codec.to_bytes(stored), data)
    got = decoded(codec, stored)
    assert_same_floats(got, gguf_values(data, kind))


def iq4_nl_float32(x: np.ndarray) -> np.ndarray:
    """quantize_row_iq4_nl_ref in NumPy: binary search, sums in order, all in float32; bytes."""
    table = np.array(gguf.quants.IQ4_NL.kvalues, np.float32)
    rows = x.reshape(-1, 32)
    m = np.take_along_axis(rows, np.abs(rows).argmax(-1)[:, None], -1)
    coded = np.abs(m) >= np.float32(1e-15)
    inverse = np.float32(1) / (np.where(coded, m, np.float32(1)) / table[0])
    scaled = np.where(coded, rows * inverse, np.float32(0))
    low, high = np.zeros(rows.shape, int), np.full(rows.shape, 15)
    for _ in range(4):
        middle = (low + high) // 2
        down, more = scaled < table[middle], high - low > 1
        low, high = np.where(more & ~down, middle, low), np.where(more & down, middle, high)
    nearer = scaled - table[high - 1] < table[high] - scaled
    codes = np.where(nearer, high - 1, high)
    codes = np.where(scaled <= table[0], 0, np.where(scaled >= table[15], 15, codes))
    top, bottom = np.zeros((2, len(rows)), np.float32)
    for j in range(32):
        value, entry = rows[:, j], table[codes[:, j]]
        top = top + value * value * entry * value
        bottom = bottom + value * value * entry * entry
    scale = np.where(coded[:, 0], top / np.where(coded[:, 0], bottom, np.float32(1)), 0)
    nibbles = (codes[:, :16] | (codes[:, 16:] << 4)).astype(np.uint8)
    data = np.concatenate([scale.astype(np.float16)[:, None].view(np.uint8), nibbles], axis=-1)
    return data.reshape(len(x), -1)


def test_iq4_nl_equals_its_rule_in_float32():
    """Bytes, wherever cubes stay inside float32; the codes of zero blocks are our choice."""
    names = [n for n in blocks() if "denormal" not in n and n not in ("huge", "largest")]
    x = np.concatenate([blocks()[name] for name in names])
    more = np.random.default_rng(8).normal(size=(20000, DIM)).astype(np.float32)
    exact_tie = np.zeros((16, DIM), np.float32)
    exact_tie[:, ::32] = -127.0  # d is one: then every midpoint of two values is a tie
    v = np.array(gguf.quants.IQ4_NL.kvalues, np.float32)
    exact_tie[:, 1:16] = (v[1:] + v[:-1]) / 2
    x = np.concatenate([x, exact_tie, more])
    np.testing.assert_array_equal(encoded(Ggml(dim=DIM, type="iq4_nl"), x)[1], iq4_nl_float32(x))


def test_iq4_nl_equals_an_exhaustive_float64_search():
    """Codes where two values are not equally near, the scale within one float16 rounding."""
    x = np.concatenate([v[:200] for n, v in blocks().items()])
    stored, _ = encoded(Ggml(dim=DIM, type="iq4_nl"), x)
    wide = x.astype(np.float64).reshape(-1, 32)
    largest = np.take_along_axis(wide, np.abs(wide).argmax(-1)[:, None], -1)
    table = np.array(gguf.quants.IQ4_NL.kvalues, np.float64)
    coded = np.abs(largest[:, 0]) >= 1e-15
    wide, largest = wide[coded], largest[coded]
    distance = np.abs((wide * table[0] / largest)[..., None] - table)
    near = np.sort(distance, axis=-1)
    clear = near[..., 1] - near[..., 0] > TOL["iq4_nl_midpoint"]
    got = stored["codes"].reshape(-1, 32)[coded]
    assert np.mean(clear) > 0.9
    np.testing.assert_array_equal(got[clear], distance.argmin(-1)[clear])
    values, unit = table[got], wide / largest
    scale = np.sum(unit**3 * values, -1) / np.sum(unit**2 * values**2, -1) * largest[:, 0]
    found = stored["scale"].reshape(-1)[coded]
    with np.errstate(over="ignore"):
        due = scale.astype(np.float16)
    assert np.mean(found == due) > TOL["iq4_nl_equal_scales"]
    finite = np.isfinite(due) & np.isfinite(found)
    apart = np.abs(found[finite].view(np.int16).astype(int) - due[finite].view(np.int16))
    assert apart.max() <= 1
    assert np.all(np.abs(scale[~finite]) > 65000)


@pytest.mark.parametrize("rotation", ["identity", "walsh", "hadamard"])
@pytest.mark.parametrize(("kind", "dim", "block"), [("q4_0", 192, 64), ("q8_0", 128, 0)])
def test_rotation_comes_before_the_blocks(rotation, kind, dim, block):
    """Rotated channels are what gguf quantizes, runs of `block` rotate alone, and back again."""
    codec = Ggml(dim=dim, type=kind, rotation=rotation, rotation_block=block, seed=3)
    x = np.random.default_rng(1).normal(size=(64, dim)).astype(np.float32)
    turned = np.asarray(jax.jit(codec.forward)({}, jnp.asarray(x)))
    size = block or dim
    matrix = oracles.rotation(rotation, size, 3)
    expected = (x.reshape(64, -1, size).astype(np.float64) @ matrix.T).reshape(x.shape)
    np.testing.assert_allclose(turned, expected, atol=TOL["rotate_f32"], rtol=0)
    stored, data = encoded(Ggml(dim=dim, type=kind), turned)
    np.testing.assert_array_equal(data, gguf_bytes(turned, kind))
    # Compiled together, rotation may round otherwise and flip a code at a threshold.
    assert np.mean(encoded(codec, x)[1] == data) > 1 - TOL["unclear_share"]
    got = decoded(codec, stored)
    values = gguf_values(data, kind).reshape(64, -1, size).astype(np.float64)
    back = (values @ matrix).reshape(x.shape)
    np.testing.assert_allclose(got, back, atol=TOL["rotate_f32"], rtol=0)


@pytest.mark.parametrize(
    ("dim", "k", "v"),
    [(64, 64, 64), (128, 128, 64), (192, 64, 64), (256, 256, 64), (576, 64, 64), (320, 64, 64)],
)
def test_mainline_rotates_quantized_caches(dim, k, v):
    assert attn_rot(dim, "k") == {"rotation": "walsh", "rotation_block": k}
    assert attn_rot(dim, "v") == {"rotation": "walsh", "rotation_block": v}
    assert mainline(dim, "k", "q4_0") == Ggml(
        dim=dim, type="q4_0", rotation="walsh", rotation_block=k
    )
    assert mainline(dim, "v", "f16") == Ggml(dim=dim, type="f16")


@pytest.mark.parametrize("dim", [80, 96, 32])
def test_mainline_leaves_other_head_dims_alone(dim):
    for side in ("k", "v"):
        assert attn_rot(dim, side) == {"rotation": "identity", "rotation_block": 0}
    with pytest.raises(ValueError, match="side='kv' must be one of k, v"):
        attn_rot(128, "kv")


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_bits_are_those_of_ggml(dim):
    for kind, bits in (BITS | {"f16": 16.0}).items():
        codec = Ggml(dim=dim, type=kind)
        assert codec.bits_per_channel == bits
        assert codec.nbytes * 8 == codec.bits_per_vector
        size, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
        assert codec.nbytes == dim // size * nbytes


def test_an_outlier_channel_costs_less_after_rotation():
    """Why the unrotated q4_0 is an unfair baseline: one channel sets the step of 32."""
    x = np.random.default_rng(2).normal(size=(256, 128)).astype(np.float32)
    x[:, 7] *= 30
    errors = []
    for codec in (Ggml(dim=128, type="q4_0"), mainline(128, "k", "q4_0")):
        got = jax.jit(lambda x, c=codec: c.decode({}, c.encode({}, x)))(jnp.asarray(x))
        errors.append(np.mean((np.asarray(got) - x) ** 2))
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("kind", KINDS)
def test_what_float16_cannot_hold_is_reported(kind):
    encode = jax.jit(functools.partial(Ggml(dim=DIM, type=kind).encode, {}))
    for bad in (1e8, np.nan):
        x = np.ones((2, DIM), np.float32)
        check_finite_stored(encode(jnp.asarray(x)))
        x[1, 3] = bad
        with pytest.raises(TurboqError, match="not finite"):
            check_finite_stored(encode(jnp.asarray(x)))


def test_packed_cache_equals_simulation(rng):
    """Codes, scales and minima survive packing: prefill and two tokens, mixed K and V types."""
    k_codec, v_codec = mainline(DIM, "k", "q8_0"), mainline(DIM, "v", "q4_1")
    layer = uniform_layer(kv_heads=2, k=k_codec, v=v_codec, policy=TokenPolicy(recent=3))
    k, v = jnp.asarray(rng.normal(size=(2, 1, 42, 2, DIM)), jnp.float32)
    q = jnp.asarray(rng.normal(size=(1, 42, 4, DIM)), jnp.float32)
    cache, outs = kv_cache.init(layer, batch=1, capacity=256), []
    for part in (slice(0, 40), slice(40, 41), slice(41, 42)):
        positions = jnp.arange(part.start, part.stop, dtype=jnp.int32)[None]
        cache, tail = kv_cache.write(layer, cache, k[:, part], v[:, part])
        out = turboq_kernels.cache_attention(
            q[:, part], layer, cache, tail, q_positions=positions, scale=0.125
        )
        outs.append(np.asarray(out))
    due = simulated_attention(layer, q, k, v, scale=0.125)
    np.testing.assert_allclose(np.concatenate(outs, 1), due, atol=TOL["packed_attention"], rtol=0)


def test_bad_choices_are_refused():
    with pytest.raises(ValueError, match="type='q6_0' must be one of f16, q8_0"):
        Ggml(dim=64, type="q6_0")
    with pytest.raises(ValueError, match="dim=80 must be a multiple of 32, a block of q4_0"):
        Ggml(dim=80, type="q4_0")
    assert Ggml(dim=80, type="f16").nbytes == 160
    with pytest.raises(ValueError, match=r"must be uint8 \[..., 36\] for q4_0 at dim=64"):
        Ggml(dim=64, type="q4_0").from_bytes(np.zeros((3, 34), np.uint8))
    assert gguf.quants.IQ4_NL.kvalues == ggml_blocks.IQ4_NL
