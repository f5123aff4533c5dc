"""The shape of a statistics folder's `manifest.json` and of a run's `inputs.json`, as types.

`turboq.plan.json_file` checks every field against them; the values stay JSON.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from turboq.numbers.rope import Rope
from turboq.plan import ModelGeometry
from turboq.plan.errors import PlanConflict
from turboq_calibrate.observe.recipe import ObserveRecipe, Shard

_OPTIONAL = {"optional": True}


@dataclasses.dataclass(frozen=True, kw_only=True)
class File:
    """A file of the folder itself."""

    file: str
    bytes: int
    sha256: str

    def __post_init__(self):
        if not re.fullmatch(r"[\w-][\w.-]{0,79}", self.file, re.ASCII):
            raise ValueError(f"file={self.file[:60]!r} must be a plain name in this folder")
        if self.bytes < 0:
            raise ValueError(f"bytes={self.bytes} must be 0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer(File):
    """A layer's statistics, its sampled tokens, and [heads, dim] of every side that it has."""

    index: int
    path: str
    tokens: File | None
    rope: Rope | None
    k: tuple[int, int]
    v: tuple[int, int]
    q: tuple[int, int]
    k_before: tuple[int, int] | None = dataclasses.field(default=None, metadata=_OPTIONAL)
    q_before: tuple[int, int] | None = dataclasses.field(default=None, metadata=_OPTIONAL)

    def __post_init__(self):
        super().__post_init__()
        before = None if self.rope is None else (self.k, self.q)
        found = None if self.k_before is self.q_before is None else (self.k_before, self.q_before)
        if found != before:
            raise PlanConflict(
                "k_before", "k_before and q_before are k and q in a layer with rope, absent else"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOf:
    fingerprint: str
    family: str
    name: str
    dtype: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    name: str
    sha256: str
    windows: int
    weight: float = dataclasses.field(default=1.0, metadata=_OPTIONAL)

    def __post_init__(self):
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight={self.weight} must be more than 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts:
    """`windows` of `window` tokens in all."""

    texts: tuple[Text, ...]
    bos: bool
    held_back_sha256: str
    tokens_sha256: str
    windows: int
    window: int

    def __post_init__(self):
        if self.window < 1:
            raise ValueError(f"window={self.window} must be 1 or more tokens")
        counted = sum(text.windows for text in self.texts)
        if any(text.windows < 0 for text in self.texts) or counted != self.windows:
            raise PlanConflict("windows", f"{self.windows}, but the texts have {counted}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """What identifies a run (`recipe.observe_inputs`)."""

    statistics_version: int
    model: ModelOf
    text: Texts
    recipe: ObserveRecipe
    shard: Shard | None = dataclasses.field(default=None, metadata=_OPTIONAL)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contents:
    """All of a manifest; `tokens` are those counted per head."""

    version: int
    inputs: Inputs
    geometry: ModelGeometry
    tokens: int
    bins: dict[str, Any]
    windows: File
    layers: tuple[Layer, ...]

    def __post_init__(self):
        if self.tokens < 1:
            raise ValueError(f"tokens={self.tokens} must be 1 or more")
        if len(self.layers) != len(self.geometry.layers):
            raise PlanConflict(
                "layers", f"{len(self.layers)}, but the geometry has {len(self.geometry.layers)}"
            )
        for i, (layer, of) in enumerate(zip(self.layers, self.geometry.layers, strict=True)):
            sides = (of.kv_heads, of.k_dim), (of.kv_heads, of.v_dim), (of.q_heads, of.k_dim)
            if (layer.index, layer.path) != (i, of.path) or (layer.k, layer.v, layer.q) != sides:
                raise PlanConflict(f"layers[{i}]", "is not the geometry's layer")
