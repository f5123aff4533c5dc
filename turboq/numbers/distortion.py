"""Closed forms that codecs must reach, and the Shannon bound that none may beat.

Notation: D_b is the mean squared error per unit-variance coordinate of the codebook
(`turboq.numbers.codebook.distortion`); errors are relative to |x|^2 unless said otherwise.
"""

from __future__ import annotations

import numpy as np
from scipy import special

from turboq.errors import TurboqError
from turboq.numbers.scale import RULES


def rule_error(rule: str, d_b: float) -> float:
    """E|x - x_hat|^2 / |x|^2 of a scale rule at large D (exact for raw, an upper limit for the
    least-squares rule, which adapts to each vector).

    From x_hat = (1 - D_b) x + e with e orthogonal to x and |e|^2 = D_b (1 - D_b), which the
    centroid condition gives: raw D_b, matched 2 - 2 sqrt(1 - D_b), unbiased D_b / (1 - D_b).

    Raises:
      ValueError: unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f"{rule=} must be one of {RULES}")
    return {
        "raw": d_b,
        "matched": 2 - 2 * np.sqrt(1 - d_b),
        "unbiased": d_b / (1 - d_b),
        "least_squares": d_b,
    }[rule]


def sketch_variance(
    kind: str, dim: int, *, query_norm: float, residual_norm: float, cosine: float
) -> float:
    """Variance over S of the sketch estimate of <q, r> with D x D matrices; exact at every D.

    gaussian:    [(pi/2) |q|^2 |r|^2 - <q, r>^2] / D
    orthogonal:  |q|^2 |r|^2 / A^2 * [cos^2 (B - A^2) + sin^2 (1 - 2/pi)]
                 A = E|u|_1 = D Gamma(D/2) / (sqrt(pi) Gamma((D+1)/2)),
                 B = E|u|_1^2 = 1 + 2 (D - 1) / pi,  u uniform on the sphere of R^D

    (Write q = cos r^ + sin w: the estimate is cos |u|_1 + sin <w, sign u> over A, and given u, w is
    uniform orthogonal to u, so E<w, sign u>^2 = (D - |u|_1^2) / (D - 1).) For q orthogonal to r
    and large D these are pi/2 and pi/2 - 1 times |q|^2 |r|^2 / D.

    Raises:
      ValueError: unknown kind.
    """
    power = (query_norm * residual_norm) ** 2
    if kind == "gaussian":
        return power * (np.pi / 2 - cosine**2) / dim
    if kind != "orthogonal":
        raise ValueError(f"{kind=} must be gaussian or orthogonal")
    log_ratio = special.gammaln(dim / 2) - special.gammaln((dim + 1) / 2)
    mean = dim / np.sqrt(np.pi) * np.exp(log_ratio)
    square = 1 + 2 * (dim - 1) / np.pi
    return power / mean**2 * (cosine**2 * (square - mean**2) + (1 - cosine**2) * (1 - 2 / np.pi))


def shannon_bound(bits_per_vector: int | float, variances: np.ndarray) -> float:
    """Least mean squared error per vector (sum over coordinates) of any code of a Gaussian source.

    `variances` [D] are the eigenvalues of the source's covariance. Reverse water-filling: level t
    with sum_i max(0, log2(v_i / t) / 2) = bits; D(R) = sum_i min(t, v_i). With equal variances this
    is D v 4^(-bits/D). A vector of a uniform source on the unit sphere obeys the same bound up to
    1/D in the exponent (TurboQuant, arXiv 2504.19874, Theorem 3: 4^(-bits/D)).

    Raises:
      ValueError: variances not a non-empty vector of finite non-negative numbers, or bits < 0.
    """
    v = np.sort(np.asarray(variances, np.float64).ravel())[::-1]
    if v.size == 0 or not np.all(np.isfinite(v)) or v[-1] < 0:
        raise ValueError(f"{variances=} must be finite and not negative")
    if not bits_per_vector >= 0:
        raise ValueError(f"{bits_per_vector=} must be zero or more")
    v = v[v > 0]
    if v.size == 0:
        return 0.0
    # With the k largest coordinates active: log2 t = mean(log2 v[:k]) - 2 bits / k. The true k is
    # the largest whose water level lies below its smallest active variance.
    k = np.arange(1, v.size + 1)
    level = np.cumsum(np.log2(v)) / k - 2 * bits_per_vector / k
    active = int(k[level <= np.log2(v) + 1e-12][-1])
    return float(active * 2.0 ** level[active - 1] + np.sum(v[active:]))


def check_shannon(
    mse: float, *, bits_per_vector: int | float, variances: np.ndarray, slack: int | float = 0.0
) -> float:
    """Refuses an error that no code could have; returns mse / bound (at least 1 - slack).

    `mse` is per vector (summed over coordinates); `bits_per_vector` counts every stored bit, codes
    and scales; `slack` is the relative sampling error of `mse`. Valid for sources whose Gaussian
    bound is a bound: Gaussian and sphere data. Real activations that are far from Gaussian can lie
    below it.

    Raises:
      TurboqError: mse below the bound: the measurement or the bit count is wrong.
    """
    bound = shannon_bound(bits_per_vector, variances)
    if not mse >= bound * (1 - slack):
        raise TurboqError(
            f"error {mse:.6g} at {bits_per_vector} bits per vector is below the Shannon bound"
            f" {bound:.6g}: no code can do this, so the measurement or the bit count is wrong"
        )
    return float(mse / bound) if bound > 0 else float("inf")
