"""Hugging Face `config.json` to `ModelSpec`.

Anything that would change the result and that the decoder does not do is refused by name. Key names
are those of v5 (`rope_parameters`) and of v4 (`rope_theta`, `rope_scaling`).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from turboq.errors import TurboqError, quoted
from turboq.hub_cache import snapshot_hint
from turboq.json_object import read_object
from turboq.what_fits import from_config
from turboq_calibrate.models import cache_check, config_gemma4, hf_fp8
from turboq_calibrate.models.config_experts import read_experts
from turboq_calibrate.models.config_fields import OTHER_WEIGHTS, Reader, contradiction, nearest
from turboq_calibrate.models.config_latent import ROTATED, latent_fields, rotation_of
from turboq_calibrate.models.config_rope import Turn, query_growth, read_ropes
from turboq_calibrate.models.families import (
    FAMILIES,
    OTHERWISE_READ,
    UNREAD_INSIDE,
    WRAPPERS,
    Family,
)
from turboq_calibrate.models.primitives import SWIGLU_ALPHA, SWIGLU_LIMIT
from turboq_calibrate.models.spec import DeltaNet, LayerSpec, Mamba, ModelSpec

_QUANTIZED = "quantization_config"
MAX_LAYERS = 10_000
OTHER_FORM = ", or read it with --long_context (long_context=True)"
ONE_FORM = "long_context is for longrope alone, this model has one form: leave it out"
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
EMBEDDING_FACTOR = "embedding_multiplier"
FACTORS = ("logit_scale", EMBEDDING_FACTOR, "residual_multiplier", "logits_scaling")
_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads")
NEUTRAL_AT_1 = (*FACTORS, "attention_value_scale")
# Fields that a family's own code never reads but whose presence says that the weights were trained
# with them. What changes the cache is not here: the planner's reader knows it (`cache_check`).
REFUSED = frozenset(
    {
        "auto_map", "rope_interleaved", "rope_local_base_freq", "use_bidirectional_attention",
        "sliding_window_pattern", "_sliding_window_pattern", "attention_chunk_size", "clip_qkv",
        "no_rope_layers", "no_rope_layer_interval", "num_experts", "num_local_experts",
        "n_routed_experts", "kv_lora_rank", "num_kv_shared_layers",
    }
)  # fmt: skip
# So are factors and caps of what a layer computes, whatever they are called.
_FACTOR = frozenset(
    {"scale", "scales", "scaling", "scalar", "multiplier", "cap", "softcap", "softcapping"}
)
_TRAINING = frozenset({"init", "initializer", "loss"})
NO_FACTORS = frozenset({"rope_scaling", "ffn_dim_multiplier"})  # read apart; a width


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


def model_spec(config: dict[str, Any], name: str, *, long_context: bool = False) -> ModelSpec:
    """The geometry that a configuration describes.

    Args:
      config: the parsed `config.json`.
      name: what to call the model, also in errors.
      long_context: longrope in its form for sequences longer than the original context.

    Raises:
      TurboqError: unsupported family or field, a missing or a nonsensical value; `long_context` of
        a model that rotates long sequences as short ones.
    """
    whole, inside = config, config.get("model_type") in tuple(WRAPPERS)
    config = _decoder_part(config, name) if inside else config
    family = config.get("model_type")
    row = FAMILIES.get(family) if isinstance(family, str) else None
    if isinstance(family, str) and family in OTHERWISE_READ:
        raise TurboqError(
            f"{name}: model_type {quoted(family)} is not supported: {OTHERWISE_READ[family]} "
            "(`turboq memory` counts its cache)"
        )
    if row is None:
        near = nearest(family, [*FAMILIES, *WRAPPERS])
        raise TurboqError(
            f"{name}: model_type {quoted(family)} is not supported ({near}; `turboq "
            "memory` counts its cache, and `turboq calibrate --captured` plans it if transformers "
            "runs it)"
        )
    where = f"{name}: config.json of model_type {quoted(family)}"
    read = Reader({**row.defaults, **config}, where)
    reads = row.reads - UNREAD_INSIDE.get(whole["model_type"], frozenset()) if inside else row.reads
    for key, value in config.items():
        neutral = not value or (key in NEUTRAL_AT_1 and value == 1 and value is not True)
        if not neutral and key not in reads and (key in REFUSED or _is_factor(key)):
            raise TurboqError(f"{where}: {key}={quoted(value)} is not supported")
    _check_unquantized(read, row)
    hidden, context = read.integer("hidden_size"), read.integer("max_position_embeddings")
    rotation = rotation_of(read, row.rotation) if row.latent else row.rotation
    rotation = dataclasses.replace(rotation, long=long_context)
    windows = row.windows(read, _count(read))
    full_dim = None
    if row.by_layer:
        full_dim = config_gemma4.full_head_dim(read, [window is None for window in windows])
    ropes = read_ropes(read, _head_dim(read, row), context, rotation, full_dim)
    if long_context and ropes[0].forms == 1:
        raise TurboqError(f"{where}: {ONE_FORM}")
    layers = _layers(read, row, ropes, windows)
    spec = ModelSpec(
        family=str(family),
        name=name,
        vocab=read.integer("vocab_size"),
        hidden=hidden,
        context=context if ropes[0].context is None else min(context, ropes[0].context),
        norm_eps=read.number(row.eps, 1e-6),
        norm=row.norm,
        tied_embeddings=read.boolean("tie_word_embeddings", False),
        layers=layers,
        embed_scale=hidden**0.5 if row.scaled_embedding else _factor(read, row, EMBEDDING_FACTOR),
        norm_offset=row.norm_offset,
        logit_scale=_factor(read, row, "logit_scale") / _factor(read, row, "logits_scaling"),
        logit_softcap=read.optional("final_logit_softcapping"),
        shared=config_gemma4.shared_channels(layers),
        own_input=layers[0].own_input,
        longer=OTHER_FORM if ropes[0].forms == 2 and not long_context else "",
    )
    sizes = {} if inside else {k: v for k, v in row.defaults.items() if k in _SIZES}
    return cache_check.check(spec, lambda: from_config({**sizes, **whole}, name))


def _is_factor(key: str) -> bool:
    words = set(key.lower().split("_"))
    return bool(words & _FACTOR) and not words & _TRAINING and key not in NO_FACTORS


def _count(read: Reader) -> int:
    count = read.integer("num_hidden_layers")
    if count > MAX_LAYERS:
        raise TurboqError(f"{read.where}: num_hidden_layers={count} is above {MAX_LAYERS}")
    return count


def _layers(
    read: Reader, row: Family, ropes: tuple[Turn, Turn], windows: list[int | None]
) -> tuple[LayerSpec, ...]:
    count = len(windows)
    hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    kv_heads = read.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise TurboqError(
            f"{read.where}: num_attention_heads={heads} must be a multiple of "
            f"num_key_value_heads={kv_heads}"
        )
    (full, sliding), head_dim = ropes, _head_dim(read, row)
    rotated = row.rotated(read, count) if row.rotated else [True] * count
    latent = latent_fields(read, full) if row.latent else {}
    common = LayerSpec(
        hidden=hidden,
        intermediate=0,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        v_head_dim=head_dim,
        norm_eps=read.number(row.eps, 1e-6),
        norm=row.norm,
        rope=full.rope,
        qk_norm=row.qk_norm if _has_qk_norm(read, row) else None,
        query_growth=query_growth(read, row.rotation, grows=row.query_growth),
        norm_offset=row.norm_offset,
        gated=row.gated,
        pre_norms=row.pre_norms,
        parallel=row.parallel,
        post_norms=row.post_norms,
        activation=_activation(read, row),
        residual_scale=_factor(read, row, "residual_multiplier"),
        softmax_scale=_softmax_scale(read, row),
        softcap=read.optional("attn_logit_softcapping"),
        logit_sinks=row.logit_sinks,
        output_gate=row.output_gate,
        **_biases(read, row),
    )
    common = dataclasses.replace(common, **latent)
    mixers = row.recurrent(read, count) if row.recurrent else [None] * count
    if row.sliding_rope_only:
        rotated = [window is not None for window in windows]
    rotated = [turns and mixer is None for turns, mixer in zip(rotated, mixers, strict=True)]
    experts = read_experts(read, row.experts, count)
    dense = read.integer(row.width) if None in experts else 0
    layers = tuple(
        dataclasses.replace(
            common if mixer is None else _without_attention(common, mixer),
            intermediate=dense if mixture is None else 0,
            experts=mixture,
            window=window,
            rope=(full if window is None else sliding).rope if turns else None,
            rope_magnitude=(full if window is None else sliding).magnitude if turns else 1.0,
        )
        for window, mixture, turns, mixer in zip(windows, experts, rotated, mixers, strict=True)
    )
    return config_gemma4.refined(read, layers) if row.by_layer else layers


def _without_attention(spec: LayerSpec, mixer: DeltaNet | Mamba) -> LayerSpec:
    return dataclasses.replace(
        spec, heads=0, kv_heads=0, head_dim=0, v_head_dim=0, qk_norm=None, output_gate=False,
        qkv_bias=False, o_bias=False, recurrent=mixer,
    )  # fmt: skip


def _decoder_part(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The configuration of the decoder itself where the model has other parts beside it."""
    family = config["model_type"]
    text = config.get("text_config")
    if not isinstance(text, dict):
        raise TurboqError(f"{name}: config.json of model_type {family!r}: text_config is missing")
    outer = {k: v for k, v in config.items() if not k.endswith("_config") or k == _QUANTIZED}
    inner = {"model_type": WRAPPERS[family][0], **text}
    if inner["model_type"] not in WRAPPERS[family]:
        raise TurboqError(
            f"{name}: text_config of model_type {quoted(inner['model_type'])} is not supported in "
            f"{family!r}"
        )
    if _QUANTIZED in inner and inner[_QUANTIZED] != outer.get(_QUANTIZED, inner[_QUANTIZED]):
        said = (
            f"{_QUANTIZED}={quoted(outer[_QUANTIZED])} and "
            f"text_config.{_QUANTIZED}={quoted(inner[_QUANTIZED])}"
        )
        raise contradiction(f"{name}: config.json", said, "the outer one")
    # As in transformers, where the outer one is given (5.x always gives it).
    tied = {k: v for k, v in outer.items() if k == "tie_word_embeddings"}
    return outer | inner | tied


