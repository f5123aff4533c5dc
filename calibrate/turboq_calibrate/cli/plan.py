"""Writes plan.json and plan.safetensors: how every layer and KV head of a model is stored.

Without --budget every head gets the codec named: --codec=per_head fits mean, codebook and scale of
every (layer, KV head) to --statistics (from `turboq calibrate`); data-free codecs (turboquant_mse,
turboquant_prod, exact) need no statistics.

With --budget every (layer, KV head, K or V) gets the candidate that keeps the model's predictions
closest within it:

  --budget=4680B           bytes of one more token, all layers (also KiB, MiB, ...)
  --budget=3.25bpc         bits per channel of one more token, scales included
  --budget=131072@4GiB     all memory of one sequence of 131072 tokens (131072x8@40GiB: of eight)

Candidates are --candidates=transform:2,2.5,3 (bits per channel; trellis:2,2.5,3 errs less, but only
XLA reads it) or per_head:2,3,4 or ggml:type=q4_0,q8_0 or exact (several --candidates add up), by
default learned transforms around the budget, fitted to gradients; with --engine=NAME
what that engine holds, in the combinations it can load (`turboq export --engine=list`). They are
fitted to and measured on --text; the last --check_windows only decide whether the plan is better
than the best uniform one, which is kept otherwise.

--policies=4:0,4:32,4:128 (exact sinks : exact recent tokens) also chooses the exact tokens: each
is solved with its own bytes counted at the budget's context, and the least KL on the check windows
wins.
"""

from __future__ import annotations

from absl import flags

from turboq.errors import TurboqError
from turboq_calibrate.cli import common

REQUIRED = ("out",)
RESUME = "an earlier plan is intact, run the same command again"
GRANULARITIES = ("uniform", "per_layer", "per_kv", "per_head")  # of turboq.plan.constraints


