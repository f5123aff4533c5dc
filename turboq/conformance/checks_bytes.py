"""Claimed bytes against the bytes that are alive in what `quantize` returned."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from turboq.conformance.sample import Sample
from turboq.conformance.verdict import Verdict, judge

HALF_BITS = 16


def check_bytes(sample: Sample) -> Verdict:
    """Live bytes of one more vector (tables that all vectors share drop out) and `nbytes`.

    Bytes per vector are taken from two sizes, so a fixed header costs nothing.
    """
    adapter, n = sample.adapter, sample.vectors
    half = adapter.quantize(sample.x[: n // 2])
    more = n - n // 2
    live = (live_bytes(sample.codes) - live_bytes(half)) / more
    said = (adapter.nbytes(sample.codes) - adapter.nbytes(half)) / more
    claimed = adapter.claims.bits_per_channel * adapter.dim / 8
    why = f"{live:.4g} live bytes per vector, nbytes says {said:.4g}, claimed {claimed:.4g}"
    ok = live <= claimed * 1.001 and abs(said - live) <= 0.001 * live
    hint = "stores more than it says"
    if live > HALF_BITS / 8 * adapter.dim:
        hint += ", and more than float16 would"
    if live == 0:
        ok, hint = False, "no array found in the code object: what is stored is hidden"
    elif live <= claimed * 1.001:
        hint = "nbytes does not count what is stored"
    return judge("bytes", ok, why, hint)


def live_bytes(value: Any) -> int:
    """Bytes of all arrays and byte strings inside, each buffer once."""
    return _live(value, set())


def _live(value: Any, seen: set[int]) -> int:
    if value is None or isinstance(value, (bool, int, float, str, type)) or id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, np.ndarray) and isinstance(value.base, np.ndarray):
        return _live(value.base, seen)  # a view keeps all of its buffer alive
    if isinstance(value, (bytes, bytearray, memoryview)):
        return memoryview(value).nbytes
    size = getattr(value, "nbytes", None)  # jax.Array, and torch.Tensor since 2.0
    if size is not None:
        return int(size)
    if isinstance(value, Mapping):
        return sum(_live(v, seen) for v in value.values())
    if isinstance(value, (list, tuple, set)):
        return sum(_live(v, seen) for v in value)
    if dataclasses.is_dataclass(value):
        return sum(_live(getattr(value, f.name), seen) for f in dataclasses.fields(value))
    slots = [s for c in type(value).__mro__ for s in getattr(c, "__slots__", ())]
    parts = [getattr(value, s, None) for s in slots] + list(getattr(value, "__dict__", {}).values())
    return sum(_live(v, seen) for v in parts)
