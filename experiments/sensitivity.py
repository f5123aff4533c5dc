"""Which heads matter? Costs predicted from statistics against the KL of one unit at a time.

    python experiments/sensitivity.py --out=runs/sensitivity

For every (layer, KV head, K or V) of the model and one candidate: the cost that `turboq plan`
predicts from what was observed on --fit (`turboq_calibrate.cost.predicted`), the relative squared
error, and the true KL with only that unit quantized on a window of --text; then rank correlations
of both with KL, over units. Writes sensitivity.json and sensitivity.svg.
Finished passes are kept in
--out, and the same command continues. Expected: the predicted cost orders units as the KL does, the
relative error does not.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from turboq.cache.layer import TokenPolicy
from turboq.cache.simulate import quantize_dequantize
from turboq.codecs import TurboQuantMSE
from turboq.codecs.observed import Observed
from turboq.errors import TurboqError
from turboq.files import atomic_write, make_folder
from turboq.plan.build import Side
from turboq_calibrate.candidates.makers import learned, named
from turboq_calibrate.candidates.table import Maker, Table, build_table
from turboq_calibrate.cost.agreement import compare_scores, format_scores
from turboq_calibrate.cost.measured import isolated_costs, measure, unit_moves
from turboq_calibrate.cost.predicted import predicted_costs
from turboq_calibrate.cost.side_by_side import Engine
from turboq_calibrate.models import load_model
from turboq_calibrate.models.geometry import model_geometry
from turboq_calibrate.observe import texts as data
from turboq_calibrate.observe.observe import observe
from turboq_calibrate.observe.statistics_files import Statistics

MODEL = flags.DEFINE_string("model", "embedded", "The model to measure.")
FIT = flags.DEFINE_multi_string(
    "fit", ["topics:calibration"], "Text that candidates are fitted on."
)
TEXT = flags.DEFINE_multi_string("text", ["topics:heldout"], "Text to measure on.")
CANDIDATE = flags.DEFINE_enum("candidate", "transform", ["transform", "turboquant_mse"], "Codec.")
BITS = flags.DEFINE_float("bits", 2.5, "Bits per channel of `transform`, codes of turboquant_mse.")
TOKENS = flags.DEFINE_integer("tokens", 512, "Tokens of the window.", lower_bound=16)
EVERY = flags.DEFINE_integer("every", 1, "Measure the KL of every n-th unit.", lower_bound=1)
ROWS = flags.DEFINE_integer("rows", 6, "Units that share a forward pass.", lower_bound=1)
OUT = flags.DEFINE_string("out", "runs/sensitivity", "Folder for the result.")

FIT_WINDOWS = 4


def maker(dim: int) -> Maker:
    """The candidate that all units get."""
    if CANDIDATE.value == "transform":
        return learned({f"transform {BITS.value:g}": BITS.value})[0]
    bits = round(BITS.value)
    return named(f"turboquant_mse {bits}", TurboQuantMSE(dim=dim, bits=bits))


def run(out: Path) -> None:
    make_folder(out)
    model = load_model(MODEL.value)
    geometry = model_geometry(model)
    policy = TokenPolicy(sinks=4)
    fit = data.mixed_windows(FIT.value, model.tokenizer, length=1024, count=FIT_WINDOWS)
    window = data.mixed_windows(TEXT.value, model.tokenizer, length=TOKENS.value, count=1)
    statistics = observe(model, fit, out)

    def observed(layer: int, side: Side) -> Observed:
        return statistics.layers[layer].observed(side)

    table = build_table(geometry, [maker(geometry.cache_layers[0].k_dim)], observed)
    costs = {
        "predicted": predicted_costs(table, observed).mean(axis=2),
        "relative error": relative_errors(table, statistics),
    }
    engine = Engine(model, table, window.tokens, policy)
    moves = unit_moves(table)[:: EVERY.value]
    found = measure(engine, moves, rows=ROWS.value, path=out / f"{table.labels[0]}.jsonl")
    kl = isolated_costs(table, found)
    joint = engine.kl(np.zeros((1, len(table.units)), int))[0].mean()
    rows = compare_scores(table, costs, kl)
    result = {
        "model": model.spec.name,
        "model_fingerprint": model.fingerprint,
        "text": window.source,
        "tokens": int(window.tokens.size),
        "fit": fit.source,
        "fit_tokens": int(fit.tokens.size),
        "sinks": policy.sinks,
        "candidate": table.labels[0],
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
    atomic_write(out / "sensitivity.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    draw(table, kl[:, 0], {name: values[:, 0] for name, values in costs.items()}, out)
    print(format_scores(rows))
    print(f"\nsum of single-unit KL {np.nansum(kl):.4g}, all units at once {joint:.4g}")
    print(f"result  {out / 'sensitivity.json'}\npicture {out / 'sensitivity.svg'}")


def relative_errors(table: Table, statistics: Statistics) -> np.ndarray:
    """Squared error over squared deviation of every unit on the sampled tokens."""
    out = []
    for layer, side in sorted(table.options):
        seen = statistics.layers[layer].observed(side)
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
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "turboq"
    import matplotlib.pyplot as plt

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


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    try:
        run(Path(OUT.value))
    except (TurboqError, OSError) as error:
        sys.exit(f"sensitivity: error: {error}")
    except KeyboardInterrupt:
        sys.exit("sensitivity: interrupted: the same command continues")


if __name__ == "__main__":
    app.run(main)
