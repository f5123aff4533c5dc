"""The allocator: the best choice within a limit and constraints, with a proven bound."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from turboq.plan.constraints import Constraints, FirstLast
from turboq_calibrate.choose.solver import exact, first_last, formats, hull, places
from turboq_calibrate.choose.solver.decide import Decisions, decide
from turboq_calibrate.choose.solver.hull import Answer
from turboq_calibrate.choose.solver.problem import Infeasible, Problem, shown

GAP = 1e-4  # relative; a predicted KL is not known so well
SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Allocation:
    """A candidate per unit, in the order of `Problem.units`.

    No choice within the limit and the constraints costs less than `bound`; `gap` is the relative
    distance to it. `used` and `limit` are in the unit of the sizes that were solved for. `method`
    names the way: hull, hull+milp, milp, formats (subsets enumerated), places (also per layer's
    side), first_last (all shapes).
    """

    chosen: Int[np.ndarray, "U"]
    cost: float
    bound: float
    used: int
    limit: int
    method: str
    constraints: Constraints
    binding: bool  # more room could lower the cost

    @property
    def gap(self) -> float:
        """(cost - bound) / |cost|; 0 is proven optimal."""
        return relative_gap(self.cost, self.bound)


def relative_gap(cost: float, bound: float) -> float:
    """(cost - bound) / |cost|, 0 where they are equal."""
    if cost == bound:
        return 0.0
    return (cost - bound) / abs(cost) if cost else float("inf")


def allocate(
    problem: Problem,
    limit: int,
    constraints: Constraints | Sequence[Constraints] = Constraints(),  # noqa: B008
    *,
    sizes: Int[np.ndarray, "U C"] | None = None,
    gap: float = GAP,
    seconds: float = SECONDS,
) -> Allocation:
    """The cheapest choice whose sizes add up to at most `limit`.

    Args:
      constraints: one set, or several of which a plan must obey any one.
      sizes: to count instead of the problem's bits per token (bytes at a context, say).
      gap: stop searching at this relative gap.
      seconds: time limit of an integer program; what is not proven by then shows in `gap`.

    Raises:
      Infeasible: no choice fits, with the smallest size that does.
    """
    if sizes is not None:
        problem = dataclasses.replace(problem, sizes=sizes)
    several = [constraints] if isinstance(constraints, Constraints) else list(constraints)
    if not several:
        raise ValueError("constraints: name one set at least")
    found: list[Allocation] = []
    failed: list[Infeasible] = []
    for one in several:
        try:
            found.append(_allocate(problem, limit, one, gap, seconds))
        except Infeasible as error:
            failed.append(error)
    if not found:
        known = [error.smallest for error in failed if error.smallest is not None]
        raise Infeasible(min(known) if known else None, failed[0].why)
    best = min(found, key=lambda a: a.cost)
    return dataclasses.replace(best, bound=min(a.bound for a in found))


def _allocate(
    problem: Problem, limit: int, constraints: Constraints, gap: float, seconds: float
) -> Allocation:
    rows = decide(problem, constraints)
    empty = ~np.isfinite(rows.costs).any(axis=1)
    if empty.any():
        unit = problem.units[int(np.flatnonzero(empty[rows.row])[0])]
        raise Infeasible(None, f"the constraints leave {shown(unit)} no candidate")
    answer, method = _solve(rows, limit, constraints, gap, seconds)
    chosen = rows.expand(answer.chosen)
    free = float(rows.costs.min(axis=1).sum())
    largest = int(np.where(np.isfinite(rows.costs), rows.sizes, 0).max(axis=1).sum())
    return Allocation(
        chosen=chosen,
        cost=answer.cost,
        bound=answer.bound,
        used=problem.bits(chosen),
        limit=limit,
        method=method,
        constraints=constraints,
        binding=answer.cost > free and limit < largest,
    )


def _solve(
    rows: Decisions, limit: int, constraints: Constraints, gap: float, seconds: float
) -> tuple[Answer, str]:
    costs, sizes = rows.costs, rows.sizes
    if constraints.first_last is not None:
        return _first_last(rows, limit, constraints.first_last), "first_last"
    everywhere, heads = _format_rules(rows, constraints)
    if everywhere is None and not heads:
        answer = hull.exchange(costs, sizes, limit, hull.greedy(costs, sizes, limit))
        if relative_gap(answer.cost, answer.bound) <= gap:
            return answer, "hull"
        return exact.close(costs, sizes, limit, answer, seconds=seconds), "hull+milp"
    until, start = time.monotonic() + seconds, None
    rules = [*heads] if everywhere is None else [everywhere, *heads]
    if not heads and everywhere is not None:
        if formats.countable(costs, rows.counted, everywhere.most):
            return formats.allocate(
                costs, sizes, limit, rows.counted, everywhere.most, gap=gap, seconds=seconds
            ), "formats"
    elif heads:
        start = _by_places(rows, limit, heads, everywhere, gap, seconds)
        if start is not None and relative_gap(start.cost, start.bound) <= gap:
            return start, "places"
    return _search(costs, sizes, limit, rules, gap, until, start), "milp"


def _by_places(
    rows: Decisions, limit: int, heads: list[exact.Distinct], everywhere: exact.Distinct | None,
    gap: float, seconds: float,
) -> Answer | None:  # fmt: skip
    """All combinations of formats per place; None if they are too many."""
    most, columns = heads[0].most, rows.costs.shape[1]
    counted = int(rows.counted.sum())
    subsets = 1
    if everywhere is not None:
        subsets = math.comb(counted, everywhere.most)
        if everywhere.most + columns - counted < most:
            return None
    names = list(zip(rows.layer.tolist(), rows.side, strict=True))
    order = {name: i for i, name in enumerate(dict.fromkeys(names))}
    place = np.array([order[name] for name in names])
    if not places.countable(place, columns, most, subsets):
        return None
    return places.allocate(
        rows.costs, rows.sizes, limit, place, most,
        counted=rows.counted, everywhere=None if everywhere is None else everywhere.most,
        gap=gap, seconds=seconds,
    )  # fmt: skip


def _search(
    costs, sizes, limit: int, rules, gap: float, until: float, start: Answer | None
) -> Answer:
    """Integer programming, from `start` or the smallest choice that the rules allow."""
    if start is None:
        least = exact.least(costs, sizes, rules, seconds=_left(until))
        if least is None:
            raise Infeasible(None, "no choice obeys the rules about formats")
        if (size := int(hull.total(sizes, least))) > limit:
            raise Infeasible(size)
        bound = hull.greedy(costs, sizes, limit).bound  # of more choices than the rules allow
        start = Answer(least, float(hull.total(costs, least)), bound, 0.0)
    return exact.search(
        costs, sizes, limit, rules=rules, start=start, seconds=_left(until), gap=gap
    )


def _left(until: float) -> float:
    return until - time.monotonic()


def _format_rules(
    rows: Decisions, constraints: Constraints
) -> tuple[exact.Distinct | None, list[exact.Distinct]]:
    """Rules about counts of formats that can bind: over the model, and of each layer's heads."""
    everywhere, heads = None, []
    most = constraints.max_formats
    if most is not None and most < rows.counted.sum():
        everywhere = exact.Distinct(np.arange(len(rows.costs)), rows.counted, most)
    most = constraints.max_head_formats
    if most is not None:
        every = np.ones(rows.costs.shape[1], bool)
        places = list(zip(rows.layer.tolist(), rows.side, strict=True))
        for place in dict.fromkeys(places):
            members = np.array([n for n, other in enumerate(places) if other == place])
            if len(members) > most:
                heads.append(exact.Distinct(members, every, most))
    return everywhere, heads


def _first_last(rows: Decisions, limit: int, rule: FirstLast) -> Answer:
    """Rows as series over layers: one of pairs, or one of keys and one of values."""
    kinds = list(dict.fromkeys(rows.side))
    members = [np.flatnonzero([side == kind for side in rows.side]) for kind in kinds]
    series = [first_last.Series(rows.costs[m], rows.sizes[m], rows.outer[m]) for m in members]
    columns, cost = first_last.allocate(series, limit, rule)
    chosen = np.empty(len(rows.costs), np.int64)
    for m, column in zip(members, columns, strict=True):
        chosen[m] = column
    cost = float(hull.total(rows.costs, chosen))  # the same number, summed in the usual order
    return Answer(chosen, cost, cost, 0.0)
