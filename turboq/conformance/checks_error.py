"""Closed forms: mean squared error, slope and variance of inner products, the Shannon bound."""

from __future__ import annotations

import numpy as np
from scipy import special

from turboq.conformance.adapters import SKETCHES, Adapter, codebook_bits
from turboq.conformance.sample import QUERIES, Sample, ratio, squared
from turboq.conformance.verdict import Verdict, judge, not_claimed
from turboq.errors import TurboqError
from turboq.numbers import codebook as codebooks
from turboq.numbers import distortion

ERRORS = 4.0  # standard errors: a right implementation misses one such gate in 16,000
FLOAT32_BITS = 24.0  # inputs hold no more bits per channel than this

ROUNDING = 1e-9  # D Var of float32 scores: D (8 * 6e-8)^2 at D=256 is 6e-11

# Relative room beside the noise. raw: tables of 0.5 % more and rounded scales. Others: their forms
# are limits for large D (4 / D away at most, simulated). Sketches: one fixed S against its mean.
ROOM = 0.015


def room(adapter: Adapter) -> float:
    """Relative deviation from the closed form that a right implementation may have."""
    rule, dim = adapter.claims.scale_rule, adapter.dim
    if rule in SKETCHES:
        return ROOM + 8 / dim
    return ROOM + (0 if rule in (None, "raw") else 4 / dim)


def closed_form(adapter: Adapter) -> tuple[float, float] | None:
    """(relative squared error, slope E<x, x_hat> / E|x|^2), or None where no form is claimed."""
    claims = adapter.claims
    error, slope = (None, float("nan")) if claims.scale_rule is None else _of_rule(adapter)
    error = error if claims.error is None else claims.error
    return None if error is None else (error, 1.0 if claims.unbiased else slope)


def _of_rule(adapter: Adapter) -> tuple[float, float]:
    rule, bits, dim = adapter.claims.scale_rule, codebook_bits(adapter), adapter.dim
    table = codebooks.lloyd_max("sphere", bits, dim) if bits else None
    d_b = 1.0 if table is None else codebooks.distortion("sphere", table, dim)
    if rule in SKETCHES:
        return sketch_error(rule, d_b, dim), 1.0
    slope = {"matched": np.sqrt(1 - d_b), "unbiased": 1.0}.get(rule or "", 1 - d_b)
    return distortion.rule_error(rule or "raw", d_b), float(slope)


def sketch_error(kind: str, d_b: float, dim: int) -> float:
    """E|r - a gamma S^T z|^2 = |r|^2 (a^2 E|S^T z|^2 - 1) with |r|^2 = d_b; exact for both S."""
    if kind == "gaussian_sketch":
        return d_b * (np.pi / 2 - 1 / dim)
    mean = np.exp(special.gammaln(dim / 2) - special.gammaln((dim + 1) / 2))
    return float(d_b * (np.pi / (dim * mean**2) - 1))


def check_distortion(sample: Sample) -> Verdict:
    """E|x - x_hat|^2 / E|x|^2 on Gaussian vectors equals the closed form of the claimed rule."""
    measured, noise = sample.error
    form = closed_form(sample.adapter)
    if form is None:
        why = f"error {measured:.5f}; no closed form claimed"
        if not np.isfinite(measured) or measured >= 1:
            return judge("distortion", False, why, "zeros would be nearer")
        return not_claimed("distortion", why)
    expected = form[0]
    why = f"error {measured:.5f} +- {noise:.5f}, closed form {expected:.5f}"
    ok = abs(measured - expected) <= ERRORS * noise + room(sample.adapter) * expected
    if measured > 1:
        hint = "worse than zeros, so the inverse does not undo the transform"
    elif measured > expected:
        hint = f"{100 * (measured / expected - 1):+.1f} %: codebook, scale or inverse is wrong"
    else:
        hint = "better than its rule allows: not the rule or the bits that are claimed"
    return judge("distortion", ok, why, hint)


