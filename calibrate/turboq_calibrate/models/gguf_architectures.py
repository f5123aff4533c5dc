"""One row per GGUF architecture: what llama.cpp does with it whatever its metadata say."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

from turboq_calibrate.models.spec import Norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """How one architecture differs from the others.

    `reads` are the fields among `gguf_spec.REFUSED` that are understood here. Norm weights are
    whole factors in every file: the converter has added what a family's code adds.
    """

    interleaved: bool = False  # rows of Q and K are stored as pairs of neighbours
    window: int | None = None  # where the file names none
    full_every: int | None = None  # every n-th layer is full; None: all slide if there is a window
    sliding_theta: float | None = None  # sliding layers rotate with this base, unscaled
    layout: Literal["half", "interleaved"] = "half"  # of the rotary embedding as we do it
    partial_rotary: bool = False  # only the first rope.dimension_count channels may be rotated
    longrope: bool = False  # by rope_factors_short, up to the original context
    sliding_unscaled: bool = False  # or with that of the others, unscaled
    no_rope_every: int | None = None  # every n-th layer has no rotary embedding
    rope_switch: bool = False  # rope.scaling.finetuned = false: no layer has one
    qk_norm: Literal["head", "projection"] = "head"  # where the file has such norms
    fused: tuple[str, ...] = ()  # matrices that are kept as one (`params.FUSED`)
    norm: Norm = "rms"
    gated: bool = True
    pre_norms: bool = True
    parallel: bool = False
    sliding_rope_only: bool = False  # full layers have no rotary embedding
    logits_times: bool = False  # logit_scale multiplies logits; else it divides them
    post_norms: bool = False
    scaled_embedding: bool = False  # by sqrt(hidden)
    activation: Literal["silu", "gelu_tanh", "clipped_swiglu"] = "silu"
    mlp_norm: str = "ffn_norm.weight"
    logit_sinks: bool = False
    softcap: float | None = None  # of attention logits, where the file names none
    logit_softcap: float | None = None
    wide_scale_layers: int | None = None  # with so many layers the scale is (hidden / heads)^-1/2
    renormalised: bool = False  # weights of the chosen experts sum to one
    grouped: bool = False  # experts as DeepSeek has them (`gguf_spec.Geometry`)
    gating: int | None = None  # expert_gating_func where the file names none
    latent: bool = False  # multi-head latent attention and grouped experts (`gguf_latent`)
    # Layers without a KV cache: of every group of `interval` all but the last are delta-nets, where
    # `attention.recurrent_layers` says nothing; layers without KV heads are Mamba-2 mixers.
    recurrent: Literal["delta", "mamba"] | None = None
    interval: int = 4
    tiled: bool = False  # value heads of a delta-net: one of every key head, then the next of each
    output_gate: bool = False  # of attention
    shared_gate: bool = True  # of the expert that every token passes
    by_layer: bool = False  # what Gemma 4 has otherwise layer by layer (`gguf_spec`)
    # Queries grow with their position (`config_rope.query_growth`), and YaRN multiplies what it
    # rotates by what mscale and mscale_all_dim, 1 and the file's, say.
    growing: bool = False
    reads: frozenset[str] = frozenset()


SOFTMAX, SIGMOID = 1, 2  # expert_gating_func

_gemma = functools.partial(
    Architecture, post_norms=True, scaled_embedding=True, activation="gelu_tanh"
)
# Experts are none where the file counts none.
_granite = functools.partial(
    Architecture,
    interleaved=True,
    rope_switch=True,
    renormalised=True,
    shared_gate=False,
    reads=frozenset(
        {
            *("logit_scale", "residual_scale", "embedding_scale", "attention.scale"),
            "expert_count",
        }
    ),
)
# Norm weights of the delta-net itself are the checkpoint's: its code adds nothing to them.
_qwen_hybrid = functools.partial(
    Architecture,
    partial_rotary=True,
    mlp_norm="post_attention_norm.weight",
    recurrent="delta",
    output_gate=True,
)
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(interleaved=True, renormalised=True, reads=frozenset({"expert_count"})),
    "qwen2": Architecture(),
    "qwen3": Architecture(),
    "qwen2moe": Architecture(reads=frozenset({"expert_count"})),
    "qwen3moe": Architecture(renormalised=True, reads=frozenset({"expert_count"})),
    "qwen3next": _qwen_hybrid(
        fused=("q_gate", "delta_ba"), renormalised=True, reads=frozenset({"expert_count"})
    ),
    "qwen35": _qwen_hybrid(fused=("q_gate",), tiled=True),
    "qwen35moe": _qwen_hybrid(
        fused=("q_gate",), tiled=True, renormalised=True, reads=frozenset({"expert_count"})
    ),
    "smollm3": Architecture(interleaved=True, no_rope_every=4),
    "granite": _granite(),
    "granitemoe": _granite(),
    "granitehybrid": _granite(recurrent="mamba"),
    "phi3": Architecture(
        partial_rotary=True,
        longrope=True,
        fused=("qkv", "gate_up"),
    ),
    "chatglm": Architecture(layout="interleaved", partial_rotary=True, fused=("gate_up",)),
    "glm4": Architecture(
        layout="interleaved", partial_rotary=True, fused=("gate_up",), post_norms=True
    ),
    "glm4moe": Architecture(
        partial_rotary=True,
        mlp_norm="post_attention_norm.weight",
        grouped=True,
        gating=SIGMOID,
        reads=frozenset({"expert_count"}),
    ),
    "mistral3": Architecture(
        interleaved=True, growing=True, reads=frozenset({"attention.temperature_scale"})
    ),
    "starcoder2": Architecture(norm="layer", gated=False, activation="gelu_tanh"),
    "cohere2": Architecture(
        layout="interleaved",
        window=4096,
        full_every=4,
        sliding_rope_only=True,
        norm="centred",
        parallel=True,
        logits_times=True,
        reads=frozenset({"logit_scale"}),
    ),
    "olmo2": Architecture(
        full_every=4,
        sliding_unscaled=True,
        qk_norm="projection",
        pre_norms=False,
        post_norms=True,
    ),
    "deepseek2": Architecture(
        layout="interleaved",
        latent=True,
        grouped=True,
        gating=SOFTMAX,
        reads=frozenset({"expert_count", "attention.key_length_mla"}),
    ),
    "gpt-oss": Architecture(
        window=128,
        full_every=2,
        activation="clipped_swiglu",
        mlp_norm="post_attention_norm.weight",
        logit_sinks=True,
        renormalised=True,
        reads=frozenset({"expert_count"}),
    ),
    "gemma2": _gemma(
        window=4096,
        full_every=2,
        softcap=50.0,
        logit_softcap=30.0,
        wide_scale_layers=46,
        reads=frozenset({"attn_logit_softcapping", "final_logit_softcapping"}),
    ),
    "gemma4": _gemma(
        sliding_theta=1e4,
        by_layer=True,
        renormalised=True,
        reads=frozenset({"expert_count", "final_logit_softcapping"}),
    ),
    "gemma3": _gemma(
        full_every=6,
        sliding_theta=1e4,
        wide_scale_layers=62,
        reads=frozenset({"final_logit_softcapping"}),
    ),
}
