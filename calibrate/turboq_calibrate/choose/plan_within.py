"""A plan within a budget, from a folder of statistics: the one function behind `turboq plan`.

    table   candidates of every (layer, KV head, K or V), fitted to what was observed
    costs   nats per token, predicted from the same folder: no model is run
    choose  the cheapest choice within the budget (and refined by measured KL, if asked for)
    check   against uniform plans on windows held back from every text, and at another length

Without a model the choice itself takes seconds and nothing is checked.
"""

# pyright: strict

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from turboq.cache.layer import TokenPolicy
from turboq.codecs.fit_joint import fit_joint, heads_joined, observed_units
from turboq.codecs.fit_transform import TransformOptions
from turboq.codecs.observed import Observed
from turboq.errors import TurboqError
from turboq.files import make_folder
from turboq.plan import Measurement, ModelGeometry, Plan, Quality
from turboq.plan.build import Side
from turboq.plan.constraints import Constraints, Granularity
from turboq.plan.geometry import ROPE_FORMS, RopeForm
from turboq_calibrate.candidates.makers import (
    DEFAULT,
    default_makers,
    engine_menu,
    learned_word,
    makers_of,
    options_of,
    smallest_dim,
)
from turboq_calibrate.candidates.table import Arrays, Table, build_table
from turboq_calibrate.choose.budget import Budget
from turboq_calibrate.choose.check import (
    Checked,
    Plans,
    Rivals,
    check_plans,
    judged,
    rivals,
)
from turboq_calibrate.choose.refine import refine, rounds_report
from turboq_calibrate.choose.solver.problem import Problem
from turboq_calibrate.choose.solver.solve import Allocation
from turboq_calibrate.choose.within import NoPlan, record, within
from turboq_calibrate.choose.worst_text import least_worst
from turboq_calibrate.cost.predicted import predicted_costs
from turboq_calibrate.cost.side_by_side import Engine
from turboq_calibrate.fit.guard import Guarded, guard
from turboq_calibrate.fit.plan import check_statistics, provenance
from turboq_calibrate.models import Model
from turboq_calibrate.observe.statistics_files import Statistics

