"""The packed cache: what is stored, byte for byte, however it was written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kv_cases import DIM, LAYERS, make_layer, tokens

from turboq.cache import contiguous as kv_cache
from turboq.cache.layer import TokenPolicy, uniform_layer
from turboq.codecs import PerHead, TurboQuantMSE
from turboq.errors import TurboqError
from turboq.numbers.packing import PAGE


def equal_bytes(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


@pytest.mark.parametrize("name", LAYERS)
def test_chunks_equal_one_write(rng, name):
    """One by one, in odd chunks, or at once: the same bytes (writes cross a page and the ring)."""
    layer = make_layer(name, rng)
    k, v = tokens(rng, layer, 270)
    empty = kv_cache.init(layer, batch=2, capacity=300)
    whole, _ = kv_cache.write(layer, empty, k, v)
    parts = empty
    for size in (1, 1, 250, 1, 1, 9, 1, 1, 1, 1, 1, 1, 1):
        at = int(parts.lengths[0])
        parts, _ = kv_cache.write(layer, parts, k[:, at : at + size], v[:, at : at + size])
    assert whole.lengths.tolist() == [270, 270]
    equal_bytes(parts, whole)


def test_padding_leaves_no_trace(rng):
    """A chunk of 40 with only 7 and 33 real tokens stores what unpadded sequences store."""
    layer = make_layer("per_head", rng)
    k, v = tokens(rng, layer, 250)
    more_k, more_v = tokens(rng, layer, 40)
    start, _ = kv_cache.write(
        layer, kv_cache.init(layer, batch=2, capacity=PAGE), k[:, :220], v[:, :220]
    )
    counts = jnp.array([7, 33], jnp.int32)  # the padding of both reaches past the capacity of 256
    padded, _ = kv_cache.write(layer, start, more_k, more_v, counts)
    assert padded.lengths.tolist() == [227, 253]
    for b, count in enumerate((7, 33)):
        alone, _ = kv_cache.write(layer, start, more_k[:, :count], more_v[:, :count])
        padded_b, alone_b = (
            jax.tree.map(lambda x, b=b: x[b : b + 1], c.groups) for c in (padded, alone)
        )
        equal_bytes(padded_b, alone_b)


@pytest.mark.parametrize("name", LAYERS)
def test_bytes_are_the_codecs_bytes(rng, name):
    """nbytes == capacity * bits per token / 8 + exact tokens: no padding anywhere."""
    layer = make_layer(name, rng)
    cache = kv_cache.init(layer, batch=3, capacity=512)
    exact = (
        (3 + 5 + layer.block - 1) * 2 * layer.kv_heads * DIM * 2
    )  # sinks + recent, K and V, bf16
    assert cache.nbytes == 3 * (512 * layer.bits_per_token // 8 + exact)


def test_three_bits_are_48_bytes_a_vector():
    layer = uniform_layer(
        kv_heads=1,
        k=TurboQuantMSE(dim=128, bits=3),
        v=TurboQuantMSE(dim=64, bits=3),
        policy=TokenPolicy(),
    )
    cache = kv_cache.init(layer, batch=1, capacity=PAGE)
    assert cache.groups[0].k["codes"].nbytes == 48 * PAGE
    assert cache.groups[0].v["codes"].nbytes == 24 * PAGE


def test_capacity_is_whole_pages_and_room_is_checked(rng):
    layer = make_layer("turboquant", rng)
    cache = kv_cache.init(layer, batch=2, capacity=257)
    assert cache.capacity == 2 * PAGE
    k, v = tokens(rng, layer, 500)
    cache, _ = kv_cache.write(layer, cache, k, v)
    kv_cache.check_room(cache.lengths, cache.capacity, 12)
    with pytest.raises(TurboqError, match=r"500 \+ 13 tokens do not fit .* 512"):
        kv_cache.check_room(cache.lengths, cache.capacity, 13)
    with pytest.raises(ValueError, match="capacity=0"):
        kv_cache.init(layer, batch=1, capacity=0)


def test_refuses_another_number_of_heads(rng):
    layer = make_layer("turboquant", rng)
    cache = kv_cache.init(layer, batch=1, capacity=PAGE)
    k = jnp.zeros((1, 4, 3, DIM))
    with pytest.raises(ValueError, match="kv_heads=3"):
        kv_cache.write(layer, cache, k, k)


def test_tail_holds_the_last_tokens_exactly(rng):
    """The tail that a lone query sees is the last `recent` tokens, rounded to bf16, by position."""
    layer = make_layer("mixed", rng)
    k, v = tokens(rng, layer, 9)
    cache = kv_cache.init(layer, batch=2, capacity=PAGE)
    for t in range(9):
        cache, tail = kv_cache.write(layer, cache, k[:, t : t + 1], v[:, t : t + 1])
        held = sorted(p for p in tail.positions[0].tolist() if p >= 0)
        assert held == list(range(max(0, t - 4), t + 1))
        for slot, p in enumerate(tail.positions[1].tolist()):
            if p >= 0:
                want = np.asarray(k[1, p].astype(jnp.bfloat16).astype(jnp.float32))
                np.testing.assert_array_equal(np.asarray(tail.k[1, slot]), want)


def test_a_fitted_codec_without_its_arrays_is_named():
    codec = PerHead(dim=16, bits=3)
    given = {"mean": jnp.zeros((2, 16))}
    layer = uniform_layer(kv_heads=2, k=codec, v=codec, policy=TokenPolicy(), k_arrays=given)
    cache, x = kv_cache.init(layer, batch=1, capacity=256), jnp.zeros((1, 3, 2, 16))
    says = r"K of heads \(0, 1\): codec per_head lacks codebook: give"
    with pytest.raises(ValueError, match=says):
        kv_cache.write(layer, cache, x, x)
