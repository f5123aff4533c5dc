"""Flags that name plans to measure: --plan, and --baselines that need no data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from turboq.errors import TurboqError
from turboq_calibrate.cli import common

if TYPE_CHECKING:
    from turboq.plan import ModelGeometry
    from turboq_calibrate.measure.evaluate import NamedPlan
    from turboq_calibrate.models import Model


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_multi_string(
        "plan", [], "Plan: a folder with plan.json, or the file; NAME=PATH names its row.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_list(
        "baselines", [], "Data-free plans to measure beside: CODEC or CODEC:BITS, comma-separated, "
        "such as exact,turboquant_mse:3.", flag_values=values,
    )  # fmt: skip
    common.policy(values, of=" (of --baselines; a plan has its own)")


def load_all(values: flags.FlagValues, model: Model) -> list[NamedPlan]:
    """The plans that --baselines and --plan name.

    Raises:
      TurboqError: there are none, or one is unreadable or of another model.
    """
    from turboq.plan import check_model, load
    from turboq_calibrate.models.geometry import model_geometry

    if not values.plan and not values.baselines:
        raise TurboqError("nothing to evaluate: give --plan or --baselines")
    geometry = model_geometry(model)
    plans = [_baseline(entry, geometry, values) for entry in values.baselines]
    for entry in values.plan:
        name, path = _named(entry)
        plan, arrays = load(path)
        check_model(plan, geometry)
        plans.append((name, plan, arrays))
    return plans


def _named(entry: str) -> tuple[str, str]:
    """NAME=PATH, or a path whose folder gives the name."""
    name, equals, path = entry.partition("=")
    if equals and name and not Path(entry).exists():
        return name, path
    path = Path(entry)
    folder = path.parent if path.suffix == ".json" else path
    return folder.resolve().name, entry


def _baseline(entry: str, geometry: ModelGeometry, values: flags.FlagValues):
    from turboq.codecs import from_config
    from turboq_calibrate.fit.plan import make_plan

    name, colon, bits = entry.partition(":")
    if colon and not bits.isdecimal():
        raise TurboqError(f"baseline {entry!r} must be CODEC or CODEC:BITS")
    config = {"codec": name, "dim": geometry.cache_layers[0].k_dim}
    codec = from_config(config | ({"bits": int(bits)} if colon else {}))
    with common.as_user_error():
        plan, arrays = make_plan(geometry, k=codec, v=codec, policy=common.policy_of(values))
    return f"{name} {bits}b" if colon else name, plan, arrays
