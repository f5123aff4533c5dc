"""llama.cpp: one type for all keys and one for all values, with its own Hadamard rotation.

Mainline rotates quantized caches (unsigned Hadamard; K in blocks of the largest power of two that
divides the head dim, V in blocks of 64), unless head dims are no multiple of 64 or differ within
one cache. That is what is counted: no line turns it off. A block of 32 channels must divide the
head dim of every layer. `Uniform` is shared by all programs that take one type per side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import ClassVar

from turboq.codecs.base import Codec
from turboq.codecs.exact import Exact
from turboq.codecs.ggml import Ggml, attn_rot
from turboq.export import choose
from turboq.export.base import (
    SIDES,
    Entry,
    Exporter,
    Formats,
    Held,
    Hold,
    Options,
    Projection,
    Side,
    Tensors,
    entries,
    exact_held,
    first_dims,
    sides_of,
)
from turboq.plan import ModelGeometry, Plan
from turboq.plan.constraints import Constraints

INTERLEAVED = ("llama", "mistral", "mixtral")  # families that the converter permutes
FLOATS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
QUANTS = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
ROTATES = (
    "Counted as stock llama.cpp since 2026-04-01 stores it, rotated; a build from before stores "
    "the same types without."
)
# Pairs that CUDA's flash attention is compiled for by default; others fall back and are slow.
FAST_CUDA = {("q4_0", "q4_0"), ("q8_0", "q8_0"), ("f16", "f16"), ("bf16", "bf16")}


def rotates(model: ModelGeometry) -> bool:
    """Whether mainline rotates this model's quantized cache at all: head dims must agree."""
    for windowed in (False, True):
        shapes = {
            (layer.k_dim, layer.v_dim)
            for layer in model.cache_layers
            if (layer.window is not None) == windowed
        }
        if len(shapes) > 1:
            return False
    return True


def ggml_codec(type: str, dim: int, side: Side, rotated: bool) -> Codec | None:
    """The codec of a type; None where its blocks do not divide the head dim."""
    if type in FLOATS:
        return Exact(dim=dim, dtype=FLOATS[type])
    if dim % 32:
        return None
    return Ggml(dim=dim, type=type, **(attn_rot(dim, side) if rotated else {}))


def ggml_hold(type: str, rotated: bool) -> Hold:
    """Keeps a head in a ggml type."""

    def hold(entry: Entry) -> Held | None:
        if type in FLOATS:
            blocks = entry.dim % 32 == 0
            note = "" if blocks else f"head dim {entry.dim} is no multiple of ggml's blocks of 32"
            return exact_held(entry, FLOATS[type], reduced=blocks, note=note)
        codec = ggml_codec(type, entry.dim, entry.side, rotated)
        if not isinstance(codec, Ggml):
            return None
        turned = codec.rotation != "identity"
        return Held(format=type + (" rotated" if turned else ""), codec=codec)

    return hold


def ggml_formats(model: ModelGeometry, types: Sequence[str], rotated: bool) -> Formats:
    """Types whose blocks divide every head dim of the model, as (K, V) codecs."""
    shapes = [dim for layer in model.cache_layers for dim in (layer.k_dim, layer.v_dim)]
    dims, out = first_dims(model), {}
    for name in types:
        k, v = (ggml_codec(name, dims[side], side, rotated) for side in SIDES)
        if k is not None and v is not None and (name in FLOATS or not any(d % 32 for d in shapes)):
            out[name] = (k, v)
    return out


def reordered(model: ModelGeometry, k_types: Iterable[str]) -> str:
    """Why quantized keys of llama-family files are others than the plan's; empty if they are not.

    llama.cpp's converter puts the channels of a rotary pair beside each other, so blocks and
    rotations see another order of channels than the Hugging Face model has.
    """
    if model.family not in INTERLEAVED or all(name in FLOATS for name in k_types):
        return ""
    return (
        f"GGUF files of {model.family} models hold the channels of K in another order (rotary pairs"
        " side by side): the same types with other values, close in error when rotated"
    )


class Uniform(Exporter):
    """One type for K, one for V, from `types`; `same_types` where the program has one setting."""

    types: ClassVar[tuple[str, ...]] = (*FLOATS, *QUANTS)
    same_types: ClassVar[bool] = False

    def formats(self, model: ModelGeometry, options: Options) -> Formats:
        return ggml_formats(model, self.types, rotates(model))

    def constraints(
        self, model: ModelGeometry, options: Options | None = None
    ) -> tuple[Constraints, ...]:
        allowed = sides_of(self.formats(model, options or Options()))
        return (Constraints(granularity="uniform", **allowed, same_k_v=self.same_types),)

    def project(self, plan: Plan, arrays: Tensors, options: Options) -> Projection:
        found = entries(plan, arrays)
        k, v, held = self._choose(found, rotates(plan.model), options)
        out = self.finish(plan, Chosen(k=k, v=v, held=held))
        return dataclasses.replace(out, reordered=reordered(plan.model, [k]))

    def _choose(self, found: Sequence[Entry], rotated: bool, options: Options):
        holds = {name: ggml_hold(name, rotated) for name in self.types}
        total: dict[Side, choose.Cost] = {s: choose.costs(found, holds, s).sum() for s in SIDES}
        names = list(holds)
        if self.same_types:
            both = choose.pick(total["k"] + total["v"], choose.planned_bits(found), options.prefer)
            at = {"k": both, "v": both}
        else:
            planned: dict[Side, int] = {side: choose.planned_bits(found, side) for side in SIDES}
            at = choose.pick_sides(total, planned, options.prefer)
        held = choose.held_by(found, lambda e: holds[names[at[e.side]]])
        return names[at["k"]], names[at["v"]], held

    def finish(self, plan: Plan, chosen: Chosen) -> Projection:
        """Files and flags of the chosen types."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen:
    """Types of K and V, and what becomes of every head."""

    k: str
    v: str
    held: dict

    @property
    def quantized(self) -> bool:
        return self.k in QUANTS or self.v in QUANTS


class LlamaCpp(Uniform):
    """`-ctk`, `-ctv`."""

    name = "llama.cpp"
    title = "llama.cpp (mainline)"
    versions = "since pull request 21038 (2026-04-01); read at 0c1e57098"
    checked = (
        "0c1e57098, 2026-11-22: types and rotation by source; q8_0, q5_0, q4_0 run, see "
        "tests/golden/export"
    )
    ran = True

    def finish(self, plan: Plan, chosen: Chosen) -> Projection:
        flags = f"-ctk {chosen.k} -ctv {chosen.v}" + (" -fa on" if chosen.v in QUANTS else "")
        notes = ["llama-server, llama-cli and llama-perplexity take the same flags."]
        if (chosen.k, chosen.v) not in FAST_CUDA:
            pair = f"{chosen.k}-{chosen.v}"
            notes.append(
                f"CUDA: build with -DGGML_CUDA_FA_QUANTS including {pair!r}, or attention converts"
                " to f16 on every step."
            )
        if "iq4_nl" in (chosen.k, chosen.v):
            notes.append("iq4_nl has no CUDA flash attention kernel.")
        if chosen.k == "q8_0" or chosen.v == "q8_0":
            notes.append(
                "The CPU's AVX2 code rounds exact ties of q8_0 to even, the reference and CUDA away"
                " from zero: under 0.01 % of blocks differ on continuous data."
            )
        return Projection(
            held=chosen.held,
            flags=(f"llama-server -m MODEL.gguf {flags}",),
            notes=tuple(notes),
        )
