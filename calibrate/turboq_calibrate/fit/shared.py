"""Fitting divided over processes: each fits its share of (layer, side, codec), all get everything.

Heads of a side are fitted together, so a unit is all KV heads of one (layer, K or V) and codec.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from turboq.codecs.base import Codec
from turboq.plan import Plan, collect_arrays
from turboq.plan.types import SIDES

Fit = Callable[[int, str, Codec], dict[str, np.ndarray]]


def collect_shared(plan: Plan, fit: Fit) -> dict[str, np.ndarray]:
    """`turboq.plan.collect_arrays`, unit i fitted by process i mod P and sent to the others.

    Every process of `jax.distributed` calls this with the same plan; one process alone fits all.
    The result is that of one process, bit by bit: values are moved, not added up.

    Raises:
      TurboqError: whatever `fit` raises. JAX then ends the other processes: run again.
    """
    processes, mine = jax.process_count(), jax.process_index()
    if processes == 1:
        return collect_arrays(plan, fit)
    units = [
        (layer.index, side, codec)
        for layer in plan.layers
        for side in SIDES
        for codec in dict.fromkeys(plan.codecs(layer.index, side))
        if codec.array_shapes
    ]
    fitted = {unit: fit(*unit) for unit in units[mine::processes]}
    owner = {unit: i % processes for i, unit in enumerate(units)}

    def receive(index: int, side: str, codec: Codec) -> dict[str, np.ndarray]:
        unit, heads = (index, side, codec), plan.model.layers[index].kv_heads
        empty = {
            name: np.zeros((heads, *shape), np.float32)
            for name, shape in codec.array_shapes.items()
        }
        values = {n: np.asarray(v, np.float32) for n, v in fitted.get(unit, empty).items()}
        return multihost_utils.broadcast_one_to_all(values, is_source=mine == owner[unit])

    return collect_arrays(plan, receive)
