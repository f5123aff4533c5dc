"""Flags that name plans to measure: --plan, and --baselines that are made here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from absl import flags

from turboq.errors import TurboqError
from turboq_calibrate.cli import common

if TYPE_CHECKING:
    from turboq_calibrate.measure.evaluate import NamedPlan
    from turboq_calibrate.models import Model


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_multi_string(
        "plan", [], "Plans, comma-separated: folders with plan.json, or the file; NAME=PATH names "
        "the row.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_multi_string(
        "baselines", [], "One codec for all layers, to measure beside, comma-separated: exact, "
        "turboquant_mse:3,4, q8_0/q4_0 (as stock llama.cpp stores them), kivi:2; with "
        "--statistics also fitted ones, such as per_head:3.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string(
        "statistics", None, "Folder of `turboq calibrate`, for --baselines that are fitted.",
        flag_values=values,
    )  # fmt: skip
    common.policy(values, of=" (of --baselines; a plan has its own)")


def load_all(values: flags.FlagValues, model: Model) -> list[NamedPlan]:
    """(name of its row, plan, arrays): baselines, then plans.

    Raises:
      TurboqError: there are none, or one is unreadable or of another model.
    """
    from turboq import words
    from turboq.plan import load
    from turboq_calibrate.fit.plan import make_plan
    from turboq_calibrate.models.geometry import model_geometry
    from turboq_calibrate.observe.statistics_files import load_statistics

    if not values.plan and not values.baselines:
        raise TurboqError("nothing to evaluate: give --plan or --baselines")
    geometry = model_geometry(model)
    statistics = load_statistics(values.statistics) if values.statistics else None
    found = []
    for entry in common.listed(values, "baselines"):
        word = words.parse(entry)
        with common.as_user_error():
            plan, arrays = make_plan(
                geometry,
                k=common.template(word.k, "k", geometry),
                v=common.template(word.v, "v", geometry),
                policy=common.policy_of(values),
                statistics=statistics,
            )
        found.append((word.label, plan, arrays))
    for name, path in folders(values).items():
        plan, arrays = load(path)
        common.check_model(plan, geometry)
        found.append((name, plan, arrays))
    return found


def folders(values: flags.FlagValues) -> dict[str, str]:
    """Row -> the plan's folder, as given.

    Raises:
      TurboqError: two plans of one name.
    """
    from turboq import words

    found: dict[str, str] = {}
    for entry in common.listed(values, "plan"):
        given, path = words.labelled(entry)
        name = given or words.folder_name(path)
        if name in found:
            raise TurboqError(
                f"--plan: {found[name]} and {path} are both called {name!r}: NAME={path}"
            )
        found[name] = path
    return found
