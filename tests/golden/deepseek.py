"""What `generate.py` does for DeepSeek's checkpoints: FP8 in blocks, latents, and its GGUF form."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

FP8_BLOCK = 8  # 128 as published


def fp8_modules(model) -> dict[str, torch.Tensor]:
    """Matrices that published FP8 checkpoints hold so, experts one by one."""
    out = {}
    for name, p in model.named_parameters():
        if name.endswith("experts.gate_up_proj"):
            for i, both in enumerate(p):
                for part, rows in zip(("gate", "up"), both.chunk(2), strict=True):
                    out[f"{name.removesuffix('gate_up_proj')}{i}.{part}_proj.weight"] = rows
        elif name.endswith("experts.down_proj"):
            out |= {f"{name.removesuffix('down_proj')}{i}.down_proj.weight": x
                    for i, x in enumerate(p)}  # fmt: skip
        elif name.endswith(("_proj.weight", "kv_a_proj_with_mqa.weight")):
            out[name] = p
    return out


def pack_blocks(model) -> None:
    """Matrices that FP8 in blocks holds, as transformers itself reads it; the bytes are kept."""
    unpack = Fp8Dequantize(None)._dequantize_one
    model.packed = {}
    for name, p in fp8_modules(model).items():
        rows, columns = (-(-n // FP8_BLOCK) for n in p.shape)
        blocks = torch.nn.functional.pad(
            p, (0, columns * FP8_BLOCK - p.shape[1], 0, rows * FP8_BLOCK - p.shape[0])
        ).reshape(rows, FP8_BLOCK, columns, FP8_BLOCK)
        scales = blocks.abs().amax(dim=(1, 3)) / 448
        codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        whole = codes.reshape(rows * FP8_BLOCK, -1)
        padded = unpack(whole, scales, torch.float32)
        p.copy_(padded[: p.shape[0], : p.shape[1]])
        model.packed[name] = whole[: p.shape[0], : p.shape[1]].contiguous()
        model.packed[f"{name}_scale_inv"] = scales


def keep_blocks(model, folder: Path) -> None:
    """Puts codes and scales in the place of matrices, as in published checkpoints."""
    file = folder / "model.safetensors"
    save_file(load_file(file) | model.packed, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def keep_kimi(folder: Path) -> None:
    """Names its configuration as Kimi-K2's does: a type of its own, the old form of rotation."""
    config = json.loads((folder / "config.json").read_text())
    rotation = config.pop("rope_parameters")
    config |= {
        "model_type": "kimi_k2", "rope_theta": rotation.pop("rope_theta"),
        "rope_scaling": {"type": rotation.pop("rope_type"), **rotation},
        "topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
    }  # fmt: skip
    for name in ("qk_head_dim", "head_dim", "rope_interleave", "output_router_logits"):
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def latents(model, inputs: dict) -> dict[str, np.ndarray]:
    """What transformers caches of latent attention, [B, T, 1, D]: `c`, the latent vector as keys,
    and `r`, the rotated part as values."""
    with torch.no_grad():
        cache = model(**inputs | {"use_cache": True}).past_key_values
    return {
        f"{name}{i}": x.transpose(1, 2).contiguous().numpy()
        for i, layer in enumerate(cache.layers)
        for name, x in (("c", layer.keys), ("r", layer.values))
    }


def write_latent(writer, config, rotation: dict) -> None:
    """What llama.cpp's converter says of latent attention and of DeepSeek's experts."""
    rotated = config.qk_rope_head_dim
    writer.add_key_length(config.kv_lora_rank + rotated)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + rotated)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    if config.q_lora_rank is not None:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_rope_dimension_count(rotated)
    if rotation["rope_type"] == "yarn":
        writer.add_rope_scaling_yarn_log_mul(0.1 * rotation["mscale_all_dim"])
    write_grouped(writer, config)


def write_grouped(writer, config) -> None:
    """The same of experts in groups."""
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    if config.model_type != "deepseek_v2":
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)


def split_latent(config, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Matrices of keys and values apart, those of keys turned; the correction as a bias."""
    out = {}
    for name, p in state.items():
        if name.endswith("e_score_correction_bias"):
            out[name.replace("_bias", ".bias")] = p
        elif name.endswith("kv_b_proj.weight"):
            by_head = p.reshape(config.num_attention_heads, -1, p.shape[1])
            keys, values = by_head.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
            out[name.replace("kv_b", "k_b")] = keys.swapaxes(1, 2).contiguous()
            out[name.replace("kv_b", "v_b")] = values.contiguous()
        else:
            out[name] = p
    return out
