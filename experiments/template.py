"""What does one more bit buy? (Copy this file, and make its first line your question.)

    python experiments/template.py --out=runs/template

Expected, written down before the first run: KL falls about fourfold per bit (the error by 6 dB),
whatever the text. What to change is `plans_of` and BASELINES.

Writes template.json (rows, paired contrasts, and all that would make them again) and prints the
contrasts; run again, it reads what is finished. --smoke runs two short windows in seconds: does it
run at all? What it finds goes into LOG.md, negative results too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from program import kl_ratio, main, statistics_of, windows_of, write_json

from turboq.codecs import PerHead
from turboq.files import make_folder
from turboq.plan import ModelGeometry
from turboq_calibrate import evaluate_texts, load_model, make_plan, model_geometry
from turboq_calibrate.measure.evaluate import NamedPlan
from turboq_calibrate.observe.statistics_files import Statistics

MODEL = flags.DEFINE_string("model", "embedded", "A folder, a .gguf file, or 'embedded'.")
STATISTICS = flags.DEFINE_string(
    "statistics", "", "Folder of `turboq calibrate`; by default its defaults, observed into --out."
)
TEXT = flags.DEFINE_multi_string(
    "text", ["topics:heldout", "source:heldout"], "Texts to measure on, each by itself."
)
WINDOWS = flags.DEFINE_integer("windows", 4, "Windows of each text.", lower_bound=2)
LENGTH = flags.DEFINE_integer("length", 512, "Tokens per window.", lower_bound=8)
SMOKE = flags.DEFINE_boolean("smoke", False, "Two windows of 16 tokens: does it run at all?")
OUT = flags.DEFINE_string("out", "runs/template", "Folder for the result.")

BASELINES = {"3 bits": "2 bits", "4 bits": "3 bits"}  # what a plan is compared with


def plans_of(geometry: ModelGeometry, statistics: Statistics) -> list[NamedPlan]:
    """Plans that differ in one thing."""
    dim = geometry.cache_layers[0].k_dim
    plans: list[NamedPlan] = []
    for bits in (2, 3, 4):
        codec = PerHead(dim=dim, bits=bits)
        plan, arrays = make_plan(geometry, k=codec, v=codec, statistics=statistics)
        plans.append((f"{bits} bits", plan, arrays))
    return plans


def run(out: Path) -> None:
    count, length = (2, 16) if SMOKE.value else (WINDOWS.value, LENGTH.value)
    model = load_model(MODEL.value)
    statistics = statistics_of(model, STATISTICS.value, make_folder(out) / "observed")
    texts = windows_of(model, TEXT.value, length, count)
    plans = plans_of(model_geometry(model), statistics)
    found = evaluate_texts(model, plans, texts, folder=out / "parts")
    names = ("name", "text", "bits_per_channel", "kl_mean", "kl_ci", "kl_windows")
    rows = [{name: row[name] for name in names} for row in found.rows]
    result = {
        "question": (__doc__ or "").splitlines()[0],
        "model_fingerprint": model.fingerprint,
        "calibration": statistics.manifest.inputs["text"],
        "texts": found.table["texts"],
        "rows": rows,
        "contrasts": [c for pair in BASELINES.items() for c in contrasts(rows, *pair)],
    }
    write_json(out / "template.json", result)
    for c in result["contrasts"]:
        low, high = c["ratio_ci"]
        print(f"{c['what']:<18} {c['text'][-18:]:<18} {c['kl_ratio']:.3f} ({low:.3f} - {high:.3f})")
    print(out / "template.json")


def contrasts(rows: list[dict[str, Any]], name: str, baseline: str) -> list[dict[str, Any]]:
    """KL of a plan over its baseline's on each text: exp(mean log ratio) over paired windows."""
    logs = {(row["name"], row["text"]): np.log(row["kl_windows"]) for row in rows}
    out = []
    for text in dict.fromkeys(row["text"] for row in rows):
        change = logs[name, text] - logs[baseline, text]
        out.append({"what": f"{name} / {baseline}", "text": text} | kl_ratio(change))
    return out


if __name__ == "__main__":
    main(run, OUT)
