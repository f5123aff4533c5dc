"""Writes a plan as files and flags of an engine that runs it, with a report of what was dropped.

No engine takes a free choice per layer and head. export_report.json says, for every layer and head,
whether it is exact, approximated or unsupported, what was dropped, and bytes per token as the
engine counts them; engine_plan/ is the plan that the engine really runs, for `turboq evaluate`.

--checkpoint is the Hugging Face folder that files are made for (vllm's are merged into it); it must
be the model of the plan. `turboq export --engine=list` prints the engines.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from turboq.errors import TurboqError
from turboq_calibrate.cli import common

REQUIRED = ("engine",)
RESUME = "nothing was written, run the same command again"


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("engine", None, "Engine, or 'list'.", flag_values=values)
    flags.DEFINE_string("plan", None, "Plan: a folder or plan.json.", flag_values=values)
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


def main(values: flags.FlagValues, arguments: list[str]) -> None:
    from turboq.export import ENGINES, Options, engine, export, summary
    from turboq.plan import load

    if values.engine == "list":
        width = max(map(len, ENGINES))
        print("\n".join(f"{name:<{width}}  {e.title}" for name, e in ENGINES.items()))
        return
    exporter = engine(values.engine)
    for name in ("plan", "out"):
        if not values[name].value:
            raise TurboqError(f"export needs --{name}")
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
    )
    print(summary(export(plan, arrays, exporter, values.out, options)))
    print(f"{values.out}/export_report.json")


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
