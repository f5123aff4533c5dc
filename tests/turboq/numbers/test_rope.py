"""Rotary embedding against complex multiplication in float64, and its scaling rules."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import TOL

from turboq.numbers.rope import Rope, Scaling, inverse_frequencies, rotate, unrotate

DIM, LONGEST = 16, 300
LLAMA3 = Scaling(
    type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192.0
)
ROPES = {
    "half": Rope(dim=DIM, theta=1e4),
    "interleaved": Rope(dim=DIM, theta=1e4, layout="interleaved"),
    "partial": Rope(dim=6, theta=100.0),
    "partial interleaved": Rope(dim=6, theta=100.0, layout="interleaved"),
    "linear": Rope(dim=DIM, theta=1e4, scaling=Scaling(type="linear", factor=2.5)),
    "llama3": Rope(dim=DIM, theta=5e5, scaling=dataclasses.replace(LLAMA3, original_context=64.0)),
    "given": Rope(dim=4, theta=1.0, inv_freq=(0.75, 0.0)),
}


def turned(rope: Rope, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Each pair as a complex number times exp(i angle), float64."""
    half = rope.dim // 2
    first, second = np.arange(half), np.arange(half) + half
    if rope.layout == "interleaved":
        first, second = 2 * np.arange(half), 2 * np.arange(half) + 1
    angle = np.asarray(positions, np.float64)[..., None] * inverse_frequencies(rope)
    z = (x[..., first] + 1j * x[..., second]) * np.exp(1j * angle)
    out = np.array(x, np.float64)
    out[..., first], out[..., second] = z.real, z.imag
    return out


@pytest.mark.parametrize("name", ROPES)
def test_rotation_is_complex_multiplication(rng, name):
    rope = ROPES[name]
    x = rng.standard_normal((2, 5, 3, DIM)).astype(np.float32)
    at = rng.integers(0, LONGEST, (2, 5, 1)).astype(np.int32)
    got = rotate(rope, jnp.asarray(x), jnp.asarray(at))
    np.testing.assert_allclose(got, turned(rope, x, at), atol=TOL["rope_rotate"])
    np.testing.assert_array_equal(np.asarray(got)[..., rope.dim :], x[..., rope.dim :])
    back = unrotate(rope, got, jnp.asarray(at))
    np.testing.assert_allclose(back, x, atol=TOL["rope_inverse"])
    assert np.max(np.abs(np.asarray(got) - x)) > 0.5


def test_logits_depend_on_the_distance_alone(rng):
    rope = ROPES["llama3"]
    q, k = (jnp.asarray(rng.standard_normal((7, DIM)), jnp.float32) for _ in "qk")
    at = jnp.arange(7, dtype=jnp.int32)

    def logits(shift):
        return rotate(rope, q, at + shift) @ rotate(rope, k, at + shift).T

    np.testing.assert_allclose(
        logits(jnp.int32(200)), logits(jnp.int32(0)), atol=16 * TOL["rope_rotate"]
    )


def test_llama3_frequencies_follow_the_published_rule():
    """By wavelength: short kept, long divided, and between the two a linear mix."""
    got = inverse_frequencies(Rope(theta=500000.0, dim=128, scaling=LLAMA3))
    plain = 500000.0 ** (-np.arange(64) / 64)
    expected, seen = [], set()
    for f in plain:
        wavelength = 2 * np.pi / f
        if wavelength < 8192 / 4:
            expected.append(f)
            seen.add("short")
        elif wavelength > 8192 / 1:
            expected.append(f / 8)
            seen.add("long")
        else:
            mix = (8192 / wavelength - 1) / (4 - 1)
            expected.append((1 - mix) * f / 8 + mix * f)
            seen.add("between")
    assert seen == {"short", "long", "between"}
    np.testing.assert_allclose(got, expected, rtol=TOL["rope_frequency"], atol=0)


def test_linear_and_given_frequencies():
    plain, scaled = (inverse_frequencies(ROPES[name]) for name in ("half", "linear"))
    np.testing.assert_allclose(scaled, plain / 2.5, rtol=2 * TOL["rope_frequency"], atol=0)
    np.testing.assert_array_equal(inverse_frequencies(ROPES["given"]), np.float32([0.75, 0.0]))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Rope(dim=5, theta=1e4), "rotary dim=5 must be even"),
        (lambda: Rope(dim=4, theta=0.0), "theta=0.0 must be a positive"),
        (lambda: Rope(dim=4, theta=float("nan")), "theta=nan must be a positive"),
        (lambda: Rope(dim=6, theta=1e4, inv_freq=(1.0, 0.25)), "2 frequencies does not fit dim=6"),
        (lambda: Rope(dim=2, theta=1e4, inv_freq=(-1.0,)), "inv_freq= must be finite"),
        (lambda: Scaling(type="linear", factor=-1.0), "factor=-1.0 must be"),
        (lambda: Scaling(type="llama3", factor=2.0), "low_freq_factor=None is for type 'llama3'"),
        (
            lambda: Scaling(type="linear", factor=2.0, original_context=8.0),
            "original_context=8.0 is for type 'llama3' alone",
        ),
        (lambda: dataclasses.replace(LLAMA3, low_freq_factor=4.0), "must be below"),
    ],
)
def test_wrong_descriptions_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
