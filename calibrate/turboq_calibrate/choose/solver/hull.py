"""Multiple-choice knapsack without side constraints: convex hull, LP bound, local exchange.

    min sum_n cost[n, r_n]   subject to  sum_n size[n, r_n] <= limit

Relaxed to fractions it is solved by greed: of every row the lower convex hull of (size, cost), all
hull segments in order of gain per bit, as far as the limit goes. Only the segment that no longer
fits is split, so that optimum (the bound) and the best choice lie close together.
Source: Sinha & Zoltners 1979; Kellerer, Pferschy & Pisinger, Knapsack Problems, chapter 11.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from turboq.numbers.lower_hull import Chosen, Costs, Sizes, segments, smallest
from turboq_calibrate.choose.solver.problem import Infeasible

_ROUNDS = 100  # of exchange; every round improves, what is left is for the exact search


@dataclasses.dataclass(frozen=True)
class Answer:
    """A choice, a proven lower bound on the cost of every choice, and the LP's price per bit."""

    chosen: Chosen
    cost: float
    bound: float
    price: float

    @property
    def slack(self) -> float:
        """What an optimal choice could at most gain."""
        return self.cost - self.bound


def total(values: np.ndarray, chosen: Chosen):
    """Sum of one entry per row."""
    return values[np.arange(len(chosen)), chosen].sum()


def greedy(costs: Costs, sizes: Sizes, limit: int) -> Answer:
    """The LP optimum as `bound`, and the choice of its whole segments.

    Raises:
      Infeasible: a row allows nothing, or the smallest choice exceeds the limit.
    """
    if not np.isfinite(costs).any(axis=1).all():
        raise Infeasible(None)
    chosen = smallest(costs, sizes)
    room = limit - int(total(sizes, chosen))
    if room < 0:
        raise Infeasible(limit - room)
    bound = float(total(costs, chosen))
    found = segments(costs, sizes, chosen)
    order = found.upwards()
    filled = np.cumsum(found.more[order])
    whole = int(np.searchsorted(filled, room, side="right"))
    taken = order[:whole]
    chosen = chosen.copy()
    chosen[found.row[taken]] = found.column[
        taken
    ]  # segments of a row come in order: the last one stays
    bound -= float(found.less[taken].sum())
    price = 0.0
    if whole < len(order):
        split = order[whole]
        left = room - (int(filled[whole - 1]) if whole else 0)
        price = float(found.gain[split])
        bound -= price * left
    cost = float(total(costs, chosen))
    return Answer(chosen, cost, min(bound, cost), price)


def exchange(costs: Costs, sizes: Sizes, limit: int, answer: Answer) -> Answer:
    """The same with rows changed, one or two at a time, as long as that lowers the cost.

    A round applies the best pair of moves found: for every move the cheapest other one that makes
    it fit, by one sort of all moves and a running minimum.
    """
    rows, columns = costs.shape
    chosen = answer.chosen.copy()
    of_row, column = np.divmod(np.arange(rows * columns), columns)
    for _ in range(_ROUNDS):
        room = limit - int(total(sizes, chosen))
        at = chosen[:, None]
        more = (sizes - np.take_along_axis(sizes, at, 1)).ravel()
        worse = (costs - np.take_along_axis(costs, at, 1)).ravel()
        moves = np.flatnonzero(np.isfinite(worse))
        # Staying (more = worse = 0) is a move of every row, so a single move is a pair too.
        moves = moves[np.lexsort((moves, worse[moves], more[moves]))]
        d_size, d_cost, row = more[moves], worse[moves], of_row[moves]
        record = np.concatenate(([True], d_cost[1:] < np.minimum.accumulate(d_cost)[:-1]))
        partner = np.maximum.accumulate(np.where(record, np.arange(len(moves)), 0))
        fits = np.searchsorted(d_size, room - d_size, side="right") - 1
        other = partner[np.maximum(fits, 0)]
        gained = np.where((fits >= 0) & (row != row[other]), d_cost + d_cost[other], np.inf)
        best = int(gained.argmin())
        alone = int(np.where(d_size <= room, d_cost, np.inf).argmin())
        pick = [alone] if d_cost[alone] <= gained[best] else [best, int(other[best])]
        trial = chosen.copy()
        trial[row[pick]] = column[moves[pick]]
        if not total(costs, trial) < total(costs, chosen):
            break
        chosen = trial
    cost = float(total(costs, chosen))
    return dataclasses.replace(answer, chosen=chosen, cost=cost, bound=min(answer.bound, cost))