def define(values: flags.FlagValues) -> None:
    common.model(values)
    flags.DEFINE_string(
        "statistics", None, "Folder written by `turboq calibrate`, of the same model.",
        flag_values=values,
    )  # fmt: skip
    common.codec(values, "per_head")
    common.policy(values)
    common.out(values, "Folder for plan.json and plan.safetensors.")
    flags.DEFINE_string(
        "budget", None, "Choose codecs within: 4680B (per token), 3.25bpc or 131072@4GiB.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_enum(
        "granularity", None, GRANULARITIES, "--budget: what is chosen on its own: K and V of the "
        "model, a layer, K or V of a layer, or of every head (default per_head).",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string(
        "engine", None, "--budget: only what this engine loads.", flag_values=values
    )
    flags.DEFINE_multi_string(
        "candidates", [], "--budget: NAME[:[FIELD=]VALUE,...], see above.", flag_values=values
    )
    common.text(values, "topics:calibration", windows=9, length=1024)
    flags.DEFINE_integer(
        "check_windows", 1, "--budget: the last windows, held back for the check.", lower_bound=1,
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_list(
        "policies", [], "--budget at a context: SINKS:RECENT exact tokens to choose among.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "rounds", 1, "--budget: refinements by KL measured around the plan.", lower_bound=0,
        flag_values=values,
    )  # fmt: skip


def main(values: flags.FlagValues, arguments: list[str]) -> None:
    _check(values)
    if values.budget is None:
        _one_codec(values)
    else:
        _within_budget(values)


def _check(values: flags.FlagValues) -> None:
    """Flags of one of the two ways are errors in the other, not ignored."""
    chosen = ("granularity", "engine", "candidates", "text", "windows", "window_length")
    chosen += ("check_windows", "rounds", "policies")
    fixed = ("codec", "k_codec", "v_codec", "bits", "k_bits", "v_bits", "field", "seed")
    fixed += (*common.CODEC_FIELDS, "statistics")
    wrong = chosen if values.budget is None else fixed
    given = [f"--{flag}" for flag in wrong if values[flag].present]
    if given and values.budget is None:
        raise TurboqError(f"{', '.join(given)}: needs --budget")
    if given:
        raise TurboqError(f"{', '.join(given)}: --budget chooses codecs, name --candidates")
    if values.policies:
        for flag in ("sinks", "recent"):
            if values[flag].present:
                raise TurboqError(f"--{flag}: --policies names the exact tokens")
    if values.engine is not None:
        for flag in ("granularity", "candidates", "policies"):
            if values[flag].present:
                raise TurboqError(f"--{flag}: --engine={values.engine} decides that")


def _one_codec(values: flags.FlagValues) -> None:
    from turboq.plan import save, summary
    from turboq_calibrate.fit.plan import make_plan, model_geometry
    from turboq_calibrate.models import load_model
    from turboq_calibrate.observe.statistics_files import load_statistics

    statistics = load_statistics(values.statistics) if values.statistics else None
    geometry = model_geometry(load_model(values.model, resident=False))
    owners = geometry.cache_layers
    with common.as_user_error():
        plan, arrays = make_plan(
            geometry,
            k=common.codec_of(values, "k", owners[0].k_dim),
            v=common.codec_of(values, "v", owners[0].v_dim),
            policy=common.policy_of(values),
            statistics=statistics,
        )
    saved = save(plan, arrays, values.out)
    print(summary(saved))
    print(f"{values.out}/plan.json")


def _within_budget(values: flags.FlagValues) -> None:
    from turboq.files import make_folder
    from turboq.plan import save, summary
    from turboq.plan.constraints import Constraints
    from turboq_calibrate.candidates.makers import default_makers, engine_menu, makers_of
    from turboq_calibrate.candidates.table import build_table
    from turboq_calibrate.choose.budget import Budget
    from turboq_calibrate.choose.policies import best_policy, policies_of
    from turboq_calibrate.choose.search import plan_of, search
    from turboq_calibrate.choose.within import report
    from turboq_calibrate.fit.plan import model_geometry
    from turboq_calibrate.models import load_model
    from turboq_calibrate.observe.gradients import collect_gradient_samples

    budget = Budget.parse(values.budget)
    model = load_model(values.model)
    geometry = model_geometry(model)
    with common.as_user_error():
        policy = common.policy_of(values)
        constraints = (Constraints(granularity=values.granularity or "per_head"),)
        if values.engine is not None:
            menu = engine_menu(values.engine, geometry, policy)
            makers, constraints = menu.makers, menu.constraints
            for line in menu.notes(policy):
                print(line)
            policy = menu.policy
        elif values.candidates:
            makers = makers_of(values.candidates, geometry)
        else:
            makers = default_makers(budget, geometry)
        policies = policies_of(values.policies, policy, budget)
        windows = common.windows_of(values, model.tokenizer)
        fit = windows.tokens[: -values.check_windows]
        if not len(fit):
            raise TurboqError(
                f"--windows={len(windows.tokens)} must be more than {values.check_windows=}"
            )
        skip = max(p.sinks for p in policies)
        table = build_table(geometry, makers, collect_gradient_samples(model, fit, skip=skip))
        held_back, folder = values.check_windows, make_folder(values.out) / "measured"
        costs = None
        if len(policies) > 1:
            policy, costs, tried = best_policy(
                model, table, windows.tokens, budget, constraints, policies, held_back=held_back
            )
            for line in tried:
                print(line)
        found = search(
            model,
            table,
            windows.tokens,
            budget,
            constraints,
            policy=policy,
            held_back=held_back,
            rounds=values.rounds,
            costs=costs,
            folder=folder,
        )
        plan, arrays = plan_of(found, table, geometry, windows, policy)
    saved = save(plan, arrays, values.out)
    print(report(found.problem, found.allocation, budget))
    for name, kl in found.checked.items():
        kept = " (kept)" if name == found.kept else ""
        print(f"KL on the windows held back, {name}: {kl:.6g}{kept}")
    print(summary(saved))
    print(f"{values.out}/plan.json")
