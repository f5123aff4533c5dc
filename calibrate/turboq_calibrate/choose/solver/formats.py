"""At most n formats: one plain knapsack per subset, those that cannot win left out by a bound.

A program with a variable per format takes minutes where a few hundred plain knapsacks take a
second, so subsets are enumerated while there are not too many. For any price p >= 0

    p * -limit + sum_n min_{r in subset} (cost[n, r] + p * size[n, r])

is at most the cost of every choice within the subset (Lagrange).
"""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
from jaxtyping import Bool, Float, Int

from turboq_calibrate.choose.solver import exact, hull
from turboq_calibrate.choose.solver.hull import Answer, Costs, Sizes
from turboq_calibrate.choose.solver.problem import Infeasible

_WORK = 300_000_000  # rows x columns x subsets that are still quick
_CHUNK = 4_000_000
_PRICES = 6  # subsets whose price is tried on all others


def countable(costs: Costs, counted: Bool[np.ndarray, "R"], most: int) -> bool:
    """Whether enumeration is the better way."""
    columns = int((counted & np.isfinite(costs).any(axis=0)).sum())
    subsets = math.comb(columns, min(most, columns))
    return subsets * len(costs) * (most + int((~counted).sum())) <= _WORK


def allocate(
    costs: Costs,
    sizes: Sizes,
    limit: int,
    counted: Bool[np.ndarray, "R"],
    most: int,
    *,
    gap: float,
    seconds: float,
) -> Answer:
    """The best answer over all subsets of `most` counted columns, with a bound that holds for all.

    Raises:
      Infeasible: with the smallest size over all subsets.
    """
    usable = np.flatnonzero(np.isfinite(costs).any(axis=0))
    subsets = subsets_of(usable, counted, most)
    return best(costs, sizes, limit, subsets, gap=gap, seconds=seconds)


def subsets_of(
    usable: Int[np.ndarray, "R"], counted: Bool[np.ndarray, "C"], most: int
) -> Int[np.ndarray, "S n"]:
    """`most` of the usable columns that are counted (or all), with all that are not."""
    free = usable[~counted[usable]]
    usable = usable[counted[usable]]
    take = min(most, len(usable))
    subsets = np.array(list(itertools.combinations(usable.tolist(), take)), int)
    return np.hstack([subsets.reshape(-1, take), np.tile(free, (len(subsets), 1))])


def best(
    costs: Costs,
    sizes: Sizes,
    limit: int,
    subsets: Int[np.ndarray, "S n"],
    *,
    gap: float,
    seconds: float,
) -> Answer:
    """The best answer of all subsets of columns, with a bound that holds for all.

    Subsets are solved in order of their bound, so the first that cannot win ends the search; a gap
    wider than `gap` is closed subset by subset, the total time being at most about `seconds`.

    Raises:
      Infeasible: with the smallest size over all subsets.
    """
    if not subsets.size:
        raise Infeasible(None)
    fits, least = _least(costs, sizes, limit, subsets)
    if not fits.any():
        raise Infeasible(least)
    subsets = subsets[fits]
    bounds = np.full(len(subsets), -np.inf)
    waiting = np.ones(len(subsets), bool)
    price = hull.greedy(costs, sizes, limit).price
    best: Answer | None = None
    solved, until = 0, time.monotonic() + seconds
    while True:
        if solved < _PRICES:
            bounds = np.maximum(bounds, _bounds(costs, sizes, limit, subsets, price))
        next_ = int(np.where(waiting, bounds, np.inf).argmin())
        if not waiting[next_] or (best is not None and bounds[next_] >= best.cost):
            break
        waiting[next_] = False
        columns = subsets[next_]
        part, room = costs[:, columns], sizes[:, columns]
        found = hull.exchange(part, room, limit, hull.greedy(part, room, limit))
        rival = found.cost if best is None else min(best.cost, found.cost)
        if rival - found.bound > gap * abs(rival) and (left := until - time.monotonic()) > 0:
            found = exact.close(part, room, limit, found, seconds=left)
        solved += 1
        bounds[next_] = max(bounds[next_], found.bound)
        price = found.price
        if best is None or found.cost < best.cost:
            best = Answer(columns[found.chosen], found.cost, found.bound, found.price)
    assert best is not None
    return Answer(best.chosen, best.cost, min(float(bounds.min()), best.cost), best.price)


def _chunks(rows: int, subsets: np.ndarray):
    step = max(_CHUNK // (rows * subsets.shape[1]), 1)
    for start in range(0, len(subsets), step):
        yield slice(start, start + step)


def _least(
    costs: Costs, sizes: Sizes, limit: int, subsets: Int[np.ndarray, "S n"]
) -> tuple[Bool[np.ndarray, "S"], int | None]:
    """Subsets that fit the limit, and the smallest size of any (None: none serves every row)."""
    never = np.iinfo(np.int64).max // (2 * len(costs))
    allowed = np.where(np.isfinite(costs), sizes, never)
    least = np.concatenate(
        [allowed[:, subsets[c]].min(axis=2).sum(axis=0) for c in _chunks(len(costs), subsets)]
    )
    smallest = int(least.min())
    return least <= limit, smallest if smallest < never else None


def _bounds(
    costs: Costs, sizes: Sizes, limit: int, subsets: Int[np.ndarray, "S n"], price: float
) -> Float[np.ndarray, "S"]:
    priced = costs + price * sizes
    return np.concatenate(
        [priced[:, subsets[c]].min(axis=2).sum(axis=0) for c in _chunks(len(costs), subsets)]
    ) - (price * limit)
