"""Rules: which codec each (layer, K or V, head) takes, as small functions that combine.

A rule is a codec (the same everywhere) or a function (layer index, side, head) -> codec. `resolve`
turns a rule into the `choose` of `head_plan`, with every codec at its layer's head dim:

    q8, q4 = Ggml(dim=128, type="q8_0"), Ggml(dim=128, type="q4_0")
    head_plan(geometry, resolve(geometry, by_layer({0: q8, 11: q4})))
    head_plan(geometry, resolve(geometry, sides(k=q8, v=boundary(geometry, q4, q8, first=2))))
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Mapping

from turboq.cache.layer import TokenPolicy
from turboq.codecs.base import Codec
from turboq.codecs.exact import Exact
from turboq.plan.build import Choice, KRope, Side, at_dim, head_plan
from turboq.plan.geometry import ModelGeometry
from turboq.plan.types import Plan

Rule = Codec | Choice

SLIDING_WINDOW = "sliding_window"


def rule_plan(
    geometry: ModelGeometry,
    rule: Rule,
    *,
    k_rope: KRope = "after",
    policy: TokenPolicy | None = None,
) -> Plan:
    """The plan of a rule: `head_plan` with `resolve`; `k_rope` as in `uniform_plan`.

    Raises:
      ValueError: the rule has no codec for a layer, or a codec does not exist at its head dim.
    """
    return head_plan(geometry, resolve(geometry, rule), k_rope=k_rope, policy=policy)


def resolve(geometry: ModelGeometry, rule: Rule) -> Choice:
    """The rule with each codec at the head dim of its layer and side."""

    def choose(layer: int, side: Side, head: int) -> Codec:
        found = geometry.layers[layer]
        return at_dim(_at(rule, layer, side, head), found.k_dim if side == "k" else found.v_dim)

    return choose


def sides(*, k: Rule, v: Rule) -> Choice:
    """One rule for keys, another for values."""

    def choose(layer: int, side: Side, head: int) -> Codec:
        return _at(k if side == "k" else v, layer, side, head)

    return choose


def by_layer(starts: Mapping[int, Rule]) -> Choice:
    """Ranges of layers, each named by its first: {0: a, 11: b} is a for 0..10 and b from 11 on.

    Raises:
      ValueError: no rule starts at layer 0, or a start is negative.
    """
    firsts = sorted(starts)
    if not firsts or firsts[0] != 0:
        raise ValueError(f"starts={firsts} must begin with layer 0, so that every layer has a rule")

    def choose(layer: int, side: Side, head: int) -> Codec:
        return _at(starts[firsts[bisect.bisect_right(firsts, layer) - 1]], layer, side, head)

    return choose


def boundary(
    geometry: ModelGeometry, inner: Rule, outer: Rule, *, first: int = 2, last: int = 2
) -> Choice:
    """`outer` for the first and last layers that own a cache, `inner` between them.

    Counted in layers with a cache of their own, so on a hybrid model the recurrent layers at its
    ends do not use the protection up. With sides(k=..., v=boundary(...)) only values have it.

    Raises:
      ValueError: a negative number, or more boundary layers than the model has.
    """
    indices = [layer.index for layer in geometry.cache_layers]
    if first < 0 or last < 0 or first + last > len(indices):
        raise ValueError(
            f"{first=} and {last=} must be 0 or more and together at most {len(indices)}, the"
            " layers that own a cache"
        )
    outside = frozenset(indices[:first] + indices[len(indices) - last :])
    return _where(outside, outer, inner)


def skip_layers(
    geometry: ModelGeometry,
    rule: Rule,
    skipped: Collection[int | str],
    *,
    dtype: str = "bfloat16",
) -> Choice:
    """`kv_skip_layers`: the layers named stay exact in `dtype`, K and V; the others take `rule`.

    As vLLM's `--kv-cache-dtype-skip-layers`, a name is a layer index ("3" or 3) or
    "sliding_window", all layers with a window. Unlike there, a name that hits nothing is an error.

    Raises:
      ValueError: a name that is no layer with a cache of its own, or an unknown word.
    """
    owners = {layer.index: layer for layer in geometry.cache_layers}
    chosen: set[int] = set()
    for name in skipped:
        if name == SLIDING_WINDOW:
            found = {i for i, layer in owners.items() if layer.window is not None}
        else:
            found = {i for i in owners if str(i) == str(name)}
        if not found:
            raise ValueError(
                f"skipped layer {name!r} is not in {geometry.name}: name one of the layers that own"
                f" a cache, {min(owners)}..{max(owners)}, or {SLIDING_WINDOW!r} if any has a window"
            )
        chosen |= found
    dim = next(iter(owners.values())).k_dim
    return _where(frozenset(chosen), Exact(dim=dim, dtype=dtype), rule)


def _where(layers: frozenset[int], there: Rule, elsewhere: Rule) -> Choice:
    def choose(layer: int, side: Side, head: int) -> Codec:
        return _at(there if layer in layers else elsewhere, layer, side, head)

    return choose


def _at(rule: Rule, layer: int, side: Side, head: int) -> Codec:
    return rule if isinstance(rule, Codec) else rule(layer, side, head)


def nominal_bits(codec: Codec) -> int:
    """Bits of one vector's codes alone: of an exact codec, all its bits.

    Codes are the packed fields with an entry for at most 8 channels; wider shared ones are scales.
    """
    packed = [f for f in codec.fields if f.packed and 8 * f.width >= codec.dim]
    return sum(f.bits_per_row for f in packed or codec.fields)
