"""The basis that makes a weighted error diagonal, and the moments it is made from. NumPy.

With C the covariance of x and M the metric (errors cost e^T M e, so tr(M E[e e^T]) is minimised):

    M^1/2 C M^1/2 = V diag(v) V^T,   A = v^-1/2 V^T M^1/2,   S = M^-1/2 V v^1/2

y = A (x - mean) is uncorrelated with unit variances, and an error of variance d_i in y_i costs
v_i d_i: bits follow v alone. For K, M is the second moment of the queries that read the head
(q^T e squared is the logit error) or its Fisher information; for V, W_o^T W_o or the Fisher
information; M = 1 is the plain Karhunen-Loeve basis.

Source: mathematics of joint diagonalisation, transform coding with a weighted error (Goyal 2001).
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float

from turboq.codecs.observed import Observed

EMPHASIS = 0.0  # of moments: 0 counts tokens alike, 1 by what they cost
RIDGE = 1e-2  # of the metric: directions that no query of the calibration used matter a little


@dataclasses.dataclass(frozen=True)
class Basis:
    """One head: mean [D], A [D, D], S [D, D], and weighted variances v [D], falling."""

    mean: Float[np.ndarray, "D"]
    analysis: Float[np.ndarray, "D D"]
    synthesis: Float[np.ndarray, "D D"]
    variances: Float[np.ndarray, "D"]


def fit_basis(
    mean: Float[np.ndarray, "D"],
    covariance: Float[np.ndarray, "D D"],
    metric: Float[np.ndarray, "D D"],
    *,
    ridge: float = 1e-3,
    shrink: float = 0.0,
) -> Basis:
    """The joint basis of one head, float64.

    `ridge` adds that fraction of the mean eigenvalue to the metric's diagonal (directions that no
    query of the calibration used must still be decoded), `shrink` moves the covariance that far
    towards the isotropic one of equal trace.

    Raises:
      ValueError: not symmetric, not finite, or of different sizes.
    """
    c, m = _symmetric("covariance", covariance), _symmetric("metric", metric)
    if c.shape != m.shape or np.shape(mean) != c.shape[:1]:
        raise ValueError(f"{np.shape(mean)=}, {c.shape=} and {m.shape=} must be of one dim")
    dim = len(c)
    c = (1 - shrink) * c + np.eye(dim) * (shrink + 1e-9) * max(np.trace(c) / dim, 1e-30)
    m = m + np.eye(dim) * (ridge + 1e-9) * max(np.trace(m) / dim, 1e-30)
    values, vectors = np.linalg.eigh(m)
    root = (vectors * np.sqrt(values)) @ vectors.T
    inverse = (vectors / np.sqrt(values)) @ vectors.T
    variances, basis = np.linalg.eigh(root @ c @ root)
    variances, basis = np.maximum(variances[::-1], variances[-1] * 1e-12), basis[:, ::-1]
    deviation = np.sqrt(variances)
    return Basis(
        mean=np.asarray(mean, np.float64),
        analysis=(root @ basis / deviation).T,
        synthesis=(inverse @ basis) * deviation,
        variances=variances,
    )


def _symmetric(name: str, matrix: np.ndarray) -> np.ndarray:
    m = np.asarray(matrix, np.float64)
    if m.ndim != 2 or m.shape[0] != m.shape[1]:
        raise ValueError(f"{name} {m.shape=} must be [D, D]")
    if not np.all(np.isfinite(m)) or not np.allclose(
        m, m.T, rtol=1e-4, atol=1e-5 * np.max(np.abs(m), initial=0.0)
    ):
        raise ValueError(f"{name} must be finite and symmetric")
    return (m + m.T) / 2


def moments(
    seen: Observed, emphasis: float = EMPHASIS, *, shrink_mean: float = 0.0
) -> tuple[Float[np.ndarray, "K D"], Float[np.ndarray, "K D D"]]:
    """Mean and covariance of the mixture of all tokens and, with `emphasis`, weighted ones.

        m = (1 - a) m_0 + a m_1,   C = sum_i a_i (C_i + (m_i - m) (m_i - m)^T)

    so the covariance includes the spread between the means. `shrink_mean` then moves the mean that
    far towards zero, and the covariance is about what is left.
    """
    parts = (
        (1 - emphasis, seen.mean, seen.covariance),
        (emphasis, seen.weighted_mean, seen.weighted_covariance),
    )
    mean = (1 - shrink_mean) * np.sum([share * m for share, m, _ in parts], axis=0)
    away = [m - mean for _, m, _ in parts]
    each = zip(parts, away, strict=True)
    covariance = np.sum(
        [share * (c + d[:, :, None] * d[:, None, :]) for (share, _, c), d in each], axis=0
    )
    return mean, covariance


def token_weights(
    gradients: Float[np.ndarray, "*k N D"],
    metric: Float[np.ndarray, "*k D D"],
    *,
    ridge: float = RIDGE,
) -> Float[np.ndarray, "*k N"]:
    """g^T M^-1 g of every token over its mean: what an error costs there, against the average.

    Errors of the joint basis have a covariance close to M^-1, so this is the token's part of the
    loss. A few tokens that most queries attend to can have most of it, and they are unlike the
    others: a basis, a spread or a codebook that ignores them clips just these.
    """
    g = np.asarray(gradients, np.float32)
    m = np.asarray(metric, np.float64)
    size = np.maximum(np.trace(m, axis1=-2, axis2=-1), 1e-30)[..., None, None] / m.shape[-1]
    inverse = np.linalg.inv(m / size + ridge * np.eye(m.shape[-1])).astype(np.float32)
    w = np.sum((g @ inverse) * g, axis=-1).astype(np.float64)
    mean = w.mean(axis=-1, keepdims=True)
    return np.where(mean > 0, w / np.where(mean > 0, mean, 1.0), 1.0)


def sample_weights(seen: Observed, ridge: float = RIDGE) -> Float[np.ndarray, "K N"]:
    """`token_weights` of the sample; all 1 where no gradients were observed."""
    if seen.g is None:
        return np.ones(seen.x.shape[:2])
    return token_weights(seen.g, seen.metric, ridge=ridge)
