"""Do sliding layers want fewer bits, and does a plan of short windows hold at long ones?

    python experiments/sliding_layers.py --statistics=runs/gemma --text=novel.txt

For a model with sliding windows (Gemma 3: 15 of 18 layers keep 512 tokens). Plans of TurboQuant,
`per_head` and `turboq plan --budget`, first 4 tokens exact, on windows of every --lengths:
all layers quantized, only the sliding ones, only the full ones. "learned at CONTEXT" is what
`turboq plan --budget=CONTEXT@BYTES` writes within the bytes that the learned plan of the first
--budgets has there: it knows that a sliding layer holds its window.

Expected, written down before the first run: sliding layers cost most of the loss, as they are most
of the layers; at CONTEXT they get more bits and full layers fewer, for less loss at equal bytes; KL
does not grow with length.

Writes quality.json, quality.csv, report.html and, in quality.json, bits by kind of layer; resumes
after an interruption.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags
from field_rows import chosen
from program import main, statistics_of

from turboq.cache import accounting
from turboq.cache.layer import TokenPolicy
from turboq.codecs import Exact, PerHead, TurboQuantMSE
from turboq.errors import TurboqError
from turboq.plan import LayerPlan, ModelGeometry, Plan, SidePlan
from turboq_calibrate.choose.budget import Budget
from turboq_calibrate.choose.plan_within import Wanted, plan_within
from turboq_calibrate.cli import common
from turboq_calibrate.fit.plan import make_plan
from turboq_calibrate.measure import quality_table
from turboq_calibrate.measure.evaluate import NamedPlan, evaluate_texts
from turboq_calibrate.measure.html_page import write_report
from turboq_calibrate.models import load_model
from turboq_calibrate.models.geometry import model_geometry
from turboq_calibrate.observe.statistics_files import Statistics
from turboq_calibrate.observe.texts import mixed_windows

MODEL = flags.DEFINE_string("model", "gemma3-270m", "A model with sliding and full layers.")
STATISTICS = flags.DEFINE_string("statistics", "", "Folder of `turboq calibrate`; none: made.")
TEXT = flags.DEFINE_multi_string("text", ["topics:heldout"], "Texts to measure on.")
flags.DEFINE_list("lengths", ["1024", "4096", "16384"], "Tokens of windows.")
WINDOWS = flags.DEFINE_integer("windows", 1, "Windows per text and length.", lower_bound=1)
BUDGETS = flags.DEFINE_list("budgets", ["2.25", "3.25"], "Bits per channel of learned plans.")
APART = flags.DEFINE_list("apart", ["learned 2.25", "turboquant_mse 3b"], "Rows by kind of layer.")
ROWS = flags.DEFINE_list("rows", [], "Only these rows; all by default.")
CONTEXT = flags.DEFINE_integer("context", 32768, "Where bytes are counted for the last row.")
OUT = flags.DEFINE_string("out", "runs/sliding_layers", "Folder for the result.")

POLICY = TokenPolicy(sinks=4)
KINDS = {"sliding layers": False, "full layers": True}  # and whether they see all tokens


def plans(geometry: ModelGeometry, statistics: Statistics) -> Iterator[NamedPlan]:
    """All layers alike, in the order of the table."""
    dim = geometry.cache_layers[0].k_dim
    codecs = {f"turboquant_mse {bits}b": TurboQuantMSE(dim=dim, bits=bits) for bits in (2, 3, 4)}
    codecs |= {"per_head 3b": PerHead(dim=dim, bits=3)}
    for name, codec in codecs.items():
        yield name, *make_plan(geometry, k=codec, v=codec, policy=POLICY, statistics=statistics)
    held = None
    for bits in BUDGETS.value:
        wanted = Wanted(budget=Budget.parse(f"{bits}bpc"), policy=POLICY)
        found = plan_within(statistics, geometry, wanted, progress=False)
        yield f"learned {bits}", found.plan, found.arrays
        held = held or found.plan.residency(CONTEXT.value).total
    wanted = Wanted(budget=Budget.parse(f"{CONTEXT.value}@{held}B"), policy=POLICY)
    found = plan_within(statistics, geometry, wanted, progress=False)
    yield f"learned {BUDGETS.value[0]} at {CONTEXT.value}", found.plan, found.arrays


def only(row: NamedPlan, full: bool, says: str) -> NamedPlan:
    """The plan with one kind of layer quantized, the others in bfloat16."""
    name, plan, arrays = row
    layers: list[LayerPlan] = []
    for layer, own in zip(plan.layers, plan.model.cache_layers, strict=True):
        if _full(plan.model, own.index) is not full:
            k, v = (SidePlan(codec=Exact(dim=dim)) for dim in (own.k_dim, own.v_dim))
            layer = LayerPlan(index=layer.index, path=layer.path, k=k, v=v)
            arrays = {n: a for n, a in arrays.items() if not n.startswith(f"layers.{own.index}.")}
        layers.append(layer)
    kept = dataclasses.replace(plan, layers=tuple(layers), arrays=None, quality=None)
    return f"{name}, {says}", kept, arrays


def _full(geometry: ModelGeometry, index: int) -> bool:
    return geometry.kept_window(index) is None


def bits_by_kind(name: str, plan: Plan) -> dict[str, Any]:
    """Mean bits per channel of the layers of a kind, and all bytes at --context."""
    at: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for layer, own in zip(plan.storage, plan.model.cache_layers, strict=True):
        kind = next(k for k, full in KINDS.items() if _full(plan.model, own.index) is full)
        at[kind].append(accounting.bits_per_channel([layer]))
    mean = {kind: sum(bits) / len(bits) for kind, bits in at.items()}
    held = plan.residency(CONTEXT.value)
    return {"name": name, "bits": mean, "cache_bytes": held.cache, "all_bytes": held.total}


def run(out: Path) -> None:
    model = load_model(MODEL.value)
    geometry = model_geometry(model)
    if len({_full(geometry, layer.index) for layer in geometry.cache_layers}) < 2:
        raise TurboqError(f"--model={MODEL.value} has no sliding layers beside full ones")
    lengths = common.lengths_of(flags.FLAGS, model.spec)
    statistics = statistics_of(model, STATISTICS.value, out / "observed")
    rows = list(plans(geometry, statistics))
    known = {row[0] for row in rows}
    for name in APART.value:
        if name not in known:
            raise TurboqError(f"--apart: {name!r} is none of {', '.join(sorted(known))}")
    kinds = [bits_by_kind(name, plan) for name, plan, _ in rows]
    apart = itertools.product((row for row in rows if row[0] in APART.value), KINDS.items())
    rows += [only(row, full, f"{says} only") for row, (says, full) in apart]
    rows = [row for row in rows if row[0] in chosen({row[0]: row for row in rows}, ROWS.value)]
    texts = {}
    for source, length in itertools.product(TEXT.value, lengths):
        windows = mixed_windows([source], model.tokenizer, length=length, count=WINDOWS.value)
        texts[f"{windows.source} at {length}"] = windows.tokens
    found = evaluate_texts(model, rows, texts, plan_batch=4, folder=out / "windows")
    found.table["x-kinds"] = kinds
    path = quality_table.write_quality(found, out)
    print(quality_table.format_table(found))
    for row in kinds:
        each = ", ".join(f"{kind} {bits:.2f}" for kind, bits in row["bits"].items())
        megabytes = row["all_bytes"] / 2**20
        print(f"{row['name']}: bits per channel of {each}; {megabytes:.1f} MiB at {CONTEXT.value}")
    print(f"\ntable   {path}\nreport  {write_report(out)}")


if __name__ == "__main__":
    main(run, OUT)
