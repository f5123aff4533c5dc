"""Experts of a layer in two tensors, rows of gate above those of up, as Qwen3.5, Granite MoE and
Gemma 4 are published."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from turboq_calibrate.models.params import Shapes
from turboq_calibrate.models.spec import LayerSpec

GRANITE = ("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight")
GEMMA4 = ("experts.gate_up_proj", "experts.down_proj")
OTHERS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
STACKED = {"granitemoe": GRANITE, "granitemoehybrid": GRANITE, "gemma4_text": GEMMA4}


def names(family: str) -> tuple[str, str]:
    """What the two are called, after the layer's prefix."""
    return STACKED.get(family, OTHERS)


def stored(spec: LayerSpec, family: str) -> Shapes:
    """Tensors of a layer's experts, by their names after the layer's prefix."""
    assert spec.experts is not None
    count, inner, m = spec.experts.count, spec.experts.intermediate, spec.hidden
    gate_up, down = names(family)
    return {gate_up: (count, 2 * inner, m), down: (count, m, inner)}


def expert(read: Callable[[str], np.ndarray], family: str) -> dict[str, np.ndarray]:
    """One expert's weights, from its rows of the tensors of `stored`."""
    gate_up, down = names(family)
    gate, up = np.split(read(gate_up), 2)
    return {"expert_gate": gate, "expert_up": up, "expert_down": read(down)}
