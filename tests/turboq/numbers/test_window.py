"""Linear window codes against all bit strings, their matrix in loops, and their figures."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimised import optimised
from tolerances import TOL

from turboq.numbers import window, window_fit
from turboq.numbers.trellis_fit import samples

encode, decode = jax.jit(window.encode), jax.jit(window.decode)

# Gaussian SNR in dB of 64 coordinates, start included (experiments/LOG.md).
SNR = {(16, 2): 10.445, (16, 3): 16.167, (64, 2): 10.551, (64, 4): 21.722, (256, 3): 16.386}


def matrix(code: window.Rows, bits: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(B, c) with x_hat = B bits + c by the formula of the module, entry by entry."""
    columns, constant = [], np.zeros(len(bits))
    taps, step = np.asarray(code.taps, np.float64), np.asarray(code.step, np.float64)
    for i, count in enumerate(bits):
        own = np.zeros(len(bits))
        for t in range(i, min(i + taps.shape[1], len(bits))):
            own[t] = 2 * taps[t, t - i]
        columns.append(own)
        constant -= own / 2
        for p in range(1, count):
            line = np.zeros(len(bits))
            line[i] = step[i] * 2 ** (p - 1)
            columns.append(line)
        constant[i] -= step[i] * (2 ** (count - 1) - 1) / 2
    return np.stack(columns, axis=1), constant


def random_code(rng, bits: list[int], memory: int) -> window.Rows:
    """Any weights, not only good ones: the last coordinate is not stored."""
    taps = rng.normal(size=(len(bits), memory + 1))
    taps *= np.arange(memory + 1)[None, :] <= np.arange(len(bits))[:, None]
    last = np.array([2.0 ** (b - 1) - 1 for b in bits])
    step = rng.uniform(0.5, 2, size=len(bits))
    return window.Rows(*(jnp.asarray(a, jnp.float32) for a in (step, last, taps)))


def strings(bits: list[int]) -> np.ndarray:
    return np.array(list(itertools.product((0, 1), repeat=sum(bits))), np.float64)


def check_least(code: window.Rows, bits: list[int], rng) -> None:
    """The least error over every word there is, and codes of as many bits."""
    b, c = matrix(code, bits)
    words = strings(bits) @ b.T + c
    u = rng.normal(size=(30, len(bits))) * 2
    for weights in (np.ones(len(bits)), rng.uniform(0.2, 2, len(bits))):
        least = np.min(np.square(u[:, None] - words[None]) @ weights, axis=1)
        given = None if np.all(weights == 1) else jnp.asarray(weights, jnp.float32)
        codes = np.asarray(encode(code, jnp.asarray(u, jnp.float32), given))
        assert np.all(codes < 2 ** np.array(bits))
        got = np.asarray(decode(code, jnp.asarray(codes)), np.float64)
        error = np.square(got - u) @ weights
        tol = TOL["path_error_f32"]
        np.testing.assert_allclose(error, least, rtol=tol, atol=tol)


@pytest.mark.parametrize(
    ("bits", "memory"), [([2] * 6, 4), ([3, 3, 2, 1, 1, 1, 1], 4), ([1] * 10, 6), ([3, 1, 3, 2], 6)]
)
def test_viterbi_equals_all_bit_strings(bits, memory, rng):
    check_least(random_code(rng, bits, memory), bits, rng)


@pytest.mark.parametrize("states", [16, 64])
def test_viterbi_of_committed_weights_equals_all_bit_strings(states, rng):
    """Bits before the first coordinate must not count in the search either."""
    check_least(window.rows(states, ((2, 3), (3, 2), (1, 1))), [3, 3, 2, 2, 2, 1], rng)


@pytest.mark.parametrize("states", window.MEMORY)
def test_values_are_linear_in_the_bits(states, rng):
    segments = ((5, 8), (9, 4), (8, 2), (3, 1))
    bits = [b for width, b in segments for _ in range(width)]
    code = window.rows(states, segments)
    codes = rng.integers(0, 2 ** np.array(bits), (50, len(bits))).astype(np.uint8)
    stored = np.concatenate([codes[:, [i]] >> np.arange(b) & 1 for i, b in enumerate(bits)], axis=1)
    due_matrix, due_constant = matrix(code, bits)
    b, c = window.bit_matrix(states, segments)
    np.testing.assert_allclose(b, due_matrix, rtol=0, atol=1e-12)
    np.testing.assert_allclose(c, due_constant, rtol=0, atol=1e-12)
    got = np.asarray(decode(code, jnp.asarray(codes)))
    np.testing.assert_allclose(got, stored @ b.T + c, rtol=0, atol=TOL["path_error_f32"])


@pytest.mark.parametrize(("states", "bits"), SNR)
@optimised()
def test_snr(states, bits):
    """Mean over 4096 sequences of 64 (standard error 0.01 dB), not those of the fit."""
    u = samples(4096, 64, seed=2)
    code = window.rows(states, ((64, bits),))
    error = np.mean((np.asarray(decode(code, encode(code, jnp.asarray(u)))) - u) ** 2)
    assert abs(-10 * np.log10(error) - SNR[states, bits]) < TOL["tcq_snr_db"]


def test_coordinates_that_are_not_stored_change_nothing(rng):
    u = rng.normal(size=(20, 24)).astype(np.float32)
    u[:, 16:] = 0
    short, long = (window.rows(16, ((8, 3), (8, 1)), length) for length in (16, 24))
    codes = np.asarray(encode(long, jnp.asarray(u)))
    np.testing.assert_array_equal(codes[:, :16], encode(short, jnp.asarray(u[:, :16])))
    np.testing.assert_array_equal(decode(long, jnp.asarray(codes))[:, 16:], 0)


def test_batches_do_not_depend_on_their_neighbours(rng):
    """More vectors than one search step holds, and a rest that does not fill one."""
    code = window.rows(256, ((16, 2),))
    u = jnp.asarray(rng.normal(size=(150, 16)), jnp.float32)
    codes = encode(code, u)
    for part in (slice(0, 7), slice(60, 67), slice(143, 150)):
        np.testing.assert_array_equal(encode(code, u[part]), codes[part])


@optimised()
def test_fit_is_repeatable_and_gains_on_the_uniform_quantizer():
    u = jnp.asarray(samples(128, 64))
    first, again = (window_fit.fit(16, 2, u, starts=2) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    uniform = np.concatenate([first[:1] * 0 + 2 * window_fit.uniform_step(2), np.zeros(5)])
    uniform[1] = uniform[0] / 4
    errors = [window_fit.equations(w, 2, u)[2] for w in (first, uniform)]
    assert errors[0] < 0.85 * errors[1]


@pytest.mark.parametrize(
    ("states", "bits"), [(32, 2), (True, 2), (0, 2), (2**40, 2), (16, 0), (16, 9)]
)
def test_other_codes_are_refused_before_anything_is_built(states, bits):
    with pytest.raises(ValueError, match="must be"):
        window.rows(states, ((8, bits),))
