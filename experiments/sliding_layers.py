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
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags
from program import items, main, named, statistics_of, windows_at, write_quality

from turboq.cache import accounting
from turboq.cache.layer import TokenPolicy
from turboq.codecs import Codec, Exact, PerHead, TurboQuantMSE
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

MODEL = flags.DEFINE_string("model", "gemma3-270m", "A model with sliding and full layers.")
STATISTICS = flags.DEFINE_string("statistics", "", "Folder of `turboq calibrate`; none: made.")
TEXT = flags.DEFINE_multi_string("text", ["topics:heldout"], "Texts to measure on.")
flags.DEFINE_multi_string("lengths", ["1024", "4096", "16384"], "Tokens of windows.")
WINDOWS = flags.DEFINE_integer("windows", 1, "Windows per text and length.", lower_bound=1)
BUDGETS = flags.DEFINE_multi_string(
    "budgets", ["2.25", "3.25"], "Bits per channel of learned plans."
)
APART = flags.DEFINE_multi_string(
    "apart", ["learned 2.25", "turboquant_mse 3b"], "Rows by kind of layer."
)
ROWS = flags.DEFINE_multi_string("rows", [], "Only these rows; all by default.")
CONTEXT = flags.DEFINE_integer("context", 32768, "Where bytes are counted for the last row.")
OUT = flags.DEFINE_string("out", "runs/sliding_layers", "Folder for the result.")

POLICY = TokenPolicy(sinks=4)
Make = Callable[[Statistics], NamedPlan]
KINDS = {"sliding layers": False, "full layers": True}  # and whether they see all tokens


def makers(geometry: ModelGeometry) -> dict[str, Make]:
    """All layers alike: how each row is made, in the order of the table; a plan is chosen once."""
    dim, budgets = geometry.cache_layers[0].k_dim, items(BUDGETS)

    def fixed(name: str, codec: Callable[..., Codec], bits: int) -> Make:
        def make(seen: Statistics) -> NamedPlan:
            own = codec(dim=dim, bits=bits)
            return name, *make_plan(geometry, k=own, v=own, policy=POLICY, statistics=seen)

        return make

    @functools.cache
    def within(budget: str, name: str, seen: Statistics) -> NamedPlan:
        wanted = Wanted(budget=Budget.parse(budget), policy=POLICY)
        found = plan_within(seen, geometry, wanted, progress=False)
        return name, found.plan, found.arrays

    def learned(bits: str) -> Make:
        return functools.partial(within, f"{bits}bpc", f"learned {bits}")

    def at_context(seen: Statistics) -> NamedPlan:
        _, plan, _ = learned(budgets[0])(seen)
        held = plan.residency(CONTEXT.value).total
        return within(f"{CONTEXT.value}@{held}B", last, seen)

    last = f"learned {budgets[0]} at {CONTEXT.value}"
    codecs = {f"turboquant_mse {bits}b": (TurboQuantMSE, bits) for bits in (2, 3, 4)}
    codecs |= {"per_head 3b": (PerHead, 3)}
    return {
        **{name: fixed(name, codec, bits) for name, (codec, bits) in codecs.items()},
        **{f"learned {bits}": learned(bits) for bits in budgets},
        last: at_context,
    }


def only(row: NamedPlan, kind: str, name: str) -> NamedPlan:
    """The plan with one kind of layer quantized, the others in bfloat16."""
    _, plan, arrays = row
    layers: list[LayerPlan] = []
    for layer, own in zip(plan.layers, plan.model.cache_layers, strict=True):
        if _full(plan.model, own.index) is not KINDS[kind]:
            k, v = (SidePlan(codec=Exact(dim=dim)) for dim in (own.k_dim, own.v_dim))
            layer = LayerPlan(index=layer.index, path=layer.path, k=k, v=v)
            arrays = {n: a for n, a in arrays.items() if not n.startswith(f"layers.{own.index}.")}
        layers.append(layer)
    kept = dataclasses.replace(plan, layers=tuple(layers), arrays=None, quality=None)
    return name, kept, arrays


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
    made = makers(geometry)
    whole = [name for name in made if name in named(APART, made)]
    apart = {f"{name} ({says} only)": (name, says) for name in whole for says in KINDS}
    wanted = named(ROWS, [*made, *apart]) or [*made, *apart]
    statistics = statistics_of(model, STATISTICS.value, out / "observed")
    needed = {apart[name][0] if name in apart else name for name in wanted}
    plans = {name: make(statistics) for name, make in made.items() if name in needed}
    kinds = [bits_by_kind(name, plan) for name, plan, _ in plans.values()]
    rows = [row for name, row in plans.items() if name in wanted]
    rows += [only(plans[of], says, name) for name, (of, says) in apart.items() if name in wanted]
    texts = windows_at(model, TEXT.value, lengths, WINDOWS.value)
    found = evaluate_texts(model, rows, texts, plan_batch=4, folder=out / "windows")
    found.table["x-kinds"] = kinds
    path = write_quality(found, out)
    print(quality_table.format_table(found))
    for row in kinds:
        each = ", ".join(f"{kind} {bits:.2f}" for kind, bits in row["bits"].items())
        megabytes = row["all_bytes"] / 2**20
        print(f"{row['name']}: bits per channel of {each}; {megabytes:.1f} MiB at {CONTEXT.value}")
    print(f"\ntable   {path}\nreport  {write_report(out)}")


if __name__ == "__main__":
    main(run, OUT)
