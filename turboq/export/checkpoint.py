"""Hugging Face checkpoint folders that overlays are made for: read, compared, merged."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors

from turboq.errors import TurboqError
from turboq.plan import Plan

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint.

    Raises:
      TurboqError: the folder or the file is missing, or is not JSON.
    """
    return _read_json(folder / CONFIG, "name the folder of the Hugging Face checkpoint")


def check_config(plan: Plan, config: dict[str, Any], folder: Path) -> None:
    """Refuses a checkpoint whose geometry is not the plan's.

    Raises:
      TurboqError: one line with the fields that differ.
    """
    text = config.get("text_config", config)
    layers = plan.model.layers
    first = plan.model.cache_layers[0]
    heads = text.get("num_attention_heads")
    dim = text.get("head_dim")
    if dim is None and heads and text.get("hidden_size"):
        dim = text["hidden_size"] // heads
    pairs = {
        "model_type": (plan.model.family, config.get("model_type")),
        "num_hidden_layers": (len(layers), text.get("num_hidden_layers")),
        "num_attention_heads": (first.q_heads, heads),
        "num_key_value_heads": (first.kv_heads, text.get("num_key_value_heads", heads)),
        "head_dim": (first.k_dim, dim),
    }
    wrong = [f"{k}: plan {a}, checkpoint {b}" for k, (a, b) in pairs.items() if b not in (a, None)]
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
        index = _read_json(folder / INDEX, "it is damaged: download the checkpoint again")
        return dict(index.get("weight_map", {}))
    if not (folder / SINGLE).is_file():
        raise TurboqError(f"checkpoint {folder} has neither {INDEX} nor {SINGLE}")
    try:
        with safetensors.safe_open(folder / SINGLE, framework="numpy") as f:
            return dict.fromkeys(f.keys(), SINGLE)
    except safetensors.SafetensorError as error:
        raise TurboqError(f"{folder / SINGLE} is not a whole safetensors file: {error}") from None


def merged_index(folder: Path, names: Iterable[str], file: str, nbytes: int) -> dict[str, Any]:
    """The checkpoint's index with tensors of one more file, so that no loader passes it over."""
    weights = weight_map(folder)
    total = 0
    if (folder / INDEX).is_file():
        metadata = _read_json(folder / INDEX, "").get("metadata") or {}
        total = int(metadata.get("total_size", 0))
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
    method = present.get("quant_method")
    if method != base["quant_method"]:
        raise TurboqError(
            f"checkpoint {folder} is quantized by {method!r}, and one checkpoint has one"
            f" quantization_config: take one that is not, or by {base['quant_method']}"
        )
    merged = {"config_groups": {}} | present | {"kv_cache_scheme": scheme}
    return config | {"quantization_config": merged}


def _read_json(path: Path, fix: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise TurboqError(f"{path}: {error.strerror or error}: {fix}") from None
    except ValueError as error:
        raise TurboqError(f"{path} is not JSON ({error}): {fix}") from None
    if not isinstance(value, dict):
        raise TurboqError(f"{path} must hold an object: {fix}")
    return value
