"""Experts of gpt-oss checkpoints: all in one tensor, plain or in MXFP4 as they are published.

Rows of `gate_up` are those of gate and up by turns; plain matrices are kept [in, out].
MXFP4 (OCP Microscaling Formats 1.0, section 5.3): 32 e2m1 numbers, low half of a byte first, times
2^(scale - 127).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8

from turboq_calibrate.models.spec import LayerSpec

METHOD = "mxfp4"
BLOCK = 32
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
LEVELS = np.concatenate([E2M1, -E2M1])
PREFIX = "mlp.experts."
BYTES = ("U8",)
Stored = dict[str, tuple[tuple[int, ...], tuple[str, ...] | None]]  # shape, types (None: floats)


def stored(spec: LayerSpec, *, packed: bool) -> Stored:
    """Tensors of a layer's experts, by their names after the layer's prefix."""
    assert spec.experts is not None
    count, inner, m = spec.experts.count, spec.experts.intermediate, spec.hidden
    out: Stored = {
        "gate_up_proj_bias": ((count, 2 * inner), None), "down_proj_bias": ((count, m), None),
    }  # fmt: skip
    for name, rows, columns in (("gate_up_proj", 2 * inner, m), ("down_proj", m, inner)):
        if packed:
            blocks = -(-columns // BLOCK)
            out[f"{name}_blocks"] = ((count, rows, blocks, BLOCK // 2), BYTES)
            out[f"{name}_scales"] = ((count, rows, blocks), BYTES)
        else:
            out[name] = ((count, columns, rows), None)
    return {PREFIX + name: of for name, of in out.items()}


def expert(read: Callable[[str], np.ndarray], *, packed: bool) -> dict[str, np.ndarray]:
    """One expert's weights, from its rows of the tensors of `stored`."""

    def matrix(name: str) -> np.ndarray:
        if packed:
            return unpack(read(f"{PREFIX}{name}_blocks"), read(f"{PREFIX}{name}_scales"))
        return read(PREFIX + name).T

    both, bias = matrix("gate_up_proj"), read(f"{PREFIX}gate_up_proj_bias")
    return {
        "expert_gate": both[0::2], "expert_up": both[1::2], "expert_down": matrix("down_proj"),
        "expert_gate_bias": bias[0::2], "expert_up_bias": bias[1::2],
        "expert_down_bias": read(f"{PREFIX}down_proj_bias"),
    }  # fmt: skip


def unpack(blocks: UInt8[np.ndarray, "R b 16"], scales: UInt8[np.ndarray, "R b"]) -> np.ndarray:
    """Float32 [R, 32 b]. A scale of 255, which is NaN, gives numbers that are not finite."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, BLOCK)
    factor = np.exp2(np.where(scales == 255, np.nan, scales - np.float32(127)))
    return (LEVELS[codes] * factor[..., None]).reshape(len(scales), -1)