def _head_dim(read: Reader, row: Family) -> int:
    if row.latent:
        return read.integer(ROTATED)
    hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    if read.config.get("head_dim") is None and row.head_dim is None and hidden % heads:
        raise TurboqError(
            f"{read.where}: hidden_size={hidden} is not a multiple of num_attention_heads={heads} "
            "and head_dim is not given"
        )
    return read.integer("head_dim", row.head_dim or hidden // heads)


def _factor(read: Reader, row: Family, key: str) -> float:
    """A factor that the family reads; 1 where it does not, or the file has none."""
    value = read.optional(key) if key in row.reads else None
    return 1.0 if value is None else value


def _has_qk_norm(read: Reader, row: Family) -> bool:
    return row.qk_norm_switch is None or read.boolean(row.qk_norm_switch, False)


def _softmax_scale(read: Reader, row: Family) -> float | None:
    """Where it is not head_dim^-1/2."""
    if "attention_multiplier" in row.reads:
        return read.optional("attention_multiplier")
    scalar = read.optional("query_pre_attn_scalar")
    return None if scalar is None else scalar**-0.5


def _activation(read: Reader, row: Family) -> Any:
    if row.clipped:
        for key, value in (("swiglu_alpha", SWIGLU_ALPHA), ("swiglu_limit", SWIGLU_LIMIT)):
            if read.number(key, value) != value:
                raise TurboqError(
                    f"{read.where}: {key}={quoted(read.config[key])} is not supported: {value} is"
                )
        return "clipped_swiglu"
    act = read.config.get(row.activation, "silu")
    if not isinstance(act, str) or act not in ACTIVATIONS:
        raise TurboqError(
            f"{read.where}: {row.activation}={quoted(act)} is not supported (supported: "
            f"{', '.join(ACTIVATIONS)})"
        )
    return ACTIVATIONS[act]


def _biases(read: Reader, row: Family) -> dict[str, Any]:
    """Which projections have a bias."""
    said = {key: read.boolean(key, False) for key in ("attention_bias", "mlp_bias")}
    for key, value in said.items():
        if value and key not in row.biases:
            raise TurboqError(f"{read.where}: {key}=True is not supported")
    attention, qkv = said["attention_bias"], row.qkv_bias
    if "use_bias" in row.biases:
        return dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), read.boolean("use_bias", False))
    if "qkv_bias" in row.biases:
        qkv = read.boolean("qkv_bias", qkv)
    return {
        "qkv_bias": attention or qkv,
        "o_bias": attention and row.o_bias,
        "mlp_bias": said["mlp_bias"],
    }


def _check_unquantized(read: Reader, row: Family) -> None:
    """Refuses quantized weights but those of the family's own published checkpoints.

    What says nothing of weights, as a cache's scales, may stand.
    """
    settings = read.config.get(_QUANTIZED)
    if not settings or keeps_weights(settings):
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method == hf_fp8.METHOD or (method is not None and method == row.quantized):
        return
    raise TurboqError(
        f"{read.where}: quantization_config says that the weights are quantized (quant_method "
        f"{quoted(method)}), which is not supported: {OTHER_WEIGHTS}"
    )


def keeps_weights(settings: Any) -> bool:
    """Whether a `quantization_config` is an overlay for the cache alone, as we export for vLLM."""
    return (
        isinstance(settings, dict)
        and settings.get("quant_method") == "compressed-tensors"
        and settings.get("config_groups") == {}
        and isinstance(settings.get("kv_cache_scheme"), dict)
    )
