"""NVIDIA ModelOpt, schema v1 of its KV map: FP8, NVFP4 or FP8 keys beside NVFP4 values, by layer.

Forward-looking: the producer is merged upstream, no released engine reads the map yet (vLLM pull
request 56116 is open, TensorRT-LLM follows `kv_cache_quant_algo`). A layer left out stays in the
model's type. Scales are `{path}.k_proj.k_scale` and `{path}.v_proj.v_scale`, one float32 each.
"""

from __future__ import annotations

import numpy as np

from turboq.codecs.exact import Exact
from turboq.codecs.fp8 import FP8
from turboq.codecs.minifloat import E4M3
from turboq.codecs.nvfp4 import NVFP4
from turboq.errors import TurboqError
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
)
from turboq.export.static import peaks, scale_of, shared_scale, static_fp8
from turboq.plan import ModelGeometry, Plan
from turboq.plan.constraints import Constraints
from turboq.plan.tensors import write_bytes
from turboq.version import __version__

CONFIG = "hf_quant_config.json"
SCALES = "kv_scales.safetensors"
ALGOS = {"FP8": ("fp8", "fp8"), "NVFP4": ("nvfp4", "nvfp4"), "FP8_K_NVFP4_V": ("fp8", "nvfp4")}


def nvfp4_hold(entry: Entry) -> Held | None:
    """A head in NVFP4 under its own global scale; None without a range or at an odd head dim."""
    if entry.dim % 16:
        return None
    if isinstance(entry.codec, NVFP4) and entry.rope == "after":
        return Held(format="nvfp4", codec=entry.codec, arrays=entry.arrays)
    peak = peaks(entry)
    if peak is None:
        return None
    scale = max(float(peak.max()) / E4M3.largest, float(np.finfo(np.float32).tiny))
    arrays = {"scale": np.asarray(np.float32(scale))}
    return Held(format="nvfp4", codec=NVFP4(dim=entry.dim), arrays=arrays)


KINDS: dict[str, Hold] = {"fp8": static_fp8, "nvfp4": nvfp4_hold}


class ModelOpt(Exporter):
    """`hf_quant_config.json` with `kv_cache_quantized_layers`, and the scales beside it."""

    name = "modelopt"
    title = "TensorRT Model Optimizer, KV map schema v1 (TensorRT-LLM, vLLM)"
    versions = "schema v1: forward-looking, in no release that was tested (ModelOpt after 0.47)"
    checked = (
        "upstream's tests of the schema, November 2026, commit not recorded: the latest release, "
        "0.47.0, does not have it"
    )
    uses = ("checkpoint",)

    def formats(self, model: ModelGeometry, options: Options) -> Formats:
        k, v = first_dims(model).values()
        dtype = options.dtype or "bfloat16"
        return {
            "FP8": (FP8(dim=k, scale="tensor"), FP8(dim=v, scale="tensor")),
            "none": (Exact(dim=k, dtype=dtype), Exact(dim=v, dtype=dtype)),
        }

    def constraints(
        self, model: ModelGeometry, options: Options | None = None
    ) -> tuple[Constraints, ...]:
        """Without NVFP4, whose fitted scales differ by head where the engine has one per layer."""
        allowed = schemes(self.formats(model, options or Options()))
        return (Constraints(granularity="per_layer", schemes=allowed),)

    def project(self, plan: Plan, arrays: Tensors, options: Options) -> Projection:
        found = entries(plan, arrays)
        dtype = model_dtype(plan, options)
        held: dict[Place, Held] = {}
        algos: dict[str, str] = {}
        for layer in plan.layers:
            members = [e for e in found if e.place[0] == layer.index]
            algo, kept = _layer(members, dtype, options)
            held |= kept
            if algo:
                algos[layer.path] = algo
        if not algos:
            raise TurboqError(
                f"{self.name} cannot hold this plan: no layer has static ranges ({found[0]}"
                " has none): plan with codec fp8 (scale tensor) or nvfp4"
            )
        document = quant_config(algos)
        files = {CONFIG: json_file(document), SCALES: write_bytes(scales(plan, held, algos))}
        return Projection(
            held=held,
            files=files,
            flags=("trtllm-serve CHECKPOINT  # kv_cache_config.dtype: auto",),
            notes=(
                "Forward-looking: no released engine reads kv_cache_quantized_layers yet.",
                f"Lay {SCALES} and {CONFIG} over the checkpoint that ModelOpt exports.",
                "TensorRT-LLM's exporter lifts FP8 scales below 1 to 1 by default"
                " (clamp_fp8_scales).",
            ),
        )


def _layer(members: list[Entry], dtype: str, options: Options) -> tuple[str, dict[Place, Held]]:
    """(algorithm or "", what becomes of the heads) of one layer: the best it can be held in."""
    tried: list[tuple[str, dict[Place, Held]]] = []
    for algo, kinds in ALGOS.items():
        kept: dict[Place, Held] = {}
        for side, kind in zip(("k", "v"), kinds, strict=True):
            own = [e for e in members if e.side == side]
            helds = [KINDS[kind](entry) for entry in own]
            if any(h is None for h in helds):
                break
            shared = shared_scale([h for h in helds if h is not None])
            kept |= {e.place: h for e, h in zip(own, shared, strict=True)}
        if len(kept) == len(members):
            tried.append((algo, kept))
    note = "" if tried else "the plan has no static range of this layer"
    rest = {e.place: exact_held(e, dtype, reduced=bool(tried), note=note) for e in members}
    tried.append(("", rest))
    total = [choose.cost_of(members, kept) for _, kept in tried]
    return tried[choose.pick(choose.stack(total), choose.planned_bits(members), options.prefer)]


def quant_config(algos: dict[str, str]) -> dict:
    """The document: a map of layer paths; for a KV-only checkpoint no `quant_algo` of weights."""
    layers = {path: {"quant_algo": algo} for path, algo in algos.items()}
    return {
        "producer": {"name": "turboq", "version": __version__},
        "quantization": {
            "kv_cache_quant_algo": "MIXED_PRECISION",
            "kv_cache_quantized_layers": layers,
            "kv_cache_schema_version": 1,
        },
    }


def scales(plan: Plan, held: dict[Place, Held], algos: dict[str, str]) -> dict[str, np.ndarray]:
    """One float32 per quantized layer and side: the codec's own scale.

    ModelOpt writes amax / 448 for FP8 and NVFP4 alike; any scale is read the same way.
    """
    out = {}
    for layer in plan.layers:
        if layer.path not in algos:
            continue
        for side in ("k", "v"):
            value = scale_of(held[layer.index, side, 0])
            out[f"{layer.path}.{side}_proj.{side}_scale"] = np.array(value, np.float32)
    return out
