"""What does `per_head` learn that matters? Its parts, one at a time, at equal bytes.

    ./scripts/demo && .venv/bin/python experiments/per_head_parts.py

Takes the statistics of a run (--run, by default the demo's), switches the learned parts of a 3-bit
`per_head` plan off and on, measures all on held-out text, and writes --out (in the form of
quality.json). About two minutes on two cores. Expected: the key mean earns nearly everything.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from absl import app, flags, logging

from turboq.cache.layer import TokenPolicy
from turboq.codecs import PerHead, TurboQuantMSE
from turboq.codecs.per_head import default_arrays
from turboq.errors import TurboqError
from turboq.plan import Plan
from turboq_calibrate.fit.plan import make_plan
from turboq_calibrate.measure import quality_table as quality
from turboq_calibrate.measure.evaluate import evaluate
from turboq_calibrate.models import load_model
from turboq_calibrate.models.geometry import model_geometry
from turboq_calibrate.observe import texts as data
from turboq_calibrate.observe.statistics_files import load_statistics

RUN = flags.DEFINE_string("run", "runs/demo", "Folder that holds `statistics/`.")
MODEL = flags.DEFINE_string("model", "embedded", "The model they are of.")
TEXT = flags.DEFINE_multi_string("text", ["topics:heldout"], "Text to measure on.")
BITS = flags.DEFINE_integer("bits", 3, "Bits of every plan.", lower_bound=1, upper_bound=8)
WINDOWS = flags.DEFINE_integer("windows", 4, "Windows of 1024 tokens.", lower_bound=1)
OUT = flags.DEFINE_string("out", "runs/per_head_parts", "Folder for the table.")

# name -> sides whose mean is removed, sides whose codebook is fitted
PARTS = {
    "nothing": ("", ""),
    "V mean": ("v", ""),
    "K mean": ("k", ""),
    "both means": ("kv", ""),
    "both codebooks": ("", "kv"),
    "means and codebooks": ("kv", "kv"),
}


def part(plan: Plan, arrays: dict, means: str, codebooks: str) -> dict:
    """The plan's arrays with everything not named replaced by what TurboQuant would use."""
    out = dict(arrays)
    for layer in plan.layers:
        for side in ("k", "v"):
            codec = layer.side(side).codec
            assert isinstance(codec, PerHead)
            default = default_arrays(codec)
            for array, kept in (("mean", means), ("codebook", codebooks)):
                name = f"layers.{layer.index}.{side}.{array}"
                if side not in kept:
                    out[name] = np.broadcast_to(default[array], arrays[name].shape).copy()
    return out


def run() -> None:
    model = load_model(MODEL.value)
    geometry, statistics = model_geometry(model), load_statistics(Path(RUN.value) / "statistics")
    windows = data.mixed_windows(TEXT.value, model.tokenizer, length=1024, count=WINDOWS.value)
    dim, policy = geometry.cache_layers[0].k_dim, TokenPolicy(sinks=4)
    codec = PerHead(dim=dim, bits=BITS.value)
    plan, arrays = make_plan(geometry, k=codec, v=codec, policy=policy, statistics=statistics)
    uniform = TurboQuantMSE(dim=dim, bits=BITS.value)
    rows = [("turboquant_mse", *make_plan(geometry, k=uniform, v=uniform, policy=policy))]
    rows += [(name, plan, part(plan, arrays, *kept)) for name, kept in PARTS.items()]
    static = PerHead(dim=dim, bits=BITS.value, scale="head")
    rows.append(
        (
            "static scale",
            *make_plan(geometry, k=static, v=static, policy=policy, statistics=statistics),
        )
    )
    measured = evaluate(model, rows, windows.tokens, text=windows.source)
    path = quality.write_quality(measured, Path(OUT.value))
    print(quality.format_table(measured))
    print(f"\ntable   {path}")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    try:
        run()
    except (TurboqError, OSError) as error:
        sys.exit(f"per_head_parts: error: {error}")


if __name__ == "__main__":
    app.run(main)
