"""What every exporter is: an engine's name, what it can hold, and how a plan is projected onto it.

No engine takes a free map of codecs, so an exporter answers, for every layer, side and KV head,
what the engine will really store there (`Held`). Everything else (status, what was dropped, bytes,
the plan to evaluate) follows from that in one place, `turboq.export.report`.

    project(plan, arrays, options) -> Projection(held, files, flags)      pure, writes nothing
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from turboq.cache import composed
from turboq.cache.layer import TokenPolicy
from turboq.codecs.base import Codec
from turboq.codecs.exact import Exact
from turboq.codecs.int_affine import IntAffine
from turboq.codecs.kivi import KiviKey, KiviValue
from turboq.errors import TurboqError
from turboq.export.same import same
from turboq.plan import LayerGeometry, ModelGeometry, Plan, array_name
from turboq.plan.constraints import Constraints, Match, Scheme
from turboq.plan.document import pretty
from turboq.plan.geometry import RopeForm
from turboq.plan.ladder import Ladder
from turboq.plan.rules import nominal_bits
from turboq.plan.types import LayerPlan

Side = Literal["k", "v"]
Place = tuple[int, Side, int]  # layer index, side, KV head
Tensors = Mapping[str, np.ndarray]
Status = Literal["exact", "approximated", "unsupported"]
SIDES: tuple[Side, ...] = ("k", "v")
STATUSES: tuple[Status, ...] = ("exact", "approximated", "unsupported")
AFFINE = (IntAffine, KiviKey, KiviValue)
MODEL_DTYPES = ("bfloat16", "float16", "float32")
PREFERENCES = ("quality", "size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the user may say besides the plan.

    `dtype`: type the engine runs the model in, and so of unquantized layers (None: that of the
    plan's exact codecs, else bfloat16). `prefer`: "quality" stores no head in fewer bits than the
    plan if the engine can help it, "size" stays within the plan's bytes. `tensor_parallel`: ranks,
    for files that list them. `checkpoint`: folder that an overlay is made for. `rope_envelope`:
    widen static K ranges to the norm of their rotary pair. `ladder`: of which the plan is rung 0.

    Raises:
      TurboqError: unknown dtype or preference, or fewer than one rank.
    """

    dtype: str | None = None
    prefer: str = "quality"
    tensor_parallel: int = 1
    checkpoint: Path | None = None
    rope_envelope: bool = False
    ladder: Ladder | None = None

    def __post_init__(self):
        if self.dtype is not None and self.dtype not in MODEL_DTYPES:
            raise TurboqError(f"dtype={self.dtype!r} must be one of {', '.join(MODEL_DTYPES)}")
        if self.prefer not in PREFERENCES:
            raise TurboqError(f"prefer={self.prefer!r} must be one of {', '.join(PREFERENCES)}")
        if self.tensor_parallel < 1:
            raise TurboqError(f"tensor_parallel={self.tensor_parallel} must be at least 1 rank")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """One head's K or V in the plan, with its fitted arrays.

    Unless `rope` is "after", codec and arrays are of keys as `turboq.cache.key_form` has them;
    where heads are `joint`, of units (`turboq.cache.joint`).
    """

    place: Place
    layer: LayerGeometry
    codec: Codec
    arrays: dict[str, np.ndarray]
    rope: RopeForm = "after"
    joint: int | None = None

    @property
    def side(self) -> Side:
        return self.place[1]

    @property
    def dim(self) -> int:
        return self.codec.dim

    def __str__(self) -> str:
        index, side, head = self.place
        return f"layer {index}, {side.upper()} of head {head} ({self.codec.name})"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Held:
    """What the engine stores for one head's K or V.

    `format` is the engine's own name. `codec` with `arrays` gives the same values in turboq; None
    where turboq has no such codec, and then `bits` says how many a vector takes in all, `codes` how
    many of them are codes. `reduced` is False where the engine cannot quantize this head at all and
    keeps the model's type. `note` says what is not plain from plan and format. `rope`: engines
    store keys after their rotary embedding, unless they say otherwise.
    """

    format: str
    codec: Codec | None = None
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    bits: int | None = None
    codes: int | None = None
    reduced: bool = True
    note: str = ""
    rope: RopeForm = "after"

    @property
    def stored_bits(self) -> int:
        """Bits of one vector, the engine's scales included."""
        if self.bits is not None:
            return self.bits
        assert self.codec is not None
        return self.codec.bits_per_vector

    @property
    def code_bits(self) -> int:
        """Bits of one vector's codes alone: what is compared with the plan's."""
        if self.codes is not None:
            return self.codes
        assert self.codec is not None
        return nominal_bits(self.codec)


