"""Matrices of multi-head latent attention in GGUF files (architecture deepseek2).

Those of keys and of values are apart, and those of keys turned: attn_k_b [H, E, nope], attn_v_b
[H, V, E].
"""

from __future__ import annotations

import numpy as np

from turboq_calibrate.models.params import Shapes
from turboq_calibrate.models.spec import LayerSpec

JOINT, KEYS, VALUES = "kv_up", "k_up", "v_up"


def apart(spec: LayerSpec, shapes: Shapes) -> Shapes:
    """`shapes` as the file has them."""
    if spec.latent is None:
        return shapes
    out, rank = {n: s for n, s in shapes.items() if n != JOINT}, spec.v_head_dim
    out[KEYS] = (spec.heads, rank, spec.latent.nope_dim)
    out[VALUES] = (spec.heads, spec.latent.value_dim, rank)
    return out


def joined(spec: LayerSpec, stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights of `apart` by the names that the decoder knows."""
    if spec.latent is None:
        return stored
    out = dict(stored)
    keys, values = out.pop(KEYS).swapaxes(1, 2), out.pop(VALUES)
    out[JOINT] = np.concatenate([keys, values], axis=1).reshape(-1, spec.v_head_dim)
    return out
