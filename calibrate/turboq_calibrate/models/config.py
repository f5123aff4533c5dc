"""Hugging Face `config.json` to `ModelSpec`.

Anything that would change the result and that the decoder does not do is refused by name. Defaults
are those of transformers' configuration classes; key names are those of v5 (`rope_parameters`) and
of v4 (`rope_theta`, `rope_scaling`).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from turboq.errors import TurboqError, quoted
from turboq.hub_cache import snapshot_hint
from turboq.json_object import read_object
from turboq.numbers.rope import Rope, Scaling
from turboq_calibrate.models.spec import LayerSpec, ModelSpec

MAX_LAYERS = 10_000
LARGEST = 2**48
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# Fields of other model types that a family's own code never reads but whose presence says that the
# weights were trained with them.
REFUSED = (
    "auto_map",
    "rope_interleaved",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_scale",
    "attention_multiplier",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "clip_qkv",
    "no_rope_layers",
    "num_experts",
    "num_local_experts",
)


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object of a `config.json`.

    Raises:
      TurboqError: absent, unreadable, or not a JSON object.
    """
    if not path.is_file():
        raise TurboqError(
            f"{path.parent} has no config.json: not a Hugging Face model"
            f"{snapshot_hint(path.parent)}"
        )
    return read_object(path)


def model_spec(config: dict[str, Any], name: str) -> ModelSpec:
    """The geometry that a configuration describes.

    Args:
      config: the parsed `config.json`.
      name: what to call the model, also in errors.

    Raises:
      TurboqError: unsupported family or field, a missing or a nonsensical value.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise TurboqError(
            f"{name}: model_type {quoted(family)} is not supported (supported: "
            f"{', '.join(FAMILIES)})"
        )
    read = _Reader(config, f"{name}: config.json of model_type {quoted(family)}")
    for key in REFUSED:
        value = config.get(key)
        # A multiplier of 1 does nothing; `True` equals 1 but switches something on.
        if value and not (value == 1 and value is not True):
            raise TurboqError(f"{read.where}: {key}={quoted(config[key])} is not supported")
    _check_unquantized(read)
    act = config.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise TurboqError(
            f"{read.where}: hidden_act={quoted(act)} is not supported (supported: silu)"
        )
    hidden = read.integer("hidden_size")
    heads = read.integer("num_attention_heads")
    count = read.integer("num_hidden_layers")
    if count > MAX_LAYERS:
        raise TurboqError(f"{read.where}: num_hidden_layers={count} is above {MAX_LAYERS}")
    kv_heads = read.integer("num_key_value_heads", _default_kv_heads(family, heads))
    if heads % kv_heads:
        raise TurboqError(
            f"{read.where}: num_attention_heads={heads} must be a multiple of "
            f"num_key_value_heads={kv_heads}"
        )
    head_dim = _head_dim(read, family, hidden, heads)
    context = read.integer("max_position_embeddings", CONTEXT[family])
    eps = read.number("rms_norm_eps", 1e-6)
    windows = _windows(read, family, count)
    rope = _rope(read, head_dim, context)
    layers = tuple(
        LayerSpec(
            hidden=hidden,
            intermediate=read.integer("intermediate_size"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            v_head_dim=head_dim,
            norm_eps=eps,
            rope=rope,
            qk_norm=family == "qwen3",
            window=window,
            **_biases(read, family),
        )
        for window in windows
    )
    return ModelSpec(
        family=family,
        name=name,
        vocab=read.integer("vocab_size"),
        hidden=hidden,
        context=context,
        norm_eps=eps,
        tied_embeddings=read.boolean("tie_word_embeddings", False),
        layers=layers,
    )


def _check_unquantized(read: _Reader) -> None:
    """Refuses quantized weights; what says nothing of weights, as a cache's scales, may stand."""
    settings = read.config.get("quantization_config")
    if not settings or keeps_weights(settings):
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    raise TurboqError(
        f"{read.where}: quantization_config says that the weights are quantized (quant_method "
        f"{quoted(method)}), which is not supported: give the checkpoint that they were made from, "
        "or a GGUF file"
    )


def keeps_weights(settings: Any) -> bool:
    """Whether a `quantization_config` is an overlay for the cache alone, as we export for vLLM."""
    return (
        isinstance(settings, dict)
        and settings.get("quant_method") == "compressed-tensors"
        and settings.get("config_groups") == {}
        and isinstance(settings.get("kv_cache_scheme"), dict)
    )


CONTEXT = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}