Formats = dict[str, tuple[Codec, Codec]]
Hold = Callable[[Entry], Held | None]  # None: the engine cannot store that head so


@dataclasses.dataclass(frozen=True, kw_only=True)
class Projection:
    """A plan as one engine will hold it.

    `files` are names and contents, `flags` command lines to paste, `env` environment variables.
    `policy` is what the engine keeps exact. `padding` adds bytes per token of a layer (by its
    index) that no head accounts for. `reordered` says why the values are others although every
    codec is the plan's: the engine has the channels in another order.
    """

    held: dict[Place, Held]
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    flags: tuple[str, ...] = ()
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    policy: TokenPolicy = dataclasses.field(default_factory=TokenPolicy)
    padding: dict[int, float] = dataclasses.field(default_factory=dict)
    reordered: str = ""


class Exporter(abc.ABC):
    """One engine: `versions` is the range its rules hold for.

    `checked` says where they come from: version or commit, and when; `ran` whether the engine
    itself was run on what is written for it, `said` both.

    `uses` names the options that only some engines understand and this one does; `latent` says
    whether it has a place for the vectors of multi-head latent attention, `joint` whether it reads
    heads that are stored together (`turboq.cache.joint`).
    """

    name: ClassVar[str]
    title: ClassVar[str]
    versions: ClassVar[str]
    checked: ClassVar[str]
    ran: ClassVar[bool] = False
    uses: ClassVar[tuple[str, ...]] = ()
    latent: ClassVar[bool] = False
    joint: ClassVar[bool] = False

    @property
    def said(self) -> str:
        """`checked`, and where it was not run that too."""
        return self.checked if self.ran else f"{self.checked}; the engine itself not run here"

    @abc.abstractmethod
    def formats(self, model: ModelGeometry, options: Options) -> Formats:
        """What this engine holds exactly, or our nearest codec: its name -> (K codec, V codec).

        At the head dims of the model's first cache: templates for `turboq.plan.build.at_dim`.
        """

    @abc.abstractmethod
    def constraints(
        self, model: ModelGeometry, options: Options | None = None
    ) -> tuple[Constraints, ...]:
        """Rules for the allocator: a plan that obeys any one of them exports every entry exact."""

    def check_model(self, model: ModelGeometry) -> None:
        """Raises TurboqError where the engine has no place for what the model caches."""
        if not self.latent and any(layer.latent for layer in model.cache_layers):
            raise TurboqError(
                f"{self.name}: {model.name} caches latent vectors (multi-head latent attention), "
                "which this export does not write: --engine=reader hands the plan over as it is"
            )

    def check_plan(self, plan: Plan) -> None:
        """Raises TurboqError where the engine reads each head by itself and the plan joins them."""
        if not self.joint and any(layer.joint is not None for layer in plan.layers):
            raise TurboqError(
                f"{self.name} reads each head by itself, and this plan joins keys and values of "
                f"several: make one with --engine={self.name}, or with --joint=none"
            )

    def policy(self, wanted: TokenPolicy) -> TokenPolicy:
        """The nearest token policy that the engine keeps: by default no exact tokens."""
        return dataclasses.replace(wanted, sinks=0, recent=0)

    @abc.abstractmethod
    def project(self, plan: Plan, arrays: Tensors, options: Options) -> Projection:
        """The plan as the engine will hold it.

        Raises:
          TurboqError: the engine cannot hold it even approximately; says what would.
        """


