"""What GGUF files call the decoder's weights."""

from __future__ import annotations

from turboq_calibrate.models.gguf_architectures import Architecture

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
NORM, NORM_BIAS = "output_norm.weight", "output_norm.bias"
SHARED_ROUTER = "ffn_gate_inp_shexp.weight"
# What each frequency is divided by; of longrope in short sequences and in long ones.
DIVISORS = "rope_freqs.weight"
FACTORS = ("rope_factors_short.weight", "rope_factors_long.weight")
# Of inputs of layers (`stream`).
INPUTS = {
    "layer_embedding": "per_layer_token_embd.weight",
    "input_projection": "per_layer_model_proj.weight",
    "input_norm": "per_layer_proj_norm.weight",
}
BEFORE = {"embedding": EMBEDDING, **INPUTS}
# What layers that read another's cache may have for a cache of their own.
UNUSED_OF_BORROWERS = ("attn_k.weight", "attn_v.weight", "attn_k_norm.weight")
# After the layer's own prefix.
LAYER_TENSORS = {
    "attn_norm_bias": "attn_norm.bias",
    "mlp_norm_bias": "ffn_norm.bias",
    "attn_norm": "attn_norm.weight",
    "q": "attn_q.weight",
    "qkv": "attn_qkv.weight",
    "k": "attn_k.weight",
    "v": "attn_v.weight",
    "o": "attn_output.weight",
    "q_down": "attn_q_a.weight",
    "q_latent_norm": "attn_q_a_norm.weight",
    "q_up": "attn_q_b.weight",
    "kv_down": "attn_kv_a_mqa.weight",
    "latent_norm": "attn_kv_a_norm.weight",
    "k_up": "attn_k_b.weight",
    "v_up": "attn_v_b.weight",
    "q_bias": "attn_q.bias",
    "k_bias": "attn_k.bias",
    "v_bias": "attn_v.bias",
    "o_bias": "attn_output.bias",
    "sinks": "attn_sinks.weight",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "mlp_norm": "ffn_norm.weight",
    "attn_post_norm": "post_attention_norm.weight",
    "mlp_post_norm": "post_ffw_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
    "gate_up": "ffn_up.weight",
    "router": "ffn_gate_inp.weight",
    "router_bias": "ffn_gate_inp.bias",
    "router_correction": "exp_probs_b.bias",
    "shared_router": SHARED_ROUTER,
    "shared_gate": "ffn_gate_shexp.weight",
    "shared_up": "ffn_up_shexp.weight",
    "shared_down": "ffn_down_shexp.weight",
    "expert_gate_bias": "ffn_gate_exps.bias",
    "expert_up_bias": "ffn_up_exps.bias",
    "expert_down_bias": "ffn_down_exps.bias",
    "expert_gate": "ffn_gate_exps.weight",
    "expert_up": "ffn_up_exps.weight",
    "expert_down": "ffn_down_exps.weight",
    "expert_gate_up": "ffn_gate_up_exps.weight",
    "expert_norm": "pre_ffw_norm_2.weight",
    "expert_post_norm": "post_ffw_norm_2.weight",
    "expert_factor": "ffn_down_exps.scale",
    "mlp_own_post_norm": "post_ffw_norm_1.weight",
    "router_scale": "ffn_gate_inp.scale",
    "input_gate": "inp_gate.weight",
    "input_out": "proj.weight",
    "input_post_norm": "post_norm.weight",
    "output_scale": "layer_output_scale.weight",
    "gate_bias": "ffn_gate.bias",
    "up_bias": "ffn_up.bias",
    "down_bias": "ffn_down.bias",
    "q_gate": "attn_q.weight",
    "delta_qkv": "attn_qkv.weight",
    "delta_z": "attn_gate.weight",
    "delta_qkvz": "ssm_in.weight",
    "delta_ba": "ssm_ba.weight",
    "delta_b": "ssm_beta.weight",
    "delta_a": "ssm_alpha.weight",
    "delta_norm": "ssm_norm.weight",
    "delta_out": "ssm_out.weight",
    "mamba_in": "ssm_in.weight",
    "mamba_norm": "ssm_norm.weight",
    "mamba_out": "ssm_out.weight",
    "conv": "ssm_conv1d.weight",
    "conv_bias": "ssm_conv1d.bias",
    "log_decay": "ssm_a",
    "decay_bias": "ssm_dt.bias",
    "skip": "ssm_d",
}


def layer_name(row: Architecture, index: int, ours: str) -> str:
    """What the file calls one of a layer's weights."""
    return f"blk.{index}.{row.mlp_norm if ours == 'mlp_norm' else LAYER_TENSORS[ours]}"