OBJECTIVES = ("mean", "worst")
SINKS = TokenPolicy(sinks=4)
# A stored gain of 4 bits: what text of another kind needs most is another size of vectors.
LEARNED = options_of(DEFAULT, TransformOptions(gain="code", gain_bits=4))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a plan is chosen within, and how.

    candidates: as on the command line (`candidates.makers`); none: learned transforms around the
      budget. engine: only what that engine loads, which decides candidates, granularity and k_rope.
    granularity: what may choose on its own: "uniform" (all K, all V), "per_layer", "per_kv" (K or V
      of a layer), "per_head".
    policy: tokens kept exact; policies: several to choose among at the budget's context, by what
      the check measures. k_rope: keys stored "before" or "after" their rotary embedding, or
      relative to their "block:P" of positions; None: before, where any layer has one.
    objective: least predicted loss over the "mean" of the calibration texts, or on the "worst".
    options: of the learned transforms; with `guard` their shrinkage is chosen on texts left out,
      where no text is the model's own: what it writes is of no one kind already.
    rounds: refinements by KL measured around the plan (need the model).
    joint: so many neighbouring KV heads have their keys and values stored as one vector
      (`turboq.cache.joint`); 0: none; None: as many as `fit_joint.heads_joined` says, where all
      candidates are learned and keys are not stored after RoPE.

    Raises:
      ValueError: an unknown objective, a negative number of rounds, policies without a context or
        with an engine.

    Examples:
      >>> from turboq_calibrate import Budget, Wanted
      >>> wanted = Wanted(budget=Budget.parse("3bpc"), candidates=("per_head:2,3,4",))
      >>> wanted.granularity, wanted.policy.sinks
      ('per_head', 4)
    """

    budget: Budget
    candidates: tuple[str, ...] = ()
    engine: str | None = None
    granularity: Granularity = "per_head"
    policy: TokenPolicy = SINKS
    policies: tuple[TokenPolicy, ...] = ()
    k_rope: RopeForm | None = None
    objective: str = "mean"
    options: TransformOptions = LEARNED
    guard: bool = True
    rounds: int = 0
    joint: int | None = None

    def __post_init__(self):
        if self.objective not in OBJECTIVES:
            raise ValueError(f"{self.objective=} must be one of {OBJECTIVES}")
        if self.rounds < 0:
            raise ValueError(f"{self.rounds=} must be 0 or more")
        if self.policies and (self.engine is not None or self.budget.context is None):
            raise ValueError(f"{self.policies=} need a budget at a context, and no engine")
        if self.engine is not None and (self.k_rope is not None or self.candidates):
            raise ValueError(f"{self.k_rope=} and {self.candidates=}: {self.engine=} decides these")
        if self.joint is not None and self.joint < 0:
            raise ValueError(f"{self.joint=} must be heads that are joined, 0 for none, or None")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """A plan, its arrays, and how it came about.

    `kept` names the plan: "chosen", "refined", or the uniform rival that the check preferred.
    `allocation` is the kept one, of a rival the chosen one; `problem` is what was solved and
    `checked` None where no model was given.
    """

    plan: Plan
    arrays: Arrays
    kept: str
    allocation: Allocation
    problem: Problem
    checked: Checked | None
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Menu:
    """Candidates with predicted costs [U, C, X] by text, the weights of the texts, and the rules
    that a choice obeys.

    Depends on the statistics and on what is wanted except for the budget's number, the objective
    and the granularity: other budgets are solved from it in no time.
    """

    table: Table
    costs: Float[np.ndarray, "U C X"]
    weights: Float[np.ndarray, "X"]
    constraints: tuple[Constraints, ...]
    policy: TokenPolicy
    notes: tuple[str, ...]
    guarded: Guarded

    def under(self, wanted: Wanted) -> Menu:
        """The same candidates for another granularity, where no engine decides it."""
        if wanted.engine is not None:
            return self
        return dataclasses.replace(self, constraints=_own_rules(wanted))


def menu(
    statistics: Statistics, geometry: ModelGeometry, wanted: Wanted, *, progress: bool = True
) -> Menu:
    """Fits all candidates and predicts their costs.

    Raises:
      TurboqError: statistics of another model, or without what a candidate needs; `wanted.k_rope`
        of keys without a rotary embedding.
    """
    check_statistics(statistics, geometry)
    constraints = _own_rules(wanted)
    policy, notes, makers = wanted.policy, (), None
    if wanted.engine is not None:
        found = engine_menu(wanted.engine, geometry, policy)
        makers, constraints, k_rope = found.makers, found.constraints, "after"
        notes, policy = tuple(found.notes(policy)), found.policy
    else:
        k_rope = statistics.geometry.key_form(wanted.k_rope)  # captured: as its keys stand

    heads = _joined(statistics, geometry, wanted, k_rope)
    bits = _bits_near(geometry, wanted.budget, heads)
    joint: dict[int, Arrays] = {}

    @functools.lru_cache(maxsize=1)
    def units(layer: int) -> tuple[Observed, Observed]:
        seen = statistics.layers[layer]
        k, v = seen.observed("k", rope=k_rope), seen.observed("v")
        if layer not in joint:
            assert heads is not None
            joint[layer] = fit_joint(k, v, heads, ridge=wanted.options.ridge)
        return observed_units(k, v, joint[layer])

    def observed(layer: int, side: Side) -> Observed:
        if heads is not None:
            return units(layer)[side == "v"]
        return statistics.layers[layer].observed(side, rope=k_rope if side == "k" else "after")

    guarded = Guarded(options=wanted.options, held_out={})
    if makers is None:
        learns = not wanted.candidates or any(learned_word(w) for w in wanted.candidates)
        own = any(name.startswith("self:") for name in statistics.texts)
        if learns and wanted.guard and not own:
            layers = [layer.index for layer in geometry.cache_layers]
            guarded = guard(
                observed, layers, wanted.options, min(max(bits, 0.5), 8.0), progress=progress
            )
        if wanted.candidates:
            makers = makers_of(wanted.candidates, geometry, guarded.options, bits)
        else:
            makers = default_makers(bits, smallest_dim(geometry), guarded.options)
    table = build_table(
        geometry, makers, observed, source=statistics.sha256, k_rope=k_rope,
        joint_heads=heads, joint=joint, progress=progress,
    )  # fmt: skip
    costs = predicted_costs(table, observed, progress=progress)
    _check_texts(costs, statistics.texts)
    return Menu(
        table=table, costs=costs, weights=statistics.weights, constraints=constraints,
        policy=policy, notes=notes, guarded=guarded,
    )  # fmt: skip


def _bits_near(geometry: ModelGeometry, budget: Budget, joined: int | None) -> float:
    """Bits per channel that are about what the budget allows; two whole turns a vector go off."""
    channels: Counter[int | None] = Counter()
    turns = 0  # bytes: of joined heads int8, else float32
    for x in geometry.cache_layers:
        channels[geometry.kept_window(x.index)] += x.kv_heads * (x.k_dim + x.v_dim)
        apart = 4 * x.kv_heads * (x.k_dim**2 + x.v_dim**2)
        turns += 2 * (x.kv_heads * joined * (x.k_dim + x.v_dim) ** 2 if joined else apart)
    return budget.bits_near(channels, turns) / channels.total()


def _joined(
    statistics: Statistics, geometry: ModelGeometry, wanted: Wanted, k_rope: RopeForm
) -> int | None:
    """Heads that are joined in every layer, None for none (`Wanted.joint`)."""
    layers = geometry.cache_layers
    unturned = k_rope != "after" or not any(layer.turns_keys for layer in layers)
    learns = all(learned_word(word) for word in wanted.candidates)
    if wanted.joint is not None:
        if wanted.joint and (wanted.engine is not None or not unturned):
            raise TurboqError(
                f"--joint={wanted.joint}: keys are joined before RoPE or in blocks (--k_rope="
                "before or block:P), and engines read none (no --engine)"
            )
        odd = [x for x in layers if wanted.joint and x.kv_heads % wanted.joint]
        if odd:
            raise TurboqError(
                f"--joint={wanted.joint} does not divide the {odd[0].kv_heads} KV heads of layer "
                f"{odd[0].index}"
            )
        return wanted.joint or None
    if not (learns and unturned and wanted.engine is None):
        return None
    seen = statistics.layers[layers[0].index].observed("v")
    if not seen.gradients:
        return None
    tokens = seen.x.shape[1]
    most = [heads_joined(x.kv_heads, x.k_dim, x.v_dim, tokens) for x in layers]
    return math.gcd(*most) if all(most) else None


def _ready(statistics: Statistics, geometry: ModelGeometry, wanted: Wanted, progress: bool) -> Menu:
    """The menu; at a context, where turns of joined heads may weigh more than what they save, that
    of heads joined or apart whose choice is predicted to lose less."""
    found = menu(statistics, geometry, wanted, progress=progress)
    free = wanted.budget.context is not None and wanted.joint is None
    if not free or found.table.joint_heads is None:
        return found

    def loss(one: Menu) -> float:
        try:
            problem, best = solve(one, wanted)
        except NoPlan:
            return math.inf
        return problem.cost(best.chosen)

    apart = menu(statistics, geometry, dataclasses.replace(wanted, joint=0), progress=progress)
    return min(found, apart, key=loss)


def solve(menu: Menu, wanted: Wanted) -> tuple[Problem, Allocation]:
    """The cheapest choice within the budget under the objective.

    Raises:
      TurboqError: nothing fits; the message names the smallest budget that does.
    """

    def at(costs: Float[np.ndarray, "U C"]) -> Allocation:
        problem = Problem.of(menu.table, costs)
        return within(problem, wanted.budget, menu.constraints, policy=menu.policy)

    if wanted.objective == "worst":
        weights = least_worst(menu.costs, lambda costs: at(costs).chosen)
    else:
        weights = menu.weights
    costs = menu.costs @ weights
    return Problem.of(menu.table, costs), at(costs)


def plan_within(
    statistics: Statistics,
    geometry: ModelGeometry,
    wanted: Wanted,
    *,
    model: Model | None = None,
    folder: Path | None = None,
    force: bool = False,
    prepared: Menu | None = None,
    progress: bool = True,
    log: Callable[[str], None] = print,
) -> Found:
    """The best plan found within a budget.

    At a context the check compares plans on its longer windows, if the context is beyond the
    short ones; of several policies each has plans of its own, measured together.

    Args:
      statistics: of that model (`turboq calibrate`).
      model: to check the plan on (and to refine it); None: the choice alone, unchecked.
      folder: for finished measurements, so that an interrupted call continues.
      force: keep a plan that the check refuses, with a line that says so.
      prepared: of an earlier `menu` under the same candidates.

    Raises:
      TurboqError: statistics lack what is needed.
      NoPlan: nothing fits the budget, or every plan loses to `turboquant_mse` of the same bytes at
        a length that was not calibrated on (a TurboqError).
      ValueError: policies to choose among without a model.

    Examples:
      >>> import turboq_calibrate as tc
      >>> model = tc.load_model("embedded")
      >>> statistics = tc.load_statistics("run")  # what `calibrate` wrote
      >>> wanted = tc.Wanted(budget=tc.Budget.parse("4bpc"), candidates=("turboquant_mse:2,3,4",))
      >>> found = tc.plan_within(
      ...     statistics, tc.model_geometry(model), wanted, progress=False, log=lambda line: None
      ... )
      >>> found.kept, found.plan.bits_per_channel() <= 4
      ('chosen', True)
    """
    if wanted.policies and model is None:
        raise ValueError("policies are compared by what the check measures: name a model")
    ready = prepared or _ready(statistics, geometry, wanted, progress)
    every: dict[str, _Tried] = {}
    for policy in wanted.policies or (ready.policy,):
        of = f"{policy.sinks}:{policy.recent} " if wanted.policies else ""
        mine = dataclasses.replace(ready, policy=policy)
        try:
            every[of] = _try(statistics, geometry, mine, wanted, model, folder, progress)
        except NoPlan as error:
            if not wanted.policies:
                raise
            log(f"{_said(policy)}: {error}")
    if not every:
        raise NoPlan(f"{wanted.budget.text}: no policy leaves room for a plan that can be checked")
    kept, checked, (best_of,) = "chosen", None, tuple(every)[:1]
    if model is not None:
        plans, baselines, beside = _together(every)
        checked = check_plans(
            model, statistics, plans, baselines, beside, context=wanted.budget.context,
            objective=wanted.objective, folder=folder, force=force, progress=progress, log=log,
        )  # fmt: skip
        owner = {of + name: (of, name) for of, one in every.items() for name in one.plans}
        best_of, kept = owner[checked.kept]
        for of, one in every.items() if wanted.policies else ():
            least = min(checked.loss(of + name) for name in one.plans)
            log(f"{_said(one.policy)}: KL at {checked.length} tokens held back {least:.6g}")
        _say_length(checked.length, wanted.budget.context, model.spec.context, log)
    best = every[best_of]
    problem, tried, rounds = best.problem, best.choices, best.rounds
    plan, arrays = best.plans[kept]
    allocation = tried.get(kept, tried["chosen"])
    if kept in tried:
        by_text = _by_text(ready, allocation.chosen, statistics.texts)
        by_layer = problem.cost_by_layer(allocation.chosen)
        solved = record(allocation, wanted.budget)
        solved |= {"predicted_by_text": by_text, "predicted_by_layer": by_layer}
    else:  # a rival: its codecs are no candidates, so nothing was predicted for it
        solved = {"budget": wanted.budget.text, "method": "uniform"}
    report = solved | {
        "objective": wanted.objective,
        "text_weights": dict(zip(statistics.texts, ready.weights.tolist(), strict=True)),
        "k_rope": ready.table.k_rope,
        "joint": ready.table.joint_heads,
        "kept": kept,
        "shrink": ready.guarded.options.shrink,
        "held_out": {f"{k:g}": v for k, v in ready.guarded.held_out.items()},
        "refinement": rounds,
        "check": None if checked is None else checked.report(),
    }  # fmt: skip
    source = provenance(statistics)
    source = dataclasses.replace(source, recipe=(source.recipe or {}) | {"allocation": report})
    measured = () if checked is None else checked.measurements(checked.kept)
    predicted = None
    if kept in tried:
        text = ", ".join(statistics.texts)
        predicted = Measurement(text=text, kl_mean=problem.cost(tried[kept].chosen))
    plan = dataclasses.replace(
        plan, provenance=source, quality=Quality(predicted=predicted, measured=measured)
    )
    return Found(
        plan=plan,
        arrays=arrays,
        kept=kept,
        allocation=allocation,
        problem=problem,
        checked=checked,
        notes=ready.notes,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tried:
    """Under one policy: what was chosen and its plans by name, those of uniform rivals with them,
    and what none of them may lose to."""

    policy: TokenPolicy
    problem: Problem
    choices: dict[str, Allocation]
    rounds: list[dict[str, Any]]
    plans: Plans
    baseline: Plans


def _try(
    statistics: Statistics, geometry: ModelGeometry, ready: Menu, wanted: Wanted,
    model: Model | None, folder: Path | None, progress: bool,
) -> _Tried:  # fmt: skip
    """Raises NoPlan where nothing fits, or nothing quantized would be seen by the check."""
    problem, allocation = solve(ready, wanted)
    choices, rounds = {"chosen": allocation}, list[dict[str, Any]]()

    def plan_of(one: Allocation) -> tuple[Plan, Arrays]:
        return ready.table.to_plan(geometry, one.chosen, policy=ready.policy)

    plans = {"chosen": plan_of(allocation)}
    if wanted.policies:
        held = statistics.held_back
        for windows in (*held.short.values(), *held.long.values()):
            try:
                judged(plans["chosen"][0], windows.shape[1])
            except TurboqError as error:
                raise NoPlan(str(error)) from None
    if wanted.rounds:
        if model is None:
            raise TurboqError("--rounds measures on the model: name --model, or --rounds=0")
        choices["refined"], rounds = _refined(
            model, statistics, ready, wanted, problem, folder, progress
        )
        plans["refined"] = plan_of(choices["refined"])
    others = Rivals(candidates={}, baseline={})
    if model is not None:
        others = rivals(statistics, geometry, plans["chosen"][0], k_rope=ready.table.k_rope)
    return _Tried(
        policy=ready.policy, problem=problem, choices=choices, rounds=rounds,
        plans=plans | dict(others.candidates), baseline=others.baseline,
    )  # fmt: skip


def _together(every: Mapping[str, _Tried]) -> tuple[Plans, Plans, dict[str, str]]:
    """All plans, all baselines, and by a plan's name that of the one it may not lose to."""
    plans = {of + name: x for of, one in every.items() for name, x in one.plans.items()}
    baselines = {of + name: x for of, one in every.items() for name, x in one.baseline.items()}
    beside = {
        of + name: of + other
        for of, one in every.items()
        for name in one.plans
        for other in one.baseline
    }
    return plans, baselines, beside


