"""Codebooks fitted to data: globally optimal weighted 1-D k-means of a histogram or of samples."""

from __future__ import annotations

import numpy as np

MAX_SAMPLES = 2**16  # distinct sorted values that `fit_samples` solves exactly


def fit_histogram(counts: np.ndarray, means: np.ndarray, levels: int) -> np.ndarray:
    """Centroids [levels], float64 ascending, of the best `levels`-level quantizer of a histogram.

    Minimises sum_i counts_i (means_i - c(means_i))^2 exactly. What lies within a bin adds a
    constant, so the loss against fitting the raw data is only from bins that a threshold cuts.

    Optimal cells are contiguous, so the best split of the first j bins into k cells obeys
    V_k(j) = max_i V_{k-1}(i) + (sum of w x)^2 / (sum of w) over bins i..j-1, and its best i grows
    with j: divide and conquer finds all j of one k in O(n log n) (Wang and Song, "Ckmeans.1d.dp",
    R Journal 2011; Gronlund et al., arXiv 1701.07204), here with all segments of one depth in one
    NumPy pass.

    Args:
      counts: [bins] non-negative weights (counts or sums of weights).
      means: [bins] ascending mean of the values in each bin; ignored where the count is zero.
      levels: 1..256. With fewer distinct non-empty bins than levels, the largest value is repeated:
        its codes are never used and the error is zero.

    Raises:
      ValueError: shapes differ, negative or non-finite entries, no mass, means not ascending.
    """
    w, x = _checked(counts, means, levels)
    if len(w) <= levels:
        return np.concatenate([x, np.full(levels - len(w), x[-1])])
    center = np.sum(w * x) / np.sum(w)  # a large common mean would cancel in the squares
    s0 = np.concatenate([[0.0], np.cumsum(w)])
    s1 = np.concatenate([[0.0], np.cumsum(w * (x - center))])
    n = len(w)
    best = np.zeros(n + 1)
    best[1:] = s1[1:] ** 2 / s0[1:]
    splits = []
    for k in range(2, levels + 1):
        best, split = _layer(best, s0, s1, k, last=k == levels)
        splits.append(split)
    edges = np.empty(levels + 1, np.int64)
    edges[0], edges[levels] = 0, n
    for k in range(levels, 1, -1):
        edges[k - 1] = splits[k - 2][edges[k]]
    # From the cells themselves: differences of prefix sums would lose cells of tiny mass.
    return np.add.reduceat(w * x, edges[:-1]) / np.add.reduceat(w, edges[:-1])


def fit_samples(
    x: np.ndarray, weights: np.ndarray | None, levels: int, *, most: int = MAX_SAMPLES
) -> np.ndarray:
    """`fit_histogram` of raw samples [n] with weights [n] (None: all one).

    Exact up to `most` distinct values. Above, sorted neighbours are first merged into that many
    groups of nearly equal count, each replaced by its weighted mean.
    """
    x = np.asarray(x, np.float64).ravel()
    w = np.ones_like(x) if weights is None else np.asarray(weights, np.float64).ravel()
    if x.shape != w.shape:
        raise ValueError(f"{x.shape=} and {w.shape=} must be equal")
    if not np.all(np.isfinite(x)):
        raise ValueError("samples must be finite: NaN or Inf found")
    order = np.argsort(x, kind="stable")
    x, w = x[order], w[order]
    x, w = x[w != 0], w[w != 0]
    if len(x) == 0:
        raise ValueError(f"{len(x)=} samples with non-zero weight: at least one is needed")
    starts = np.flatnonzero(np.concatenate([[True], x[1:] > x[:-1]]))
    if len(starts) > most:
        starts = starts[np.linspace(0, len(starts), most, endpoint=False).astype(np.int64)]
    mass = np.add.reduceat(w, starts)
    means = np.maximum.accumulate(np.add.reduceat(w * x, starts) / mass)
    return fit_histogram(mass, means, levels)


def lloyd(x: np.ndarray, start: np.ndarray, steps: int) -> np.ndarray:
    """Centroids after `steps` of Lloyd's iteration on ascending x [n] from start [levels].

    Never worse than the start; a level without samples stays where it is.
    """
    sums, c = np.concatenate([[0.0], np.cumsum(x, dtype=np.float64)]), np.asarray(start, np.float64)
    for _ in range(steps):
        edges = np.concatenate([[0], np.searchsorted(x, 0.5 * (c[1:] + c[:-1])), [len(x)]])
        n = np.diff(edges)
        c = np.where(n > 0, np.diff(sums[edges]) / np.maximum(n, 1), c)
    return np.sort(c)


def _checked(counts: np.ndarray, means: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    w, x = np.asarray(counts, np.float64), np.asarray(means, np.float64)
    if w.ndim != 1 or w.shape != x.shape:
        raise ValueError(f"counts {w.shape=} and means {x.shape=} must be equal and 1-D")
    if not 1 <= levels <= 256:
        raise ValueError(f"{levels=} must be 1..256")
    if not np.all(np.isfinite(w)) or np.any(w < 0):
        raise ValueError("counts must be finite and not negative")
    w, x = w[w > 0], x[w > 0]
    if len(w) == 0:
        raise ValueError("counts are all zero: there is nothing to fit")
    if not np.all(np.isfinite(x)) or np.any(np.diff(x) < 0):
        raise ValueError("means of non-empty bins must be finite and ascending")
    return w, x


def _layer(
    prev: np.ndarray, s0: np.ndarray, s1: np.ndarray, k: int, last: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Best value and last split of the first j bins into k cells, for every j >= k."""
    n, floor = len(s0) - 1, s0[-1] * 2.0**-53
    best, split = np.full(n + 1, -np.inf), np.full(n + 1, n, np.int64)
    # Segments of unsolved j (inclusive), with the range of splits their neighbours allow.
    j_lo, j_hi = np.array([k]), np.array([n])
    i_lo, i_hi = np.array([k - 1]), np.array([n - 1])
    while len(j_lo):
        mid = j_hi if last else (j_lo + j_hi) // 2
        hi = np.minimum(i_hi, mid - 1)
        length = hi - i_lo + 1
        start = np.cumsum(length) - length
        i = np.arange(start[-1] + length[-1]) + np.repeat(i_lo - start, length)
        j = np.repeat(mid, length)
        # A mass below the rounding of the prefix sums gains nothing and must not divide by zero.
        value = prev[i] + (s1[j] - s1[i]) ** 2 / np.maximum(s0[j] - s0[i], floor)
        top = np.maximum.reduceat(value, start)
        # First position of the maximum within each segment.
        hits = np.flatnonzero(value == np.repeat(top, length))
        arg = i[hits[np.searchsorted(hits, start)]]
        best[mid], split[mid] = top, arg
        if last:  # only j = n is needed
            break
        left, right = mid > j_lo, mid < j_hi
        j_lo, j_hi, i_lo, i_hi = (
            np.concatenate([j_lo[left], mid[right] + 1]),
            np.concatenate([mid[left] - 1, j_hi[right]]),
            np.concatenate([i_lo[left], arg[right]]),
            np.concatenate([arg[left], i_hi[right]]),
        )
    return best, split
