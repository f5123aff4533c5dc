"""Fits `transform`: the basis that makes a weighted error diagonal, gains and codebooks. NumPy.

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

from turboq.codecs.transform import Transform, unit_table
from turboq.numbers.codebook import distortion, lloyd_max


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
    """The joint basis of one head, float64 inside, float32 arrays out of `fit_arrays`.

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


def token_weights(
    gradients: Float[np.ndarray, "N D"], metric: Float[np.ndarray, "D D"], *, ridge: float = 1e-2
) -> Float[np.ndarray, "N"]:
    """g^T M^-1 g of every token over its mean: what an error costs there, against the average.

    Errors of the joint basis have a covariance close to M^-1, so this is the token's part of the
    loss. A few tokens that most queries attend to can have most of it, and they are unlike the
    others: a basis, a spread or a codebook that ignores them clips just these.
    """
    g = np.asarray(gradients, np.float32)
    m = np.asarray(metric, np.float64)
    m = m + np.eye(len(m)) * max(ridge * np.trace(m) / len(m), 1e-30)
    inverse = np.linalg.inv(m / (np.trace(m) / len(m))).astype(np.float32)
    w = np.einsum("nd,nd->n", g @ inverse, g).astype(np.float64)
    mean = w.mean()
    return w / mean if mean > 0 else np.ones(len(w))


def weighted_moments(
    x: Float[np.ndarray, "N D"], weights: Float[np.ndarray, "N"] | None = None
) -> tuple[Float[np.ndarray, "D"], Float[np.ndarray, "D D"]]:
    """Mean and covariance with weights of mean 1 (None: all alike), float64."""
    x = np.asarray(x, np.float32)
    w = np.ones(len(x), np.float32) if weights is None else weights.astype(np.float32)
    mean = np.mean(x * w[:, None], axis=0, dtype=np.float64)
    centred = x - mean.astype(np.float32)
    return mean, ((centred * w[:, None]).T @ centred).astype(np.float64) / len(x)


SPREADS = (1.0, 1.15, 1.35, 1.6, 2.0, 2.5)


def measured_costs(
    y: Float[np.ndarray, "N D"],
    weights: Float[np.ndarray, "N D"],
    curve: Float[np.ndarray, "b"],
) -> tuple[Float[np.ndarray, "D b"], Float[np.ndarray, "D b"]]:
    """costs[i, b] = min over spreads m of sum_n weights_ni (y_ni - m Q_b(y_ni / m))^2, and that m.

    Q_b is Lloyd-Max at b bits; the cost of another quantizer is taken to be in the ratio of its
    Gaussian curve to Lloyd-Max's. A coordinate with a heavy or heavily weighted tail so costs more
    than v_i d(b), and is stretched or given more bits. Exact in O(N log N + levels) per coordinate.
    """
    order = np.argsort(y, axis=0)
    y = np.take_along_axis(y, order, axis=0).astype(np.float64)
    w = np.take_along_axis(weights, order, axis=0).astype(np.float64)
    zero = np.zeros((1, y.shape[1]))
    sums = [np.concatenate([zero, np.cumsum(w * y**p, axis=0)]) for p in range(3)]
    spreads = np.array(SPREADS)
    books = [lloyd_max("gaussian", b) for b in range(1, len(curve))]
    gains = [curve[b] / distortion("gaussian", c) for b, c in enumerate(books, start=1)]
    edges = [np.outer(spreads, 0.5 * (c[1:] + c[:-1])).reshape(-1) for c in books]
    ends = np.cumsum([0, *(len(e) for e in edges)])
    every = np.concatenate(edges)
    costs, best = np.empty((2, y.shape[1], len(curve)))
    costs[:, 0], best[:, 0] = sums[2][-1], 1.0
    for i in range(y.shape[1]):
        at = np.searchsorted(y[:, i], every)
        for b, c in enumerate(books, start=1):
            inner = at[ends[b - 1] : ends[b]].reshape(len(spreads), -1)
            cells = np.pad(inner, ((0, 0), (1, 0)))
            cells = np.concatenate([cells, np.full((len(spreads), 1), len(y))], axis=1)
            s0, s1, s2 = (np.diff(s[cells, i], axis=1) for s in sums)
            values = spreads[:, None] * c[None, :]
            total = np.sum(s2 - 2 * values * s1 + values**2 * s0, axis=1)
            pick = int(np.argmin(total))
            best[i, b] = spreads[pick]
            costs[i, b] = max(total[pick], 0.0) * gains[b - 1]
    return costs, best


