"""The same knapsack by integer programming (HiGHS): to close a gap, and for rules about formats.

x[n, r] = 1: row n takes column r;  sum_r x[n, r] = 1;  sum size x <= limit
Distinct(rows, counted, most):  x[n, r] <= y[r] for n in rows;  sum_{r counted} y[r] <= most
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import scipy.optimize
import scipy.sparse
from jaxtyping import Bool, Int

from turboq_calibrate.choose.solver.hull import Answer, Chosen, Costs, Sizes, total
from turboq_calibrate.choose.solver.problem import Infeasible

_SCALE = 1e5  # of the objective: HiGHS stops at an absolute gap of 1e-6
_INFEASIBLE = 2  # scipy's status


@dataclasses.dataclass(frozen=True)
class Distinct:
    """At most `most` different columns, of those counted, among some rows."""

    rows: Int[np.ndarray, "M"]
    counted: Bool[np.ndarray, "R"]
    most: int


def close(costs: Costs, sizes: Sizes, limit: int, answer: Answer, *, seconds: float) -> Answer:
    """Proves an answer of the plain knapsack optimal, or finds better; within `seconds`.

    A better choice has no column whose reduced cost at the LP's price is as large as the gap, so
    the search is over the few that are left.
    """
    allowed = np.isfinite(costs)
    reduced = np.where(allowed, costs + answer.price * sizes, np.inf)
    reduced -= reduced.min(axis=1, keepdims=True)
    # Reduced costs are differences of sums: keep what rounding could hide.
    rounding = 1e-12 * float(np.abs(costs[allowed]).max() + answer.price * sizes[allowed].max())
    keep = reduced <= answer.slack + rounding
    keep[np.arange(len(costs)), answer.chosen] = True
    found = search(np.where(keep, costs, np.inf), sizes, limit, start=answer, seconds=seconds)
    return dataclasses.replace(found, price=answer.price)


def search(
    costs: Costs,
    sizes: Sizes,
    limit: int,
    *,
    rules: Sequence[Distinct] = (),
    start: Answer | None = None,
    seconds: float,
    gap: float = 0.0,
) -> Answer:
    """Branch and bound over what `costs` leaves finite, for at most `seconds`.

    `start` is what is known already: its choice is returned unless a better one is found, and the
    bound is never below its bound.

    Raises:
      Infeasible: nothing fits, or nothing was found in time; without `smallest`.
    """
    model = _Model(costs, sizes, rules)
    room = limit - model.base_size
    best, bound = start, -math.inf if start is None else start.bound
    result = model.solve(model.objective, model.room(room), seconds, gap)
    if result.status == _INFEASIBLE and start is None:
        raise Infeasible(None)
    if result.mip_dual_bound is not None and np.isfinite(result.mip_dual_bound):
        bound = max(bound, model.cost_of(result.mip_dual_bound))
    while result.x is not None:
        chosen = model.chosen(result.x)
        over = int(total(sizes, chosen)) - limit
        if over <= 0:
            cost = float(total(costs, chosen))
            if best is None or cost < best.cost:
                best = Answer(chosen, cost, bound, 0.0)
            break
        # HiGHS lets a row exceed its limit by a rounding tolerance; the limit is exact.
        room -= max(over, model.unit)
        result = model.solve(model.objective, model.room(room), seconds, gap)
    if best is None:
        raise Infeasible(None)
    return dataclasses.replace(best, bound=min(bound, best.cost))


def least(
    costs: Costs, sizes: Sizes, rules: Sequence[Distinct], *, seconds: float
) -> Chosen | None:
    """The choice of the smallest size under the rules; None if there is none."""
    model = _Model(costs, sizes, rules)
    result = model.solve(model.size / model.unit, None, seconds, 0.0)
    return None if result.x is None else model.chosen(result.x)


class _Model:
    """One integer program: variables x of every allowed entry, then y of every rule."""

    def __init__(self, costs: Costs, sizes: Sizes, rules: Sequence[Distinct]):
        self.row, self.column = np.nonzero(np.isfinite(costs))
        self.rows = len(costs)
        least = np.where(np.isfinite(costs), sizes, np.iinfo(np.int64).max).min(axis=1)
        self.base_size = int(least.sum())
        self.size = sizes[self.row, self.column] - least[self.row]
        self.unit = int(np.gcd.reduce(self.size)) or 1
        cheapest = costs.min(axis=1)
        self.base_cost = float(cheapest.sum())
        above = costs[self.row, self.column] - cheapest[self.row]
        largest = float(np.bincount(self.row, above).max()) * self.rows
        self.scale = _SCALE / largest if largest > 0 else 1.0
        self.objective = above * self.scale
        self.rules = [self._rule(rule, costs.shape) for rule in rules]

    def _rule(self, rule: Distinct, shape: tuple[int, int]):
        member = np.zeros(shape, bool)
        member[np.ix_(rule.rows, np.flatnonzero(rule.counted))] = True
        x = np.flatnonzero(member[self.row, self.column])
        columns, y = np.unique(self.column[x], return_inverse=True)
        return x, y, len(columns), rule.most

    def room(self, room: int) -> int:
        """A limit on sizes above the least, in the units that all sizes are multiples of."""
        return room // self.unit

    def cost_of(self, objective: float) -> float:
        return self.base_cost + objective / self.scale

    def chosen(self, x: np.ndarray) -> Chosen:
        taken = np.flatnonzero(x[: len(self.row)] > 0.5)
        chosen = np.empty(self.rows, np.int64)
        chosen[self.row[taken]] = self.column[taken]
        return chosen

    def solve(self, objective: np.ndarray, room: int | None, seconds: float, gap: float):
        names = len(self.row)
        extra = sum(count for _, _, count, _ in self.rules)
        every = np.arange(names)
        width = names + extra
        one = scipy.sparse.csr_array((np.ones(names), (self.row, every)), (self.rows, width))
        constraints = [scipy.optimize.LinearConstraint(one, 1, 1)]
        if room is not None:
            used = scipy.sparse.csr_array(
                (self.size / self.unit, (np.zeros(names, int), every)), (1, width)
            )
            constraints.append(scipy.optimize.LinearConstraint(used, -np.inf, room))
        first = names
        for x, y, count, most in self.rules:
            line = np.arange(len(x))
            link = scipy.sparse.csr_array(
                (
                    np.concatenate([np.ones(len(x)), -np.ones(len(x))]),
                    (np.concatenate([line, line]), np.concatenate([x, first + y])),
                ),
                (len(x), width),
            )
            few = np.zeros((1, width))
            few[0, first : first + count] = 1
            constraints.append(scipy.optimize.LinearConstraint(link, -np.inf, 0))
            constraints.append(
                scipy.optimize.LinearConstraint(scipy.sparse.csr_array(few), -np.inf, most)
            )
            first += count
        return scipy.optimize.milp(
            np.concatenate([objective, np.zeros(extra)]),
            integrality=np.ones(width),
            bounds=scipy.optimize.Bounds(0, 1),
            constraints=constraints,
            options={"time_limit": max(seconds, 0.01), "mip_rel_gap": gap},
        )
