"""Writes plan.json and plan.safetensors: how every layer and KV head of a model is stored.

Without --budget every head gets the codec named: --codec=per_head (or transform, rope_block, nuq,
...) is fitted to --statistics (from `turboq calibrate`); data-free codecs (turboquant_mse,
turboquant_prod, exact) need no statistics.

--codec is one for K and V or K/V: turboquant_mse:3, q8_0/q4_0 (as stock llama.cpp stores them),
kivi:2; --bits and the flags below set the same fields.

With --budget every (layer, KV head, K or V) gets the candidate that keeps the model's predictions
closest within it:

  --budget=4680B           bytes of one more token, all layers (also KiB, MiB, ...)
  --budget=3.25bpc         bits per channel of one more token, scales included
  --budget=131072@4GiB     all memory of one sequence of 131072 tokens (131072x8@40GiB: of eight)
  --budget=1.75..4bpc      a ladder: every plan between the two on the convex hull, in one folder
                           (ladder.json); rung by rung K or V of one layer falls a tier

--ladder=FOLDER --budget=... writes the best rung within a budget of any form as a plan.

Without --statistics the model is calibrated first, into --out (flags as in `turboq calibrate`).
Candidates are --candidates=window:2,2.5,3 (bits per channel; transform:2,2.5,3 has scalar codes and
is quicker to encode, trellis:2,2.5,3 reads tables; a word without numbers: in steps around the
budget) or per_head:2,3,4 or ggml:type=q4_0,q8_0 or exact (several --candidates add up), by default
window; with --engine=NAME what that engine holds, in the combinations it can load (`turboq export
--engine=list`).

The plan is checked before it is written: on windows held back from every calibration text, beside
the best uniform per_head plan, and at --check_length tokens of `turboq calibrate`; what loses to
turboquant_mse of the same bytes there is not written without --force. --nocheck skips all that
and needs no model: another budget from a finished folder takes seconds.

With a budget at a context the exact tokens are chosen too, among --policies=4:0,4:32,4:128 (exact
sinks : exact recent tokens; --sinks or --recent name the only ones): each is solved with its own
bytes counted at that context, and the least KL on the longer window held back wins. That window
has as many tokens as the context, at most 4,096 (--check_length for more, which takes longer).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from turboq.errors import TurboqError
from turboq_calibrate.cli import common

if TYPE_CHECKING:
    from turboq.plan import ModelGeometry
    from turboq_calibrate.choose.budget import Budget
    from turboq_calibrate.models import Model
    from turboq_calibrate.observe.statistics_files import Statistics

# Of `turboq.plan.geometry`, which --help must not wait for.
ROPE_FORMS = ("before", "block:16", "block:32", "block:64", "block:128", "block:256", "after")

REQUIRED = ("out",)
RESUME = "run the same command again to continue"
GRANULARITIES = ("uniform", "per_layer", "per_kv", "per_head")  # of turboq.plan.constraints
OBJECTIVES = ("mean", "worst")
BUDGET_FLAGS = ("granularity", "engine", "candidates", "policies", "rounds", "objective")
BUDGET_FLAGS += ("check", "force", "joint", "ladder")
# Flags that mean nothing to a ladder, and those that mean nothing to one that is there already.
OF_A_SEARCH = (
    "model",
    "statistics",
    "k_rope",
    "sinks",
    "recent",
    "exact_dtype",
    *BUDGET_FLAGS[:-1],
)
NOT_OF_LADDERS = ("engine", "joint", "policies", "rounds", "objective", "force")


def define(values: flags.FlagValues) -> None:
    common.model(values)
    flags.DEFINE_string(
        "statistics", None, "Folder written by `turboq calibrate`, of the same model.",
        flag_values=values,
    )  # fmt: skip
    common.codec(values, "per_head")
    common.policy(values)
    common.out(values, "Folder for plan.json and plan.safetensors.")
    flags.DEFINE_enum(
        "k_rope", None, ROPE_FORMS, "Keys are stored before or after their rotary embedding, or "
        "relative to their block of so many positions (default: with --budget before, where keys "
        "have one; after with a codec).", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string(
        "budget", None, "Choose codecs within: 4680B (per token), 3.25bpc, 131072@4GiB, or "
        "1.75..4bpc for a ladder.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string(
        "ladder", None, "--budget: take the rung of this ladder (of --budget=LOW..HIGH).",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_enum(
        "granularity", None, GRANULARITIES, "--budget: what is chosen on its own: K and V of the "
        "model, a layer, K or V of a layer, or of every head (default per_head).",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string(
        "joint", None, "--budget: of so many neighbouring KV heads keys and values are stored as "
        "one vector, or none (default: as many as 512 channels hold; far less loss; kernels decode "
        "keys, or with --k_rope=block:256 fold queries).", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string(
        "engine", None, "--budget: only what this engine loads.", flag_values=values
    )
    flags.DEFINE_multi_string(
        "candidates",
        [],
        "--budget: codecs and their values, comma-separated, see above.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "objective", "mean", OBJECTIVES, "--budget: least loss over the mean of the calibration "
        "texts, or on the worst of them.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_multi_string(
        "policies", [], "--budget at a context: SINKS:RECENT exact tokens to choose among "
        "(default: 4:0,4:32,4:128).",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "rounds", 0, "--budget: refinements by KL measured around the plan.", lower_bound=0,
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_boolean(
        "check", True, "--budget: measure the plan before it is written.", flag_values=values
    )
    flags.DEFINE_boolean(
        "force", False, "--budget: write a plan that the check refuses.", flag_values=values
    )
    common.observation(values)


def main(values: flags.FlagValues, arguments: list[str]) -> None:
    from turboq_calibrate.choose.budget import Budget

    _check(values)
    if values.budget is None:
        _one_codec(values)
    elif values.ladder is not None:
        _rung(values)
    elif (between := Budget.parse_range(values.budget)) is not None:
        _ladder(values, *between)
    else:
        _within_budget(values)


def _check(values: flags.FlagValues) -> None:
    """Flags of one of the two ways are errors in the other, not ignored."""
    if values.budget is None:
        wrong, why = (*BUDGET_FLAGS, *common.OBSERVATION), "needs --budget"
    else:
        wrong = ("codec", "k_codec", "v_codec", "bits", "k_bits", "v_bits", "field", "seed")
        wrong += common.CODEC_FIELDS
        why = "--budget chooses codecs, name --candidates"
    _refuse(values, wrong, why)
    if values.statistics is not None:
        _refuse(values, common.OBSERVATION, f"--statistics={values.statistics} decides that")
    if values.ladder is not None:
        _refuse(values, (*OF_A_SEARCH, *common.OBSERVATION), "the ladder decides that")
    if values.budget is not None and ".." in values.budget:
        _refuse(values, NOT_OF_LADDERS, "is for one plan, not for a ladder")
        if values.granularity in ("uniform", "per_layer"):
            raise TurboqError(
                f"--granularity={values.granularity}: a ladder lowers K or V of one layer at a "
                "time: per_kv or per_head"
            )
    if values.policies:
        for flag in ("sinks", "recent"):
            if values[flag].present:
                raise TurboqError(f"--{flag}: --policies names the exact tokens")
        if not values.check:
            raise TurboqError("--policies are compared by the check: leave --nocheck out")
    if values.rounds and not values.check:
        raise TurboqError(f"--rounds={values.rounds} measures on the model: leave --nocheck out")
    if values.engine is not None:
        from turboq.export import engine

        engine(values.engine)  # an unknown one is refused before anything is calibrated
        for flag in ("granularity", "candidates", "policies", "k_rope", "joint"):
            if values[flag].present:
                raise TurboqError(f"--{flag}: --engine={values.engine} decides that")


def _joint(word: str | None) -> int | None:
    """--joint as `Wanted.joint`."""
    if word is None:
        return None
    if word == "none":
        return 0
    if not word.isascii() or not word.isdigit() or int(word) < 1:
        raise TurboqError(f"--joint={word}: must be a number of KV heads, or none")
    return int(word)


def _refuse(values: flags.FlagValues, wrong: tuple[str, ...], why: str) -> None:
    given = [f"--{flag}" for flag in wrong if values[flag].present]
    if given:
        raise TurboqError(f"{', '.join(given)}: {why}")


def _one_codec(values: flags.FlagValues) -> None:
    from turboq.codecs import Codec
    from turboq.plan import save, summary
    from turboq.plan.types import SIDES
    from turboq_calibrate.fit.plan import check_statistics, make_plan
    from turboq_calibrate.fit.scale_type import wide_enough
    from turboq_calibrate.models import load_model
    from turboq_calibrate.models.geometry import model_geometry
    from turboq_calibrate.observe.statistics_files import load_statistics

    statistics = load_statistics(values.statistics) if values.statistics else None
    geometry = model_geometry(
        load_model(values.model, resident=False, long_context=values.long_context)
    )
    rope = geometry.key_form(values.k_rope or "after")
    sides = common.sides_of_flags(values)
    codecs = {which: common.template(sides[which], which, geometry) for which in SIDES}
    if statistics is not None:
        check_statistics(statistics, geometry)
        for side, codec in codecs.items():
            if not isinstance(codec, Codec) or "scale_dtype" in dict(sides[side].settings):
                continue
            layers = (statistics[i] for i in range(len(statistics)))
            codecs[side], note = wide_enough(codec, layers, side, rope)
            if note:
                print(note)
    with common.as_user_error():
        plan, arrays = make_plan(
            geometry,
            **codecs,
            policy=common.policy_of(values),
            statistics=statistics,
            k_rope=rope,
        )
    saved = save(plan, arrays, values.out)
    print(summary(saved))
    print(f"{values.out}/plan.json")


def _observed(
    values: flags.FlagValues, out: Path, context: int | None = None
) -> tuple[Model | None, Statistics, ModelGeometry, list[str]]:
    """The model (None where it is not needed), its statistics and geometry, as the flags say.

    Last, the labels of what the whole command shows of its progress.
    """
    from turboq_calibrate.fit.plan import check_dims
    from turboq_calibrate.models import load_model
    from turboq_calibrate.models.geometry import model_geometry
    from turboq_calibrate.observe.observe import observe
    from turboq_calibrate.observe.statistics_files import load_statistics
    from turboq_calibrate.run.progress import phases

    model = None
    if values.check or values.statistics is None:
        model = load_model(values.model, long_context=values.long_context)
    steps = ["fit", "costs", *["evaluate"] * values.check]
    if values.statistics is None:
        assert model is not None
        check_dims(geometry := model_geometry(model))
        geometry.key_form(values.k_rope)  # refused before anything is observed
        observing = common.observing(values, model)
        # Texts are left out, one at a time, only where none is the model's own.
        steps = [*observing, *["guard"] * ("self:" not in observing), *steps]
        with phases(*steps):
            windows = common.observed_windows(values, model, context=context)
            statistics = observe(model, windows, out, common.recipe_of(values))
    else:
        statistics = load_statistics(values.statistics)
        own = any(name.startswith("self:") for name in statistics.texts)
        steps = [*["guard"] * (not own), *steps]
    if model is not None:
        geometry = model_geometry(model)
    elif values["model"].present:  # not needed, but its statistics these should be
        geometry = model_geometry(
            load_model(values.model, resident=False, long_context=values.long_context)
        )
    else:
        geometry = statistics.geometry
    return model, statistics, geometry, steps


def _ladder(values: flags.FlagValues, low: Budget, high: Budget) -> None:
    from turboq.plan.ladder import save_ladder
    from turboq_calibrate.choose.budget import middle
    from turboq_calibrate.choose.ladder import ladder_within, measured
    from turboq_calibrate.choose.plan_within import Wanted
    from turboq_calibrate.run.progress import phases

    out = Path(values.out)
    with common.as_user_error():
        wanted = Wanted(
            budget=middle(low, high),
            candidates=tuple(common.listed(values, "candidates")),
            granularity=values.granularity or "per_head",
            k_rope=values.k_rope,
            policy=common.policy_of(values),
        )
        model, statistics, geometry, steps = _observed(values, out)
        with phases(*steps):
            ladder, arrays = ladder_within(statistics, geometry, wanted, low, high)
            lines = []
            if model is not None and values.check:
                lines = measured(model, statistics, ladder, arrays, out / "measured")
    ladder = save_ladder(ladder, arrays, out)
    channels = sum(x.kv_heads * (x.k_dim + x.v_dim) for x in geometry.cache_layers)
    print(f"{ladder.rungs} rungs of {len(ladder.sides)} sides; predicted nats per token:")
    for n in sorted({0, ladder.rungs // 2, ladder.rungs - 1}):
        bits = ladder.bits[n]
        print(f"  rung {n}: {bits / channels:.4f} bits per channel, {bits / 8:g} B per token, "
              f"{ladder.loss[n]:.4g}")  # fmt: skip
    print("\n".join(lines or ["not measured (--nocheck)"]))
    print(f"{out}/ladder.json")


def _rung(values: flags.FlagValues) -> None:
    from turboq.plan import save, summary
    from turboq.plan.ladder import load_ladder
    from turboq_calibrate.choose.budget import Budget
    from turboq_calibrate.choose.ladder import rung_within

    ladder, stored = load_ladder(values.ladder)
    rung = rung_within(ladder, Budget.parse(values.budget))
    saved = save(*ladder.rung(rung, stored), values.out)
    print(f"rung {rung} of 0..{ladder.rungs - 1}")
    print(summary(saved))
    print(f"{values.out}/plan.json")


def _within_budget(values: flags.FlagValues) -> None:
    from turboq.plan import save, summary
    from turboq_calibrate.choose.budget import Budget
    from turboq_calibrate.choose.plan_within import Wanted, plan_within
    from turboq_calibrate.choose.policies import DEFAULT, policies_of
    from turboq_calibrate.choose.within import report
    from turboq_calibrate.run.progress import phases

    budget, out = Budget.parse(values.budget), Path(values.out)
    with common.as_user_error():
        words = common.listed(values, "policies")
        named = values["sinks"].present or values["recent"].present
        if budget.context is not None and values.check and values.engine is None and not named:
            words = words or list(DEFAULT)
        policies = policies_of(words, common.policy_of(values), budget)
        wanted = Wanted(
            budget=budget,
            candidates=tuple(common.listed(values, "candidates")),
            engine=values.engine,
            granularity=values.granularity or "per_head",
            k_rope=values.k_rope,
            objective=values.objective,
            rounds=values.rounds,
            joint=_joint(values.joint),
            policy=policies[0],
            policies=tuple(policies) if len(policies) > 1 else (),
        )
        model, statistics, geometry, steps = _observed(values, out, budget.context)
        with phases(*steps):
            found = plan_within(
                statistics,
                geometry,
                wanted,
                model=model if values.check else None,
                folder=out / "measured",
                force=values.force,
            )
    saved = save(found.plan, found.arrays, out)
    for line in found.notes:
        print(line)
    if found.kept in ("chosen", "refined"):
        print(report(found.problem, found.allocation, budget))
    else:
        print(f"{found.kept} is kept: on the windows held back it beats what was chosen per head")
    print("not checked (--nocheck)" if found.checked is None else found.checked.table())
    print(summary(saved))
    print(f"{out}/plan.json")
