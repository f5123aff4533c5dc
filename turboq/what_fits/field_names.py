"""Names of `config.json` fields: which are read, under which other names, and which are harmless.

A field is refused if a word of its name speaks of the cache (`WORDS`) and it is neither read nor
known to be harmless by its whole name (`field_names.json`), and one that is read if the model's
layers made no use of it. What is off (null, false, 0, empty) is never refused.
"""

from __future__ import annotations

import importlib.resources
import json
import re

_LISTS: dict[str, list[str]] = json.loads(
    (importlib.resources.files("turboq.what_fits") / "field_names.json").read_text(encoding="utf-8")
)

# Field -> other names of the same thing. Two names with different values are an error.
ALIASES: dict[str, tuple[str, ...]] = {
    "num_hidden_layers": ("n_layer", "num_layers", "n_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads", "attention_heads"),
    "num_key_value_heads": (
        "num_kv_heads", "n_head_kv", "n_kv_heads", "num_query_groups", "num_attention_groups",
        "attn_config.kv_n_heads",
    ),
    "head_dim": ("attention_head_dim", "attention_head_size", "kv_channels", "d_head", "head_size"),
    "hidden_size": ("n_embd", "d_model", "n_embed"),
    "sliding_window": (
        "sliding_window_size", "attention_window_size", "attn_config.sliding_window_size",
    ),
    "index_head_dim": ("sparse_attention_config.sparse_index_dim",),
    "mamba_ssm_cache_dtype": ("mamba_ssm_dtype",),
    "kv_heads_per_layer": ("num_key_value_heads_per_layer",),
}  # fmt: skip
# In this order; they may differ (trained and extended lengths).
CONTEXT = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length",
    "max_sequence_length", "n_ctx", "max_context_length",
)  # fmt: skip

# Words of a name that may change the cache, and parts of words that have grown together (nkv).
WORDS, WORDS_OF_TEXT = frozenset(_LISTS["words"]), frozenset(_LISTS["words_of_text"])
_OF_OTHERS = frozenset(_LISTS["words_of_others"])
_STEM = re.compile("(?<!q)kv|head|window|attn|attention|sliding|cache|mamba|ssm|query")
# Sizes of K or V by their letters: d_v, dim_k, k_dim, d_qkv, qk_proj_size, expand_k (not top_k).
_LETTERS, _SIZE = "[qkvo]*[kv][qkvo]*", "dims?|sizes?|rank|channels|width|len|length|count"
_SIZED = re.compile(
    f"(?:^|_)(?:(?:d|n|num|expand|{_SIZE})_?{_LETTERS}|"
    f"{_LETTERS}(?:_?(?:ratio|factor|expand|expansion)|(?:_[a-z0-9]+)*_?(?:{_SIZE})))(?:_|$)"
)
# Lists of what each layer is or of which layers, but of experts, rotation and other parts.
_LAYERS = frozenset({"layer", "layers", "block", "blocks"})
_OTHER_LAYERS = frozenset(
    {"moe", "mlp", "expert", "experts", "ffn", "rope", "mtp", "ple", "target", *_OF_OTHERS}
)  # fmt: skip

# Containers that are read by themselves, with the names that are understood in them.
CONTAINERS: dict[str, frozenset[str]] = {
    "attn_config": frozenset({"kv_n_heads", "attn_type", "sliding_window_size"}),
    "linear_attn_config": frozenset(
        {"full_attn_layers", "kda_layers", "head_dim", "num_heads", "short_conv_kernel_size"}
    ),
    "sparse_attention_config": frozenset(
        {
            "use_sparse_attention", "sparse_attention_freq", "sparse_index_dim",
            "sparse_disable_index_value", "sparse_block_size", "sparse_topk_blocks",
            "sparse_init_block", "sparse_local_block", "sparse_num_index_heads",
            "sparse_score_type",
        }
    ),
    "block_configs": frozenset({"attention", "ffn"}),
    "per_layer_config": frozenset(),  # its keys are layers; every field is checked when read
}  # fmt: skip

