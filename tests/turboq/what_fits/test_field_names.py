"""Names of fields that may change the cache: refused wherever they stand, known ones read on."""

import json

import pytest
from transformers import CONFIG_MAPPING

from turboq.errors import TurboqError
from turboq.what_fits import field_names, from_config


def plain(model_type: str, kv: int | None = 4, **fields) -> dict:
    own = {} if kv is None else {"num_key_value_heads": kv}
    return {
        "model_type": model_type, "num_hidden_layers": 3, "num_attention_heads": 16,
        "hidden_size": 512, "head_dim": 32, **own, **fields,
    }  # fmt: skip


def mla(model_type: str, **fields) -> dict:
    return plain(model_type, None, kv_lora_rank=96, qk_rope_head_dim=32, v_head_dim=64, **fields)


OTHER = plain("other")
# Sizes of K and V, what a token or a layer keeps, what is read again: none changed the count once.
NAMES = (
    "qk_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "qk_dim", "qkv_dim", "dim_qk", "qk_size",
    "qk_proj_dim", "d_kqv", "dkv", "vo_dim", "expand_k", "expand_v", "v_proj_size", "qk_ratio",
    "v_dim_factor", "dimQK", "meta_tokens", "numMetaTokens", "lookback", "look_back",
    "num_register_tokens", "persistent_tokens", "num_virtual_tokens", "prefix_len", "prompt_length",
    "lookback_len", "past_len", "history_len", "recent_tokens", "receptive_field", "band_width",
    "keep_last", "token_budget", "token_pruning", "token_merging", "pooling_factor", "layer_stride",
    "dilation", "multiquery", "tie_layers", "layer_copies", "num_cycles", "H_cycles", "iterations",
    "passes",
    "num_layers_per_stack", "num_prelude", "use_deltanet", "retnet", "chunk_size", "chunk_length",
    "num_mem_blocks", "index_topk", "index_n_heads", "mla_use_nope",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_refused_by_name_wherever_it_stands(name):
    assert len(from_config(OTHER, "x").layers) == 3
    for fields, path in (
        ({name: 64}, name),
        ({"more": {"deep": {name: 64}}}, f"more.deep.{name}"),
        ({"more": [{}, {name: 64}]}, f"more[1].{name}"),
        ({"attn_config": {name: 64}}, f"attn_config.{name}"),
    ):
        with pytest.raises(TurboqError) as caught:
            from_config(OTHER | fields, "x")
        assert str(caught.value).startswith(f"x: config.json: {path}=64 "), fields
        assert "may change the cache" in str(caught.value)


@pytest.mark.parametrize("name", ["full_layers", "dense_layers", "blockTypes", "layer_map"])
def test_lists_of_layers_are_refused(name):
    with pytest.raises(TurboqError, match=f"{name}=.* is not understood and may change the cache"):
        from_config(OTHER | {name: [0, 2]}, "x")


HARMLESS = {
    "num_experts_top_k": 2, "moe_k": 2, "use_qk_norm": True, "qk_l2_clip_threshold": 1.0,
    "qkv_bias": True, "d_ff": 64, "tie_word_embeddings": True, "num_logits_to_keep": 1,
    "moe_layers": [0, 2], "mlp_only_layers": [1], "layer_rope_theta": [1e4, 1e4, 1e6],
    "hc_sinkhorn_iters": 3, "understand_projector_stride": 2, "anyres_pooling_size": 2,
    "vit_layers": [3, 7], "output_past": True, "spatial_merge_size": 2,
    "k_bits": 4, "vocab_size_per_layer_input": 64, "block_size": 128,
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_names_that_only_look_alike(name):
    assert from_config(OTHER | {name: HARMLESS[name]}, "x").layers == from_config(OTHER, "x").layers


def test_sizes_of_expanded_heads_beside_a_latent_vector():
    parts = {"qk_nope_head_dim": 64, "qk_head_dim": 64 + 32, "mla_use_nope": True}
    config = mla("deepseek_v3")
    plain_layers = from_config(config, "x").layers
    assert from_config(config | parts, "x").layers == plain_layers
    with pytest.raises(TurboqError) as caught:
        from_config(config | parts | {"qk_head_dim": 64}, "x")
    assert str(caught.value) == (
        "x: config.json: qk_head_dim=64 is not qk_nope_head_dim=64 + qk_rope_head_dim=32"
    )
    index = mla("deepseek_v32", index_head_dim=16)
    found = from_config(index | {"index_topk": 8, "index_n_heads": 2}, "x").layers
    assert found == from_config(index, "x").layers
    with pytest.raises(TurboqError, match="index_topk=8 is not understood"):
        from_config(config | {"index_topk": 8}, "x")


@pytest.mark.parametrize("name", ["num_query_heads", "num_attention_heads_per_layer"])
def test_query_heads_by_layer_do_not_count_kv_heads(name):
    """All heads are KV heads only if the file counts them one way."""
    heads = {name: [16, 8, 16]}
    grouped = plain("llama")
    assert from_config(grouped | heads, "x").layers == from_config(grouped, "x").layers
    with pytest.raises(TurboqError, match=f"{name}=.* without num_key_value_heads is not under"):
        from_config(plain("llama", None) | heads, "x")


# Read before the list of words grew, in files of transformers' own classes.
PUBLISHED = (
    "llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3_next", "qwen3_5_moe_text", "gemma2",
    "gemma3n", "gemma4", "gpt_oss", "cohere2", "cohere_compass", "llama4", "olmo3", "smollm3",
    "granite_swa", "minimax", "zamba", "zamba2", "falcon_h1", "jamba", "lfm2", "recurrent_gemma",
    "mpt", "dbrx", "falcon", "bloom", "deepseek_v3", "deepseek_v32", "kimi_linear", "minicpm3",
    "longcat_flash", "mistral3", "paligemma", "perception_lm", "llava_next_video", "kimi_k25",
)  # fmt: skip


@pytest.mark.parametrize("family", PUBLISHED)
def test_files_that_transformers_writes_are_read(family):
    config = CONFIG_MAPPING[family]()
    written = json.loads(config.to_json_string(use_diff=False))
    assert from_config(written, family).layers


def test_one_list_knows_a_name():
    groups = (
        field_names.READ, field_names.HARMLESS, field_names.BESIDE_LATENT,
        field_names.BESIDE_INDEX, field_names.BESIDE_STATE,
    )  # fmt: skip
    assert sum(map(len, groups)) == len(frozenset[str]().union(*groups))
