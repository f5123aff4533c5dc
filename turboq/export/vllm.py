"""vLLM: one cache dtype for all layers, a list of layers that keep the model's type, or FP8 scales.

fp8_e4m3 with calibrated scales   a compressed-tensors overlay (`turboq.export.vllm_scales`)
fp8, int8, int4 per token and head; turboquant presets      command line only
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from turboq.codecs.exact import Exact
from turboq.codecs.fp8 import FP8
from turboq.codecs.vllm_turboquant import slot_bytes
from turboq.export import choose, vllm_rules, vllm_scales
from turboq.export.base import (
    Entry,
    Exporter,
    Formats,
    Held,
    Hold,
    Options,
    Projection,
    Tensors,
    entries,
    exact_held,
    first_dims,
    matches,
    model_dtype,
    schemes,
)
from turboq.export.static import static_fp8
from turboq.plan import ModelGeometry, Plan
from turboq.plan.constraints import Boundary, Constraints, Match

AUTO = "auto"
STATIC = "fp8_e4m3 with scales"


def dtype_hold(dtype: str) -> Hold:
    """A head under a dtype without scales.

    Plain FP8 has the scale 1, so it is no home for what another format scales.
    """

    def hold(entry: Entry) -> Held | None:
        codecs = vllm_rules.pair(dtype, entry.layer.k_dim, entry.layer.v_dim)
        scaled = not isinstance(entry.codec, FP8) or entry.codec.scale != "none"
        if codecs is None or (dtype in vllm_rules.PLAIN and scaled):
            return None
        return Held(format=dtype, codec=codecs[entry.side == "v"])

    return hold


def static_hold(entry: Entry) -> Held | None:
    """A head in e4m3 with the scale that the plan's arrays give; None if they give none."""
    found = static_fp8(entry) if entry.arrays else None
    return None if found is None else dataclasses.replace(found, format=STATIC)