def _said(policy: TokenPolicy) -> str:
    return f"sinks {policy.sinks}, recent {policy.recent}"


def _say_length(tokens: int, context: int | None, most: int, log: Callable[[str], None]) -> None:
    """Says that a plan was judged by shorter windows than its budget is for."""
    if context is not None and tokens < (longer := min(context, most)):
        log(
            f"judged at {tokens} tokens, the budget is for {context}: calibrate with "
            f"--check_length={longer}"
        )


def _check_texts(costs: Float[np.ndarray, "U C X"], texts: Sequence[str]) -> None:
    """Every text has a cost: a sample that misses one says nothing of it."""
    for number, text in enumerate(texts):
        if number >= costs.shape[2] or np.isnan(costs[:, :, number]).any():
            raise TurboqError(
                f"no token of {text} was sampled, so nothing is predicted for it: run `turboq "
                "calibrate` again with a larger --reservoir"
            )


def _own_rules(wanted: Wanted) -> tuple[Constraints, ...]:
    return (Constraints(granularity=wanted.granularity, k_rope=ROPE_FORMS),)


def _by_text(ready: Menu, chosen: Int[np.ndarray, "U"], texts: Sequence[str]) -> dict[str, float]:
    each = ready.costs[np.arange(len(chosen)), chosen].sum(axis=0)
    return dict(zip(texts, each.tolist(), strict=True))