# Of the layers without K and V, and of those that slide.
STATES = frozenset(
    {
        "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim",
        "linear_value_head_dim", "linear_conv_kernel_dim", "linear_head_dim", "linear_num_heads",
        "short_conv_kernel_size", "mamba_num_heads", "mamba_n_heads", "n_mamba_heads",
        "mamba_head_dim", "mamba_d_head", "mamba_headdim", "mamba_d_state", "ssm_state_size",
        "n_groups", "mamba_n_groups", "mamba_ngroups", "mamba_d_conv", "conv_kernel",
        "mamba_expand", "expand", "mamba_d_ssm", "mamba_ssm_cache_dtype", "lru_width",
        "conv1d_width", "conv_L_cache",
    }
)  # fmt: skip
# By which layers are chosen: a file that lists its layers may give them too.
CHOICES = frozenset(
    {
        "use_sliding_window", "max_window_layers", "layer_types", "layers_block_type",
        "sliding_window", "sliding_window_pattern", "_sliding_window_pattern",
        "global_attn_every_n_layers", "attention_chunk_size", "no_rope_layers",
        "no_rope_layer_interval", "hybrid_override_pattern", "hybrid_layer_pattern",
        "attn_layer_period", "attn_layer_offset", "attn_layer_indices", "attn_type_list",
        "full_attn_idxs", "layer_group_size", "full_attention_interval", "block_types",
        "_block_types", "attention_layers", "attention_types", "window_size", "local_attention",
    }
)  # fmt: skip
# Not refused where nothing asks for them: another field says what they would, or they say nothing
# of the cache by themselves.
QUIET = frozenset(
    {
        *CONTEXT, "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
        "max_window_layers", "no_rope_layers", "no_rope_layer_interval", "mamba_ssm_cache_dtype",
    }
)  # fmt: skip
READ = frozenset(
    {
        *ALIASES, *(name for names in ALIASES.values() for name in names), *CONTEXT, *CONTAINERS,
        *STATES, *CHOICES, "kv_lora_rank", "qk_rope_head_dim", "v_head_dim", "use_mla",
        "index_head_dim", "indexer_types", "num_kv_shared_layers", "use_cla", "cla_share_factor",
        "global_head_dim", "num_global_key_value_heads", "attention_k_eq_v", "swa_head_dim",
        "swa_v_head_dim", "swa_num_key_value_heads", "multi_query", "multi_query_attention",
        "multi_query_group_num", "new_decoder_architecture", "use_bidirectional_attention",
    }
)  # fmt: skip
# Names that speak of the cache inside an object that is otherwise harmless.
READ_WITHIN = frozenset(name.rpartition(".")[2] for name in READ) - {
    *CONTEXT, "hidden_size", *ALIASES["hidden_size"],
}  # fmt: skip

HARMLESS = frozenset(_LISTS["harmless"])
# Harmless only in a file that has a latent vector, index keys, or layers that keep a state.
BESIDE_LATENT = frozenset(_LISTS["beside_latent"])
BESIDE_INDEX, BESIDE_STATE = frozenset(_LISTS["beside_index"]), frozenset(_LISTS["beside_state"])
_TOKEN = re.compile(r"\w+_token_(?:id|index)")  # as of an image
# Harmless objects whose keys are anything: labels, names of tasks, layers by number.
FREE = frozenset({"auto_map", "id2label", "label2id", "pruned_heads", "task_specific_params"})
# Harmless beside the parts of a multimodal file: they describe other parts.
OTHER_PARTS = frozenset(_LISTS["other_parts"])

_HEADS, _WITHIN = frozenset(_LISTS["heads"]), frozenset(_LISTS["within"])
GGUF_HARMLESS = frozenset(_LISTS["gguf_harmless"])


def speaks(name: str) -> bool:
    """Whether a word of `name` (parted by underscores or capitals) may speak of the cache."""
    words = _parted(name)
    sized = _SIZED.search("_".join(words))
    own = _OF_OTHERS.isdisjoint(words) and not WORDS_OF_TEXT.isdisjoint(words)
    return own or bool(sized) or not WORDS.isdisjoint(words) or any(map(_STEM.search, words))


def lists_layers(name: str, value: object) -> bool:
    """Whether it is a list of layers, by which they may be chosen."""
    words = set(_parted(name))
    named = isinstance(value, list) and words & _LAYERS and not words & _OTHER_LAYERS
    return bool(named) and not any(isinstance(x, list | dict) for x in value)  # pyright: ignore


def speaks_within(name: str) -> bool:
    """The same inside an object that is otherwise harmless; paths of modules speak of none."""
    if "." in name or name in _WITHIN:
        return False
    return name in READ_WITHIN or not _HEADS.isdisjoint(_parted(name))


def is_harmless(name: str) -> bool:
    """Whether a field does not change the cache, whatever its words."""
    return name in HARMLESS or _TOKEN.fullmatch(name) is not None


def _parted(name: str) -> list[str]:
    """Words of a name, parted by underscores or capitals."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_")


def main_name(name: str) -> str:
    """The field that `name` is another name of, else `name`."""
    return next((field for field, names in ALIASES.items() if name in names), name)


def aliases_of(field: str) -> tuple[str, ...]:
    """`field` and its other names."""
    return (field, *ALIASES.get(field, ()))
