"""One row per GGUF architecture: what llama.cpp does with it whatever its metadata say."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """How one architecture differs from the others.

    `reads` are the fields among `gguf_file.REFUSED` that are understood here. Norm weights are
    whole factors in every file: the converter has added what a family's code adds.
    """

    interleaved: bool = False  # rows of Q and K are stored as pairs of neighbours
    window: int | None = None  # where the file names none
    ignores_window: bool = False  # llama.cpp attends to all tokens whatever the file says
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
    norm: Literal["rms", "layer"] = "rms"
    gated: bool = True
    pre_norms: bool = True
    post_norms: bool = False
    scaled_embedding: bool = False  # by sqrt(hidden)
    activation: Literal["silu", "gelu_tanh"] = "silu"
    softcap: float | None = None  # of attention logits, where the file names none
    logit_softcap: float | None = None
    wide_scale_layers: int | None = None  # with so many layers the scale is (hidden / heads)^-1/2
    renormalised: bool = False  # weights of the chosen experts sum to one
    reads: frozenset[str] = frozenset()


_gemma = functools.partial(
    Architecture, post_norms=True, scaled_embedding=True, activation="gelu_tanh"
)
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(interleaved=True, renormalised=True, reads=frozenset({"expert_count"})),
    "qwen2": Architecture(),
    "qwen3": Architecture(),
    "qwen3moe": Architecture(renormalised=True, reads=frozenset({"expert_count"})),
    "smollm3": Architecture(interleaved=True, no_rope_every=4),
    "granite": Architecture(
        interleaved=True,
        rope_switch=True,
        reads=frozenset({"logit_scale", "residual_scale", "embedding_scale", "attention.scale"}),
    ),
    "phi3": Architecture(
        ignores_window=True,
        partial_rotary=True,
        longrope=True,
        fused=("qkv", "gate_up"),
    ),
    "glm4": Architecture(
        layout="interleaved", partial_rotary=True, fused=("gate_up",), post_norms=True
    ),
    "starcoder2": Architecture(
        norm="layer", gated=False, activation="gelu_tanh", ignores_window=True
    ),
    "olmo2": Architecture(
        full_every=4,
        sliding_unscaled=True,
        qk_norm="projection",
        pre_norms=False,
        post_norms=True,
    ),
    "gemma2": _gemma(
        window=4096,
        full_every=2,
        softcap=50.0,
        logit_softcap=30.0,
        wide_scale_layers=46,
        reads=frozenset({"attn_logit_softcapping", "final_logit_softcapping"}),
    ),
    "gemma3": _gemma(
        full_every=6,
        sliding_theta=1e4,
        wide_scale_layers=62,
        reads=frozenset({"final_logit_softcapping"}),
    ),
}
