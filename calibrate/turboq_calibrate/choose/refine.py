"""From costs to a plan, and from the plan's measured KL back to the costs, until both agree.

At two or three bits errors do not add up, and costs measured around the exact model rank units as
they matter there. So the solved plan is measured: its joint KL, and what it gains or loses when all
heads of one layer's K or V go one candidate up or down (`sensitivity.measure`, around the plan, the
noise of all others held still). The ratio of measured to predicted change rescales the costs of
that layer and side, one common factor makes the predicted total the measured one, and the problem
is solved again. The plan with the least joint KL stays.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from turboq_calibrate.candidates.table import Table
from turboq_calibrate.cost.measured import Move, measure
from turboq_calibrate.cost.side_by_side import Engine

Costs = Float[np.ndarray, "U C"]
Chosen = Int[np.ndarray, "U"]
Solve = Callable[[Costs], Chosen]

NOISE = float(np.log(2))  # of the log of a measured ratio: smaller ones are mostly disregarded
LARGEST = 16.0  # ratios (and changes of the wrong sign) count as no more than this


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
    """One plan of the search: `predicted` from the costs it was solved with, `measured` jointly.

    `changes`: (layer, side, direction, predicted, measured) of every move that was then tried.
    """

    chosen: Chosen
    predicted: float
    measured: float
    changes: tuple[tuple[int, str, str, float, float], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refined:
    """The best plan found, the re-fitted costs, and every plan on the way."""

    chosen: Chosen
    costs: Costs
    rounds: tuple[Round, ...]


def refine(
    engine: Engine,
    costs: Costs,
    solver: Solve,
    *,
    weights: Float[np.ndarray, "W"] | None = None,
    rounds: int = 2,
    rows: int = 8,
    folder: Path | None = None,
    progress: bool = True,
) -> Refined:
    """Solves, measures around the solution, re-fits the costs and solves again, `rounds` times.

    Costs two joint passes and about L (K and V up and down, from each layer on) per round.

    Args:
      engine: the windows to measure on; not those that judge the result.
      solver: choice of the cheapest plan under given costs.
      weights: of the windows, sum 1; None: equal.
      folder: where finished measurements are kept, so that an interrupted call continues.
    """
    table = engine.table
    weights = np.full(engine.windows, 1 / engine.windows) if weights is None else weights
    chosen = solver(costs)
    seen: list[Round] = []
    for number in range(rounds + 1):
        joint = float(engine.kl(chosen[None])[0] @ weights)
        at = Round(chosen=chosen, predicted=total(costs, chosen), measured=joint)
        seen.append(at)
        if number == rounds:
            break
        moves, sides = layer_moves(table, chosen)
        found = measure(
            engine, moves, base=chosen, rows=rows, progress=progress,
            path=None if folder is None else folder / f"moves-{_name(table, chosen)}.jsonl",
        )  # fmt: skip
        expected = np.array([sum(costs[u, c] - costs[u, chosen[u]] for u, c in m.changes)
                             for m in moves])  # fmt: skip
        change = (found.kl - found.base) @ weights
        costs = refit(table, costs, sides, expected, change)
        costs = costs * (joint / max(total(costs, chosen), 1e-30))
        named = zip(sides, expected, change, strict=True)
        seen[-1] = dataclasses.replace(
            at, changes=tuple((*s, float(e), float(m)) for s, e, m in named)
        )
        again = solver(costs)
        if any(np.array_equal(again, r.chosen) for r in seen):
            break
        chosen = again
    best = min(seen, key=lambda r: r.measured)
    return Refined(chosen=best.chosen, costs=costs, rounds=tuple(seen))


def _name(table: Table, chosen: Chosen) -> str:
    """Of the moves around one plan, so that searches may share a folder."""
    return hashlib.sha256(table.sha256.encode() + chosen.tobytes()).hexdigest()[:16]


def total(costs: Costs, chosen: Chosen) -> float:
    """Sum of the costs of a choice."""
    return float(costs[np.arange(len(chosen)), chosen].sum())


def layer_moves(
    table: Table, chosen: Chosen
) -> tuple[tuple[Move, ...], list[tuple[int, str, str]]]:
    """Every layer's K and V one candidate up and one down, all heads at once, where there is one.

    Up is the next larger stored size of each unit, down the next smaller. Returns the moves and the
    (layer, side, direction) of each.
    """
    moves, names = [], []
    for layer, side in sorted(table.options):
        rows = range(*table.rows(layer, side).indices(len(table.units)))
        for direction in ("up", "down"):
            changes = []
            for u in rows:
                to = neighbour(table.sizes[u], int(chosen[u]), up=direction == "up")
                if to is not None:
                    changes.append((u, to))
            if changes:
                moves.append(Move(layer=layer, changes=tuple(changes)))
                names.append((layer, side, direction))
    return tuple(moves), names


def neighbour(sizes: Int[np.ndarray, "C"], at: int, *, up: bool) -> int | None:
    """Candidate of the next larger (or smaller) size; None at the end."""
    other = np.flatnonzero(sizes > sizes[at] if up else sizes < sizes[at])
    if not len(other):
        return None
    return int(other[np.argmin(sizes[other]) if up else np.argmax(sizes[other])])


def refit(
    table: Table,
    costs: Costs,
    sides: Sequence[tuple[int, str, str]],
    expected: Float[np.ndarray, "N"],
    measured: Float[np.ndarray, "N"],
) -> Costs:
    """Costs of every layer's K and V times exp(r^3 / (r^2 + NOISE^2)).

    r is the log of measured over expected spread of its moves, within 1/`LARGEST`..`LARGEST`; the
    spread is the change of the move down minus that of the move up, so that what both have in
    common (the noise of the plan at hand) cancels. A ratio near 1 may be noise and is shrunk
    towards it, one of ten is taken nearly as it is.
    """
    spread: dict[tuple[int, str], np.ndarray] = {}
    for (layer, side, direction), e, m in zip(sides, expected, measured, strict=True):
        sign = -1.0 if direction == "up" else 1.0
        spread.setdefault((layer, side), np.zeros(2))
        spread[layer, side] += sign * np.array([e, m])
    out = costs.copy()
    for (layer, side), (e, m) in spread.items():
        if e <= 0:
            continue  # the costs see no difference: there is nothing to rescale
        r = np.log(np.clip(m / e, 1 / LARGEST, LARGEST))
        out[table.rows(layer, "k" if side == "k" else "v")] *= np.exp(r**3 / (r**2 + NOISE**2))
    return out


def rounds_report(refined: Refined) -> list[dict[str, Any]]:
    """Predicted and measured KL of every plan on the way, and of the moves around it."""
    return [
        {
            "predicted": r.predicted,
            "measured": r.measured,
            "moves": [
                dict(zip(("layer", "side", "direction", "predicted", "measured"), c, strict=True))
                for c in r.changes
            ],
        }
        for r in refined.rounds
    ]
