"""The main job, end to end, on the embedded model: what does each codec cost, per token it stores?

    ./scripts/demo          (or: python experiments/demo.py --out=runs/demo)

Captures statistics of SmolLM2-135M-Instruct on one part of the Python language reference, fits a
plan per codec, measures all of them on the other part, and writes to --out:

    plan.json, plan.safetensors     the 3-bit per-head plan, with its measured quality
    plans/NAME/                     every plan of the table
    quality.json, .csv, run.json    the table
    report.html                     the same as pictures
    statistics/                     what was captured

Expected: exact bf16 near zero; turboquant_mse falling about fourfold per bit; per_head below it at
equal bytes; turboquant_prod far above turboquant_mse at equal bits (its keys are noisy).

Finished steps are not repeated when it is run again after an interruption.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

from absl import app, flags, logging

from turboq.cache.layer import TokenPolicy
from turboq.codecs import Codec, Exact, PerHead, TurboQuantMSE, TurboQuantProd
from turboq.errors import TurboqError
from turboq.files import atomic_write, make_folder
from turboq.plan import Measurement, Plan, Quality, document, save
from turboq.version import __version__
from turboq_calibrate.fit.plan import make_plan
from turboq_calibrate.measure import quality_table as quality
from turboq_calibrate.measure.evaluate import evaluate
from turboq_calibrate.measure.html_page import write_report
from turboq_calibrate.models import Model, load_model
from turboq_calibrate.models.geometry import model_geometry
from turboq_calibrate.observe import texts as data
from turboq_calibrate.observe.capture import CaptureRecipe, capture
from turboq_calibrate.run.peak_memory import peak_rss

OUT = flags.DEFINE_string("out", "runs/demo", "Where everything is written.")
MODEL = flags.DEFINE_string("model", "embedded", "A folder, a .gguf file, or 'embedded'.")
TEXT = flags.DEFINE_multi_string("text", ["topics:heldout"], "Text to measure on.")
WINDOWS = flags.DEFINE_integer("windows", 8, "Windows to measure on.", lower_bound=1)
LENGTH = flags.DEFINE_integer("window_length", 1024, "Tokens per window.", lower_bound=2)
CALIBRATION_TEXT = flags.DEFINE_multi_string(
    "calibration_text", ["topics:calibration"], "Text to calibrate on."
)
CALIBRATION_WINDOWS = flags.DEFINE_integer(
    "calibration_windows", 16, "Windows to calibrate on.", lower_bound=1
)
SINKS = flags.DEFINE_integer("sinks", 4, "First tokens kept exact.", lower_bound=0)

MAIN = "per_head 3b"  # the plan that --out itself holds


def codecs(dim: int) -> dict[str, Codec]:
    """The rows of the table. turboquant_mse and per_head take equal bytes at equal bits."""
    return {
        "exact bf16": Exact(dim=dim),
        **{f"turboquant_mse {b}b": TurboQuantMSE(dim=dim, bits=b) for b in (2, 3, 4)},
        "turboquant_prod 3b": TurboQuantProd(dim=dim, bits=3),
        **{f"per_head {b}b": PerHead(dim=dim, bits=b) for b in (2, 3, 4)},
    }


def text_windows(model: Model, sources: list[str], count: int) -> data.Windows:
    return data.mixed_windows(sources, model.tokenizer, length=LENGTH.value, count=count)


def demo(out: Path) -> None:
    """Runs all steps into `out` and prints the table and where everything is."""
    make_folder(out)
    model = load_model(MODEL.value)
    calibration = text_windows(model, CALIBRATION_TEXT.value, CALIBRATION_WINDOWS.value)
    heldout = text_windows(model, TEXT.value, WINDOWS.value)
    recipe = CaptureRecipe(skip=SINKS.value)
    statistics = capture(model, calibration, out, recipe)

    geometry, policy = model_geometry(model), TokenPolicy(sinks=SINKS.value)
    plans = {}
    for name, codec in codecs(geometry.cache_layers[0].k_dim).items():
        plan, arrays = make_plan(geometry, k=codec, v=codec, policy=policy, statistics=statistics)
        plans[name] = save(plan, arrays, out / "plans" / name.replace(" ", "_")), arrays

    measured = measure(model, plans, heldout, out)
    plan, arrays = plans[MAIN]
    row = next(row for row in measured.rows if row["name"] == MAIN)
    save(dataclasses.replace(plan, quality=Quality(measured=(measurement(row),))), arrays, out)
    report = write_report(out)

    print(quality.format_table(measured))
    print(f"\nplan    {out}/plan.json, {out}/plan.safetensors ({MAIN})")
    print(f"table   {out}/{quality.QUALITY}, {out}/{quality.TABLE}")
    print(f"report  {report}")


def measure(
    model: Model, plans: dict[str, tuple[Plan, dict]], heldout: data.Windows, out: Path
) -> quality.Quality:
    """Evaluates, unless the table in `out` is of exactly these inputs."""
    inputs = {
        "version": __version__,
        "model": model.fingerprint,
        "windows": heldout.sha256,
        "plans": {name: document(plan)["hash"] for name, (plan, _) in plans.items()},
    }
    stamp = out / "evaluated.json"
    if stamp.exists() and stamp.read_text() == json.dumps(inputs, indent=1):
        print(f"{out}/{quality.QUALITY} is complete: nothing to evaluate")
        return quality.read_quality(out)
    stamp.unlink(missing_ok=True)
    rows = [(name, plan, arrays) for name, (plan, arrays) in plans.items()]
    measured = evaluate(model, rows, heldout.tokens, text=heldout.source)
    quality.write_quality(measured, out)
    atomic_write(stamp, json.dumps(inputs, indent=1))
    return measured


def measurement(row: dict) -> Measurement:
    """A row of the table as the plan carries it."""
    interval = row["kl_ci"]
    return Measurement(
        text=row["text"],
        kl_mean=row["kl_mean"],
        kl_median=row["kl_median"],
        kl_p99=row["kl_p99"],
        kl_ci=None if interval is None else tuple(interval),
        top1=row["top1"],
        perplexity=row["perplexity"],
    )


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    started = time.monotonic()
    logging.set_verbosity(logging.WARNING)  # Orbax speaks of every checkpoint
    try:
        demo(Path(OUT.value))
    except (TurboqError, OSError) as error:
        sys.exit(f"demo: error: {error}")
    except KeyboardInterrupt:
        print("demo: interrupted: the same command continues", file=sys.stderr)
        sys.exit(130)
    print(f"time    {time.monotonic() - started:.0f} s, peak memory {peak_rss() / 2**20:,.0f} MiB")


if __name__ == "__main__":
    app.run(main)