class _Reader:
    """Typed access to a configuration; errors name the field and the value."""

    def __init__(self, config: dict[str, Any], where: str):
        self.config, self.where = config, where

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key)
        if value is None:
            if default is None:
                raise TurboqError(f"{self.where}: {key} is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < LARGEST:
            raise TurboqError(
                f"{self.where}: {key}={quoted(value)} must be a positive whole number below 2^48"
            )
        return value

    def number(self, key: str, default: float) -> float:
        return positive(self.config.get(key, default), key, self.where)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.config.get(key, default)
        if not isinstance(value, bool):
            raise TurboqError(f"{self.where}: {key}={quoted(value)} must be true or false")
        return value


def positive(value: Any, key: str, where: str) -> float:
    """`value` as a positive finite float, or a TurboqError naming `key`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= sys.float_info.max:
        raise TurboqError(f"{where}: {key}={quoted(value)} must be a positive number")
    return float(value)


def _default_kv_heads(family: str, heads: int) -> int:
    return {"llama": heads, "mistral": 8, "qwen2": 32, "qwen3": 32}[family]


def _head_dim(read: _Reader, family: str, hidden: int, heads: int) -> int:
    if family == "qwen3":
        return read.integer("head_dim", 128)
    if read.config.get("head_dim") is None and hidden % heads:
        raise TurboqError(
            f"{read.where}: hidden_size={hidden} is not a multiple of num_attention_heads={heads} "
            "and head_dim is not given"
        )
    return read.integer("head_dim", hidden // heads)


def _biases(read: _Reader, family: str) -> dict[str, bool]:
    """Which projections have a bias: Qwen2 always q, k, v; Llama and Qwen3 by `attention_bias`."""
    attention = read.boolean("attention_bias", False)
    mlp = read.boolean("mlp_bias", False)
    if attention and family not in ("llama", "qwen3"):
        raise TurboqError(f"{read.where}: attention_bias=True is not supported")
    if mlp and family != "llama":
        raise TurboqError(f"{read.where}: mlp_bias=True is not supported")
    return {"qkv_bias": attention or family == "qwen2", "o_bias": attention, "mlp_bias": mlp}


def _windows(read: _Reader, family: str, count: int) -> list[int | None]:
    """The sliding window of every layer, None where attention is full."""
    config = read.config
    if family == "llama":
        if config.get("sliding_window") is not None or config.get("layer_types"):
            raise TurboqError(f"{read.where}: sliding_window and layer_types are not supported")
        return [None] * count
    if family == "mistral":
        if config.get("layer_types"):
            raise TurboqError(f"{read.where}: layer_types is not supported")
        if config.get("sliding_window", 4096) is None:
            return [None] * count
        return [read.integer("sliding_window", 4096)] * count
    window = None
    if read.boolean("use_sliding_window", False) and config.get("sliding_window", 4096) is not None:
        window = read.integer("sliding_window", 4096)
    types = config.get("layer_types")
    if types is None:
        first = config.get("max_window_layers", 28)
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise TurboqError(f"{read.where}: max_window_layers={quoted(first)} must be 0 or more")
        types = ["full_attention"] * min(first, count)
        types += ["sliding_attention"] * (count - len(types))
        if window is None:
            types = ["full_attention"] * count
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != count or any(t not in known for t in types):
        raise TurboqError(
            f"{read.where}: layer_types must name one of {', '.join(known)} for each of the "
            f"{count} layers"
        )
    if window is None and "sliding_attention" in types:
        raise TurboqError(
            f"{read.where}: layer_types names sliding_attention but use_sliding_window is off"
        )
    return [window if t == "sliding_attention" else None for t in types]


def _rope(read: _Reader, head_dim: int, context: int) -> Rope:
    """The rotary embedding; where v4's and v5's names both describe it, they must agree."""
    if head_dim % 2:
        raise TurboqError(f"{read.where}: head_dim={head_dim} must be even for rotary embedding")
    names = [k for k in ("rope_parameters", "rope_scaling") if read.config.get(k) not in (None, {})]
    found = {name: _rope_of(read, read.config[name], head_dim, context) for name in names}
    if len(set(found.values())) > 1:
        said = " but ".join(f"{name}={quoted(read.config[name])}" for name in names)
        raise TurboqError(f"{read.where}: {said}: leave one of them out of a copy of the file")
    return found[names[0]] if names else _rope_of(read, {}, head_dim, context)


def _rope_of(read: _Reader, fields: Any, head_dim: int, context: int) -> Rope:
    if not isinstance(fields, dict) or any(isinstance(v, dict) for v in fields.values()):
        raise TurboqError(f"{read.where}: rope parameters {quoted(fields)} are not supported")
    partial = _said_once(read, fields, "partial_rotary_factor")
    if partial not in (None, 1, 1.0):
        raise TurboqError(f"{read.where}: partial_rotary_factor={quoted(partial)} is not supported")
    theta = _said_once(read, fields, "rope_theta")
    theta = 10000.0 if theta is None else positive(theta, "rope_theta", read.where)

    def need(key: str, default: Any = None) -> float:
        return positive(fields.get(key, default), f"rope {key}", read.where)

    kind = _rope_type(read, fields)
    match kind:
        case "default":
            scaling = None
        case "linear":
            scaling = Scaling(type="linear", factor=need("factor"))
        case "llama3":
            low, high = need("low_freq_factor"), need("high_freq_factor")
            if low >= high:
                raise TurboqError(f"{read.where}: rope {low=} must be below {high=}")
            original = need("original_max_position_embeddings", context)
            scaling = Scaling(
                type="llama3", factor=need("factor"), low_freq_factor=low, high_freq_factor=high,
                original_context=original,
            )  # fmt: skip
        case _:
            raise TurboqError(
                f"{read.where}: rope type {quoted(kind)} is not supported (supported: default, "
                "linear, llama3)"
            )
    return Rope(theta=theta, dim=head_dim, scaling=scaling)


def _said_once(read: _Reader, fields: dict[str, Any], key: str) -> Any:
    """A field of v5's `rope_parameters` that v4 has beside it; None where neither says it."""
    inside, beside = fields.get(key), read.config.get(key)
    if None not in (inside, beside) and inside != beside:
        raise TurboqError(
            f"{read.where}: {key}={quoted(beside)} but {quoted(inside)} among the rope parameters: "
            "leave one of them out of a copy of the file"
        )
    return beside if inside is None else inside


def _rope_type(read: _Reader, fields: dict[str, Any]) -> Any:
    kinds = [fields[key] for key in ("rope_type", "type") if fields.get(key) is not None]
    if kinds[1:] and kinds[0] != kinds[1]:
        raise TurboqError(f"{read.where}: {quoted(fields)} names two rope types: name one")
    if not kinds and fields.get("factor") is not None:
        raise TurboqError(f"{read.where}: {quoted(fields)} names no rope type: add rope_type")
    return kinds[0] if kinds else "default"
