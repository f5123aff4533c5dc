"""Timing on a device: many dependent calls inside one dispatch, inputs that do not stay in L2.

Time per call is wall time of one dispatch over the number of calls in it; a dispatch runs at least
`TARGET_S` long, so that its own launch does not count. The launches of the calls inside do, as they
do in a model; `floor` says what they cost alone. Medians of `REPEATS` dispatches after one warm-up.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

TARGET_S = 0.02
REPEATS = 9
COLD_BYTES = 256 * 2**20  # what calls rotate through: several times any L2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds per call: median, least and largest of the dispatches."""

    seconds: float
    least: float
    largest: float
    calls: int


def count(nbytes: float | int, rate: float = 1e12, target: float = TARGET_S) -> int:
    """Calls that take about `target` seconds if each moves `nbytes` at `rate` bytes per second."""
    return round(min(max(target / max(nbytes / rate, 2e-5), 8), 1024))


def measure(call: Callable[[], Any], calls: int, repeats: int = REPEATS) -> Timing:
    """Times `call`, a compiled dispatch of `calls` calls."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        times.append((time.perf_counter() - begin) / calls)
    return Timing(
        seconds=statistics.median(times), least=min(times), largest=max(times), calls=calls
    )


def copy_rate(nbytes: int) -> float:
    """Bytes per second, read and written, of the device's own copy of `nbytes`."""
    calls = count(2 * nbytes, 3e12)
    x = jnp.arange(nbytes // 4, dtype=jnp.uint32)

    @jax.jit
    def run(x):
        return jax.lax.fori_loop(0, calls, lambda _, x: x ^ jnp.uint32(5), x)

    return 2 * nbytes / measure(lambda: run(x), calls).seconds
