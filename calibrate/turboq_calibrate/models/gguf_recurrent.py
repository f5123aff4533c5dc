"""Weights of recurrent layers as llama.cpp's converter writes them, and back.

The decay is there as -exp(log_decay), kernels of the convolution without their axis of one, scalars
of Mamba-2 heads as columns and its norm by group. Qwen3.5's value heads are tiled: the first of
every key head, then the second of each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from turboq.errors import TurboqError
from turboq_calibrate.models.gguf_architectures import Architecture
from turboq_calibrate.models.gguf_names import LAYER_TENSORS
from turboq_calibrate.models.params import Shapes
from turboq_calibrate.models.spec import DeltaNet, LayerSpec, Mamba


def as_stored(row: Architecture, tensors: Collection[str]) -> Architecture:
    """The row of a file: older ones keep all matrices that read a delta-net's input as one."""
    joined = LAYER_TENSORS["delta_qkvz"]
    if row.recurrent == "delta" and not row.tiled and any(n.endswith(joined) for n in tensors):
        return dataclasses.replace(row, fused=(*row.fused, "delta_qkvz"))
    return row


def stored(spec: LayerSpec, shapes: Shapes) -> Shapes:
    """`shapes` as the file has them."""
    mixer = spec.recurrent
    if mixer is None:
        return shapes
    out = shapes | {"conv": (mixer.channels, mixer.kernel)}
    if isinstance(mixer, Mamba):
        out |= dict.fromkeys(("log_decay", "skip"), (mixer.heads, 1))
        out["mamba_norm"] = (mixer.groups, mixer.inner // mixer.groups)
    return out


def restored(
    spec: LayerSpec, weights: dict[str, np.ndarray], *, tiled: bool, file: Path
) -> dict[str, np.ndarray]:
    """Weights of `stored` as the decoder knows them.

    Raises:
      TurboqError: a decay that is none.
    """
    mixer = spec.recurrent
    if mixer is None:
        return weights
    out = dict(weights)
    if not (out["log_decay"] < 0).all():
        raise TurboqError(f"{file}: tensor ssm_a of a layer must be negative")
    out["log_decay"] = np.log(-out["log_decay"])
    out["conv"] = out["conv"][:, None]
    if isinstance(mixer, Mamba):
        return out | {name: out[name].reshape(-1) for name in ("log_decay", "skip", "mamba_norm")}
    return _grouped(mixer, out) if tiled else out


def _grouped(delta: DeltaNet, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tiled value heads in the order of their key heads."""
    out, keys = dict(weights), 2 * delta.key_heads * delta.key_dim
    for name in ("delta_z", "delta_b", "delta_a", "log_decay", "decay_bias"):
        out[name] = _untiled(delta, out[name])
    for name in ("delta_qkv", "conv"):
        values = _untiled(delta, out[name][keys:])
        out[name] = np.concatenate([out[name][:keys], values])
    out["delta_out"] = np.ascontiguousarray(_untiled(delta, out["delta_out"].T).T)
    return out


def _untiled(delta: DeltaNet, rows: Shaped[np.ndarray, "N *A"]) -> Shaped[np.ndarray, "N *A"]:
    by_head = rows.reshape(-1, delta.key_heads, len(rows) // delta.value_heads, *rows.shape[1:])
    return np.ascontiguousarray(by_head.swapaxes(0, 1).reshape(rows.shape))
