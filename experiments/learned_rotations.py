"""Can a basis be trained past the joint one? `transform` before and after, and data-free rotations.

    python experiments/learned_rotations.py --out=runs/learned_rotations

Rows at the same stored bits per channel, K and V, every head its own, first 4 tokens exact:

    joint     `transform` in the joint basis, segments by measured water-filling (the start)
    trained   the same segments, rotation and scales trained (`fit.trained_rotation`)
    blocks    `rope_block`: no dense basis
    plain     `hadamard_per_head` with the signs of seed 0 and no order (TurboQuant with a mean)
    searched  `hadamard_per_head` as found by search

Fitted and trained on windows of --fit; evaluated on other windows of the same text (validation) and
on --text. Writes learned_rotations.json, prints a table. Finished layers are kept in --out, and the
same command continues. About five minutes on two cores with the default flags. Expected: trained is
below joint on training text; whether it is on other text is the question.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

import numpy as np
from absl import app, flags, logging

from turboq.cache.layer import TokenPolicy
from turboq.codecs import HadamardPerHead
from turboq.codecs.fit_rope_block import rope_block_at
from turboq.codecs.fit_transform import TransformOptions, fit_heads, transform_at
from turboq.errors import TurboqError
from turboq.files import atomic_write, make_folder
from turboq.numbers.rotation import Rotation
from turboq_calibrate.candidates.table import Option, Table
from turboq_calibrate.fit.trained_rotation import Recipe, learn_rotations
from turboq_calibrate.measure.evaluate import evaluate
from turboq_calibrate.models import load_model
from turboq_calibrate.models.geometry import model_geometry
from turboq_calibrate.observe import texts as data
from turboq_calibrate.observe.observe import observe
from turboq_calibrate.observe.recipe import ObserveRecipe

MODEL = flags.DEFINE_string("model", "embedded", "The model to measure.")
FIT = flags.DEFINE_multi_string("fit", ["topics:calibration"], "Text to fit and train on.")
TEXT = flags.DEFINE_multi_string("text", ["topics:heldout"], "Text to measure on.")
BITS = flags.DEFINE_integer("bits", 3, "Bits of codes; 16 per vector come on top, as a gain.")
GAIN = flags.DEFINE_enum("gain", "float16", ["none", "code", "float16"], "Gain of `transform`.")
LENGTH = flags.DEFINE_integer("length", 1024, "Tokens of a window.", lower_bound=64)
FIT_WINDOWS = flags.DEFINE_integer("fit_windows", 4, "Windows to fit on.", lower_bound=1)
WINDOWS = flags.DEFINE_integer("windows", 2, "Windows of each text to measure.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 150, "Training steps per side, a multiple of 50.")
RATE = flags.DEFINE_float("rate", 0.001, "Learning rate.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of gradients and batches.")
OUT = flags.DEFINE_string("out", "runs/learned_rotations", "Folder for the result.")

LABELS = ("joint", "trained", "blocks", "plain", "searched")


def run(out: Path) -> None:
    make_folder(out)
    seconds, clock = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        seconds[name], clock = time.perf_counter() - clock, time.perf_counter()

    model = load_model(MODEL.value)
    geometry = model_geometry(model)
    policy = TokenPolicy(sinks=4)
    count = FIT_WINDOWS.value + WINDOWS.value
    every = data.mixed_windows(FIT.value, model.tokenizer, length=LENGTH.value, count=count)
    # Every n-th window is for validation, so that both parts see the whole text.
    held = np.arange(WINDOWS.value) * count // WINDOWS.value
    fit, validation = np.delete(every.tokens, held, axis=0), every.tokens[held]
    test = data.mixed_windows(TEXT.value, model.tokenizer, length=LENGTH.value, count=WINDOWS.value)
    windows = dataclasses.replace(every, tokens=fit, text=np.delete(every.text, held))
    statistics = observe(model, windows, out, ObserveRecipe(skip=policy.sinks, seed=SEED.value))
    lap("observe")
    keys = [(layer.index, side) for layer in geometry.cache_layers for side in ("k", "v")]
    options = TransformOptions(gain=GAIN.value)
    seen = {(layer, side): statistics.layers[layer].observed(side) for layer, side in keys}
    fits = {key: fit_heads(seen[key], options) for key in keys}
    starts = {
        key: transform_at(seen[key], stored(own[0]), options, fits=own) for key, own in fits.items()
    }
    lap("joint")
    recipe = Recipe(steps=STEPS.value, learning_rate=RATE.value, seed=SEED.value)
    rotated = learn_rotations(seen, starts, fits, out / "rotations", recipe=recipe)
    lap("trained")
    made = {}
    for key in keys:
        blocks = rope_block_at(seen[key], stored(fits[key][0]), options)
        dim = seen[key].dim
        codec = HadamardPerHead(dim=dim, bits=BITS.value)
        found = codec.fit(seen[key])
        signs = np.broadcast_to(Rotation(kind="hadamard", dim=dim).signs, found["signs"].shape)
        order = np.broadcast_to(np.arange(dim), found["order"].shape)
        plain = found | {"signs": signs, "order": order}
        heads = len(found["signs"])
        made[key] = (
            option(starts[key]),
            option(rotated[key].heads),
            option(blocks),
            Option.shared(codec, heads, lambda plain=plain: plain),
            Option.shared(codec, heads, lambda found=found: found),
        )
    lap("blocks and signs")
    table = Table(LABELS, made, "", "after")
    plans = [(n, *table.to_plan(geometry, table.uniform(i, i), policy=policy))
             for i, n in enumerate(LABELS)]  # fmt: skip
    tables = {
        name: evaluate(model, plans, tokens, text=name).table
        for name, tokens in (("validation", validation), ("test", test.tokens))
    }
    lap("evaluate")
    start = np.concatenate([rotated[k].start for k in keys])
    trained = np.concatenate([rotated[k].trained for k in keys])
    error = {
        "start": {"k": mean(rotated, "start", "k"), "v": mean(rotated, "start", "v")},
        "trained": {"k": mean(rotated, "trained", "k"), "v": mean(rotated, "trained", "v")},
    }
    result = {
        "model": model.spec.name,
        "model_fingerprint": model.fingerprint,
        "fit": every.source,
        "fit_tokens": int(fit.size),
        "test": test.source,
        "sinks": policy.sinks,
        "gain": GAIN.value,
        "recipe": {"steps": recipe.steps, "learning_rate": recipe.learning_rate,
                   "batch": recipe.batch, "seed": recipe.seed},
        "heads": len(start),
        "accepted": int(np.sum(trained < start)),
        "searched_heads": int(sum(np.any(o[3].arrays[h]["signs"] != o[4].arrays[h]["signs"])
                                  or np.any(o[3].arrays[h]["order"] != o[4].arrays[h]["order"])
                                  for o in made.values() for h in range(len(o[3].arrays)))),
        "validation_error": error,
        "seconds": {n: round(s, 1) for n, s in seconds.items()},
        "tables": tables,
    }  # fmt: skip
    atomic_write(
        out / "learned_rotations.json", json.dumps(result, indent=1, allow_nan=False) + "\n"
    )
    report(result)
    print(f"result {out / 'learned_rotations.json'}")


def stored(fit) -> int:
    """Bits per vector of every row: the codes and a 16-bit gain or scale."""
    return BITS.value * len(fit.basis.mean) + 16


def option(heads) -> Option:
    return Option(tuple(c for c, _ in heads), lambda: [a for _, a in heads])


def mean(rotated, name: str, side: str) -> float:
    """Error of the codec over the signal on tokens that training did not see, mean over heads."""
    return float(np.mean([getattr(r, name) for k, r in rotated.items() if k[1] == side]))


def report(result: dict) -> None:
    heads, accepted = result["heads"], result["accepted"]
    print(f"\ntrained arrays accepted in {accepted} of {heads} heads, searched signs in "
          f"{result['searched_heads']}")  # fmt: skip
    for name, sides in result["validation_error"].items():
        print(f"{name:8} relative error K {sides['k']:.4g}  V {sides['v']:.4g}")
    for name, table in result["tables"].items():
        print(f"\n{name}: row, bits per channel, KL mean, by window")
        for row in table["rows"]:
            windows = " ".join(f"{x:.4f}" for x in row["kl_windows"])
            print(
                f"  {row['name']:9} {row['bits_per_channel']:.4f}  {row['kl_mean']:.4f}  {windows}"
            )


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    try:
        run(Path(OUT.value))
    except (TurboqError, OSError) as error:
        sys.exit(f"learned_rotations: error: {error}")
    except KeyboardInterrupt:
        sys.exit("learned_rotations: interrupted: the same command continues")


if __name__ == "__main__":
    app.run(main)
