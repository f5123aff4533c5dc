"""What a plan may look like: the rules of an engine, or of whoever asks for a plan.

A `Constraints` says which codecs keys and values may have and which choices must agree. The
allocator (`turboq plan --budget`) searches inside it, `plan.violations` checks a finished plan
against it, and exporters declare their engine's with it:

    fp8 = Scheme(name="fp8", k=(match("fp8"),), v=(match("fp8"),))
    exact = Scheme(name="auto", k=(match("exact"),), v=(match("exact"),))
    Constraints(granularity="per_layer", schemes=(fp8, exact), max_formats=1, uncounted=("auto",))

is one dtype with a list of skipped layers. Two codecs are the same *format* when they are equal but
for the head dim.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any, Literal

from turboq.codecs import CODECS, Codec
from turboq.plan.geometry import ROPE_FORMS, RopeForm
from turboq.plan.read import read

Granularity = Literal["uniform", "per_layer", "per_kv", "per_head"]
GRANULARITIES: tuple[Granularity, ...] = ("uniform", "per_layer", "per_kv", "per_head")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Match:
    """Codecs by name and by the values that some of their fields may have.

    Raises:
      ValueError: unknown codec or field, or a field without values.
    """

    codec: str
    fields: dict[str, Any] = dataclasses.field(
        default_factory=dict
    )  # field -> the values it may have

    def __post_init__(self):
        if self.codec not in CODECS:
            known = ", ".join(sorted(CODECS))
            raise ValueError(f"codec={self.codec!r} must be one of {known}")
        known = [f.name for f in dataclasses.fields(CODECS[self.codec])]
        for name, values in self.fields.items():
            if name not in known:
                raise ValueError(f"codec {self.codec!r} has no field {name!r}: it has {known}")
            if not isinstance(values, list | tuple) or not values:
                raise ValueError(f"{name}={values!r} must list the values that it may have")
        fields = {name: tuple(values) for name, values in self.fields.items()}
        object.__setattr__(self, "fields", fields)

    def __call__(self, codec: Codec) -> bool:
        """Whether `codec` is one of these."""
        return codec.name == self.codec and all(
            any(type(v) is type(getattr(codec, n)) and v == getattr(codec, n) for v in values)
            for n, values in self.fields.items()
        )


def match(codec: str, **fields: Any) -> Match:
    """`match("ggml", type=("q8_0", "q4_0"))`: a value may stand for a list of one."""
    lists = {n: v if isinstance(v, list | tuple) else (v,) for n, v in fields.items()}
    return Match(codec=codec, fields=lists)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """A pair that an engine offers under one name: codecs of K beside codecs of V."""

    name: str
    k: tuple[Match, ...]
    v: tuple[Match, ...]

    def __post_init__(self):
        if not (self.name and self.k and self.v):
            raise ValueError(f"scheme {self.name!r} needs a name and codecs of k and of v")

    def __call__(self, k: Codec, v: Codec) -> bool:
        return any(m(k) for m in self.k) and any(m(v) for m in self.v)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Boundary:
    """The first and last layers must take one of these codecs (empty: any on that side)."""

    first: int
    last: int
    k: tuple[Match, ...] = ()
    v: tuple[Match, ...] = ()

    def __post_init__(self):
        if self.first < 0 or self.last < 0 or self.first + self.last == 0:
            raise ValueError(f"first={self.first} and last={self.last} must name some layers")
        if not (self.k or self.v):
            raise ValueError("a boundary needs codecs of k or of v")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstLast:
    """One format for the first n layers, one for the last m, one for all between.

    n and m are found when None; 0 is none. K and V have their own n, m and formats, unless
    `together` (n and m shared) or where the constraints decide K and V at once. `outer` narrows
    the codecs at the ends (empty: any).
    """

    first: int | None = None
    last: int | None = None
    same_ends: bool = False
    together: bool = False
    outer: tuple[Match, ...] = ()

    def __post_init__(self):
        for name in ("first", "last"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more layers, or None")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constraints:
    """Rules that hold together. The default allows everything but keys before their RoPE.

    granularity: what is decided on its own.
      uniform    one format for all keys, one for all values
      per_layer  one format for a layer, K and V alike (with `schemes`: one pair)
      per_kv     one format for the keys of a layer, one for its values
      per_head   one for every (layer, KV head, K or V)
    uniform and per_layer lie inside per_kv, per_kv inside per_head; uniform lies inside per_layer
    only with `same_k_v` or `schemes`, because K and V of a uniform plan are free otherwise.

    k, v: codecs allowed on a side; empty: any.
    schemes: allowed (K, V) pairs of a decision; empty: any.
    same_k_v: K and V have the same format wherever they are decided.
    min_bits: every codec stores at least so many bits per channel, scales included.
    boundary: formats forced on the first and last layers.
    first_last: the shape "first n, last m, all others".
    max_formats: at most so many distinct formats in the model, not counting those `uncounted`
      names: schemes by name, or codecs by name where there are no schemes. A pair counts once where
      K and V are decided at once.
    max_head_formats: at most so many distinct formats among the heads of one layer and side.
    k_rope: how keys may be stored, after or before their rotary embedding.
    joins: whether keys and values of several heads may be stored together (`LayerPlan.joint`).

    Raises:
      ValueError: fields that contradict each other.
    """

    granularity: Granularity = "per_head"
    k: tuple[Match, ...] = ()
    v: tuple[Match, ...] = ()
    schemes: tuple[Scheme, ...] = ()
    same_k_v: bool = False
    min_bits: float | None = None
    boundary: Boundary | None = None
    first_last: FirstLast | None = None
    max_formats: int | None = None
    uncounted: tuple[str, ...] = ()
    max_head_formats: int | None = None
    k_rope: tuple[RopeForm, ...] = ("after",)
    joins: bool = False

    def __post_init__(self):
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"granularity={self.granularity!r} must be one of {GRANULARITIES}")
        for name in ("max_formats", "max_head_formats"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1, or None")
        if self.min_bits is not None and not 0 <= self.min_bits < float("inf"):
            raise ValueError(f"min_bits={self.min_bits} must be 0 or more bits per channel")
        if not self.k_rope or not set(self.k_rope) <= set(ROPE_FORMS):
            raise ValueError(f"k_rope={self.k_rope} must name some of {ROPE_FORMS}")
        names = [scheme.name for scheme in self.schemes]
        if len(set(names)) < len(names):
            raise ValueError(f"schemes {names} must have names of their own")
        self._check_together(names)

    def _check_together(self, schemes: list[str]):
        if self.uncounted and self.max_formats is None:
            raise ValueError(f"uncounted={self.uncounted} needs max_formats")
        for name in self.uncounted:
            if name not in (schemes or CODECS):
                raise ValueError(f"uncounted {name!r} is none of {schemes or sorted(CODECS)}")
        if self.max_head_formats is not None and self.granularity != "per_head":
            raise ValueError(f"max_head_formats needs per_head, not {self.granularity}")
        if self.first_last is not None:
            if self.granularity not in ("per_layer", "per_kv"):
                raise ValueError(f"first_last needs per_layer or per_kv, not {self.granularity}")
            if self.max_formats is not None:
                raise ValueError("first_last and max_formats cannot be combined")

    @property
    def joint(self) -> bool:
        """K and V are decided at once, as a pair."""
        return bool(self.schemes) or self.same_k_v or self.granularity == "per_layer"

    @property
    def tied(self) -> bool:
        """The two of a pair must have the same format."""
        return self.same_k_v or (self.granularity == "per_layer" and not self.schemes)

    def allows(self, side: str, codec: Codec) -> bool:
        """Whether keys ("k") or values ("v") may have `codec` at all, wherever they stand."""
        allowed = self.k if side == "k" else self.v
        if self.min_bits is not None and codec.bits_per_channel < self.min_bits:
            return False
        return not allowed or any(m(codec) for m in allowed)

    def allows_at(self, side: str, codec: Codec, position: int, layers: int) -> bool:
        """The same in the layer at `position` among the `layers` that own a cache."""
        edge = self.boundary
        if edge is not None and (position < edge.first or position >= layers - edge.last):
            forced = edge.k if side == "k" else edge.v
            if forced and not any(m(codec) for m in forced):
                return False
        return self.allows(side, codec)

    def counts(self, *decided: Codec) -> bool:
        """Whether `max_formats` counts what one decision took: (k, v) if `joint`, else a codec."""
        if self.schemes:
            k, v = decided
            return not any(s(k, v) for s in self.schemes if s.name in self.uncounted)
        return any(codec.name not in self.uncounted for codec in decided)

    def config(self) -> dict[str, Any]:
        """JSON-ready; `from_config` is its inverse."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def from_config(value: Any) -> Constraints:
    """The constraints that `Constraints.config()` describes, from JSON.

    Raises:
      PlanError: not that, with the path of what is wrong.
    """
    return read(Constraints, value, "", {})


@functools.lru_cache(maxsize=4096)  # asked again for every layer of a plan
def format_of(codec: Codec) -> tuple[tuple[str, Any], ...]:
    """What makes two codecs the same format: everything but the head dim.

    A rotation of the whole head is the same whatever its dim.
    """
    fields = {f.name: getattr(codec, f.name) for f in dataclasses.fields(codec) if f.name != "dim"}
    if fields.get("rotation_block") == codec.dim:
        fields["rotation_block"] = "dim"
    return (("codec", codec.name), *fields.items())
