"""Measures plans on held-out text against the same model with its exact cache.

Per plan: KL in nats per token (mean, 95 % bootstrap interval over windows, median, p99), top-1
agreement, perplexity, all-in bits per channel, bytes per token, compression against bf16. Every
--text is measured by itself, on --windows of its own; with several, the table shows plans by texts.
A plan's row has the name of its folder; --plan=NAME=FOLDER gives it another.
--lengths=1024,4096,8192 measures each at several lengths of context, and by position in the window;
--steps=64 measures the last positions once more, token by token through the packed cache.
Writes quality.json, quality.csv and run.json to --out and prints the table. Two runs write the same
quality.json, interrupted or not.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from turboq.errors import TurboqError
from turboq_calibrate.cli import common, named_plans

if TYPE_CHECKING:
    import numpy as np

    from turboq_calibrate.measure.evaluate import NamedPlan
    from turboq_calibrate.models import Model

REQUIRED = ("out",)
RESUME = "the same command continues"


def define(values: flags.FlagValues) -> None:
    common.model(values)
    common.model_dtype(values)
    named_plans.define(values)
    common.text(
        values, "topics:heldout", windows=8, length=1024, of="each text",
        note="Each is measured by itself.",
    )  # fmt: skip
    flags.DEFINE_multi_string(
        "lengths", [], "Tokens per window, comma-separated, instead of --window_length: every text "
        "is measured at each.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "steps", 0, "Last positions of every window to measure also token by token through the "
        "packed cache.", lower_bound=0, flag_values=values,
    )  # fmt: skip
    common.out(values, "Folder for quality.json, quality.csv and run.json.")
    flags.DEFINE_enum(
        "attention", "simulated", ("simulated", "packed", "xla", "mosaic_tpu", "triton"),
        "Quantize and dequantize in one pass, or prefill the packed cache; by name, the kernel "
        "that reads it (interpreted, and slow, where its platform is missing).",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "context", None, "Tokens at which all-in bits are also counted; the model's by default.",
        lower_bound=1, flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "batch", 1, "Windows that run together.", lower_bound=1, flag_values=values
    )
    flags.DEFINE_integer("seed", 0, "Seed of the bootstrap.", lower_bound=0, flag_values=values)
    flags.DEFINE_boolean(
        "stream", False, "Re-read weights layer by layer instead of keeping them.",
        flag_values=values,
    )  # fmt: skip


def main(values: flags.FlagValues, arguments: list[str]) -> None:
    from turboq_calibrate.models import load_model
    from turboq_calibrate.run.progress import phases

    model = load_model(
        values.model,
        dtype=values.model_dtype,
        resident=not values.stream,
        long_context=values.long_context,
    )
    plans = named_plans.load_all(values, model)
    own = common.own_texts(values) * max(1, len(common.listed(values, "lengths")))
    with phases(*own, "evaluate"):
        _measure(values, model, plans)


def _measure(values: flags.FlagValues, model: Model, plans: list[NamedPlan]) -> None:
    from turboq.files import make_folder, settle
    from turboq_calibrate.measure.evaluate import NotFinite, evaluate_texts
    from turboq_calibrate.measure.quality_table import format_table, write_quality

    texts = _texts(values, model)
    if not values["text"].present:
        print("text: topics:heldout, the Python language reference; yours: --text=FILE or FOLDER")
    # An unusable folder shows now, not after the evaluation; so does what a killed one left.
    settle(make_folder(values.out))
    unfinished = Path(values.out) / "unfinished"
    try:
        quality = evaluate_texts(
            model,
            plans,
            texts,
            attention=values.attention,
            steps=values.steps,
            context=values.context,
            window_batch=values.batch,
            seed=values.seed,
            folder=unfinished,
        )
    except NotFinite as error:
        if error.quality is None:
            raise
        write_quality(error.quality, values.out)
        print(format_table(error.quality))
        raise TurboqError(f"{error}; all other rows are in {values.out}") from None
    quality.run["command"] = common.command("evaluate", values)
    quality.run["plans"] = named_plans.folders(values)
    write_quality(quality, values.out)
    shutil.rmtree(unfinished)
    print(format_table(quality))


def _texts(values: flags.FlagValues, model: Model) -> dict[str, np.ndarray]:
    """Name -> windows; every text at every length is one of its own."""
    if not values.lengths:
        return common.texts_of(values, model, folder=values.out)
    found: dict[str, np.ndarray] = {}
    for length in common.lengths_of(values, model.spec):
        each = common.texts_of(values, model, length=length, folder=values.out)
        found |= {f"{name} at {length}": windows for name, windows in each.items()}
    return found
