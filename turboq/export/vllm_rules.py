"""vLLM's own rules, restated: which dtypes exist, what they store, and what it accepts to load.

Read in vLLM 0.33.0: `config/cache.py`, `compressed_tensors.py::validate_kv_cache_scheme`,
`weight_utils.py` and `TurboQuantConfig.get_boundary_skip_layers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from turboq.codecs.base import Codec
from turboq.codecs.fp8 import FP8
from turboq.codecs.int_token_head import Int4TokenHead, Int8TokenHead
from turboq.codecs.vllm_turboquant import PRESETS, boundary_layers, preset
from turboq.plan import ModelGeometry

PLAIN = ("fp8_e4m3", "fp8_e5m2")
PER_TOKEN_HEAD = ("int8_per_token_head", "fp8_per_token_head", "int4_per_token_head")
TURBOQUANT = tuple(PRESETS)
STRATEGIES = ("tensor", "attn_head")


def pair(dtype: str, k_dim: int, v_dim: int) -> tuple[Codec, Codec] | None:
    """(K, V) codecs of a --kv-cache-dtype that needs no scales; None at head dims it refuses."""
    if dtype in PLAIN:
        return tuple(
            FP8(dim=d, format=dtype.removeprefix("fp8_"), scale="none") for d in (k_dim, v_dim)
        )  # pyright: ignore[reportReturnType]
    if dtype == "fp8_per_token_head":
        return FP8(dim=k_dim), FP8(dim=v_dim)
    if dtype == "int8_per_token_head":
        return Int8TokenHead(dim=k_dim), Int8TokenHead(dim=v_dim)
    if dtype == "int4_per_token_head":
        if not (_power_of_two(k_dim) and _power_of_two(v_dim)):
            return None
        return Int4TokenHead(dim=k_dim), Int4TokenHead(dim=v_dim)
    if dtype in TURBOQUANT:
        if k_dim != v_dim or not _power_of_two(k_dim):
            return None
        return preset(dtype, k_dim)
    raise ValueError(f"{dtype=} must be one of {(*PLAIN, *PER_TOKEN_HEAD, *TURBOQUANT)}")


def forced_skips(model: ModelGeometry, dtype: str) -> set[int]:
    """Layers that vLLM itself leaves in the model's type: first and last two, on dense models."""
    if dtype not in TURBOQUANT or not is_dense(model):
        return set()
    return set(boundary_layers(len(model.layers)))


def is_dense(model: ModelGeometry) -> bool:
    """Every layer has attention (windows included): no recurrent layers between."""
    return all(layer.kv_heads > 0 for layer in model.layers)


def why_refused(scheme: Mapping[str, Any]) -> str:
    """Why `validate_kv_cache_scheme` raises NotImplementedError for a scheme; empty if it loads."""
    due = {"num_bits": 8, "type": "float"}
    for name, value in due.items():
        if scheme.get(name) != value:
            return f"{name}={scheme.get(name)!r} must be {value!r}"
    if scheme.get("strategy") not in STRATEGIES:
        return f"strategy={scheme.get('strategy')!r} must be one of {STRATEGIES}"
    if not scheme.get("symmetric", True):
        return "symmetric must be true"
    return ""


def _power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0