def check_bias(sample: Sample) -> Verdict:
    """Slope of <x, x_hat> over |x|^2: 1 if unbiased, else the closed form of the rule.

    Room of 5 % of the error: one fixed sketch is off by about 0.5 % of it at D=128, while an
    estimator without its correction is off by all of it.
    """
    own = np.arange(min(QUERIES, sample.vectors))
    if hasattr(sample.adapter, "inner_product"):
        scores, powers = sample.scores[own, own], squared(sample.x[own])
    else:
        scores = np.sum(sample.x.astype(np.float64) * sample.x_hat, axis=-1)
        powers = squared(sample.x)
    slope, noise = ratio(scores, powers)
    form = closed_form(sample.adapter)
    expected = form[1] if form else (1.0 if sample.adapter.claims.unbiased else float("nan"))
    why = f"slope {slope:.4f} +- {noise:.4f}"
    if not np.isfinite(expected):
        return not_claimed("bias", f"{why}; not claimed to be unbiased")
    allowed = ERRORS * noise + 0.05 * abs(form[0] if form else sample.error[0])
    if sample.adapter.claims.scale_rule not in (None, "raw"):
        allowed += 4 / sample.adapter.dim * (form[0] if form else 0.0)
    hint = "inner products are biased: correction, sketch constant or centroids are wrong"
    return judge("bias", abs(slope - expected) <= allowed, f"{why}, expected {expected:.4f}", hint)


def check_variance(sample: Sample) -> Verdict:
    """D Var of <q, x_hat> for independent queries equals the closed form of the error."""
    form = closed_form(sample.adapter)
    queries = min(QUERIES, sample.vectors // 2)
    if sample.vectors <= queries:
        return not_claimed("variance", f"needs more than {queries} vectors")
    q = sample.x[:queries].astype(np.float64)
    true = q @ sample.x[queries:].astype(np.float64).T
    wrong = (sample.scores[:queries, queries:] - true) ** 2 / squared(q)[:, None]
    measured, noise = ratio(
        np.mean(wrong, axis=0) * sample.adapter.dim, squared(sample.x[queries:])
    )
    if form is None:
        expected, noise = sample.error[0], noise + sample.error[1]
        if not hasattr(sample.adapter, "inner_product"):
            return not_claimed("variance", f"D Var {measured:.5f}; no closed form claimed")
    else:
        expected = form[0]
    # 256 shared queries do not average out the direction of the errors fully.
    allowed = ERRORS * noise + (room(sample.adapter) + 4 / queries) * expected + ROUNDING
    what = "closed form" if form else "error of what it decodes"
    why = f"D Var {measured:.5f} +- {noise:.5f}, {what} {expected:.5f}"
    hint = "noisier or quieter than the rule: wrong sketch scale, or the sketch does nothing"
    return judge("variance", abs(measured - expected) <= allowed, why, hint)


def check_shannon(sample: Sample) -> Verdict:
    """No code of the claimed rate has a smaller error on Gaussian vectors."""
    rate, dim = sample.adapter.claims.bits_per_channel, sample.adapter.dim
    if rate >= FLOAT32_BITS:
        return not_claimed("shannon", f"{rate:g} bits hold all of a float32 input")
    measured, noise = sample.error
    if not np.isfinite(measured):
        return judge("shannon", False, f"error {measured}")
    needed = -np.log(max(measured, 1e-300)) / np.log(4)
    why = f"error {measured:.3g} needs {needed:.2f} bits per channel, {rate:.2f} claimed"
    try:
        slack = min(ERRORS * noise / measured, 0.5) if measured else 0.0
        distortion.check_shannon(
            measured * dim, bits_per_vector=rate * dim, variances=np.ones(dim), slack=slack
        )
    except TurboqError:
        return judge("shannon", False, why, "this rate cannot reach this error: miscounted bits")
    return judge("shannon", True, why)
