"""Calibrated FP8 scales as compressed-tensors checkpoints carry them.

    {path}.k_scale, {path}.v_scale    float32 [1] (strategy tensor) or [KV heads, 1, 1] (attn_head)
    x_q = e4m3(x / scale)

`config_groups` must be present, even empty, or vLLM does not load scales per head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from turboq.errors import TurboqError
from turboq.export import checkpoint as checkpoints
from turboq.export import vllm_rules
from turboq.export.base import Entry, Held, Place, json_file
from turboq.export.static import scale_of
from turboq.plan import Plan
from turboq.plan.tensors import write_bytes

FILE = "kv_scales.safetensors"
BASE = {
    "quant_method": "compressed-tensors",
    "format": "dense",
    "quantization_status": "frozen",
    "config_groups": {},
    "ignore": [],
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overlay:
    strategy: str
    files: dict[str, bytes]
    notes: tuple[str, ...]


def scheme(strategy: str) -> dict:
    """The `kv_cache_scheme` of static e4m3 scales."""
    out = {"num_bits": 8, "type": "float", "strategy": strategy, "dynamic": False}
    out["symmetric"] = True
    refused = vllm_rules.why_refused(out)
    if refused:
        raise TurboqError(f"vLLM would refuse this kv_cache_scheme: {refused}")
    return out


def tensors(plan: Plan, held: dict[Place, Held], skipped: set[int]) -> dict[str, np.ndarray]:
    """Scales of every layer that is not skipped, [KV heads] each."""
    out = {}
    for layer in plan.layers:
        if layer.index in skipped:
            continue
        heads = range(plan.model.layers[layer.index].kv_heads)
        for side in ("k", "v"):
            values = [scale_of(held[layer.index, side, head]) for head in heads]
            out[f"{layer.path}.{side}_scale"] = np.array(values, np.float32)
    return out


def shaped(scales: dict[str, np.ndarray]) -> tuple[str, dict[str, np.ndarray]]:
    """(strategy, tensors): per tensor where the heads of every layer agree, else per head."""
    if all(np.all(values == values[0]) for values in scales.values()):
        return "tensor", {name: values[:1] for name, values in scales.items()}
    return "attn_head", {name: values[:, None, None] for name, values in scales.items()}


def overlay(
    plan: Plan,
    found: Sequence[Entry],
    held: dict[Place, Held],
    skipped: set[int],
    checkpoint: Path | None,
    strategies: tuple[str, ...] = vllm_rules.STRATEGIES,
) -> Overlay:
    """The files to lay over a checkpoint folder.

    Raises:
      TurboqError: the checkpoint is quantized by another method, or has no weights.
    """
    strategy, content = shaped(tensors(plan, held, skipped))
    assert strategy in strategies
    raw = write_bytes(content)
    files = {FILE: raw}
    base = BASE | {"kv_cache_scheme": scheme(strategy)}
    notes = [
        "Queries are quantized with q_scale = 1, which the plan has no calibration for."
        if strategy == "attn_head"
        else "One scale per layer and side.",
    ]
    if checkpoint is None:
        files["quantization_config.json"] = json_file(base)
        notes.append(
            f"Copy {FILE} into the checkpoint folder, put quantization_config.json into its"
            " config.json as `quantization_config`, and list the tensors in its"
            f" {checkpoints.INDEX} if it has one; --checkpoint=FOLDER does the merging."
        )
        return Overlay(strategy=strategy, files=files, notes=tuple(notes))
    config = checkpoints.read_config(checkpoint)
    merged = checkpoints.merged_config(config, base["kv_cache_scheme"], BASE, checkpoint)
    size = sum(values.nbytes for values in content.values())
    index = checkpoints.merged_index(checkpoint, content, FILE, size)
    files[checkpoints.CONFIG] = json_file(merged)
    files[checkpoints.INDEX] = json_file(index)
    notes.append("Copy the checkpoint folder, then these files over the copy, and serve that.")
    return Overlay(strategy=strategy, files=files, notes=tuple(notes))
