"""Which tasks tolerate how many bits?

    python experiments/tasks.py --statistics=runs/mine --lengths=1024 --samples=10

The rows of long_context.py on every task of `turboq tasks`, the same examples for all: change of
the log-probability of the right answer against the exact cache with its paired interval, McNemar's
test, and how often greedy decoding writes the same. First 4 tokens exact; bytes are counted at the
length. Tasks that the model cannot do with an exact cache say so, and no plan is measured on them:
of 135M parameters expect that of some. Every score is kept, so a killed run continues.

Writes tasks.json, report.html and the target: learned at 2.25 bits loses no more than
`turboquant_mse` at 4.25 in any task that counts, with the interval of their difference, paired over
its examples.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags
from field_rows import makers, targets, usual
from program import MADE, main, named, provenance

from turboq_calibrate.cli import common
from turboq_calibrate.measure.html_page import write_report
from turboq_calibrate.models import load_model
from turboq_calibrate.models.geometry import model_geometry
from turboq_calibrate.observe.statistics_files import load_statistics
from turboq_calibrate.tasks import tasks_of
from turboq_calibrate.tasks.results import format_results, write_results
from turboq_calibrate.tasks.run import measure_tasks

MODEL = flags.DEFINE_string("model", "embedded", "Model to quantize.")
STATISTICS = flags.DEFINE_string("statistics", None, "Folder of `turboq calibrate`.", required=True)
flags.DEFINE_multi_string("tasks", ["all"], "Tasks.")
flags.DEFINE_multi_string("lengths", ["1024"], "Tokens of prompt and answer.")
SAMPLES = flags.DEFINE_integer("samples", 10, "Examples per task and length.", lower_bound=1)
ROWS = flags.DEFINE_multi_string("rows", [], "Only these rows (those of field_rows.py).")
PLAN = flags.DEFINE_multi_string("plan", [], "NAME=FOLDER: a learned row, already written.")
OUT = flags.DEFINE_string("out", "runs/tasks", "Folder for the result.")


def run(out: Path) -> None:
    model = load_model(MODEL.value)
    lengths = common.lengths_of(flags.FLAGS, model.spec)
    made = makers(model_geometry(model), load_statistics(STATISTICS.value), PLAN.value)
    plans = [made[name]() for name in named(ROWS, made) or usual(made)]
    tasks = tasks_of(common.listed(flags.FLAGS, "tasks"))
    table = measure_tasks(
        model, plans, tasks, lengths=lengths, count=SAMPLES.value, folder=out / "scores"
    )
    changes = {
        (f"{r['task']} at {r['length']}", r["plan"]): (r["logp_change"], r["logp_examples"])
        for r in table["rows"]
        if not r["at_chance"]
    }
    table["x-targets"] = targets(changes, "+.3f", more_is_better=True)
    table[MADE] = provenance()
    path = write_results(table, out)
    print(format_results(table))
    for line in table["x-targets"]:
        print(line)
    print(f"\nresults {path}\nreport  {write_report(out)}")


if __name__ == "__main__":
    main(run, OUT)
