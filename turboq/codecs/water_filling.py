"""Bits by coordinate: exact allocation over measured distortion curves, in a few equal-width runs.

Coordinates of variances v_1 >= v_2 >= ... (in units of what is being minimised) and a quantizer
that leaves the fraction d(b) of a unit variance at b bits: minimise

    sum_i v_i d(b_i)    over falling b in at most `runs` runs of whole blocks of 8 coordinates

for every total at once, by dynamic programming over blocks. At high rate, without the constraint on
runs, this is reverse water-filling (Cover and Thomas, theorem 10.3.3) with d(b) instead of 4^-b.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
from jaxtyping import Float, Int

from turboq.codecs.transform import MAX_SEGMENTS, Segments

BLOCK = 8
MOST_CHOICES = 2**25  # entries of one batch's table of choices, one byte each


@dataclasses.dataclass(frozen=True)
class Rates:
    """The best of every size: `bits` per vector, `error` left, `segments`; bits rising."""

    bits: Int[np.ndarray, "R"]
    error: Float[np.ndarray, "R"]
    segments: tuple[Segments, ...]

    def at(self, bits: int) -> int:
        """Index of the largest size of at most `bits`.

        Raises:
          ValueError: even the smallest is larger.
        """
        found = int(np.searchsorted(self.bits, bits, side="right")) - 1
        if found < 0:
            raise ValueError(f"{bits=} per vector are less than the smallest, {self.bits[0]}")
        return found


def batched_rates(costs: Float[np.ndarray, "U D b"], *, runs: int = MAX_SEGMENTS) -> list[Rates]:
    """The best segments of every number of code bits per vector that improves on fewer, by unit.

    costs[u, i, b] is what coordinate i of unit u costs at b bits: v_i d(b), or as measured. Exact:
    dynamic programming over (block, its bits, run number, bits so far).

    Raises:
      ValueError: not whole blocks of 8 coordinates, negative or not finite costs; runs below 1.
    """
    costs = np.asarray(costs, np.float64)
    if costs.shape[1] % BLOCK or not np.all(costs >= 0) or np.isinf(costs).any():
        raise ValueError(f"{costs.shape=} must be whole blocks of 8 finite costs of 0 or more")
    if runs < 1:
        raise ValueError(f"{runs=} must be at least 1")
    blocks = costs.reshape(len(costs), -1, BLOCK, costs.shape[2]).sum(axis=2)
    # Few enough units at a time that the tables of choices stay small.
    entries = blocks.shape[1] ** 2 * blocks.shape[2] ** 2 * (runs + 1)
    at_once = max(1, MOST_CHOICES // entries)
    parts = [_solve(blocks[i : i + at_once], runs) for i in range(0, len(blocks), at_once)]
    return [table for part in parts for table in part]


def _solve(blocks: Float[np.ndarray, "U n b"], runs: int) -> list[Rates]:
    units, n, top = len(blocks), blocks.shape[1], blocks.shape[2] - 1
    size = n * top + 1
    # best[b, r, u, t]: least error of the blocks so far, the last at b bits in run r, t in all.
    best = np.full((top + 1, runs + 1, units, size), np.inf)
    for b in range(top + 1):
        best[b, int(b > 0), :, b] = blocks[:, 0, b]
    came = np.zeros((n, *best.shape), np.int8)  # bits of the block before
    for j in range(1, n):
        new = np.full_like(best, np.inf)
        for b in range(top + 1):
            # From a > b a new run begins; a dropped block keeps the number of what came before it.
            ways = best[b:].copy()
            if b:
                ways[1:, 1:], ways[1:, 0] = best[b + 1 :, :-1], np.inf
            pick = np.argmin(ways, axis=0)
            least = np.take_along_axis(ways, pick[None], axis=0)[0]
            new[b, :, :, b:] = least[..., : size - b] + blocks[:, j, b, None]
            came[j, b, :, :, b:] = (pick + b)[..., : size - b]
        best = new
    flat = best.reshape(-1, units, size)
    which, error = np.argmin(flat, axis=0), np.min(flat, axis=0)
    fewer = np.minimum.accumulate(error[:, 1:-1], axis=1)
    better = error[:, 1:] < np.pad(fewer, ((0, 0), (1, 0)), constant_values=np.inf)
    unit, t = np.nonzero(better)
    t = t + 1
    levels = _trace(came, *np.divmod(which[unit, t], runs + 1), unit, t)
    segments = [_segments(row) for row in levels.tolist()]
    ends = np.searchsorted(unit, np.arange(units + 1))
    return [
        Rates(t[a:z] * BLOCK, error[u, t[a:z]], tuple(segments[a:z]))
        for u, (a, z) in enumerate(itertools.pairwise(ends))
    ]


def _trace(came: np.ndarray, b: np.ndarray, r: np.ndarray, unit: np.ndarray, t: np.ndarray):
    """Bits of every block [R, n], back from where each of R solutions ends."""
    levels = [b]
    for j in range(len(came) - 1, 0, -1):
        a = came[j, b, r, unit, t].astype(np.int64)
        t = t - b
        r = np.where((a == b) | (b == 0), r, r - 1)
        b = a
        levels.append(b)
    return np.stack(levels[::-1], axis=1)


def _segments(levels: list[int]) -> Segments:
    groups = ((bits, len(list(blocks))) for bits, blocks in itertools.groupby(levels))
    return tuple((BLOCK * count, bits) for bits, count in groups if bits)
