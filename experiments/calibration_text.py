"""Which text should a plan be calibrated on? What each mix is worth on text it has not seen.

    python experiments/calibration_text.py --text=wiki.txt --text=novel.txt

For every mix: `turboq calibrate` of as many windows (4 of 1024 tokens unless said) shared by its
texts, then the plan of `turboq plan --budget` (`choose.plan_within`, unchecked), measured on
topics:heldout, source:heldout and every --text. self:0 is text that the model writes itself. Ratios
of KL to the default mix are geometric means over paired windows, by text and over those kinds that
no mix holds, with a bootstrap interval.

Writes calibration_text.json and the statistics of every mix, and resumes after an interruption.
Expected: about 25 minutes on two quiet cores; a mix beats either of its parts on text of a third
kind, and one kind of text alone is best on itself only.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from absl import app, flags, logging

from turboq.errors import TurboqError
from turboq.files import atomic_write
from turboq_calibrate.choose.budget import Budget
from turboq_calibrate.choose.plan_within import Wanted, menu, plan_within
from turboq_calibrate.cost.metrics import bootstrap_ci
from turboq_calibrate.measure.evaluate import NamedPlan, evaluate_texts
from turboq_calibrate.models import Model, load_model
from turboq_calibrate.models.geometry import model_geometry
from turboq_calibrate.observe.observe import observe
from turboq_calibrate.observe.texts import CALIBRATION, mixed_windows

MODEL = flags.DEFINE_string("model", "embedded", "Model to quantize.")
TEXT = flags.DEFINE_multi_string("text", [], "More texts to measure on.")
BUDGETS = flags.DEFINE_list("budgets", ["3.25"], "Bits per channel.")
WINDOWS = flags.DEFINE_integer("windows", 1, "Windows measured per text.", lower_bound=1)
CALIBRATED = flags.DEFINE_integer("calibrated", 4, "Windows a mix is calibrated on.", lower_bound=3)
LENGTH = flags.DEFINE_integer("length", 1024, "Tokens per window.", lower_bound=2)
OUT = flags.DEFINE_string("out", "runs/calibration_text", "Folder for the result.")

MIXES = (
    CALIBRATION,
    "topics:calibration",
    "source:calibration",
    "self:0",
    f"{CALIBRATION},self:0",
)
ALWAYS = ("topics:heldout", "source:heldout")


def plans(model: Model, mix: str, out: Path) -> list[NamedPlan]:
    """The plan of every budget after calibration on one mix."""
    folder = out / mix.replace(":", "_").replace(",", "+")
    windows = mixed_windows(
        mix.split(","), model.tokenizer, length=LENGTH.value, count=CALIBRATED.value, model=model,
        folder=out,
    )  # fmt: skip
    print(f"{mix}: calibrating", flush=True)
    statistics, geometry, found = observe(model, windows, folder), model_geometry(model), []
    for bits in BUDGETS.value:
        wanted = Wanted(budget=Budget.parse(f"{bits}bpc"))
        ready = menu(statistics, geometry, wanted)
        one = plan_within(statistics, geometry, wanted, prepared=ready)
        found.append((f"{bits} {mix}", one.plan, one.arrays))
    return found


def contrasts(rows: list[dict]) -> list[dict]:
    """Every mix over the default one, by text and over the texts that no mix holds a part of."""
    kl = {(row["name"], row["text"]): np.log(row["kl_windows"]) for row in rows}
    texts = list(dict.fromkeys(row["text"] for row in rows))
    found = []
    for bits in BUDGETS.value:
        for mix in MIXES[1:]:
            pairs = {t: kl[f"{bits} {mix}", t] - kl[f"{bits} {CALIBRATION}", t] for t in texts}
            unseen = [pairs[t] for t in texts if t not in ALWAYS]
            if unseen:
                pairs["all unseen kinds"] = np.concatenate(unseen)
            for text, logs in pairs.items():
                ci = bootstrap_ci(logs)
                found.append({
                    "bits": float(bits), "mix": mix, "over": CALIBRATION, "text": text,
                    "kl_ratio": float(np.exp(logs.mean())),
                    "ratio_ci": None if ci is None else np.exp(ci).tolist(),
                })  # fmt: skip
    return found


def run(out: Path) -> None:
    model = load_model(MODEL.value)
    rows = [row for mix in MIXES for row in plans(model, mix, out)]
    sources = (
        mixed_windows([s], model.tokenizer, length=LENGTH.value, count=WINDOWS.value)
        for s in (*ALWAYS, *TEXT.value)
    )
    texts = {windows.source: windows.tokens for windows in sources}
    found = evaluate_texts(model, rows, texts, folder=out / "parts")
    names = ("name", "text", "bits_per_channel", "kl_mean", "kl_ci", "kl_windows")
    result = {
        "model": model.spec.name,
        "model_fingerprint": model.fingerprint,
        "calibrated": f"{CALIBRATED.value} windows of {LENGTH.value} tokens a mix",
        "texts": found.table["texts"],
        "rows": [{name: row[name] for name in names} for row in found.rows],
        "contrasts": contrasts(found.rows),
        "run": found.run,
    }
    atomic_write(out / "calibration_text.json", json.dumps(result, indent=1) + "\n")
    print(f"{'bits':>5} {'mix':<46} {'text':<24} {'KL':>8}")
    for row in result["rows"]:
        bits, mix = row["name"].split(" ", 1)
        print(f"{bits:>5} {mix:<46} {row['text'][-24:]:<24} {row['kl_mean']:>8.4f}")
    print(f"\n{'bits':>5} {'mix over default':<46} {'text':<24} {'ratio':>6}  95 % interval")
    for c in result["contrasts"]:
        ci = "" if c["ratio_ci"] is None else "{:.3f} - {:.3f}".format(*c["ratio_ci"])
        print(f"{c['bits']:>5} {c['mix']:<46} {c['text'][-24:]:<24} {c['kl_ratio']:>6.3f}  {ci}")
    print(f"\nresult  {out / 'calibration_text.json'}")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    try:
        run(Path(OUT.value))
    except (TurboqError, OSError) as error:
        sys.exit(f"calibration_text: error: {error}")
    except KeyboardInterrupt:
        sys.exit("calibration_text: interrupted: the same command continues")


if __name__ == "__main__":
    app.run(main)
