"""What became of a plan, per layer, side and head, in bytes and in quality.

exact          the engine stores the plan's codec with the plan's arrays (in its own order of
               channels, which a note then says and which leaves the KL change unknown)
approximated   another format, which the entry names with what was dropped
unsupported    a head that the plan quantizes and the engine cannot: it stays in the model's type
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from turboq.cache import accounting
from turboq.cache.layer import TokenPolicy
from turboq.export.base import (
    SIDES,
    STATUSES,
    Entry,
    Exporter,
    Held,
    Projection,
    Status,
    Tensors,
    entries,
    status_of,
    stored_codec,
)
from turboq.export.same import differences
from turboq.plan import Plan, Producer, head_plan
from turboq.plan.document import fingerprint, to_json
from turboq.plan.summary import codec_label

SCHEMA_VERSION = 1
FILE = "export_report.json"
PLAN_FOLDER = "engine_plan"


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadReport:
    """One KV head of one layer and side. Bits are of one vector, scales included."""

    head: int
    status: Status
    plan: str
    engine: str
    plan_bits: int
    engine_bits: int
    dropped: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One layer that owns a cache; bytes per token, padding included."""

    index: int
    path: str
    plan_bytes: float
    engine_bytes: float
    k: tuple[HeadReport, ...]
    v: tuple[HeadReport, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kl:
    """KL to the exact cache in nats per token: measured or predicted for the plan; null: unknown.

    `change` is what the export adds to it: 0 when everything is exact, else null until the engine's
    own plan is measured (`export --measure`).
    """

    plan: float | None
    source: str | None
    change: float | None
    how: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportReport:
    """`export_report.json`."""

    engine: str
    engine_title: str
    engine_versions: str
    checked: str
    model: str
    model_fingerprint: str
    plan_hash: str
    status: Status
    counts: dict[str, int]
    tokens_status: Status
    tokens_dropped: tuple[str, ...]
    plan_bytes_per_token: float
    engine_bytes_per_token: float
    kl: Kl
    files: tuple[str, ...]
    flags: tuple[str, ...]
    env: dict[str, str]
    notes: tuple[str, ...]
    layers: tuple[LayerReport, ...]
    schema_version: int = SCHEMA_VERSION
    calibration: str = dataclasses.field(default="", metadata={"optional": True})
    producer: Producer = dataclasses.field(default_factory=Producer)

    def document(self) -> dict[str, Any]:
        """JSON-ready."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        head = {name: values.pop(name) for name in ("schema_version", "producer")}
        return {name: to_json(value) for name, value in (head | values).items()}

    def entries(self) -> Iterable[tuple[int, str, HeadReport]]:
        """(layer, side, head report) of everything."""
        for layer in self.layers:
            for side in SIDES:
                for head in getattr(layer, side):
                    yield layer.index, side, head


def make_report(
    plan: Plan, arrays: Tensors, exporter: Exporter, projection: Projection, files: Sequence[str]
) -> ExportReport:
    """The report of a projection; `files` are the names that will be written."""
    found = entries(plan, arrays)
    heads = {e.place: _head(e, projection.held[e.place]) for e in found}
    tokens = _tokens(plan.tokens, projection.policy)
    worst: list[Status] = [h.status for h in heads.values()]
    if tokens:
        worst.append("approximated")
    layers = tuple(_layer(plan, layer, heads, projection) for layer in plan.layers)
    status = max(worst, key=STATUSES.index)
    counts = collections.Counter(h.status for h in heads.values())
    evaluable = PLAN_FOLDER in {name.partition("/")[0] for name in files}
    notes = (*projection.notes, *([projection.reordered] if projection.reordered else []))
    return ExportReport(
        engine=exporter.name,
        engine_title=exporter.title,
        engine_versions=exporter.versions,
        checked=exporter.said,
        model=plan.model.name,
        model_fingerprint=plan.model.fingerprint,
        plan_hash=fingerprint(plan),
        status=status,
        counts={name: counts.get(name, 0) for name in STATUSES},
        tokens_status="approximated" if tokens else "exact",
        tokens_dropped=tokens,
        calibration=_calibration(found, projection),
        plan_bytes_per_token=sum(layer.plan_bytes for layer in layers),
        engine_bytes_per_token=sum(layer.engine_bytes for layer in layers),
        kl=_kl(plan, status, evaluable, projection.reordered),
        files=tuple(files),
        flags=projection.flags,
        env=projection.env,
        notes=notes,
        layers=layers,
    )


def engine_plan(
    plan: Plan, arrays: Tensors, projection: Projection
) -> tuple[Plan, dict[str, Any]] | None:
    """The plan that the engine will really run, for `turboq evaluate`; None if a codec is unknown.

    Its arrays are those of the held codecs; provenance stays, quality does not.
    """
    held = projection.held
    if any(h.codec is None for h in held.values()):
        return None

    def choose(index, side, head):
        codec = held[index, side, head].codec
        assert codec is not None
        return codec

    out = head_plan(
        plan.model,
        choose,
        k_rope=lambda index: held[index, "k", 0].rope,
        joint=lambda index: plan.layers[plan.position(index)].joint,
        policy=projection.policy,
        provenance=plan.provenance,
    )
    joined = {name: x for name, x in arrays.items() if ".joint." in name}
    return out, _arrays_of(out, projection) | joined


def _arrays_of(plan: Plan, projection: Projection) -> dict[str, Any]:
    import numpy as np

    from turboq.plan import array_name

    out = {}
    for layer in plan.layers:
        heads = range(plan.model.layers[layer.index].kv_heads)
        for side in SIDES:
            chosen = layer.side(side)
            values = {h: projection.held[layer.index, side, h].arrays for h in heads}
            if chosen.stacked:
                for array in stored_codec(layer, chosen.codec).array_shapes:
                    stacked = np.stack([np.asarray(values[h][array], np.float32) for h in heads])
                    out[array_name(layer.index, side, array)] = stacked
                continue
            for head in heads:
                for array in stored_codec(layer, chosen.of(head)).array_shapes:
                    name = array_name(layer.index, side, array, head)
                    out[name] = np.asarray(values[head][array], np.float32)
    return out


def _head(entry: Entry, held: Held) -> HeadReport:
    status = status_of(entry, held)
    return HeadReport(
        head=entry.place[2],
        status=status,
        plan=codec_label(entry.codec),
        engine=held.format,
        plan_bits=entry.codec.bits_per_vector,
        engine_bits=held.stored_bits,
        dropped=() if status == "exact" else tuple(_dropped(entry, held)),
    )


def _dropped(entry: Entry, held: Held) -> Iterable[str]:
    """What of the plan is lost, in words."""
    if held.rope != entry.rope:
        yield f"keys {entry.rope} RoPE -> {held.rope}"
    changed = [] if held.codec is None else differences(entry.codec, held.codec)
    if changed:
        yield from changed
    elif held.codec is None or held.codec.name != entry.codec.name:
        yield f"codec {entry.codec.name} -> {held.format}"
    for name in entry.arrays:
        if name not in held.arrays:
            yield f"fitted {name}"
    kind = entry.codec.config().get("rotation", "identity")
    if kind != "identity" and not changed and not hasattr(held.codec, "rotation"):
        yield f"rotation {kind}"
    if held.note:
        yield held.note


def _calibration(found: Sequence[Entry], projection: Projection) -> str:
    """What is left in the engine of everything that was fitted to data."""
    fitted = [e for e in found if e.arrays]
    if not fitted:
        return "nothing of the plan was fitted to data"
    names = ", ".join(dict.fromkeys(name for e in fitted for name in e.arrays))
    kept = sum(set(e.arrays) <= set(projection.held[e.place].arrays) for e in fitted)
    if kept == len(fitted):
        return f"what was fitted is stored as the plan has it ({names})"
    if any(projection.held[e.place].arrays for e in fitted):
        return f"of {len(fitted)} heads with fitted arrays ({names}), {kept} keep all of theirs"
    return f"calibration has no effect here: the engine stores nothing that was fitted ({names})"


def _tokens(wanted: TokenPolicy, kept: TokenPolicy) -> tuple[str, ...]:
    out = []
    if wanted.sinks != kept.sinks:
        out.append(f"first {wanted.sinks} tokens exact -> {kept.sinks}")
    if wanted.recent != kept.recent:
        out.append(f"last {wanted.recent} tokens exact -> {kept.recent}")
    return tuple(out)


def _layer(plan: Plan, layer, heads, projection: Projection) -> LayerReport:
    sides = {
        side: tuple(h for place, h in heads.items() if place[:2] == (layer.index, side))
        for side in SIDES
    }
    both = [*sides["k"], *sides["v"]]
    padding = projection.padding.get(layer.index, 0)
    return LayerReport(
        index=layer.index,
        path=layer.path,
        plan_bytes=sum(h.plan_bits for h in both) / 8,
        engine_bytes=sum(h.engine_bits for h in both) / 8 + padding,
        **sides,
    )


def _kl(plan: Plan, status: Status, evaluable: bool, reordered: str) -> Kl:
    """The plan's own figure; a change only where it is known to be none."""
    value, source = None, None
    if plan.quality is not None and plan.quality.measured:
        value, source = plan.quality.measured[0].kl_mean, plan.quality.measured[0].text
    elif plan.quality is not None and plan.quality.predicted is not None:
        value, source = plan.quality.predicted.kl_mean, "predicted"
    if status == "exact" and reordered:
        return Kl(plan=value, source=source, change=None, how=reordered)
    if status == "exact":
        return Kl(plan=value, source=source, change=0.0, how="every head and token is exact")
    how = "the engine's formats have no codec in turboq: measure in the engine"
    if evaluable:
        how = f"--measure, or turboq evaluate --plan={PLAN_FOLDER}, measures what the engine stores"
    return Kl(plan=value, source=source, change=None, how=how)


def _change(kl: Kl) -> str:
    """What the export adds to the plan's KL, and how that is known."""
    if kl.change is None:
        return f"not known ({kl.how})"
    if kl.plan is None:
        return f"KL changes by {kl.change:+.4f} nats per token ({kl.how})"
    return f"KL {kl.plan:.4f} -> {kl.plan + kl.change:.4f} nats per token ({kl.how})"


def summary(report: ExportReport) -> str:
    """A few lines for the terminal."""
    counts = ", ".join(f"{n} {name}" for name, n in report.counts.items() if n)
    lines = [
        f"{report.engine_title}, {report.engine_versions}: {report.status} ({counts} of K and V "
        "heads)",
        f"checked: {report.checked}",
        report.calibration,
        f"one token: {report.engine_bytes_per_token:g} bytes in the engine,"
        f" {report.plan_bytes_per_token:g} in the plan"
        f" ({accounting.readable(report.engine_bytes_per_token * 32768)} at 32768 tokens)",
    ]
    dropped = collections.Counter(text for _, _, head in report.entries() for text in head.dropped)
    lines += [f"dropped: {text} ({n} heads)" for text, n in dropped.most_common(6)]
    lines += [f"dropped: {text}" for text in report.tokens_dropped]
    lines += [f"note: {note}" for note in report.notes]
    lines.append(f"quality: {_change(report.kl)}")
    return "\n".join([*lines, "", *report.flags])
