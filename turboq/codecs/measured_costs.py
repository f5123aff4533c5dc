"""What each coordinate costs at each number of bits, measured on a sample. NumPy.

    costs[i, b] = min over spreads m of sum_n weights_in (y_in - m Q_b(y_in / m))^2

Q_b is Lloyd-Max at b bits; the cost of another quantizer is taken to be in the ratio of its
Gaussian curve to Lloyd-Max's. A coordinate with a heavy or heavily weighted tail so costs more than
v_i d(b), and is stretched or given more bits.

Exact, for all books and spreads at once: their thresholds together cut the line into bins, within
which every Q is one point q, so with s_p the sum of w y^p over a bin a cost is the sum over bins of
s_2 - 2 q s_1 + q^2 s_0: two products with constant matrices.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from jaxtyping import Float, Int

from turboq.numbers.codebook import distortion, lloyd_max, thresholds

SPREADS = (1.0, 1.15, 1.35, 1.6, 2.0, 2.5)
_CELLS = 2**14


def measured_costs(
    y: Float[np.ndarray, "C N"],
    weights: Float[np.ndarray, "C N"],
    curve: Float[np.ndarray, "b"],
    text: Int[np.ndarray, "N"] | None = None,
) -> tuple[Float[np.ndarray, "X C b"], Float[np.ndarray, "C b"]]:
    """Costs of coordinates y, one a row, summed over the tokens of each text; and best spreads.

    Spreads are best for all texts together. `curve` [bits + 1] is that of the quantizer; `text`
    numbers the texts 0..X-1 (None: one).
    """
    bins, spreads = _bins(len(curve) - 1), np.array(SPREADS)
    coordinates, count = len(y), len(bins.edges) + 1
    of = np.zeros(y.shape[1], np.int64) if text is None else text.astype(np.int64)
    texts = int(of.max(initial=0)) + 1
    row = of[None, :] * coordinates + np.arange(coordinates)[:, None]
    at = (bins.of(y) + count * row).reshape(-1)
    w = np.asarray(weights, np.float64)
    s0, s1 = (
        np.bincount(at, term.reshape(-1), minlength=count * texts * coordinates).reshape(-1, count)
        for term in (w, w * y)
    )
    square = w * np.square(y, dtype=np.float64)
    energy = np.stack([square[:, of == t].sum(axis=1) for t in range(texts)])
    total = s0 @ np.square(bins.points) - 2 * (s1 @ bins.points) + energy.reshape(-1, 1)
    total = np.maximum(total, 0.0).reshape(texts, coordinates, -1, len(spreads))
    pick = np.argmin(total.sum(axis=0), axis=2)
    least = np.take_along_axis(total, pick[None, :, :, None], axis=3)[..., 0] * excess(curve)[1:]
    costs = np.concatenate([energy[:, :, None], least], axis=2)
    return costs, np.concatenate([np.ones((coordinates, 1)), spreads[pick]], axis=1)


def excess(curve: Float[np.ndarray, "b"]) -> Float[np.ndarray, "b"]:
    """What the quantizer of this curve leaves over what Lloyd-Max leaves; 1 at 0 bits."""
    return np.asarray(curve) / _lloyd_max_curve(len(curve))


@functools.cache
def _lloyd_max_curve(count: int) -> np.ndarray:
    books = [lloyd_max("gaussian", b) for b in range(1, count)]
    return np.array([1.0, *(distortion("gaussian", c) for c in books)])


@dataclasses.dataclass(frozen=True, eq=False)
class _Bins:
    """Bin j ends at edges[j]; points [bins, bits * spreads] of each book at each spread."""

    edges: Float[np.ndarray, "E"]
    points: Float[np.ndarray, "B P"]
    first: Int[np.ndarray, "cells"]  # number of edges in the cells before each of `_cell`
    deep: int  # most edges within a cell

    def of(self, y: np.ndarray) -> Int[np.ndarray, "*n"]:
        """np.searchsorted(edges, y, side="right"), by table: several times as fast."""
        at = self.first[self._cell(y)]
        for _ in range(self.deep):
            at = at + (y >= self._ends[at])
        return at

    def _cell(self, y: np.ndarray) -> np.ndarray:
        # Rises with y whatever its rounding, so a value's bin is one of its own cell's.
        unit = (y - self.edges[0]) * (_CELLS / (self.edges[-1] - self.edges[0]))
        return np.clip(unit, -1, _CELLS).astype(np.int32) + 1

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        return np.append(self.edges, np.inf)


@functools.cache
def _bins(top: int) -> _Bins:
    books = [lloyd_max("gaussian", b) for b in range(1, top + 1)]
    scaled = [(m * c, m * thresholds(c)) for c in books for m in SPREADS]
    edges = np.unique(np.concatenate([t for _, t in scaled]))
    left = np.append(-np.inf, edges)
    points = [c[np.searchsorted(t, left, side="right")] for c, t in scaled]
    bins = _Bins(edges, np.stack(points, axis=1), np.zeros(0, np.int64), 0)
    counts = np.bincount(bins._cell(edges), minlength=_CELLS + 2)
    return dataclasses.replace(bins, first=np.cumsum(counts) - counts, deep=int(counts.max()))


def remains(
    y: Float[np.ndarray, "C N"], bits: Int[np.ndarray, "C"], spreads: Float[np.ndarray, "C"]
) -> Float[np.ndarray, "C N"]:
    """y - m Q_b(y / m) of coordinates with their own bits b (0: dropped) and spreads m."""
    bins = _bins(int(bits.max(initial=1)))
    spread = np.argmin(np.abs(spreads[:, None] - SPREADS), axis=1)
    book = np.where(bits > 0, (bits - 1) * len(SPREADS) + spread, -1)
    points = np.append(bins.points, np.zeros((len(bins.points), 1)), axis=1).T
    return y - np.take_along_axis(points[book], bins.of(y), axis=1)
