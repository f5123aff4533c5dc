"""KV-cache geometry from the metadata of a GGUF header, as llama.cpp reads it.

What a header does not say is what llama.cpp has built in for the architecture
(`architectures.json`). A field that may change the cache and is not understood is an error that
names it, as is a window whose layers are not known.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Mapping
from typing import Any

from turboq.errors import LONGEST, TurboqError, quoted, shortened
from turboq.what_fits import field_names
from turboq.what_fits.hf_fields import BY_HAND, ENCODER_DECODER, is_off
from turboq.what_fits.layers import (
    MAX_DIM,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_TOKENS,
    CacheGeometry,
    CacheLayer,
)

WIDE = 2**24  # channels
STATES = frozenset(
    {
        "ssm.conv_kernel", "ssm.inner_size", "ssm.state_size", "ssm.group_count", "kda.head_dim",
        "shortconv.l_cache",
    }
)  # fmt: skip
READ = frozenset(
    {
        *STATES,
        "attention.head_count", "attention.head_count_kv", "attention.key_length",
        "attention.value_length", "attention.key_length_swa", "attention.value_length_swa",
        "attention.sliding_window", "attention.sliding_window_pattern",
        "attention.shared_kv_layers", "attention.kv_lora_rank", "attention.key_length_mla",
        "attention.indexer.key_length", "attention.recurrent_layers", "full_attention_interval",
    }
)  # fmt: skip


@functools.cache
def _file() -> dict[str, Any]:
    folder = importlib.resources.files("turboq.what_fits")
    return json.loads((folder / "architectures.json").read_text(encoding="utf-8"))


@functools.cache
def _rows() -> dict[str, dict[str, Any]]:
    return {row["arch"]: row for row in _file()["architectures"]}


def from_metadata(metadata: Mapping[str, Any], name: str, *, source: str = "") -> CacheGeometry:
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
    if arch in _file()["encoders"]:
        raise TurboqError(
            f"{name}: architecture {quoted(arch)} reads its input at once and keeps no KV cache: "
            "name a decoder"
        )
    if arch in _file()["encoder_decoders"]:
        raise TurboqError(f"{name}: architecture {quoted(arch)} {ENCODER_DECODER}")
    read = _Fields(metadata, arch, name)
    read.refuse_unknown()
    layers = _layers(read, _count(read))
    read.refuse_unasked()
    if not any(layer.stores for layer in layers):
        raise TurboqError(f"{name}: no layer keeps a KV cache")
    return CacheGeometry(
        name=name,
        family=arch,
        layers=tuple(layers),
        context=read.integer("context_length", MAX_TOKENS),
        source=source,
        note=_note(read, layers),
    )


class _Fields:
    def __init__(self, metadata: Mapping[str, Any], arch: str, where: str):
        self.metadata, self.arch, self.where = metadata, arch, where
        self.row = _rows().get(arch, {})
        self.asked: set[str] = set()  # fields that decided something, or could have

    def get(self, key: str, layer: int | None = None) -> Any:
        self.asked.add(key)
        value = self.metadata.get(f"{self.arch}.{key}")
        if layer is not None and isinstance(value, list):
            if layer >= len(value):
                raise self.fail(key, f"has no entry for layer {layer}")
            return value[layer]
        return value

    def fail(self, key: str, why: str) -> TurboqError:
        name = shortened(f"{self.arch}.{key}")
        return TurboqError(f"{self.where}: {name}={quoted(self.get(key))} {why}")

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

    def switches(self, key: str, count: int) -> list[bool]:
        value = self.get(key)
        if not isinstance(value, list) or len(value) < count or any(p not in (0, 1) for p in value):
            raise self.fail(key, f"must say true or false for each of the {count} layers")
        return [bool(p) for p in value[:count]]

    def refuse_unknown(self) -> None:
        """Raises TurboqError for the first field that may change the cache and is not known."""
        start = f"{self.arch}."
        for name, value in self.metadata.items():
            key = str(name).removeprefix(start)
            if not str(name).startswith(start) or key in READ or is_off(value):
                continue
            if key not in field_names.GGUF_HARMLESS and field_names.speaks(key.replace(".", "_")):
                raise self.fail(key, f"is not understood and may change the cache: {BY_HAND}")

    def refuse_unasked(self) -> None:
        """Raises TurboqError for the first known field that no layer asked for."""
        heads = {"attention.key_length", "attention.value_length"}  # beside a latent vector
        for key in sorted(READ - self.asked - heads):
            if not is_off(self.get(key)):
                raise self.fail(
                    key, f"may change the cache, and is not what its layers use: {BY_HAND}"
                )


def _count(read: _Fields) -> int:
    """Layers that run: block_count includes those that only predict further tokens."""
    count = read.integer("block_count", MAX_LAYERS)
    ahead = read.get("nextn_predict_layers")
    return count - read.whole("nextn_predict_layers", ahead, count - 1, 0) if ahead else count


def _note(read: _Fields, layers: list[CacheLayer]) -> str:
    whole = read.get("attention.kv_lora_rank") and all(x.kind != "latent" for x in layers)
    return (
        "K and V whole: a header without attention.key_length_mla (a later conversion has it, and "
        "caches the latent vector)"
        if whole
        else ""
    )


def _layers(read: _Fields, count: int) -> list[CacheLayer]:
    dim = _latent_dim(read)
    index = read.get("attention.indexer.key_length") or 0
    if index and (dim is None or not read.row.get("index")):
        raise read.fail("attention.indexer.key_length", "is not understood and adds to the cache")
    windows, recurrent = _windows(read, count), _recurrent(read, count)
    layers = []
    for i in range(count):
        kv_heads = 0 if recurrent[i] else _kv_heads(read, i)
        if not kv_heads:
            layers.append(CacheLayer(kind="none", state_bytes=_without_heads(read, i)))
        elif dim is not None:
            if windows[i] is not None:
                raise read.fail("attention.sliding_window", f"is not understood here: {BY_HAND}")
            if index:
                index = read.whole("attention.indexer.key_length", index, MAX_DIM)
            layers.append(CacheLayer(kind="latent", kv_heads=1, k_dim=dim, index_dim=index))
        else:
            layers.append(_layer(read, i, kv_heads, windows[i]))
    return _with_shared(read, layers)


def _with_shared(read: _Fields, layers: list[CacheLayer]) -> list[CacheLayer]:
    """The last layers of some architectures read the caches of others."""
    count, own = len(layers), read.row.get("own_layers")
    if own is None:
        return layers
    given = read.get("attention.shared_kv_layers")
    shared = max(0, count - (own or count))
    if given is not None:
        shared = read.whole("attention.shared_kv_layers", given, count - 1, 0)
    return layers[: count - shared] + [CacheLayer(kind="shared")] * shared


def _latent_dim(read: _Fields) -> int | None:
    """Numbers of one latent vector; None where K and V of all heads are cached."""
    if not read.get("attention.kv_lora_rank"):
        return None
    if not read.row.get("latent"):
        known = ", ".join(arch for arch, row in _rows().items() if row.get("latent"))
        raise read.fail(
            "attention.kv_lora_rank",
            f"is not understood for architecture {quoted(read.arch)} (understood: {known}): "
            f"{BY_HAND}",
        )
    if read.get("attention.key_length_mla") is None:
        return None
    dim = read.integer("attention.kv_lora_rank", MAX_DIM // 2)
    return dim + read.integer("rope.dimension_count", MAX_DIM // 2)


def _kv_heads(read: _Fields, layer: int) -> int:
    heads = read.integer("attention.head_count", MAX_HEADS, layer=layer)
    given = read.get("attention.head_count_kv", layer)
    kv_heads = read.whole(
        "attention.head_count_kv", heads if given is None else given, MAX_HEADS, 0
    )
    if kv_heads and heads % kv_heads:
        raise read.fail("attention.head_count_kv", f"does not divide the {heads} query heads")
    return kv_heads


def _recurrent(read: _Fields, count: int) -> list[bool]:
    """Layers that keep a state instead of K and V, beside those of 0 KV heads."""
    if isinstance(read.get("attention.head_count_kv"), list):
        read.asked |= STATES  # of layers without KV heads, if there are any
    if read.get("attention.recurrent_layers") is not None:
        read.asked |= {*STATES, "full_attention_interval"}
        return read.switches("attention.recurrent_layers", count)
    if "interval" not in read.row:
        if read.get("full_attention_interval"):
            raise read.fail("full_attention_interval", f"is not understood: {BY_HAND}")
        return [False] * count
    read.asked |= STATES
    interval = read.integer("full_attention_interval", MAX_LAYERS, default=read.row["interval"])
    return [(i + 1) % interval != 0 for i in range(count)]


def _layer(read: _Fields, index: int, kv_heads: int, window: int | None) -> CacheLayer:
    heads = read.integer("attention.head_count", MAX_HEADS, layer=index)
    hidden = read.integer("embedding_length", WIDE)
    # As in llama.cpp, neither length is the other's default.
    lengths = [read.get(f"attention.{side}_length") for side in ("key", "value")]
    if None in lengths and hidden % heads:
        raise read.fail("embedding_length", f"is not a multiple of the {heads} heads")
    k_dim, v_dim = (
        read.integer(f"attention.{side}_length", MAX_DIM, default=hidden // heads)
        for side in ("key", "value")
    )
    if window is not None:
        k_dim = read.integer("attention.key_length_swa", MAX_DIM, default=k_dim)
        v_dim = read.integer("attention.value_length_swa", MAX_DIM, default=v_dim)
    return CacheLayer(
        kind="full" if window is None else "sliding",
        kv_heads=kv_heads, k_dim=k_dim, v_dim=v_dim, window=window,
        state_bytes=_state(read) if read.row.get("state_everywhere") else 0,
    )  # fmt: skip


def _windows(read: _Fields, count: int) -> list[int | None]:
    """The window of every layer; None: it keeps all tokens."""
    window, row = _window(read, count), read.row
    key, lengths = "attention.sliding_window_pattern", ("key_length_swa", "value_length_swa")
    if window is None:
        if read.get("attention.sliding_window") is not None:  # 0, or not used here
            read.asked.add(key)
        return [None] * count
    if isinstance(read.get(key), list):
        read.asked.update(f"attention.{name}" for name in lengths)
        return [window if slides else None for slides in read.switches(key, count)]
    if read.get(key) is None and "period" not in row:
        raise read.fail("attention.sliding_window", f"without {key} is not understood: {BY_HAND}")
    n = row["period"] if read.get(key) is None else read.integer(key, MAX_LAYERS)
    full = 0 if row.get("full_first") else n - 1
    return [None if n and i % n == full else window for i in range(count)]


def _window(read: _Fields, count: int) -> int | None:
    given, row = read.get("attention.sliding_window"), read.row
    if row.get("no_window") or given == 0 or (given is None and row.get("if_asked")):
        return None
    if "of_layers" in row and count != row["of_layers"]:
        return None
    if given is None:
        return row.get("window")
    given = read.whole("attention.sliding_window", given, MAX_TOKENS)
    return row["window"] if row.get("fixed_window") else given


def _without_heads(read: _Fields, layer: int) -> int | None:
    """Bytes of state of a layer without KV heads."""
    kind = read.row.get("without_heads")
    if kind == "nothing" or (
        kind == "nothing_if_ffn" and read.get("feed_forward_length", layer) not in (None, 0)
    ):
        return 0
    return _state(read)


def _state(read: _Fields) -> int | None:
    """Bytes of one layer's state, float32 throughout as in llama.cpp; None: not known.

    LFM2: hidden (c - 1); KDA: H D (D + 3 (c - 1)); others: I N + (c - 1) (I + 2 G N).
    """
    hidden = read.integer("embedding_length", WIDE)
    read.asked |= STATES
    if read.get("shortconv.l_cache"):
        return 4 * hidden * (read.integer("shortconv.l_cache", 64) - 1)
    tail = read.integer("ssm.conv_kernel", 64, default=1) - 1
    if read.get("kda.head_dim"):
        dim = read.integer("kda.head_dim", MAX_DIM)
        heads = read.integer("attention.head_count", MAX_HEADS, layer=0)
        return 4 * heads * dim * (dim + 3 * tail)
    if not read.get("ssm.inner_size") or not read.get("ssm.state_size"):
        return None
    inner, size = read.integer("ssm.inner_size", WIDE), read.integer("ssm.state_size", MAX_DIM)
    groups = read.get("ssm.group_count") or 0
    groups = read.whole("ssm.group_count", groups, MAX_HEADS, 0)
    return 4 * (inner * size + tail * (inner + 2 * groups * size))
