"""MaxText and tpu-inference: one cache type for the whole model, by flags.

MaxText scales every token of a head (axis dkv) by its absmax in bfloat16, with codes
rint(x * 127.5 / absmax), 7.5 at 4 bits: no codec here has that grid, so it is an approximation (its
e4m3 is in the code, and refused by its configuration). tpu-inference's own models store FP8 with
scales of 1. What runs our codes in both is `turboq_kernels.engines`.
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
    Projection,
    Tensors,
    entries,
    exact_held,
    first_dims,
    model_dtype,
    schemes,
)
from turboq.plan import ModelGeometry, Plan
from turboq.plan.constraints import Constraints

MAXTEXT = {"int8": 8, "int4": 4}
TPU = {"fp8_e4m3": "e4m3", "fp8_e5m2": "e5m2"}
AUTO = "none"


def maxtext_hold(kind: str) -> Hold:
    """Dynamic absmax per token and head."""

    def hold(entry: Entry) -> Held:
        codes = MAXTEXT[kind] * entry.dim
        return Held(format=f"{kind} dkv", bits=codes + 16, codes=codes)

    return hold


def tpu_hold(kind: str) -> Hold:
    """FP8 without scales."""
    return lambda entry: Held(format=kind, codec=FP8(dim=entry.dim, format=TPU[kind], scale="none"))


class _OneType(Exporter):
    """One type for everything, or the model's own."""

    def holds(self) -> dict[str, Hold]:
        raise NotImplementedError

    def formats(self, model: ModelGeometry, options: Options) -> Formats:
        k, v = first_dims(model).values()
        dtype = options.dtype or "bfloat16"
        return {AUTO: (Exact(dim=k, dtype=dtype), Exact(dim=v, dtype=dtype))}

    def constraints(
        self, model: ModelGeometry, options: Options | None = None
    ) -> tuple[Constraints, ...]:
        allowed = schemes(self.formats(model, options or Options()))
        return (Constraints(granularity="uniform", schemes=allowed),)

    def project(self, plan: Plan, arrays: Tensors, options: Options) -> Projection:
        found = entries(plan, arrays)
        dtype = model_dtype(plan, options)
        holds = self.holds() | {AUTO: lambda entry: exact_held(entry, dtype)}
        total = (choose.costs(found, holds, "k") + choose.costs(found, holds, "v")).sum()
        name = list(holds)[choose.pick(total, choose.planned_bits(found), options.prefer)]
        held = choose.held_by(found, lambda e: holds[name])
        return Projection(held=held, flags=self.flags(name), notes=self.notes(name))

    def flags(self, name: str) -> tuple[str, ...]:
        raise NotImplementedError

    def notes(self, name: str) -> tuple[str, ...]:
        return ()


class MaxText(_OneType):
    """`quantize_kvcache`, `kv_quant_axis`, `kv_quant_dtype`."""

    name = "maxtext"
    title = "MaxText (and JetStream, with the same flags)"
    versions = ">=0.2.5,<0.3"
    checked = (
        "0.2.5 by source, November 2026; its KVCache alone run with turboq_kernels.engines.maxtext"
    )

    def holds(self) -> dict[str, Hold]:
        return {kind: maxtext_hold(kind) for kind in MAXTEXT}

    def flags(self, name: str) -> tuple[str, ...]:
        if name == AUTO:
            return ("quantize_kvcache=false",)
        return (f"quantize_kvcache=true kv_quant_axis=dkv kv_quant_dtype={name}",)

    def notes(self, name: str) -> tuple[str, ...]:
        if name == AUTO:
            return ()
        return (
            "turboq_kernels.engines.maxtext.install(codec) keeps rotated turboquant_mse codes in"
            " the same types, where the model is made by your program.",
        )


class TpuInference(_OneType):
    """`--kv-cache-dtype` of vLLM on TPU."""

    name = "tpu-inference"
    title = "tpu-inference (vLLM on TPU)"
    versions = ">=0.32,<0.33"
    checked = "0.32.0 by source, November 2026"

    def holds(self) -> dict[str, Hold]:
        return {kind: tpu_hold(kind) for kind in TPU}

    def formats(self, model: ModelGeometry, options: Options) -> Formats:
        k, v = first_dims(model).values()
        fp8 = {
            kind: (FP8(dim=k, format=form, scale="none"), FP8(dim=v, format=form, scale="none"))
            for kind, form in TPU.items()
        }
        return {**fp8, **super().formats(model, options)}

    def flags(self, name: str) -> tuple[str, ...]:
        return (f"vllm serve MODEL --kv-cache-dtype {'auto' if name == AUTO else name}",)

    def notes(self, name: str) -> tuple[str, ...]:
        runs = "TURBOQ_PLAN=PLAN vllm serve MODEL --attention-backend turboq --block-size 64"
        ours = (f"A plan itself (no exact tokens, one device; not run on a TPU): {runs}",)
        if name == AUTO:
            return ours
        return (
            *ours,
            "Its JAX models store FP8 with scales of 1. Models it takes from vLLM read scales per"
            " tensor from the overlay of --engine=vllm.",
        )
