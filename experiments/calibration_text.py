"""Which text, in which windows, should a plan be calibrated on? Worth on text it has not seen.

    python experiments/calibration_text.py --text=wiki.txt --text=novel.txt

For every row of ROWS: `turboq calibrate` of its texts (self:0 is what the model writes itself),
then the plan of `turboq plan --budget` (`choose.plan_within`, unchecked), measured on
topics:heldout, source:heldout and every --text in windows of 1,024 tokens. Ratios of KL to the
default are geometric means over paired windows, by text and over those kinds that no row holds,
with a bootstrap interval.

Writes calibration_text.json and the statistics of every row, and resumes after an interruption.
Expected: about 25 minutes on two quiet cores with three --text; what the model writes is worth more
on other kinds than either kind of text that is at hand, and those are best on themselves.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from absl import flags
from program import items, kl_ratio, main, windows_of, write_json

from turboq_calibrate.choose.budget import Budget
from turboq_calibrate.choose.plan_within import Wanted, plan_within
from turboq_calibrate.measure.evaluate import NamedPlan, evaluate_texts
from turboq_calibrate.models import Model, load_model
from turboq_calibrate.models.geometry import model_geometry
from turboq_calibrate.observe import texts
from turboq_calibrate.observe.observe import observe
from turboq_calibrate.observe.texts import CALIBRATION

MODEL = flags.DEFINE_string("model", "embedded", "Model to quantize.")
TEXT = flags.DEFINE_multi_string("text", [], "More texts to measure on.")
BUDGETS = flags.DEFINE_multi_string("budgets", ["3.25"], "Bits per channel.")
WINDOWS = flags.DEFINE_integer("windows", 1, "Windows measured per text.", lower_bound=1)
LENGTH = flags.DEFINE_integer("length", 1024, "Tokens of those windows.", lower_bound=2)
OUT = flags.DEFINE_string("out", "runs/calibration_text", "Folder for the result.")

TOPICS, SOURCE, SELF = "topics:calibration", "source:calibration", "self:0"
# Texts, windows of all together, tokens per window.
Row = tuple[tuple[str, ...], int, int]
DEFAULT: Row = (CALIBRATION, texts.COUNT, texts.LENGTH)
ROWS: tuple[Row, ...] = (
    DEFAULT,
    ((SELF,), texts.COUNT, texts.LENGTH),
    ((SELF, TOPICS, SOURCE), texts.COUNT, texts.LENGTH),
    ((TOPICS, SOURCE), texts.COUNT, texts.LENGTH),
    ((TOPICS,), texts.COUNT, texts.LENGTH),
    ((SOURCE,), texts.COUNT, texts.LENGTH),
    ((TOPICS, SOURCE), texts.COUNT // 2, 2 * texts.LENGTH),
    (CALIBRATION, texts.COUNT // 2, texts.LENGTH),
)
ALWAYS = ("topics:heldout", "source:heldout")


def name(row: Row) -> str:
    sources, count, length = row
    return f"{', '.join(s.partition(':')[0] for s in sources)} {count} x {length}"


def plans(model: Model, row: Row, out: Path) -> list[NamedPlan]:
    """The plan of every budget after calibration on one row."""
    sources, count, length = row
    folder = out / "_".join(name(row).replace(",", "").split())
    windows = texts.mixed_windows(
        sources, model.tokenizer, length=length, count=count, model=model, folder=out
    )
    print(f"{name(row)}: calibrating", flush=True)
    statistics, geometry, found = observe(model, windows, folder), model_geometry(model), []
    for bits in items(BUDGETS):
        wanted = Wanted(budget=Budget.parse(f"{bits}bpc"))
        one = plan_within(statistics, geometry, wanted)
        found.append((f"{bits} {name(row)}", one.plan, one.arrays))
    return found


def contrasts(rows: list[dict]) -> list[dict]:
    """Every row over the default one, by text and over the texts that no row holds a part of."""
    kl = {(row["name"], row["text"]): np.log(row["kl_windows"]) for row in rows}
    measured = list(dict.fromkeys(row["text"] for row in rows))
    found = []
    for bits in items(BUDGETS):
        for row in map(name, ROWS[1:]):
            pairs = {t: kl[f"{bits} {row}", t] - kl[f"{bits} {name(DEFAULT)}", t] for t in measured}
            unseen = [pairs[t] for t in measured if t not in ALWAYS]
            if unseen:
                pairs["all unseen kinds"] = np.concatenate(unseen)
            for text, logs in pairs.items():
                found.append({
                    "bits": float(bits), "calibrated": row, "over": name(DEFAULT), "text": text,
                } | kl_ratio(logs))  # fmt: skip
    return found


def run(out: Path) -> None:
    model = load_model(MODEL.value)
    rows = [plan for row in ROWS for plan in plans(model, row, out)]
    measured = windows_of(model, (*ALWAYS, *TEXT.value), LENGTH.value, WINDOWS.value)
    found = evaluate_texts(model, rows, measured, folder=out / "parts")
    fields = ("name", "text", "bits_per_channel", "kl_mean", "kl_ci", "kl_windows")
    result = {
        "model": model.spec.name,
        "model_fingerprint": model.fingerprint,
        "texts": found.table["texts"],
        "rows": [{field: row[field] for field in fields} for row in found.rows],
        "contrasts": contrasts(found.rows),
        "run": found.run,
    }
    write_json(out / "calibration_text.json", result)
    print(f"{'bits':>5} {'calibrated on':<32} {'text':<24} {'KL':>8}")
    for row in result["rows"]:
        bits, what = row["name"].split(" ", 1)
        print(f"{bits:>5} {what:<32} {row['text'][-24:]:<24} {row['kl_mean']:>8.4f}")
    print(f"\n{'bits':>5} {'over the default':<32} {'text':<24} {'ratio':>6}  95 % interval")
    for c in result["contrasts"]:
        ci = "" if c["ratio_ci"] is None else "{:.3f} - {:.3f}".format(*c["ratio_ci"])
        what = f"{c['bits']:>5} {c['calibrated']:<32} {c['text'][-24:]:<24}"
        print(f"{what} {c['kl_ratio']:>6.3f}  {ci}")
    print(f"\nresult  {out / 'calibration_text.json'}")


if __name__ == "__main__":
    main(run, OUT)
