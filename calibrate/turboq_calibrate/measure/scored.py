"""Which positions of a window a plan is judged by: those that can see a quantized token."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from turboq.cache.layer import KVLayer
from turboq.errors import TurboqError
from turboq.plan import Plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored:
    """Of one window: the first position that counts, and how many tokens are read quantized."""

    first: int
    quantized: int


def plan_scored(plan: Plan, length: int) -> Scored:
    """`scored` of a plan, by the windows of its model."""
    return scored([layer.window for layer in plan.model.cache_layers], plan.storage, length)


def scored(windows: Sequence[int | None], layers: Sequence[KVLayer], length: int) -> Scored:
    """Positions and tokens of a window of `length` tokens under one plan.

    Positions t = 0 .. length - 2 predict a token of the window. At t, a layer with the sliding
    window W reads token s from its codec where

      max(sinks, t - W + 1) <= s < stored_until(t + 1),

    and position t can see what any layer has read at t' <= t. Layers that store all heads with
    `exact` count only in a plan that has no others: nothing of it is quantized, and its positions
    are those at which the same policy would show a quantized token, or all if there are none.

    Args:
      windows: sliding window of every layer, None without one.

    Raises:
      TurboqError: no token is quantized, although some layer has a codec other than `exact`.
    """
    exact = [{c.name for g in x.groups for c in (g.k, g.v)} == {"exact"} for x in layers]
    rules = {
        (window or length, layer.policy.sinks, layer.policy.recent, layer.block)
        for window, layer, same in zip(windows, layers, exact, strict=True)
        if all(exact) or not same
    }
    t, first, tokens = np.arange(length - 1), length - 1, np.zeros(length, bool)
    for window, sinks, recent, block in rules:
        lowest = np.maximum(sinks, t - window + 1)
        stored = np.maximum(t + 1 - recent, 0) // block * block
        reads = lowest < stored
        if reads.any():
            first = min(first, int(reads.argmax()))
        for low, high in zip(lowest[reads], stored[reads], strict=True):
            tokens[low:high] = True
    if first < length - 1:
        return Scored(first=first, quantized=0 if all(exact) else int(tokens.sum()))
    if all(exact):
        return Scored(first=0, quantized=0)
    policy, block = layers[0].policy, max(layer.block for layer in layers)
    blocks = f", whose codecs wait for blocks of {block} tokens," if block > 1 else ""
    raise TurboqError(
        f"the policy of {policy.sinks} sinks and {policy.recent} recent tokens{blocks} keeps every "
        f"token of a window of {length} exact: nothing would be measured; take longer windows"
    )
