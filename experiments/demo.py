"""The main job, end to end, on the embedded model: what does each plan cost, per token it stores?

    ./scripts/demo          (or: python experiments/demo.py --out=runs/demo)

Calibrates SmolLM2-135M-Instruct on text that it writes itself and on half of the Python language
reference, makes plans (TurboQuant, per head, and learned ones as `turboq plan --budget`),
measures all of them on the reference's other half and on text of a kind that calibration has not
seen (this project's licence), and writes to --out:

    plan.json, plan.safetensors     the learned 3.25-bit plan
    plans/NAME/                     every plan of the table
    quality.json, .csv, run.json    the table
    report.html                     the same as pictures
    self_0_*.safetensors            what the model wrote
    statistics/                     what was observed: other plans come from it in seconds

It saves time where the command does not: `turboq plan` calibrates on 16 windows and checks its plan
on windows held back and at four times the length before it writes it.

Expected: turboquant_mse falling about fourfold per bit; learned at 3.25 bits below turboquant_mse
at 4.25 on both texts.

Finished steps are not repeated when it is run again after an interruption.
"""

from __future__ import annotations

import time
from pathlib import Path

from absl import flags
from program import items, main, windows_of, write_quality

from turboq.cache.layer import TokenPolicy
from turboq.codecs import Codec, PerHead, TurboQuantMSE
from turboq.files import make_folder
from turboq.plan import save
from turboq_calibrate.choose.budget import Budget
from turboq_calibrate.choose.plan_within import Wanted, menu, plan_within
from turboq_calibrate.fit.plan import make_plan
from turboq_calibrate.measure import quality_table
from turboq_calibrate.measure.evaluate import NamedPlan, evaluate_texts
from turboq_calibrate.measure.html_page import write_report
from turboq_calibrate.models import Model, load_model
from turboq_calibrate.models.geometry import model_geometry
from turboq_calibrate.observe.observe import observe
from turboq_calibrate.observe.statistics_files import Statistics
from turboq_calibrate.observe.texts import calibration_windows
from turboq_calibrate.run.peak_memory import peak_rss
from turboq_calibrate.run.progress import phases
from turboq_calibrate.run.shown import USUAL, showing

LICENCE = str(Path(__file__).resolve().parents[1] / "LICENSE")
OUT = flags.DEFINE_string("out", "runs/demo", "Where everything is written.")
MODEL = flags.DEFINE_string("model", "embedded", "A folder, a .gguf file, or 'embedded'.")
TEXT = flags.DEFINE_multi_string("text", ["topics:heldout", LICENCE], "Texts to measure on.")
WINDOWS = flags.DEFINE_integer("windows", 2, "Windows of each to measure on.", lower_bound=1)
LENGTH = flags.DEFINE_integer("window_length", 512, "Tokens of those windows.", lower_bound=2)
CALIBRATION_WINDOWS = flags.DEFINE_integer(
    "calibration_windows", 12, "Windows of 512 tokens to calibrate on.", lower_bound=2
)
BUDGETS = flags.DEFINE_multi_string(
    "budgets", ["2.25", "3.25"], "Bits per channel of learned plans."
)

POLICY = TokenPolicy(sinks=4)


def codecs(dim: int) -> dict[str, Codec]:
    """The uniform rows. turboquant_mse and per_head take equal bytes at equal bits."""
    return {
        **{f"turboquant_mse {b}b": TurboQuantMSE(dim=dim, bits=b) for b in (3, 4)},
        "per_head 3b": PerHead(dim=dim, bits=3),
    }


def plans(model: Model, statistics: Statistics, out: Path) -> list[NamedPlan]:
    """Every row of the table; the last learned plan is written to `out` itself."""
    geometry, found = model_geometry(model), []
    for name, codec in codecs(geometry.cache_layers[0].k_dim).items():
        made = make_plan(geometry, k=codec, v=codec, policy=POLICY, statistics=statistics)
        found.append((name, *made))
    for bits in items(BUDGETS):
        wanted = Wanted(budget=Budget.parse(f"{bits}bpc"), policy=POLICY)
        ready = menu(statistics, geometry, wanted)
        one = plan_within(statistics, geometry, wanted, prepared=ready)
        found.append((f"learned {bits}", one.plan, one.arrays))
    _, plan, arrays = found[-1]
    save(plan, arrays, out)
    for name, plan, arrays in found:
        save(plan, arrays, folder_of(out, name))
    return found


def folder_of(out: Path, name: str) -> Path:
    """Where a row's plan is."""
    return out / "plans" / name.replace(" ", "_")


def demo(out: Path) -> None:
    """Runs all steps into `out` and prints the table and where everything is."""
    make_folder(out)
    labels = ("self:", "observe", *("fit", "costs") * len(items(BUDGETS)), "evaluate")
    with showing(USUAL), phases(*labels):
        measured = steps(out)
    report = write_report(out)

    print(quality_table.format_table(measured))
    print(f"\nplan    {out}/plan.json, {out}/plan.safetensors (learned {items(BUDGETS)[-1]})")
    print(f"table   {out}/{quality_table.QUALITY}, {out}/{quality_table.TABLE}")
    print(f"report  {report}")


def steps(out: Path) -> quality_table.Quality:
    """Calibrates, plans and measures into `out`."""
    model = load_model(MODEL.value)
    windows = calibration_windows(model, count=CALIBRATION_WINDOWS.value, folder=out)
    statistics = observe(model, windows, out)
    rows = plans(model, statistics, out)
    texts = windows_of(model, TEXT.value, LENGTH.value, WINDOWS.value)
    measured = evaluate_texts(model, rows, texts, folder=out / "parts")
    measured.run["plans"] = {name: str(folder_of(out, name)) for name, *_ in rows}
    write_quality(measured, out)
    return measured


def run(out: Path) -> None:
    started = time.monotonic()
    demo(out)
    print(f"time    {time.monotonic() - started:.0f} s, peak memory {peak_rss() / 2**20:,.0f} MiB")
    print("\nOn your own model (a Hugging Face folder or a .gguf file):")
    print("  turboq plan --model=FOLDER --budget=3.25bpc --out=runs/mine")


if __name__ == "__main__":
    main(run, OUT)
