"""Trellis-coded quantization against exhaustive path search, published figures and its rules."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimised import optimised
from tolerances import TOL

from turboq.codecs.tcq import TCQ
from turboq.numbers import distortion, trellis, trellis_fit

# Gaussian SNR in dB: long sequences, and 128 coordinates with a free start state.
LONG = {(8, 2): 10.714, (8, 3): 16.361, (256, 2): 11.048, (256, 3): 16.699}
SHORT = {(8, 2): 10.776, (8, 3): 16.414, (256, 2): 11.229, (256, 3): 16.876}

encode = jax.jit(trellis.encode, static_argnums=0)
decode = jax.jit(trellis.decode, static_argnums=0)


def words(polynomial: int) -> list[int]:
    """Coefficients of x^0, x^1, ..."""
    return [int(c) for c in reversed(f"{polynomial:b}")]


def paths(states: int, length: int) -> np.ndarray:
    """All subset sequences [n, length] that the code allows, from its parity check alone.

    Wherever the window of h1 * z1 + h0 * z0 = 0 lies inside, it fixes the newest z0; the z0 before
    are free, as the start state is: no trellis, no state.
    """
    h1, h0 = (words(h) for h in trellis.POLYNOMIALS[states])
    assert h0[0] == 1
    memory = len(h0) - 1
    free = np.array(list(itertools.product((0, 1), repeat=length + memory)))
    z1, z0 = free[:, :length], np.zeros((len(free), length), int)
    z0[:, :memory] = free[:, length:]
    for n in range(memory, length):
        z0[:, n] = sum(h * z1[:, n - i] for i, h in enumerate(h1))
        z0[:, n] += sum(h * z0[:, n - i] for i, h in enumerate(h0) if i)
        z0[:, n] %= 2
    return 2 * z1 + z0


@pytest.mark.parametrize(
    ("states", "bits", "length"), [(4, 1, 12), (4, 3, 11), (8, 2, 11), (16, 4, 10)]
)
def test_viterbi_equals_exhaustive_search(states, bits, length, rng):
    """The least error over every sequence that satisfies the parity check, and as many of them."""
    points = trellis.codebook(states, bits)
    u = rng.normal(size=(60, length)) * 1.3
    subset_error = np.min((u[:, :, None, None] - points.reshape(-1, 4)) ** 2, axis=2)  # [N, D, 4]
    allowed = paths(states, length)
    assert len(np.unique(allowed, axis=0)) == states * 2**length
    errors = sum(subset_error[:, n, allowed[:, n]] for n in range(length))
    table = jnp.asarray(points, jnp.float32)
    codes, start = encode(states, table, jnp.asarray(u, jnp.float32))
    assert np.max(codes) < 2**bits
    assert np.max(start) < states
    got = np.asarray(decode(states, table, codes, start), np.float64)
    np.testing.assert_allclose(
        np.sum((got - u) ** 2, -1), errors.min(1), rtol=0, atol=TOL["path_error_f32"]
    )


@pytest.mark.parametrize("states", trellis.POLYNOMIALS)
def test_decoding_follows_the_states(states, rng):
    """The parity matrix against the state recursion, any code, and 2^(b+1) points all in use."""
    bits, length = 3, 200
    codes = rng.integers(0, 2**bits, (50, length)).astype(np.uint8)
    start = rng.integers(0, states, 50).astype(np.uint8)
    points = trellis.codebook(states, bits).astype(np.float32)
    state, columns = start.astype(np.int64), []
    for n in range(length):
        z1 = codes[:, n].astype(np.int64) & 1
        columns.append(points[4 * (codes[:, n] >> 1) + 2 * z1 + (state & 1)])
        state = trellis.step(states, state, z1)
    got = np.asarray(decode(states, jnp.asarray(points), jnp.asarray(codes), jnp.asarray(start)))
    np.testing.assert_array_equal(got, np.stack(columns, axis=1))
    assert len(np.unique(got)) == 2 ** (bits + 1)


@pytest.mark.parametrize("states", trellis.POLYNOMIALS)
def test_codes_are_good_and_every_state_is_reached(states):
    """Ungerboeck's free distances: 9 for 4 states, 10 (8), 11 (16), 16 (256) on the unit 4-PAM.

    Squared distance of subsets i, j of the integers: min(|i-j|, 4-|i-j|)^2, 16 within a subset
    (parallel branches). Least over pairs of paths that part and meet again; the code is linear in
    z, and the distance depends on the difference z xor z' only through its least value.
    """
    weight = {0: 0.0, 1: 1.0, 2: 4.0, 3: 1.0}  # least distance of labels whose xor is this
    best = np.full(states, np.inf)
    free = 16.0
    every = np.arange(states)
    best[trellis.step(states, every, np.ones_like(every))[0]] = weight[2]  # z0 = 0 from state 0
    for _ in range(40):
        grown = np.full(states, np.inf)
        for z1 in (0, 1):
            cost = best + np.array([weight[2 * z1], weight[2 * z1 + 1]])[every & 1]
            np.minimum.at(grown, trellis.step(states, every, np.full_like(every, z1)), cost)
        free = min(free, grown[0])
        grown[0] = np.inf
        best = np.minimum(best, grown)
    assert free == {4: 9, 8: 10, 16: 11, 256: 16}[states]


@pytest.mark.parametrize(("states", "bits"), LONG)
@optimised()
def test_snr_of_long_sequences(states, bits):
    """Mean over 131,072 Gaussian samples (standard error 0.015 dB) within 0.05 dB of the figure."""
    u = np.random.default_rng(17).normal(size=(64, 2048)).astype(np.float32)
    assert abs(snr(states, bits, u) - LONG[states, bits]) < TOL["tcq_snr_db"]


@pytest.mark.parametrize(("states", "bits"), SHORT)
def test_snr_of_128_coordinates(states, bits):
    """1024 vectors, standard error 0.015 dB; the free start gains what its stored bits cost."""
    u = np.random.default_rng(18).normal(size=(1024, 128)).astype(np.float32)
    assert abs(snr(states, bits, u) - SHORT[states, bits]) < TOL["tcq_snr_db"]


def snr(states: int, bits: int, u: np.ndarray) -> float:
    table = jnp.asarray(trellis.codebook(states, bits), jnp.float32)
    codes, start = encode(states, table, jnp.asarray(u))
    error = np.mean((np.asarray(decode(states, table, codes, start), np.float64) - u) ** 2)
    return -10 * np.log10(error)


@pytest.mark.parametrize("states", trellis.POLYNOMIALS)
def test_codebooks_are_fixed_points_of_their_fit(states):
    """Each point is the mean of the samples it stands for, on samples the fit has not seen."""
    for bits in range(1, 5):
        points = trellis.codebook(states, bits)
        assert points.shape == (2 ** (bits + 1),)
        assert np.all(np.diff(points) > 0)
    u = trellis_fit.samples(128, 512, seed=1)
    n, total, _ = trellis_fit.sums(states, jnp.asarray(points, jnp.float32), jnp.asarray(u))
    n, total = np.asarray(n, np.float64), np.asarray(total, np.float64)
    gap = np.abs(total / n - points) * np.sqrt(n)
    assert np.max(gap) < TOL["cell_means"]


def test_fit_is_repeatable_and_lowers_the_error():
    u = trellis_fit.samples(32, 256)
    first = trellis_fit.fit(8, 2, u, rounds=4)
    again = trellis_fit.fit(8, 2, u, rounds=4)
    np.testing.assert_array_equal(first[0], again[0])
    assert first[1] < trellis_fit.fit(8, 2, u, rounds=1)[1]


def test_batches_do_not_depend_on_their_neighbours(rng):
    """More vectors than one search step holds, and a rest that does not fill one."""
    table = jnp.asarray(trellis.codebook(256, 2), jnp.float32)
    u = jnp.asarray(rng.normal(size=(150, 16)), jnp.float32)
    codes, start = encode(256, table, u)
    for part in (slice(0, 7), slice(60, 67), slice(143, 150)):
        c, s = encode(256, table, u[part])
        np.testing.assert_array_equal(c, codes[part])
        np.testing.assert_array_equal(s, start[part])


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_stored_bits_count_the_start_state(dim):
    for states, start in ((4, 2), (8, 3), (16, 4), (256, 8)):
        codec = TCQ(dim=dim, bits=3, states=states)
        assert codec.bits_per_vector == 3 * dim + start + 16


@pytest.mark.parametrize("rule", ["raw", "unbiased"])
def test_codec_error_and_shannon(rule, rng):
    """At 3 bits and 8 states the error is below Lloyd-Max and above what the bits allow."""
    codec = TCQ(dim=128, bits=3, scale_rule=rule, scale_dtype="float32")
    x = rng.normal(size=(512, 128)).astype(np.float32) * 7
    stored = jax.jit(codec.encode)({}, jnp.asarray(x))
    got = np.asarray(jax.jit(codec.decode)({}, stored), np.float64)
    error = np.mean((got - x) ** 2) / 49
    bits, slack = codec.bits_per_vector, TOL["shannon_slack"]
    distortion.check_shannon(error * 128, bits_per_vector=bits, variances=np.ones(128), slack=slack)
    assert error < 0.8 * 0.034548
    if rule == "unbiased":
        inner = np.sum(got * x, -1) / np.sum(x.astype(np.float64) ** 2, -1)
        np.testing.assert_allclose(inner, 1, rtol=TOL["scale_f32"])


@pytest.mark.parametrize(
    ("field", "value"), [("states", 32), ("states", True), ("bits", 0), ("bits", 7)]
)
def test_bad_values_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r} must be"):
        TCQ(**({"dim": 64, "bits": 2} | {field: value}))
