"""Matrices whose rows checkpoints keep head by head: rows of one kind are put together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Shaped

from turboq_calibrate.models.spec import DeltaNet, LayerSpec


def by_kind(spec: LayerSpec, stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`stored` by the names of `params.FUSED`, in the order that `params.unfuse` takes apart."""
    rows: dict[str, tuple[int, Sequence[int]]] = {}
    if spec.output_gate:
        rows["q_gate"] = (spec.heads, (spec.head_dim, spec.v_head_dim))
    if isinstance(spec.recurrent, DeltaNet):
        each = spec.recurrent.value_heads // spec.recurrent.key_heads
        key, value = spec.recurrent.key_dim, each * spec.recurrent.value_dim
        rows["delta_qkvz"] = (spec.recurrent.key_heads, (key, key, value, value))
        rows["delta_ba"] = (spec.recurrent.key_heads, (each, each))
    return stored | {name: _sorted(stored[name], *rows[name]) for name in rows if name in stored}


def _sorted(x: Shaped[np.ndarray, "N M"], heads: int, sizes: Sequence[int]) -> np.ndarray:
    parts = np.split(x.reshape(heads, -1, x.shape[1]), np.cumsum(sizes)[:-1], axis=1)
    return np.concatenate([part.reshape(-1, x.shape[1]) for part in parts])
