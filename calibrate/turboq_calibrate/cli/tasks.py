"""Measures plans on retrieval and other tasks that break first, generated here from a seed.

Needles, pass keys, UUIDs, digits, copying, variables, words, tool calls, code, arithmetic, at
--lengths of context and --depths. Scores what quantization changes: the log-probability and rank of
the right answer, whether it is likelier than wrong ones, and whether greedy decoding writes what it
writes with the exact cache; intervals are over examples, paired. A task at which the exact cache
does no better than chance says so and counts for nothing. Writes tasks.json to --out and prints a
table: per plan the change of the log-probability in nats, and the share of equal greedy answers;
then every change with its interval and by depth, median ranks, and exact matches with McNemar's p.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from absl import flags

from turboq.errors import TurboqError
from turboq_calibrate.cli import common, named_plans

REQUIRED = ("out",)
RESUME = "the same command continues"


def define(values: flags.FlagValues) -> None:
    common.model(values)
    common.model_dtype(values)
    named_plans.define(values)
    flags.DEFINE_multi_string(
        "tasks", ["all"], "Tasks, comma-separated; another package's is PACKAGE.NAME.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_multi_string(
        "lengths", ["1024"], "Tokens of prompt and answer, comma-separated.", flag_values=values
    )
    flags.DEFINE_integer(
        "samples", 10, "Examples per task and length.", lower_bound=1, flag_values=values
    )
    flags.DEFINE_multi_string(
        "depths", ["0", "0.25", "0.5", "0.75", "1"], "Where in the prompt what decides stands, 0 "
        "(first) to 1 (last); examples take turns.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer("seed", 0, "Seed of the examples.", lower_bound=0, flag_values=values)
    common.out(values, "Folder for tasks.json.")


def main(values: flags.FlagValues, arguments: list[str]) -> None:
    from turboq.files import make_folder, settle
    from turboq_calibrate.models import load_model
    from turboq_calibrate.run.progress import phases
    from turboq_calibrate.tasks import tasks_of
    from turboq_calibrate.tasks.results import format_results, write_results
    from turboq_calibrate.tasks.run import measure_tasks

    tasks = tasks_of(common.listed(values, "tasks"))
    depths = _depths(common.listed(values, "depths"))
    model = load_model(values.model, dtype=values.model_dtype, long_context=values.long_context)
    lengths = common.lengths_of(values, model.spec)
    plans = named_plans.load_all(values, model)
    settle(make_folder(values.out))
    unfinished = Path(values.out) / "unfinished"
    with phases("tasks"):
        table = measure_tasks(
            model, plans, tasks, lengths=lengths, count=values.samples, depths=depths,
            seed=values.seed, folder=unfinished,
        )  # fmt: skip
    write_results(table, values.out)
    shutil.rmtree(unfinished)
    print(format_results(table))


def _depths(entries: list[str]) -> list[float]:
    """Raises TurboqError where --depths is empty, or one is no number from 0 to 1."""
    found: list[float] = []
    for entry in entries:
        try:
            found.append(float(entry))
        except ValueError:
            found.append(math.nan)
        if not 0 <= found[-1] <= 1:
            raise TurboqError(f"--depths: {entry!r} must be a number from 0 to 1")
    if not found:
        raise TurboqError("--depths is empty: give numbers from 0 to 1, for example 0,0.5,1")
    return found
