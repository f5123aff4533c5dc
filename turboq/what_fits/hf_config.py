"""KV-cache geometry from a Hugging Face `config.json`, for many more families than are run here.

Only what decides the cache is read: layers, KV heads, head dims, layer kinds, windows. Defaults are
those of transformers' configuration classes. A field whose name speaks of the cache and that is
not understood is an error that names it: a wrong count would be worse.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from turboq.errors import TurboqError, quoted, shortened
from turboq.what_fits.layers import (
    MAX_DIM,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_TOKENS,
    CacheGeometry,
    CacheLayer,
)

BY_HAND = "name --geometry=LAYERSxKVHEADSxDIM"  # the way out for any model
NESTED = ("text_config", "language_config", "llm_config", "thinker_config")
# Values that transformers assumes where a file leaves a field out (None: no window).
_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768}
_GEMMA = {
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096,
}  # fmt: skip
_QWEN35 = {"num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 32768}
_QWEN35_MOE = _QWEN35 | {"num_key_value_heads": 2}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {
        "num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072,
    },
    "mixtral": {"num_key_value_heads": 8, "max_position_embeddings": 131072},
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
    "qwen3_next": _QWEN35_MOE,
    "qwen3_5_text": _QWEN35,
    "qwen3_5_moe_text": _QWEN35_MOE,
    "gemma2": _GEMMA | {"num_hidden_layers": 26, "max_position_embeddings": 8192},
    "gemma3_text": _GEMMA | {"num_hidden_layers": 26, "max_position_embeddings": 131072},
    "gemma3n_text": _GEMMA | {
        "num_hidden_layers": 35, "num_key_value_heads": 2, "sliding_window": 512,
        "max_position_embeddings": 32768, "num_kv_shared_layers": 15,
    },
    "gemma4_text": _GEMMA | {
        "num_hidden_layers": 30, "sliding_window": 512, "max_position_embeddings": 131072,
        "global_head_dim": 512,
    },
    "gpt_oss": {
        "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128,
        "max_position_embeddings": 131072,
    },
    "cohere2": {"sliding_window": 4096, "max_position_embeddings": 8192},
    "deepseek_v3": {"max_position_embeddings": 4096},
    "deepseek_v2": {"max_position_embeddings": 2048},
    "llama4_text": {
        "num_key_value_heads": 8, "head_dim": 128, "attention_chunk_size": 8192,
        "max_position_embeddings": 131072,
    },
}  # fmt: skip
RENAMED = {"gemma3": "gemma3_text", "gemma4": "gemma4_text", "qwen3_5": "qwen3_5_text"}
# Where layer_types is left out: every n-th layer is full, the others slide.
EVERY_NTH_FULL = {
    "gemma2": 2, "gemma3_text": 6, "gemma3n_text": 5, "gemma4_text": 6, "gpt_oss": 2, "cohere2": 4,
}  # fmt: skip
ALL_SLIDING = ("mistral", "mixtral", "phi3", "starcoder2")
SWITCHED = ("qwen2", "qwen3")  # slide only with use_sliding_window, from max_window_layers on
LATENT = ("deepseek_v2", "deepseek_v3", "kimi_k2")
INTERVAL = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")

TYPES = {
    "full_attention": "full", "attention": "full", "sliding_attention": "sliding",
    "chunked_attention": "chunked", "linear_attention": "none", "mamba": "none",
    "mamba2": "none", "conv": "none", "recurrent": "none", "moe": "none", "mlp": "none",
}  # fmt: skip
# Names that may speak of the cache. What is not in `READ` or `HARMLESS` is refused by name.
SUSPICIOUS = re.compile(
    r"kv|key_value|head|window|layer_type|layers_block|lora_rank|latent|chunk|shared|cache|swa|sink"
    r"|index_|pattern|compress|memory|multi_query|encoder_decoder|cross_attention|per_layer_config"
    r"|hybrid|attn_layer"
)
READ = {
    "num_attention_heads", "n_head", "num_key_value_heads", "num_kv_heads", "head_dim",
    "sliding_window", "use_sliding_window", "max_window_layers", "layer_types",
    "sliding_window_pattern", "_sliding_window_pattern", "attention_chunk_size",
    "kv_lora_rank", "qk_rope_head_dim", "num_kv_shared_layers", "global_head_dim",
    "num_global_key_value_heads", "attention_k_eq_v", "per_layer_config",
    "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim",
    "linear_value_head_dim", "layers_block_type", "hybrid_override_pattern",
    "attn_layer_period", "attn_layer_offset", "n_heads", "multi_query",
}  # fmt: skip
HARMLESS = {
    # Of the latent kind only the latent and its rotary part are stored.
    "q_lora_rank", "qk_nope_head_dim", "qk_head_dim", "v_head_dim", "rope_head_dim",
    "use_cache", "cache_implementation", "chunk_size_feed_forward", "n_shared_experts",
    "num_shared_experts", "num_shared_expert", "shared_expert_intermediate_size",
    "shared_intermediate_size", "moe_shared_expert_intermediate_size", "pruned_heads",
    "moe_intermediate_size", "mlp_layer_types", "lm_head_bias", "classifier_head",
    "vision_head_dim", "query_pre_attn_scalar", "attention_head_type", "use_head_bias",
    "mamba_num_heads", "mamba_head_dim", "mamba_chunk_size", "mamba_n_heads", "mamba_d_head",
    "n_groups", "chunk_size", "tie_lm_head", "initial_context_length", "conv_L_cache",
    "activation_sparsity_pattern",
}  # fmt: skip


def from_config(config: Mapping[str, Any], name: str, *, source: str = "") -> CacheGeometry:
    """The cache geometry that a parsed `config.json` describes.

    Raises:
      TurboqError: a missing, nonsensical, huge or not understood field, each by name and value.
    """
    config = _text_part(config)
    given = config.get("model_type")
    if not isinstance(given, str) or not given:
        raise TurboqError(f"{name}: config.json has no model_type (a string)")
    family = RENAMED.get(given, given)
    read = Fields({**DEFAULTS.get(family, {}), **_not_none(config, family)}, f"{name}: config.json")
    read.refuse_unknown()
    count = read.integer("num_hidden_layers", "n_layer", "num_layers", "n_layers", high=MAX_LAYERS)
    if config.get("kv_lora_rank") is not None:
        layers = _latent(read, family, count)
        note = "the latent cache of vLLM, SGLang and llama.cpp; transformers stores K and V whole"
    else:
        layers, note = _heads(read, family, count)
    context = read.optional(
        "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", high=MAX_TOKENS
    )
    try:
        return CacheGeometry(
            name=name, family=given, layers=tuple(layers), context=context, source=source, note=note
        )
    except ValueError as error:
        raise TurboqError(f"{name}: {error}") from None


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a multimodal configuration."""
    for _ in range(3):
        nested = next((config[k] for k in NESTED if isinstance(config.get(k), Mapping)), None)
        if nested is None or "num_hidden_layers" in config:
            break
        kind = str(config.get("model_type", ""))
        config = {"model_type": kind if kind.endswith("_text") else f"{kind}_text", **nested}
        if config["model_type"] == f"{kind}_text" and config["model_type"] not in DEFAULTS:
            config["model_type"] = kind
    return config


