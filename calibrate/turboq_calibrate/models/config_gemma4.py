"""What Gemma 4 has otherwise layer by layer, from a `config.json`.

Full layers have heads of their own, and may make values of their keys; the last layers read the
cache of the last one of their kind before them; every layer may read an input of its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from turboq.errors import TurboqError, quoted
from turboq_calibrate.models.config_fields import Reader
from turboq_calibrate.models.spec import Experts, LayerSpec

SHARED, BOTH_WAYS = "num_kv_shared_layers", "use_bidirectional_attention"
OVERRIDES = "per_layer_config"  # transformers' own way to say `global_head_dim` and its like
GLOBAL = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}


def full_head_dim(read: Reader, full: list[bool]) -> int:
    """Head dimension of full layers."""
    return _full(read, full)["head_dim"]


def refined(read: Reader, layers: tuple[LayerSpec, ...]) -> tuple[LayerSpec, ...]:
    """The layers with what Gemma 4 has otherwise.

    Raises:
      TurboqError: numbers that do not go together, or what is not done: attention both ways,
        tokens without an input of a layer.
    """
    # "vision" is of tokens of pictures alone.
    if read.config.get(BOTH_WAYS) not in (None, "vision"):
        said = quoted(read.config[BOTH_WAYS])
        raise TurboqError(f"{read.where}: {BOTH_WAYS}={said} is not supported")
    full = [layer.window is None for layer in layers]
    own = _full(read, full)
    kv_heads, heads = own["num_key_value_heads"], layers[0].heads
    if heads % kv_heads:
        raise TurboqError(
            f"{read.where}: num_attention_heads={heads} must be a multiple of the {kv_heads} KV "
            "heads of full layers"
        )
    head = {"kv_heads": kv_heads, "head_dim": own["head_dim"], "v_head_dim": own["head_dim"]}
    head |= {"values_are_keys": read.boolean("attention_k_eq_v", False)}
    common: dict[str, Any] = {"value_norm": True, "softmax_scale": 1.0, "output_scale": True}
    common["experts"] = _experts(read)
    out = [
        dataclasses.replace(layer, **common, **(head if is_full else {}))
        for layer, is_full in zip(layers, full, strict=True)
    ]
    return _with_inputs(read, _sharing(read, out))


def _experts(read: Reader) -> Experts | None:
    """Experts beside every layer's MLP."""
    if not read.boolean("enable_moe_block", False):
        return None
    count, chosen = read.integer("num_experts"), read.integer("top_k_experts")
    if chosen > count:
        raise TurboqError(f"{read.where}: top_k_experts={chosen} of {count} experts")
    inner = read.integer("moe_intermediate_size")
    return Experts(count=count, chosen=chosen, intermediate=inner, renormalised=True, beside=True)


def _full(read: Reader, full: list[bool]) -> dict[str, int]:
    """Head dimension and KV heads of full layers."""
    if read.config.get(OVERRIDES) is not None:
        return _overrides(read, full)
    dim = read.integer(GLOBAL["head_dim"], 512)
    heads = read.integer("num_key_value_heads")
    if read.boolean("attention_k_eq_v", False):
        heads = read.integer(GLOBAL["num_key_value_heads"], heads)
    return {"head_dim": dim, "num_key_value_heads": heads}


def _overrides(read: Reader, full: list[bool]) -> dict[str, int]:
    said = read.config[OVERRIDES]
    known = isinstance(said, dict) and all(
        key.isdecimal() and isinstance(of, dict) and set(of) <= set(GLOBAL)
        for key, of in said.items()
    )
    by_layer = {int(key): of for key, of in said.items()} if known else {}
    every = [by_layer[i] for i in range(len(full)) if i in by_layer]
    due = {i for i, is_full in enumerate(full) if is_full}
    if not known or (by_layer and set(by_layer) != due) or any(of != every[0] for of in every):
        raise TurboqError(
            f"{read.where}: {OVERRIDES}={quoted(said)} must say the same head_dim and "
            "num_key_value_heads of every full layer, and of no other"
        )
    own = Reader(read.config | (every[0] if every else {}), f"{read.where}, {OVERRIDES}")
    return {key: own.integer(key) for key in GLOBAL}


def _sharing(read: Reader, layers: list[LayerSpec]) -> list[LayerSpec]:
    """`sharing` of the last `num_kv_shared_layers`, whose MLPs may be twice as wide."""
    shared = read.count(SHARED, 0)
    wide = 2 if read.boolean("use_double_wide_mlp", False) else 1
    first = len(layers) - shared
    layers = [
        dataclasses.replace(layer, intermediate=wide * layer.intermediate) if i >= first else layer
        for i, layer in enumerate(layers)
    ]
    return sharing(layers, shared, f"{read.where}: {SHARED}")


def sharing(layers: list[LayerSpec], shared: int, field: str) -> list[LayerSpec]:
    """The layers, of which the last `shared` read the cache of the last before them that has the
    same window; that one lends it.

    Raises:
      TurboqError: there is none; the message begins with `field`.
    """
    if not shared:
        return layers
    first = len(layers) - shared
    lender = {layer.window: i for i, layer in enumerate(layers[: max(first, 0)])}
    if not {layer.window for layer in layers} <= set(lender):
        raise TurboqError(
            f"{field}={shared} of {len(layers)} layers leaves full or sliding layers none to share "
            "with"
        )
    places, at = {}, layers[0].hidden
    for window, i in lender.items():
        places[window] = at
        at += layers[i].kv_heads * (layers[i].head_dim + layers[i].v_head_dim)
    out = []
    for i, layer in enumerate(layers):
        if i == lender[layer.window]:
            layer = dataclasses.replace(layer, shared_at=places[layer.window])
        if i >= first:
            layer = dataclasses.replace(
                layer, shared_at=places[layer.window], borrows_cache_of=lender[layer.window]
            )
        out.append(layer)
    return out


def _with_inputs(read: Reader, layers: list[LayerSpec]) -> tuple[LayerSpec, ...]:
    """The layers with inputs of their own, which stand in the stream behind what is shared."""
    size = read.count("hidden_size_per_layer_input", 0)
    if not size:
        return tuple(layers)
    vocab, tokens = read.integer("vocab_size"), read.integer("vocab_size_per_layer_input")
    if tokens != vocab:
        raise TurboqError(
            f"{read.where}: vocab_size_per_layer_input={tokens} must be vocab_size={vocab}"
        )
    return with_inputs(layers, size)


def with_inputs(layers: list[LayerSpec], size: int) -> tuple[LayerSpec, ...]:
    """The layers with `size` channels of input each."""
    at = layers[0].hidden + shared_channels(layers)
    return tuple(dataclasses.replace(x, own_input=size, own_input_at=at) for x in layers)


def shared_channels(layers: list[LayerSpec] | tuple[LayerSpec, ...]) -> int:
    """Channels of the stream that hold lent K and V."""
    return sum(x.kv_heads * (x.head_dim + x.v_head_dim) for x in layers if x.lends)
