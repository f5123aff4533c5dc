"""Is a learned codec worth it? Every storage format of the field in one table, at all-in bits.

    python experiments/formats.py --out=runs/formats

For every format: keys only, values only (the other side exact bf16) and both quantized, KL to the
model's own exact cache on held-out text; first 4 tokens exact for all, except where a row names its
own token policy. Calibrated formats are fitted as `turboq plan
--codec` fits them, to the default calibration. Writes quality.json
(sorted by bits per channel), quality.csv and formats.svg. Rows are measured in batches, and a
finished batch is not repeated after an interruption. Expected: about half an hour on two cores;
`per_head` and trellis codes lowest at equal bits, INT2 without calibration highest.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from absl import flags
from nova import nova_like
from program import main, pyplot, statistics_of, write_quality

from turboq import codecs as c
from turboq.cache.layer import TokenPolicy
from turboq.codecs.ggml import mainline
from turboq.codecs.oscar import CLIP_PERCENT, RECENT, SINKS
from turboq.codecs.vllm_turboquant import PRESETS, boundary_layers, preset
from turboq.files import make_folder
from turboq.plan import ModelGeometry
from turboq.plan.rules import Rule, by_layer, rule_plan, sides, skip_layers
from turboq_calibrate.fit.plan import fit_plan
from turboq_calibrate.measure import quality_table as quality
from turboq_calibrate.measure.evaluate import NamedPlan, evaluate
from turboq_calibrate.models import load_model
from turboq_calibrate.models.geometry import model_geometry
from turboq_calibrate.observe import texts as data
from turboq_calibrate.observe.statistics_files import Statistics

STATISTICS = flags.DEFINE_string("statistics", "", "Folder of `turboq calibrate`; none: made.")
MODEL = flags.DEFINE_string("model", "embedded", "Model to quantize.")
TEXT = flags.DEFINE_multi_string("text", ["topics:heldout"], "Text to measure on.")
WINDOWS = flags.DEFINE_integer("windows", 2, "Windows of 1024 tokens.", lower_bound=1)
BATCH = flags.DEFINE_integer("batch", 12, "Rows measured together.", lower_bound=1)
ONLY = flags.DEFINE_string("only", "", "Only rows whose name contains this.")
OUT = flags.DEFINE_string("out", "runs/formats", "Folder for the table.")


POLICY = TokenPolicy(sinks=4)


@dataclasses.dataclass(frozen=True)
class Row:
    """A format: rules for keys and values, and its own token policy where it has one."""

    k: Rule
    v: Rule
    policy: TokenPolicy = POLICY
    alone: bool = True  # also keys only and values only


def formats(geometry: ModelGeometry) -> dict[str, Row]:
    """All formats, by name, in reading order."""

    def both(codec: Rule, **options) -> Row:
        return Row(codec, codec, **options)

    dim = geometry.cache_layers[0].k_dim
    rows = {"exact bf16": both(c.Exact(dim=dim), alone=False)}
    for kind in ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"):
        rows[f"ggml {kind} unrotated"] = both(c.Ggml(dim=dim, type=kind))
        rows[f"ggml {kind}"] = Row(mainline(dim, "k", kind), mainline(dim, "v", kind))
        signed = c.Ggml(dim=dim, type=kind, rotation="hadamard")
        rows[f"ggml {kind} signed"] = both(signed, alone=False)
    rows["ggml f16"] = both(c.Ggml(dim=dim, type="f16"), alone=False)
    for form in ("e4m3", "e5m2"):
        for scale in ("none", "tensor", "head", "token"):
            rows[f"fp8 {form} {scale}"] = both(
                c.FP8(dim=dim, format=form, scale=scale), alone=scale == "head"
            )
    rows["int8 per token-head"] = both(c.Int8TokenHead(dim=dim))
    rows["int4 per token-head"] = both(c.Int4TokenHead(dim=dim))
    rows["nvfp4"] = both(c.NVFP4(dim=dim))
    for name in PRESETS:
        k, v = preset(name, dim)
        rows[f"vllm {name}"] = Row(k, v)
        ends = boundary_layers(len(geometry.layers))
        rows[f"vllm {name} boundary"] = both(
            skip_layers(geometry, sides(k=k, v=v), ends), alone=False
        )
    for bits in (4, 2):
        for group in (32, 64, 128):
            value = c.KiviValue(dim=dim, bits=bits, group=min(group, dim))
            key = c.KiviKey(dim=dim, bits=bits, group=group)
            rows[f"kivi {bits}b g{group}"] = Row(key, value, alone=group == 32)
    for bits in (8, 4):
        rows[f"per_channel int{bits}"] = both(c.PerChannel(dim=dim, bits=bits))
    for bits in (4, 3, 2):
        rows[f"nuq {bits}b 1% outliers"] = both(c.NUQ(dim=dim, bits=bits))
        rows[f"int{bits} hadamard"] = both(c.IntAffine(dim=dim, bits=bits))
    for label, (high, low) in {"2.5": (3, 2), "3.5": (4, 3)}.items():
        rows[f"turboquant outliers {label}"] = both(
            c.TurboQuantOutliers(dim=dim, bits=low, outlier_bits=high)
        )
    oscar_k, oscar_v = (c.Oscar(dim=dim, clip_percent=CLIP_PERCENT[side]) for side in ("k", "v"))
    rows["oscar int2"] = Row(oscar_k, oscar_v)
    rows["nova-like"] = Row(*nova_like(dim))
    own = TokenPolicy(sinks=SINKS, recent=RECENT)
    rows[f"oscar int2 sinks {SINKS} recent {RECENT}"] = Row(oscar_k, oscar_v, own, False)
    for bits in (4, 2):
        key = c.KVarN(dim=dim, bits=bits, axis="channel")
        rows[f"kvarn {bits}b"] = Row(key, c.KVarN(dim=dim, bits=bits, axis="token"))
    rows["qjl 2 bits keys"] = Row(c.QJL(dim=dim, rows=2 * dim), c.Exact(dim=dim), alone=False)
    rows["qjl 4 bits keys"] = Row(c.QJL(dim=dim, rows=4 * dim), c.Exact(dim=dim), alone=False)
    rows["polarquant"] = both(c.PolarQuant(dim=dim))
    rows["e8 2b"] = both(c.E8(dim=dim))
    for bits in (2, 3, 4):
        rows[f"tcq {bits}b 8 states"] = both(c.TCQ(dim=dim, bits=bits))
        rows[f"turboquant_mse {bits}b"] = both(c.TurboQuantMSE(dim=dim, bits=bits))
        rows[f"per_head {bits}b"] = both(c.PerHead(dim=dim, bits=bits))
    for states in (4, 16, 256):
        rows[f"tcq 2b {states} states"] = both(c.TCQ(dim=dim, bits=2, states=states), alone=False)
    for sketch in ("gaussian", "orthogonal"):
        rows[f"turboquant_prod 3b {sketch}"] = both(
            c.TurboQuantProd(dim=dim, bits=3, sketch=sketch)
        )
    q8, q4 = (mainline(dim, "k", kind) for kind in ("q8_0", "q4_0"))
    hybrid = by_layer({0: q8, 11: q4})
    rows["hybrid q8_0 0-10, q4_0 11-"] = both(hybrid, alone=False)
    int8 = c.Ggml(dim=dim, type="q8_0")
    rows["mixed f16 K, int8 V"] = Row(c.Exact(dim=dim, dtype="float16"), int8, alone=False)
    rows["mixed q4 K, int8 V"] = Row(c.Ggml(dim=dim, type="q4_0"), int8, alone=False)
    # Block codecs keep up to a block of recent tokens exact; others with as many, for comparison.
    tail = TokenPolicy(sinks=4, recent=64)
    for bits in (2, 4):
        for label, codec in (("turboquant_mse", c.TurboQuantMSE), ("per_head", c.PerHead)):
            rows[f"{label} {bits}b recent 64"] = both(
                codec(dim=dim, bits=bits), policy=tail, alone=False
            )
    return rows


def plans(geometry: ModelGeometry, statistics: Statistics) -> list[NamedPlan]:
    """(name, plan, arrays) of all rows: both sides, then keys only and values only."""
    exact, out = c.Exact(dim=geometry.cache_layers[0].k_dim), []
    for name, row in formats(geometry).items():
        rows = {name: "kv"}
        if row.alone:
            rows |= {f"{name} | K only": "k", f"{name} | V only": "v"}
        rows = {label: kept for label, kept in rows.items() if ONLY.value in label}
        if not rows:
            continue
        fitted = fit_plan(rule_plan(geometry, sides(k=row.k, v=row.v)), statistics)
        for label, kept in rows.items():
            rule = sides(k=row.k if "k" in kept else exact, v=row.v if "v" in kept else exact)
            plan = rule_plan(geometry, rule, policy=row.policy)
            own = {n: x for n, x in fitted.items() if n.split(".")[2] in kept}
            out.append((label, plan, own))
    return out


def run(out: Path) -> None:
    make_folder(out)
    model = load_model(MODEL.value)
    geometry = model_geometry(model)
    windows = data.mixed_windows(TEXT.value, model.tokenizer, length=1024, count=WINDOWS.value)
    statistics = statistics_of(model, STATISTICS.value, out)
    rows = plans(geometry, statistics)
    measured = evaluate(
        model, rows, windows.tokens, text=windows.source, folder=out / "parts",
        plan_batch=BATCH.value,
    )  # fmt: skip
    found = sorted(measured.rows, key=lambda row: (row["bits_per_channel"], row["kl_mean"]))
    table = {k: v for k, v in measured.table.items() if k != "head_errors"} | {"rows": found}
    total = quality.Quality(table=table, run=measured.run)
    path = write_quality(total, out)
    draw(found, out / "formats.svg")
    print(quality.format_table(total))
    print(f"\ntable   {path}\npicture {out / 'formats.svg'}")


def draw(rows: list[dict], path: Path) -> None:
    """KL against all-in bits per channel where both sides are quantized, one mark a family."""
    plt = pyplot()
    families: dict[str, list[dict]] = {}
    for row in rows:
        if "|" not in row["name"] and row["bits_per_channel"] < 10 and "keys" not in row["name"]:
            family = re.sub(r"^int\d", "int", row["name"]).split(" recent")[0]
            families.setdefault(family.split()[0], []).append(row)
    figure, axes = plt.subplots(figsize=(10, 6), layout="constrained")
    marks = "osD^v<>PX*hp8d"
    for i, (family, members) in enumerate(sorted(families.items())):
        color = f"C{i % 10}"
        for row in members:
            # Rows that keep recent tokens exact (block codecs do) play another game: hollow.
            hollow = "recent" in row["name"] or family in ("kivi", "kvarn")
            axes.plot(
                row["bits_per_channel"], row["kl_mean"], marks[i % len(marks)], color=color,
                fillstyle="none" if hollow else "full",
                label=family if row is members[0] else None,
            )  # fmt: skip
    axes.set(
        xlabel="bits per channel (every stored bit)",
        ylabel="mean KL, nats per token (hollow: recent tokens exact)",
    )
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(ncols=3, fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main(run, OUT)