class VLLM(Exporter):
    """`--kv-cache-dtype` with `--kv-cache-dtype-skip-layers`, or an overlay with scales."""

    name = "vllm"
    title = "vLLM"
    versions = ">=0.33,<0.34"
    checked = "0.33.0 by source, November 2026; files checked with compressed-tensors 0.20.0"
    uses = ("checkpoint",)
    dtypes: ClassVar[tuple[str, ...]] = (
        *vllm_rules.PLAIN,
        *vllm_rules.PER_TOKEN_HEAD,
        *vllm_rules.TURBOQUANT,
    )

    def formats(self, model: ModelGeometry, options: Options) -> Formats:
        k, v = first_dims(model).values()
        dtype = options.dtype or "bfloat16"
        out: Formats = {}
        for name in self.dtypes:
            pairs = [vllm_rules.pair(name, la.k_dim, la.v_dim) for la in model.cache_layers]
            if pairs[0] is not None and all(pair is not None for pair in pairs):
                out[name] = pairs[0]
        out["fp8 scale per tensor"] = (FP8(dim=k, scale="tensor"), FP8(dim=v, scale="tensor"))
        out["fp8 scale per head"] = (FP8(dim=k, scale="head"), FP8(dim=v, scale="head"))
        return out | {AUTO: (Exact(dim=k, dtype=dtype), Exact(dim=v, dtype=dtype))}

    def constraints(
        self, model: ModelGeometry, options: Options | None = None
    ) -> tuple[Constraints, ...]:
        """Two sets: without the presets, and the presets with the layers that vLLM leaves out."""
        formats = self.formats(model, options or Options())
        presets = {name for name in formats if name in vllm_rules.TURBOQUANT}
        out = [_dtype_and_skips({n: f for n, f in formats.items() if n not in presets}, None)]
        if presets:
            edge = _boundary(model, matches((formats[AUTO][0],)), matches((formats[AUTO][1],)))
            chosen = {n: f for n, f in formats.items() if n in presets or n == AUTO}
            out.append(_dtype_and_skips(chosen, edge))
        return tuple(out)

    def project(self, plan: Plan, arrays: Tensors, options: Options) -> Projection:
        found = entries(plan, arrays)
        dtype = model_dtype(plan, options)
        holds: dict[str, Hold] = {STATIC: static_hold}
        holds |= {name: dtype_hold(name) for name in self.dtypes}
        holds[AUTO] = lambda entry: exact_held(entry, dtype)
        name, skipped = self._choose(plan, found, holds, options)
        held = choose.held_by(found, lambda e: holds[AUTO if e.place[0] in skipped else name])
        if name == STATIC:
            return self._static(plan, found, held, skipped, dtype, options)
        flags = " ".join(["vllm serve MODEL", *_flags(name, skipped, dtype)])
        return Projection(
            held=held,
            flags=(flags,),
            notes=tuple(self._notes(plan, name, skipped)),
            padding=_padding(plan, name, skipped),
        )

    def _choose(
        self, plan: Plan, found: Sequence[Entry], holds: dict[str, Hold], options: Options
    ) -> tuple[str, set[int]]:
        """The dtype, and the layers that keep the model's type."""
        cost = choose.costs(found, holds, "k") + choose.costs(found, holds, "v")
        names, layers = list(holds), [layer.index for layer in plan.layers]
        auto = cost[names.index(AUTO)]
        kept = {  # layers that the plan itself leaves exact
            e.place[0] for e in found
        } - {e.place[0] for e in found if not isinstance(e.codec, Exact)}
        tried: list[tuple[str, set[int]]] = []
        totals: list[choose.Cost] = []
        for n, name in enumerate(names):
            forced = vllm_rules.forced_skips(plan.model, name) & set(layers)
            better = auto.key < cost[n].key
            if options.prefer == "size":
                better = np.array([i in kept for i in layers])
            impossible = cost[n].short >= choose.IMPOSSIBLE
            skips = better | impossible | np.array([i in forced for i in layers])
            tried.append((name, {i for i, s in zip(layers, skips, strict=True) if s}))
            rows = np.where(skips, names.index(AUTO), n)
            totals.append(cost[rows, np.arange(len(layers))].sum())
        total = choose.stack(totals)
        return tried[choose.pick(total, choose.planned_bits(found), options.prefer)]

    def _static(self, plan, found, held, skipped, dtype, options) -> Projection:
        overlay = vllm_scales.overlay(plan, found, held, skipped, options.checkpoint)
        notes = list(overlay.notes)
        if overlay.strategy == "attn_head":
            notes.append("Scales per head need the FLASH_ATTN backend in version 3 (Hopper).")
        flags = " ".join(["vllm serve CHECKPOINT", *_flags("fp8", skipped, dtype)])
        return Projection(held=held, files=overlay.files, flags=(flags,), notes=tuple(notes))

    def _notes(self, plan: Plan, name: str, skipped: set[int]) -> list[str]:
        if name in vllm_rules.TURBOQUANT:
            forced = sorted(vllm_rules.forced_skips(plan.model, name) & skipped)
            out = ["vLLM sets flash_attn_version to 2 for these presets."]
            if forced:
                listed = ", ".join(map(str, forced))
                out.append(f"vLLM itself keeps layers {listed} of a dense model in its own type.")
            return out
        if name in vllm_rules.PLAIN:
            return ["No scales are loaded: every scale is 1, values beyond the range saturate."]
        return []


def _dtype_and_skips(formats: Formats, boundary: Boundary | None) -> Constraints:
    """One format, and layers in the model's own type."""
    return Constraints(
        granularity="per_layer",
        schemes=schemes(formats),
        max_formats=1,
        uncounted=(AUTO,),
        boundary=boundary,
    )


def _boundary(model: ModelGeometry, k: tuple[Match, ...], v: tuple[Match, ...]) -> Boundary | None:
    """The layers with a cache among those that the presets leave out."""
    forced = vllm_rules.forced_skips(model, vllm_rules.TURBOQUANT[0])
    owners = [layer.index in forced for layer in model.cache_layers]
    if not any(owners):
        return None
    half = len(owners) // 2
    return Boundary(first=sum(owners[:half]), last=sum(owners[half:]), k=k, v=v)


def _flags(name: str, skipped: set[int], dtype: str) -> list[str]:
    out = [f"--dtype {dtype}", f"--kv-cache-dtype {name}"]
    if skipped and name != AUTO:
        out.append("--kv-cache-dtype-skip-layers " + " ".join(map(str, sorted(skipped))))
    return out


def _padding(plan: Plan, name: str, skipped: set[int]) -> dict[int, float]:
    """Bytes per token by which slots of a preset are rounded up to an even number."""
    if name not in vllm_rules.TURBOQUANT:
        return {}
    out = {}
    for layer in plan.layers:
        shape = plan.model.layers[layer.index]
        codecs = vllm_rules.pair(name, shape.k_dim, shape.v_dim)
        if layer.index in skipped or codecs is None:
            continue
        bits = sum(codec.bits_per_vector for codec in codecs)
        out[layer.index] = shape.kv_heads * (slot_bytes(name, shape.k_dim) - bits / 8)
    return {index: extra for index, extra in out.items() if extra}
