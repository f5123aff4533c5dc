"""KV-cache geometry from a Hugging Face `config.json`, for many more families than are run here.

Only what decides the cache is read: layers, KV heads, head dims, layer kinds, windows, states. What
a file leaves out is what transformers assumes for the family (`turboq.what_fits.families`). A field
that may change the cache and is not understood is an error that names it: a wrong count would be
worse.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from turboq.errors import TurboqError, quoted
from turboq.what_fits import families, field_names
from turboq.what_fits.families import Family
from turboq.what_fits.hf_fields import (
    BY_HAND,
    ENCODER_DECODER,
    Fields,
    is_off,
    refuse_beside,
)
from turboq.what_fits.hf_kinds import WINDOWS, kinds
from turboq.what_fits.layers import (
    MAX_DIM,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_TOKENS,
    CacheGeometry,
    CacheLayer,
)
from turboq.what_fits.states import state_bytes

# Where multimodal files keep the language model.
NESTED = (
    "text_config", "language_config", "llm_config", "lm_config", "language_model_config",
    "thinker_config",
)  # fmt: skip
# What they read of their prompt both ways is kept all the same.
PREFIX_LMS = ("paligemma",)
BLOCK_FIELDS = ("n_heads_in_group", "no_op", "replace_with_linear", "window_length")
LATENT_NOTE = "the latent cache of vLLM, SGLang and llama.cpp; transformers stores K and V whole"
TALKER_NOTE = "the thinker alone: the talker keeps a cache of its own, which is not counted"


def from_config(config: Mapping[str, Any], name: str, *, source: str = "") -> CacheGeometry:
    """The cache geometry that a parsed `config.json` describes.

    Raises:
      TurboqError: a missing, nonsensical, huge or not understood field, each by name and value.
    """
    where = f"{name}: config.json"
    notes = [TALKER_NOTE] if config.get("talker_config") else []
    _refuse_encoder_decoders(config, where)
    config, nested = _text_part(config, where)
    _refuse_encoder_decoders(config, where)
    given = config.get("model_type")
    if not isinstance(given, str) or not given:
        raise TurboqError(f"{where} has no model_type (a string)")
    family = families.family(given)
    config = {k: v for k, v in config.items() if k not in family.ignored}
    read = Fields(_filled(config, family.filled(nested)), where)
    _refuse_encoders(read, given)
    read.refuse_unknown(_beside(read, family))
    count = read.integer("num_hidden_layers", high=MAX_LAYERS // family.caches_per_layer)
    if read.get("block_configs") is not None:
        layers = _blocks(read, count)
    elif _is_latent(read, family):
        layers = _latent(read, family, count)
        notes.append(LATENT_NOTE)
    else:
        layers, note = _heads(read, family, count)
        notes.append(note)
    layers = _shared(read, family, layers)
    if family.state is not None or any(layer.state_bytes is None for layer in layers):
        read.asked |= field_names.STATES
    read.refuse_unasked(config, given)
    if not any(layer.stores for layer in layers):
        raise TurboqError(f"{where}: no layer keeps a KV cache")
    if (
        "sliding_window" not in config
        and any(x.window for x in layers)
        and (family.layers.get("rule") == "all_sliding")
    ):
        notes.append(f"sliding_window is absent: {layers[0].window:,} as transformers has it")
    try:
        return CacheGeometry(
            name=name, family=given, layers=tuple(layers) * family.caches_per_layer,
            context=read.optional(*field_names.CONTEXT, high=MAX_TOKENS), source=source,
            note="; ".join(note for note in notes if note),
        )  # fmt: skip
    except ValueError as error:
        raise TurboqError(f"{name}: {error}") from None


def _text_part(config: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], bool]:
    """The language model's part of a multimodal configuration, and whether it is nested.

    Raises:
      TurboqError: a field beside it may change the cache, or is at odds with the part.
    """
    inside = False
    for _ in range(3):
        key = next((k for k in NESTED if isinstance(config.get(k), Mapping)), None)
        if key is None:
            break
        part = config[key]
        kind = config.get("model_type")
        if "num_hidden_layers" in config:
            for k in field_names.READ & set(part) & set(config):
                if part[k] is not None and part[k] != config[k]:
                    raise TurboqError(
                        f"{where}: {k}={quoted(config[k])} and {key}.{k}={quoted(part[k])} are "
                        "at odds"
                    )
            return {k: v for k, v in config.items() if k not in NESTED}, False
        refuse_beside(config, NESTED, where)
        if "model_type" not in part and isinstance(kind, str):
            text = kind if kind.endswith("_text") else f"{kind}_text"
            part = {**part, "model_type": text if families.is_known(text) else kind}
        if kind in PREFIX_LMS:
            part = {k: v for k, v in part.items() if k != "use_bidirectional_attention"}
        config, inside = part, True
    return config, inside


def _filled(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The file's fields over the family's, which hold only where no name of the field is given."""
    absent = {
        k: v
        for k, v in defaults.items()
        if not any(n.partition(".")[0] in config for n in field_names.aliases_of(k))
        and not (k in field_names.CONTEXT and any(n in config for n in field_names.CONTEXT))
    }
    filled = {**absent, **config}
    if config.get("use_mla") is False:  # Hunyuan files describe latent heads that they do not use
        for key in ("kv_lora_rank", "qk_rope_head_dim", "v_head_dim", *field_names.BESIDE_LATENT):
            filled.pop(key, None)
    return filled


