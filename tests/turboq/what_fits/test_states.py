"""Recurrent state of hybrids: published sizes, and products written out by hand."""

import pytest

from turboq.errors import TurboqError
from turboq.what_fits import from_config

MIB = 2**20


def hybrid(model_type: str, layers: int, **fields) -> dict:
    return {
        "model_type": model_type, "num_hidden_layers": layers, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 64, **fields,
    }  # fmt: skip


# (file, bytes per session): layers x (float32 recurrence + 3 tokens of 16-bit convolution tail)
PUBLISHED = {
    "Granite 4 h-tiny": (
        hybrid("granitemoehybrid", 40, hidden_size=1536, mamba_n_heads=48, mamba_d_head=64,
               mamba_d_state=128, mamba_n_groups=1, mamba_d_conv=4, mamba_expand=2,
               layer_types=(["mamba"] * 9 + ["attention"]) * 4),
        36 * (4 * 48 * 64 * 128 + 2 * 3 * (48 * 64 + 2 * 1 * 128)), 54.7,
    ),
    "Nemotron-3-Nano": (
        hybrid("nemotron_h", 52, hidden_size=2688, mamba_num_heads=64, mamba_head_dim=64,
               ssm_state_size=128, n_groups=8, conv_kernel=4, mamba_ssm_cache_dtype="float32",
               hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"),
        23 * (4 * 64 * 64 * 128 + 2 * 3 * (64 * 64 + 2 * 8 * 128)), 46.8,
    ),
    "Falcon-H1-7B": (
        hybrid("falcon_h1", 44, hidden_size=3072, mamba_d_ssm=3072, mamba_d_state=256,
               mamba_n_groups=1, mamba_d_conv=4, mamba_n_heads=24, mamba_d_head=128),
        44 * (4 * 3072 * 256 + 2 * 3 * (3072 + 2 * 1 * 256)), 132.9,
    ),
    "Jamba": (
        hybrid("jamba", 32, hidden_size=4096, mamba_expand=2, mamba_d_state=16, mamba_d_conv=4,
               attn_layer_period=8, attn_layer_offset=4),
        28 * (4 * 2 * 4096 * 16 + 2 * 3 * 2 * 4096), 15.3,
    ),
    "MiniMax-M1": (
        hybrid("minimax_m1", 80, num_attention_heads=64, num_key_value_heads=8, head_dim=128,
               hidden_size=6144, attn_type_list=([0] * 7 + [1]) * 10),
        70 * 4 * 64 * 128 * 128, 280.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    config, expected, mib = PUBLISHED[name]
    found = from_config(config, name)
    assert (found.state_bytes, found.unknown_states) == (expected, 0)
    assert round(expected / MIB, 1) == mib


SMALL = {
    "a dtype of 16 bits halves the recurrence": (
        hybrid("nemotron_h", 2, hidden_size=64, mamba_num_heads=2, mamba_head_dim=8,
               ssm_state_size=16, n_groups=1, conv_kernel=4, mamba_ssm_cache_dtype="bfloat16",
               hybrid_override_pattern="M*"),
        2 * 2 * 8 * 16 + 2 * 3 * (2 * 8 + 2 * 16),
    ),
    "the other name of that dtype": (
        hybrid("qwen3_5_text", 4, mamba_ssm_dtype="bfloat16", linear_num_key_heads=2,
               linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
               linear_conv_kernel_dim=4),
        3 * (2 * 4 * 8 * 8 + 2 * 3 * (2 * 2 * 8 + 4 * 8)),
    ),
    "MLP and expert layers have none": (
        hybrid("nemotron_h", 4, hidden_size=64, mamba_num_heads=2, mamba_head_dim=8,
               ssm_state_size=16, n_groups=1, conv_kernel=4, hybrid_override_pattern="M*-E"),
        4 * 2 * 8 * 16 + 2 * 3 * (2 * 8 + 2 * 16),
    ),
    "a head dim of 'auto' is expand x hidden": (
        hybrid("bamba", 2, hidden_size=64, mamba_n_heads=4, mamba_d_head="auto", mamba_expand=2,
               mamba_d_state=16, mamba_n_groups=1, mamba_d_conv=4, attn_layer_indices=[1]),
        4 * 2 * 64 * 16 + 2 * 3 * (2 * 64 + 2 * 16),
    ),
    "delta rule with a gate per channel (KDA)": (
        {**hybrid("kimi_linear", 4, kv_lora_rank=96, qk_rope_head_dim=32, head_dim=72,
                  linear_attn_config={"full_attn_layers": [4], "kda_layers": [1, 2, 3],
                                      "head_dim": 16, "num_heads": 2,
                                      "short_conv_kernel_size": 4})},
        3 * (4 * 2 * 16 * 16 + 2 * 3 * 3 * 2 * 16),
    ),
    "linear attention of all query heads": (
        hybrid("bailing_moe_linear", 5, layer_group_size=5), 4 * 4 * 16 * 64 * 64,
    ),
    "a recurrent unit": (
        hybrid("recurrent_gemma", 3, hidden_size=64, lru_width=128, conv1d_width=4,
               block_types=["recurrent", "recurrent", "attention"]),
        2 * (4 * 128 + 2 * 3 * 128),
    ),
    "a short convolution": (
        hybrid("lfm2", 3, hidden_size=64, conv_L_cache=3, full_attn_idxs=[1]), 2 * 2 * 2 * 64,
    ),
    "attention and state in one layer (Zamba 2)": (
        hybrid("zamba2", 2, hidden_size=64, kv_channels=32, attention_head_dim=64,
               layers_block_type=["mamba", "hybrid"], n_mamba_heads=2, mamba_headdim=64,
               mamba_d_state=16, mamba_ngroups=1, mamba_d_conv=4),
        2 * (4 * 2 * 64 * 16 + 2 * 3 * (2 * 64 + 2 * 16)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_rules(name):
    config, expected = SMALL[name]
    found = from_config(config, name)
    assert (found.state_bytes, found.unknown_states) == (expected, 0)


def test_what_is_not_known_is_said_to_be_unknown():
    """No rule for the family, or a rule without its fields."""
    types = ["linear_attention", "full_attention", "linear_attention"]
    found = from_config(hybrid("other", 3, layer_types=types), "x")
    assert (found.state_bytes, found.unknown_states) == (0, 2)
    assert from_config(hybrid("falcon_h1", 3), "x").unknown_states == 3


@pytest.mark.parametrize("dtype", ["int8", ["float32"]])
def test_an_unknown_dtype_is_refused(dtype):
    config = hybrid("nemotron_h", 2, hidden_size=64, mamba_num_heads=2, mamba_head_dim=8,
                    ssm_state_size=16, n_groups=1, conv_kernel=4, mamba_ssm_cache_dtype=dtype,
                    hybrid_override_pattern="M*")  # fmt: skip
    with pytest.raises(TurboqError, match=r"mamba_ssm_cache_dtype=.* must be one of float32"):
        from_config(config, "x")
