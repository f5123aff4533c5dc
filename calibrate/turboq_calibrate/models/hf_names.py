"""What Hugging Face checkpoints call the decoder's weights."""

from __future__ import annotations

from collections.abc import Collection

from turboq_calibrate.models.spec import LayerSpec, Mamba

# After the prefix.
EMBEDDING, NORM, NORM_BIAS = "embed_tokens.weight", "norm.weight", "norm.bias"
PREFIX, HEAD = "model.", "lm_head.weight"
# The same of inputs of layers (`stream`).
INPUTS = {
    "layer_embedding": "embed_tokens_per_layer.weight",
    "input_projection": "per_layer_model_projection.weight",
    "input_norm": "per_layer_projection_norm.weight",
}
# The same where the decoder is a part of a model that also sees: published names, then v5's own.
PART_PREFIXES = ("language_model.model.", "model.language_model.")
PART_HEADS = (HEAD, "language_model.lm_head.weight")
OTHER_PARTS = tuple(
    f"{prefix}{part}."
    for prefix in ("", "model.")
    for part in (
        *("vision_tower", "multi_modal_projector", "visual"),
        *("embed_vision", "audio_tower", "embed_audio"),
    )
)
# What layers that read another's cache may have for a cache of their own; transformers drops it.
UNUSED_OF_BORROWERS = tuple(
    f"self_attn.{name}." for name in ("k_proj", "v_proj", "k_norm", "v_norm")
)
# Layers behind the decoder that draft further tokens; transformers does not run them.
DRAFTS, DRAFTING = "mtp.", ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
# The same with the numbers that follow the decoder's layers, `num_nextn_predict_layers` of them.
DRAFTING_LAYERS = ("deepseek_v3", "kimi_k2", "glm4_moe")
LAYER_TENSORS = {
    "attn_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "attn_norm_bias": "input_layernorm.bias",
    "mlp_norm_bias": "post_attention_layernorm.bias",
    "qkv": "self_attn.qkv_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "o_bias": "self_attn.o_proj.bias",
    "sinks": "self_attn.sinks",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "gate_up": "mlp.gate_up_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "gate_bias": "mlp.gate_proj.bias",
    "up_bias": "mlp.up_proj.bias",
    "down_bias": "mlp.down_proj.bias",
    "q_gate": "self_attn.q_proj.weight",
    "q_down": "self_attn.q_a_proj.weight",
    "q_latent_norm": "self_attn.q_a_layernorm.weight",
    "q_up": "self_attn.q_b_proj.weight",
    "kv_down": "self_attn.kv_a_proj_with_mqa.weight",
    "latent_norm": "self_attn.kv_a_layernorm.weight",
    "kv_up": "self_attn.kv_b_proj.weight",
    "delta_qkvz": "linear_attn.in_proj_qkvz.weight",
    "delta_ba": "linear_attn.in_proj_ba.weight",
    "delta_qkv": "linear_attn.in_proj_qkv.weight",
    "delta_z": "linear_attn.in_proj_z.weight",
    "delta_b": "linear_attn.in_proj_b.weight",
    "delta_a": "linear_attn.in_proj_a.weight",
    "conv": "linear_attn.conv1d.weight",
    "log_decay": "linear_attn.A_log",
    "decay_bias": "linear_attn.dt_bias",
    "delta_norm": "linear_attn.norm.weight",
    "delta_out": "linear_attn.out_proj.weight",
    "input_gate": "per_layer_input_gate.weight",
    "input_out": "per_layer_projection.weight",
    "input_post_norm": "post_per_layer_input_norm.weight",
    "output_scale": "layer_scalar",
}
# Of a Mamba-2 mixer.
MAMBA = {
    "mamba_in": "mamba.in_proj.weight",
    "mamba_in_bias": "mamba.in_proj.bias",
    "conv": "mamba.conv1d.weight",
    "conv_bias": "mamba.conv1d.bias",
    "log_decay": "mamba.A_log",
    "decay_bias": "mamba.dt_bias",
    "skip": "mamba.D",
    "mamba_norm": "mamba.norm.weight",
    "mamba_out": "mamba.out_proj.weight",
    "mamba_out_bias": "mamba.out_proj.bias",
}
# Where the layer also normalises what it adds to the residual stream.
POST_NORMS = {
    "attn_post_norm": "post_attention_layernorm.weight",
    "mlp_norm": "pre_feedforward_layernorm.weight",
    "mlp_post_norm": "post_feedforward_layernorm.weight",
}
GLM_POST_NORMS = {
    "attn_post_norm": "post_self_attn_layernorm.weight",
    "mlp_post_norm": "post_mlp_layernorm.weight",
}
# Where it normalises nothing else.
POST_NORMS_ALONE = {
    "attn_post_norm": "post_attention_layernorm.weight",
    "mlp_post_norm": "post_feedforward_layernorm.weight",
}
STARCODER2_MLP = {
    "up": "mlp.c_fc.weight",
    "down": "mlp.c_proj.weight",
    "up_bias": "mlp.c_fc.bias",
    "down_bias": "mlp.c_proj.bias",
}
# Matrices that are kept as one (`params.FUSED`).
FUSED = {
    "phi3": ("qkv", "gate_up"),
    "glm": ("gate_up",),
    "glm4": ("gate_up",),
    "granitemoehybrid": ("gate_up", "shared_gate_up"),
    "qwen3_next": ("q_gate", "delta_qkvz", "delta_ba"),
    "qwen3_5_text": ("q_gate",),
    "qwen3_5_moe_text": ("q_gate",),
}

