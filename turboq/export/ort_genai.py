"""ONNX Runtime GenAI: one scheme for the model, calibrated scales per layer, head and channel.

    kv_cache_quant_scheme   int8_per_channel, int4_per_channel, fp8_per_channel, fp8_per_tensor
    kv_cache_scale_file     {"scales": {"k_scales": [[KV heads * D] per layer], "v_scales": ...},
                             "layer_ids": [layers with a cache], "qmax": 128 | 8 | 448}

q = clip(rint(x / s)) to -128..127, -8..7 or e4m3; channels run fastest, then heads. The builder
rescales by qmax / (128, 8, 448). K and V have one scheme.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from turboq.codecs.exact import Exact
from turboq.codecs.fp8 import FP8
from turboq.codecs.per_channel import PerChannel
from turboq.errors import TurboqError
from turboq.export import choose
from turboq.export.base import (
    Entry,
    Exporter,
    Formats,
    Held,
    Options,
    Place,
    Projection,
    Side,
    Tensors,
    entries,
    exact_held,
    first_dims,
    json_file,
    model_dtype,
    schemes,
    status_of,
)
from turboq.export.static import has_envelope, peaks, rope_envelope, scale_of, static_fp8
from turboq.plan import ModelGeometry, Plan
from turboq.plan.constraints import Constraints

FILE = "kv_scales.json"
QMAX = {"int8": 128.0, "int4": 8.0, "fp8": 448.0}
TINY = np.finfo(np.float32).tiny


def int_held(entry: Entry, bits: int, envelope: bool) -> Held | None:
    """A head in symmetric integers with a scale per channel; None without ranges."""
    name = f"int{bits}_per_channel"
    codec = PerChannel(dim=entry.dim, bits=bits)
    if not envelope and entry.codec == codec and entry.rope == "after":
        return Held(format=name, codec=codec, arrays=entry.arrays)
    peak = peaks(entry)
    if peak is None:
        return None
    peak = rope_envelope(entry, peak) if envelope else peak
    scale = (peak / 2 ** (bits - 1)).astype(np.float32)
    note = "ranges widened to the norm of rotary pairs" if envelope and entry.side == "k" else ""
    return Held(format=name, codec=codec, arrays={"channel_scale": scale}, note=note)


def fp8_held(entry: Entry) -> Held | None:
    """A head in e4m3 with its own scale."""
    held = static_fp8(entry)
    return None if held is None else dataclasses.replace(held, format="fp8_per_channel")


class OrtGenAI(Exporter):
    """Scale file and the model builder's options."""

    name = "ort-genai"
    title = "ONNX Runtime GenAI"
    versions = ">=0.18,<0.19 (onnxruntime >=1.31,<1.32)"
    uses = ("checkpoint", "rope_envelope")
    checked = (
        "0.18.0 (onnxruntime 1.31.1), 2026-11-22: built, run and matched code by code, see "
        "tests/golden/export"
    )
    ran = True

    def formats(self, model: ModelGeometry, options: Options) -> Formats:
        k, v = first_dims(model).values()
        dtype = options.dtype or "bfloat16"
        return {
            "int8_per_channel": (PerChannel(dim=k, bits=8), PerChannel(dim=v, bits=8)),
            "int4_per_channel": (PerChannel(dim=k, bits=4), PerChannel(dim=v, bits=4)),
            "fp8_per_tensor": (FP8(dim=k, scale="tensor"), FP8(dim=v, scale="tensor")),
            "fp8_per_channel": (FP8(dim=k, scale="head"), FP8(dim=v, scale="head")),
            "none": (Exact(dim=k, dtype=dtype), Exact(dim=v, dtype=dtype)),
        }

    def constraints(
        self, model: ModelGeometry, options: Options | None = None
    ) -> tuple[Constraints, ...]:
        allowed = schemes(self.formats(model, options or Options()))
        return (Constraints(granularity="uniform", schemes=allowed),)

    def project(self, plan: Plan, arrays: Tensors, options: Options) -> Projection:
        found = entries(plan, arrays)
        dtype = model_dtype(plan, options)
        tried: list[tuple[str, dict[Place, Held]]] = []
        envelope = options.rope_envelope
        kinds: dict[str, Callable[[Entry], Held | None]] = {
            "int4": lambda e: int_held(e, 4, envelope),
            "int8": lambda e: int_held(e, 8, envelope),
            "fp8": fp8_held,
        }
        for kind, hold in kinds.items():
            helds = [hold(entry) for entry in found]
            if all(h is not None for h in helds):
                pairs = zip(found, helds, strict=True)
                tried.append((kind, {e.place: h for e, h in pairs if h is not None}))
        if all(isinstance(e.codec, Exact) for e in found):
            tried.append(("none", {e.place: exact_held(e, dtype) for e in found}))
        if not tried:
            lacking = next(e for e in found if peaks(e) is None)
            raise TurboqError(
                f"{self.name} cannot hold {lacking}: it needs a calibrated range for every head,"
                " which that codec has none of; plan every layer with codec per_channel (bits 8 or"
                " 4), or fp8 with scale head"
            )
        total = choose.stack([choose.cost_of(found, held) for _, held in tried])
        kind, held = tried[choose.pick(total, choose.planned_bits(found), options.prefer)]
        return _projection(plan, found, kind, held, dtype)