def first_dims(model: ModelGeometry) -> dict[Side, int]:
    """Head dims of K and V of the first layer that owns a cache."""
    first = model.cache_layers[0]
    return {"k": first.k_dim, "v": first.v_dim}


def entries(plan: Plan, arrays: Tensors) -> list[Entry]:
    """Every head of every layer that owns a cache, K before V."""
    return [
        Entry(
            place=(layer.index, side, head),
            layer=plan.model.layers[layer.index],
            codec=codec,
            arrays=_head_arrays(plan, arrays, layer.index, side, head),
            rope=layer.side(side).rope,
            joint=layer.joint,
        )
        for layer in plan.layers
        for side in SIDES
        for head, codec in enumerate(plan.codecs(layer.index, side))
    ]


def stored_codec(layer: LayerPlan, codec: Codec) -> Codec:
    """The codec whose arrays a plan stores of a head, which of joined heads are their units'."""
    return codec if layer.joint is None else composed.held(codec)


def _head_arrays(
    plan: Plan, arrays: Tensors, index: int, side: Side, head: int
) -> dict[str, np.ndarray]:
    layer = plan.layers[plan.position(index)]
    chosen = layer.side(side)
    names = stored_codec(layer, chosen.of(head)).array_shapes
    if chosen.stacked:
        stacks = {a: np.asarray(arrays[array_name(index, side, a)]) for a in names}
        return {a: np.asarray(values[head]) for a, values in stacks.items()}
    return {a: np.asarray(arrays[array_name(index, side, a, head)]) for a in names}


def status_of(entry: Entry, held: Held) -> Status:
    """How one head fares: `unsupported` is one to be quantized that stays in the model's type."""
    if (
        held.codec is not None
        and held.rope == entry.rope
        and same(entry.codec, entry.arrays, held.codec, held.arrays)
    ):
        return "exact"
    if not held.reduced and not isinstance(entry.codec, Exact):
        return "unsupported"
    return "approximated"


def model_dtype(plan: Plan, options: Options) -> str:
    """The type the engine runs the model in: as told, else the plan's commonest exact one.

    Without exact codecs, that of the scales of affine codecs, which engines keep in this type.
    """
    if options.dtype is not None:
        return options.dtype
    used = [c.dtype for c in _codecs(plan) if isinstance(c, Exact)]
    used = used or [c.scale_dtype for c in _codecs(plan) if isinstance(c, AFFINE)]
    return max(MODEL_DTYPES, key=used.count)


def _codecs(plan: Plan) -> list[Codec]:
    return [c for layer in plan.layers for side in SIDES for c in plan.codecs(layer.index, side)]


def exact_held(entry: Entry, dtype: str, *, reduced: bool = True, note: str = "") -> Held:
    """A head in a floating-point type."""
    codec = Exact(dim=entry.dim, dtype=dtype)
    return Held(format=dtype, codec=codec, reduced=reduced, note=note)


def schemes(formats: Formats) -> tuple[Scheme, ...]:
    """One scheme per format: its K beside its V."""
    pairs = formats.items()
    return tuple(Scheme(name=n, k=matches((k,)), v=matches((v,))) for n, (k, v) in pairs)


def sides_of(formats: Formats) -> dict[Side, tuple[Match, ...]]:
    """The formats of K and of V, free of each other: keywords of `Constraints`."""
    return {
        "k": matches(tuple(dict.fromkeys(k for k, _ in formats.values()))),
        "v": matches(tuple(dict.fromkeys(v for _, v in formats.values()))),
    }


def matches(codecs: tuple[Codec, ...]) -> tuple[Match, ...]:
    """Rules that allow exactly these formats (every field but the head dim)."""
    found = []
    for codec in codecs:
        names = (f.name for f in dataclasses.fields(codec) if f.name != "dim")
        fields = {name: (getattr(codec, name),) for name in names}
        found.append(Match(codec=codec.name, fields=fields))
    return tuple(found)


def json_file(value: Any) -> bytes:
    """JSON for people, with a final newline."""
    return (pretty(value) + "\n").encode()
