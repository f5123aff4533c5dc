"""A plan on one screen."""

from __future__ import annotations

from turboq.cache.accounting import BASELINE_BITS, readable
from turboq.codecs.base import Codec
from turboq.plan.document import fingerprint
from turboq.plan.types import LayerPlan, Plan, SidePlan


def summary(plan: Plan, context: int = 32768) -> str:
    """A table of the layers, equal neighbours together, with totals and cost at `context`."""
    price, at = plan.bytes, plan.residency(context)
    tokens = plan.tokens
    rows = [("layers", "heads", "K", "V", "bits/token", "bits/channel")]
    for first, last in _runs(plan):
        layer, heads = plan.layers[first], plan.model.layers[plan.layers[first].index].kv_heads
        bits = price.layer_bits_per_token[first]
        numbers = heads * (layer.k.codec.dim + layer.v.codec.dim)
        span = str(layer.index) if first == last else f"{layer.index}-{plan.layers[last].index}"
        rows.append(
            (span, str(heads), _side(layer.k), _side(layer.v), str(bits), f"{bits / numbers:.3f}")
        )
    return "\n".join(
        [
            f"{plan.model.name} ({plan.model.family}), {len(plan.layers)} layers with a cache",
            f"tokens: first {tokens.sinks} and last {tokens.recent} exact in {tokens.exact_dtype}",
            "",
            *_aligned(rows),
            "",
            f"one token: {price.bytes_per_token:g} bytes, {price.bits_per_channel:.3f} bits per "
            f"channel, {BASELINE_BITS / price.bits_per_channel:.2f} times below bfloat16",
            f"{context} tokens: {readable(at.total)} ({readable(at.quantized)} quantized, "
            f"{readable(at.padding)} padding, {readable(at.sinks + at.recent)} exact, "
            f"{readable(at.arrays + at.tables)} arrays and tables), "
            f"{at.bits_per_channel:.3f} bits per channel; bfloat16 {readable(at.baseline)}",
            *_origin(plan),
        ]
    )


def codec_label(codec: Codec) -> str:
    """Short name: codec, bits (or type), rotation and scale where they are chosen.

    Of a codec with several widths, the bits of a channel with all that is stored.
    """
    config = codec.config()
    parts = [config["codec"]]
    kind = config.get("dtype") or config.get("type") or config.get("format") or ""
    bits = codec.bits_per_channel if "segments" in config else config.get("bits")
    parts.append(kind if bits is None else f"{bits:.4g}b")
    for key, usual in (("rotation", "hadamard"), ("scale_rule", "raw"), ("scale", "vector")):
        if config.get(key, usual) != usual:
            parts.append(f"{key}={config[key]}")
    return " ".join(part for part in parts if part)


def _side(side: SidePlan) -> str:
    usual = codec_label(side.codec)
    groups: dict[str, list[int]] = {}
    for head in sorted(side.heads):
        groups.setdefault(codec_label(side.heads[head]), []).append(head)
    groups.pop(usual, None)  # codecs may differ in what a label does not say
    others = [f"heads {','.join(map(str, heads))}: {label}" for label, heads in groups.items()]
    form = {"after": [], "before": ["before RoPE"]}.get(side.rope, [f"RoPE {side.rope}"])
    return "; ".join([usual, *others, *form])


def _runs(plan: Plan) -> list[tuple[int, int]]:
    """Positions (first, last) of neighbours with equal sides and heads."""

    def key(layer: LayerPlan):
        return layer.k, layer.v, plan.model.layers[layer.index].kv_heads

    runs: list[tuple[int, int]] = []
    for i, layer in enumerate(plan.layers):
        if i and key(layer) == key(plan.layers[i - 1]):
            runs[-1] = (runs[-1][0], i)
        else:
            runs.append((i, i))
    return runs


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]


def _origin(plan: Plan) -> list[str]:
    lines = [f"plan {fingerprint(plan)}"] if plan.arrays is not None else []
    if plan.provenance is not None and plan.provenance.texts:
        names = ", ".join(text.name for text in plan.provenance.texts)
        lines.append(f"calibrated on {plan.provenance.tokens} tokens of {names}")
    if plan.quality is not None:
        lines += [
            f"measured on {m.text}: KL {m.kl_mean:.4g} nats per token"
            + ("" if m.top1 is None else f", top-1 {m.top1:.4f}")
            + ("" if m.perplexity is None else f", perplexity {m.perplexity:.4f}")
            for m in plan.quality.measured
        ]
    return lines
