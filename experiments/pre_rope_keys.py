"""Are keys easier to quantize before their rotary embedding? Per-channel codecs, keys only.

    python experiments/pre_rope_keys.py --out=runs/pre_rope_keys

KVQuant's claim: a channel of a key has a steady range before RoPE, and mixes with its pair after
it. Each codec is fitted on `topics:calibration` and measured on `topics:heldout` twice, on pre-RoPE
and on post-RoPE keys; values exact, first 4 tokens exact. Writes quality.json and a table, in about
two minutes on two cores. Expected: pre-RoPE far lower for `nuq`, no gain after a rotation.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags, logging

from turboq import codecs as c
from turboq.cache.layer import TokenPolicy
from turboq.errors import TurboqError
from turboq.plan import collect_arrays, uniform_plan
from turboq.plan.geometry import RopeForm
from turboq_calibrate.measure import quality_table as quality
from turboq_calibrate.measure.evaluate import evaluate
from turboq_calibrate.models import load_model
from turboq_calibrate.models.geometry import model_geometry
from turboq_calibrate.observe import texts as data
from turboq_calibrate.observe.observe import observe

MODEL = flags.DEFINE_string("model", "embedded", "A folder, a .gguf file, or 'embedded'.")
WINDOWS = flags.DEFINE_integer("windows", 2, "Windows of 1024 tokens.", lower_bound=1)
OUT = flags.DEFINE_string("out", "runs/pre_rope_keys", "Folder for the table.")


def codecs(dim: int) -> dict[str, c.Codec]:
    return {
        "nuq 3b": c.NUQ(dim=dim, bits=3),
        "nuq 2b": c.NUQ(dim=dim, bits=2),
        "per_channel int4": c.PerChannel(dim=dim, bits=4),
        "turboquant_mse 3b": c.TurboQuantMSE(dim=dim, bits=3),
    }


def run(out: Path) -> None:
    model = load_model(MODEL.value)
    geometry = model_geometry(model)

    def windows(source: str, count: int) -> data.Windows:
        return data.mixed_windows([source], model.tokenizer, length=1024, count=count)

    calibration, heldout = (
        windows("topics:calibration", 4),
        windows("topics:heldout", WINDOWS.value),
    )
    dim, rows = geometry.cache_layers[0].k_dim, []
    table, cost = {}, {}
    statistics = observe(model, calibration, out)
    forms: tuple[tuple[str, RopeForm], ...] = (("post-RoPE", "after"), ("pre-RoPE", "before"))
    for label, form in forms:

        def fit(index: int, side: str, codec: c.Codec, form: RopeForm = form):
            return codec.fit(statistics.layers[index].observed(side, rope=form))

        plans = []
        for name, codec in codecs(dim).items():
            plan = uniform_plan(
                geometry, k=codec, v=c.Exact(dim=dim), k_rope=form, policy=TokenPolicy(sinks=4)
            )
            plans.append((f"{name} {label}", plan, collect_arrays(plan, fit)))
        measured = evaluate(model, plans, heldout.tokens, text=heldout.source)
        table, cost = measured.table, measured.run
        rows += measured.rows
    rows.sort(key=lambda row: row["name"])
    total = quality.Quality(
        table={k: v for k, v in table.items() if k != "head_errors"} | {"rows": rows}, run=cost
    )
    path = quality.write_quality(total, out)
    print(quality.format_table(total))
    print(f"\ntable   {path}")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    try:
        run(Path(OUT.value))
    except (TurboqError, OSError) as error:
        sys.exit(f"pre_rope_keys: error: {error}")


if __name__ == "__main__":
    app.run(main)