def _not_none(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Fields with a value; a null window is kept, as it switches a default window off."""
    nulls = {"sliding_window"} if "sliding_window" in DEFAULTS.get(family, {}) else set()
    return {k: v for k, v in config.items() if v is not None or k in nulls}


class Fields:
    """Typed access; errors name the field and the value."""

    def __init__(self, config: Mapping[str, Any], where: str):
        self.config, self.where = config, where

    def fail(self, key: str, why: str) -> TurboqError:
        return TurboqError(f"{self.where}: {shortened(key)}={quoted(self.config.get(key))} {why}")

    def optional(self, *keys: str, high: int) -> int | None:
        key = next((k for k in keys if self.config.get(k) is not None), None)
        return None if key is None else self.number(key, self.config[key], high)

    def integer(self, *keys: str, high: int, default: int | None = None) -> int:
        found = self.optional(*keys, high=high)
        if found is None and default is None:
            raise TurboqError(f"{self.where}: {keys[0]} is missing")
        return default if found is None else found  # pyright: ignore[reportReturnType]

    def number(self, key: str, value: Any, high: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
            raise self.fail(key, f"must be a whole number of 1..{high}")
        return value

    def flag(self, key: str) -> bool:
        value = self.config.get(key, False)
        if not isinstance(value, bool):
            raise self.fail(key, "must be true or false")
        return value

    def names(self, key: str, count: int) -> list[str]:
        value = self.config[key]
        if not isinstance(value, list) or len(value) != count:
            raise self.fail(key, f"must list one kind for each of the {count} layers")
        return value

    def refuse_unknown(self) -> None:
        for key, value in self.config.items():
            if not isinstance(key, str) or key in READ or key in HARMLESS or value in (None, False):
                continue
            if isinstance(value, (int, float)) and value == 0:
                continue
            if SUSPICIOUS.search(key):
                raise self.fail(
                    key,
                    "is not understood and may change the cache: remove it from a copy of the "
                    f"file if it does not, or {BY_HAND}",
                )


def _latent(read: Fields, family: str, count: int) -> list[CacheLayer]:
    if family not in LATENT:
        raise read.fail(
            "kv_lora_rank",
            f"is not understood for model_type {quoted(family)} (understood: {', '.join(LATENT)}): "
            f"{BY_HAND}",
        )
    dim = read.integer("kv_lora_rank", high=MAX_DIM // 2)
    dim += read.integer("qk_rope_head_dim", high=MAX_DIM // 2)
    return [CacheLayer(kind="latent", kv_heads=1, k_dim=dim)] * count


def _heads(read: Fields, family: str, count: int) -> tuple[list[CacheLayer], str]:
    heads = read.integer("num_attention_heads", "n_head", "n_heads", high=MAX_HEADS)
    kv_keys, note = ("num_key_value_heads", "num_kv_heads"), ""
    if read.flag("multi_query"):
        raise read.fail("multi_query", f"is not understood: {BY_HAND}, with KVHEADS 1 if all share")
    kv_heads = read.optional(*kv_keys, high=MAX_HEADS)
    if kv_heads is None:
        kv_heads = heads
        note = f"num_key_value_heads is absent: all {heads} heads are counted"
    if heads % kv_heads:
        raise read.fail(
            "num_key_value_heads", f"does not divide the {heads} of num_attention_heads"
        )
    dim = read.optional("head_dim", high=MAX_DIM)
    if dim is None:
        hidden = read.integer("hidden_size", "n_embd", "d_model", high=2**24)
        if hidden % heads:
            raise read.fail(
                "hidden_size", f"is not a multiple of the {heads} heads, and no head_dim"
            )
        dim = read.number("hidden_size", hidden // heads, MAX_DIM)
    kinds = _kinds(read, family, count)
    shared = (
        read.optional("num_kv_shared_layers", high=MAX_LAYERS)
        if (read.config.get("num_kv_shared_layers"))
        else None
    )
    if shared is not None and shared >= count:
        raise read.fail("num_kv_shared_layers", f"leaves none of the {count} layers a cache")
    layers = []
    for index, kind in enumerate(kinds):
        if index >= count - (shared or 0):
            layers.append(CacheLayer(kind="shared"))
        elif kind == "none":
            layers.append(CacheLayer(kind="none", state_bytes=_state(read, family)))
        else:
            own_heads, own_dim = _of_layer(read, index, kind, kv_heads, dim)
            layers.append(_layer(read, kind, own_heads, own_dim))
    if not any(layer.stores for layer in layers):
        raise TurboqError(f"{read.where}: no layer keeps a KV cache")
    return layers, note


def _layer(read: Fields, kind: str, heads: int, dim: int) -> CacheLayer:
    window = None
    if kind != "full":
        key = "sliding_window" if kind == "sliding" else "attention_chunk_size"
        window = read.integer(key, high=MAX_TOKENS)
    return CacheLayer(
        kind="full" if window is None else "sliding",
        kv_heads=heads, k_dim=dim, v_dim=dim, window=window,
    )  # fmt: skip


def _of_layer(read: Fields, index: int, kind: str, heads: int, dim: int) -> tuple[int, int]:
    """KV heads and head dim of one layer: Gemma 4's full layers, or `per_layer_config`."""
    own = _per_layer(read).get(index)
    if own is not None:
        fields = Fields({"head_dim": dim, "num_key_value_heads": heads, **own}, read.where)
        return (
            fields.integer("num_key_value_heads", high=MAX_HEADS),
            fields.integer("head_dim", high=MAX_DIM),
        )
    if "per_layer_config" in read.config:
        return heads, dim
    if kind == "full":
        dim = read.integer("global_head_dim", high=MAX_DIM, default=dim)
        if read.flag("attention_k_eq_v"):
            # K and V come from one projection, but are normed and rotated apart: both are stored.
            heads = read.integer("num_global_key_value_heads", high=MAX_HEADS, default=heads)
    return heads, dim


def _per_layer(read: Fields) -> dict[int, Mapping[str, Any]]:
    """`per_layer_config` by layer; transformers pads its keys with zeros ("05")."""
    given = read.config.get("per_layer_config", {})
    if not isinstance(given, Mapping):
        raise read.fail("per_layer_config", "must be an object of layers")
    out = {}
    for key, own in given.items():
        if not re.fullmatch(r"\d{1,6}", str(key)):
            raise read.fail("per_layer_config", f"has the key {quoted(key)}, which is no layer")
        if not isinstance(own, Mapping) or set(own) - {"head_dim", "num_key_value_heads"}:
            raise read.fail("per_layer_config", f"is not understood for layer {key}")
        out[int(key)] = own
    return out


def _kinds(read: Fields, family: str, count: int) -> list[str]:
    """One of full, sliding, chunked, none per layer."""
    config = read.config
    for key in ("layer_types", "layers_block_type"):
        if key in config:
            names = read.names(key, count)
            unknown = [n for n in names if not isinstance(n, str) or n not in TYPES]
            if unknown:
                raise TurboqError(
                    f"{read.where}: {key} names {quoted(unknown[0])}, which is not understood "
                    f"(understood: {', '.join(TYPES)})"
                )
            return [TYPES[n] for n in names]
    if "hybrid_override_pattern" in config:
        letters = config["hybrid_override_pattern"]
        if not isinstance(letters, str) or len(letters) != count or set(letters) - set("M*-E"):
            raise read.fail("hybrid_override_pattern", f"must be {count} of the letters M * - E")
        return ["full" if letter == "*" else "none" for letter in letters]
    if "attn_layer_period" in config:
        period = read.integer("attn_layer_period", high=MAX_LAYERS)
        offset = config.get("attn_layer_offset", 0)
        if isinstance(offset, bool) or not isinstance(offset, int) or not 0 <= offset < period:
            raise read.fail("attn_layer_offset", f"must be 0..{period - 1}")
        return ["full" if i % period == offset else "none" for i in range(count)]
    if family in INTERVAL:
        n = read.integer("full_attention_interval", high=MAX_LAYERS, default=4)
        return ["none" if (i + 1) % n else "full" for i in range(count)]
    if family == "llama4_text":
        return _llama4(read, count)
    if family in SWITCHED:
        return _switched(read, count)
    if config.get("sliding_window") is None or not read.config.get("use_sliding_window", True):
        return ["full"] * count
    if family in ALL_SLIDING:
        return ["sliding"] * count
    pattern = ("sliding_window_pattern", "_sliding_window_pattern")
    if family not in EVERY_NTH_FULL and not any(k in config for k in pattern):
        raise read.fail(
            "sliding_window", f"without layer_types is not understood for {quoted(family)}"
        )
    n = read.integer(*pattern, high=MAX_LAYERS, default=EVERY_NTH_FULL.get(family))
    kinds = ["sliding" if (i + 1) % n else "full" for i in range(count)]
    if family == "gemma4_text":
        kinds[-1] = "full"  # as its configuration class forces
    return kinds


def _switched(read: Fields, count: int) -> list[str]:
    if not read.flag("use_sliding_window") or read.config.get("sliding_window", 4096) is None:
        return ["full"] * count
    first = read.config.get("max_window_layers", 28)
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise read.fail("max_window_layers", "must be 0 or more")
    return ["full"] * min(first, count) + ["sliding"] * max(0, count - first)


def _llama4(read: Fields, count: int) -> list[str]:
    """Layers with rotary positions attend within chunks, the others to everything."""
    rotary = read.config.get("no_rope_layers") or []
    if not rotary:
        n = read.integer("no_rope_layer_interval", high=MAX_LAYERS, default=4)
        rotary = [int((i + 1) % n != 0) for i in range(count)]
    if not isinstance(rotary, list) or len(rotary) != count or set(rotary) - {0, 1}:
        raise read.fail("no_rope_layers", f"must be 0 or 1 for each of the {count} layers")
    if read.config.get("attention_chunk_size") is None:
        return ["full"] * count
    return ["chunked" if chunked else "full" for chunked in rotary]


def _state(read: Fields, family: str) -> int:
    """Bytes of a gated delta-net layer's state: float32 recurrence, 16-bit convolution tail."""
    if family not in INTERVAL:
        return 0
    keys, k_dim = "linear_num_key_heads", "linear_key_head_dim"
    values, v_dim = "linear_num_value_heads", "linear_value_head_dim"
    nk, dk = (read.integer(k, high=MAX_DIM, default=d) for k, d in ((keys, 16), (k_dim, 128)))
    nv, dv = (read.integer(k, high=MAX_DIM, default=d) for k, d in ((values, 32), (v_dim, 128)))
    tail = read.integer("linear_conv_kernel_dim", high=64, default=4) - 1
    return 4 * nv * dk * dv + 2 * tail * (2 * nk * dk + nv * dv)
