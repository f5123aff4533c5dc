"""How many bits does learning save, on text and at lengths that calibration has not seen?

    python experiments/learned_vs_turboquant.py --text=wiki.txt --text=novel.txt --long=novel.txt

Calibrates as `turboq calibrate` does by default (or reads --statistics), takes the plan that
`turboq plan --budget` would write at every budget (`choose.plan_within`, the same function), and
measures all of them on topics:heldout, source:heldout and every --text beside TurboQuant (and, with
--field, per-head and field codecs): first 4 tokens exact, no recent window, K and V quantized, KL
to the model's own exact cache. --long texts are measured again in windows of --long_length tokens.
Block codecs keep up to a block of recent tokens exact: their rows say so. Nothing is fitted to what
is measured; the default text was chosen on three of the README's seven (calibration_text.py).

Writes quality.json (rows of all texts), quality.csv, long/quality.json and `targets`, resumes after
an interruption. Expected: half an hour on two cores with two windows of seven texts; `learned` at
2.25 bits at a third to a sixth of the loss of `turboquant_mse` at 4.25, at 1.75 about equal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags
from nova import nova_like
from program import items, main, statistics_of, windows_of, write_quality

from turboq import codecs as c
from turboq.cache.layer import TokenPolicy
from turboq.codecs.oscar import CLIP_PERCENT
from turboq.plan import ModelGeometry
from turboq.plan.geometry import RopeForm
from turboq_calibrate.choose.budget import Budget
from turboq_calibrate.choose.plan_within import Wanted, menu, plan_within
from turboq_calibrate.fit.plan import make_plan
from turboq_calibrate.measure import quality_table
from turboq_calibrate.measure.evaluate import NamedPlan, evaluate_texts
from turboq_calibrate.models import load_model
from turboq_calibrate.models.geometry import model_geometry
from turboq_calibrate.observe.statistics_files import Statistics

MODEL = flags.DEFINE_string("model", "embedded", "Model to quantize.")
STATISTICS = flags.DEFINE_string("statistics", "", "Folder of `turboq calibrate`; none: made.")
TEXT = flags.DEFINE_multi_string("text", [], "More texts to measure on.")
LONG = flags.DEFINE_multi_string("long", [], "Texts to measure in long windows too.")
LONG_LENGTH = flags.DEFINE_integer("long_length", 4096, "Tokens of long windows.", lower_bound=2)
WINDOWS = flags.DEFINE_integer("windows", 2, "Windows of 1024 tokens per text.", lower_bound=1)
CANDIDATES = flags.DEFINE_multi_string("candidates", [], "Of learned plans (`turboq plan`).")
BUDGETS = flags.DEFINE_multi_string(
    "budgets", ["1.25", "1.5", "1.75", "2.25", "2.75", "3.25"], "Bits of learned plans."
)
ONLY = flags.DEFINE_multi_string("only", [], "Only rows whose name contains one of these.")
FIELD = flags.DEFINE_boolean("field", False, "Also 2-bit, per-head, INT, OSCAR-, NOVA-like, KIVI.")
SHARING = flags.DEFINE_boolean("sharing", False, "Also learned plans per layer and uniform.")
SHRINK = flags.DEFINE_multi_string("shrink", [], "Learned plans so (0 to 1), not as guarded.")
K_ROPE = flags.DEFINE_multi_string("k_rope", ["before"], "Forms of keys, as of `turboq plan`.")
OUT = flags.DEFINE_string("out", "runs/learned_vs_turboquant", "Folder for the result.")

POLICY = TokenPolicy(sinks=4)
LENGTH = 1024
SHARED = (2.25, 3.25)  # budgets at which granularities, heads apart and forms are compared
APART = ", heads apart"
ALWAYS = ("topics:heldout", "source:heldout")
# Learned budget -> the plan whose KL it must not exceed, on every text.
TARGETS = {
    "a bit saved": ("learned 3.25", "turboquant_mse 4b"),
    "two bits": ("learned 2.25", "turboquant_mse 4b"),
    "two bits and a half (stretch)": ("learned 1.75", "turboquant_mse 4b"),
    "two bits, heads apart": (f"learned 2.25{APART}", "turboquant_mse 4b"),
    "two bits, by a kernel": ("learned 2.25, keys block:256", "turboquant_mse 4b"),
}


def asked(name: str) -> bool:
    """Whether --only has the row."""
    parts = items(ONLY)
    return not parts or any(part in name for part in parts)


def baselines(geometry: ModelGeometry, statistics: Statistics) -> Iterator[NamedPlan]:
    """What the field stores, both sides alike, at its own all-in bits."""
    dim = geometry.cache_layers[0].k_dim
    rules: dict[str, tuple[c.Codec, c.Codec, RopeForm]] = {}
    for bits in (2, 3, 4) if FIELD.value else (3, 4):
        turboquant, own = c.TurboQuantMSE(dim=dim, bits=bits), c.PerHead(dim=dim, bits=bits)
        rules[f"turboquant_mse {bits}b"] = (turboquant, turboquant, "after")
        if FIELD.value:
            rules[f"per_head {bits}b"] = (own, own, "after")
        if FIELD.value and geometry.key_form() == "before":
            rules[f"per_head {bits}b, keys before RoPE"] = (own, own, "before")
            centred = dataclasses.replace(turboquant, mean=True)
            rules[f"turboquant_mse {bits}b, keys before RoPE"] = (turboquant, turboquant, "before")
            rules[f"turboquant_mse {bits}b with mean, keys before RoPE"] = (
                centred, centred, "before",
            )  # fmt: skip
            nuq = c.NUQ(dim=dim, bits=bits)
            rules[f"nuq {bits}b, keys before RoPE"] = (nuq, nuq, "before")
    for bits in (2, 3, 4) if FIELD.value else ():
        integers = c.IntAffine(dim=dim, bits=bits)
        rules[f"int{bits} hadamard"] = (integers, integers, "after")
        rules[f"oscar-like int{bits}"] = (
            c.Oscar(dim=dim, bits=bits, clip_percent=CLIP_PERCENT["k"]),
            c.Oscar(dim=dim, bits=bits, clip_percent=CLIP_PERCENT["v"]),
            "after",
        )
    if FIELD.value:
        rules["nova-like"] = (*nova_like(dim), "after")
    for bits in (2, 4) if FIELD.value else ():
        key = c.KiviKey(dim=dim, bits=bits, group=32)
        value = c.KiviValue(dim=dim, bits=bits, group=min(32, dim))
        rules[f"kivi {bits}b (up to {key.block - 1} recent tokens exact)"] = (key, value, "after")
    for name, (k, v, rope) in rules.items():
        if asked(name):
            yield (
                name,
                *make_plan(geometry, k=k, v=v, policy=POLICY, statistics=statistics, k_rope=rope),
            )


def learned(geometry: ModelGeometry, statistics: Statistics) -> Iterator[NamedPlan]:
    """The command's plans at every budget, and by granularity at some."""
    for bits in map(float, items(BUDGETS)):
        name = f"learned {bits:g}"
        wanted = Wanted(
            budget=Budget.parse(f"{bits}bpc"), policy=POLICY, candidates=tuple(CANDIDATES.value)
        )
        for form in items(K_ROPE) if bits in SHARED else ():
            for heads, says in ((None, ""), (0, APART)):
                own = f"{name}, keys {form}{says}"
                if form != "before" and asked(own):
                    turned = dataclasses.replace(wanted, k_rope=form, joint=heads)
                    found = plan_within(statistics, geometry, turned, progress=False)
                    yield own, found.plan, found.arrays
        if "before" not in items(K_ROPE):
            continue
        for shrink in map(float, items(SHRINK)):
            own = dataclasses.replace(wanted.options, shrink=shrink)
            unguarded = dataclasses.replace(wanted, options=own, guard=False)
            found = plan_within(statistics, geometry, unguarded, progress=False)
            yield f"{name}, shrunk by {shrink:g}", found.plan, found.arrays
        if SHRINK.value:
            continue
        rows = {name: wanted}
        if bits in SHARED and asked(own := name + APART):
            found = plan_within(
                statistics, geometry, dataclasses.replace(wanted, joint=0), progress=False
            )
            yield own, found.plan, found.arrays
        if bits in SHARED and SHARING.value:
            for granularity, says in (("per_layer", "per layer"), ("uniform", "uniform")):
                rows[f"learned {says} {bits:g}"] = dataclasses.replace(
                    wanted, granularity=granularity
                )
        rows = {name: one for name, one in rows.items() if asked(name)}
        if not rows:
            continue
        ready = menu(statistics, geometry, wanted)
        for name, one in rows.items():
            own = ready.under(one)
            found = plan_within(statistics, geometry, one, prepared=own, progress=False)
            yield name, found.plan, found.arrays


