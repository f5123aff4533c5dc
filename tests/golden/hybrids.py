"""What `generate.py` does for layers without a KV cache, and Granite's experts: their GGUF form."""

from __future__ import annotations

import torch

DELTA_NETS = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
GRANITES = ("granitemoe", "granitemoehybrid")
HYBRIDS = (*DELTA_NETS, "granitemoehybrid")
CONVERTED = (*HYBRIDS, "granitemoe")


def write_hybrid(writer, config) -> None:
    """What llama.cpp's converter says of such layers."""
    full = [kind == "full_attention" for kind in config.layer_types]
    if config.model_type in DELTA_NETS:
        writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
        writer.add_ssm_state_size(config.linear_key_head_dim)
        writer.add_ssm_group_count(config.linear_num_key_heads)
        writer.add_ssm_time_step_rank(config.linear_num_value_heads)
        writer.add_ssm_inner_size(config.linear_num_value_heads * config.linear_value_head_dim)
        if config.model_type == "qwen3_5_moe_text":
            writer.add_full_attention_interval(2)
        else:
            name = f"{writer.arch}.attention.recurrent_layers"
            writer.add_array(name, [not attends for attends in full])
        if config.model_type != "qwen3_next":
            writer.add_rope_dimension_sections([1, 1, 0, 0])
        return
    writer.add_ssm_conv_kernel(config.mamba_d_conv)
    writer.add_ssm_state_size(config.mamba_d_state)
    writer.add_ssm_group_count(config.mamba_n_groups)
    writer.add_ssm_time_step_rank(config.mamba_n_heads)
    writer.add_ssm_inner_size(config.mamba_n_heads * config.mamba_d_head)
    writer.add_head_count_kv([config.num_key_value_heads if attends else 0 for attends in full])
    writer.add_rope_scaling_finetuned(config.position_embedding_type == "rope")


def converted(config, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names and weights of a hybrid as the gguf package's tables know them."""
    out: dict[str, torch.Tensor] = {}
    for name, p in state.items():
        p = p.float()
        if name.endswith("A_log"):
            p = -p.exp()
        if name.endswith("conv1d.weight"):
            p = p.squeeze(1)
        if config.model_type in GRANITES:
            name = name.replace("dt_bias", "dt_proj.bias").replace("router.", "router.layer.")
            out |= _granite(config, name, p)
            continue
        if config.model_type != "qwen3_next" and "linear_attn." in name:
            p = _tiled(config, name, p)
        if name.endswith("norm.weight") and "linear_attn" not in name:
            p = p + 1
        out |= _qwen(config, name.replace("dt_bias", "dt_proj.bias"), p)
    return out


def _granite(config, name: str, p: torch.Tensor) -> dict[str, torch.Tensor]:
    if name.endswith(("A_log", ".D")):
        p = p[:, None]
    if name.endswith("mamba.norm.weight"):
        p = p.reshape(config.mamba_n_groups, -1)
    for whole, parts in (("experts.gate_up_proj", "{}_exps"), ("shared_mlp.input_linear", "{}")):
        if whole not in name:
            continue
        kind = parts if "experts" in whole or not config.num_local_experts else "{}_shexp"
        block = name.split(".")[2]
        both = p.chunk(2, dim=-2)
        return {f"blk.{block}.ffn_{kind.format(x)}.weight": y.contiguous()
                for x, y in zip(("gate", "up"), both, strict=True)}  # fmt: skip
    if name.endswith("experts.down_proj"):
        name = name.replace("experts.down_proj", "output_linear.weight")
    return {name: p}


def _qwen(config, name: str, p: torch.Tensor) -> dict[str, torch.Tensor]:
    """Qwen3-Next's matrices by key head: queries, keys and values together, gates apart."""
    if not name.endswith("in_proj_qkvz.weight"):
        return {name: p}
    each = config.linear_num_value_heads // config.linear_num_key_heads
    key, value = config.linear_key_head_dim, each * config.linear_value_head_dim
    parts = p.reshape(config.linear_num_key_heads, -1, p.shape[1])
    q, k, v, z = (x.reshape(-1, p.shape[1]) for x in parts.split([key, key, value, value], dim=1))
    base = name.removesuffix("in_proj_qkvz.weight")
    return {f"{base}in_proj_qkv.weight": torch.cat([q, k, v]), f"{base}in_proj_z.weight": z}


def _tiled(config, name: str, p: torch.Tensor) -> torch.Tensor:
    """Qwen3.5's value heads: the first of every key head, then the second of each."""
    keys, heads = config.linear_num_key_heads, config.linear_num_value_heads
    order = torch.arange(heads).reshape(keys, -1).T.reshape(-1)

    def rows(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(heads, -1, *x.shape[1:])[order].reshape(x.shape)

    kind = name.rpartition("linear_attn.")[2]
    if kind.startswith(("in_proj_z", "in_proj_b", "in_proj_a", "A_log", "dt_bias")):
        return rows(p)
    if kind.startswith(("in_proj_qkv", "conv1d")):
        split = 2 * keys * config.linear_key_head_dim
        return torch.cat([p[:split], rows(p[split:])])
    return rows(p.T).T.contiguous() if kind.startswith("out_proj") else p
