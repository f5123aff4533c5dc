"""From units to decisions: what constraints tie together is one row, what they forbid is +inf.

A row is a set of units that choose at once. A column is a candidate; where K and V are decided at
once it is a pair of candidates, one for the row's keys and one for its values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int

from turboq.codecs import Codec
from turboq.plan.constraints import Constraints
from turboq_calibrate.choose.solver.problem import Problem


@dataclasses.dataclass(frozen=True)
class Decisions:
    """The knapsack left when every tie and every forbidden candidate is worked in.

    costs, sizes [N, R]: sums over the units of a row. k, v [R]: the candidate that a column means
    for keys and for values. row [U]: the row of a unit. layer [N] and side [N] ("k", "v", or "kv"
    for a pair) of a row; -1 for all layers. counted [R]: columns that `max_formats` counts. outer
    [N, R]: columns that `first_last` lets the ends take.
    """

    costs: Float[np.ndarray, "N R"]
    sizes: Int[np.ndarray, "N R"]
    k: Int[np.ndarray, "R"]
    v: Int[np.ndarray, "R"]
    row: Int[np.ndarray, "U"]
    is_key: Bool[np.ndarray, "U"]
    layer: Int[np.ndarray, "N"]
    side: tuple[str, ...]
    counted: Bool[np.ndarray, "R"]
    outer: Bool[np.ndarray, "N R"]

    def expand(self, chosen: Int[np.ndarray, "N"]) -> Int[np.ndarray, "U"]:
        """Candidate of every unit from a column of every row."""
        column = chosen[self.row]
        return np.where(self.is_key, self.k[column], self.v[column])


def decide(problem: Problem, constraints: Constraints) -> Decisions:
    """Rows and columns of the problem under the constraints; those about counts are left to do."""
    allowed = np.isfinite(problem.costs) & _allowed(problem, constraints)
    costs = np.where(allowed, problem.costs, np.inf)
    keys = [_key(constraints, unit) for unit in problem.units]
    names = sorted(set(keys))
    index = {name: n for n, name in enumerate(names)}
    row = np.array([index[key] for key in keys])
    is_key = np.array([unit.side == "k" for unit in problem.units])
    shape = (len(names), len(problem.labels))
    of_k, of_v = (_sums(costs, problem.sizes, row, which, shape) for which in (is_key, ~is_key))
    sides = tuple(name[2] for name in names)
    layer = np.array([name[0] for name in names])
    if constraints.joint:
        k, v, legal = _pairs(problem, constraints, row, is_key, shape)
        summed = np.where(legal, of_k[0][:, k] + of_v[0][:, v], np.inf)
        sizes = of_k[1][:, k] + of_v[1][:, v]
        used = np.isfinite(summed).any(axis=0)
        if used.any():  # else: nothing is feasible, and the rows say so
            k, v, summed, sizes = k[used], v[used], summed[:, used], sizes[:, used]
    else:
        k = v = np.arange(shape[1])
        summed, sizes = of_k[0] + of_v[0], of_k[1] + of_v[1]
    return Decisions(
        costs=summed,
        sizes=sizes,
        k=k,
        v=v,
        row=row,
        is_key=is_key,
        layer=layer,
        side=sides,
        counted=_counted(problem, constraints, is_key, k, v),
        outer=_outer(problem, constraints, row, is_key, shape, k, v),
    )


def _key(constraints: Constraints, unit) -> tuple[int, int, str]:
    """(layer, head, side) of the decision that a unit belongs to; -1 for all."""
    side = "kv" if constraints.joint else unit.side
    if constraints.granularity == "uniform":
        return (-1, -1, side)
    return (unit.layer, unit.head if constraints.granularity == "per_head" else -1, side)


def _sums(costs, sizes, row, which, shape):
    """Costs and sizes of the units in `which`, added up by row."""
    cost, size = np.zeros(shape), np.zeros(shape, np.int64)
    np.add.at(cost, row[which], costs[which])
    np.add.at(size, row[which], sizes[which])
    return cost, size


def _allowed(problem: Problem, constraints: Constraints) -> Bool[np.ndarray, "U C"]:
    """Candidates that every unit may have by itself."""
    layers = sorted({unit.layer for unit in problem.units})
    position = {layer: i for i, layer in enumerate(layers)}
    seen: dict[tuple[str, int, Codec], bool] = {}

    def asked(side: str, at: int, codec: Codec) -> bool:
        if (side, at, codec) not in seen:
            seen[side, at, codec] = constraints.allows_at(side, codec, at, len(layers))
        return seen[side, at, codec]

    return np.array(
        [
            [asked(unit.side, position[unit.layer], codec) for codec in row]
            for unit, row in zip(problem.units, problem.codecs, strict=True)
        ]
    )


def _pairs(problem: Problem, constraints: Constraints, row, is_key, shape):
    """Columns (k, v) that make a pair, and in which rows: [R], [R], [N, R]."""
    rows, candidates = shape
    if constraints.tied:  # a label is a format, whatever codec it means for a head
        k = v = np.arange(candidates)
    else:
        k, v = (i.ravel() for i in np.indices((candidates, candidates)))
    legal = np.zeros((rows, len(k)), bool) if constraints.schemes else np.ones((rows, len(k)), bool)
    for scheme in constraints.schemes:
        fit_k = _in_row(problem, lambda c, s=scheme: any(m(c) for m in s.k), row, is_key, shape)
        fit_v = _in_row(problem, lambda c, s=scheme: any(m(c) for m in s.v), row, ~is_key, shape)
        legal |= fit_k[:, k] & fit_v[:, v]
    some = legal.any(axis=0)
    return (k[some], v[some], legal[:, some]) if some.any() else (k, v, legal)


def _outer(problem: Problem, constraints: Constraints, row, is_key, shape, k, v):
    """Columns whose codecs `first_last.outer` has: [N, R]."""
    rule = constraints.first_last
    if rule is None or not rule.outer:
        return np.ones((shape[0], len(k)), bool)
    matches = rule.outer
    fit_k, fit_v = (
        _in_row(problem, lambda c: any(m(c) for m in matches), row, which, shape)
        for which in (is_key, ~is_key)
    )
    return fit_k[:, k] & fit_v[:, v]


def _in_row(problem: Problem, test: Callable[[Codec], bool], row, which, shape):
    """Whether a candidate passes for all units of a row that are in `which`: [N, C]."""
    passed = np.ones(shape, bool)
    seen: dict[Codec, bool] = {}
    for u in np.flatnonzero(which):
        for codec in problem.codecs[u]:
            if codec not in seen:
                seen[codec] = test(codec)
        passed[row[u]] &= [seen[codec] for codec in problem.codecs[u]]
    return passed


def _counted(problem: Problem, constraints: Constraints, is_key, k, v) -> Bool[np.ndarray, "R"]:
    """Columns that `max_formats` counts: not counted only if uncounted in all units."""
    if not constraints.uncounted:
        return np.ones(len(k), bool)
    key_rows = {problem.codecs[u] for u in np.flatnonzero(is_key)}
    value_rows = {problem.codecs[u] for u in np.flatnonzero(~is_key)}
    if constraints.joint:
        return np.array(
            [
                any(constraints.counts(a[i], b[j]) for a in key_rows for b in value_rows)
                for i, j in zip(k, v, strict=True)
            ]
        )
    rows = key_rows | value_rows
    return np.array([any(constraints.counts(row[i]) for row in rows) for i in k])