def _refuse_encoder_decoders(config: Mapping[str, Any], where: str) -> None:
    kind, said = config.get("model_type"), config.get("is_encoder_decoder")
    if said is True or (isinstance(kind, str) and families.is_encoder_decoder(kind)):
        raise TurboqError(f"{where}: model_type {quoted(kind)} {ENCODER_DECODER}")


def _refuse_encoders(read: Fields, model_type: str) -> None:
    both_ways = read.get("use_bidirectional_attention") is True  # "vision": image tokens only
    if both_ways or (families.is_encoder(model_type) and not read.flag("is_decoder")):
        raise TurboqError(
            f"{read.where}: model_type {quoted(model_type)} is an encoder, which reads its input "
            "at once and keeps no KV cache: name a decoder"
        )


def _beside(read: Fields, family: Family) -> frozenset[str]:
    """Names that are harmless beside what this file keeps, and may change any other cache."""
    of_index = ("index_head_dim", "sparse_attention_config")
    groups = (
        (family.latent and read.get("kv_lora_rank") is not None, field_names.BESIDE_LATENT),
        (any(not is_off(read.config.get(key)) for key in of_index), field_names.BESIDE_INDEX),
        (family.state is not None, field_names.BESIDE_STATE),
    )
    return frozenset[str]().union(*(names for holds, names in groups if holds))


def _is_latent(read: Fields, family: Family) -> bool:
    if read.get("kv_lora_rank") is not None and not family.latent:
        raise read.fail(
            "kv_lora_rank",
            f"is not understood for model_type {quoted(family.model_type)} (understood: "
            f"{', '.join(families.latent_names())}): name --geometry=LAYERSx1xDIM with DIM half of "
            "kv_lora_rank + qk_rope_head_dim, if its engine stores the latent vector",
        )
    return family.latent and read.get("kv_lora_rank") is not None


