"""One row per model type: what its own code does whatever the configuration says, and defaults.

Defaults are those of transformers' configuration classes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from turboq_calibrate.models import (
    config_gemma4,
    config_nope,
    config_recurrent,
    config_windows,
)
from turboq_calibrate.models.config_experts import Grouped, Mixture
from turboq_calibrate.models.config_fields import Reader
from turboq_calibrate.models.config_rope import Rotation
from turboq_calibrate.models.spec import DeltaNet, Mamba, Norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How one model type differs from Llama.

    `defaults` are of fields that a file may leave out; `reads` are the fields among
    `config.REFUSED` that the type's code uses and we understand.
    """

    defaults: Mapping[str, Any]
    windows: Callable[[Reader, int], list[int | None]]
    head_dim: int | None = None  # default; None: hidden / heads
    rotation: Rotation = dataclasses.field(default_factory=Rotation)
    activation: str = "hidden_act"  # the field that names it
    width: str = "intermediate_size"  # the field that says how wide an MLP without experts is
    biases: frozenset[str] = frozenset()  # of attention_bias, mlp_bias, qkv_bias, use_bias
    qkv_bias: bool = False  # where it is not read, always
    o_bias: bool = True  # attention_bias is of the output projection too
    rotated: Callable[[Reader, int], list[bool]] | None = None  # layers; None: all
    qk_norm: Literal["head", "projection"] | None = None
    qk_norm_switch: str | None = None  # the field that says whether there is one
    query_growth: bool = False  # queries grow with their position (`config_rope.query_growth`)
    norm_offset: float = 0.0
    norm: Norm = "rms"
    eps: str = "rms_norm_eps"  # the field that names it
    gated: bool = True
    pre_norms: bool = True
    parallel: bool = False
    sliding_rope_only: bool = False  # full layers have no rotary embedding
    post_norms: bool = False
    scaled_embedding: bool = False  # by sqrt(hidden)
    experts: Mixture | Grouped | None = None
    by_layer: bool = False  # what `config_gemma4` reads
    latent: bool = False  # multi-head latent attention
    # Layers that keep a state of fixed size instead of keys and values.
    recurrent: Callable[[Reader, int], Sequence[DeltaNet | Mamba | None]] | None = None
    output_gate: bool = False  # of attention
    logit_sinks: bool = False
    clipped: bool = False  # the activation of gpt-oss
    quantized: str | None = None  # quant_method of published checkpoints that is read
    reads: frozenset[str] = frozenset()


