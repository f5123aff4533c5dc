"""Where a plan breaks constraints: one line each, so that an exporter can say what it must drop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from turboq.codecs import Codec
from turboq.plan.constraints import Constraints, FirstLast, format_of
from turboq.plan.types import SIDES, Plan

Place = tuple[int, str, int]  # layer, "k" or "v", KV head
Key = Callable[[Codec], Any]


def violations(constraints: Constraints, plan: Plan) -> list[str]:
    """Every rule of `constraints` that `plan` breaks, in words; empty: it may be loaded."""
    placed = {
        (layer.index, side, head): codec
        for layer in plan.layers
        for side in SIDES
        for head, codec in enumerate(plan.codecs(layer.index, side))
    }
    return (
        violations_of(constraints, placed)
        + [
            f"layer {layer.index} k: stored {layer.k.rope} RoPE is not allowed"
            for layer in plan.layers
            if layer.k.rope not in constraints.k_rope
        ]
        + [
            f"layer {layer.index}: {layer.joint} joined heads are not allowed"
            for layer in plan.layers
            if layer.joint is not None and not constraints.joins
        ]
    )


def violations_of(
    constraints: Constraints, placed: Mapping[Place, Codec], key: Key = format_of
) -> list[str]:
    """The same for codecs by place. `key` says which codecs are the same format."""
    layers = sorted({layer for layer, _, _ in placed})
    found = [
        f"layer {layer} {side} head {head}: {_shown(codec)} is not allowed"
        for (layer, side, head), codec in placed.items()
        if not constraints.allows_at(side, codec, layers.index(layer), len(layers))
    ]
    found += _unequal(constraints, placed, layers, key)
    found += _bad_pairs(constraints, placed, key)
    found += _too_many(constraints, placed, layers, key)
    if constraints.first_last is not None:
        found += _not_first_last(constraints, constraints.first_last, placed, layers, key)
    return found


def _unequal(constraints, placed, layers, key) -> Iterable[str]:
    """Places that must agree and do not."""
    if constraints.granularity == "per_head":
        return
    whole = constraints.granularity == "uniform"
    for side in SIDES:
        for group in [layers] if whole else [[layer] for layer in layers]:
            formats = {key(c) for (i, s, _), c in placed.items() if s == side and i in group}
            if len(formats) > 1:
                where = "all layers" if whole else f"all heads of layer {group[0]}"
                yield f"{side}: {where} must have one format, not {len(formats)}"


def _bad_pairs(constraints, placed, key) -> Iterable[str]:
    """K and V that may not stand beside each other."""
    if not constraints.joint:
        return
    for (layer, side, head), k in placed.items():
        if side != "k":
            continue
        v = placed[layer, "v", head]
        if constraints.tied and key(k) != key(v):
            yield f"layer {layer} head {head}: {_shown(k)} and {_shown(v)} are not the same format"
        elif constraints.schemes and not any(scheme(k, v) for scheme in constraints.schemes):
            names = ", ".join(scheme.name for scheme in constraints.schemes)
            yield f"layer {layer} head {head}: {_shown(k)} beside {_shown(v)} is none of {names}"


def _too_many(constraints, placed, layers, key) -> Iterable[str]:
    most = constraints.max_formats
    if most is not None:
        if constraints.joint:
            pairs = ((k, placed[i, "v", h]) for (i, s, h), k in placed.items() if s == "k")
            counted = {(key(k), key(v)) for k, v in pairs if constraints.counts(k, v)}
        else:
            counted = {key(codec) for codec in placed.values() if constraints.counts(codec)}
        if len(counted) > most:
            yield f"{len(counted)} formats, at most {most} are allowed"
    most = constraints.max_head_formats
    if most is not None:
        for layer in layers:
            for side in SIDES:
                formats = {key(c) for (i, s, _), c in placed.items() if (i, s) == (layer, side)}
                if len(formats) > most:
                    yield f"layer {layer} {side}: {len(formats)} formats, at most {most} allowed"


def _not_first_last(
    constraints: Constraints, rule: FirstLast, placed, layers: Sequence[int], key
) -> Iterable[str]:
    """No n and m give the shape. The first head speaks for its layer: `_unequal` sees the rest."""
    found = []
    for side in SIDES:
        row = [placed[layer, side, 0] for layer in layers]
        found.append(_splits(rule, row, [key(codec) for codec in row]))
    if constraints.joint:
        rows = [(placed[layer, "k", 0], placed[layer, "v", 0]) for layer in layers]
        keys = [(key(k), key(v)) for k, v in rows]
        found = [
            _splits(rule, [k for k, _ in rows], keys) & _splits(rule, [v for _, v in rows], keys)
        ]
    elif rule.together:
        found = [found[0] & found[1]]
    if not all(found):
        yield "layers are not: one format for the first n, one for the last m, one between"


def _splits(rule: FirstLast, row: Sequence[Codec], keys: Sequence[Any]) -> set[tuple[int, int]]:
    """All (n, m) with which the row has the shape."""
    layers = len(row)
    outer = [not rule.outer or any(m(codec) for m in rule.outer) for codec in row]

    def ends(fixed: int | None, keys: Sequence[Any], outer: Sequence[bool]) -> list[int]:
        """Lengths that one end can have: one format, of those allowed there."""
        longest = 0
        while longest < layers and keys[longest] == keys[0] and outer[longest]:
            longest += 1
        return [n for n in range(longest + 1) if fixed in (None, n)]

    return {
        (n, m)
        for n in ends(rule.first, keys, outer)
        for m in ends(rule.last, keys[::-1], outer[::-1])
        if n + m <= layers
        and len(set(keys[n : layers - m])) <= 1
        and not (rule.same_ends and n and m and keys[0] != keys[-1])
    }


def _shown(codec: Codec) -> str:
    fields = ", ".join(f"{n}={v}" for n, v in codec.config().items() if n not in ("codec", "dim"))
    return f"{codec.name}({fields})"
