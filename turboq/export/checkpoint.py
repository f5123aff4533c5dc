"""Hugging Face checkpoint folders that overlays are made for: read, compared, merged."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors

from turboq.errors import TurboqError, quoted, shortened
from turboq.hub_cache import snapshot_hint
from turboq.json_object import read_object
from turboq.plan import Plan

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint.

    Raises:
      TurboqError: the folder or the file is missing, or is not JSON.
    """
    fix = f"name the folder of the Hugging Face checkpoint{snapshot_hint(folder)}"
    return read_object(folder / CONFIG, fix)


def check_config(plan: Plan, config: dict[str, Any], folder: Path) -> None:
    """Refuses a checkpoint whose geometry is not the plan's.

    Raises:
      TurboqError: one line with the fields that differ.
    """
    text = config.get("text_config", config)
    if not isinstance(text, dict):
        raise TurboqError(f"{folder}: text_config={quoted(text)} must be an object")
    layers = plan.model.layers
    first = plan.model.cache_layers[0]
    heads = text.get("num_attention_heads")
    dim = text.get("head_dim")
    hidden = text.get("hidden_size")
    if dim is None and isinstance(heads, int) and heads and isinstance(hidden, int):
        dim = hidden // heads
    pairs = {
        "model_type": (plan.model.family, config.get("model_type")),
        "num_hidden_layers": (len(layers), text.get("num_hidden_layers")),
        "num_attention_heads": (first.q_heads, heads),
        "num_key_value_heads": (first.kv_heads, text.get("num_key_value_heads", heads)),
        "head_dim": (first.k_dim, dim),
    }
    wrong = [
        f"{k}: plan {a}, checkpoint {b if isinstance(b, int) else quoted(b)}"
        for k, (a, b) in pairs.items()
        if b not in (a, None)
    ]
    if wrong:
        raise TurboqError(
            f"checkpoint {folder} does not match the plan of {plan.model.name}: {'; '.join(wrong)};"
            " export with the checkpoint that the plan was made from"
        )


def weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file of a checkpoint's weights.

    Raises:
      TurboqError: neither an index nor one model.safetensors.
    """
    if (folder / INDEX).is_file():
        return dict(_index_part(folder, "weight_map"))
    if not (folder / SINGLE).is_file():
        raise TurboqError(f"checkpoint {folder} has neither {INDEX} nor {SINGLE}")
    try:
        with safetensors.safe_open(folder / SINGLE, framework="numpy") as f:
            return dict.fromkeys(f.keys(), SINGLE)
    except safetensors.SafetensorError as error:
        raise TurboqError(
            f"{folder / SINGLE} is not a whole safetensors file: {shortened(error)}"
        ) from None


def _index_part(folder: Path, key: str) -> dict[str, Any]:
    fix = "it is damaged: download the checkpoint again"
    part = read_object(folder / INDEX, fix).get(key) or {}
    if not isinstance(part, dict):
        raise TurboqError(f"{folder / INDEX}: {key}={quoted(part)} must be an object: {fix}")
    return part


def merged_index(folder: Path, names: Iterable[str], file: str, nbytes: int) -> dict[str, Any]:
    """The checkpoint's index with tensors of one more file, so that no loader passes it over."""
    weights = weight_map(folder)
    total = 0
    if (folder / INDEX).is_file():
        total = _index_part(folder, "metadata").get("total_size", 0)
        if not isinstance(total, int):
            raise TurboqError(f"{folder / INDEX}: total_size={quoted(total)} must be a number")
    else:
        total = (folder / SINGLE).stat().st_size
    return {
        "metadata": {"total_size": total + nbytes},
        "weight_map": weights | dict.fromkeys(names, file),
    }


def merged_config(
    config: dict[str, Any], scheme: dict[str, Any], base: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """The checkpoint's config with a `kv_cache_scheme`, kept beside a quantization of its weights.

    Raises:
      TurboqError: its weights are quantized by another method, which has no place for the scheme.
    """
    present = config.get("quantization_config")
    if present is None:
        return config | {"quantization_config": base | {"kv_cache_scheme": scheme}}
    method = present.get("quant_method") if isinstance(present, dict) else None
    if method != base["quant_method"]:
        raise TurboqError(
            f"checkpoint {folder} is quantized by {quoted(method)}, and one checkpoint has one"
            f" quantization_config: take one that is not, or by {base['quant_method']}"
        )
    merged = {"config_groups": {}} | present | {"kv_cache_scheme": scheme}
    return config | {"quantization_config": merged}
