"""How should keys stand when they are stored, and what is their mean worth?

    python experiments/key_forms.py --text=novel.txt --text=wiki.txt --long=novel.txt

Keys are quantized (values have 8 bits, which costs nothing beside that) by a scalar transform
fitted to each head (`codecs.fit_transform`, no stored gain): before RoPE, relative to blocks of 16
to 256 positions, and after it; with the head's mean taken off (before RoPE and in blocks it turns
with the position: `cache.key_form`), some also with none taken off, at --bits of a channel of K in
every head. First 4 tokens exact, KL to the exact cache on topics:heldout and every --text; at 2
bits also in one window of every --lengths of each --long.

Expected, written down before the first run: KL rises with the block, more at few bits, and after
RoPE at lengths that calibration has not seen; without a mean everything is worse, at 1 bit most.

Writes quality.json, LENGTH/quality.json, and resumes after an interruption: 40 minutes of one core.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import flags
from program import items, main, statistics_of, windows_of, write_quality

from turboq.cache.layer import TokenPolicy
from turboq.codecs import Codec, Transform
from turboq.codecs.base import stack
from turboq.codecs.fit_transform import (
    TransformOptions,
    arrays_of,
    fit_heads,
    fit_observed,
    head_rates,
)
from turboq.codecs.observed import Observed
from turboq.plan import ModelGeometry, collect_arrays, head_plan
from turboq.plan.geometry import RopeForm, rope_block
from turboq_calibrate.measure import quality_table
from turboq_calibrate.measure.evaluate import NamedPlan, evaluate_texts
from turboq_calibrate.models import load_model
from turboq_calibrate.models.geometry import model_geometry
from turboq_calibrate.observe.blocks import in_blocks
from turboq_calibrate.observe.statistics_files import Statistics

MODEL = flags.DEFINE_string("model", "embedded", "Model to quantize.")
STATISTICS = flags.DEFINE_string("statistics", "", "Folder of `turboq calibrate`; none: made.")
TEXT = flags.DEFINE_multi_string("text", [], "More texts to measure on.")
LONG = flags.DEFINE_multi_string("long", [], "Texts to measure in long windows too.")
LENGTHS = flags.DEFINE_multi_string("lengths", ["4096", "8192"], "Tokens of long windows.")
WINDOWS = flags.DEFINE_integer("windows", 1, "Windows of 1024 tokens per text.", lower_bound=1)
BITS = flags.DEFINE_multi_string("bits", ["1", "1.5", "2", "3"], "Bits of a channel of K.")
OUT = flags.DEFINE_string("out", "runs/key_forms", "Folder for the result.")

POLICY, OPTIONS = TokenPolicy(sinks=4), TransformOptions()
FORMS: tuple[RopeForm, ...] = (
    "before", "block:16", "block:32", "block:64", "block:128", "block:256", "after",
)  # fmt: skip
FEW_FORMS = ("before", "block:64", "block:256", "after")  # without a mean, and at length


def seen_so(statistics: Statistics, layer: int, form: RopeForm, mean: bool) -> Observed:
    """Keys of a layer in a form, about their mean or about zero."""
    own = statistics.layers[layer]
    if mean:
        return own.observed("k", rope=form)
    blocks = form not in ("before", "after")
    seen = _about_zero(own.observed("k", rope="before" if blocks else form))
    if not blocks:
        return seen
    assert own.rotary is not None
    return in_blocks(seen, own.rotary, rope_block(form), own.tokens().position)


def _about_zero(seen: Observed) -> Observed:
    def second(mean, covariance):
        return covariance + mean[:, :, None] * mean[:, None, :]

    zero = np.zeros_like(seen.mean)
    return dataclasses.replace(
        seen, mean=zero, weighted_mean=zero, covariance=second(seen.mean, seen.covariance),
        weighted_covariance=second(seen.weighted_mean, seen.weighted_covariance),
    )  # fmt: skip


def plans(geometry: ModelGeometry, statistics: Statistics) -> Iterator[NamedPlan]:
    """Every form at every number of bits, with the mean taken off and without."""
    owners = [layer.index for layer in geometry.cache_layers]
    values = {
        i: fit_observed(value_codec(geometry, i), statistics.layers[i].observed("v"))
        for i in owners
    }
    for form in FORMS:
        for mean in (True, False) if form in FEW_FORMS else (True,):
            keys = {i: seen_so(statistics, i, form, mean) for i in owners}
            fits = {i: fit_heads(seen, OPTIONS) for i, seen in keys.items()}
            rates = {i: head_rates(own, OPTIONS) for i, own in fits.items()}
            for bits in map(float, items(BITS)):

                def choose(layer: int, side: str, head: int, bits=bits, rates=rates) -> Codec:
                    if side == "v":
                        return value_codec(geometry, layer)
                    dim, table = geometry.layers[layer].k_dim, rates[layer][head]
                    return OPTIONS.codec(dim, table.segments[table.at(int(bits * dim))])

                def fit(layer: int, side: str, codec: Codec, keys=keys, fits=fits):
                    if side == "v":
                        return values[layer]
                    assert isinstance(codec, Transform)
                    heads = zip(fits[layer], keys[layer].x, strict=True)
                    return stack([arrays_of(codec, own, x) for own, x in heads])

                plan = head_plan(geometry, choose, k_rope=form, policy=POLICY)
                says = "" if mean else ", no mean"
                yield f"K {bits:g}b {form}{says}", plan, collect_arrays(plan, fit)


def value_codec(geometry: ModelGeometry, layer: int) -> Transform:
    dim = geometry.layers[layer].v_dim
    return OPTIONS.codec(dim, ((dim, 8),))


def run(out: Path) -> None:
    model = load_model(MODEL.value)
    statistics = statistics_of(model, STATISTICS.value, out)
    rows = list(plans(model_geometry(model), statistics))

    def measure(rows: list[NamedPlan], sources: list[str], length: int, count: int, to: Path):
        windows = windows_of(model, sources, length, count)
        result = evaluate_texts(model, rows, windows, folder=out / "parts")
        result.table["x-calibration"] = statistics.manifest.inputs["text"]
        path = write_quality(result, to)
        print(quality_table.format_table(result))
        print(f"\ntable   {path}")

    measure(rows, ["topics:heldout", *TEXT.value], 1024, WINDOWS.value, out)
    few = [row for row in rows if row[0] in {f"K 2b {form}" for form in FEW_FORMS}]
    for length in map(int, items(LENGTHS) if LONG.value else ()):
        measure(few, list(LONG.value), length, 1, out / str(length))


if __name__ == "__main__":
    main(run, OUT)
