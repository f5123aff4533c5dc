"""What every implementation of the column kernels takes and returns."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sums:
    """One softmax over the stored tokens of a layer, not yet normalised, for every query row.

    With p = exp(logit - top) and g the gain of a lane's unit at each token: `acc` [B, M, W] is the
    sum of p g (bit - 1/2), `total` [B, M] that of p; `top` [B, M] the largest logit. W are the
    side's lanes, or those of the row's group alone; lanes that are no code of it hold anything. A
    row that saw nothing has all sums 0, its top is arbitrary.
    """

    acc: Any
    total: Any
    top: Any
