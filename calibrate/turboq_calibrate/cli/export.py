"""Writes a plan as files and flags of an engine that runs it, with a report of what was dropped.

No engine takes a free choice per layer and head. export_report.json says, for every layer and head,
whether it is exact, approximated or unsupported, what was dropped, and bytes per token as the
engine counts them; engine_plan/ is the plan that the engine really runs, for `turboq evaluate`.

--measure evaluates both on --text (with --model, the plan's) before anything is written: the report
then says what the export costs in KL, beside bytes.

--checkpoint is the Hugging Face folder that files are made for (vllm's are merged into it); it must
be the model of the plan. `turboq export --engine=list` prints the engines, and the versions that
their rules hold for.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from absl import flags

from turboq.errors import TurboqError
from turboq_calibrate.cli import common

if TYPE_CHECKING:
    from turboq.export.write import Measure

REQUIRED = ("engine",)
MEASURED = ("model", "text", "windows", "window_length", "bos")
RESUME = "nothing was written, run the same command again"


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("engine", None, "Engine, or 'list'.", flag_values=values)
    flags.DEFINE_string(
        "plan", None, "Plan: a folder or plan.json; for buun-llama.cpp also a ladder, whose "
        "predicted losses then order its tiers.", flag_values=values,
    )  # fmt: skip
    common.out(values, "Folder for the files, flags and export_report.json.")
    flags.DEFINE_string(
        "checkpoint", None, "Hugging Face folder of the plan's model, for overlays.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_enum(
        "prefer", "quality", ("quality", "size"), "Where the engine has no such format: no fewer "
        "bits than planned, or no more bytes.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_enum(
        "engine_dtype", None, common.DTYPES, "Type the engine runs the model in; by default that "
        "of the plan's exact codecs.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "tensor_parallel", 1, "Ranks, for files that list them (sglang).", lower_bound=1,
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_boolean(
        "rope_envelope", False, "Widen K ranges to the norm of rotary pairs (ort-genai).",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_boolean(
        "measure", False, "Measure what the engine stores against the plan.", flag_values=values
    )
    common.model(values)
    common.text(
        values, "topics:heldout", windows=4, length=512, of="each text",
        note="--measure: what both are measured on; the mean over texts is reported.",
    )  # fmt: skip


def main(values: flags.FlagValues, arguments: list[str]) -> None:
    from turboq.export import ENGINES, Options, engine, export, summary
    from turboq.plan import load
    from turboq.plan.io import is_ladder
    from turboq.plan.ladder import load_ladder

    if values.engine == "list":
        width = max(map(len, ENGINES))
        for name, e in ENGINES.items():
            print(f"{name:<{width}}  {e.title}: {e.versions}{'' if e.ran else '; not run here'}")
        return
    _check_measure(values)
    exporter = engine(values.engine)
    for name in ("plan", "out"):
        if not values[name].value:
            raise TurboqError(f"export needs --{name}")
    ladder = None
    if is_ladder(Path(values.plan)):
        ladder, stored = load_ladder(values.plan)
        plan, arrays = ladder.rung(0, stored)
    else:
        plan, arrays = load(values.plan)
    checkpoint = None if values.checkpoint is None else Path(values.checkpoint)
    if checkpoint is not None:
        _check_weights(plan, checkpoint)
    options = Options(
        dtype=values.engine_dtype,
        prefer=values.prefer,
        tensor_parallel=values.tensor_parallel,
        checkpoint=checkpoint,
        rope_envelope=values.rope_envelope,
        ladder=ladder,
    )
    measure = _measure(values) if values.measure else None
    print(summary(export(plan, arrays, exporter, values.out, options, measure=measure)))
    print(f"{values.out}/export_report.json")


def _check_measure(values: flags.FlagValues) -> None:
    given = [f"--{flag}" for flag in MEASURED if values[flag].present]
    if given and not values.measure:
        raise TurboqError(f"{', '.join(given)}: needs --measure")


def _measure(values: flags.FlagValues) -> Measure:
    """KL of the plan and of what the engine stores, on the texts that the flags name."""
    from turboq.export.report import Kl
    from turboq_calibrate.measure.evaluate import evaluate_texts
    from turboq_calibrate.models import load_model
    from turboq_calibrate.models.geometry import model_geometry
    from turboq_calibrate.run.progress import phases

    def measure(ours, engine) -> Kl:
        model = load_model(values.model, long_context=values.long_context)
        common.check_model(ours[0], model_geometry(model))
        with phases(*common.own_texts(values), "evaluate"):
            texts = common.texts_of(values, model)
            rows = evaluate_texts(model, [("plan", *ours), ("engine", *engine)], texts).rows
        kl = {n: mean(r["kl_mean"] for r in rows if r["name"] == n) for n in ("plan", "engine")}
        windows = next(iter(texts.values()))
        how = f"measured here: {values.windows} windows of {windows.shape[1]} tokens of each text"
        change = kl["engine"] - kl["plan"]
        return Kl(plan=kl["plan"], source=", ".join(texts), change=change, how=how)

    return measure


def _check_weights(plan, checkpoint: Path) -> None:
    """Raises TurboqError unless the checkpoint is the model that the plan was made for."""
    from turboq.export.checkpoint import check_config, read_config
    from turboq.plan import check_model
    from turboq_calibrate.models import load_model
    from turboq_calibrate.models.geometry import model_geometry

    config = read_config(checkpoint)
    check_config(plan, config, checkpoint)  # cheap, and says more
    if config.get("quantization_config"):
        # Its files are others than the plan's even where the weights are the same.
        print(
            f"{checkpoint} has a quantization_config: only its geometry is compared with the plan"
        )
        return
    check_model(plan, model_geometry(load_model(str(checkpoint), resident=False)))
