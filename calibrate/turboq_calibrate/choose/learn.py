"""A learned plan for a budget: candidates -> cheap sensitivity -> solve -> refine -> verify.

    learned = learn_plan(model, 3.25, fit=calibration_windows, check=other_windows)
    plan, arrays, report = learned.plan, learned.arrays, learned.report

`fit` [N, T] serves fitting, sensitivity and refinement, `check` [N, T] (other text) only decides
which of the plans found is returned; neither may be the text that results are reported on. The
uniform plan of the same budget is always among those that are checked, so the result is never worse
than it there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from turboq.cache.layer import TokenPolicy
from turboq.errors import TurboqError
from turboq.files import make_folder
from turboq.plan import Measurement, Plan, Provenance, Quality
from turboq.plan.constraints import Granularity
from turboq_calibrate.candidates.table import Arrays, Maker, Table, build_table, learned_rates
from turboq_calibrate.choose.refine import Chosen, Costs, Refined, refine, solve, total
from turboq_calibrate.cost import Engine, activation_costs
from turboq_calibrate.fit.plan import model_geometry, provenance
from turboq_calibrate.models import Model
from turboq_calibrate.observe.gradients import collect_gradient_samples

SCORE = "output"  # the prediction that ranks units best (`experiments/sensitivity.py`)
SINKS = TokenPolicy(sinks=4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned:
    """The plan, its arrays, and how it came about (JSON-ready); `costs` re-solve other budgets."""

    plan: Plan
    arrays: Arrays
    report: dict[str, Any]
    table: Table
    costs: Costs
    chosen: Chosen


def learn_plan(
    model: Model,
    budget_bits: float | int,
    *,
    fit: Int[np.ndarray, "N T"],
    check: Int[np.ndarray, "M T"],
    granularity: Granularity = "per_head",
    policy: TokenPolicy = SINKS,
    table: Table | None = None,
    sensitivity_windows: int = 2,
    rounds: int = 1,
    refine_windows: int = 1,
    source: Provenance | None = None,
    check_text: str = "validation",
    seed: int = 0,
    folder: Path | str | None = None,
    progress: bool = True,
    **options: Any,
) -> Learned:
    """Learns how to store K and V within `budget_bits` per channel, scales and gains counted.

    Args:
      granularity: what may have a rate of its own, see `refine.solve`.
      table: candidates; by default `transform` at half-bit steps around the budget.
      sensitivity_windows: the first windows of `fit`, on which activations are scored.
      rounds: of refinement; 0 takes the plan that the cheap sensitivity gives.
      refine_windows: the first windows of `fit`, on which KL is measured.
      source: what `fit` is, for the plan's provenance.
      folder: for finished measurements, so that an interrupted call continues.
      options: of the default candidates (`learned.Options`: quantizer, gain, ...).

    Raises:
      TurboqError: the budget is below the smallest plan, or the windows do not fit the model.
    """
    geometry = model_geometry(model)
    if table is None:
        samples = collect_gradient_samples(model, fit, skip=policy.sinks, seed=seed)
        table = build_table(geometry, default_makers(budget_bits, **options), samples)
    limit = int(np.floor(budget_bits * table.channels + 1e-9))
    place = None if folder is None else make_folder(folder)
    few = fit[:sensitivity_windows]
    costs = activation_costs(model, table, few, policy=policy, seed=seed, progress=progress)[SCORE]

    def solver(costs: Costs) -> Chosen:
        return solve(table, costs, limit, granularity)

    found = {"uniform": solve(table, costs, limit, "uniform"), "solved": solver(costs)}
    if rounds and granularity != "uniform":
        engine = Engine(model, table, fit[:refine_windows], policy)
        refined = refine(engine, costs, solver, rounds=rounds, folder=place, progress=progress)
        costs = refined.costs
        found["refined"] = refined.chosen
    else:
        refined = None
    kl = plan_kl(model, table, check, list(found.values()), policy=policy)
    means = dict(zip(found, kl.mean(axis=1).tolist(), strict=True))
    name = min(means, key=lambda n: means[n])
    chosen = found[name]
    report = {
        "budget_bits": budget_bits,
        "granularity": granularity,
        "bits_per_channel": table.bits_per_channel(chosen),
        "kept": name,
        "check": {
            n: {
                "kl_mean": means[n],
                "kl_windows": kl[i].tolist(),
                "bits_per_channel": table.bits_per_channel(found[n]),
            }
            for i, n in enumerate(found)
        },
        "predicted": total(costs, chosen),
        "refinement": [] if refined is None else rounds_report(refined),
        "labels": list(table.labels),
        "chosen": chosen.tolist(),
    }
    plan, arrays = table.to_plan(
        geometry,
        chosen,
        policy=policy,
        provenance=source or dataclasses.replace(provenance(), tokens=fit.size, seed=seed),
        quality=Quality(
            predicted=Measurement(text="calibration", kl_mean=report["predicted"]),
            measured=(Measurement(text=check_text, kl_mean=means[name]),),
        ),
    )
    return Learned(plan=plan, arrays=arrays, report=report, table=table, costs=costs, chosen=chosen)


def default_makers(budget_bits: float | int, **options: Any) -> list[Maker]:
    """`transform` at the budget and in steps of half a bit from 2 below to 2 above (1 at least)."""
    if budget_bits < 1:
        raise TurboqError(f"{budget_bits=} must be at least 1 bit per channel")
    rates = [budget_bits + step / 2 for step in range(-4, 5)]
    named = {f"transform {r:g}": r for r in rates if r >= 1}
    return learned_rates(named, **options)


def plan_kl(
    model: Model,
    table: Table,
    tokens: Int[np.ndarray, "N T"],
    choices: Sequence[Chosen],
    *,
    policy: TokenPolicy,
) -> Float[np.ndarray, "P N"]:
    """Joint KL of whole plans, nats per token, of every plan and window; one window at a time."""
    rows = np.stack(list(choices))
    return np.concatenate(
        [Engine(model, table, tokens[i : i + 1], policy).kl(rows) for i in range(len(tokens))],
        axis=1,
    )


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
