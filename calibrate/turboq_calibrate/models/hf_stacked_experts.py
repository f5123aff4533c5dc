"""Experts of a layer in two tensors, rows of gate above those of up, as Qwen3.5 is published."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from turboq_calibrate.models.params import Shapes
from turboq_calibrate.models.spec import LayerSpec

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


def stored(spec: LayerSpec) -> Shapes:
    """Tensors of a layer's experts, by their names after the layer's prefix."""
    assert spec.experts is not None
    count, inner, m = spec.experts.count, spec.experts.intermediate, spec.hidden
    return {GATE_UP: (count, 2 * inner, m), DOWN: (count, m, inner)}


def expert(read: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
    """One expert's weights, from its rows of the tensors of `stored`."""
    gate, up = np.split(read(GATE_UP), 2)
    return {"expert_gate": gate, "expert_up": up, "expert_down": read(DOWN)}
