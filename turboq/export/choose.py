"""Choosing among an engine's types: what each costs a plan, per layer and side.

A choice is good when every head is exact; else when no head's codes have fewer bits than planned,
and of those the smallest ("quality"); or the one nearest below the plan's own bytes ("size").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from turboq.export.base import Entry, Held, Hold, Place, Side, status_of
from turboq.plan.rules import nominal_bits

_SHORT = 10**12  # one head short of bits weighs more than the bits of any model
_BITS = 10**4  # a bit weighs more than one head that is not exact
IMPOSSIBLE = 10**6  # heads short: the engine cannot store a head of the layer so

Count = Any  # an integer array; NumPy makes numbers of those without axes
Holds = Mapping[str, Hold]  # an engine's types: its name for each -> what it does with a head


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Cost:
    """Of types [N] on layers [L]: heads not exact, heads with fewer code bits, stored bits."""

    nonexact: Count
    short: Count
    bits: Count

    def __add__(self, other: Cost) -> Cost:
        pairs = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in _fields()}
        return Cost(**pairs)

    def __getitem__(self, index) -> Cost:
        return Cost(**{f.name: getattr(self, f.name)[index] for f in _fields()})

    def sum(self, axis: int = -1) -> Cost:
        return Cost(**{f.name: getattr(self, f.name).sum(axis) for f in _fields()})

    @property
    def key(self) -> np.ndarray:
        """Ascending from best to worst; additive, so that parts can be chosen on their own."""
        return np.minimum(self.short, IMPOSSIBLE) * _SHORT + self.bits * _BITS + self.nonexact


def _fields():
    return dataclasses.fields(Cost)


def costs(entries: Sequence[Entry], holds: Holds, side: Side) -> Cost:
    """Of every type on every layer of one side: Cost of int64 [N, L]."""
    layers = list(dict.fromkeys(e.place[0] for e in entries))
    found = np.zeros((3, len(holds), len(layers)), np.int64)
    for entry in entries:
        if entry.side != side:
            continue
        at = layers.index(entry.place[0])
        for n, hold in enumerate(holds.values()):
            held = hold(entry)
            if held is None:
                found[:, n, at] += (1, IMPOSSIBLE, 0)
                continue
            found[0, n, at] += status_of(entry, held) != "exact"
            found[1, n, at] += held.code_bits < nominal_bits(entry.codec)
            found[2, n, at] += held.stored_bits
    return Cost(nonexact=found[0], short=found[1], bits=found[2])


def cost_of(entries: Sequence[Entry], held: Mapping[Place, Held]) -> Cost:
    """Of one way to hold some entries: Cost of no axes."""
    pairs = [(e, held[e.place]) for e in entries]
    return Cost(
        nonexact=np.array(sum(status_of(e, h) != "exact" for e, h in pairs)),
        short=np.array(sum(h.code_bits < nominal_bits(e.codec) for e, h in pairs)),
        bits=np.array(sum(h.stored_bits for _, h in pairs)),
    )


def stack(parts: Sequence[Cost]) -> Cost:
    """Costs of no axes as candidates [N]."""
    return Cost(**{f.name: np.array([getattr(p, f.name) for p in parts]) for f in _fields()})


def pick(total: Cost, planned_bits: int, prefer: str) -> int:
    """The best of candidates [N]: an exact one if there is one, else as `prefer` says.

    Candidates that cannot be stored (`IMPOSSIBLE`) are taken last.
    """
    key = total.key.copy()
    if prefer == "size":
        over = total.bits > planned_bits
        key = np.where(over, total.bits, planned_bits - total.bits) * _BITS + total.nonexact
        key += over * _SHORT + np.where(total.short >= IMPOSSIBLE, 2 * _SHORT, 0)
    exact = total.nonexact == 0
    return int(np.argmin(np.where(exact, key, key + key.max() + 1) if exact.any() else key))


def pick_sides(
    total: Mapping[Side, Cost], planned: Mapping[Side, int], prefer: str
) -> dict[Side, int]:
    """The best candidate of each side, [N] each.

    "size" is about both: where each by itself exceeds the plan together, the pair that does not.
    """
    at: dict[Side, int] = {side: pick(total[side], planned[side], prefer) for side in total}
    limit = sum(planned.values())
    if prefer == "size" and sum(int(total[side].bits[i]) for side, i in at.items()) > limit:
        k, v = total["k"], total["v"]
        pairs = [(i, j) for i in range(len(k.bits)) for j in range(len(v.bits))]
        best = pairs[pick(stack([k[i] + v[j] for i, j in pairs]), limit, prefer)]
        at = {"k": best[0], "v": best[1]}
    return at


def planned_bits(entries: Iterable[Entry], side: Side | None = None) -> int:
    """Bits of one token in the plan."""
    return sum(e.codec.bits_per_vector for e in entries if side in (None, e.side))


def held_by(entries: Iterable[Entry], hold_of: Callable[[Entry], Hold]) -> dict[Place, Held]:
    """What the chosen types make of every entry.

    Raises:
      ValueError: a type that cannot store one of its entries was chosen.
    """
    out = {}
    for entry in entries:
        held = hold_of(entry)(entry)
        if held is None:
            raise ValueError(f"{entry}: the chosen type cannot store it")
        out[entry.place] = held
    return out