_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768}
_SHARED = "shared_expert_intermediate_size"
_EXPERTS = frozenset({"num_experts", "num_local_experts"})
_GRANITE = frozenset(
    {"embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"}
)
_GEMMA = {
    "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip
_gemma = functools.partial(
    Family,
    head_dim=256,
    activation="hidden_activation",
    biases=frozenset({"attention_bias"}),
    norm_offset=1.0,
    post_norms=True,
    scaled_embedding=True,
)
_glm = functools.partial(
    Family,
    defaults={
        "num_key_value_heads": 2,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1.5625e-7,
        "attention_bias": True,
    },
    windows=config_windows.never,
    head_dim=128,
    rotation=Rotation(partial=0.5, layout="interleaved"),
    biases=frozenset({"attention_bias"}),
    o_bias=False,
)
# Gated delta-nets beside gated attention.
_qwen_hybrid = functools.partial(
    Family,
    windows=config_windows.none,
    head_dim=256,
    rotation=Rotation(partial=0.25),
    qk_norm="head",
    norm_offset=1.0,
    recurrent=config_recurrent.read_delta,
    output_gate=True,
)
# Multi-head latent attention and grouped experts.
_deepseek = functools.partial(
    Family,
    windows=config_windows.never,
    rotation=Rotation(layout="interleaved"),
    latent=True,
    # Published files name the code of before transformers had it.
    reads=frozenset({"kv_lora_rank", "n_routed_experts", "auto_map", "routed_scaling_factor"}),
)
_DEEPSEEK_V3 = {
    "max_position_embeddings": 4096, "kv_lora_rank": 512, "q_lora_rank": 1536,
    "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 2048,
    "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "first_k_dense_replace": 3,
}  # fmt: skip
_NOAUX = Grouped(scores="sigmoid", methods=("noaux_tc",))
FAMILIES: dict[str, Family] = {
    "llama": Family(
        defaults={"max_position_embeddings": 2048},
        windows=config_windows.never,
        biases=frozenset({"attention_bias", "mlp_bias"}),
    ),
    "mistral": Family(
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072},
        windows=functools.partial(config_windows.always, default=4096),
    ),
    "ministral": Family(
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072},
        windows=config_windows.always_or_listed,
    ),
    "ministral3": Family(
        defaults={
            "num_key_value_heads": 8, "max_position_embeddings": 262144, "rms_norm_eps": 1e-5,
        },
        windows=functools.partial(config_windows.always, default=None),
        head_dim=128,
        rotation=Rotation(theta=1e6, defaults={
            "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16384,
            "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
        }),
        query_growth=True,
    ),
    "qwen2": Family(defaults=_QWEN, windows=config_windows.switched, qkv_bias=True),
    "qwen3": Family(
        defaults=_QWEN,
        windows=config_windows.switched,
        head_dim=128,
        biases=frozenset({"attention_bias"}),
        qk_norm="head",
    ),
    "olmo2": Family(
        defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
        windows=config_windows.never,
        biases=frozenset({"attention_bias"}),
        qk_norm="projection",
        pre_norms=False,
        post_norms=True,
    ),
    "olmo3": Family(
        defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
        windows=functools.partial(config_windows.every_nth_full, n=4),
        rotation=Rotation(theta=5e5, unscaled_sliding=True),
        biases=frozenset({"attention_bias"}),
        qk_norm="projection",
        pre_norms=False,
        post_norms=True,
    ),
    "smollm3": Family(
        defaults={
            "num_key_value_heads": 4, "max_position_embeddings": 32768, "tie_word_embeddings": True,
        },
        windows=config_windows.switched_unrotated,
        rotation=Rotation(theta=2e6),
        rotated=config_nope.rotated_layers,
        biases=frozenset({"attention_bias", "mlp_bias"}),
        reads=frozenset({config_nope.LIST, config_nope.INTERVAL}),
    ),
    "granite": Family(
        defaults={"max_position_embeddings": 2048, "attention_multiplier": 1.0},
        windows=config_windows.never,
        biases=frozenset({"attention_bias", "mlp_bias"}),
        reads=_GRANITE,
    ),
    "granitemoe": Family(
        defaults={
            "max_position_embeddings": 2048, "attention_multiplier": 1.0, "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        windows=config_windows.never,
        biases=frozenset({"attention_bias"}),
        experts=Mixture(width="intermediate_size", renormalised=True),
        reads=_EXPERTS | _GRANITE,
    ),
    "granitemoehybrid": Family(
        defaults={
            "max_position_embeddings": 2048, "attention_multiplier": 1.0, "num_local_experts": 8,
            "num_experts_per_tok": 2, "intermediate_size": 11008, "shared_intermediate_size": 1024,
        },
        windows=config_windows.none,
        rotated=config_nope.all_or_none,
        recurrent=config_recurrent.read_mamba,
        biases=frozenset({"attention_bias"}),
        width="shared_intermediate_size",
        experts=Mixture(
            width="intermediate_size", renormalised=True, shared="shared_intermediate_size",
            shared_gate=False, optional=True,
        ),
        reads=_EXPERTS | _GRANITE,
    ),
    "phi3": Family(
        defaults={
            "max_position_embeddings": 4096, "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
        windows=functools.partial(config_windows.always, default=None),
        rotation=Rotation(partial=1.0),
        # Published files name the code of before transformers had it.
        reads=frozenset({"auto_map"}),
    ),
    "glm": _glm(),
    "glm4": _glm(post_norms=True),
    "glm4_moe": Family(
        defaults={
            "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
            "n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 8,
            "moe_intermediate_size": 1408, "first_k_dense_replace": 1,
        },
        windows=config_windows.never,
        rotation=Rotation(partial=0.5),
        biases=frozenset({"attention_bias"}),
        o_bias=False,
        qk_norm="head",
        qk_norm_switch="use_qk_norm",
        experts=_NOAUX,
        reads=frozenset({"n_routed_experts", "routed_scaling_factor"}),
    ),
    "starcoder2": Family(
        defaults={
            "num_key_value_heads": 2, "max_position_embeddings": 4096,
            "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, "use_bias": True,
            "norm_epsilon": 1e-5,
        },
        windows=functools.partial(config_windows.always, default=None),
        biases=frozenset({"use_bias"}),
        norm="layer",
        eps="norm_epsilon",
        gated=False,
    ),
    "cohere2": Family(
        defaults={
            "max_position_embeddings": 8192, "layer_norm_eps": 1e-5, "logit_scale": 0.0625,
            "tie_word_embeddings": True,
        },
        windows=functools.partial(config_windows.every_nth_full, n=4),
        rotation=Rotation(layout="interleaved"),
        sliding_rope_only=True,
        biases=frozenset({"attention_bias"}),
        norm="centred",
        eps="layer_norm_eps",
        parallel=True,
        reads=frozenset({
            "logit_scale", "sliding_window_pattern", "_sliding_window_pattern",
        }),
    ),
    "mixtral": Family(
        defaults={
            "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
            "num_experts_per_tok": 2,
        },
        windows=functools.partial(config_windows.always, default=None),
        rotation=Rotation(theta=1e6),
        experts=Mixture(width="intermediate_size", renormalised=True),
        reads=_EXPERTS,
    ),
    "qwen2_moe": Family(
        defaults={
            "num_key_value_heads": 16, "max_position_embeddings": 32768, "num_experts_per_tok": 4,
            "intermediate_size": 5632, "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
        windows=config_windows.switched_alternating,
        biases=frozenset({"qkv_bias"}),
        qkv_bias=True,
        experts=Mixture(shared=_SHARED, some_layers=True),
        reads=_EXPERTS,
    ),
    "qwen3_moe": Family(
        defaults={
            "num_key_value_heads": 4, "max_position_embeddings": 32768, "num_experts_per_tok": 8,
            "intermediate_size": 6144, "moe_intermediate_size": 768,
        },
        windows=config_windows.switched_everywhere,
        biases=frozenset({"attention_bias"}),
        qk_norm="head",
        experts=Mixture(some_layers=True),
        reads=_EXPERTS,
    ),
    "qwen3_next": _qwen_hybrid(
        defaults={
            "num_key_value_heads": 2, "max_position_embeddings": 32768, "norm_topk_prob": True,
            "num_experts_per_tok": 10, "num_experts": 512, "intermediate_size": 5632,
            "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
        },
        experts=Mixture(shared=_SHARED, some_layers=True),
        reads=_EXPERTS,
    ),
    "qwen3_5_text": _qwen_hybrid(
        defaults={"num_key_value_heads": 4, "max_position_embeddings": 32768},
    ),
    "qwen3_5_moe_text": _qwen_hybrid(
        defaults={
            "num_key_value_heads": 2, "max_position_embeddings": 32768, "num_experts_per_tok": 8,
            "num_experts": 256, "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
        },
        experts=Mixture(shared=_SHARED, renormalised=True),
        reads=_EXPERTS,
    ),
    "deepseek_v2": _deepseek(
        defaults={
            "max_position_embeddings": 2048, "kv_lora_rank": 512, "q_lora_rank": 1536,
            "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
            "n_routed_experts": 64, "n_shared_experts": 2, "moe_intermediate_size": 1407,
        },
        experts=Grouped(scores="softmax", methods=("greedy", "group_limited_greedy")),
    ),
    "deepseek_v3": _deepseek(defaults=_DEEPSEEK_V3, experts=_NOAUX),
    "kimi_k2": _deepseek(defaults=_DEEPSEEK_V3, experts=_NOAUX),
    "gpt_oss": Family(
        defaults={
            "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
            "attention_bias": True, "sliding_window": 128, "num_experts_per_tok": 4,
        },
        windows=functools.partial(config_windows.every_nth_full, n=2),
        head_dim=64,
        rotation=Rotation(theta=150000.0, defaults={
            "rope_type": "yarn", "factor": 32.0, "truncate": False,
            "original_max_position_embeddings": 4096,
        }),
        biases=frozenset({"attention_bias"}),
        experts=Mixture(width="intermediate_size", renormalised=True, bias=True),
        logit_sinks=True,
        clipped=True,
        quantized="mxfp4",
        reads=_EXPERTS,
    ),
    "gemma2": _gemma(
        defaults=_GEMMA | {
            "vocab_size": 256000, "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        },
        windows=functools.partial(config_windows.every_nth_full, n=2),
        reads=frozenset({
            "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
        }),
    ),
    "gemma3_text": _gemma(
        defaults=_GEMMA | {"vocab_size": 262208, "max_position_embeddings": 131072},
        windows=functools.partial(config_windows.every_nth_full, n=6),
        rotation=Rotation(theta=1e6, sliding_theta=1e4),
        qk_norm="head",
        # transformers' Gemma 3 has a soft cap of attention logits in its configuration only.
        reads=frozenset({
            "query_pre_attn_scalar", "final_logit_softcapping", "rope_local_base_freq",
            "sliding_window_pattern", "_sliding_window_pattern",
        }),
    ),
    "gemma4_text": Family(
        defaults={
            "vocab_size": 262144, "hidden_size": 2304, "intermediate_size": 9216,
            "num_hidden_layers": 30, "num_attention_heads": 8, "num_key_value_heads": 4,
            "max_position_embeddings": 131072, "sliding_window": 512, "tie_word_embeddings": True,
            "hidden_activation": "gelu_pytorch_tanh", "hidden_size_per_layer_input": 256,
            "vocab_size_per_layer_input": 262144,
        },
        windows=functools.partial(config_windows.last_full, n=6),
        head_dim=256,
        rotation=Rotation(
            theta=1e6, sliding_theta=1e4, proportional=True,
            defaults={"rope_type": "proportional", "partial_rotary_factor": 0.25},
        ),
        activation="hidden_activation",
        biases=frozenset({"attention_bias"}),
        qk_norm="head",
        post_norms=True,
        scaled_embedding=True,
        by_layer=True,
        reads=frozenset({
            "final_logit_softcapping", "num_experts", config_gemma4.SHARED,
            config_gemma4.BOTH_WAYS,
        }),
    ),
}  # fmt: skip
# Models that also see, whose decoder is one of these: the first where text_config has no type.
WRAPPERS = {
    "gemma3": ("gemma3_text",),
    "gemma4": ("gemma4_text",),
    "mistral3": ("mistral", "ministral3"),
    "qwen3_5": ("qwen3_5_text",),
    "qwen3_5_moe": ("qwen3_5_moe_text",),
}
# Models whose decoder is one of these, but whose prompt is not read as one of these reads it.
OTHERWISE_READ = {
    "paligemma": "its Gemma or Gemma 2 reads the prompt both ways, and the decoder here reads all "
    "text forwards",
}
# Fields that a decoder reads by itself, and transformers' model around it does not.
UNREAD_INSIDE = {"gemma3": frozenset({"final_logit_softcapping"})}