def _latent(read: Fields, family: Family, count: int) -> list[CacheLayer]:
    """Layers of one vector per token, some with an index key beside it."""
    read.asked.add("v_head_dim")  # of the expanded heads
    _check_expanded(read)
    dim = read.integer("kv_lora_rank", high=MAX_DIM // 2)
    dim += read.integer("qk_rope_head_dim", high=MAX_DIM // 2)
    index = read.optional("index_head_dim", high=MAX_DIM) or 0
    owns = [True] * count
    if read.get("indexer_types") is not None:
        types = read.names("indexer_types", count)
        if any(name not in ("full", "shared") for name in types):
            raise read.fail("indexer_types", "must be full or shared for each layer")
        owns = [name == "full" for name in types]
    out = []
    for kind, own in zip(kinds(read, family, count), owns, strict=True):
        if kind in ("state", "nothing"):
            out.append(_without(read, family, kind))
        elif kind in ("full", "indexed"):
            out.append(
                CacheLayer(kind="latent", kv_heads=1, k_dim=dim, index_dim=index if own else 0)
            )
        else:
            raise read.fail("layer_types", f"with latent attention is not understood: {BY_HAND}")
    return out


def _check_expanded(read: Fields) -> None:
    """Raises TurboqError if the width of an expanded head is not the sum of its parts."""
    keys = ("qk_nope_head_dim", "qk_rope_head_dim", "qk_head_dim")
    nope, rope, whole = (
        None if (value := read.get(key)) is None else read.number(key, value, MAX_DIM, low=0)
        for key in keys
    )
    if nope is not None and rope is not None and whole not in (None, nope + rope):
        raise read.fail("qk_head_dim", f"is not {keys[0]}={nope} + {keys[1]}={rope}")


def _without(read: Fields, family: Family, kind: str) -> CacheLayer:
    """A layer that keeps no tokens."""
    state = 0 if kind == "nothing" else state_bytes(family.state, read)
    return CacheLayer(kind="none", state_bytes=state)


def _heads(read: Fields, family: Family, count: int) -> tuple[list[CacheLayer], str]:
    """Layers of K and V, and a note."""
    heads = read.integer("num_attention_heads", high=MAX_HEADS)
    per_layer, note = _kv_heads(read, family, heads, count)
    dim = _head_dim(read, heads)
    every, layers = kinds(read, family, count), []
    if (
        read.get("index_head_dim")
        and "indexed" not in every
        and (family.layers.get("rule") != "sparse_index")
    ):
        raise read.fail("index_head_dim", f"is not understood for this file: {BY_HAND}")
    for index, kind in enumerate(every):
        if kind in ("state", "nothing"):
            layers.append(_without(read, family, kind))
        else:
            layers.append(_layer(read, family, index, kind, per_layer[index], dim))
    return layers, note


def _head_dim(read: Fields, heads: int) -> int:
    dim = read.optional("head_dim", high=MAX_DIM)
    if dim is None:
        hidden = read.integer("hidden_size", high=2**24)
        if hidden % heads:
            raise read.fail(
                "hidden_size", f"is not a multiple of the {heads} heads, and no head_dim"
            )
        dim = read.number("hidden_size", hidden // heads, MAX_DIM)
    return dim


def _kv_heads(read: Fields, family: Family, heads: int, count: int) -> tuple[list[int], str]:
    """KV heads of every layer, and a note where the family says that all heads are KV heads."""
    key = "kv_heads_per_layer"
    if read.get(key) is not None:  # DeciLM
        return [read.number(key, value, MAX_HEADS) for value in read.names(key, count)], ""
    key = "num_key_value_heads"
    if _one_head(read, family):
        return [1] * count, ""
    if read.get("multi_query_attention") is not None:
        read.asked.add("multi_query_group_num")  # which then says nothing if the switch is off
    if read.flag("multi_query_attention"):
        key = "multi_query_group_num"
        kv_heads = read.integer(key, high=MAX_HEADS)
    else:
        kv_heads = read.optional(key, high=MAX_HEADS)
    if kv_heads is None:
        if not family.multi_head:
            raise TurboqError(
                f"{read.where}: num_key_value_heads is missing, and model_type "
                f"{quoted(family.model_type)} is not known to keep all of its {heads} heads: "
                f"{BY_HAND}"
            )
        for other in ("num_query_heads", "num_attention_heads_per_layer"):
            if not is_off(read.get(other)):
                raise read.fail(other, f"without num_key_value_heads is not understood: {BY_HAND}")
        note = f"num_key_value_heads is absent: all {heads} heads, as {family.model_type} has it"
        return [heads] * count, note
    if heads % kv_heads:
        raise read.fail(key, f"does not divide the {heads} of num_attention_heads")
    return [kv_heads] * count, ""


def _one_head(read: Fields, family: Family) -> bool:
    """Whether all query heads share one KV head."""
    kind = read.inner("attn_config").get("attn_type")
    if kind not in (None, "multihead_attention", "grouped_query_attention", "multiquery_attention"):
        raise read.fail("attn_config", f"names attn_type {quoted(kind)}, which is not understood")
    if kind == "multiquery_attention":
        return True
    if family.one_head is None:
        if read.flag("multi_query"):
            raise read.fail("multi_query", f"is not understood: {BY_HAND} (1 if all share)")
        return False
    return read.flag(family.one_head) and not read.flag("new_decoder_architecture")


def _layer(read: Fields, family: Family, index: int, kind: str, heads: int, dim: int) -> CacheLayer:
    window = None
    if kind == "sliding":
        window = _window(read)
    elif kind == "chunked":
        window = read.integer("attention_chunk_size", high=MAX_TOKENS)
    heads, dim, v_dim = _of_layer(read, family, index, kind, heads, dim)
    return CacheLayer(
        kind="full" if window is None else "sliding",
        kv_heads=heads, k_dim=dim, v_dim=v_dim, window=window,
        index_dim=read.integer("index_head_dim", high=MAX_DIM) if kind == "indexed" else 0,
        state_bytes=state_bytes(family.state, read) if kind == "both" else 0,
    )  # fmt: skip


def _window(read: Fields) -> int:
    """Tokens that a sliding layer keeps; `local_attention` counts both sides of a token."""
    if not any(read.get(key) is not None for key in WINDOWS[:2]) and read.get("local_attention"):
        return max(1, read.integer("local_attention", high=MAX_TOKENS) // 2)
    return read.integer(*WINDOWS[:2], high=MAX_TOKENS)


def _of_layer(
    read: Fields, family: Family, index: int, kind: str, heads: int, dim: int
) -> tuple[int, int, int]:
    """KV heads and head dims of K and V of one layer, where layers or their kinds differ."""
    if read.get("per_layer_config") is not None:  # says what the family's own fields would
        read.asked.update(family.own)
        own = _per_layer(read).get(index, {})
        fields = Fields({"head_dim": dim, "num_key_value_heads": heads, **own}, read.where)
        dim = fields.integer("head_dim", high=MAX_DIM)
        return fields.integer("num_key_value_heads", high=MAX_HEADS), dim, dim

    def field(key: str, high: int, default: int) -> int:
        return read.integer(key, high=high, default=default) if key in family.own else default

    v_dim = field("v_head_dim", MAX_DIM, dim)
    if kind == "sliding":  # MiMo-V2: its sliding layers have heads of their own
        heads = field("swa_num_key_value_heads", MAX_HEADS, heads)
        dim = field("swa_head_dim", MAX_DIM, dim)
        v_dim = field("swa_v_head_dim", MAX_DIM, v_dim)
    if kind == "full" and "global_head_dim" in family.own:  # Gemma 4
        dim = v_dim = field("global_head_dim", MAX_DIM, dim)
        # K and V come from one projection, but are normed and rotated apart: both are stored.
        global_heads = field("num_global_key_value_heads", MAX_HEADS, heads)
        heads = global_heads if read.flag("attention_k_eq_v") else heads
    return heads, dim, v_dim


def _per_layer(read: Fields) -> dict[int, Mapping[str, Any]]:
    """`per_layer_config` by layer; transformers pads its keys with zeros ("05")."""
    given = read.get("per_layer_config")
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


def _blocks(read: Fields, count: int) -> list[CacheLayer]:
    """Nemotron NAS: every block says how many query heads share a KV head, or has no attention."""
    heads, blocks = read.integer("num_attention_heads", high=MAX_HEADS), read.get("block_configs")
    if not isinstance(blocks, list) or len(blocks) != count:
        raise read.fail("block_configs", f"must list one block for each of the {count} layers")
    dim, out = _head_dim(read, heads), []
    for index, block in enumerate(blocks):
        own = block.get("attention") if isinstance(block, Mapping) else None
        if not isinstance(own, Mapping):
            raise read.fail("block_configs", f"has no attention (an object) for layer {index}")
        fields = Fields(own, f"{read.where}: block_configs[{index}].attention")
        for key, value in own.items():
            if key not in BLOCK_FIELDS and not is_off(value):
                raise fields.fail(key, f"is not understood: {BY_HAND}")
        if fields.flag("no_op") or fields.flag("replace_with_linear"):
            out.append(CacheLayer(kind="none"))
            continue
        group = fields.integer("n_heads_in_group", high=MAX_HEADS)
        if heads % group:
            raise fields.fail("n_heads_in_group", f"does not divide the {heads} query heads")
        window = fields.optional("window_length", high=MAX_TOKENS)
        out.append(
            CacheLayer(
                kind="full" if window is None else "sliding",
                kv_heads=heads // group, k_dim=dim, v_dim=dim, window=window,
            )
        )  # fmt: skip
    return out


def _shared(read: Fields, family: Family, layers: list[CacheLayer]) -> list[CacheLayer]:
    """Layers that read another's cache: the last ones (Gemma), or all but one of a group (CLA)."""
    count, last = len(layers), 0
    if "num_kv_shared_layers" in family.own and read.get("num_kv_shared_layers"):
        last = read.integer("num_kv_shared_layers", high=MAX_LAYERS)
        if last >= count:
            raise read.fail("num_kv_shared_layers", f"leaves none of the {count} layers a cache")
    if read.get("use_cla") is not None:
        read.asked.add("cla_share_factor")  # which then says nothing if the switch is off
    group = read.integer("cla_share_factor", high=MAX_LAYERS) if read.flag("use_cla") else 1
    shared = CacheLayer(kind="shared")
    return [shared if i >= count - last or i % group else layer for i, layer in enumerate(layers)]
