"""Inputs that break implementations which are right on Gaussian vectors."""

from __future__ import annotations

import numpy as np

from turboq.conformance.adapters import SKETCHES
from turboq.conformance.sample import Sample, squared
from turboq.conformance.verdict import Verdict, judge, not_claimed
from turboq.numbers.rotation import hadamard_matrix

# A vector's error depends on where its coordinates fall in their cells: a one-hot vector under a
# Hadamard has all of them at 1, 2.3 times the mean error at 2 bits; (h/2)^2 is 3 times h^2/12.
# A sketch adds the luck of one vector, which is not averaged over directions.
FACTOR, SKETCH_FACTOR = 4.0, 6.0
MEAN = 10.0  # of the offset, in standard deviations of what varies
BEYOND = 1e-30, 1e30  # past what float16 scales hold: may round to zero, may overflow visibly


def check_zero(sample: Sample) -> Verdict:
    """0 and -0 decode to the same, and to 0 where the norm is stored."""
    zero = np.zeros_like(sample.x)
    plus, minus = sample.round_trip(zero), sample.round_trip(-zero)
    why = f"|decoded 0| <= {np.max(np.abs(plus)):.3g}"
    if not (np.all(np.isfinite(plus)) and np.all(np.isfinite(minus))):
        return judge("zero", False, why, "zero does not decode to finite numbers")
    if not np.array_equal(plus, minus):
        return judge("zero", False, why, "-0.0 decodes otherwise than 0.0")
    ok = not np.any(plus) or not sample.adapter.claims.scale_free
    return judge("zero", ok, why, "zero does not decode to zero")


def check_one_hot(sample: Sample) -> Verdict:
    """Vectors along one axis, each axis in turn, of norm sqrt(D)."""
    dim = sample.adapter.dim
    eye = np.resize(np.eye(dim, dtype=np.float32), sample.x.shape) * np.float32(np.sqrt(dim))
    return _against_random("one_hot", sample, eye, "a spike is lost", each=1)


def check_mean(sample: Sample) -> Verdict:
    """The same large offset in every channel, as keys with a bias have it."""
    x = sample.x + np.float32(MEAN)
    return _against_random("mean", sample, x, "a constant mean lands in one rotated coordinate")


def check_walsh(sample: Sample) -> Verdict:
    """Offsets along every row of H: a Hadamard without signs maps each to one coordinate."""
    dim = sample.adapter.dim
    each = max(1, sample.vectors // dim)
    rows = hadamard_matrix(dim) * np.sqrt(dim) * MEAN
    offset = np.repeat(rows, each, axis=0)
    offset = np.resize(offset, sample.x.shape)
    x = (sample.x + offset).astype(np.float32)
    hint = "a mean along a Walsh row lands in one rotated coordinate: no random signs"
    return _against_random("walsh", sample, x, hint, each=each)


def _against_random(check: str, sample: Sample, x: np.ndarray, hint: str, each: int = 0) -> Verdict:
    """Relative error of the worst run of `each` vectors (0: of all) against Gaussian vectors."""
    wrong, power = squared(x - sample.round_trip(x)), squared(x)
    if each:
        count = x.shape[0] // each * each
        wrong, power = (v[:count].reshape(-1, each).sum(axis=1) for v in (wrong, power))
        worst = float(np.max(wrong / power))
    else:
        worst = float(wrong.sum() / power.sum())
    base = sample.error[0]
    why = f"error {worst:.4g}, {worst / base if base else 0:.1f} times that of Gaussian vectors"
    if not np.isfinite(worst):
        return judge(check, False, why, "not finite")
    if not (sample.adapter.claims.direction_free and sample.adapter.claims.scale_free):
        return not_claimed(check, f"{why}; not claimed to be free of direction and norm")
    factor = SKETCH_FACTOR if sample.adapter.claims.scale_rule in SKETCHES else FACTOR
    return judge(check, worst <= factor * base + 1e-12, why, hint)


def check_scale(sample: Sample) -> Verdict:
    """Norms 1000 times larger and smaller change nothing; far ones may vanish or overflow openly.

    What must not be: a finite vector that is not near the input, nor a NaN from a small one.
    """
    if not sample.adapter.claims.scale_free:
        return not_claimed("scale", "static scale: norms are bounded by calibration")
    worst = max(_relative(sample, s)[0] for s in (1e-3, 1e3))
    why = f"error {worst:.4g} at norms 1e-3 and 1e3"
    if not worst <= FACTOR * sample.error[0] + 1e-6:
        return judge("scale", False, why, "the error depends on the norm")
    small, _ = _relative(sample, BEYOND[0])
    if not small <= 1 + 1e-6:
        return judge("scale", False, f"error {small:.4g} at 1e-30", "tiny vectors become garbage")
    _, huge = _relative(sample, BEYOND[1])
    if np.any(np.isfinite(huge) & (huge > FACTOR**2 * sample.error[0] + 1e-6)):
        return judge("scale", False, why, "vectors of 1e30 are silently clamped")
    return judge("scale", True, f"{why}; 1e-30 and 1e30 are right, zero or visibly not finite")


def _relative(sample: Sample, factor: float) -> tuple[float, np.ndarray]:
    """(relative error over all, per vector) at another norm; scaled back in float64 first."""
    x = (sample.x * np.float32(factor)).astype(np.float32)
    with np.errstate(all="ignore"):
        wrong = squared((x.astype(np.float64) - sample.round_trip(x)) / factor)
        power = squared(x.astype(np.float64) / factor)
        return float(wrong.sum() / power.sum()), wrong / power


def check_nan(sample: Sample) -> Verdict:
    """One NaN, a vector of NaN, one Inf: refused, or the decoded vector shows it; never finite."""
    for what, at, bad in (
        ("a NaN", 5, np.nan),
        ("all NaN", slice(None), np.nan),
        ("an Inf", 5, np.inf),
    ):
        x = sample.x.copy()
        x[3, at] = bad
        try:
            decoded = sample.round_trip(x)
        except (ValueError, FloatingPointError):
            continue  # refused
        if np.all(np.isfinite(decoded[3])):
            why = f"a vector with {what} decodes to finite numbers"
            if not sample.adapter.claims.nan_visible:
                return not_claimed("nan", f"{why}; inputs must be checked before, as documented")
            return judge("nan", False, why)
    return judge("nan", True, "NaN and Inf are refused or visible")
