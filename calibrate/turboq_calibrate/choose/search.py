"""A plan for a budget: cheap costs, the allocator, refinement by measured KL, and a check.

The last windows are held back: on them the plan must beat the uniform plan of the same budget, or
the uniform one is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from turboq.cache.layer import TokenPolicy
from turboq.errors import TurboqError
from turboq.files import make_folder
from turboq.plan import Measurement, ModelGeometry, Plan, Quality, TextSource
from turboq.plan.constraints import Constraints
from turboq_calibrate.candidates.table import Arrays, Table
from turboq_calibrate.choose.budget import Budget
from turboq_calibrate.choose.learn import SCORE, plan_kl, rounds_report
from turboq_calibrate.choose.refine import Chosen, Costs, refine
from turboq_calibrate.choose.solver.problem import Problem
from turboq_calibrate.choose.solver.solve import Allocation
from turboq_calibrate.choose.within import record, within
from turboq_calibrate.cost import Engine, activation_costs
from turboq_calibrate.fit.plan import provenance
from turboq_calibrate.models import Model
from turboq_calibrate.observe.texts import Windows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """The choice that is kept, the problem it solves, and how it came about (JSON-ready).

    `checked` is the KL on the windows held back, nats per token, of every plan that was tried.
    """

    allocation: Allocation
    problem: Problem
    kept: str
    held_back: int
    checked: dict[str, float]
    report: dict[str, Any]


def search(
    model: Model,
    table: Table,
    tokens: Int[np.ndarray, "N T"],
    budget: Budget,
    constraints: Sequence[Constraints],
    *,
    policy: TokenPolicy,
    held_back: int = 1,
    sensitivity_windows: int = 1,
    rounds: int = 1,
    costs: Costs | None = None,
    seed: int = 0,
    folder: Path | None = None,
    progress: bool = True,
) -> Found:
    """The best plan found within a budget and any one of `constraints`.

    Args:
      tokens: windows; the last `held_back` only check, the first ones are measured on.
      sensitivity_windows: how many windows activations are scored on.
      rounds: of refinement around the solved plan (`refine`), on one window; 0 for none.
      costs: of an earlier search under the same policy; None scores activations.
      folder: for finished measurements, so that an interrupted call continues.

    Raises:
      TurboqError: nothing fits the budget, or too few windows.
    """
    if not 1 <= held_back < len(tokens):
        raise TurboqError(f"{len(tokens)} windows: need {held_back} to check and one more at least")
    fit, check = tokens[:-held_back], tokens[-held_back:]
    if costs is None:
        few = fit[:sensitivity_windows]
        scores = activation_costs(model, table, few, policy=policy, seed=seed, progress=progress)
        costs = scores[SCORE]

    seen: dict[bytes, Allocation] = {}

    def solve(costs: Costs) -> Chosen:
        found = within(Problem.of(table, costs), budget, constraints, policy=policy)
        seen[found.chosen.tobytes()] = found
        return found.chosen

    tried = {"solved": seen[solve(costs).tobytes()]}
    rows: list[dict[str, Any]] = []
    if rounds:
        engine = Engine(model, table, fit[:1], policy)
        place = None if folder is None else make_folder(folder / _key(table, budget, constraints))
        refined = refine(engine, costs, solve, rounds=rounds, folder=place, progress=progress)
        tried["refined"] = seen[refined.chosen.tobytes()]
        rows = rounds_report(refined)
    same_everywhere = uniform(constraints)
    if same_everywhere:
        # A budget between the smallest plan and the smallest uniform one leaves nothing to compare.
        with contextlib.suppress(TurboqError):
            tried["uniform"] = within(
                Problem.of(table, costs), budget, same_everywhere, policy=policy
            )
    choices = [allocation.chosen for allocation in tried.values()]
    kl = plan_kl(model, table, check, choices, policy=policy).mean(axis=1)
    checked = dict(zip(tried, kl.tolist(), strict=True))
    kept = min(checked, key=lambda name: checked[name])
    return Found(
        allocation=tried[kept],
        problem=Problem.of(table, costs),
        kept=kept,
        held_back=held_back,
        checked=checked,
        report=record(tried[kept], budget)
        | {"kept": kept, "checked": checked, "check_windows": held_back, "refinement": rows},
    )


def _key(table: Table, budget: Budget, constraints: Sequence[Constraints]) -> str:
    """Name of the measurements of one search, so that another one does not meet them."""
    what = [table.sha256, budget.text, [one.config() for one in constraints]]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def uniform(constraints: Sequence[Constraints]) -> list[Constraints]:
    """The same rules with one choice for the whole model, where they have such a plan."""
    return [
        dataclasses.replace(
            one,
            granularity="uniform",
            same_k_v=one.tied,
            first_last=None,
            max_head_formats=None,
        )
        for one in constraints
        if one.first_last is None or not one.first_last.outer
    ]


def plan_of(
    found: Found, table: Table, geometry: ModelGeometry, windows: Windows, policy: TokenPolicy
) -> tuple[Plan, Arrays]:
    """The plan of what was found, with the text it comes from and both qualities."""
    source = dataclasses.replace(
        provenance(),
        texts=(TextSource(name=windows.source, sha256=windows.text_sha256),),
        tokens=windows.tokens.size - found.held_back * windows.tokens.shape[1],
        max_position=windows.tokens.shape[1],
        recipe={"allocation": found.report},
    )
    predicted = Measurement(text=windows.source, kl_mean=found.allocation.cost)
    measured = Measurement(
        text=f"{windows.source} (windows held back)", kl_mean=found.checked[found.kept]
    )
    return table.to_plan(
        geometry,
        found.allocation.chosen,
        policy=policy,
        provenance=source,
        quality=Quality(predicted=predicted, measured=(measured,)),
    )
