"""What each layer of a `config.json` keeps: a list in the file, or the rule of its family.

full     K and V of every token        sliding  of a window       chunked  of a chunk
indexed  full, and an index key        state    a fixed state, no tokens
both     full, and a fixed state       nothing  (MLP and expert layers)
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from turboq.errors import TurboqError, quoted
from turboq.what_fits import field_names
from turboq.what_fits.families import Family
from turboq.what_fits.hf_fields import BY_HAND, Fields, is_off
from turboq.what_fits.layers import MAX_LAYERS

TYPES = {
    "full_attention": "full", "attention": "full", "sliding_attention": "sliding",
    "chunked_attention": "chunked", "indexed_attention": "indexed",
    "minimax_m3_sparse": "indexed", "linear_attention": "state", "mamba": "state",
    "mamba2": "state", "conv": "state", "recurrent": "state", "hybrid": "both", "moe": "nothing",
    "mlp": "nothing",
}  # fmt: skip
LETTERS = {"M": "state", "*": "full", "-": "nothing", "E": "nothing"}  # Nemotron-H
# Fields by which the families of one rule choose their layers.
RULE_OF = {
    "layer_group_size": "interval", "full_attention_interval": "interval",
    "attn_layer_period": "period", "attn_layer_offset": "period",
    "attention_chunk_size": "rotary_chunked", "block_types": "block_types",
    "_block_types": "block_types", "attention_layers": "local_and_global",
    "attention_types": "local_and_global", "window_size": "local_and_global",
    "local_attention": "first_of_n_full",
}  # fmt: skip
PATTERNS = ("sliding_window_pattern", "_sliding_window_pattern", "global_attn_every_n_layers")
WINDOWS = ("sliding_window", "window_size", "local_attention")


def kinds(read: Fields, family: Family, count: int) -> list[str]:
    """One kind per layer.

    Raises:
      TurboqError: a list or pattern that is nonsensical or not understood.
    """
    rule = family.layers.get("rule")
    if rule == "both":
        return ["both"] * count
    listed = _listed(read, count)
    if listed is not None:
        read.asked |= field_names.CHOICES
        return listed
    _refuse_rules_of_others(read, family)
    if rule == "listed":
        raise TurboqError(
            f"{read.where}: layer_types is missing, and which layers of "
            f"{quoted(family.model_type)} keep a cache is not known without it: {BY_HAND}"
        )
    if rule in RULES:
        return RULES[rule](read, family, count)
    if not _has_window(read):
        if read.get("use_sliding_window"):
            raise read.fail("use_sliding_window", f"without sliding_window: {BY_HAND}")
        read.asked.update(PATTERNS)
        return ["full"] * count
    if any(read.get(key) is not None for key in PATTERNS):
        return _every_nth_full(read, family, count)
    raise read.fail("sliding_window", f"without layer_types is not understood: {BY_HAND}")


def _refuse_rules_of_others(read: Fields, family: Family) -> None:
    """Raises TurboqError for a field by which only other families choose their layers."""
    for key, rule in RULE_OF.items():
        own = family.layers.get("rule") == rule and family.layers.get("key", key) == key
        if not own and not is_off(read.get(key)):
            raise read.fail(
                key, f"is not understood for model_type {quoted(family.model_type)}: {BY_HAND}"
            )


def _listed(read: Fields, count: int) -> list[str] | None:
    """Kinds as the file lists them, under any of the names of such a list."""
    for key in ("layer_types", "layers_block_type"):
        if read.get(key) is not None:
            return [_type(read, key, name) for name in read.names(key, count)]
    if (letters := read.get("hybrid_override_pattern")) is not None:
        return _letters(read, letters, count)
    for key, ones, zeros in (
        ("hybrid_layer_pattern", "sliding", "full"), ("attn_type_list", "full", "state"),
    ):  # fmt: skip
        if read.get(key) is not None:
            return [ones if one else zeros for one in read.switches(key, count)]
    for key in ("full_attn_idxs", "attn_layer_indices"):
        if read.get(key) is not None:
            full = _indices(read, key, read.get(key), range(count))
            return ["full" if i in full else "state" for i in range(count)]
    if read.get("linear_attn_config") is not None:
        return _linear_attn_config(read, count)
    if read.get("sparse_attention_config") is not None:
        return _sparse_attention_config(read, count)
    return None


def _type(read: Fields, key: str, name: Any) -> str:
    if not isinstance(name, str) or name not in TYPES:
        raise TurboqError(
            f"{read.where}: {key} names {quoted(name)}, which is not understood "
            f"(understood: {', '.join(TYPES)}): {BY_HAND}"
        )
    return TYPES[name]


def _letters(read: Fields, letters: Any, count: int) -> list[str]:
    if not isinstance(letters, str) or len(letters) != count or set(letters) - set(LETTERS):
        raise read.fail(
            "hybrid_override_pattern", f"must be {count} of the letters {' '.join(LETTERS)}"
        )
    return [LETTERS[letter] for letter in letters]


def _indices(read: Fields, key: str, value: Any, allowed: range) -> set[int]:
    """Layer numbers of a list."""
    good = isinstance(value, list) and all(
        isinstance(i, int) and not isinstance(i, bool) and i in allowed for i in value
    )
    if not good or len(set(value)) != len(value):
        raise read.fail(key, f"must list layers of {allowed[0]}..{allowed[-1]}, each once")
    return set(value)


def _linear_attn_config(read: Fields, count: int) -> list[str]:
    """Kimi-Linear: layers are counted from 1."""
    own, layers = read.inner("linear_attn_config"), range(1, count + 1)
    full = _indices(own, "full_attn_layers", own.get("full_attn_layers"), layers)
    if own.get("kda_layers") is not None:
        linear = _indices(own, "kda_layers", own.get("kda_layers"), layers)
        if full & linear or len(full) + len(linear) != count:
            raise own.fail("kda_layers", f"and full_attn_layers must be all {count} layers")
    return ["full" if i in full else "state" for i in layers]


def _sparse_attention_config(read: Fields, count: int) -> list[str]:
    """MiniMax-M3: sparse layers keep an index key per token, and no index value if so switched."""
    own = read.inner("sparse_attention_config")
    if not own.flag("use_sparse_attention"):
        return ["full"] * count
    sparse = own.switches("sparse_attention_freq", count)
    if own.get("sparse_disable_index_value") is not None:
        without = own.switches("sparse_disable_index_value", count)
        if any(s and not w for s, w in zip(sparse, without, strict=True)):
            raise own.fail(
                "sparse_disable_index_value",
                f"keeps index values, which is not understood: {BY_HAND}",
            )
    return ["indexed" if s else "full" for s in sparse]


def _has_window(read: Fields) -> bool:
    read.asked.update(WINDOWS)
    given = any(read.get(key) not in (None, 0, -1) for key in WINDOWS)
    return read.get("use_sliding_window") is not False and given


def _every_nth_full(read: Fields, family: Family, count: int) -> list[str]:
    """In every group of n layers the last is full, the others slide."""
    if not _has_window(read):
        read.asked.update(PATTERNS)
        return ["full"] * count
    pattern = read.get("sliding_window_pattern")
    if isinstance(pattern, str):  # EXAONE 4: "LLLG", local and global layers in turn
        if not re.fullmatch(r"[LG]{1,64}", pattern):
            raise read.fail("sliding_window_pattern", "must be of the letters L and G")
        return ["full" if pattern[i % len(pattern)] == "G" else "sliding" for i in range(count)]
    n = read.integer(*PATTERNS, high=MAX_LAYERS, default=family.layers.get("n"))
    out = ["sliding" if (i + 1) % n else "full" for i in range(count)]
    if family.layers.get("first_full"):
        out[0] = "full"
    if family.layers.get("last_full"):
        out[-1] = "full"
    return out


def _first_of_n_full(read: Fields, family: Family, count: int) -> list[str]:
    n = read.integer("global_attn_every_n_layers", high=MAX_LAYERS, default=family.layers["n"])
    read.asked.update(WINDOWS)
    other = family.layers.get("other", "sliding")
    if other == "sliding" and not _has_window(read):
        return ["full"] * count
    return [other if i % n else "full" for i in range(count)]


def _all_sliding(read: Fields, family: Family, count: int) -> list[str]:
    return ["sliding" if _has_window(read) else "full"] * count


def _after_max_window_layers(read: Fields, family: Family, count: int) -> list[str]:
    """Qwen2: layers slide from max_window_layers on, if switched on at all."""
    if not _switched(read):
        return ["full"] * count
    first = _max_window_layers(read)
    return ["full"] * min(first, count) + ["sliding"] * max(0, count - first)


def _alternating(read: Fields, family: Family, count: int) -> list[str]:
    """Qwen2-MoE: every other layer before max_window_layers slides, the first included."""
    if not _switched(read):
        return ["full"] * count
    first = _max_window_layers(read)
    return ["full" if i % 2 or i >= first else "sliding" for i in range(count)]


def _unrotated_slide(read: Fields, family: Family, count: int) -> list[str]:
    """SmolLM3: layers without rotary positions slide, if switched on at all."""
    if not _switched(read):
        return ["full"] * count
    return ["full" if turns else "sliding" for turns in _rotary(read, count)]


def _switched(read: Fields) -> bool:
    read.asked.update(WINDOWS)
    return read.flag("use_sliding_window") and _has_window(read)


def _max_window_layers(read: Fields) -> int:
    return read.number("max_window_layers", read.get("max_window_layers"), MAX_LAYERS, low=0)


def _rotary(read: Fields, count: int) -> list[bool]:
    """Whether each layer has rotary positions."""
    if read.get("no_rope_layers"):
        return read.switches("no_rope_layers", count)
    n = read.integer("no_rope_layer_interval", high=MAX_LAYERS, default=4)
    return [(i + 1) % n != 0 for i in range(count)]


def _interval(read: Fields, family: Family, count: int) -> list[str]:
    """Every n-th layer is full, the others keep a state; and so a last group that is cut short."""
    n = read.integer(family.layers["key"], high=MAX_LAYERS, default=family.layers.get("n"))
    tail = count - count % n if family.layers.get("tail_full") else count
    return ["full" if (i + 1) % n == 0 or i >= tail else "state" for i in range(count)]


def _period(read: Fields, family: Family, count: int) -> list[str]:
    """Jamba."""
    period = read.integer("attn_layer_period", high=MAX_LAYERS)
    offset = read.get("attn_layer_offset")
    offset = read.number("attn_layer_offset", 0 if offset is None else offset, period - 1, low=0)
    return ["full" if i % period == offset else "state" for i in range(count)]


def _rotary_chunked(read: Fields, family: Family, count: int) -> list[str]:
    """Llama 4: layers with rotary positions attend within chunks, the others to everything."""
    if read.get("attention_chunk_size") is None:
        return ["full"] * count
    return ["chunked" if turns else "full" for turns in _rotary(read, count)]


def _block_types(read: Fields, family: Family, count: int) -> list[str]:
    """RecurrentGemma: a short list that is repeated, whose attention slides."""
    key = "block_types" if read.get("block_types") is not None else "_block_types"
    given = read.get(key)
    given = ["recurrent", "recurrent", "attention"] if given is None else given
    if not isinstance(given, list) or not given or _others(given, {"recurrent", "attention"}):
        raise read.fail(key, "must be a list of recurrent and attention")
    attention = "sliding" if _has_window(read) else "full"
    return [attention if given[i % len(given)] == "attention" else "state" for i in range(count)]


def _local_and_global(read: Fields, family: Family, count: int) -> list[str]:
    """GPT-Neo: attention_layers, or attention_types = [[[kinds], times], ...]."""
    read.asked.add("attention_types")
    given = read.get("attention_layers")
    if given is None:
        given = []
        for group in read.get("attention_types") or [[["global", "local"], MAX_LAYERS]]:
            if not _is_group(group):
                raise read.fail("attention_types", "must be [[[kinds], times], ...]")
            given = (given + group[0] * group[1])[:count]
    if not isinstance(given, list) or len(given) != count or _others(given, {"global", "local"}):
        raise read.fail("attention_layers", f"must be global or local for each of {count} layers")
    return ["full" if kind == "global" else "sliding" for kind in given]


def _is_group(group: Any) -> bool:
    """Whether it is [kinds, times]."""
    return (
        isinstance(group, list)
        and len(group) == 2
        and isinstance(group[0], list)
        and isinstance(group[1], int)
        and 1 <= group[1] <= MAX_LAYERS
    )


def _others(given: list[Any], allowed: set[str]) -> list[Any]:
    return [name for name in given if not isinstance(name, str) or name not in allowed]


def _sparse_index(read: Fields, family: Family, count: int) -> list[str]:
    raise TurboqError(
        f"{read.where}: layer_types and sparse_attention_config are missing, one of which says "
        f"which layers keep index keys: {BY_HAND}"
    )


RULES: dict[str, Callable[[Fields, Family, int], list[str]]] = {
    "every_nth_full": _every_nth_full, "first_of_n_full": _first_of_n_full,
    "all_sliding": _all_sliding, "after_max_window_layers": _after_max_window_layers,
    "interval": _interval, "period": _period, "rotary_chunked": _rotary_chunked,
    "block_types": _block_types, "local_and_global": _local_and_global,
    "sparse_index": _sparse_index, "alternating": _alternating,
    "unrotated_slide": _unrotated_slide,
}  # fmt: skip
