"""Names and shapes of a model's weights, the same whatever file they come from.

Matrices keep the checkpoint's orientation [out, in]; `decoder.py` contracts the last axis.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np

from turboq.errors import TurboqError
from turboq_calibrate.models.spec import DeltaNet, Latent, LayerSpec, Mamba, ModelSpec

Shapes = dict[str, tuple[int, ...]]
DTYPES = ("float32", "bfloat16", "float16")


def layer_shapes(spec: LayerSpec) -> Shapes:
    """Weights of one decoder layer but its experts': name -> shape."""
    m, f = spec.hidden, spec.intermediate
    q, k, v = (
        spec.heads * spec.head_dim,
        spec.kv_heads * spec.head_dim,
        spec.kv_heads * spec.v_head_dim,
    )
    o = spec.heads * spec.v_head_dim
    shapes: Shapes = {"attn_norm": (m,)} if spec.pre_norms else {}
    if isinstance(spec.recurrent, DeltaNet):
        shapes |= delta_shapes(m, spec.recurrent)
    elif isinstance(spec.recurrent, Mamba):
        shapes |= mamba_shapes(m, spec.recurrent)
    elif spec.latent is not None:
        shapes |= latent_shapes(spec, spec.latent)
    else:
        shapes |= {"q": (q, m), "k": (k, m), "v": (v, m), "o": (m, o)}
    if spec.own_input:
        p = spec.own_input
        shapes |= {"input_gate": (p, m), "input_out": (m, p), "input_post_norm": (m,)}
    if spec.output_scale:
        shapes["output_scale"] = (1,)
    if spec.output_gate:
        shapes["attn_gate"] = (o, m)
    if spec.pre_norms and not spec.parallel:
        shapes["mlp_norm"] = (m,)
    if spec.experts is None or spec.experts.beside:
        shapes |= mlp_shapes(m, f)
        if not spec.gated:
            del shapes["gate"]
    if spec.experts is not None:
        shapes["router"] = (spec.experts.count, m)
        if spec.experts.bias:
            shapes["router_bias"] = (spec.experts.count,)
        if spec.experts.correction:
            shapes["router_correction"] = (spec.experts.count,)
        if spec.experts.shared:
            shapes |= {"shared_router": (1, m)} if spec.experts.shared_gate else {}
            shapes |= mlp_shapes(m, spec.experts.shared, "shared_")
        if spec.experts.beside:
            shapes |= {"router_scale": (m,), "expert_factor": (spec.experts.count,)}
            shapes |= dict.fromkeys(("expert_norm", "expert_post_norm", "mlp_own_post_norm"), (m,))
    if spec.post_norms:
        shapes |= {"attn_post_norm": (m,), "mlp_post_norm": (m,)}
    if spec.qkv_bias:
        shapes |= {"q_bias": (q,), "k_bias": (k,), "v_bias": (v,)}
    if spec.o_bias:
        shapes |= {"o_bias": (m,)}
    if spec.mlp_bias:
        shapes |= {"gate_bias": (f,)} if spec.gated else {}
        shapes |= {"up_bias": (f,), "down_bias": (m,)}
    if spec.norm == "layer":
        shapes |= {f"{name}_bias": (m,) for name in shapes if name.endswith("_norm")}
    if spec.qk_norm == "head":
        shapes |= {"q_norm": (spec.head_dim,), "k_norm": (spec.head_dim,)}
    if spec.qk_norm == "projection":
        shapes |= {"q_norm": (q,), "k_norm": (k,)}
    if spec.logit_sinks:
        shapes["sinks"] = (spec.heads,)
    without = {"v", "v_bias"} if spec.values_are_keys else set[str]()
    if spec.borrows_cache_of is not None:
        without = {"k", "v", "k_bias", "v_bias", "k_norm"}
    return {name: shape for name, shape in shapes.items() if name not in without}


def delta_shapes(hidden: int, delta: DeltaNet) -> Shapes:
    """Weights of one gated delta-net (`delta_net`)."""
    values = delta.value_heads * delta.value_dim
    return {
        "delta_qkv": (delta.channels, hidden),
        "delta_z": (values, hidden),
        "delta_b": (delta.value_heads, hidden),
        "delta_a": (delta.value_heads, hidden),
        "conv": (delta.channels, 1, delta.kernel),
        "log_decay": (delta.value_heads,),
        "decay_bias": (delta.value_heads,),
        "delta_norm": (delta.value_dim,),
        "delta_out": (hidden, values),
    }


def mamba_shapes(hidden: int, mamba: Mamba) -> Shapes:
    """Weights of one Mamba-2 mixer (`mamba`)."""
    rows = mamba.inner + mamba.channels + mamba.heads
    shapes: Shapes = {
        "mamba_in": (rows, hidden),
        "conv": (mamba.channels, 1, mamba.kernel),
        "mamba_norm": (mamba.inner,),
        "mamba_out": (hidden, mamba.inner),
    }
    shapes |= dict.fromkeys(("log_decay", "decay_bias", "skip"), (mamba.heads,))
    if mamba.conv_bias:
        shapes["conv_bias"] = (mamba.channels,)
    if mamba.bias:
        shapes |= {"mamba_in_bias": (rows,), "mamba_out_bias": (hidden,)}
    return shapes


