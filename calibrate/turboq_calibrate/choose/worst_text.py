"""The allocation whose worst calibration text is best: weights of texts by multiplicative updates.

    min over choices c  max over texts x  cost_x(c)  =  max over weights p  min over c  p . cost(c)

up to the gap that whole choices leave. Each round solves for the texts' current weights, then texts
that came out dearer than the mean gain weight.

Source: Freund and Schapire, "Adaptive game playing using multiplicative weights" (1999).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

ROUNDS = 24


def least_worst(
    costs: Float[np.ndarray, "U C X"],
    choose: Callable[[Float[np.ndarray, "U C"]], Int[np.ndarray, "U"]],
    *,
    rounds: int = ROUNDS,
) -> Float[np.ndarray, "X"]:
    """Weights of the texts (sum 1) whose choice has the least worst text among those tried."""
    texts = costs.shape[2]
    weights = np.full(texts, 1 / texts)
    best, lowest = weights, np.inf
    for number in range(rounds):
        chosen = choose(costs @ weights)
        each = costs[np.arange(len(costs)), chosen].sum(axis=0)
        if each.max() < lowest:
            best, lowest = weights, each.max()
        if texts == 1 or each.max() <= 0:
            break
        step = np.sqrt(8 * np.log(texts) / (number + 1))
        weights = weights * np.exp(step * (each / each.max() - 1))
        weights = weights / weights.sum()
    return best
