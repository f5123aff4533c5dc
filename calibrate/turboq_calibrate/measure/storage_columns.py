"""What a row of the quality table says about storage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from turboq.cache import accounting
from turboq.cache.layer import KVLayer
from turboq.plan import Plan
from turboq_calibrate.models import Model


def storage_columns(
    name: str,
    plan: Plan,
    layers: Sequence[KVLayer | None],
    model: Model,
    context: int,
    window: int,
) -> dict[str, Any]:
    """What a row says about storage, all of it from the codecs' own fields.

    k_bits, v_bits: bits per channel without per-vector scales, mean over layers and heads.
    bits_per_channel: every stored bit of one quantized token over all its K and V channels.
    bits_per_channel_at_context: every byte resident at `context` tokens (whole pages, sinks,
    recent window, fitted arrays, static tables) over the same channels.
    bits_per_channel_at_window: the same at the length that quality was measured at.
    cache_bytes: those bytes at several context lengths.
    """
    owned = [layer for layer in layers if layer is not None]
    groups = [(g, len(g.heads)) for layer in owned for g in layer.groups]
    k_codecs = [(g.k, n) for g, n in groups]
    v_codecs = [(g.v, n) for g, n in groups]
    k_name, v_name = _codec_name(k_codecs), _codec_name(v_codecs)
    policy = plan.tokens
    return {
        "name": name,
        "codec": k_name if k_name == v_name else f"{k_name}/{v_name}",
        "k_codec": k_name,
        "v_codec": v_name,
        "k_bits": _code_bits(k_codecs),
        "v_bits": _code_bits(v_codecs),
        "bits_per_channel": accounting.bits_per_channel(owned),
        "bits_per_channel_at_context": accounting.residency(
            owned, context=context
        ).bits_per_channel,
        "context": context,
        "bits_per_channel_at_window": accounting.residency(owned, context=window).bits_per_channel,
        "policy": {
            "sinks": policy.sinks,
            "recent": policy.recent,
            "exact_dtype": policy.exact_dtype,
        },
        "exact_tokens": exact_tokens(owned),
        "bytes_per_token": _whole(accounting.bits_per_token(owned) / 8),
        "compression": accounting.compression(owned),
        "cache_bytes": {
            str(c): accounting.residency(owned, context=c).total
            for c in _contexts(model.spec.context)
        },
    }


def exact_tokens(layers: Sequence[KVLayer | None]) -> list[int]:
    """How many first tokens are exact, and at most how many last ones: codecs that store blocks of
    tokens wait for a whole one."""
    owned = [layer for layer in layers if layer is not None]
    policy = owned[0].policy
    return [policy.sinks, policy.recent + max(layer.block for layer in owned) - 1]


def head_bits(layers: Sequence[KVLayer | None]) -> dict[str, Any]:
    """`quality_schema.HeadBits`: what every head stores, in the model's order."""
    found: dict[str, list[Any]] = {"k": [], "v": [], "bytes_per_token": []}
    for layer in layers:
        if layer is None:
            for values in found.values():
                values.append(None)
            continue
        for side in ("k", "v"):
            bits = {h: getattr(g, side).bits_per_channel for g in layer.groups for h in g.heads}
            found[side].append([bits[head] for head in sorted(bits)])
        found["bytes_per_token"].append(layer.bits_per_token / 8)
    return found


def layer_loss(plan: Plan) -> dict[str, Any] | None:
    """`quality_schema.LayerLoss` as `plan_within` wrote it down; None for any other plan."""
    recipe = {} if plan.provenance is None else plan.provenance.recipe
    rows = (recipe.get("allocation") or {}).get("predicted_by_layer")
    if not rows:
        return None
    at = {row["layer"]: row for row in rows}
    layers = range(len(plan.model.layers))
    return {side: [at[i][side] if i in at else None for i in layers] for side in ("k", "v")}


def _codec_name(codecs) -> str:
    names = dict.fromkeys(codec.name for codec, _ in codecs)
    return "+".join(names)


def _code_bits(codecs) -> float | int:
    """Mean bits per channel of the fields that hold one entry per channel."""
    heads = sum(n for _, n in codecs)
    bits = sum(n * sum(f.bits for f in codec.fields if f.width == codec.dim) for codec, n in codecs)
    return _whole(bits / heads)


def _whole(x: float) -> float | int:
    return int(x) if x == int(x) else x


def _contexts(longest: int) -> list[int]:
    """Powers of two from 256 below the model's context, and the context itself."""
    return [*(2**e for e in range(8, 24) if 2**e < longest), longest]
