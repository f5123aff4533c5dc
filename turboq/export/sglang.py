"""SGLang: one cache dtype, and a JSON of FP8 scales with one number per layer for K and V alike.

Read in 0.5.23 (`model_loader/weight_utils.py`): `model_type` must equal the checkpoint's, `dtype`
must be "float8_e4m3fn", `scaling_factor` has every rank 0..tp-1 with every layer 0..L-1. Anything
else is logged, and the scales are 1.0.
"""

from __future__ import annotations

from turboq.codecs.exact import Exact
from turboq.codecs.fp8 import FP8
from turboq.export import choose
from turboq.export.base import (
    Entry,
    Exporter,
    Formats,
    Held,
    Hold,
    Options,
    Place,
    Projection,
    Tensors,
    entries,
    exact_held,
    first_dims,
    json_file,
    model_dtype,
    schemes,
    status_of,
)
from turboq.export.static import scale_of, shared_scale, static_fp8
from turboq.plan import ModelGeometry, Plan
from turboq.plan.constraints import Constraints

FILE = "kv_cache_scales.json"
# Model classes that load the file; others run with scales of 1.0.
LOADED_BY = (
    *("llama", "qwen2", "qwen3", "mimo", "mimo_v2", "glm4", "glm5_next", "hunyuan", "exaone4"),
    *("arcee", "solar", "apertus", "opt"),
)
FORMATS = {"fp8_e4m3": "e4m3", "fp8_e5m2": "e5m2"}


def plain_hold(dtype: str) -> Hold:
    """FP8 with scales of 1."""
    return lambda entry: Held(
        format=dtype, codec=FP8(dim=entry.dim, format=FORMATS[dtype], scale="none")
    )


def scaled(found: list[Entry]) -> dict[Place, Held] | None:
    """Every head in e4m3 under its layer's one scale; None if a head has no static range."""
    layers: dict[int, list[Entry]] = {}
    for entry in found:
        layers.setdefault(entry.place[0], []).append(entry)
    out = {}
    for members in layers.values():
        helds = [static_fp8(entry) for entry in members]
        if any(held is None for held in helds):
            return None
        shared = shared_scale([held for held in helds if held is not None])
        out |= {entry.place: held for entry, held in zip(members, shared, strict=True)}
    return out


class SGLang(Exporter):
    """`--kv-cache-dtype`, with `--quantization-param-path` for calibrated e4m3 scales."""

    name = "sglang"
    title = "SGLang"
    versions = ">=0.5.23,<0.6"
    checked = "0.5.23 by source, November 2026; its schema restated and tested"
    uses = ("tensor_parallel",)

    def formats(self, model: ModelGeometry, options: Options) -> Formats:
        k, v = first_dims(model).values()
        dtype = options.dtype or "bfloat16"
        out: Formats = {"auto": (Exact(dim=k, dtype=dtype), Exact(dim=v, dtype=dtype))}
        for name, kind in FORMATS.items():
            plain = [FP8(dim=d, format=kind, scale="none") for d in (k, v)]
            out[name] = (plain[0], plain[1])
        return out

    def constraints(
        self, model: ModelGeometry, options: Options | None = None
    ) -> tuple[Constraints, ...]:
        """Without scales: K and V share one number, which separate calibrations do not give."""
        allowed = schemes(self.formats(model, options or Options()))
        return (Constraints(granularity="uniform", schemes=allowed),)

    def project(self, plan: Plan, arrays: Tensors, options: Options) -> Projection:
        found = entries(plan, arrays)
        dtype = model_dtype(plan, options)
        holds: dict[str, Hold] = {name: plain_hold(name) for name in FORMATS}
        holds["auto"] = lambda entry: exact_held(entry, dtype)
        static = scaled(found)
        total = (choose.costs(found, holds, "k") + choose.costs(found, holds, "v")).sum()
        name = list(holds)[choose.pick(total, choose.planned_bits(found), options.prefer)]
        held = choose.held_by(found, lambda e: holds[name])
        exact = sum(status_of(e, held[e.place]) == "exact" for e in found)
        # Calibrated ranges are worth their file even where no head stays exact.
        if static is not None and name != "auto" and exact < len(found):
            flags = f"--kv-cache-dtype fp8_e4m3 --quantization-param-path {FILE}"
            return Projection(
                held=static,
                files={FILE: json_file(scales_file(plan, static, options.tensor_parallel))},
                flags=(f"python -m sglang.launch_server --model-path MODEL {flags}",),
                notes=_notes(plan, options),
            )
        return Projection(
            held=held,
            flags=(f"python -m sglang.launch_server --model-path MODEL --kv-cache-dtype {name}",),
        )


def scales_file(plan: Plan, held: dict[Place, Held], ranks: int) -> dict:
    """The document of `--quantization-param-path`; layers without a cache get 1.0."""
    factors = {
        str(layer.index): scale_of(held[layer.index, "k", 0]) if layer.owns_cache else 1.0
        for layer in plan.model.layers
    }
    for layer in plan.model.layers:
        if layer.borrows_cache_of is not None:
            factors[str(layer.index)] = factors[str(layer.borrows_cache_of)]
    return {
        "model_type": plan.model.family,
        "kv_cache": {
            "dtype": "float8_e4m3fn",
            "scaling_factor": {str(rank): factors for rank in range(ranks)},
        },
    }


def _notes(plan: Plan, options: Options) -> tuple[str, ...]:
    out = [f"Serve with --tp-size {options.tensor_parallel}: the file lists exactly those ranks."]
    if plan.model.family not in LOADED_BY:
        out.append(
            f"SGLang's {plan.model.family} class is not known to load this file (it then runs with"
            " scales of 1.0): use the compressed-tensors overlay of --engine=vllm instead."
        )
    return tuple(out)


def why_refused(document: dict, *, model_type: str, ranks: int, layers: int) -> str:
    """Why SGLang would ignore a scales file; empty if it loads."""
    if document.get("model_type") != model_type:
        return f"model_type={document.get('model_type')!r} must be {model_type!r}"
    cache = document.get("kv_cache", {})
    if cache.get("dtype") != "float8_e4m3fn":
        return f"dtype={cache.get('dtype')!r} must be 'float8_e4m3fn'"
    factors = cache.get("scaling_factor", {})
    if {int(rank) for rank in factors} != set(range(ranks)):
        return f"ranks {sorted(factors)} must be 0..{ranks - 1}"
    for rank, values in factors.items():
        if {int(layer) for layer in values} != set(range(layers)):
            return f"rank {rank} must list layers 0..{layers - 1}"
        if not all(isinstance(v, float) for v in values.values()):
            return f"rank {rank} must hold one float per layer"
    return ""