def _refined(
    model: Model, statistics: Statistics, ready: Menu, wanted: Wanted, problem: Problem,
    folder: Path | None, progress: bool,
) -> tuple[Allocation, list[dict[str, Any]]]:  # fmt: skip
    """The choice after refinement on the first calibration window of every text."""
    seen: dict[bytes, Allocation] = {}

    def solver(costs: Float[np.ndarray, "U C"]) -> Int[np.ndarray, "U"]:
        found = within(
            Problem.of(ready.table, costs), wanted.budget, ready.constraints, policy=ready.policy
        )
        seen[found.chosen.tobytes()] = found
        return found.chosen

    first = np.unique(statistics.window_texts, return_index=True)[1]
    engine = Engine(model, ready.table, statistics.windows[first], ready.policy)
    place = None if folder is None else make_folder(folder / _key(ready, wanted))
    refined = refine(
        engine, problem.costs, solver, weights=ready.weights, rounds=wanted.rounds, folder=place,
        progress=progress,
    )  # fmt: skip
    return seen[refined.chosen.tobytes()], rounds_report(refined)


def _key(ready: Menu, wanted: Wanted) -> str:
    """Name of the measurements of one search, so that another one does not meet them."""
    rules = [one.config() for one in ready.constraints]
    policy = dataclasses.asdict(ready.policy)
    what = [ready.table.sha256, wanted.budget.text, rules, wanted.objective, policy]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
