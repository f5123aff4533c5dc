"""First n layers, last m layers, all between: every shape tried, so the answer is exact.

With prefix sums P over layers, the cost of formats a, b, c with the middle from layer n to s is

    P[n, a] + P[s, b] - P[n, b] + P[L, c] - P[s, c]

Series that choose on their own (keys and values) meet in their Pareto fronts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from turboq.plan.constraints import FirstLast
from turboq_calibrate.choose.solver.problem import Infeasible


@dataclasses.dataclass(frozen=True)
class Series:
    """One row per layer: costs and sizes [L, R], and which columns the ends may take."""

    costs: Float[np.ndarray, "L R"]
    sizes: Int[np.ndarray, "L R"]
    outer: Bool[np.ndarray, "L R"]

    def columns(self, shape: Int[np.ndarray, "5"]) -> Int[np.ndarray, "L"]:
        """Column of every layer under (n, s, a, b, c)."""
        n, s, a, b, c = shape
        layers = len(self.costs)
        return np.repeat([a, b, c], [n, s - n, layers - s])


@dataclasses.dataclass(frozen=True)
class Front:
    """Choices that no other beats: rising sizes, falling costs, each as (n, s, a, b, c)."""

    sizes: Int[np.ndarray, "F"]
    costs: Float[np.ndarray, "F"]
    shapes: Int[np.ndarray, "F 5"]

    @classmethod
    def of(cls, parts: Sequence[Front]) -> Front:
        """The front of several."""
        sizes, costs, shapes = (
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("sizes", "costs", "shapes")
        )
        order = np.lexsort((costs, sizes))
        falling = costs[order]
        best_before = np.concatenate(([np.inf], np.minimum.accumulate(falling)[:-1]))
        keep = order[falling < best_before]
        return cls(sizes[keep], costs[keep], shapes[keep])


def allocate(
    series: Sequence[Series], limit: int, rule: FirstLast
) -> tuple[list[Int[np.ndarray, "L"]], float]:
    """Columns of every series, and their cost, which is the least there is.

    Raises:
      Infeasible: with the smallest size of any shape.
    """
    best: tuple[float, list[Int[np.ndarray, "L"]]] | None = None
    smallest: int | None = None
    for fronts in _fronts(series, rule):
        if not all(len(front.sizes) for front in fronts):
            continue
        least = sum(int(front.sizes[0]) for front in fronts)
        smallest = least if smallest is None else min(smallest, least)
        if least > limit:
            continue
        picks = _meet(fronts, limit)
        cost = sum(float(f.costs[i]) for f, i in zip(fronts, picks, strict=True))
        if best is None or cost < best[0]:
            shapes = [f.shapes[i] for f, i in zip(fronts, picks, strict=True)]
            best = cost, [s.columns(shape) for s, shape in zip(series, shapes, strict=True)]
    if best is None:
        raise Infeasible(smallest)
    return best[1], best[0]


def _fronts(series: Sequence[Series], rule: FirstLast) -> Iterator[list[Front]]:
    """What may be combined: one front per series, or with `together` one per series and (n, s)."""
    sums = [_Sums(one) for one in series]
    layers = len(series[0].costs)
    if rule.together:
        for n, ends in _shapes(layers, rule):
            for s in ends:
                yield [Front.of([one.front(n, [s], rule)]) for one in sums]
        return
    fronts = []
    for one in sums:
        front: list[Front] = []
        for n, ends in _shapes(layers, rule):
            front = [Front.of([*front, one.front(n, ends, rule)])]
        fronts.append(front[0] if front else _EMPTY)
    yield fronts


_EMPTY = Front(np.empty(0, np.int64), np.empty(0), np.empty((0, 5), np.int64))


def _shapes(layers: int, rule: FirstLast) -> Iterator[tuple[int, list[int]]]:
    """Every n with its s: n layers first, the end from layer s."""
    for n in range(layers + 1) if rule.first is None else (rule.first,):
        if rule.last is None:
            ends: Iterable[int] = range(n, layers + 1)
        else:
            ends = (layers - rule.last,)
        found = [s for s in ends if n <= s <= layers]
        if found:
            yield n, found


class _Sums:
    """Prefix sums of one series; a column that a layer must not take counts as bad."""

    def __init__(self, series: Series):
        good = np.isfinite(series.costs)
        self.cost = _prefix(np.where(good, series.costs, 0.0))
        self.size = _prefix(series.sizes)
        self.bad = _prefix((~good).astype(np.int64))
        self.bad_outside = _prefix((~(good & series.outer)).astype(np.int64))

    def front(self, n: int, ends: Sequence[int], rule: FirstLast) -> Front:
        """The front over all formats (a, b, c) and the given s."""
        s = np.array(ends)[:, None, None, None]
        every = np.arange(self.cost.shape[1])
        a, b, c = (every.reshape(shape) for shape in ((-1, 1, 1), (1, -1, 1), (1, 1, -1)))
        if n == 0 and not rule.same_ends:
            a = a[:1]  # no layer takes it

        def summed(p: np.ndarray, outside: np.ndarray):
            return outside[n, a] + (p[s, b] - p[n, b]) + (outside[-1, c] - outside[s, c])

        fine = summed(self.bad, self.bad_outside) == 0
        if rule.same_ends:
            fine = fine & (a == c)
        if not fine.any():
            return _EMPTY
        found = np.argwhere(fine)
        shapes = np.column_stack(
            [np.full(len(found), n), np.array(ends)[found[:, 0]], found[:, 1:]]
        )
        return Front(
            np.broadcast_to(summed(self.size, self.size), fine.shape)[fine],
            np.broadcast_to(summed(self.cost, self.cost), fine.shape)[fine],
            shapes,
        )


def _prefix(values: np.ndarray) -> np.ndarray:
    """[L, R] -> [L + 1, R]: sums of the rows before."""
    return np.concatenate([np.zeros_like(values[:1]), values.cumsum(axis=0)])


def _meet(fronts: Sequence[Front], limit: int) -> list[int]:
    """The best entry of each front within the limit; together they do fit."""
    if len(fronts) == 1:
        return [int(np.searchsorted(fronts[0].sizes, limit, side="right")) - 1]
    first, second = fronts
    other = np.searchsorted(second.sizes, limit - first.sizes, side="right") - 1
    cost = np.where(other >= 0, first.costs + second.costs[np.maximum(other, 0)], np.inf)
    i = int(cost.argmin())
    return [i, int(other[i])]
