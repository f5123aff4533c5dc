"""The allocation problem: units, candidates, what each costs and how much it stores."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from turboq.cache.layer import HeadGroup, KVLayer, TokenPolicy
from turboq.codecs import Codec
from turboq.errors import TurboqError
from turboq_calibrate.candidates.table import Table, Unit


class Infeasible(Exception):
    """No choice fits; `smallest` is the least size that does, None if nothing ever does (`why`)."""

    def __init__(self, smallest: int | None, why: str = ""):
        super().__init__(smallest, why)
        self.smallest = smallest
        self.why = why


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One choice per unit, additive costs.

    units [U]; labels [C] name the candidates; codecs [U][C] is what a candidate means for a unit.
    costs [U, C]: predicted loss (KL in nats, say) of the candidate; +inf where it must not be used.
    sizes [U, C]: stored bits of one token, exact.
    windows [U]: how many tokens the unit's cache keeps, None: all (default: all of them).
    joint_heads: heads whose keys and values are stored together (`turboq.cache.joint`).

    Raises:
      TurboqError: shapes disagree, a cost is NaN or -inf, a size is negative, a unit appears twice
        or has no candidate with a finite cost.
    """

    units: tuple[Unit, ...]
    labels: tuple[str, ...]
    codecs: tuple[tuple[Codec, ...], ...]
    costs: np.ndarray  # checked below: shapes are a user's to get wrong
    sizes: np.ndarray
    windows: tuple[int | None, ...] = ()
    joint_heads: int | None = None

    def __post_init__(self):
        shape = (len(self.units), len(self.labels))
        if 0 in shape:
            raise TurboqError(f"{shape[0]} units and {shape[1]} candidates: need one of each")
        given = {"costs": self.costs.shape, "sizes": self.sizes.shape}
        for name, found in given.items():
            if found != shape:
                raise TurboqError(f"{name} {list(found)} must be [units, candidates] {list(shape)}")
        if [len(row) for row in self.codecs] != [shape[1]] * shape[0]:
            raise TurboqError(f"codecs must be {shape[0]} rows of {shape[1]}, one per cost")
        object.__setattr__(self, "windows", self.windows or (None,) * shape[0])
        if len(self.windows) != shape[0]:
            raise TurboqError(f"{len(self.windows)} windows must be {shape[0]}, one per unit")
        if len(set(self.units)) != len(self.units):
            raise TurboqError("a unit appears twice")
        self._check_values()
        object.__setattr__(self, "costs", np.asarray(self.costs, np.float64))
        object.__setattr__(self, "sizes", np.asarray(self.sizes, np.int64))

    def _check_values(self):
        bad = np.isnan(self.costs) | np.isneginf(self.costs)
        if bad.any():
            raise TurboqError(f"cost of {self._at(bad)} must be a number or +inf")
        if (self.sizes < 0).any():
            raise TurboqError(f"size of {self._at(self.sizes < 0)} must not be negative")
        empty = ~np.isfinite(self.costs).any(axis=1)
        if empty.any():
            unit = self.units[int(empty.argmax())]
            raise TurboqError(f"{shown(unit)} has no candidate with a finite cost")

    def _at(self, where: np.ndarray) -> str:
        u, c = np.argwhere(where)[0]
        return f"{shown(self.units[u])}, candidate {self.labels[c]!r}"

    @classmethod
    def of(cls, table: Table, costs: Float[np.ndarray, "U C"]) -> Problem:
        """The problem of a table of candidates, `costs` in the order of `table.units`."""
        return cls(
            units=table.units,
            labels=table.labels,
            codecs=tuple(
                tuple(option.codecs[u.head] for option in table.options[u.layer, u.side])
                for u in table.units
            ),
            costs=costs,
            sizes=table.sizes,
            windows=tuple(table.windows.get(u.layer) for u in table.units),
            joint_heads=table.joint_heads,
        )

    @functools.cached_property
    def dims(self) -> Int[np.ndarray, "U"]:
        """Channels of every unit."""
        return np.array([row[0].dim for row in self.codecs], np.int64)

    @property
    def channels(self) -> int:
        """Numbers that one token stores: the divisor of bits per channel."""
        return int(self.dims.sum())

    def bits(self, chosen: Int[np.ndarray, "U"]) -> int:
        """Stored bits of one token under a choice."""
        return int(self.sizes[np.arange(len(self.units)), chosen].sum())

    def layers(self, chosen: Int[np.ndarray, "U"], policy: TokenPolicy) -> list[KVLayer]:
        """The layers of a choice, without fitted arrays."""
        made: dict[int, dict[str, list[Codec]]] = {}
        for unit, row, c in zip(self.units, self.codecs, chosen.tolist(), strict=True):
            made.setdefault(unit.layer, {"k": [], "v": []})[unit.side].append(row[c])

        def group(head: int, k: Codec, v: Codec) -> HeadGroup:
            return HeadGroup(heads=(head,), k=k, v=v, k_arrays={}, v_arrays={})

        def layer(k: list[Codec], v: list[Codec]) -> KVLayer:
            groups = tuple(map(group, itertools.count(), k, v))
            return KVLayer(groups=groups, policy=policy, joint_heads=self.joint_heads)

        return [layer(**sides) for _, sides in sorted(made.items())]

    def cost(self, chosen: Int[np.ndarray, "U"]) -> float:
        """Predicted loss of a choice."""
        return float(self.costs[np.arange(len(self.units)), chosen].sum())

    def cost_by_layer(self, chosen: Int[np.ndarray, "U"]) -> list[dict[str, Any]]:
        """The same of every layer, K and V apart: {"layer", "k", "v"} in the model's order."""
        found: dict[int, dict[str, float]] = {}
        for unit, costs, c in zip(self.units, self.costs, chosen, strict=True):
            sides = found.setdefault(unit.layer, {"k": 0.0, "v": 0.0})
            sides[unit.side] += float(costs[c])
        return [{"layer": layer} | sides for layer, sides in sorted(found.items())]


def shown(unit: Unit) -> str:
    """A unit in a message."""
    return f"layer {unit.layer} {unit.side} head {unit.head}"