def fit_arrays(
    codec: Transform,
    basis: Basis,
    samples: Float[np.ndarray, "N D"] | None = None,
    *,
    spreads: Float[np.ndarray, "D b"] | None = None,
) -> dict[str, np.ndarray]:
    """Arrays of one head, float32. `samples` of x are needed for gains and fitted codebooks.

    `spreads` of `measured_costs` stretch each coordinate by what is best at its bits.

    Raises:
      ValueError: samples are needed and missing.
    """
    coded = codec.coded
    stretch = np.ones(coded)
    if spreads is not None:
        bits = np.repeat([b for _, b in codec.segments], [width for width, _ in codec.segments])
        stretch = spreads[np.arange(coded), bits]
    arrays = {
        "mean": basis.mean,
        "analysis": basis.analysis[:coded] / stretch[:, None],
        "synthesis": basis.synthesis[:, :coded] * stretch,
    }
    if codec.gain == "code" or codec.codebook == "fitted":
        if samples is None:
            raise ValueError(f"{codec.gain=} and {codec.codebook=} need samples to fit")
        y = (np.asarray(samples, np.float64) - basis.mean) @ arrays["analysis"].T
        if codec.gain == "code":
            arrays["gains"] = fit_gains(np.sqrt(np.mean(y * y, axis=-1)), 2**codec.gain_bits)
            edges = np.sqrt(arrays["gains"][1:] * arrays["gains"][:-1])
            rms = np.sqrt(np.mean(y * y, axis=-1))
            y = y / arrays["gains"][np.searchsorted(edges, rms)][:, None]
        if codec.codebook == "fitted":
            arrays |= fit_codebooks(codec, y)
    return {name: a.astype(np.float32) for name, a in arrays.items()}


def fit_gains(rms: Float[np.ndarray, "N"], levels: int) -> np.ndarray:
    """Gains [levels], ascending: equal steps of the logarithm from the 0.5 to the 99.9 percentile.

    Room of half a step on the upper side is for text unlike the calibration's.
    """
    rms = rms[rms > 0]
    if not len(rms):
        return np.geomspace(0.5, 2.0, levels)
    low, high = np.quantile(rms, [0.005, 0.999])
    low, high = min(low, 0.9 * high), high
    return np.geomspace(low, high * (high / low) ** (0.5 / max(levels - 1, 1)), levels)


def fit_codebooks(codec: Transform, u: Float[np.ndarray, "N C"]) -> dict[str, np.ndarray]:
    """codebook{i} of each segment: Lloyd's iteration from the Gaussian points on coordinates u."""
    if codec.quantizer == "trellis":
        return {
            f"codebook{i}": unit_table(codec, bits) for i, (_, bits) in enumerate(codec.segments)
        }
    books, start = {}, 0
    for i, (width, bits) in enumerate(codec.segments):
        x = np.sort(u[:, start : start + width].reshape(-1))
        start += width
        sums = np.concatenate([[0.0], np.cumsum(x)])
        c = unit_table(codec, bits)
        for _ in range(50):
            edges = np.searchsorted(x, 0.5 * (c[1:] + c[:-1]))
            edges = np.concatenate([[0], edges, [len(x)]])
            n = np.diff(edges)
            c = np.where(n > 0, np.diff(sums[edges]) / np.maximum(n, 1), c)
        books[f"codebook{i}"] = np.sort(c)
    return books
