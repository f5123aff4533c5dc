"""Peak memory: what the operating system saw, and what our own arrays add up to."""

from __future__ import annotations

import resource
import sys
from typing import Any

import jax
import numpy as np


def peak_rss() -> int:
    """Largest resident set of this process so far, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def nbytes(*trees: Any) -> int:
    """Bytes of all arrays in the trees."""
    return sum(
        leaf.nbytes for leaf in jax.tree.leaves(trees) if isinstance(leaf, (jax.Array, np.ndarray))
    )


class ArrayMeter:
    """Keeps the largest total of arrays that were alive at once, as the caller reports them."""

    def __init__(self):
        self.peak = 0

    def see(self, *trees: Any) -> None:
        self.peak = max(self.peak, nbytes(*trees))
