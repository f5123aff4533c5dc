"""KVTuner: YAML with the bits of K and V per layer, or per layer and head, beside global settings.

    {layer: {nbits_key: int, nbits_value: int}}     {layer: {head: {nbits_key, nbits_value}}}

    axis_key -1, axis_value 0   keys per channel over tokens, values per token: kivi_key, kivi_value
    axis_key 0, axis_value 0    both per token: int_affine without rotation

Its quanto backend stores 2 or 4 bits with a minimum of its own, as our codecs do; the vanilla one
(axes 1 and 0) has 8 bits too, but rounds the minimum to a multiple of the scale.
"""

from __future__ import annotations

import dataclasses

from turboq.cache.layer import TokenPolicy
from turboq.codecs.int_affine import IntAffine
from turboq.codecs.kivi import GROUPS, KiviKey, KiviValue
from turboq.errors import TurboqError
from turboq.export import choose, quanto
from turboq.export.base import (
    SIDES,
    Entry,
    Exporter,
    Formats,
    Held,
    Options,
    Place,
    Projection,
    Side,
    Tensors,
    entries,
    first_dims,
    model_dtype,
    sides_of,
)
from turboq.export.quanto import groups_of, quanto_codec, residual
from turboq.plan import ModelGeometry, Plan
from turboq.plan.constraints import Constraints
from turboq.plan.rules import nominal_bits

BITS = {"quanto": quanto.BITS, "vanilla": (2, 4, 8)}
PER_CHANNEL_AXIS = {"quanto": -1, "vanilla": 1}
PER_LAYER, PER_HEAD = "kvtuner_per_layer.yaml", "kvtuner_per_head.yaml"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mode:
    """The settings that hold for all layers."""

    backend: str
    keys: str  # "channel" or "token"
    group: int
    dtype: str  # the model's, and so that of scales

    def codec(self, side: Side, dim: int, bits: int) -> KiviKey | KiviValue | IntAffine:
        """The codec that stores the same values under the quanto backend."""
        channel = self.keys == "channel"
        return quanto_codec(
            side, dim, bits, group=self.group, dtype=self.dtype, per_channel=channel
        )

    def bits(self, entry: Entry, prefer: str) -> int:
        """The fewest bits that are not fewer than planned; for size the most that are not more."""
        allowed = BITS[self.backend]
        if prefer == "size":
            planned = entry.codec.bits_per_vector
            size = {b: self.codec(entry.side, entry.dim, b).bits_per_vector for b in allowed}
            return max((b for b in allowed if size[b] <= planned), default=allowed[0])
        codes = nominal_bits(entry.codec)
        return min((b for b in allowed if b * entry.dim >= codes), default=allowed[-1])

    def held(self, entry: Entry, prefer: str) -> Held:
        """One head."""
        bits = self.bits(entry, prefer)
        codec = self.codec(entry.side, entry.dim, bits)
        name = f"{self.backend} {bits} bits"
        if self.backend == "quanto":
            return Held(format=name, codec=codec)
        note = "minimum rounded to a multiple of the scale"
        stored = codec.bits_per_vector
        return Held(format=name, bits=stored, codes=bits * entry.dim, note=note)


def modes_of(model: ModelGeometry, backend: str, dtype: str | None) -> list[Mode]:
    """Every way to group under a backend."""
    groups = groups_of(model)
    return [
        Mode(backend=backend, keys=keys, group=group, dtype=dtype or "bfloat16")
        for keys in ("channel", "token")
        for group in groups
    ]


