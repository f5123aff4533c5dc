"""Measures plans on held-out text against the same model with its exact cache.

Per plan: KL in nats per token (mean, 95 % bootstrap interval over windows, median, p99), top-1
agreement, perplexity, all-in bits per channel, bytes per token, compression against bf16. Every
--text is measured by itself, on --windows of its own; with several, the table shows plans by texts.
Writes quality.json, quality.csv and run.json to --out and prints the table. Two runs write the same
quality.json, interrupted or not.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from turboq.errors import TurboqError
from turboq_calibrate.cli import common

if TYPE_CHECKING:
    import numpy as np

    from turboq.plan import ModelGeometry, Plan

REQUIRED = ("out",)
RESUME = "the same command continues"


def define(values: flags.FlagValues) -> None:
    common.model(values)
    common.model_dtype(values)
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
    common.text(
        values, "topics:heldout", windows=8, length=1024, of="each text",
        note="Each is measured by itself.",
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
    from turboq.files import make_folder, settle
    from turboq_calibrate.measure.evaluate import NotFinite, evaluate_texts
    from turboq_calibrate.measure.quality_table import format_table, write_quality
    from turboq_calibrate.models import load_model
    from turboq_calibrate.models.geometry import model_geometry

    if not values.plan and not values.baselines:
        raise TurboqError("nothing to evaluate: give --plan or --baselines")
    model = load_model(values.model, dtype=values.model_dtype, resident=not values.stream)
    geometry = model_geometry(model)
    plans = _plans(values, geometry)
    texts = common.texts_of(values, model, folder=values.out)
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
    write_quality(quality, values.out)
    shutil.rmtree(unfinished)
    print(format_table(quality))


def _plans(
    values: flags.FlagValues, geometry: ModelGeometry
) -> list[tuple[str, Plan, dict[str, np.ndarray]]]:
    """(name of its row, plan, arrays): baselines, then plans."""
    from turboq import words
    from turboq.plan import check_model, load
    from turboq_calibrate.fit.plan import make_plan
    from turboq_calibrate.observe.statistics_files import load_statistics

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
    for entry in common.listed(values, "plan"):
        name, path = words.labelled(entry)
        plan, arrays = load(path)
        check_model(plan, geometry)
        found.append((name or words.folder_name(path), plan, arrays))
    return found
