"""Hugging Face transformers: a generated Python module that builds one cache layer per model layer.

    quanto    2 or 4 bits, K and V apart, keys per channel or per token (optimum-quanto)
    fp8       e4m3 with the plan's scales per head, or with one frozen at the prompt
    dynamic   the model's own type

The generated classes add to transformers' own what a plan needs: different bits for K and V, groups
of tokens that never run over from one head into the next, and given FP8 scales.
"""

from __future__ import annotations

import dataclasses

from turboq.cache.layer import TokenPolicy
from turboq.codecs.exact import Exact
from turboq.codecs.fp8 import FP8
from turboq.codecs.kivi import KiviKey
from turboq.errors import TurboqError
from turboq.export import choose, quanto
from turboq.export.base import (
    SIDES,
    Entry,
    Exporter,
    Formats,
    Held,
    Options,
    Place,
    Projection,
    Tensors,
    entries,
    exact_held,
    first_dims,
    matches,
    model_dtype,
)
from turboq.export.hf_template import FILE, render
from turboq.export.static import static_fp8
from turboq.plan import ModelGeometry, Plan
from turboq.plan.constraints import Constraints, Scheme

WINDOW_NOTE = "layers with a sliding window stay in the model's type"


def quanto_candidates(entry: Entry, dtype: str, groups: tuple[int, ...]) -> list[Held]:
    """Every way to store one head with quanto."""
    out = []
    for bits in quanto.BITS:
        for group in groups:
            for per_channel in (False, True) if entry.side == "k" else (False,):
                codec = quanto.quanto_codec(
                    entry.side, entry.dim, bits, group=group, dtype=dtype, per_channel=per_channel
                )
                axis = "channel" if per_channel else "token"
                out.append(Held(format=f"quanto {bits} bits per {axis}, {group}", codec=codec))
    return out


def fp8_layer(members: list[Entry]) -> dict[Place, Held]:
    """e4m3 with the plan's scales; if one is missing, all with those that the prompt gives."""
    scaled = {entry.place: static_fp8(entry) for entry in members}
    found = {place: held for place, held in scaled.items() if held is not None}
    if len(found) == len(members):
        return found
    note = "one scale for all heads, frozen at the prompt"
    return {
        e.place: Held(format="fp8_e4m3", bits=8 * e.dim, codes=8 * e.dim, note=note)
        for e in members
    }


class Transformers(Exporter):
    """`past_key_values=turboq_cache.make_cache()`."""

    name = "transformers"
    title = "Hugging Face transformers"
    versions = ">=5.23,<6 with optimum-quanto >=0.2.5"
    checked = "5.23.0 with optimum-quanto 0.2.7: generated, codes compared, see tests/golden/export"

    def formats(self, model: ModelGeometry, options: Options) -> Formats:
        k, v = first_dims(model).values()
        dtype = options.dtype or "bfloat16"
        out: Formats = {
            f"quanto {bits} bits, {group}": (
                quanto.quanto_codec("k", k, bits, group=group, dtype=dtype),
                quanto.quanto_codec("v", v, bits, group=group, dtype=dtype),
            )
            for group in quanto.groups_of(model)
            for bits in quanto.BITS
        }
        for scale in ("head", "tensor"):
            out[f"fp8 scale per {scale}"] = (FP8(dim=k, scale=scale), FP8(dim=v, scale=scale))
        return out | {"dynamic": (Exact(dim=k, dtype=dtype), Exact(dim=v, dtype=dtype))}

    def constraints(
        self, model: ModelGeometry, options: Options | None = None
    ) -> tuple[Constraints, ...]:
        """Per layer one kind; bits and groups of K and V are free within quanto."""
        formats = self.formats(model, options or Options())
        kinds: dict[str, list] = {}
        for name, pair in formats.items():
            kinds.setdefault(name.split()[0], []).append(pair)
        found = [
            Scheme(
                name=kind,
                k=matches(tuple(k for k, _ in pairs)),
                v=matches(tuple(v for _, v in pairs)),
            )
            for kind, pairs in kinds.items()
        ]
        if any(layer.window is not None for layer in model.cache_layers):
            found = found[-1:]
        return (Constraints(granularity="per_layer", schemes=tuple(found)),)

    def policy(self, wanted: TokenPolicy) -> TokenPolicy:
        return quanto.residual(wanted)

    def project(self, plan: Plan, arrays: Tensors, options: Options) -> Projection:
        for layer in plan.model.layers:
            if not layer.owns_cache:
                raise TurboqError(
                    f"{self.name} cannot hold this plan: layer {layer.index} has no cache of its"
                    " own, and a cache list for such models is not known here"
                )
        found = entries(plan, arrays)
        dtype = model_dtype(plan, options)
        groups = quanto.groups_of(plan.model)
        held: dict[Place, Held] = {}
        for layer in plan.layers:
            members = [e for e in found if e.place[0] == layer.index]
            held |= _layer(members, dtype, groups, options)
        policy = self.policy(plan.tokens)
        quantized = any("quanto" in h.format for h in held.values())
        notes = [
            "pip install 'turboq[transformers]' has what the module imports.",
            "The first prompt is attended to unquantized, as transformers does.",
        ]
        if quantized:
            notes.append(
                "The residual is emptied when it is full: between 0 and"
                f" {policy.recent - 1} of the newest tokens are exact."
            )
        return Projection(
            held=held,
            files={FILE: render(plan, held, policy.recent).encode()},
            flags=("model.generate(**inputs, past_key_values=turboq_cache.make_cache())",),
            notes=tuple(notes),
            policy=policy if quantized else _unquantized_policy(plan),
        )


def _unquantized_policy(plan: Plan) -> TokenPolicy:
    """Without quanto layers no token waits unquantized, which only matters if some layer is FP8."""
    exact = all(
        isinstance(la.k.codec, Exact) and isinstance(la.v.codec, Exact) for la in plan.layers
    )
    return plan.tokens if exact else dataclasses.replace(plan.tokens, sinks=0, recent=0)


def _layer(
    members: list[Entry], dtype: str, groups: tuple[int, ...], options: Options
) -> dict[Place, Held]:
    """The best cache layer for one layer's heads."""
    if members[0].layer.window is not None:
        return {e.place: exact_held(e, dtype, reduced=False, note=WINDOW_NOTE) for e in members}
    tried = [
        fp8_layer(members),
        {e.place: exact_held(e, dtype) for e in members},
    ]
    if groups:
        both: dict[Place, Held] = {}
        for side in SIDES:
            both |= _quanto_side([e for e in members if e.side == side], dtype, groups, options)
        tried.insert(0, both)
    total = choose.stack([choose.cost_of(members, held) for held in tried])
    return tried[choose.pick(total, choose.planned_bits(members), options.prefer)]


def _quanto_side(
    members: list[Entry], dtype: str, groups: tuple[int, ...], options: Options
) -> dict[Place, Held]:
    """One setting for all heads of a side: exact if possible; keys per channel if equal."""
    options_of = [quanto_candidates(entry, dtype, groups) for entry in members]
    tried = [
        {e.place: column[n] for e, column in zip(members, options_of, strict=True)}
        for n in range(len(options_of[0]))
    ]
    tried.sort(key=lambda held: not isinstance(next(iter(held.values())).codec, KiviKey))
    total = choose.stack([choose.cost_of(members, held) for held in tried])
    return tried[choose.pick(total, choose.planned_bits(members), options.prefer)]
