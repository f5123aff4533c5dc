"""Fits `hadamard_per_head`: a deterministic search for signs and order of the rotation. NumPy.

    choose (signs, order) to lower   mean over tokens of w e^T M e,   e = x_hat - x

by trying random signs and orders, then changing the best one sign or one pair of places at a time,
as long as it helps. All of this sees the first part of the samples; what was found is kept only if
it is better than the plain rotation of seed 0 on the rest, so it is never worse there.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from turboq.codecs.fit_basis import EMPHASIS, sample_weights
from turboq.codecs.hadamard_per_head import HadamardPerHead
from turboq.codecs.observed import Observed
from turboq.numbers import codebook as codebooks
from turboq.numbers import rotation as rotations

_FACTORS = {
    "raw": lambda u, c: 1.0,
    "matched": lambda u, c: np.sqrt(np.sum(u * u, -1) / np.sum(c * c, -1))[:, None],
    "unbiased": lambda u, c: (np.sum(u * u, -1) / np.sum(u * c, -1))[:, None],
    "least_squares": lambda u, c: (np.sum(u * c, -1) / np.sum(c * c, -1))[:, None],
}


@dataclasses.dataclass(frozen=True)
class Found:
    """Signs and order of one head, and errors of start and choice on the validation part."""

    signs: Float[np.ndarray, "D"]
    order: Int[np.ndarray, "D"]
    start: float
    error: float


@dataclasses.dataclass(frozen=True)
class _Score:
    """Weighted error of tokens z [N, D], mean removed, of known scale [N, 1]."""

    codec: HadamardPerHead
    z: Float[np.ndarray, "N D"]
    scale: Float[np.ndarray, "N 1"]
    weights: Float[np.ndarray, "N"]
    root: Float[np.ndarray, "D D"]  # M = root root^T

    def part(self, at: slice, most: int) -> _Score:
        """At most `most` tokens of a slice, evenly spread."""
        count = len(self.weights[at])
        pick = np.arange(*at.indices(len(self.z)))[:: -(-count // most)]
        return _Score(self.codec, self.z[pick], self.scale[pick], self.weights[pick], self.root)

    def __call__(self, signs: np.ndarray, order: np.ndarray) -> float:
        h = rotations.hadamard_matrix(self.codec.dim)
        u = ((self.z[:, order] * signs) @ h.T) / self.scale
        table = self.codec.table
        c = table[np.searchsorted(codebooks.thresholds(table), u)]
        e = self.scale * (_FACTORS[self.codec.scale_rule](u, c) * c - u)
        weighted = e @ (h @ (signs[:, None] * self.root[order]))
        return float(self.weights @ np.sum(weighted * weighted, axis=1) / self.weights.sum())


def search(
    codec: HadamardPerHead,
    x: Float[np.ndarray, "N D"],
    metric: Float[np.ndarray, "D D"] | None = None,
    *,
    weights: Float[np.ndarray, "N"] | None = None,
    mean: Float[np.ndarray, "D"] | None = None,
    candidates: int = 16,
    swaps: int = 32,
    sweeps: int = 1,
    validation: float = 0.25,
    most: int = 256,
) -> Found:
    """The best signs and order found, judged on the last `validation` share of the tokens.

    Args:
      metric: M [D, D] (None: 1); its mean eigenvalue times 1e-6 is added.
      mean: what is removed from x (None: the mean of x).
      candidates: random choices tried, half of them with a random order too.
      swaps: pairs of places tried per sweep; a sweep also tries all D signs.
      most: tokens of each part that are used.

    Raises:
      ValueError: x or metric not finite or of other shapes, fewer than 8 tokens.
    """
    score = _score(codec, x, metric, weights, mean)
    cut = len(score.z) - max(4, int(len(score.z) * validation))
    if cut < 4:
        raise ValueError(f"{len(score.z)=} tokens: 8 or more are needed")
    fit, check = score.part(slice(0, cut), most), score.part(slice(cut, None), most)
    dim, plain = codec.dim, np.arange(codec.dim)
    tried = [(_signs(dim, i), _order(dim, i) if i % 2 else plain) for i in range(candidates)]
    tried.append((_signs(dim, 0), np.argsort(-np.var(fit.z, axis=0), kind="stable")))
    errors = [fit(*choice) for choice in tried]
    signs, order = tried[int(np.argmin(errors))]
    best = min(errors)
    for sweep in range(sweeps):
        words = rotations.random_words(sweep, "sketch_gaussian", 2 * swaps) % np.uint64(dim)
        for change in [(i,) for i in range(dim)] + list(zip(words[::2], words[1::2], strict=True)):
            other, places = signs.copy(), order.copy()
            if len(change) == 1:
                other[change[0]] *= -1
            else:
                places[list(change)] = places[list(change)[::-1]]
            error = fit(other, places)
            if error < best:
                signs, order, best = other, places, error
    start, error = check(_signs(dim, 0), plain), check(signs, order)
    if not error < start:
        signs, order, error = _signs(dim, 0), plain, start
    return Found(signs, order, start, error)


def fit_observed(codec: HadamardPerHead, seen: Observed, **options) -> dict[str, np.ndarray]:
    """`Codec.fit`; `options` are those of `search`, with tokens counted by what they cost."""
    mean, weights = seen.mean, 1 - EMPHASIS + EMPHASIS * sample_weights(seen)
    found = [
        search(codec, x, m, weights=w, mean=center, **options)
        for x, m, w, center in zip(seen.x, seen.metric, weights, mean, strict=True)
    ]
    arrays = {
        "mean": mean,
        "signs": np.stack([f.signs for f in found]),
        "order": np.stack([f.order for f in found]),
    }
    if codec.scale == "head":
        energy = np.trace(seen.covariance, axis1=1, axis2=2)
        arrays["scale"] = np.sqrt(np.maximum(energy, 0.0) / codec.dim)
    return arrays


def _score(codec, x, metric, weights, mean) -> _Score:
    x = np.asarray(x, np.float64)
    metric = np.eye(codec.dim) if metric is None else np.asarray(metric, np.float64)
    if x.ndim != 2 or x.shape[1] != codec.dim or metric.shape != (codec.dim, codec.dim):
        raise ValueError(f"{x.shape=} must be [N, {codec.dim}] and {metric.shape=} [D, D]")
    if not (np.all(np.isfinite(x)) and np.all(np.isfinite(metric))):
        raise ValueError("x and metric must be finite: NaN or Inf found")
    z = x - (x.mean(axis=0) if mean is None else mean)
    axis = None if codec.scale == "head" else 1
    scale = np.sqrt(np.mean(z * z, axis=axis, keepdims=True)) * np.ones((len(z), 1))
    root = np.linalg.cholesky(metric + 1e-6 * np.trace(metric) / codec.dim * np.eye(codec.dim))
    w = np.ones(len(z)) if weights is None else np.asarray(weights, np.float64)
    return _Score(codec, z, np.where(scale > 0, scale, 1.0), w, root)


def _signs(dim: int, seed: int) -> np.ndarray:
    return rotations.Rotation(kind="hadamard", dim=dim, seed=seed).signs.copy()


def _order(dim: int, seed: int) -> np.ndarray:
    return np.argsort(rotations.random_words(seed, "haar", dim), kind="stable")
