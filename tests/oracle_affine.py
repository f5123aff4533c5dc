"""Asymmetric integers stated in float64 NumPy, to hold codecs against."""

import numpy as np
from tolerances import TOL


def check(y, codes, scale, minimum, bits, axis, stored="float16"):
    """codes, scale and minimum (groups along `axis` of y, kept at size 1) follow the rule.

    scale and minimum equal float64's to their stored rounding; each code is the nearest level for
    what is stored, unless float32 cannot tell.
    """
    y, scale, minimum = (np.asarray(a, np.float64) for a in (y, scale, minimum))
    low, high = y.min(axis=axis, keepdims=True), y.max(axis=axis, keepdims=True)
    size = np.maximum(np.abs(low), np.abs(high))
    rounding = TOL[f"stored_{stored}"]
    assert scale.shape == minimum.shape == low.shape
    assert np.all(np.abs(minimum - low) <= rounding * np.abs(low) + TOL["rotate_f32"] * size)
    span = (high - low) / (2**bits - 1)
    assert np.all(np.abs(scale - span) <= rounding * span + TOL["rotate_f32"] * size)
    steps = np.where(scale > 0, (y - minimum) / np.where(scale > 0, scale, 1), 0)
    clear = np.abs(steps - np.floor(steps) - 0.5) > TOL["affine_steps"]
    assert np.mean(~clear) < TOL["affine_unclear"]
    due = np.clip(np.rint(steps), 0, 2**bits - 1)
    np.testing.assert_array_equal(np.asarray(codes)[clear], due[clear])


def close(got, expected):
    """float32 against float64, relative to the largest expected value."""
    expected = np.asarray(expected, np.float64)
    atol = TOL["decode_f32"] * np.abs(expected).max()
    np.testing.assert_allclose(got, expected, atol=atol, rtol=0)