class KVTuner(Exporter):
    """The YAML and the settings that go with it."""

    name = "kvtuner"
    title = "KVTuner's flexible quantized cache (transformers)"
    versions = "revision babe7753"
    checked = "babe7753 by source, November 2026; files read back with PyYAML"

    def formats(self, model: ModelGeometry, options: Options) -> Formats:
        k, v = first_dims(model).values()
        return {
            f"{mode.keys} g{mode.group} {bits} bits": (
                mode.codec("k", k, bits),
                mode.codec("v", v, bits),
            )
            for mode in modes_of(model, "quanto", options.dtype)
            for bits in BITS["quanto"]
        }

    def constraints(
        self, model: ModelGeometry, options: Options | None = None
    ) -> tuple[Constraints, ...]:
        """One set per way to group; in each, bits are free for every head, K and V apart."""
        k, v = first_dims(model).values()
        out = []
        for mode in modes_of(model, "quanto", options and options.dtype):
            bits = BITS["quanto"]
            pairs: Formats = {str(b): (mode.codec("k", k, b), mode.codec("v", v, b)) for b in bits}
            out.append(Constraints(**sides_of(pairs)))
        if not out:
            raise TurboqError(f"{self.name}: no group of {GROUPS} divides the model's head dims")
        return tuple(out)

    def policy(self, wanted: TokenPolicy) -> TokenPolicy:
        return residual(wanted)

    def project(self, plan: Plan, arrays: Tensors, options: Options) -> Projection:
        found = entries(plan, arrays)
        dtype = model_dtype(plan, options)
        modes = [mode for backend in BITS for mode in modes_of(plan.model, backend, dtype)]
        if not modes:
            raise TurboqError(
                f"{self.name} cannot hold {found[0]}: no group of {GROUPS} divides head dim"
                f" {found[0].dim}"
            )
        tried = [{e.place: mode.held(e, options.prefer) for e in found} for mode in modes]
        total = choose.stack([choose.cost_of(found, held) for held in tried])
        best = choose.pick(total, choose.planned_bits(found), options.prefer)
        bits = {e.place: modes[best].bits(e, options.prefer) for e in found}
        return _projection(plan, modes[best], tried[best], bits)


def _projection(
    plan: Plan, mode: Mode, held: dict[Place, Held], bits: dict[Place, int]
) -> Projection:
    heads = {layer.index: plan.model.layers[layer.index].kv_heads for layer in plan.layers}
    uniform = all(
        len({bits[index, side, head] for head in range(n)}) == 1
        for index, n in heads.items()
        for side in SIDES
    )
    name, kind = (PER_LAYER, "per_layer") if uniform else (PER_HEAD, "per_head")
    policy = residual(plan.tokens)
    settings = {
        "backend": mode.backend,
        "axis_key": PER_CHANNEL_AXIS[mode.backend] if mode.keys == "channel" else 0,
        "axis_value": 0,
        "asym": True,
        "q_group_size": mode.group,
        "residual_length": policy.recent,
        f"{kind}_quant": True,
        f"{kind}_config_path": name,
    }
    listed = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    return Projection(
        held=held,
        files={
            name: yaml_of(bits, heads, uniform).encode(),
            "kvtuner_settings.yaml": yaml(settings).encode(),
        },
        flags=(f"FlexibleQuantizedCacheConfig({listed})",),
        policy=policy,
        notes=(
            "The residual is emptied when it is full: between 0 and residual_length - 1 of the"
            " newest tokens are exact.",
            "Groups of tokens count from the first; a prompt that is no multiple of q_group_size"
            " lets groups run over from one head into the next.",
        ),
    )


def yaml_of(bits: dict[Place, int], heads: dict[int, int], uniform: bool) -> str:
    """Per layer, or per layer and head."""

    def pair(index: int, head: int) -> dict[str, int]:
        return {"nbits_key": bits[index, "k", head], "nbits_value": bits[index, "v", head]}

    if uniform:
        return yaml({index: pair(index, 0) for index in heads})
    return yaml({index: {h: pair(index, h) for h in range(n)} for index, n in heads.items()})


def yaml(value: dict, indent: int = 0) -> str:
    """Block YAML of nested mappings with plain scalars."""
    out = []
    for key, item in value.items():
        pad = " " * indent
        if isinstance(item, dict):
            out.append(f"{pad}{key}:\n{yaml(item, indent + 2)}")
        else:
            scalar = str(item).lower() if isinstance(item, bool) else item
            out.append(f"{pad}{key}: {scalar}\n")
    return "".join(out)
