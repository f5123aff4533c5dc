"""What does a plan lose at length, and does an engine's step by step lose the same?

    python experiments/long_context.py --statistics=runs/mine --text=novel.txt --lengths=1024,8192

The plan that `turboq plan --budget` would write at every budget, TurboQuant, per_head and the field
(rotated GGML blocks, KIVI, OSCAR-like), first 4 tokens exact, on windows of every length: KL, top-1
agreement and perplexity ratio by position, with intervals over windows, and the last --steps
positions token by token through the packed cache. KIVI keeps up to 31 tokens more exact, and its
row says so; --rows="learned 2.25 (31 recent exact)" keeps as many. Plans run in groups; a finished
group is printed and kept, so a killed run continues.

Writes quality.json, quality.csv, report.html and the target: learned at 2.25 bits at most what
`turboquant_mse` loses at 4.25, at every length, with the interval of their difference, paired over
windows.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from absl import flags
from field_rows import makers, targets, usual
from program import main, named, windows_at, write_quality

from turboq_calibrate.cli import common
from turboq_calibrate.measure import quality_table
from turboq_calibrate.measure.evaluate import NamedPlan, evaluate_texts
from turboq_calibrate.measure.html_page import write_report
from turboq_calibrate.models import load_model
from turboq_calibrate.models.geometry import model_geometry
from turboq_calibrate.observe.statistics_files import load_statistics

MODEL = flags.DEFINE_string("model", "embedded", "Model to quantize.")
STATISTICS = flags.DEFINE_string("statistics", None, "Folder of `turboq calibrate`.", required=True)
TEXT = flags.DEFINE_multi_string("text", ["topics:heldout"], "Texts to measure on.")
flags.DEFINE_multi_string("lengths", ["1024", "8192"], "Tokens of windows.")
WINDOWS = flags.DEFINE_integer("windows", 2, "Windows per text and length.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 16, "Last positions also step by step.", lower_bound=0)
ROWS = flags.DEFINE_multi_string("rows", [], "Only these rows (those of field_rows.py).")
PLAN = flags.DEFINE_multi_string("plan", [], "NAME=FOLDER: a learned row, already written.")
OUT = flags.DEFINE_string("out", "runs/long_context", "Folder for the result.")

GROUP = 4  # rows that run together


def run(out: Path) -> None:
    model = load_model(MODEL.value)
    lengths = common.lengths_of(flags.FLAGS, model.spec)
    made = makers(model_geometry(model), load_statistics(STATISTICS.value), PLAN.value)
    rows = named(ROWS, made) or usual(made)
    texts = windows_at(model, TEXT.value, lengths, WINDOWS.value)
    plans: list[NamedPlan] = []
    for names in itertools.batched(rows, GROUP):
        plans += [made[name]() for name in names]
        found = evaluate_texts(
            model, plans, texts, steps=STEPS.value, plan_batch=GROUP, folder=out / "windows"
        )
        losses = {(r["text"], r["name"]): (r["kl_mean"], r["kl_windows"]) for r in found.rows}
        found.table["x-targets"] = targets(losses, ".4f")
        path = write_quality(found, out)
        print(quality_table.format_table(found))
        for line in found.table["x-targets"]:
            print(line)
        print(f"\ntable   {path}\nreport  {write_report(out)}", flush=True)


if __name__ == "__main__":
    main(run, OUT)
