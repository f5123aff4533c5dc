"""A plan on one screen."""

# pyright: strict

from __future__ import annotations

import collections
import re

from turboq.cache.accounting import BASELINE_BITS, readable
from turboq.codecs.base import Codec
from turboq.plan.document import fingerprint
from turboq.plan.types import SIDES, LayerPlan, Plan, SidePlan

MOST_ROWS, WIDEST = 12, 100  # of a table of layers; beyond either it is counted instead


def summary(plan: Plan, context: int = 32768, *, layers: bool | None = None) -> str:
    """What is stored, with totals and cost at `context`.

    layers: a table of the layers, equal neighbours together; False counts heads by their bits.
      None: a table that fits on a screen, else counts.

    Raises:
      ValueError: `context` is not positive.

    Examples:
      >>> import turboq
      >>> sizes = dict(kv_heads=2, q_heads=4, k_dim=64, v_dim=64)
      >>> layers = tuple(turboq.LayerGeometry(index=i, path=f"l{i}", **sizes) for i in range(2))
      >>> geometry = turboq.ModelGeometry(
      ...     fingerprint="mine-1", family="mine", name="two layers", layers=layers
      ... )
      >>> codec = turboq.TurboQuantMSE(dim=64, bits=3)
      >>> plan = turboq.uniform_plan(geometry, k=codec, v=codec)
      >>> print(turboq.summary(plan, context=1024))
      two layers (mine), 2 layers with a cache
      tokens: first 0 and last 0 exact in bfloat16
      ...
      one token: 208 bytes, 3.250 bits per channel, 4.92 times below bfloat16
      ...
    """
    price, at = plan.bytes, plan.residency(context)
    tokens = plan.tokens
    table = _aligned(_rows(plan))
    if layers is None:
        layers = len(table) <= MOST_ROWS + 1 and max(map(len, table)) <= WIDEST
    return "\n".join(
        [
            f"{plan.model.name} ({plan.model.family}), {len(plan.layers)} layers with a cache",
            f"tokens: first {tokens.sinks} and last {tokens.recent} exact in {tokens.exact_dtype}",
            *_joined(plan),
            "",
            *(table if layers else _counts(plan)),
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


def _joined(plan: Plan) -> list[str]:
    heads = sorted({layer.joint for layer in plan.layers if layer.joint is not None})
    if not heads:
        return []
    return [
        f"joined: keys and values of {', '.join(map(str, heads))} heads are one "
        "vector; K and V below are its units, the largest first"
    ]


def _rows(plan: Plan) -> list[tuple[str, ...]]:
    price = plan.bytes
    rows = [("layers", "heads", "K", "V", "bits/token", "bits/channel")]
    for first, last in _runs(plan):
        layer, heads = plan.layers[first], plan.model.layers[plan.layers[first].index].kv_heads
        bits = price.layer_bits_per_token[first]
        numbers = heads * (layer.k.codec.dim + layer.v.codec.dim)
        span = str(layer.index) if first == last else f"{layer.index}-{plan.layers[last].index}"
        rows.append(
            (span, str(heads), _side(layer.k), _side(layer.v), str(bits), f"{bits / numbers:.3f}")
        )
    return rows


def _counts(plan: Plan) -> list[str]:
    """Heads of K and of V by what they are stored as, and the layers of least and most bits."""
    lines: list[str] = []
    for side in SIDES:
        found: collections.Counter[str] = collections.Counter()
        for layer in plan.layers:
            form = ", before RoPE" if layer.side(side).rope == "before" else ""
            found.update(codec_label(c) + form for c in plan.codecs(layer.index, side))
        heads = [f"{count:6d} x {label}" for label, count in sorted(found.items(), key=_by_bits)]
        lines += [f"{side.upper()} of {sum(found.values())} heads:", *heads]
    bits = {
        layer.index: total / (plan.model.layers[layer.index].kv_heads * (k.dim + v.dim))
        for layer, total in zip(plan.layers, plan.bytes.layer_bits_per_token, strict=True)
        for k, v in [(layer.k.codec, layer.v.codec)]
    }
    low, high = min(bits, key=bits.__getitem__), max(bits, key=bits.__getitem__)
    lines.append(
        f"bits per channel of a layer: {bits[low]:.3f} (layer {low}) to {bits[high]:.3f} (layer "
        f"{high}); turboq inspect --layers prints all"
    )
    return lines


def _by_bits(item: tuple[str, int]) -> tuple[float, str]:
    """Labels by the bits that they name."""
    number = re.search(r"(\d+(?:\.\d+)?)b", item[0])
    return (float(number[1]) if number else 0.0, item[0])


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
