"""Which heads matter? Costs predicted from statistics against the KL of one unit at a time.

    python experiments/sensitivity.py --out=runs/sensitivity

For every (layer, KV head, K or V) of the model and one candidate: the cost that `turboq plan`
predicts from a folder of statistics (`choose.plan_within.menu`), the relative squared error, and
the true KL with only that unit quantized on a window of --text; then rank correlations of both with
KL, over units. Writes sensitivity.json and sensitivity.svg. Finished passes are kept in --out, and
the same command continues. Expected: the predicted cost orders units as the KL does, the relative
error does not.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from program import main, pyplot, statistics_of, write_json

from turboq.cache.layer import TokenPolicy
from turboq.cache.simulate import quantize_dequantize
from turboq.errors import TurboqError
from turboq.files import make_folder
from turboq_calibrate.candidates.table import Table
from turboq_calibrate.choose.budget import Budget
from turboq_calibrate.choose.plan_within import Wanted, menu
from turboq_calibrate.cost.agreement import compare_scores, format_scores
from turboq_calibrate.cost.measured import isolated_costs, measure, unit_moves
from turboq_calibrate.cost.side_by_side import Engine
from turboq_calibrate.models import load_model
from turboq_calibrate.models.geometry import model_geometry
from turboq_calibrate.observe import texts as data
from turboq_calibrate.observe.statistics_files import Statistics

MODEL = flags.DEFINE_string("model", "embedded", "The model to measure.")
STATISTICS = flags.DEFINE_string("statistics", "", "Folder of `turboq calibrate`; none: made.")
TEXT = flags.DEFINE_multi_string("text", ["topics:heldout"], "Text to measure on.")
CANDIDATE = flags.DEFINE_string("candidate", "window:2.5", "One candidate (`turboq plan`).")
TOKENS = flags.DEFINE_integer("tokens", 512, "Tokens of the window.", lower_bound=16)
EVERY = flags.DEFINE_integer("every", 1, "Measure the KL of every n-th unit.", lower_bound=1)
ROWS = flags.DEFINE_integer("rows", 6, "Units that share a forward pass.", lower_bound=1)
OUT = flags.DEFINE_string("out", "runs/sensitivity", "Folder for the result.")

ANY = Budget.parse("3bpc")  # nothing is chosen: the candidate is named


def run(out: Path) -> None:
    make_folder(out)
    model = load_model(MODEL.value)
    policy = TokenPolicy(sinks=4)
    window = data.mixed_windows(TEXT.value, model.tokenizer, length=TOKENS.value, count=1)
    statistics = statistics_of(model, STATISTICS.value, out)
    wanted = Wanted(budget=ANY, candidates=(CANDIDATE.value,), policy=policy)
    ready = menu(statistics, model_geometry(model), wanted)
    table = ready.table
    label, *others = table.labels
    if others:
        raise TurboqError(f"--candidate={CANDIDATE.value} names {1 + len(others)}: name one")
    costs = {
        "predicted": ready.costs.mean(axis=2),
        "relative error": relative_errors(table, statistics),
    }
    engine = Engine(model, table, window.tokens, policy)
    moves = unit_moves(table)[:: EVERY.value]
    found = measure(engine, moves, rows=ROWS.value, path=out / f"{label}.jsonl")
    kl = isolated_costs(table, found)
    joint = engine.kl(np.zeros((1, len(table.units)), int))[0].mean()
    rows = compare_scores(table, costs, kl)
    result = {
        "model": model.spec.name,
        "model_fingerprint": model.fingerprint,
        "text": window.source,
        "tokens": int(window.tokens.size),
        "calibration": statistics.manifest.inputs["text"],
        "sinks": policy.sinks,
        "candidate": label,
        "bits_per_channel": table.bits_per_channel(np.zeros(len(table.units), int)),
        "sum_of_isolated_kl": float(np.nansum(kl)),
        "joint_kl": float(joint),
        "scores": rows,
        "units": [
            {"layer": u.layer, "head": u.head, "side": u.side, "kl": number(kl[i, 0])}
            | {name: float(values[i, 0]) for name, values in costs.items()}
            for i, u in enumerate(table.units)
        ],
    }
    write_json(out / "sensitivity.json", result)
    draw(table, kl[:, 0], {name: values[:, 0] for name, values in costs.items()}, out)
    print(format_scores(rows))
    print(f"\nsum of single-unit KL {np.nansum(kl):.4g}, all units at once {joint:.4g}")
    print(f"result  {out / 'sensitivity.json'}\npicture {out / 'sensitivity.svg'}")


def relative_errors(table: Table, statistics: Statistics) -> np.ndarray:
    """Squared error over squared deviation of every unit on the sampled tokens."""
    out = []
    for layer, side in sorted(table.options):
        seen = statistics.layers[layer].observed(side, table.k_rope if side == "k" else "after")
        for codec, heads, arrays in table.options[layer, side][0].groups:
            x = seen.x[list(heads)]
            back = quantize_dequantize(
                codec, jax.tree.map(jnp.asarray, arrays), jnp.moveaxis(jnp.asarray(x), 0, 1)[None]
            )[0]
            error = np.square(np.moveaxis(np.asarray(back), 1, 0) - x).sum(axis=(1, 2))
            spread = np.square(x - x.mean(axis=1, keepdims=True)).sum(axis=(1, 2))
            out += [(layer, side, h, e / s) for h, e, s in zip(heads, error, spread, strict=True)]
    return np.array([[ratio] for *_, ratio in sorted(out)])


def number(x: float) -> float | None:
    return float(x) if np.isfinite(x) else None


def draw(table: Table, kl: np.ndarray, scores: dict[str, np.ndarray], out: Path) -> None:
    """KL of every unit against what was predicted, keys and values apart."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(scores), figsize=(4 * len(scores), 4), layout="constrained")
    side = np.array([u.side for u in table.units])
    for axis, (name, values) in zip(axes, scores.items(), strict=True):
        for part, mark in (("k", "o"), ("v", "x")):
            axis.plot(values[side == part], kl[side == part], mark, label=part.upper())
        axis.set(xscale="log", yscale="log", xlabel=f"predicted: {name}")
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="measured KL of one unit, nats per token")
    axes[0].legend()
    figure.savefig(out / "sensitivity.svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main(run, OUT)
