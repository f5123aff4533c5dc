"""What was observed of unrotated keys, as keys relative to their block of positions have it.

    x' = R(o) (x - mu) + mu,  g' = R(o) g,   o = position mod P

Moments are means over the offsets o = 0..P-1: what a key holds does not depend on where in its
block it stands. Sampled tokens are turned by their own offsets. mu is the mean of all keys, which a
codec must take for its own `mean`.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from turboq.codecs.observed import Observed
from turboq.numbers.rope import Rope, matrices


def in_blocks(seen: Observed, rope: Rope, block: int, positions: Int[np.ndarray, "N"]) -> Observed:
    """`seen` of keys before RoPE, relative to blocks of `block` positions (`cache.key_form`)."""
    turns = matrices(rope, seen.dim, np.arange(block))
    centre, own = seen.mean[:, None], turns[positions % block]
    away = seen.weighted_mean - seen.mean
    turned_away = away @ turns.mean(axis=0).T

    def turned(x: Float[np.ndarray, "K N D"]) -> Float[np.ndarray, "K N D"]:
        return np.einsum("nij,knj->kni", own, x)

    return dataclasses.replace(
        seen,
        x=(turned(seen.x - centre) + centre).astype(np.float32),
        g=None if seen.g is None else turned(seen.g).astype(np.float32),
        covariance=_mean_turn(turns, seen.covariance),
        weighted_mean=seen.mean + turned_away,
        weighted_covariance=_mean_turn(turns, seen.weighted_covariance + _outer(away))
        - _outer(turned_away),
        metric=_mean_turn(turns, seen.metric),
        queries=None if seen.queries is None else _mean_turn(turns, seen.queries),
        rope_layout=rope.layout, rope_dim=rope.dim,
    )  # fmt: skip


def _outer(x: Float[np.ndarray, "K D"]) -> Float[np.ndarray, "K D D"]:
    return x[:, :, None] * x[:, None, :]


def _mean_turn(
    turns: Float[np.ndarray, "P D D"], square: Float[np.ndarray, "K D D"]
) -> Float[np.ndarray, "K D D"]:
    """Mean over the turns R of R square R^T."""
    total = np.zeros(square.shape)
    for turn in turns:
        total += turn @ square @ turn.T
    return total / len(turns)
