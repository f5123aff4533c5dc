"""What `generate.py` does for Gemma 4's checkpoints: their GGUF form."""

from __future__ import annotations

import numpy as np
import torch


def write_gemma4(writer, config) -> None:
    """What llama.cpp's converter says of layers one by one; later values stand."""
    slides = [kind == "sliding_attention" for kind in config.layer_types]
    shared = config.num_kv_shared_layers
    full = config.per_layer_config[slides.index(False)].head_dim
    writer.add_shared_kv_layers(shared)
    writer.add_embedding_length_per_layer_input(config.hidden_size_per_layer_input or 0)
    writer.add_sliding_window_pattern(slides)
    writer.add_key_length(full)
    writer.add_value_length(full)
    writer.add_key_length_swa(config.head_dim)
    writer.add_value_length_swa(config.head_dim)
    if config.enable_moe_block:
        writer.add_expert_used_count(config.top_k_experts)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if config.use_double_wide_mlp:
        first, width = len(slides) - shared, config.intermediate_size
        writer.add_feed_forward_length([width * (1 + (i >= first)) for i in range(len(slides))])
    writer.add_rope_dimension_count(full)
    writer.add_rope_dimension_count_swa(config.head_dim)
    writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    # What full layers divide frequencies by: pairs that stand still, by very much.
    turned = int(full * config.rope_parameters["full_attention"]["partial_rotary_factor"] / 2)
    divisors = np.array([1.0] * turned + [1e30] * (full // 2 - turned), np.float32)
    writer.add_tensor("rope_freqs.weight", divisors)


def named(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names as the gguf package's tables know them, or as they are in the file."""
    out = {}
    for name, p in state.items():
        block = f"blk.{name.removeprefix('model.layers.').partition('.')[0]}"
        renamed = {
            "layer_scalar": f"{name}.weight",
            "router.scale": f"{block}.ffn_gate_inp.scale",
            "router.per_expert_scale": f"{block}.ffn_down_exps.scale",
            "experts.gate_up_proj": f"{block}.ffn_gate_up_exps.weight",
            "experts.down_proj": f"{block}.ffn_down_exps.weight",
        }
        found = [new for old, new in renamed.items() if name.endswith(old)]
        out[found[0] if found else name] = p
    return out
