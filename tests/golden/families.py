"""The golden checkpoints as data: what `generate.py` builds, and what it captures."""

from __future__ import annotations

import torch

BASE = {
    "hidden_size": 32,
    "intermediate_size": 28,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 96,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def rope(kind: str = "default", theta: float = 10000.0, **fields) -> dict:
    return {"rope_type": kind, "rope_theta": theta, **fields}


LLAMA3 = rope(
    "llama3",
    50000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=128,
)
LONGROPE = rope(
    "longrope",
    partial_rotary_factor=0.75,  # 6 pairs
    short_factor=[1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
    long_factor=[1.0, 2.0, 4.0, 6.0, 8.0, 9.0],
)
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
GPT_OSS = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 32,  # and hidden_size: whole blocks of MXFP4
    "num_hidden_layers": 3,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "sliding_window": 5,
}
BY_LAYER = {
    "full_attention": rope("linear", 50000.0, factor=4.0),
    "sliding_attention": rope(theta=10000.0),
}
GEMMA = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 20,
    "query_pre_attn_scalar": 8,  # head_dim: a GGUF file cannot say another
    "sliding_window": 5,
    "tie_word_embeddings": True,
}
GEMMA4 = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "global_head_dim": 16,
    "intermediate_size": 20,
    "sliding_window": 5,
    "tie_word_embeddings": True,
    "vocab_size_per_layer_input": 96,
    "pad_token_id": 1,
}
GLM = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,  # 8 rotated channels
    "intermediate_size": 20,
    "pad_token_id": 1,
    "rope_parameters": rope(partial_rotary_factor=0.5),
}
MOE = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 20,
    "moe_intermediate_size": 12,
    "num_experts_per_tok": 2,
}
HYBRID = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,  # 4 rotated channels
    "intermediate_size": 20,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 4,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 10,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 6,
    "v_head_dim": 10,
    "rms_norm_eps": 1e-5,  # latent norms have another
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 12,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "rope_parameters": rope("yarn", mscale=1.4, mscale_all_dim=0.7, **YARN),
}
ONE = {"num_hidden_layers": 1, "first_k_dense_replace": 0}
SEEING = {  # of Qwen3.5
    "hidden_size": 8,
    "intermediate_size": 8,
    "depth": 1,
    "num_heads": 1,
    "out_hidden_size": 32,
    "patch_size": 4,
    "num_position_embeddings": 4,
}
VISION = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 8,
    "patch_size": 4,
}
VISION4 = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "patch_size": 4,
    "position_embedding_size": 4,
}
WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.125,
    "logits_scaling": 2.5,
    "tie_word_embeddings": True,
}
GRANITE_HYBRID = GRANITE | {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "attention_bias": True,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 6,
    "mamba_n_groups": 2,
}
ARCHITECTURES = {
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "glm4_moe": "glm4moe",
    "gemma3_text": "gemma3",
    "glm": "chatglm",
    "ministral3": "mistral3",
    "gemma4_text": "gemma4",
    "granitemoehybrid": "granitehybrid",
    "gpt_oss": "gpt-oss",
    "olmo3": "olmo2",
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_5_moe_text": "qwen35moe",
    "qwen3_5_text": "qwen35",
    "qwen3_moe": "qwen3moe",
    "qwen3_next": "qwen3next",
}  # model type -> GGUF's, where they differ
# name -> (model type, settings, stored type, shard size, GGUF type, tokenizer kind)
FAMILIES = {
    "llama": ("llama", {"num_key_value_heads": 4}, torch.float32, None, None, None),
    "llama3": (
        "llama",
        {"vocab_size": 320, "tie_word_embeddings": True, "rope_parameters": LLAMA3, "head_dim": 16},
        torch.bfloat16,
        None,
        "BF16",
        "llama-bpe",
    ),
    "llama_bias": (
        "llama",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 6,
            "rope_parameters": rope("linear", factor=2.5),
        },
        torch.bfloat16,
        None,
        None,
        None,
    ),
    "smollm2": (
        "llama",
        {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 36,
         "tie_word_embeddings": True, "rope_parameters": rope(theta=100000.0)},
        torch.float16, None, None, None,
    ),
    "mistral": (
        "mistral",
        {"sliding_window": 6, "head_dim": 16, "num_attention_heads": 3, "num_key_value_heads": 1,
         "hidden_size": 33},
        torch.bfloat16, None, None, None,
    ),
    "mistral3": (
        "mistral3",
        {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 20,
         "sliding_window": None},
        torch.bfloat16, None, None, None,
    ),
    "ministral": (
        "ministral",
        {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 20,
         "head_dim": 16, "sliding_window": 5,
         "layer_types": ["sliding_attention", "full_attention"]},
        torch.bfloat16, None, None, None,
    ),
    "ministral3": (
        "ministral3",
        {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 20,
         "head_dim": 16, "rope_parameters": rope("yarn", 1e6, mscale=1.0, mscale_all_dim=1.0,
                                 factor=4.0, original_max_position_embeddings=8,
                                 llama_4_scaling_beta=0.3)},
        torch.bfloat16, None, "BF16", None,
    ),
    "qwen2": (
        "qwen2",
        {"vocab_size": 320, "tie_word_embeddings": True, "rope_parameters": rope(theta=1e6)},
        torch.float16, None, "F16", "qwen2",
    ),
    "qwen2_window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1,
         "num_hidden_layers": 3, "intermediate_size": 24},
        torch.bfloat16, None, None, None,
    ),
    "qwen3": ("qwen3", {"head_dim": 12, "rope_parameters": rope(theta=1e6)},
              torch.bfloat16, "20KB", "BF16", None),
    "mixtral": (
        "mixtral",
        MOE | {"num_local_experts": 4, "intermediate_size": 12},
        torch.bfloat16, None, "BF16", None,
    ),
    "qwen2_moe": (
        "qwen2_moe",
        MOE | {"num_experts": 5, "shared_expert_intermediate_size": 10, "mlp_only_layers": [1],
               "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 5,
               "max_window_layers": 1},
        torch.bfloat16, None, None, None,
    ),
    "qwen2_moe_all": (
        "qwen2_moe",
        MOE | {"num_experts": 4, "shared_expert_intermediate_size": 10},
        torch.bfloat16, None, "BF16", None,
    ),
    "qwen3_moe": (
        "qwen3_moe",
        MOE | {"num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True, "head_dim": 8},
        torch.bfloat16, None, "BF16", None,
    ),
    "olmo3": (
        "olmo3",
        {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 20,
         "num_hidden_layers": 5, "sliding_window": 5,
         "rope_parameters": {"full_attention": rope("yarn", 5e5, **YARN),
                             "sliding_attention": rope(theta=5e5)}},
        torch.bfloat16, None, "BF16", None,
    ),
    "qwen3_dynamic": (
        "qwen3",
        {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16,
         "head_dim": 8, "rope_parameters": rope("dynamic", factor=2.0)},
        torch.bfloat16, None, None, None,
    ),
    "cohere2": (
        "cohere2",
        {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 20,
         "num_hidden_layers": 5, "sliding_window": 5, "logit_scale": 0.5, "pad_token_id": 1,
         "attention_bias": True, "tie_word_embeddings": True},
        torch.bfloat16, None, "BF16", None,
    ),
    "gpt_oss": (
        "gpt_oss",
        GPT_OSS | {"rope_parameters": rope("yarn", 150000.0, truncate=False, **YARN)},
        torch.bfloat16, None, None, None,
    ),
    "gpt_oss_mxfp4": (
        "gpt_oss",
        GPT_OSS | {"num_hidden_layers": 2,
                   "rope_parameters": rope("yarn", 150000.0, truncate=True, **YARN)},
        torch.bfloat16, None, "BF16", None,
    ),
    "qwen3_next": (
        "qwen3_next",
        HYBRID | MOE | {"num_experts": 4, "shared_expert_intermediate_size": 10,
                        "mlp_only_layers": [2]},
        torch.bfloat16, None, None, None,
    ),
    "qwen3_next_all": (
        "qwen3_next",
        HYBRID | MOE | {"num_experts": 3, "shared_expert_intermediate_size": 10,
                        "num_hidden_layers": 2, "layer_types": HYBRID["layer_types"][:2]},
        torch.bfloat16, None, "BF16", None,
    ),
    "qwen3_5": ("qwen3_5_text", HYBRID, torch.bfloat16, None, "BF16", None),
    "qwen3_5_moe": (
        "qwen3_5_moe_text",
        HYBRID | MOE | {"num_experts": 3, "shared_expert_intermediate_size": 10,
                        "num_hidden_layers": 2, "layer_types": HYBRID["layer_types"][:2]},
        torch.bfloat16, None, "BF16", None,
    ),
    "qwen3_5_vision": (
        "qwen3_5_moe",
        HYBRID | MOE | {"num_experts": 3, "shared_expert_intermediate_size": 10,
                        "num_hidden_layers": 2, "layer_types": HYBRID["layer_types"][:2]},
        torch.bfloat16, None, None, None,
    ),
    "deepseek_v2": (
        "deepseek_v2",
        MLA | ONE | {"topk_method": "group_limited_greedy", "n_shared_experts": 2},
        torch.bfloat16, None, None, None,
    ),
    "deepseek_v2_lite": (
        "deepseek_v2",
        MLA | ONE | {"topk_method": "greedy", "n_shared_experts": 1, "q_lora_rank": None,
                     "rms_norm_eps": 1e-6, "rope_parameters": rope()},
        torch.bfloat16, None, "BF16", None,
    ),
    "deepseek_v3": (
        "deepseek_v3",
        MLA | {"rms_norm_eps": 1e-6,  # all that a GGUF file can say: one epsilon, one factor
               "rope_parameters": rope("yarn", mscale=0.7, mscale_all_dim=0.7, **YARN)},
        torch.bfloat16, None, "BF16", None,
    ),
    "kimi_k2": (
        "deepseek_v3",
        MLA | {"rms_norm_eps": 1e-6, "n_group": 1, "topk_group": 1, "n_routed_experts": 12,
               "num_hidden_layers": 2, "routed_scaling_factor": 2.827,
               "rope_parameters": rope("yarn", 10.0, beta_fast=1.0, mscale=1.0,
                                       mscale_all_dim=1.0, **YARN)},
        torch.bfloat16, None, "BF16", None,
    ),
    "deepseek_fp8": (
        "deepseek_v3",
        MLA | ONE | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1,
                     "rope_interleave": False},
        torch.bfloat16, None, None, None,
    ),
    "gemma2": (
        "gemma2",
        GEMMA | {"num_hidden_layers": 3, "attn_logit_softcapping": 1.5,
                 "final_logit_softcapping": 2.0},
        torch.bfloat16, None, "BF16", None,
    ),
    "gemma3": (
        "gemma3_text",
        GEMMA | {"num_hidden_layers": 7, "rope_parameters": BY_LAYER},
        torch.bfloat16, None, "BF16", None,
    ),
    "gemma3_vision": (
        "gemma3",
        GEMMA | {"num_hidden_layers": 2, "num_key_value_heads": 2, "query_pre_attn_scalar": 20,
                 "layer_types": ["full_attention", "sliding_attention"]},
        torch.bfloat16, None, None, None,
    ),
    "gemma4": (
        "gemma4_text",
        GEMMA4 | {"num_hidden_layers": 5, "num_kv_shared_layers": 2, "use_double_wide_mlp": True,
                  "hidden_size_per_layer_input": 12, "final_logit_softcapping": 2.0,
                  "layer_types": ["sliding_attention", "full_attention", *["sliding_attention"] * 2,
                                  "full_attention"]},
        torch.bfloat16, None, "BF16", None,
    ),
    "gemma4_moe": (
        "gemma4_text",
        GEMMA4 | {"num_hidden_layers": 2, "enable_moe_block": True, "num_experts": 4,
                  "top_k_experts": 2, "moe_intermediate_size": 12,
                  "hidden_size_per_layer_input": 0,
                  "layer_types": ["sliding_attention", "full_attention"]},
        torch.bfloat16, None, "BF16", None,
    ),
    "gemma4_vision": (
        "gemma4",
        GEMMA4 | {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1,
                  "attention_k_eq_v": True, "num_global_key_value_heads": 2,
                  "hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision",
                  "final_logit_softcapping": 2.0, "attention_bias": True,
                  "layer_types": ["sliding_attention", "full_attention"]},
        torch.bfloat16, None, None, None,
    ),
    "olmo2": (
        "olmo2",
        {"intermediate_size": 20, "rope_parameters": rope(theta=5e5)},
        torch.bfloat16, None, "BF16", None,
    ),
    "smollm3": (
        "smollm3",
        {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16,
         "num_hidden_layers": 5, "tie_word_embeddings": True, "pad_token_id": 1},
        torch.bfloat16, None, "BF16", None,
    ),
    "granite": (
        "granite",
        GRANITE | {"intermediate_size": 20, "attention_bias": True, "mlp_bias": True},
        torch.bfloat16, None, "BF16", None,
    ),
    "granitemoe": (
        "granitemoe",
        MOE | GRANITE | {"num_local_experts": 4, "intermediate_size": 12, "attention_bias": True},
        torch.bfloat16, None, "BF16", None,
    ),
    "granite_hybrid": (
        "granitemoehybrid",
        GRANITE_HYBRID | {"num_local_experts": 4, "num_experts_per_tok": 2,
                          "intermediate_size": 12, "shared_intermediate_size": 10},
        torch.bfloat16, None, "BF16", None,
    ),
    "granite_hybrid_dense": (
        "granitemoehybrid",
        GRANITE_HYBRID | {"num_local_experts": 0, "shared_intermediate_size": 20,
                          "num_hidden_layers": 2, "position_embedding_type": "rope",
                          "layer_types": GRANITE_HYBRID["layer_types"][:2],
                          "mamba_conv_bias": False, "mamba_proj_bias": True,
                          "time_step_limit": [0.4, 1.1]},
        torch.bfloat16, None, None, None,
    ),
    "phi3": (
        "phi3",
        {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 20,
         "pad_token_id": 1, "original_max_position_embeddings": 80, "rope_parameters": LONGROPE},
        torch.bfloat16, None, "BF16", None,
    ),
    "phi3_window": (
        "phi3",
        {"intermediate_size": 20, "pad_token_id": 1, "sliding_window": 5,
         "original_max_position_embeddings": 256},
        torch.bfloat16, None, None, None,
    ),
    "glm": (
        "glm",
        GLM | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
               "attention_bias": False},
        torch.bfloat16, None, "BF16", None,
    ),
    "glm4": ("glm4", GLM, torch.bfloat16, None, "BF16", None),
    "glm4_moe": (
        "glm4_moe",
        MOE | {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
               "routed_scaling_factor": 1.7, "head_dim": 16, "attention_bias": True,
               "use_qk_norm": True, "pad_token_id": 1, "num_nextn_predict_layers": 1,
               "rope_parameters": rope(partial_rotary_factor=0.5)},
        torch.bfloat16, None, "BF16", None,
    ),
    "starcoder2": (
        "starcoder2",
        {"intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1},
        torch.bfloat16, None, "BF16", None,
    ),
}  # fmt: skip
# What each covers.
COVERS = {
    "llama": "multi-head, untied, default rotation, float32",
    "llama3": "llama3 rope scaling, tied, head_dim not hidden / heads",
    "llama_bias": "biases everywhere, linear rope scaling",
    "smollm2": "one KV head, tied, float16",
    "mistral": "sliding window on every layer",
    "mistral3": "the decoder as a part of a model that also sees, no window",
    "ministral": "windows by layer",
    "ministral3": "YaRN, queries that grow with their position",
    "qwen2": "QKV bias",
    "qwen2_window": "full and sliding layers mixed",
    "qwen3": "QK-norm, sharded with an index",
    "mixtral": "experts whose weights sum to one",
    "qwen2_moe": "experts beside a shared one with a gate, a dense layer, windows",
    "qwen2_moe_all": "the same in every layer, no window",
    "qwen3_moe": "experts and QK-norm",
    "olmo3": "windows, YaRN on full layers alone, norms after attention and MLP alone",
    "qwen3_dynamic": "dynamic rope scaling within the original context",
    "cohere2": "windows, rotation in sliding layers alone, parallel blocks, centred norms",
    "gpt_oss": "logit sinks, clipped SwiGLU, biased experts, YaRN, windows",
    "gpt_oss_mxfp4": "the same with experts in MXFP4 as published, YaRN to whole pairs",
    "qwen3_next": "gated delta-nets and attention, experts, a dense layer",
    "qwen3_next_all": "the same with experts in every layer",
    "qwen3_5": "the same without experts, delta-net matrices apart",
    "qwen3_5_moe": "the same with experts",
    "qwen3_5_vision": "stacked experts, a part of a model that also sees",
    "deepseek_v2": "latent attention, YaRN, experts of the best groups",
    "deepseek_v2_lite": "queries made at once, experts without groups",
    "deepseek_v3": "experts chosen by corrected sigmoids in groups",
    "kimi_k2": "the same without groups, its configuration as published",
    "deepseek_fp8": "matrices in FP8 with scales of blocks, rotation of halves",
    "gemma2": "soft caps, 1 + weight norms on both sides, GELU, scaled embedding",
    "gemma3": "windows and rotary embeddings by layer, every sixth full",
    "gemma3_vision": "the decoder as a part of a model that also sees",
    "gemma4": "shared caches, inputs of layers, heads by layer, proportional rotation",
    "gemma4_moe": "experts beside an MLP, each with a factor and norms of its own",
    "gemma4_vision": "values of keys, KV heads by layer, a part of a model that also sees",
    "olmo2": "norms after attention and MLP alone, QK-norm over whole projections",
    "smollm3": "layers without a rotary embedding",
    "granite": "factors on embedding, residual, attention and logits, biases",
    "granitemoe": "experts in two tensors, the factors of granite",
    "granite_hybrid": "Mamba-2 mixers and attention without rotation, experts and a shared one",
    "granite_hybrid_dense": "the same with rotation, biases and bounded steps, without experts",
    "phi3": "fused matrices, longrope, partial rotation",
    "phi3_window": "fused matrices of grouped heads, a sliding window on every layer",
    "glm": "partial rotation of neighbours, fused matrices",
    "glm4": "the same with biases and norms on both sides",
    "glm4_moe": "partial rotation, QK-norm, experts chosen by corrected sigmoids in groups",
    "starcoder2": "layer norms, biases everywhere, an MLP without gate",
}  # fmt: skip
# name -> (model type, settings, KV heads, window and lender of every layer, or the refusal)
CAPTURED = {
    "hybrid": (
        "qwen3_next",
        {"vocab_size": 320, "num_hidden_layers": 4, "head_dim": 8, "linear_num_value_heads": 4,
         "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
         "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
         "shared_expert_intermediate_size": 8},
        [*[(0, None, None)] * 3, (2, None, None)],
    ),
    "shared": (
        "gemma4_text",
        {"vocab_size": 320, "num_hidden_layers": 4, "head_dim": 8, "global_head_dim": 16,
         "num_kv_shared_layers": 2, "sliding_window": 5, "hidden_size_per_layer_input": 4,
         "vocab_size_per_layer_input": 320,
         "layer_types": ["sliding_attention", "full_attention"] * 2},
        [(2, 5, None), (2, None, None), (2, 5, 0), (2, None, 1)],
    ),
    "sinks": (
        "gpt_oss", GPT_OSS | {"vocab_size": 320, "num_hidden_layers": 2},
        [(1, 5, None), (1, None, None)],
    ),
    "latent": (
        "deepseek_v3",
        {"vocab_size": 320, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
         "qk_nope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
         "n_group": 1, "topk_group": 1, "moe_intermediate_size": 8, "num_key_value_heads": 4},
        [(1, None, None)] * 2,
    ),
    "elsewhere": (
        "bloom", {"vocab_size": 320, "n_head": 4, "n_layer": 2},
        "no layer attends through transformers' attention interface",
    ),
}  # fmt: skip
# Whose GGUF copies transformers does not read.
UNREAD = ("mixtral", "olmo2", "olmo3", "smollm3", "granite", "glm4", "gpt_oss", "cohere2")
UNREAD += ("deepseek_v2", "deepseek_v3", "glm4_moe", "qwen2_moe")
UNREAD += ("gemma4_text", "glm", "granitemoe", "granitemoehybrid", "ministral3")
UNREAD += ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
# Whose Q and K rows llama.cpp's converter stores as pairs of neighbours.
INTERLEAVED = ("llama", "mixtral", "smollm3", "granite", "granitemoe", "granitemoehybrid")
INTERLEAVED += ("ministral3",)