def run(out: Path) -> None:
    model = load_model(MODEL.value)
    geometry = model_geometry(model)
    statistics = statistics_of(model, STATISTICS.value, out)
    rows = [*baselines(geometry, statistics), *learned(geometry, statistics)]
    short = windows_of(model, [*ALWAYS, *TEXT.value], LENGTH, WINDOWS.value)
    found = evaluate_texts(model, rows, short, folder=out / "parts")
    found.table["x-calibration"] = statistics.manifest.inputs["text"]
    found.table["x-targets"] = targets(found.rows)
    path = write_quality(found, out)
    print(quality_table.format_table(found))
    show(found.table["x-targets"])
    if LONG.value:
        few = [row for row in rows if row[0].split(", keys block")[0] in LONG_ROWS]
        windows = windows_of(model, LONG.value, LONG_LENGTH.value, 1)
        long = evaluate_texts(model, few, windows, folder=out / "parts")
        long.table["x-targets"] = targets(long.rows)
        write_quality(long, out / "long")
        print(quality_table.format_table(long))
        show(long.table["x-targets"])
    print(f"\ntable   {path}")


LONG_ROWS = (
    "turboquant_mse 3b",
    "turboquant_mse 4b",
    "learned 1.75",
    "learned 2.25",
    "learned 3.25",
)


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each target on each text: KL, what it must not exceed, and whether it does not."""
    kl = {(row["text"], row["name"]): row["kl_mean"] for row in rows}
    return [
        {
            "target": f"{target}: {ours} <= {theirs}",
            "text": text,
            "kl": kl[text, ours],
            "against": kl[text, theirs],
            "met": kl[text, ours] <= kl[text, theirs],
        }
        for target, (ours, theirs) in TARGETS.items()
        for text in sorted({text for text, _ in kl})
        if (text, ours) in kl and (text, theirs) in kl
    ]


def show(found: list[dict[str, Any]]) -> None:
    for line in found:
        verdict = "met" if line["met"] else "MISSED"
        print(
            f"{line['target']}: {line['text']}: {line['kl']:.4f} against {line['against']:.4f}, "
            f"{verdict}"
        )


if __name__ == "__main__":
    main(run, OUT)