ROUTING = {
    "router": "mlp.gate.weight",
    "shared_router": "mlp.shared_expert_gate.weight",
    "shared_gate": "mlp.shared_expert.gate_proj.weight",
    "shared_up": "mlp.shared_expert.up_proj.weight",
    "shared_down": "mlp.shared_expert.down_proj.weight",
}
DEEPSEEK_ROUTING = {
    "router": "mlp.gate.weight",
    "router_correction": "mlp.gate.e_score_correction_bias",
    "shared_gate": "mlp.shared_experts.gate_proj.weight",
    "shared_up": "mlp.shared_experts.up_proj.weight",
    "shared_down": "mlp.shared_experts.down_proj.weight",
}
EXPERT = {
    "expert_gate": "mlp.experts.{}.gate_proj.weight",
    "expert_up": "mlp.experts.{}.up_proj.weight",
    "expert_down": "mlp.experts.{}.down_proj.weight",
}
GPT_OSS_ROUTING = {"router": "mlp.router.weight", "router_bias": "mlp.router.bias"}
GRANITE_ROUTING = {"router": "block_sparse_moe.router.layer.weight"}
# Its MLP is the shared expert, or stands alone.
GRANITE_HYBRID = GRANITE_ROUTING | {
    "gate_up": "shared_mlp.input_linear.weight",
    "down": "shared_mlp.output_linear.weight",
    "shared_gate_up": "shared_mlp.input_linear.weight",
    "shared_down": "shared_mlp.output_linear.weight",
}
MIXTRAL_ROUTING = {"router": "block_sparse_moe.gate.weight"}
GEMMA4_ROUTING = {
    "router": "router.proj.weight",
    "router_scale": "router.scale",
    "expert_factor": "router.per_expert_scale",
    "expert_norm": "pre_feedforward_layernorm_2.weight",
    "expert_post_norm": "post_feedforward_layernorm_2.weight",
    "mlp_own_post_norm": "post_feedforward_layernorm_1.weight",
}
ROUTINGS = {
    "gemma4_text": GEMMA4_ROUTING,
    "mixtral": MIXTRAL_ROUTING,
    "gpt_oss": GPT_OSS_ROUTING,
    "glm4_moe": DEEPSEEK_ROUTING,
    "granitemoe": GRANITE_ROUTING,
    "granitemoehybrid": GRANITE_HYBRID,
}
MIXTRAL_EXPERT = {
    "expert_gate": "block_sparse_moe.experts.{}.w1.weight",
    "expert_up": "block_sparse_moe.experts.{}.w3.weight",
    "expert_down": "block_sparse_moe.experts.{}.w2.weight",
}


def layer_names(spec: LayerSpec, family: str) -> dict[str, str]:
    """Our name of a layer's weight -> the checkpoint's, after the layer's own prefix."""
    routing = DEEPSEEK_ROUTING if spec.latent is not None else ROUTINGS.get(family, ROUTING)
    post: dict[str, str] = {}
    if spec.post_norms:
        post = POST_NORMS if spec.pre_norms else POST_NORMS_ALONE
        post = GLM_POST_NORMS if family == "glm4" else post
    plain = {} if spec.gated else STARCODER2_MLP
    mixer = MAMBA if isinstance(spec.recurrent, Mamba) else {}
    return LAYER_TENSORS | mixer | post | routing | plain


def expert_names(family: str, number: int) -> dict[str, str]:
    """The same of one expert's matrices."""
    names = MIXTRAL_EXPERT if family == "mixtral" else EXPERT
    return {ours: name.format(number) for ours, name in names.items()}


def part_prefix(names: Collection[str]) -> str:
    """What the names of a decoder inside another model begin with."""
    found = (prefix for prefix in PART_PREFIXES if prefix + EMBEDDING in names)
    return next(found, PART_PREFIXES[0])


def part_head(names: Collection[str]) -> str:
    """The name of its head."""
    return next((name for name in PART_HEADS if name in names), PART_HEADS[0])
