"""At most n formats in each layer's K or V: every n columns are tried, by their convex hull.

The rows of a place (the heads of one layer's K or V) decide as one row of a larger knapsack. Its
columns are the vertices of the lower convex hull of (size, cost) of every combination of n
formats: all heads at their least size, then hull segments of all heads in order of gain per bit.
Relaxed to fractions that is the same problem, so its bound holds; its choices are between vertices
only, so the heads then choose again, each among the formats of its place. With two formats, each of
one size in all heads of a place, the vertices are all choices that can be best (for every number of
heads with the larger format those that gain most), and integer programming may close the gap.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
from jaxtyping import Bool, Float, Int

from turboq.numbers.lower_hull import segments, smallest
from turboq_calibrate.choose.solver import formats, hull
from turboq_calibrate.choose.solver.hull import Answer, Costs, Sizes
from turboq_calibrate.choose.solver.problem import Infeasible

_ENTRIES = 20_000_000  # of the larger knapsack, in all subsets


@dataclasses.dataclass(frozen=True)
class Places:
    """The larger knapsack: costs, sizes [M, P * Q] of M places, P combinations, Q vertices.

    Entries without a vertex cost inf. combinations [P, n] are columns of the plain problem. start
    [N, P]: the column of every row at the first vertex of a combination; segment i takes row[i] of
    place[i] to column[i] and leads to vertex[i] of combination[i].
    """

    costs: Float[np.ndarray, "M PQ"]
    sizes: Int[np.ndarray, "M PQ"]
    combinations: Int[np.ndarray, "P n"]
    start: Int[np.ndarray, "N P"]
    row: Int[np.ndarray, "I"]
    column: Int[np.ndarray, "I"]
    place: Int[np.ndarray, "I"]
    combination: Int[np.ndarray, "I"]
    vertex: Int[np.ndarray, "I"]

    def choices(
        self, chosen: Int[np.ndarray, "M"], place: Int[np.ndarray, "N"]
    ) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "M"]]:
        """Column of every row, and combination of every place, of a choice of vertices."""
        combination, vertex = np.divmod(chosen, self.costs.shape[1] // len(self.combinations))
        out = self.start[np.arange(len(place)), combination[place]]
        taken = self.combination == combination[self.place]
        taken &= self.vertex <= vertex[self.place]
        out[self.row[taken]] = self.column[taken]  # in order: a row's last segment stays
        return out, combination


def countable(place: Int[np.ndarray, "N"], columns: int, most: int, subsets: int) -> bool:
    """Whether all combinations can be tried."""
    vertices = int(np.bincount(place).max()) * (most - 1) + 1
    combinations = math.comb(columns, min(most, columns))
    return int(place.max() + 1) * combinations * vertices * subsets <= _ENTRIES


def allocate(
    costs: Costs,
    sizes: Sizes,
    limit: int,
    place: Int[np.ndarray, "N"],
    most: int,
    *,
    counted: Bool[np.ndarray, "R"] | None = None,
    everywhere: int | None = None,
    gap: float,
    seconds: float,
) -> Answer:
    """A choice with at most `most` columns in each place, and a bound on all such choices.

    Args:
      place: number of every row's place, from 0.
      counted, everywhere: at most so many of the counted columns in all places together.

    Raises:
      Infeasible: with the smallest size of all such choices.
    """
    usable = np.flatnonzero(np.isfinite(costs).any(axis=0))
    wide = places(costs, sizes, place, usable, most)
    groups = _groups(wide, usable, counted, everywhere)
    if wide.combinations.shape[1] > 2 or not _same_sizes(costs, sizes, place):
        gap = math.inf
    found = formats.best(wide.costs, wide.sizes, limit, groups, gap=gap, seconds=seconds)
    chosen, combination = wide.choices(found.chosen, place)
    allowed = np.zeros((len(combination), costs.shape[1]), bool)
    np.put_along_axis(allowed, wide.combinations[combination], True, axis=1)
    narrow = np.where(allowed[place], costs, np.inf)
    cost = float(hull.total(costs, chosen))
    start = Answer(chosen, cost, min(found.bound, cost), found.price)
    return hull.exchange(narrow, sizes, limit, start)


def places(
    costs: Costs, sizes: Sizes, place: Int[np.ndarray, "N"], usable: Int[np.ndarray, "R"], most: int
) -> Places:
    """The larger knapsack of all combinations of `most` of the usable columns."""
    take = min(most, len(usable))
    combinations = np.array(list(itertools.combinations(usable.tolist(), take)), int)
    count, rows = len(combinations), len(costs)
    if not count:
        raise Infeasible(None)
    # Row n of combination p is row n * P + p of one stack; its group is place * P + p.
    stack_costs = costs[:, combinations].reshape(rows * count, take)
    stack_sizes = sizes[:, combinations].reshape(rows * count, take)
    group = (place[:, None] * count + np.arange(count)[None, :]).reshape(-1)
    groups = (int(place.max()) + 1) * count
    never = np.zeros(groups, bool)
    empty = ~np.isfinite(stack_costs).any(axis=1)
    np.logical_or.at(never, group, empty)
    stack_costs[empty, 0] = 0.0  # so that the rest can be computed; the group is dropped below
    start = smallest(stack_costs, stack_sizes)
    row, step, column, more, less, gain = segments(stack_costs, stack_sizes, start)
    order = np.lexsort((step, row, -gain, group[row]))
    of_group = group[row][order]
    length = np.bincount(of_group, minlength=groups)
    vertices = int(length.max(initial=0)) + 1
    position = np.arange(len(order)) - (np.cumsum(length) - length)[of_group] + 1
    at = np.arange(len(start))
    cost, size = np.zeros((groups, vertices)), np.zeros((groups, vertices), np.int64)
    np.add.at(cost[:, 0], group, stack_costs[at, start])
    np.add.at(size[:, 0], group, stack_sizes[at, start])
    cost[of_group, position] = -less[order]
    size[of_group, position] = more[order]
    cost, size = cost.cumsum(axis=1), size.cumsum(axis=1)
    beyond = np.arange(vertices)[None, :] > length[:, None]
    cost = np.where(beyond | never[:, None], np.inf, cost)
    shape = (groups // count, count * vertices)
    which = row[order] % count
    return Places(
        costs=cost.reshape(shape),
        sizes=size.reshape(shape),
        combinations=combinations,
        start=combinations[np.arange(count)[None, :], start.reshape(rows, count)],
        row=row[order] // count,
        column=combinations[which, column[order]],
        place=of_group // count,
        combination=which,
        vertex=position,
    )


def _same_sizes(costs: Costs, sizes: Sizes, place: Int[np.ndarray, "N"]) -> bool:
    """Whether every column has one size in all rows of a place that allow it."""
    count = int(place.max()) + 1
    largest = np.zeros((count, costs.shape[1]), np.int64)
    least = np.full(largest.shape, np.iinfo(np.int64).max)
    allowed = np.isfinite(costs)
    np.maximum.at(largest, place, np.where(allowed, sizes, 0))
    np.minimum.at(least, place, np.where(allowed, sizes, np.iinfo(np.int64).max))
    return bool(np.all(least >= largest))


def _groups(
    wide: Places,
    usable: Int[np.ndarray, "R"],
    counted: Bool[np.ndarray, "R"] | None,
    everywhere: int | None,
) -> Int[np.ndarray, "S n"]:
    """Columns of the larger knapsack that go together: one set per subset of counted formats."""
    count = len(wide.combinations)
    vertices = wide.costs.shape[1] // count
    if everywhere is None or counted is None:
        return np.arange(count * vertices)[None, :]
    subsets = formats.subsets_of(usable, counted, everywhere)
    inside = np.zeros((len(subsets), len(counted)), bool)
    np.put_along_axis(inside, subsets, True, axis=1)
    within = inside[:, wide.combinations].all(axis=2)  # [S, P], as many in every row
    which = np.nonzero(within)[1].reshape(len(subsets), -1)
    return (which[:, :, None] * vertices + np.arange(vertices)).reshape(len(subsets), -1)
