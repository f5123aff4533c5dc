"""Packing: exact round trips, exact sizes, the documented layout, host equal to device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from turboq.numbers import packing


def codes_of(rng, bits, shape):
    return rng.integers(0, 2**bits, size=shape, dtype=np.uint8)


@pytest.mark.parametrize("bits", range(1, 9))
def test_layout_round_trip_size_and_host_twin(bits, rng):
    codes = codes_of(rng, bits, (2, 512, 24))
    words = np.asarray(jax.jit(packing.pack, static_argnums=1)(jnp.asarray(codes), bits))
    np.testing.assert_array_equal(words[1], oracles.word_bits(codes[1], bits))
    np.testing.assert_array_equal(words, packing.pack_host(codes, bits))
    np.testing.assert_array_equal(jax.jit(packing.unpack)(jnp.asarray(words)), codes)
    np.testing.assert_array_equal(packing.unpack_host(words), codes)
    assert words.shape == (2, *packing.words_shape(512, bits, 24))
    assert words.nbytes * 8 == codes.size * bits


def test_bytes_per_token_of_the_issue():
    for bits, dim, expected in ((3, 128, 48), (3, 64, 24), (4, 128, 64), (1, 80, 10)):
        assert np.prod(packing.words_shape(256, bits, dim)) * 4 == 256 * expected


def test_hand_computed_word():
    """Token 13 of a page is j=1, r=5; code 5 = 101 sets planes 0 and 2, bit 1."""
    codes = np.zeros((256, 8), np.uint8)
    codes[13, 2] = 5
    words = packing.pack_host(codes, 3)
    assert words[0, :, 5, 2].tolist() == [2, 0, 2]
    assert words.sum() == 4


def test_pack_takes_no_bits_beyond_its_width(rng):
    codes = rng.integers(0, 256, size=(256, 8), dtype=np.uint8)
    got = packing.unpack(packing.pack(jnp.asarray(codes), 3))
    np.testing.assert_array_equal(got, codes & 7)


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("tokens", [1, 2, 255, 256, 257, 700, 768])
def test_insert_equals_packing_the_whole(bits, tokens, rng):
    """Any start, also where the touched pages are the last ones; earlier tokens stay."""
    pages, channels = 3, 8
    room = pages * packing.PAGE - tokens
    insert = jax.jit(packing.insert)
    for start in sorted({0, min(1, room), min(255, room), min(256, room), room // 2, room}):
        whole = codes_of(rng, bits, (pages * packing.PAGE, channels))
        whole[start:] = 0
        before = packing.pack_host(whole, bits)
        new = codes_of(rng, bits, (tokens, channels))
        whole[start : start + tokens] = new
        got = insert(jnp.asarray(before), jnp.asarray(new), jnp.int32(start))
        np.testing.assert_array_equal(got, packing.pack_host(whole, bits), err_msg=f"{start=}")


def test_insert_in_steps_under_vmap_with_different_starts(rng):
    codes = codes_of(rng, 3, (2, 512, 8))
    starts = np.array([0, 100], np.int32)
    insert = jax.jit(jax.vmap(packing.insert))
    words = jnp.zeros((2, *packing.words_shape(512, 3, 8)), jnp.uint32)
    expected = np.zeros_like(codes)
    at = 0
    for tokens in (250, 1, 1, 30, 1):
        new = codes[:, at : at + tokens]
        words = insert(words, jnp.asarray(new), jnp.asarray(starts + at))
        for b, s in enumerate(starts + at):
            expected[b, s : s + tokens] = new[b]
        at += tokens
    np.testing.assert_array_equal(packing.unpack(words), expected)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="tokens=300 must be a multiple of 256"):
        packing.words_shape(300, 3, 64)
    with pytest.raises(ValueError, match=r"bits=9 must be 1\.\.8"):
        packing.pack(jnp.zeros((256, 8), jnp.uint8), 9)
    with pytest.raises(ValueError, match="tokens=257 exceed the 256 slots"):
        packing.insert(jnp.zeros((1, 3, 8, 8), jnp.uint32), jnp.zeros((257, 8), jnp.uint8), 0)
