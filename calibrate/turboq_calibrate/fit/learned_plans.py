"""Plans of `transform` codecs: one budget shared by heads, layers and sides for the least cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from turboq.cache.layer import TokenPolicy
from turboq.codecs.base import Codec
from turboq.codecs.transform import Transform
from turboq.codecs.water_filling import Rates, cost_rates, share
from turboq.plan import ModelGeometry, Plan, collect_arrays, head_plan
from turboq_calibrate.fit.transform import Arrays, HeadFit, Options, arrays_of, stack

Key = tuple[int, str]  # layer index, "k" or "v"
GRANULARITIES = ("uniform", "per_layer", "per_head")


@dataclasses.dataclass(frozen=True)
class Shares:
    """Groups of (layer, side, head) that share segments, and the best sizes of each group."""

    groups: tuple[tuple[tuple[int, str, int], ...], ...]
    tables: tuple[Rates, ...]
    channels: int


def group_rates(
    fits: Mapping[Key, list[HeadFit]], options: Options, granularity: str = "per_head"
) -> Shares:
    """What `learned_plan` shares a budget over: the same for all budgets.

    Raises:
      ValueError: unknown granularity.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"{granularity=} must be one of {', '.join(GRANULARITIES)}")
    members: dict[tuple, list[tuple[int, str, int]]] = {}
    for (layer, side), heads in sorted(fits.items()):
        for head in range(len(heads)):
            key = {"uniform": (side,), "per_layer": (layer, side)}.get(
                granularity, (layer, side, head)
            )
            members.setdefault(key, []).append((layer, side, head))
    tables, channels = [], 0
    for group in members.values():
        costs = [fits[layer, side][head].costs for layer, side, head in group]
        dim = len(costs[0])
        channels += dim * len(group)
        found = cost_rates(np.sum(costs, axis=0), runs=options.runs)
        stored = (found.bits + options.overhead(dim)) * len(group)
        tables.append(Rates(stored, found.error, found.segments))
    return Shares(tuple(map(tuple, members.values())), tuple(tables), channels)


def learned_plan(
    geometry: ModelGeometry,
    fits: Mapping[Key, list[HeadFit]],
    options: Options,
    bits_per_channel: float,
    *,
    granularity: str = "per_head",
    policy: TokenPolicy | None = None,
    shares: Shares | None = None,
) -> tuple[Plan, Arrays]:
    """The least summed cost within `bits_per_channel` stored bits (gains and start states counted).

    `granularity` says who shares segments: "uniform" all keys and all values, "per_layer" the
    heads of a layer's side, "per_head" nobody. Bases are every head's own throughout. Costs must be
    comparable between layers: fits from gradients are. `shares` of an earlier `group_rates` save
    most of the time.

    Raises:
      ValueError: unknown granularity, or a budget below the smallest.
    """
    shares = shares or group_rates(fits, options, granularity)
    chosen: dict[tuple[int, str, int], Transform] = {}
    picks = share(list(shares.tables), int(bits_per_channel * shares.channels + 1e-6))
    for group, table, pick in zip(shares.groups, shares.tables, picks, strict=True):
        for layer, side, head in group:
            dim = len(fits[layer, side][head].basis.mean)
            chosen[layer, side, head] = options.codec(dim, table.segments[pick])
    plan = head_plan(geometry, lambda *unit: chosen[unit], policy=policy)

    def arrays(layer: int, side: str, codec: Codec) -> Arrays:
        assert isinstance(codec, Transform)
        return stack([arrays_of(codec, fit, None) for fit in fits[layer, side]])

    return plan, collect_arrays(plan, arrays)


def predicted_cost(plan: Plan, fits: Mapping[Key, list[HeadFit]]) -> float:
    """Sum of the measured costs of what a plan of `transform` codecs chose, nats per token."""
    total = 0.0
    for (layer, side), heads in fits.items():
        for codec, fit in zip(plan.codecs(layer, side), heads, strict=True):
            assert isinstance(codec, Transform)
            bits = np.repeat([b for _, b in codec.segments], [w for w, _ in codec.segments])
            bits = np.pad(bits, (0, codec.dim - codec.coded))
            total += float(fit.costs[np.arange(codec.dim), bits].sum())
    return total
