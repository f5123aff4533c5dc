"""Can a learned plan's bases be trained past the joint ones by gradient descent?

    python experiments/learned_rotations.py --statistics=runs/mine

The plan of `turboq plan --budget=3.25bpc --candidates=transform` (scalar codes: training moves
tokens among fixed points), and the same plan with rotation and scales of every head trained on the
sampled tokens (`fit.trained_rotation`): segments, bits and bytes stay. A head keeps what it learned
only where its error on tokens that training did not see is lower. KL on --text, first 4 tokens
exact. Writes learned_rotations.json, prints a table; finished layers are kept in --out, and the
same command continues. Expected: about a quarter of the heads take it; whether that is worth
anything on other text is the question.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from absl import flags
from program import main, statistics_of, windows_of, write_json

from turboq.codecs.fit_transform import fit_heads
from turboq.plan import ModelGeometry
from turboq.plan.types import SIDES
from turboq_calibrate.candidates.makers import LEARNED
from turboq_calibrate.candidates.table import Option, Table
from turboq_calibrate.choose.budget import Budget
from turboq_calibrate.choose.plan_within import Wanted, menu, plan_within
from turboq_calibrate.fit.trained_rotation import Heads, Recipe, learn_rotations
from turboq_calibrate.measure import quality_table
from turboq_calibrate.measure.evaluate import NamedPlan, evaluate_texts
from turboq_calibrate.models import load_model
from turboq_calibrate.models.geometry import model_geometry
from turboq_calibrate.observe.statistics_files import Statistics

MODEL = flags.DEFINE_string("model", "embedded", "The model to measure.")
STATISTICS = flags.DEFINE_string("statistics", "", "Folder of `turboq calibrate`; none: made.")
TEXT = flags.DEFINE_multi_string("text", ["topics:heldout"], "Texts to measure on.")
BITS = flags.DEFINE_float("bits", 3.25, "Bits per channel.")
LENGTH = flags.DEFINE_integer("length", 1024, "Tokens of a window.", lower_bound=64)
WINDOWS = flags.DEFINE_integer("windows", 2, "Windows of each text.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 150, "Training steps per side, a multiple of 50.")
RATE = flags.DEFINE_float("rate", 0.001, "Learning rate.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of batches.")
OUT = flags.DEFINE_string("out", "runs/learned_rotations", "Folder for the result.")

SCALAR = "transform"


def run(out: Path) -> None:
    model = load_model(MODEL.value)
    statistics = statistics_of(model, STATISTICS.value, out)
    plans, summary = learned_and_trained(model_geometry(model), statistics, out)
    texts = windows_of(model, TEXT.value, LENGTH.value, WINDOWS.value)
    found = evaluate_texts(model, plans, texts, folder=out / "parts")
    result = summary | {
        "model": model.spec.name,
        "model_fingerprint": model.fingerprint,
        "calibration": statistics.manifest.inputs["text"],
        "texts": found.table["texts"],
        "rows": found.rows,
    }
    path = out / "learned_rotations.json"
    write_json(path, result)
    print(quality_table.format_table(found))
    print(f"\ntrained arrays accepted in {summary['accepted']} of {summary['heads']} heads")
    for name, sides in summary["error"].items():
        print(f"{name:8} error over signal K {sides['k']:.4g}  V {sides['v']:.4g}")
    print(f"result {path}")


def learned_and_trained(
    geometry: ModelGeometry, statistics: Statistics, out: Path
) -> tuple[list[NamedPlan], dict]:
    """The command's plan, the same with trained arrays, and what training did."""
    budget = Budget.parse(f"{BITS.value:g}bpc")
    wanted = Wanted(budget=budget, candidates=(SCALAR,))
    ready = menu(statistics, geometry, wanted)
    start = plan_within(statistics, geometry, wanted, prepared=ready)
    table, chosen = ready.table, start.allocation.chosen
    quantizer, states = LEARNED[SCALAR]
    options = dataclasses.replace(ready.guarded.options, quantizer=quantizer, states=states)
    seen, fits, starts = {}, {}, {}
    for key in table.options:
        layer, side = key
        rope = table.k_rope if side == "k" else "after"
        seen[key] = statistics.layers[layer].observed(side, rope)
        fits[key] = fit_heads(seen[key], options)
        own = [table.options[key][c] for c in chosen[table.rows(layer, side)]]
        starts[key] = [(o.codecs[h], o.arrays[h]) for h, o in enumerate(own)]
    recipe = Recipe(steps=STEPS.value, learning_rate=RATE.value, seed=SEED.value)
    rotated = learn_rotations(seen, starts, fits, out / "rotations", recipe=recipe)
    made = {key: (option(rotated[key].heads),) for key in table.options}
    trained = Table((SCALAR,), made, k_rope=table.k_rope, windows=table.windows)
    same = np.zeros(len(trained.units), int)
    plan, arrays = trained.to_plan(geometry, same, policy=ready.policy)
    name = f"{SCALAR} {BITS.value:g}"

    def mean(which: str, side: str) -> float:
        return float(np.mean([getattr(r, which) for k, r in rotated.items() if k[1] == side]))

    summary = {
        "recipe": dataclasses.asdict(recipe),
        "heads": len(trained.units),
        "accepted": int(sum(found.accepted.sum() for found in rotated.values())),
        "error": {
            which: {side: mean(which, side) for side in SIDES} for which in ("start", "trained")
        },
    }
    plans = [(name, start.plan, start.arrays), (f"{name}, trained", plan, arrays)]
    return plans, summary


def option(heads: Heads) -> Option:
    return Option(tuple(codec for codec, _ in heads), lambda: [arrays for _, arrays in heads])


if __name__ == "__main__":
    main(run, OUT)
