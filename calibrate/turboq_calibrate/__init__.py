"""turboq_calibrate: from a model and text to a plan, and what the plan does to the model.

    model = load_model("embedded")                    a Hugging Face folder, a .gguf file
    windows = mixed_windows(["topics:calibration"], model.tokenizer, length=1024, count=8)
    statistics = calibrate(model, windows, "run")     everything that any fit needs, resumable
    found = plan_within(statistics, model_geometry(model), Wanted(budget=Budget.parse("3.25bpc")))
    table = evaluate(model, [("learned", found.plan, found.arrays)], heldout, text="heldout")

Every step of the `turboq` command is one of these functions. Names are loaded when first used.
"""

# pyright: strict

from typing import TYPE_CHECKING, Any

_FROM = {
    "turboq_calibrate.models": ("load_model",),
    "turboq_calibrate.observe.texts": ("Windows", "calibration_windows", "mixed_windows"),
    "turboq_calibrate.observe.observe": ("calibrate",),
    "turboq_calibrate.observe.recipe": ("Shard",),
    "turboq_calibrate.observe.merge_shards": ("merge_shards",),
    "turboq_calibrate.observe.statistics_files": ("Statistics", "load_statistics"),
    "turboq_calibrate.fit.plan": ("fit_plan", "make_plan"),
    "turboq_calibrate.models.geometry": ("model_geometry",),
    "turboq_calibrate.choose.budget": ("Budget",),
    "turboq_calibrate.choose.plan_within": ("Wanted", "plan_within"),
    "turboq_calibrate.measure.evaluate": ("evaluate", "evaluate_texts"),
    "turboq_calibrate.measure.quality_table": ("format_table",),
    "turboq_calibrate.measure.generate": ("greedy",),
    "turboq_calibrate.measure.generate_many": ("generate",),
}
_NAMES = {name: module for module, names in _FROM.items() for name in names}
__all__ = sorted(_NAMES)  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from turboq_calibrate.choose.budget import Budget as Budget
    from turboq_calibrate.choose.plan_within import Wanted as Wanted
    from turboq_calibrate.choose.plan_within import plan_within as plan_within
    from turboq_calibrate.fit.plan import fit_plan as fit_plan
    from turboq_calibrate.fit.plan import make_plan as make_plan
    from turboq_calibrate.measure.evaluate import evaluate as evaluate
    from turboq_calibrate.measure.evaluate import evaluate_texts as evaluate_texts
    from turboq_calibrate.measure.generate import greedy as greedy
    from turboq_calibrate.measure.generate_many import generate as generate
    from turboq_calibrate.measure.quality_table import format_table as format_table
    from turboq_calibrate.models import load_model as load_model
    from turboq_calibrate.models.geometry import model_geometry as model_geometry
    from turboq_calibrate.observe.merge_shards import merge_shards as merge_shards
    from turboq_calibrate.observe.observe import calibrate as calibrate
    from turboq_calibrate.observe.recipe import Shard as Shard
    from turboq_calibrate.observe.statistics_files import Statistics as Statistics
    from turboq_calibrate.observe.statistics_files import load_statistics as load_statistics
    from turboq_calibrate.observe.texts import Windows as Windows
    from turboq_calibrate.observe.texts import calibration_windows as calibration_windows
    from turboq_calibrate.observe.texts import mixed_windows as mixed_windows


def __getattr__(name: str) -> Any:
    from turboq.lazy import find

    return find(__name__, _NAMES, name)


def __dir__() -> list[str]:
    return __all__
