"""Configurations whose cache is not what the plain fields say: one small file per kind.

Expected bytes per token (16 bits) are products written out: layers x KV heads x (K + V) x 2.
"""

import pytest

from turboq.errors import TurboqError
from turboq.what_fits import formula, from_config, head_bits

F16 = head_bits("f16", "f16")


def per_token(config: dict) -> int:
    return formula(from_config(config, "x"), F16).bits_per_token // 8


def growing(config: dict) -> int:
    """Bytes of one more token once all windows are full."""
    return formula(from_config(config, "x"), F16).growing_bits // 8


def plain(model_type: str, layers: int, heads: int, kv: int | None, dim: int, **fields) -> dict:
    own = {} if kv is None else {"num_key_value_heads": kv}
    return {
        "model_type": model_type, "num_hidden_layers": layers, "num_attention_heads": heads,
        "hidden_size": heads * dim, "head_dim": dim, **own, **fields,
    }  # fmt: skip


def old(model_type: str, **fields) -> dict:
    """A file of the older names."""
    return {"model_type": model_type, **fields}


HEADS = {
    "nested KV heads": (
        old("dbrx", d_model=512, n_heads=16, n_layers=3, attn_config={"kv_n_heads": 4}),
        3 * 4 * (32 + 32) * 2,
    ),
    "grouped MPT": (
        old("mpt", d_model=512, n_heads=16, n_layers=3,
            attn_config={"attn_type": "grouped_query_attention", "kv_n_heads": 2,
                         "attn_impl": "flash", "sliding_window_size": -1}),
        3 * 2 * (32 + 32) * 2,
    ),
    "multi-head MPT": (
        old("mpt", d_model=512, n_heads=16, n_layers=3,
            attn_config={"attn_type": "multihead_attention", "alibi": True}),
        3 * 16 * (32 + 32) * 2,
    ),
    "one head for all, MPT": (
        old("mpt", d_model=512, n_heads=16, n_layers=3,
            attn_config={"attn_type": "multiquery_attention"}),
        3 * 1 * (32 + 32) * 2,
    ),
    "blocks with groups and without attention": (
        plain("nemotron-nas", 4, 16, None, 32, num_key_value_heads=None, block_configs=[
            {"attention": {"n_heads_in_group": 4, "no_op": False}, "ffn": {"no_op": True}},
            {"attention": {"n_heads_in_group": None, "no_op": True}},
            {"attention": {"n_heads_in_group": 8}},
            {"attention": {"n_heads_in_group": None, "replace_with_linear": True}},
        ]),
        (4 + 2) * (32 + 32) * 2,
    ),
    "KV heads by layer": (
        plain("deci", 3, 16, None, 32, num_key_value_heads_per_layer=[4, 1, 2]),
        (4 + 1 + 2) * (32 + 32) * 2,
    ),
    "attention groups": (plain("step3_text", 3, 16, None, 32, num_attention_groups=1), 3 * 64 * 2),
    "query groups": (plain("other", 3, 16, None, 32, num_query_groups=2), 3 * 2 * 64 * 2),
    "ChatGLM groups": (
        old("chatglm", num_layers=3, hidden_size=512, num_attention_heads=16, kv_channels=32,
            multi_query_attention=True, multi_query_group_num=2, seq_length=8192),
        3 * 2 * (32 + 32) * 2,
    ),
    "ChatGLM of all heads": (
        old("chatglm", num_layers=3, hidden_size=512, num_attention_heads=16,
            multi_query_attention=False, multi_query_group_num=2),
        3 * 16 * (32 + 32) * 2,
    ),
    "Falcon 7B": (
        old("falcon", num_hidden_layers=3, hidden_size=512, num_attention_heads=16,
            multi_query=True, num_kv_heads=16),
        3 * 1 * (32 + 32) * 2,
    ),
    "Falcon's default is one head": (
        old("falcon", num_hidden_layers=3, hidden_size=512, num_attention_heads=16), 3 * 64 * 2,
    ),
    "Falcon 40B": (
        old("falcon", num_hidden_layers=3, hidden_size=512, num_attention_heads=16,
            multi_query=True, num_kv_heads=8, new_decoder_architecture=True),
        3 * 8 * (32 + 32) * 2,
    ),
    "Falcon RW": (
        old("falcon", num_hidden_layers=3, hidden_size=512, num_attention_heads=16,
            multi_query=False),
        3 * 16 * (32 + 32) * 2,
    ),
    "StarCoder": (
        old("gpt_bigcode", n_layer=3, n_embd=512, n_head=16, multi_query=True), 3 * 64 * 2,
    ),
    "Bloom's names": (
        old("bloom", n_layer=3, n_embed=512, num_attention_heads=16), 3 * 16 * (32 + 32) * 2,
    ),
    "null means all heads in Llama": (
        plain("llama", 3, 16, None, 32, num_key_value_heads=None), 3 * 16 * (32 + 32) * 2,
    ),
    "V narrower than K": (plain("mimo_v2_flash", 3, 16, 4, 48, v_head_dim=32,
        layer_types=["full_attention"] * 3), 3 * 4 * (48 + 32) * 2),
    "sliding layers with heads of their own": (
        plain("mimo_v2_flash", 3, 16, 4, 48, v_head_dim=32, swa_num_key_value_heads=8,
              hybrid_layer_pattern=[0, 1, 1], sliding_window=128, sliding_window_size=128),
        (4 + 2 * 8) * (48 + 32) * 2,
    ),
    "heads described but not used (use_mla false)": (
        plain("hunyuan_v1_moe", 3, 16, 4, 32, use_mla=False, kv_lora_rank=512, v_head_dim=128,
              qk_rope_head_dim=64, attention_head_dim=32, cla_share_factor=2, use_cla=False),
        3 * 4 * (32 + 32) * 2,
    ),
    "every second layer reads the one before (CLA)": (
        plain("hunyuan_v1_moe", 4, 16, 4, 32, cla_share_factor=2, use_cla=True),
        2 * 4 * (32 + 32) * 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_bytes_per_token(name):
    config, expected = HEADS[name]
    assert per_token(config) == expected


# (file, all layers, layers that keep every token), each of 4 KV heads of 32 + 32 numbers: 512 bytes
LAYER = 4 * (32 + 32) * 2
LAYERS = {
    "every fifth is full, and a short last group": (
        plain("bailing_moe_linear", 12, 16, 4, 32, layer_group_size=5), 2 + 2, 2 + 2,
    ),
    "every fourth is full, the others slide": (
        plain("olmo3", 8, 16, 4, 32, sliding_window=64), 8, 2,
    ),
    "no window": (plain("olmo3", 8, 16, 4, 32, sliding_window=None), 8, 8),
    "letters": (
        plain("exaone4", 8, 16, 4, 32, sliding_window=64, sliding_window_pattern="LLLG"), 8, 2,
    ),
    "AFMoE's name of the pattern": (
        plain("afmoe", 8, 16, 4, 32, sliding_window=64, global_attn_every_n_layers=2), 8, 4,
    ),
    "two names of one window": (
        plain("gemma2", 8, 16, 4, 32, sliding_window=64, sliding_window_size=64), 8, 4,
    ),
    "full layers by number": (
        plain("lfm2", 8, 16, 4, 32, full_attn_idxs=[2, 5], conv_L_cache=3), 2, 2,
    ),
    "attention layers by number": (
        plain("bamba", 8, 16, 4, 32, attn_layer_indices=[2, 5, 7]), 3, 3,
    ),
    "one and zero": (plain("minimax_m1", 4, 16, 4, 32, attn_type_list=[0, 0, 0, 1]), 1, 1),
    "all ones": (plain("minimax_m2", 3, 16, 4, 32, attn_type_list=[1, 1, 1]), 3, 3),
    "a repeated block, one in three attends within a window": (
        plain("recurrent_gemma", 6, 16, 4, 32, attention_window_size=64,
              _block_types=["recurrent", "recurrent", "attention"], lru_width=512,
              conv1d_width=4),
        2, 0,
    ),
    "global and local in turn": (
        old("gpt_neo", num_layers=4, num_heads=4, hidden_size=128, window_size=64,
            attention_types=[[["global", "local"], 2]]),
        4, 2,
    ),
    "attention and state in every layer": (
        plain("falcon_h1", 3, 16, 4, 32, lm_head_multiplier=0.02, key_multiplier=0.1), 3, 3,
    ),
    "chunks": (
        plain("llama4_text", 4, 16, 4, 32, attention_chunk_size=64, no_rope_layers=[1, 1, 1, 0],
              for_llm_compressor=True),
        4, 1,
    ),
    "letters of Nemotron-H": (
        plain("nemotron_h", 6, 16, 4, 32, hybrid_override_pattern="ME*-M*",
              mamba_ssm_cache_dtype="float32"),
        2, 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_which_layers_keep_what(name):
    config, every, full = LAYERS[name]
    assert (per_token(config), growing(config)) == (every * LAYER, full * LAYER)


def test_an_alias_that_a_default_does_not_overrule():
    """MiMo's class has a window of 129 and heads of 192: a file's own names of them come first."""
    config = plain("mimo_v2_flash", 4, 16, 4, 32, sliding_window_size=64, v_head_dim=32)
    del config["head_dim"]
    found = from_config(config | {"attention_head_dim": 48}, "x")
    assert [(x.k_dim, x.window) for x in found.layers] == [(48, None), *[(48, 64)] * 3]


def nested(**text) -> dict:
    return {"model_type": "llava", "vision_config": {"num_attention_heads": 3}, "text_config": text}


def test_a_nested_part_leaves_out_what_its_class_has():
    """Pixtral's text_config names no query heads; LLaVA 1.5's no size at all (Llama's are 32)."""
    found = from_config(nested(model_type="mistral", num_hidden_layers=5, head_dim=128), "x")
    assert [(x.kv_heads, x.k_dim, x.window) for x in found.layers] == [(8, 128, 4096)] * 5
    assert "sliding_window is absent: 4,096" in found.note
    assert per_token(nested(model_type="llama")) == 32 * 32 * (128 + 128) * 2


def test_a_flat_file_beside_its_own_nested_part():
    text = {"num_key_value_heads": 4, "hidden_size": 512}
    both = plain("qwen2_vl", 3, 16, 4, 32, text_config=text)
    assert per_token(both) == 3 * LAYER
    with pytest.raises(TurboqError, match=r"=4 and text_config.num_key_value_heads=2 are at odds"):
        per_token(both | {"text_config": text | {"num_key_value_heads": 2}})


# MLA: one vector of kv_lora_rank + qk_rope_head_dim numbers per layer, index keys beside it.
def mla(model_type: str, layers: int, **fields) -> dict:
    return {
        "model_type": model_type, "num_hidden_layers": layers, "num_attention_heads": 16,
        "hidden_size": 512, "kv_lora_rank": 96, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64,
        "v_head_dim": 64, "head_dim": 72, **fields,
    }  # fmt: skip


LATENT = {
    "plain": (mla("minicpm3", 3), 3 * (96 + 32) * 2),
    "Mistral's": (mla("mistral4", 3), 3 * (96 + 32) * 2),
    "an index key per layer": (
        mla("deepseek_v32", 3, index_head_dim=40, index_n_heads=64, index_topk=2048),
        3 * (96 + 32 + 40) * 2,
    ),
    "index keys of some layers": (
        mla("glm_moe_dsa", 3, index_head_dim=40, indexer_types=["full", "shared", "shared"]),
        (3 * (96 + 32) + 40) * 2,
    ),
    "two modules per layer": (
        {k: v for k, v in mla("longcat_flash", 3, num_layers=3, attention_method="MLA",
                              mla_scale_kv_lora=True).items() if k != "num_hidden_layers"},
        2 * 3 * (96 + 32) * 2,
    ),
    "layers counted from 1": (
        mla("kimi_linear", 4, mla_use_nope=True, linear_attn_config={
            "full_attn_layers": [4], "kda_layers": [1, 2, 3], "head_dim": 128, "num_heads": 2,
            "short_conv_kernel_size": 4}),
        1 * (96 + 32) * 2,
    ),
    "every third": (mla("bailing_hybrid", 6, layer_group_size=3), 2 * (96 + 32) * 2),
}  # fmt: skip


@pytest.mark.parametrize("name", LATENT)
def test_latent_attention(name):
    config, expected = LATENT[name]
    assert per_token(config) == expected


def test_published_sparse_index_caches():
    """DeepSeek-V3.2 has 61 layers, GLM-5.1 78: 512 + 64 and an index key of 128."""
    published = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_head_dim": 128}
    assert per_token(mla("deepseek_v32", 61, **published)) == 61 * (576 + 128) * 2 == 85888
    assert per_token(mla("glm_moe_dsa", 78, **published)) == 78 * (576 + 128) * 2 == 109824


def test_index_keys_beside_k_and_v():
    """MiniMax-M3: sparse layers keep one index key of 40 numbers for all heads."""
    sparse = {
        "use_sparse_attention": True, "sparse_attention_freq": [0, 1, 1], "sparse_index_dim": 40,
        "sparse_disable_index_value": [0, 1, 1], "sparse_num_index_heads": 4,
    }  # fmt: skip
    config = plain("minimax_m3", 3, 16, 4, 32, sparse_attention_config=sparse)
    assert per_token(config) == 3 * LAYER + 2 * 40 * 2
    types = ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"]
    flat = plain("minimax_m3_vl_text", 3, 16, 4, 32, index_head_dim=40, layer_types=types)
    assert from_config(flat, "x").layers == from_config(config, "x").layers
    off = config | {"sparse_attention_config": sparse | {"use_sparse_attention": False}}
    assert per_token(off) == 3 * LAYER
    q8 = formula(from_config(flat | {"index_head_dim": 64}, "x"), head_bits("q8_0", "q8_0"))
    # K and V of 4 heads in blocks of 32 (34 bytes), 2 index keys of 64 alike.
    assert q8.bits_per_token == 8 * (3 * 4 * 2 * 34 + 2 * 2 * 34)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attn_config": {"kv_magic": 2}}, "attn_config.kv_magic=2 is not understood"),
        ({"attn_config": {"attn_type": "odd"}}, "names attn_type 'odd'"),
        ({"extra": {"deep": {"num_key_value_heads": 2}}}, "extra.deep.num_key_value_heads=2 is"),
        ({"blocks": [{}, {"window": 9}]}, r"blocks.1..window=9 is not understood"),
        ({"attn_config": {"kv_n_heads": 8}}, "num_key_value_heads=4 and attn_config.kv_n_heads=8"),
        ({"head_dim": 32, "attention_head_dim": 64}, "head_dim=32 and attention_head_dim=64 are"),
        ({"num_key_value_heads": None}, "is not known to keep all of its 16 heads"),
        ({"layer_group_size": 5}, "layer_group_size=5 is not understood for model_type 'other'"),
        ({"full_attention_interval": 4}, "full_attention_interval=4 is not understood for"),
        ({"attn_layer_period": 8}, "attn_layer_period=8 is not understood for"),
        ({"attention_chunk_size": 64}, "attention_chunk_size=64 is not understood for"),
        ({"attn_type_list": [0, 2, 1]}, "attn_type_list=.0, 2, 1. must be 0 or 1 for each"),
        ({"full_attn_idxs": [3]}, "full_attn_idxs=.3. must list layers of 0..2"),
        ({"use_bidirectional_attention": True}, "is an encoder"),
        ({"block_configs": [{}] * 3}, "has no attention .* for layer 0"),
        ({"block_configs": [{"attention": {"num_sink_tokens": 4}}] * 3}, "num_sink_tokens=4 is"),
        ({"block_configs": [{"attention": {"n_heads_in_group": 3}}] * 3}, "=3 does not divide"),
        ({"kv_lora_rank": 512}, "kv_lora_rank=512 is not understood .*LAYERSx1xDIM with DIM half"),
        ({"mamba_magic": 3}, "mamba_magic=3 is not understood"),
        ({"numKvHeads": 2}, "numKvHeads=2 is not understood"),
        ({"slidingWindow": 64}, "slidingWindow=64 is not understood"),
        ({"n_kvheads": 2}, "n_kvheads=2 is not understood"),
        ({"nkv": 2}, "nkv=2 is not understood"),
        ({"extra": [[{"num_key_value_heads": 2}]]}, r"extra.0..0..num_key_value_heads=2 is not"),
        ({"ffn_config": {"kv_n_heads": 2}}, "ffn_config.kv_n_heads=2 is not understood"),
        ({"rope_scaling": {"sliding_window": 9}}, "rope_scaling.sliding_window=9 is not"),
        ({"compression_config": {"a": [{"head_dim": 9}]}}, r"config.a.0..head_dim=9 is not"),
        ({"generation_config": {"num_kv_heads": 1}}, "generation_config.num_kv_heads=1 is not"),
        ({"use_sliding_window": True}, "use_sliding_window=True without sliding_window"),
        ({"quantization_config": {"kv_heads": 2}}, "quantization_config.kv_heads=2 is not"),
        ({"quantization_config": {"a": [{"mla": 2}]}}, r"quantization_config.a.0..mla=2 is not"),
        ({"generation_config": {"latentDim": 64}}, "generation_config.latentDim=64 is not"),
        ({"yoco": True}, "yoco=True is not understood"),
        ({"d_v": 64}, "d_v=64 is not understood"),
        ({"extra": {"dimK": 64}}, "extra.dimK=64 is not understood"),
        ({"v_channels": 64}, "v_channels=64 is not understood"),
        ({"total_ut_steps": 4}, "total_ut_steps=4 is not understood"),
        ({"num_loops": 2}, "num_loops=2 is not understood"),
        ({"reuse_from": 1}, "reuse_from=1 is not understood"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_by_name(change, words):
    config = plain("other", 3, 16, 4, 32)
    assert per_token(config) == 3 * LAYER
    with pytest.raises(TurboqError, match=words):
        per_token(config | change)


# Known fields, of layers that these models do not have.
UNUSED = {
    "mamba_d_state": 128, "ssm_state_size": 128, "linear_num_key_heads": 4, "lru_width": 64,
    "conv_L_cache": 3, "n_groups": 2, "short_conv_kernel_size": 4, "swa_head_dim": 16,
    "swa_num_key_value_heads": 2, "v_head_dim": 16, "num_kv_shared_layers": 2,
    "global_head_dim": 64, "num_global_key_value_heads": 2, "attention_k_eq_v": True,
    "cla_share_factor": 2, "multi_query_group_num": 2,
}  # fmt: skip


@pytest.mark.parametrize("family", ["other", "llama", "phi4flash", "gemma2"])
@pytest.mark.parametrize("field", UNUSED)
def test_fields_of_layers_that_the_model_does_not_have(family, field):
    config = plain(family, 4, 16, 4, 32, sliding_window=None)
    assert per_token(config) == 4 * LAYER
    with pytest.raises(TurboqError, match=f"{field}={UNUSED[field]} may change the cache, and is"):
        per_token(config | {field: UNUSED[field]})


@pytest.mark.parametrize(
    "config",
    [
        # Granite 4 micro has no Mamba layer, and its file describes one.
        plain("granitemoehybrid", 3, 16, 4, 32, layer_types=["attention"] * 3, mamba_d_state=128),
        plain("qwen3", 3, 16, 4, 32, sliding_window=64, max_window_layers=1,
              use_sliding_window=False),
        plain("other", 3, 16, 4, 32, layer_types=["full_attention"] * 3, sliding_window=64,
              sliding_window_pattern=6),
    ],
)  # fmt: skip
def test_fields_that_another_one_makes_idle(config):
    assert per_token(config) == 3 * LAYER


def test_a_field_beside_the_language_model():
    config = nested(model_type="llama") | {"projector_config": {"num_heads": 4}}
    assert per_token(config) > 0
    with pytest.raises(TurboqError, match="kv_share_rate=2 is not understood"):
        per_token(config | {"kv_share_rate": 2})


def test_no_advice_to_leave_fields_out():
    """Without the field the count would be of all heads: eight and sixteen times too much."""
    for change in ({"kv_groups": 2}, {"attn_types": [0, 1, 0]}, {"multi_query": True}):
        with pytest.raises(TurboqError, match="name --geometry=LAYERSxKVHEADSxDIM") as caught:
            per_token(plain("other", 3, 16, 4, 32, **change))
        assert "remove" not in str(caught.value)


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert", "deberta-v2"])
def test_encoders_keep_no_cache(family):
    with pytest.raises(TurboqError, match=f"'{family}' is an encoder"):
        per_token(plain(family, 3, 16, None, 32))


def test_a_prompt_read_both_ways_is_kept():
    """PaliGemma attends to its prompt both ways, and to what it writes as a decoder does."""
    text = plain("gemma", 3, 16, 4, 32, use_bidirectional_attention=True)
    assert per_token(nested(**text) | {"model_type": "paligemma"}) == 3 * LAYER
    with pytest.raises(TurboqError, match="is an encoder"):
        per_token(nested(**text))


@pytest.mark.parametrize("family", ["t5", "bart", "whisper", "t5gemma2"])
def test_encoders_with_a_decoder_are_refused(family):
    with pytest.raises(TurboqError, match=f"'{family}' is an encoder with a decoder: .* alone$"):
        per_token({"model_type": family})


@pytest.mark.parametrize("part", [{}, nested(model_type="other")])
def test_encoders_with_a_decoder_by_their_own_word(part):
    """A file's own word counts, beside the language model's part or in it."""
    config = part or plain("other", 3, 16, 4, 32)
    inside = nested(**plain("other", 3, 16, 4, 32), is_encoder_decoder=True)
    for said in (config | {"is_encoder_decoder": True}, inside):
        with pytest.raises(TurboqError, match="is an encoder with a decoder"):
            per_token(said)


def test_parts_that_see_or_hear_keep_no_cache():
    for family in ("dia_encoder", "other_vision_model"):
        with pytest.raises(TurboqError, match=f"'{family}' is an encoder, which"):
            per_token(plain(family, 3, 16, 4, 32))


HARMLESS = {
    "lm_head_multiplier": 0.02, "mamba_ssm_cache_dtype": "float32",
    "cache_implementation": "hybrid",
    "num_local_experts": 8, "n_shared_experts": 2, "moe_layer_freq": [0, 1, 1], "n_group": 8,
    "attention_bias": True, "attn_logit_softcapping": 50.0, "num_nextn_predict_layers": 1,
    "for_llm_compressor": True, "shared_intermediate_size": 64, "attention_multiplier": 0.02,
    "quantization_config": {
        "kv_cache_scheme": {"num_bits": 8}, "group_size": 128, "lm_head": False, "head_bits": 6,
        "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": None}},
        "extra_config": {"model.layers.0.self_attn.k_proj": {"bits": 8}},
        "sparsity_config": {"sparsity_structure": "dense", "global_sparsity": 0.1},
    },
    "rope_scaling": {"type": "yarn", "attention_factor": 1.0}, "use_qkv_bias": True,
    "rope_parameters": {"sliding_attention": {"rope_theta": 1e4}, "full_attention": {}},
    "num_experts_top_k": 2, "moe_k": 2, "video_token_index": 7, "no_repeat_ngram_size": 3,
    "id2label": {"0": "head"}, "task_specific_params": {"window": {"max_length": 9}},
    "auto_map": {"AutoConfig": "x.y"}, "query_pre_attn_scalar": 256,
}  # fmt: skip


@pytest.mark.parametrize("field", HARMLESS)
def test_harmless_fields_are_known(field):
    assert per_token(plain("other", 3, 16, 4, 32, **{field: HARMLESS[field]})) == 3 * LAYER
