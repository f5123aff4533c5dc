"""ik_llama.cpp: one type per side, another for the first N layers and for the last M."""

from __future__ import annotations

from collections.abc import Sequence

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
from turboq.export.llama_cpp import FLOATS, QUANTS, ggml_formats, ggml_hold, reordered
from turboq.plan import ModelGeometry, Plan
from turboq.plan.constraints import Constraints, FirstLast

Ends = tuple[str, int, str, int, str]  # base, first N, its type, last M, its type


def q6_0(entry: Entry) -> Held | None:
    """ik's own 6.5-bit type, which turboq has no codec for."""
    if entry.dim % 32:
        return None
    return Held(format="q6_0", bits=entry.dim // 32 * 26 * 8, codes=6 * entry.dim)


class IkLlama(Exporter):
    """`-ctk`, `-ctk-first T,N`, `-ctk-last T,N` and the same for V; the last win over the first.

    Its Hadamard options (`-khad`, `-vhad`) stay off, so types without rotation are exact. `q8_KV`
    is left out: its layout is not known here.
    """

    name = "ik_llama.cpp"
    title = "ik_llama.cpp"
    versions = "since pull requests 1599 and 1626"
    checked = "source with both of these, November 2026, commit not recorded"

    def formats(self, model: ModelGeometry, options: Options) -> Formats:
        return ggml_formats(model, (*FLOATS, *QUANTS), False)

    def constraints(
        self, model: ModelGeometry, options: Options | None = None
    ) -> tuple[Constraints, ...]:
        allowed = sides_of(self.formats(model, options or Options()))
        ends = FirstLast() if _dense(model) else FirstLast(first=0, last=0)
        return (Constraints(granularity="per_kv", **allowed, first_last=ends),)

    def project(self, plan: Plan, arrays: Tensors, options: Options) -> Projection:
        found = entries(plan, arrays)
        holds: dict[str, Hold] = {name: ggml_hold(name, False) for name in (*FLOATS, *QUANTS)}
        holds["q6_0"] = q6_0
        positions = {layer.index: i for i, layer in enumerate(plan.layers)}
        flags, types, names = [], {}, list(holds)
        costs: dict[Side, choose.Cost] = {s: choose.costs(found, holds, s) for s in SIDES}
        planned: dict[Side, int] = {side: choose.planned_bits(found, side) for side in SIDES}
        whole: dict[Side, choose.Cost] = {side: cost.sum() for side, cost in costs.items()}
        one = choose.pick_sides(whole, planned, options.prefer)
        for side in SIDES:
            ends = _ends(costs[side], names, names[one[side]], options, _dense(plan.model))
            types[side] = spread(ends, len(positions))
            flags += _flags(side, ends)
        held = choose.held_by(found, lambda e: holds[types[e.side][positions[e.place[0]]]])
        quantized_v = any(name not in FLOATS for name in types["v"])
        flags += ["-fa", "on"] if quantized_v else []
        notes = (
            ()
            if _dense(plan.model)
            else (
                "Not every layer of this model has a cache, and how the first and last are then"
                " counted is not known: one type per side.",
            )
        )
        return Projection(
            held=held,
            flags=(" ".join(["llama-server -m MODEL.gguf", *flags]),),
            notes=notes,
            reordered=reordered(plan.model, types["k"]),
        )


def _dense(model: ModelGeometry) -> bool:
    return all(layer.owns_cache for layer in model.layers)


def spread(ends: Ends, layers: int) -> list[str]:
    """The type of every layer, as the engine resolves its options."""
    base, n, first, m, last = ends
    out = [base] * layers
    out[:n] = [first] * n
    out[layers - m :] = [last] * m
    return out


def _flags(side: Side, ends: Ends) -> list[str]:
    base, n, first, m, last = ends
    out = [f"-ct{side}", base]
    out += [f"-ct{side}-first", f"{first},{n}"] if n else []
    out += [f"-ct{side}-last", f"{last},{m}"] if m else []
    return out


def _ends(
    cost: choose.Cost, names: Sequence[str], base: str, options: Options, dense: bool
) -> Ends:
    """The best split, or `base` for all layers.

    Blocks are chosen on their own, because the key of `Cost` is additive.
    """
    exact = _search(cost.nonexact * 10**3 + (cost.bits > 0), names) if dense else None
    if exact is not None and cost.nonexact[_rows(exact, names, cost)].sum() == 0:
        return exact
    if options.prefer == "size" or not dense:
        return base, 0, base, 0, base
    return _search(cost.key, names)


def _rows(ends: Ends, names: Sequence[str], cost: choose.Cost):
    layers = cost.bits.shape[1]
    return [names.index(name) for name in spread(ends, layers)], np.arange(layers)


def _search(key: np.ndarray, names: Sequence[str]) -> Ends:
    """Least sum of key [N, L] over first n, last m and the layers between; fewest ends if equal."""
    layers = key.shape[1]
    sums = np.concatenate([np.zeros((len(names), 1)), np.cumsum(key, axis=1, dtype=float)], axis=1)
    best: tuple[float, int, Ends] | None = None
    for n in range(layers):
        first = sums[:, n]
        for m in range(layers - n):
            last = sums[:, layers] - sums[:, layers - m]
            middle = sums[:, layers - m] - sums[:, n]
            value = float(first.min() + last.min() + middle.min())
            rank = (value, (n > 0) + (m > 0))
            if best is None or rank < best[:2]:
                picked = [names[int(np.argmin(x))] for x in (middle, first, last)]
                best = (*rank, (picked[0], n, picked[1], m, picked[2]))
    assert best is not None
    return best[2]
