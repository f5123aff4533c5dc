"""Which tasks tolerate how many bits?

    python experiments/tasks.py --statistics=runs/mine --lengths=1024 --samples=10

The rows of long_context.py on every task of `turboq tasks`, the same examples for all: change of
the log-probability of the right answer against the exact cache with its paired interval, McNemar's
test, and how often greedy decoding writes the same. First 4 tokens exact; bytes are counted at the
length. Tasks that the model cannot do with an exact cache say so and count for nothing: of 135M
parameters expect that of some. Every score is kept, so a killed run continues.

Writes tasks.json, report.html and the target: learned at 2.25 bits loses no more than
`turboquant_mse` at 4.25 in any task that counts (paired, over its examples). An example of 1,024
tokens takes the embedded model about 11 CPU seconds per row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from absl import flags
from field_rows import chosen, makers
from program import main

from turboq_calibrate.measure.html_page import write_report
from turboq_calibrate.models import load_model
from turboq_calibrate.models.geometry import model_geometry
from turboq_calibrate.observe.statistics_files import load_statistics
from turboq_calibrate.tasks import tasks_of
from turboq_calibrate.tasks.results import format_results, write_results
from turboq_calibrate.tasks.run import measure_tasks

MODEL = flags.DEFINE_string("model", "embedded", "Model to quantize.")
STATISTICS = flags.DEFINE_string("statistics", None, "Folder of `turboq calibrate`.", required=True)
TASKS = flags.DEFINE_list("tasks", ["all"], "Tasks.")
LENGTHS = flags.DEFINE_list("lengths", ["1024"], "Tokens of prompt and answer.")
SAMPLES = flags.DEFINE_integer("samples", 10, "Examples per task and length.", lower_bound=1)
ROWS = flags.DEFINE_list("rows", [], "Only these rows; all by default.")
PLAN = flags.DEFINE_multi_string("plan", [], "NAME=FOLDER: a learned row, already written.")
OUT = flags.DEFINE_string("out", "runs/tasks", "Folder for the result.")

TARGET = ("learned 2.25", "turboquant_mse 4b")


def run(out: Path) -> None:
    model = load_model(MODEL.value)
    made = makers(model_geometry(model), load_statistics(STATISTICS.value), PLAN.value)
    plans = [made[name]() for name in chosen(made, ROWS.value)]
    table = measure_tasks(
        model, plans, tasks_of(TASKS.value), lengths=[int(x) for x in LENGTHS.value],
        count=SAMPLES.value, folder=out / "scores",
    )  # fmt: skip
    table["x-targets"] = targets(table["rows"])
    path = write_results(table, out)
    print(format_results(table))
    for line in table["x-targets"]:
        print(line)
    print(f"\nresults {path}\nreport  {write_report(out)}")


def targets(rows: list[dict[str, Any]]) -> list[str]:
    """The target in every task that counts."""
    change = {(r["task"], r["length"], r["plan"]): r["logp_change"] for r in rows}
    ours, theirs = TARGET
    return [
        f"{r['task']} at {r['length']}: {ours} {change[r['task'], r['length'], ours]:+.3f}, "
        f"{theirs} {r['logp_change']:+.3f}: "
        + ("met" if change[r["task"], r["length"], ours] >= r["logp_change"] else "MISSED")
        for r in rows
        if r["plan"] == theirs and not r["at_chance"] and (r["task"], r["length"], ours) in change
    ]


if __name__ == "__main__":
    main(run, OUT)
