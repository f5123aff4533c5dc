"""A matrix as rows of int8 times a number each, rounded so that what an error costs stays small.

    M ~ scale q,    least sum over rows e H e^T,   e = M - scale q

greedily: columns are rounded one after another, the costliest first, and what one was rounded by is
made good, as far as H lets it, in those not yet rounded. Where errors cost alike in all directions
(H = 1) that is rounding to nearest; where they do not, far less.

Source: Frantar et al. 2022 (GPTQ, arXiv 2210.17323), eq. 2 and 3.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int, Int8

LARGEST = 127
RIDGE = 1e-6  # of the mean cost of a column, added to each: H may have no inverse
_BLOCK = 64  # columns that are rounded before the rest hears of it


@dataclasses.dataclass(frozen=True)
class Metric:
    """H as rounding needs it: `order` of the columns, and U [C, C], whose row c says how an error
    of column c is made good by those behind it."""

    order: Int[np.ndarray, "C"]
    upper: Float[np.ndarray, "C C"]

    @classmethod
    def of(cls, h: Float[np.ndarray, "C C"]) -> Metric:
        """Of H, symmetric and not negative.

        Raises:
          ValueError: an entry that is not finite.
        """
        if not np.all(np.isfinite(h)):
            raise ValueError("the metric must be finite")
        cost = np.diag(h)
        order = np.argsort(-cost, kind="stable")
        ridge = RIDGE * max(float(np.mean(cost)), 1e-300)
        inverse = np.linalg.inv(h[np.ix_(order, order)] + ridge * np.eye(len(order)))
        return cls(order, np.ascontiguousarray(np.linalg.cholesky(inverse).T))


def to_int8(
    matrix: Float[np.ndarray, "R C"], metric: Metric
) -> tuple[Int8[np.ndarray, "R C"], Float[np.ndarray, "R"]]:
    """q and scale, float32; a row's largest entry is `LARGEST` of its scale.

    Raises:
      ValueError: an entry that is not finite.
    """
    if not np.all(np.isfinite(matrix)):
        raise ValueError("the matrix must be finite")
    u, largest = metric.upper, np.abs(matrix).max(axis=1, initial=0.0)
    scale = np.where(largest > 0, largest / LARGEST, 1.0).astype(np.float32)
    rest = np.ascontiguousarray((matrix / scale[:, None].astype(np.float64)).T[metric.order])
    q = np.empty(rest.shape, np.int8)
    for first in range(0, len(rest), _BLOCK):
        last = min(first + _BLOCK, len(rest))
        errors = np.empty((last - first, len(matrix)))
        for c in range(first, last):
            nearest = np.clip(np.rint(rest[c]), -LARGEST, LARGEST)
            q[c] = nearest
            errors[c - first] = (rest[c] - nearest) / u[c, c]
            rest[c + 1 : last] -= u[c, c + 1 : last, None] * errors[c - first]
        rest[last:] -= u[first:last, last:].T @ errors
    out = np.empty(matrix.shape, np.int8)
    out[:, metric.order] = q.T
    return out, scale
