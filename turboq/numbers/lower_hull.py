"""What to store in fewer bits next: lower convex hulls of (size, cost), by their slope.

Of every row of candidates only the vertices of its lower hull are worth taking, and of all rows'
hull segments those of the largest gain per bit first. Read upwards that is the greedy of the
multiple-choice knapsack; downwards, the order in which to give bits up as memory fills.
Source: Sinha & Zoltners 1979; Kellerer, Pferschy & Pisinger, Knapsack Problems, chapter 11.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

Costs = Float[np.ndarray, "N R"]
Sizes = Int[np.ndarray, "N R"]
Chosen = Int[np.ndarray, "N"]


class Segments(NamedTuple):
    """Hull segments, one entry each: from the column before, `step` steps up its row, to `column`,
    which is `more` larger and costs `less` less. gain = less / more falls along a row."""

    row: Int[np.ndarray, "S"]
    step: Int[np.ndarray, "S"]
    column: Int[np.ndarray, "S"]
    more: Int[np.ndarray, "S"]
    less: Float[np.ndarray, "S"]
    gain: Float[np.ndarray, "S"]

    def upwards(self) -> Int[np.ndarray, "S"]:
        """Indices by gain, the largest first; those of one row in order."""
        return np.lexsort((self.step, self.row, -self.gain))

    def downwards(self) -> Int[np.ndarray, "S"]:
        """Indices by gain, the least first: every one undoes its segment."""
        return np.lexsort((-self.step, self.row, self.gain))


def smallest(costs: Costs, sizes: Sizes) -> Chosen:
    """The least size of every row, at the least cost among equals; +inf forbids a column."""
    allowed = np.isfinite(costs)
    least = np.where(allowed, sizes, np.iinfo(np.int64).max).min(axis=1, keepdims=True)
    return np.where(allowed & (sizes == least), costs, np.inf).argmin(axis=1)


def segments(costs: Costs, sizes: Sizes, start: Chosen) -> Segments:
    """Hull segments of all rows from the columns `start` upwards."""
    rows = np.arange(len(costs))
    at, before = start, np.full(len(costs), np.inf)
    out = []
    for step in range(costs.shape[1]):
        more = sizes - sizes[rows, at][:, None]
        less = costs[rows, at][:, None] - costs
        better = (more > 0) & (less > 0)
        gain = np.where(better, less / np.where(better, more, 1), 0.0)
        best = gain.max(axis=1)
        go = best > 0
        if not go.any():
            break
        # Of equal gains the longest, so that the hull has no vertex inside an edge.
        reached = np.where(better & (gain == best[:, None]), more, 0).argmax(axis=1)
        gain_now = np.minimum(best, before)  # rounding must not turn the order of a row around
        r = rows[go]
        c = reached[go]
        out.append((r, np.full(len(r), step), c, more[r, c], less[r, c], gain_now[go]))
        at, before = np.where(go, reached, at), gain_now
    if not out:
        return Segments(*(np.empty(0, kind) for kind in (int, int, int, np.int64, float, float)))
    return Segments(*(np.concatenate(part) for part in zip(*out, strict=True)))
