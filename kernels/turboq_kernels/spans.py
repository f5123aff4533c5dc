"""Which tokens query rows see: stored ones by their slots, exact ones by their positions."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from turboq.cache.layer import KVLayer, TokenPolicy, stored_until


class Rules(NamedTuple):
    """What is static: the layer's policy, tokens that enter its cache together, the window."""

    policy: TokenPolicy
    block: int
    window: int | None


class Spans(NamedTuple):
    """Stored tokens of slots [starts, ends); exact ones of positions [lower, own position].

    `low` is the window's first position, the lower bound of exact sinks; `until` of what is read
    packed, so that the recent window begins there.
    """

    starts: Any
    ends: Any
    low: Any
    until: Any

    def lower(self, sinks: Any) -> Any:
        """Of recent tokens, when the first `sinks` are exact ones of their own."""
        return jnp.maximum(jnp.maximum(self.low, self.until), sinks)


def rules(layer: KVLayer, window: int | None) -> Rules:
    """Those of a layer for queries of this window."""
    return Rules(layer.policy, layer.block, window)


def spans(rules: Rules, at: Any, lengths: Any, first: Any, *, own: bool = False) -> Spans:
    """Of query rows at positions `at`, in sequences of so many tokens; slot 0 is position `first`.

    With `own` the queries' own tokens, not stored yet, are exact.
    """
    policy, block = rules.policy, rules.block
    stored = lengths if block == 1 else stored_until(policy, block, lengths)
    until = at + 1
    if policy.recent or block > 1:
        until = stored_until(policy, block, until)
    if own:
        until = jnp.minimum(until, stored)
    low = jnp.zeros_like(at) if rules.window is None else at - rules.window + 1
    starts, ends = jnp.maximum(low, policy.sinks) - first, jnp.minimum(until, stored) - first
    return Spans(starts=starts, ends=ends, low=low, until=until)
