"""The Python module that the transformers exporter writes."""

from __future__ import annotations

from turboq.codecs.kivi import KiviKey
from turboq.export.base import Held, Place
from turboq.export.static import scale_of
from turboq.plan import Plan

FILE = "turboq_cache.py"

_HEAD = '''"""KV cache of {model}, written by turboq from plan {hash}.

    model.generate(**inputs, past_key_values=make_cache())

Needs transformers >= 5.23, and optimum-quanto >= 0.2.5 for quantized layers.
"""

try:
    import torch
    from transformers.cache_utils import (
        BaseQuantizedLayer,
        Cache,
        DynamicLayer,
        DynamicSlidingWindowLayer,
        Fp8QuantizedLayer,
        QuantoQuantizedLayer,
    )
except ImportError as error:
    raise ImportError(f"{{error}}: pip install 'turboq[transformers]'") from None

RESIDUAL = {residual}  # newest tokens that wait unquantized, at most


class PlannedQuanto(QuantoQuantizedLayer):
    """K and V with bits, axis and group of their own.

    Axis -1 groups tokens of one channel; tokens are padded to whole groups, so that no group holds
    tokens of two heads.
    """

    def __init__(self, k, v):
        super().__init__(nbits=k[0], residual_length=RESIDUAL)
        self.axis_key, self.axis_value = k, v

    def _quantize(self, tensor, axis):
        from optimum.quanto import qint2, qint4

        bits, axis, self.q_group_size = axis
        self.qtype = {{2: qint2, 4: qint4}}[bits]
        tokens = tensor.shape[-2]
        if axis == -1 and tokens % self.q_group_size:
            missing = -tokens % self.q_group_size
            tail = tensor[..., -1:, :].expand(*tensor.shape[:-2], missing, tensor.shape[-1])
            tensor = torch.cat([tensor, tail], dim=-2)
        return super()._quantize(tensor.contiguous(), axis), tokens

    def _dequantize(self, qtensor):
        quantized, tokens = qtensor
        return quantized.dequantize()[..., :tokens, :]


class PlannedFp8(Fp8QuantizedLayer):
    """e4m3 with the plan's scale of every KV head; larger values saturate."""

    def __init__(self, k, v):
        super().__init__()
        self.scales = [torch.tensor(s, dtype=torch.float32).view(1, -1, 1, 1) for s in (k, v)]

    def lazy_initialization(self, key_states, value_states):
        BaseQuantizedLayer.lazy_initialization(self, key_states, value_states)
        k, v = (scale.to(key_states.device) for scale in self.scales)
        self._quantized_keys = self._quantize(key_states, scale=k)
        self._quantized_values = self._quantize(value_states, scale=v)

    def _quantize(self, tensor, scale=None):
        scaled = (tensor.float() / scale).clamp(-self.fp8_max, self.fp8_max)
        return scaled.to(self.fp8_dtype), scale


def make_cache():
    """One cache layer per decoder layer."""
    return Cache(
        layers=[
'''


def render(plan: Plan, held: dict[Place, Held], residual: int) -> str:
    """Source of the module."""
    from turboq.plan.document import fingerprint

    indices = [layer.index for layer in plan.layers]
    lines = [f"            {_layer(plan, i, held)},  # {i}\n" for i in indices]
    head = _HEAD.format(model=plan.model.name, hash=fingerprint(plan), residual=residual)
    return head + "".join(lines) + "        ]\n    )\n"


def _layer(plan: Plan, index: int, held: dict[Place, Held]) -> str:
    geometry = plan.model.layers[index]
    first = {side: held[index, side, 0] for side in ("k", "v")}
    if first["k"].format.startswith("quanto"):
        k, v = (_setting(first[side]) for side in ("k", "v"))
        return f"PlannedQuanto({k}, {v})"
    if first["k"].format == "fp8_e4m3":
        if first["k"].codec is None or first["v"].codec is None:
            return "Fp8QuantizedLayer()"
        scales = [
            [scale_of(held[index, side, head]) for head in range(geometry.kv_heads)]
            for side in ("k", "v")
        ]
        return f"PlannedFp8({scales[0]}, {scales[1]})"
    if geometry.window is not None:
        return f"DynamicSlidingWindowLayer(sliding_window={geometry.window})"
    return "DynamicLayer()"


def _setting(held: Held) -> str:
    """(bits, axis, group) of one side."""
    assert held.codec is not None
    config = held.codec.config()
    axis = -1 if isinstance(held.codec, KiviKey) else 0
    return f"({config['bits']}, {axis}, {config['group']})"
