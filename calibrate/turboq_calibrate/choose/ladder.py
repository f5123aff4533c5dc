"""A ladder of plans from a folder of statistics: all budgets between two, a step apart.

A tier of a (layer, K or V) has the bits of one candidate for all its heads, spent on the heads as
predicted to be best. Of every side's tiers those on its lower convex hull are kept, and the ladder
goes down the segment that loses least per bit first (`turboq.numbers.lower_hull`, as the exporter
for buun-llama.cpp does): rung by rung the greedy solution of the knapsack for its own bits.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from turboq.errors import TurboqError
from turboq.numbers import lower_hull
from turboq.plan import ModelGeometry
from turboq.plan.build import Side
from turboq.plan.ladder import Ladder, LadderSide, Tier, shared
from turboq.plan.types import SIDES, array_name
from turboq_calibrate.candidates.table import Arrays
from turboq_calibrate.choose.budget import Budget
from turboq_calibrate.choose.plan_within import Menu, Wanted, menu
from turboq_calibrate.choose.solver import hull
from turboq_calibrate.choose.within import NoPlan
from turboq_calibrate.fit.plan import provenance
from turboq_calibrate.measure.evaluate import evaluate_texts
from turboq_calibrate.models import Model
from turboq_calibrate.observe.statistics_files import Statistics

GRANULARITIES = ("per_head", "per_kv")


@dataclasses.dataclass(frozen=True)
class Tiers:
    """Ways to store one side of one layer: candidates of its heads, and what they cost together."""

    heads: Int[np.ndarray, "R K"]
    costs: Float[np.ndarray, "R"]
    sizes: Int[np.ndarray, "R"]


def ladder_within(
    statistics: Statistics,
    geometry: ModelGeometry,
    wanted: Wanted,
    low: Budget,
    high: Budget,
    *,
    prepared: Menu | None = None,
    progress: bool = True,
) -> tuple[Ladder, Arrays]:
    """The ladder from the best plan within `high` down to the first within `low`.

    `wanted` says what a plan is chosen from; its budget, between the two, where candidates lie.

    Raises:
      NoPlan: the smallest plan of these candidates is above a budget.
      ValueError: a granularity under which a side of a layer does not fall alone.
    """
    if wanted.granularity not in GRANULARITIES:
        raise ValueError(f"a ladder lowers K or V of one layer at a time: {GRANULARITIES}")
    joins = prepared.table.joint_heads if prepared is not None else wanted.joint
    if joins:
        raise ValueError(f"{joins} joined heads: a ladder lowers K or V alone (joint=0)")
    wanted = dataclasses.replace(wanted, joint=0)
    ready = menu(statistics, geometry, wanted, progress=progress) if prepared is None else prepared
    table, costs = ready.table, ready.costs @ ready.weights
    keys: list[tuple[int, Side]] = [
        (x.index, side) for x in geometry.cache_layers for side in SIDES
    ]
    tiers = [
        side_tiers(costs[table.rows(*key)], table.sizes[table.rows(*key)], wanted.granularity)
        for key in keys
    ]
    columns, loss = descent(
        np.stack([x.costs for x in tiers]),
        np.stack([x.sizes for x in tiers]),
        low.bits(table.channels),
        high.bits(table.channels),
        f"{low.text} to {high.text}",
    )
    used = [list(dict.fromkeys(int(rung[i]) for rung in columns)) for i in range(len(keys))]
    made: list[list[Tier]] = [[] for _ in keys]
    stored: Arrays = {}
    for t in range(max(map(len, used))):
        chosen = np.concatenate([tiers[i].heads[u[min(t, len(u) - 1)]] for i, u in enumerate(used)])
        plan, arrays = table.to_plan(geometry, chosen, policy=ready.policy)
        for i, (layer, side) in enumerate(keys):
            if t < len(used[i]):
                prefix = array_name(layer, side, "")
                own = {name: x for name, x in arrays.items() if name.startswith(prefix)}
                places = shared(own, stored)
                store = plan.layers[plan.position(layer)].side(side)
                named = {name.removeprefix(prefix): place for name, place in places.items()}
                made[i].append(Tier(store=store, arrays=named))
    sides = [
        LadderSide(layer=layer, side=side, tiers=tuple(x))
        for (layer, side), x in zip(keys, made, strict=True)
    ]
    falls = [np.flatnonzero(a != b) for a, b in itertools.pairwise(columns)]
    return Ladder(
        model=geometry, tokens=ready.policy, sides=tuple(sides),
        order=tuple(int(i) for (i,) in falls), loss=tuple(loss), provenance=provenance(statistics),
    ), stored  # fmt: skip


def side_tiers(
    costs: Float[np.ndarray, "K C"], sizes: Int[np.ndarray, "K C"], granularity: str
) -> Tiers:
    """For every candidate: it for all heads, or the best choice of no more bits by head."""
    every = np.arange(costs.shape[1])
    heads = np.repeat(every[:, None], len(costs), axis=1)
    if granularity == "per_head":
        for c in every[np.isfinite(costs).all(axis=0)]:
            limit = int(sizes[:, c].sum())
            found = hull.exchange(costs, sizes, limit, hull.greedy(costs, sizes, limit))
            if found.cost < costs[:, c].sum():
                heads[c] = found.chosen
    at = np.arange(len(costs))
    return Tiers(
        heads=heads,
        costs=np.array([costs[at, row].sum() for row in heads]),
        sizes=np.array([sizes[at, row].sum() for row in heads]),
    )


def descent(
    costs: Float[np.ndarray, "N R"], sizes: Int[np.ndarray, "N R"], low: int, high: int, name: str
) -> tuple[list[Int[np.ndarray, "N"]], list[float]]:
    """Columns of every row on each rung, and what they cost: within `high` bits down to `low`.

    Raises:
      NoPlan: the smallest choice is above `low`.
    """
    start = lower_hull.smallest(costs, sizes)
    if not np.isfinite(hull.total(costs, start)):
        raise NoPlan("a layer's K or V has no candidate that all its heads can take")
    least = int(hull.total(sizes, start))
    if least > low:
        raise NoPlan(f"budget {name}: the smallest plan of these candidates has {least / 8:g}B per "
                     f"token, {name.split()[0]} allows {low / 8:g}B")  # fmt: skip
    found = lower_hull.segments(costs, sizes, start)
    states, bits = [start], [least]
    for i in found.upwards():
        above = states[-1].copy()
        above[found.row[i]] = found.column[i]
        states.append(above)
        bits.append(bits[-1] + int(found.more[i]))
    top = max(n for n, b in enumerate(bits) if b <= high)
    bottom = max(n for n, b in enumerate(bits) if b <= low)
    rungs = states[bottom : top + 1][::-1]
    return rungs, [float(hull.total(costs, chosen)) for chosen in rungs]


def rung_within(ladder: Ladder, budget: Budget) -> int:
    """The best rung within a budget.

    Raises:
      NoPlan: the lowest rung is above it.
    """
    if budget.context is None:
        limit = budget.bits(
            sum(x.kv_heads * (x.k_dim + x.v_dim) for x in ladder.model.cache_layers)
        )
        return first_rung(ladder.rungs, lambda n: ladder.bits[n] / 8, limit / 8, budget.text)
    context, batch = budget.context, budget.batch

    def held(n: int) -> int:
        return ladder.plan_of(ladder.tiers(n)).residency(context, batch).total

    return first_rung(ladder.rungs, held, float(budget.nbytes or 0), budget.text)


def first_rung(rungs: int, size: Callable[[int], float | int], most: float | int, name: str) -> int:
    """The first of `rungs` whose size, which falls with the rungs, is at most `most` bytes.

    Raises:
      NoPlan: the last one is larger; the message names `name` and what it needs.
    """
    last = rungs - 1
    if size(last) > most:
        raise NoPlan(f"{name}: the lowest rung of the ladder needs {size(last):,.12g} B")
    return bisect.bisect_left(range(last), True, key=lambda n: size(n) <= most)


def measured(
    model: Model, statistics: Statistics, ladder: Ladder, stored: Arrays, folder: Path | None = None
) -> list[str]:
    """Lines with the KL of the first, middle and last rung on windows held back from every text.

    Raises:
      TurboqError: statistics hold no such windows.
    """
    held = {statistics.texts[t]: x for t, x in statistics.held_back.short.items()}
    if not held:
        raise TurboqError(
            f"statistics in {statistics.folder} hold no windows to measure on: calibrate with "
            "--check_windows=1 or more, or --nocheck"
        )
    numbers = sorted({0, ladder.rungs // 2, ladder.rungs - 1})
    rows = [(f"rung {n}", *ladder.rung(n, stored)) for n in numbers]
    found = evaluate_texts(model, rows, held, folder=folder)
    lines = ["held back, KL:"]
    for name, _, _ in rows:
        each = [f"{row['text']} {row['kl_mean']:.4g}" for row in found.rows if row["name"] == name]
        lines.append(f"  {name}: {', '.join(each)}")
    return lines