def latent_shapes(spec: LayerSpec, latent: Latent) -> Shapes:
    """Weights of multi-head latent attention (`latent_attention`)."""
    m, rank, rotated = spec.hidden, spec.v_head_dim, spec.head_dim
    queries = spec.heads * (latent.nope_dim + rotated)
    if latent.query_rank is None:
        shapes: Shapes = {"q": (queries, m)}
    else:
        shapes = {"q_down": (latent.query_rank, m), "q_latent_norm": (latent.query_rank,)}
        shapes["q_up"] = (queries, latent.query_rank)
    return shapes | {
        "kv_down": (rank + rotated, m),
        "latent_norm": (rank,),
        "kv_up": (spec.heads * (latent.nope_dim + latent.value_dim), rank),
        "o": (m, spec.heads * latent.value_dim),
    }


def mlp_shapes(hidden: int, intermediate: int, prefix: str = "") -> Shapes:
    """Matrices of one gated MLP."""
    return {
        f"{prefix}gate": (intermediate, hidden),
        f"{prefix}up": (intermediate, hidden),
        f"{prefix}down": (hidden, intermediate),
    }


# Matrices that some checkpoints keep as one, rows of the first on top.
FUSED = {
    "qkv": ("q", "k", "v"),
    "gate_up": ("gate", "up"),
    "shared_gate_up": ("shared_gate", "shared_up"),
    "expert_gate_up": ("expert_gate", "expert_up"),
    "q_gate": ("q", "attn_gate"),
    "delta_qkvz": ("delta_qkv", "delta_z"),
    "delta_ba": ("delta_b", "delta_a"),
}


def fused_in(shapes: Shapes, fused: Collection[str]) -> list[str]:
    """Those of `fused` whose parts the layer has."""
    return [name for name in fused if FUSED[name][0] in shapes]


def fused_shapes(shapes: Shapes, fused: Collection[str]) -> Shapes:
    """`shapes` as a checkpoint has them that keeps the matrices `fused` (of `FUSED`) as one."""
    out = dict(shapes)
    for name in fused_in(shapes, fused):
        parts = [out.pop(part) for part in FUSED[name]]
        out[name] = (sum(rows for rows, _ in parts), parts[0][1])
    return out


def unfuse(
    weights: dict[str, np.ndarray], shapes: Shapes, fused: Collection[str]
) -> dict[str, np.ndarray]:
    """Weights of `fused_shapes` by the names of `shapes`."""
    out = dict(weights)
    for name in fused_in(shapes, fused):
        stored, start = out.pop(name), 0
        for part in FUSED[name]:
            rows = shapes[part][0]
            out[part] = stored[start : start + rows].copy()
            start += rows
    return out


def expert_shapes(spec: LayerSpec) -> Shapes:
    """Weights of one expert of a layer; in memory experts are stacked along a first axis."""
    if spec.experts is None:
        return {}
    inner, m = spec.experts.intermediate, spec.hidden
    shapes = mlp_shapes(m, inner, "expert_")
    if spec.experts.bias:
        shapes |= {"expert_gate_bias": (inner,), "expert_up_bias": (inner,)}
        shapes["expert_down_bias"] = (m,)
    return shapes


def layer_size(spec: LayerSpec, experts: int) -> int:
    """Number of weights of a layer with so many of its experts."""
    one = sum(math.prod(shape) for shape in expert_shapes(spec).values())
    return sum(math.prod(shape) for shape in layer_shapes(spec).values()) + experts * one


def embed_shapes(spec: ModelSpec) -> Shapes:
    """Weights before the layers."""
    shapes: Shapes = {"embedding": (spec.vocab, spec.hidden)}
    if spec.own_input:
        width = len(spec.layers) * spec.own_input
        shapes |= {
            "layer_embedding": (spec.vocab, width),
            "input_projection": (width, spec.hidden),
            "input_norm": (spec.own_input,),
        }
    return shapes


def head_shapes(spec: ModelSpec) -> Shapes:
    """Weights after the layers; `unembedding` is the embedding itself when they are tied."""
    bias = {"norm_bias": (spec.hidden,)} if spec.norm == "layer" else {}
    return {"norm": (spec.hidden,), **bias, "unembedding": (spec.vocab, spec.hidden)}


def parameter_count(spec: ModelSpec) -> int:
    """Number of distinct weights."""
    ends = [head_shapes(spec), embed_shapes(spec)]
    if spec.tied_embeddings:
        del ends[1]["embedding"]
    layers = sum(layer_size(s, s.experts.count if s.experts else 0) for s in spec.layers)
    return layers + sum(math.prod(shape) for table in ends for shape in table.values())


def check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...], file: object) -> None:
    """Raises TurboqError when a stored tensor has not the shape the configuration implies."""
    if tuple(shape) != tuple(expected):
        raise TurboqError(
            f"{file}: tensor {name} has shape {list(shape)}, the configuration needs "
            f"{list(expected)}"
        )


def check_finite(name: str, value: np.ndarray, file: object) -> None:
    """Raises TurboqError when a weight is NaN or infinite."""
    # A sum is one pass without a boolean temporary; it is finite whenever every weight is, except
    # after overflow, which the exact test then settles.
    with np.errstate(over="ignore", invalid="ignore"):
        suspicious = not np.isfinite(np.sum(value, dtype=np.float32))
    if suspicious and not np.isfinite(value).all():
        bad = int(value.size - np.isfinite(value).sum())
        raise TurboqError(f"{file}: tensor {name} holds {bad} NaN or infinite values")
