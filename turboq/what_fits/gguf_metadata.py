"""KV-cache geometry from the metadata of a GGUF header, as llama.cpp reads it.

Where a header says that layers slide but not which, the pattern is the one that llama.cpp has built
in for the architecture; an architecture whose pattern is not known here is an error that names the
field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from turboq.errors import LONGEST, TurboqError, quoted
from turboq.what_fits.layers import (
    MAX_DIM,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_TOKENS,
    CacheGeometry,
    CacheLayer,
)

# llama.cpp's built-in patterns: in every group of n layers the last is full.
BUILT_IN = {"gemma2": 2, "gemma3": 6, "gpt-oss": 2, "cohere2": 4}
ALL_SLIDING = ("llama", "qwen2", "qwen3")  # as this project's decoder reads a window there
LATENT = ("deepseek2",)
INTERVAL = ("qwen3next", "qwen35", "qwen35moe")
REFUSED = ("attention.indexer.head_count", "attention.indexer.key_length")


def from_metadata(
    metadata: Mapping[str, Any], name: str, *, weights_bytes: int | None = None, source: str = ""
) -> CacheGeometry:
    """The cache geometry that a GGUF header describes.

    Raises:
      TurboqError: a missing, nonsensical or not understood field, by name and value.
    """
    part, parts = (metadata.get(f"split.{key}", 0) for key in ("no", "count"))
    if part:
        raise TurboqError(
            f"{name} is part {quoted(part)} (from 0) of {quoted(parts)}, without the model's "
            "description: give the first part (...-00001-of-...)"
        )
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or not arch:
        raise TurboqError(f"{name}: metadata field general.architecture is missing")
    if len(arch) > LONGEST:  # it is a part of every field's name
        raise TurboqError(f"{name}: general.architecture={quoted(arch)} names no architecture")
    read = _Fields(metadata, arch, name)
    for key in REFUSED:
        if read.get(key):
            raise read.fail(key, "is not understood and adds to the cache")
    count = read.integer("block_count", MAX_LAYERS)
    if read.get("attention.kv_lora_rank"):
        layers = _latent(read, arch, count)
    else:
        layers = [
            _layer(read, index, sliding) for index, sliding in enumerate(_slides(read, count))
        ]
        shared = read.get("attention.shared_kv_layers") or 0
        if shared:
            shared = read.whole("attention.shared_kv_layers", shared, count - 1)
            layers[count - shared :] = [CacheLayer(kind="shared")] * shared
    if not any(layer.stores for layer in layers):
        raise TurboqError(f"{name}: no layer keeps a KV cache")
    return CacheGeometry(
        name=name,
        family=arch,
        layers=tuple(layers),
        context=read.integer("context_length", MAX_TOKENS),
        weights_bytes=weights_bytes,
        source=source,
    )


class _Fields:
    def __init__(self, metadata: Mapping[str, Any], arch: str, where: str):
        self.metadata, self.arch, self.where = metadata, arch, where

    def get(self, key: str, layer: int | None = None) -> Any:
        value = self.metadata.get(f"{self.arch}.{key}")
        if layer is not None and isinstance(value, list):
            if layer >= len(value):
                raise self.fail(key, f"has no entry for layer {layer}")
            return value[layer]
        return value

    def fail(self, key: str, why: str) -> TurboqError:
        return TurboqError(f"{self.where}: {self.arch}.{key}={quoted(self.get(key))} {why}")

    def whole(self, key: str, value: Any, high: int, low: int = 1) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.fail(key, f"must be a whole number of {low}..{high}")
        return value

    def integer(self, key: str, high: int, default: int | None = None, layer: int | None = None):
        value = self.get(key, layer)
        if value is None:
            if default is None:
                raise TurboqError(f"{self.where}: metadata field {self.arch}.{key} is missing")
            return default
        return self.whole(key, value, high)


def _latent(read: _Fields, arch: str, count: int) -> list[CacheLayer]:
    if arch not in LATENT:
        raise read.fail(
            "attention.kv_lora_rank",
            f"is not understood for architecture {quoted(arch)} (understood: {', '.join(LATENT)}): "
            "name --geometry=LAYERSxKVHEADSxDIM",
        )
    dim = read.integer("attention.kv_lora_rank", MAX_DIM // 2)
    dim += read.integer("rope.dimension_count", MAX_DIM // 2)
    return [CacheLayer(kind="latent", kv_heads=1, k_dim=dim)] * count


def _layer(read: _Fields, index: int, sliding: bool) -> CacheLayer:
    heads = read.integer("attention.head_count", MAX_HEADS, layer=index)
    given = read.get("attention.head_count_kv", index)
    kv_heads = read.whole(
        "attention.head_count_kv", heads if given is None else given, MAX_HEADS, 0
    )
    if read.arch in INTERVAL:
        interval = read.integer("full_attention_interval", MAX_LAYERS, default=4)
        kv_heads = 0 if (index + 1) % interval else kv_heads
    if kv_heads == 0:
        return CacheLayer(kind="none")
    if heads % kv_heads:
        raise read.fail("attention.head_count_kv", f"does not divide the {heads} query heads")
    hidden = read.integer("embedding_length", 2**24)
    if read.get("attention.key_length") is None and hidden % heads:
        raise read.fail("embedding_length", f"is not a multiple of the {heads} heads")
    k_dim = read.integer("attention.key_length", MAX_DIM, default=hidden // heads)
    v_dim = read.integer("attention.value_length", MAX_DIM, default=k_dim)
    if sliding:
        k_dim = read.integer("attention.key_length_swa", MAX_DIM, default=k_dim)
        v_dim = read.integer("attention.value_length_swa", MAX_DIM, default=v_dim)
    window = read.integer("attention.sliding_window", MAX_TOKENS) if sliding else None
    return CacheLayer(
        kind="sliding" if sliding else "full",
        kv_heads=kv_heads, k_dim=k_dim, v_dim=v_dim, window=window,
    )  # fmt: skip


def _slides(read: _Fields, count: int) -> list[bool]:
    """Whether each layer has a sliding window."""
    if not read.get("attention.sliding_window"):
        return [False] * count
    key = "attention.sliding_window_pattern"
    pattern = read.get(key)
    if isinstance(pattern, list):
        if len(pattern) != count or any(p not in (0, 1) for p in pattern):
            raise read.fail(key, f"must say true or false for each of the {count} layers")
        return [bool(p) for p in pattern]
    if pattern is None and read.arch in ALL_SLIDING:
        return [True] * count
    if pattern is None and read.arch not in BUILT_IN:
        raise read.fail("attention.sliding_window", f"without {key} is not understood")
    n = read.integer(key, MAX_LAYERS, default=BUILT_IN.get(read.arch))
    return [i % n < n - 1 for i in range(count)]