def _projection(
    plan: Plan, found: Sequence[Entry], kind: str, held: dict[Place, Held], dtype: str
) -> Projection:
    precision = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}[dtype]
    build = f"python -m onnxruntime_genai.models.builder -m CHECKPOINT -o MODEL -p {precision}"
    if kind == "none":
        return Projection(held=held, flags=(build,))
    shared: dict[tuple[int, Side], set[float]] = {}
    for (index, side, _), of in held.items():
        shared.setdefault((index, side), set()).add(scale_of(of))
    per_tensor = kind == "fp8" and all(len(values) == 1 for values in shared.values())
    scheme = f"{kind}_per_{'tensor' if per_tensor else 'channel'}"
    document = scales_file(plan, held, kind, per_tensor)
    options = f"kv_cache_quant_scheme={scheme} kv_cache_scale_file={FILE}"
    notes = [
        "Choose -p and -e as for the model without a quantized cache; pip install onnxruntime-genai"
        " has the runtime, its builder needs torch and transformers too."
    ]
    if kind == "fp8":
        notes.append("FP8 caches need the CUDA provider.")
    if any(status_of(e, held[e.place]) == "exact" and not has_envelope(e) for e in found):
        notes.append(
            "K ranges differ within rotary pairs, so they hold for the positions that were seen:"
            " fit per_channel with the pairs' norm, or export with --rope_envelope."
        )
    return Projection(
        held=held,
        files={FILE: json_file(document)},
        flags=(f"{build} --extra_options {options}",),
        notes=tuple(notes),
    )


def scales_file(plan: Plan, held: dict[Place, Held], kind: str, per_tensor: bool) -> dict:
    """The document of `kv_cache_scale_file`: scales positive, layers with a cache only."""
    out: dict[str, list] = {"k_scales": [], "v_scales": []}
    for layer in plan.layers:
        heads = range(plan.model.layers[layer.index].kv_heads)
        for side in ("k", "v"):
            of = [held[layer.index, side, head] for head in heads]
            values = np.concatenate([_channel_scales(h) for h in of])
            out[f"{side}_scales"].append(float(values[0]) if per_tensor else values.tolist())
    return {
        "scales": out,
        "layer_ids": [layer.index for layer in plan.layers],
        "qmax": QMAX[kind],
    }


def _channel_scales(held: Held) -> np.ndarray:
    """Float32 scale of every channel; a channel that never varies, of scale 0, gets the least one.

    What it stores then decodes to at most 128 * 1.2e-38 instead of 0.
    """
    assert held.codec is not None
    scales = held.arrays.get("channel_scale")
    if scales is None:
        scales = np.full(held.codec.dim, scale_of(held))
    return np.maximum(scales.astype(np.float32), TINY).astype(np.float64)
