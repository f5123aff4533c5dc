"""KIVI against float64, its edges, and the packed cache against the simulation."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle_affine
import pytest
from tolerances import TOL

import turboq_kernels
from turboq.cache import contiguous as kv_cache
from turboq.cache.layer import TokenPolicy, uniform_layer
from turboq.cache.simulate import simulated_attention
from turboq.codecs.kivi import KiviKey, KiviValue

encode = jax.jit(lambda codec, arrays, x: codec.encode(arrays, x), static_argnums=0)
decode = jax.jit(lambda codec, arrays, stored: codec.decode(arrays, stored), static_argnums=0)


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (4, 64), (2, 128)])
def test_keys_follow_float64(bits, group, rng):
    codec = KiviKey(dim=16, bits=bits, group=group)
    x = (rng.normal(size=(2, 256, 16)) * np.geomspace(0.1, 30, 16) + 5).astype(np.float32)
    stored = encode(codec, {}, jnp.asarray(x))
    tiles = x.reshape(2, -1, group, 16)
    packed = np.asarray(stored["codes"]).reshape(tiles.shape)
    scale, low = (np.asarray(stored[n], np.float64)[:, :, None] for n in ("scale", "minimum"))
    assert scale.shape == (2, 256 // group, 1, 16)
    oracle_affine.check(tiles, packed, scale, low, bits, -2)
    oracle_affine.close(decode(codec, {}, stored), (low + scale * packed).reshape(x.shape))


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (4, 64)])
def test_values_follow_float64(bits, group, rng):
    codec = KiviValue(dim=64, bits=bits, group=group)
    x = (rng.normal(size=(40, 64)) * 3).astype(np.float32)
    stored = encode(codec, {}, jnp.asarray(x))
    split = x.reshape(40, -1, group)
    packed = np.asarray(stored["codes"]).reshape(split.shape)
    scale, low = (np.asarray(stored[n], np.float64)[..., None] for n in ("scale", "minimum"))
    oracle_affine.check(split, packed, scale, low, bits, -1)
    oracle_affine.close(decode(codec, {}, stored), (low + scale * packed).reshape(x.shape))


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_all_in_bits(dim):
    """bits + 32 / group for keys and values alike, at every head dim."""
    for bits, group, due in ((2, 32, 3.0), (2, 64, 2.5), (4, 64, 4.5)):
        assert KiviKey(dim=dim, bits=bits, group=group).bits_per_channel == due
        assert KiviValue(dim=dim, bits=bits, group=group).bits_per_channel == due
    assert KiviKey(dim=dim, bits=2, group=128).bits_per_channel == 2.25


def test_key_channels_do_not_touch_each_other(rng):
    """A huge channel costs other channels nothing; constant and zero channels are exact."""
    codec = KiviKey(dim=16, bits=2)
    x = rng.normal(size=(64, 16)).astype(np.float32)
    plain = decode(codec, {}, encode(codec, {}, jnp.asarray(x)))
    x[:, 3], x[:, 4], x[:, 5] = 0, -7.5, 0
    x[9, 5] = 1.0  # one-hot
    x[:, 6] *= 1e4
    stored = encode(codec, {}, jnp.asarray(x))
    got = np.asarray(decode(codec, {}, stored))
    np.testing.assert_array_equal(got[:, 3:5], x[:, 3:5])
    np.testing.assert_allclose(got[:, 5], x[:, 5], atol=TOL["stored_float16"])
    rest = [c for c in range(16) if c not in (3, 4, 5, 6)]
    np.testing.assert_array_equal(got[:, rest], np.asarray(plain)[:, rest])


def test_incomplete_blocks_and_bad_groups_are_refused():
    with pytest.raises(ValueError, match="tokens=33 must be a multiple of block=32"):
        KiviKey(dim=16, bits=2).encode({}, jnp.zeros((33, 16)))
    with pytest.raises(ValueError, match="group=48 must be one of"):
        KiviKey(dim=16, bits=2, group=48)


def test_cache_equals_simulation(rng):
    """Prefill, then token by token over a block's end: ring, packed blocks and sinks together."""
    layer = uniform_layer(
        kv_heads=2,
        k=KiviKey(dim=16, bits=2, group=32),
        v=KiviValue(dim=16, bits=2, group=8),
        policy=TokenPolicy(sinks=2, recent=5),
    )
    k, v = jnp.asarray(rng.normal(size=(2, 1, 75, 2, 16)), jnp.float32)
    q = jnp.asarray(rng.normal(size=(1, 75, 4, 16)), jnp.float32)
    cache, at, outs = kv_cache.init(layer, batch=1, capacity=256), 0, []
    for size in (60, *(1,) * 15):
        part = slice(at, at + size)
        positions = jnp.arange(at, at + size, dtype=jnp.int32)[None]
        cache, tail = kv_cache.write(layer, cache, k[:, part], v[:, part])
        outs.append(
            turboq_kernels.cache_attention(
                q[:, part], layer, cache, tail, q_positions=positions, scale=0.3
            )
        )
        at += size
    got = np.asarray(jnp.concatenate(outs, axis=1))
    due = np.asarray(simulated_attention(layer, q, k, v, scale=0.3))
    np.testing.assert_allclose(got, due, atol=TOL["packed_attention"])
    stored = cache.groups[0].k["scale"][0, :, :, 0]
    assert np.all(np.asarray(stored[:, :2]) > 0)  # 75 tokens, 5 recent: two blocks are packed
    assert not np.any(np.asarray(stored[:, 2:]))
