"""The turboquant fork of llama.cpp: turbo types, and fixed layer patterns by environment variable.

turbo2/3/4 are not turboq's codecs (fixed signs around WHT-128, a norm per 128 channels, heads
padded to multiples of 128), so they are approximations always; ggml's own types are those of
llama.cpp, rotated as it rotates them.
"""

from __future__ import annotations

import dataclasses

import numpy as np

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
    sides_of,
)
from turboq.export.llama_cpp import (
    FLOATS,
    QUANTS,
    ROTATES,
    ggml_formats,
    ggml_hold,
    reordered,
    rotates,
)
from turboq.plan import ModelGeometry, Plan
from turboq.plan.constraints import Constraints

TURBO = {"turbo2": 34, "turbo3": 50, "turbo4": 68}  # bytes of a block of 128 channels
TYPES = ("f16", "bf16", *QUANTS, *TURBO)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mode:
    """One value of TURBO_LAYER_ADAPTIVE: `there` on the first and last layers instead of the flag.

    `base` is the V type that the mode belongs to (None: any turbo type on K and V).
    """

    number: int
    first: int
    last: int
    there: str
    sides: tuple[Side, ...]
    base: str | None = None


MODES = (
    Mode(number=1, first=4, last=4, there="q8_0", sides=("k", "v")),
    Mode(number=2, first=0, last=8, there="q8_0", sides=("k", "v")),
    Mode(number=5, first=2, last=2, there="turbo4", sides=("v",), base="turbo2"),
    Mode(number=6, first=0, last=8, there="turbo4", sides=("v",), base="turbo2"),
    Mode(number=7, first=2, last=2, there="q8_0", sides=("v",), base="turbo2"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Types of K and V and, maybe, a mode."""

    k: str
    v: str
    mode: Mode | None

    def types(self, side: Side, layers: int) -> list[str]:
        """Type of every layer."""
        out = [self.k if side == "k" else self.v] * layers
        if self.mode is not None and side in self.mode.sides:
            for i in range(layers):
                if i < self.mode.first or i >= layers - self.mode.last:
                    out[i] = self.mode.there
        return out


def turbo_hold(name: str) -> Hold:
    """A head in a turbo type: whole blocks of 128 channels."""

    def hold(entry: Entry) -> Held | None:
        bits = -(-entry.dim // 128) * TURBO[name] * 8
        return Held(format=name, bits=bits, codes=int(name[-1]) * entry.dim)

    return hold


def settings(layers: int) -> list[Setting]:
    """Every setting, plain ones first. Mode 7 comes by itself with V turbo2 from 8 layers on."""
    out = [Setting(k=k, v=v, mode=None) for k in TYPES for v in TYPES]
    for mode in MODES:
        for k in TYPES:
            for v in (mode.base,) if mode.base else tuple(TURBO):
                if mode.base or k in TURBO:
                    out.append(Setting(k=k, v=v, mode=mode))
    return [s for s in out if s.mode is not None or s.v != "turbo2" or layers < 8]


class TurboquantFork(Exporter):
    """`-ctk`, `-ctv` and TURBO_LAYER_ADAPTIVE."""

    name = "turboquant-llama.cpp"
    title = "llama.cpp fork with turbo types (TheTom/llama-cpp-turboquant)"
    versions = "snapshot of May 2026"
    checked = "source of that snapshot, November 2026, commit not recorded"

    def formats(self, model: ModelGeometry, options: Options) -> Formats:
        return ggml_formats(model, ("f16", "bf16", *QUANTS), rotates(model))

    def constraints(
        self, model: ModelGeometry, options: Options | None = None
    ) -> tuple[Constraints, ...]:
        allowed = sides_of(self.formats(model, options or Options()))
        return (Constraints(granularity="uniform", **allowed),)

    def project(self, plan: Plan, arrays: Tensors, options: Options) -> Projection:
        found = entries(plan, arrays)
        turned = rotates(plan.model)
        holds: dict[str, Hold] = {n: ggml_hold(n, turned) for n in ("f16", "bf16", *QUANTS)}
        holds |= {name: turbo_hold(name) for name in TURBO}
        cost = {side: choose.costs(found, holds, side) for side in SIDES}
        names, layers = list(holds), len(plan.layers)
        tried = settings(layers)
        parts = [
            sum_of(cost["k"], names, s.types("k", layers))
            + sum_of(cost["v"], names, s.types("v", layers))
            for s in tried
        ]
        total = choose.stack(parts)
        best = tried[choose.pick(total, choose.planned_bits(found), options.prefer)]
        positions = {layer.index: i for i, layer in enumerate(plan.layers)}
        types = {side: best.types(side, layers) for side in SIDES}
        held = choose.held_by(found, lambda e: holds[types[e.side][positions[e.place[0]]]])
        env = {"TURBO_AUTO_ASYMMETRIC": "0"}  # or K becomes q8_0 by itself from 6 queries a head on
        if best.mode is not None:
            env["TURBO_LAYER_ADAPTIVE"] = str(best.mode.number)
        used = {*types["k"], *types["v"]}
        fa = "" if best.v in FLOATS else " -fa on"
        prefix = " ".join(f"{name}={value}" for name, value in env.items())
        return Projection(
            held=held,
            flags=(f"{prefix} llama-server -m MODEL.gguf -ctk {best.k} -ctv {best.v}{fa}",),
            env=env,
            reordered=reordered(plan.model, types["k"]),
            notes=tuple(
                note
                for types, note in (
                    (
                        TURBO,
                        "Type numbers clash with mainline's: use files of one with one.",
                    ),
                    (QUANTS, ROTATES),
                )
                if used & set(types)
            ),
        )


def sum_of(cost: choose.Cost, names: list[str], types: list[str]) -> choose.Cost:
    """Cost of one type per layer."""
    rows = [names.index(name) for name in types]
    return cost[rows, np.arange(len(types))].sum()
