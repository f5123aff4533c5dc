"""What every (layer, KV head, K or V) may be stored as: codecs, exact sizes, arrays when asked for.

    table = build_table(geometry, [named("tq 3", TurboQuantMSE(dim=64, bits=3)), ...], observed)
    plan, arrays = table.to_plan(geometry, chosen)          chosen[u] is a candidate of unit u

Candidate c carries the same label everywhere, so "the same c for all units" is a uniform plan, and
costs and sizes of all units are two arrays [U, C]. The codec behind a label may differ by head.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from turboq.cache.layer import TokenPolicy
from turboq.codecs import Codec
from turboq.codecs.observed import Observed
from turboq.codecs.transform import Transform
from turboq.codecs.transform_padded import one_kind, pad_side
from turboq.errors import TurboqError
from turboq.plan import (
    LayerGeometry,
    ModelGeometry,
    Plan,
    Provenance,
    Quality,
    array_name,
    check_arrays,
    compose,
    head_plan,
)
from turboq.plan.build import Side
from turboq.plan.geometry import RopeForm
from turboq.plan.types import SIDES
from turboq_calibrate.run.progress import Progress

Arrays = dict[str, np.ndarray]
Chosen = Int[np.ndarray, "U"] | Mapping["Unit", int]


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Unit:
    """The smallest thing that has a codec of its own: K or V of one KV head of one layer."""

    layer: int
    side: Side
    head: int


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Option:
    """One candidate for all KV heads of one side of one layer: the codec of every head.

    `fit` gives every head's arrays; it is called once, when they are first needed, so that a
    table of many candidates holds the arrays of those that are used. `costs` [K, X] is what the
    fit itself knows they cost, nats per token on each of X texts; None: not known.
    """

    codecs: tuple[Codec, ...]
    fit: Callable[[], Sequence[Mapping[str, np.ndarray]]]
    costs: Float[np.ndarray, "K X"] | None = None

    def __post_init__(self):
        if not self.codecs:
            raise ValueError("an option needs the codec of every KV head")

    @functools.cached_property
    def arrays(self) -> tuple[Arrays, ...]:
        """Fitted arrays of every head, float32.

        Raises:
          ValueError: the fit's arrays are not those of the codecs.
        """
        rows = tuple({n: np.asarray(x, np.float32) for n, x in row.items()} for row in self.fit())
        if len(rows) != len(self.codecs):
            raise ValueError(f"arrays of {len(rows)} heads for {len(self.codecs)} codecs")
        for codec, row in zip(self.codecs, rows, strict=True):
            shapes = {name: values.shape for name, values in row.items()}
            if shapes != codec.array_shapes:
                raise ValueError(f"{codec.name}: arrays {shapes} must be {codec.array_shapes}")
        return rows

    @classmethod
    def shared(
        cls, codec: Codec, heads: int, fit: Callable[[], Mapping[str, np.ndarray]]
    ) -> Option:
        """One codec for all heads; `fit` gives arrays with a leading axis of `heads`."""

        def rows() -> list[Arrays]:
            stacked = fit()
            return [{n: np.asarray(x[h]) for n, x in stacked.items()} for h in range(heads)]

        return cls((codec,) * heads, rows)

    @functools.cached_property
    def groups(self) -> tuple[tuple[Codec, tuple[int, ...], Arrays], ...]:
        """(codec, its heads, their arrays with a leading axis), one entry per distinct codec."""
        out = []
        for codec in dict.fromkeys(self.codecs):
            heads = tuple(h for h, c in enumerate(self.codecs) if c == codec)
            names = codec.array_shapes
            out.append((codec, heads, {n: np.stack([self.arrays[h][n] for h in heads])
                                       for n in names}))  # fmt: skip
        return tuple(out)

    @functools.cached_property
    def padded(self) -> tuple[Codec, dict[str, Array]] | None:
        """One codec and arrays [K, ...] that simulate all heads, if they are transforms."""
        if not one_kind(self.codecs):
            return None
        codecs = [codec for codec in self.codecs if isinstance(codec, Transform)]
        rows = [{n: jnp.asarray(x)[None] for n, x in row.items()} for row in self.arrays]
        return pad_side(codecs, rows, [1] * len(rows))

    @property
    def bits(self) -> tuple[int, ...]:
        """Stored bits of one token, of every head."""
        return tuple(c.bits_per_vector for c in self.codecs)


@dataclasses.dataclass(frozen=True)
class Maker:
    """How one label becomes an option of any layer and side."""

    label: str
    make: Callable[[LayerGeometry, Side, Observed | None], Option]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Table:
    """Candidates of all units: `options[layer, side][c]` is labelled `labels[c]`.

    `source` identifies what they are fitted to (a hash), `k_rope` says where keys stand, `windows`
    how many tokens the caches of some layers keep (`ModelGeometry.kept_window`; others: all).
    `joint` has the arrays of layers that store units of `joint_heads` heads (`turboq.cache.joint`).
    """

    labels: tuple[str, ...]
    options: dict[tuple[int, Side], tuple[Option, ...]]
    source: str = ""
    k_rope: RopeForm = "after"
    windows: dict[int, int] = dataclasses.field(default_factory=dict)
    joint_heads: int | None = None
    joint: dict[int, Arrays] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not self.labels or len(set(self.labels)) != len(self.labels):
            raise ValueError(f"{self.labels=} must be one or more different names")
        for (layer, side), options in self.options.items():
            where = f"layer {layer}, {side}"
            if len(options) != len(self.labels):
                raise ValueError(f"{where}: {len(options)=} must be {len(self.labels)=}")
            if len({len(o.codecs) for o in options}) != 1:
                raise ValueError(f"{where}: candidates are for different numbers of heads")
            for codec in (c for o in options for c in o.codecs):
                if codec.block != 1:
                    raise TurboqError(
                        f"{where}: codec {codec.name} stores blocks of {codec.block} tokens; "
                        "candidates must store token by token"
                    )

    @functools.cached_property
    def units(self) -> tuple[Unit, ...]:
        """All units: by layer, K before V, by head."""
        return tuple(
            Unit(layer=layer, side=side, head=head)
            for layer, side in sorted(self.options)
            for head in range(len(self.options[layer, side][0].codecs))
        )

    @functools.cached_property
    def index(self) -> dict[Unit, int]:
        """Position of every unit in `units`."""
        return {unit: i for i, unit in enumerate(self.units)}

    @functools.cached_property
    def layers(self) -> tuple[int, ...]:
        """Layers that have units, ascending."""
        return tuple(sorted({layer for layer, _ in self.options}))

    def rows(self, layer: int, side: Side) -> slice:
        """Where the units of one layer's side stand in `units`, in head order."""
        start = self.index[Unit(layer=layer, side=side, head=0)]
        return slice(start, start + len(self.options[layer, side][0].codecs))

    @functools.cached_property
    def sizes(self) -> Int[np.ndarray, "U C"]:
        """Stored bits of one token, every bit counted."""
        return np.concatenate(
            [np.array([o.bits for o in self.options[key]]).T for key in sorted(self.options)]
        )

    @property
    def channels(self) -> int:
        """Channels of one token: sum of dims over all units, the divisor of bits per channel."""
        return sum(c.dim for options in self.options.values() for c in options[0].codecs)

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of all labels and codecs (arrays follow from them and from what was observed)."""
        forms = [self.k_rope] if self.joint_heads is None else [self.k_rope, self.joint_heads]
        digest = hashlib.sha256(json.dumps([self.labels, self.source, *forms]).encode())
        for key in sorted(self.options):
            for option in self.options[key]:
                configs = [codec.config() for codec in option.codecs]
                digest.update(json.dumps([key, configs], sort_keys=True).encode())
        return digest.hexdigest()

    def total(self, chosen: Chosen) -> int:
        """Stored bits of one token under a choice."""
        return int(self.sizes[np.arange(len(self.units)), self.check(chosen)].sum())

    def bits_per_channel(self, chosen: Chosen) -> float:
        return self.total(chosen) / self.channels

    def check(self, chosen: Chosen) -> Int[np.ndarray, "U"]:
        """The choice as an array over `units`.

        Raises:
          ValueError: a unit without a choice, an unknown unit, or a candidate out of range.
        """
        if isinstance(chosen, Mapping):
            if set(chosen) != set(self.units):
                odd = sorted(set(chosen) ^ set(self.units))[:3]
                raise ValueError(f"a choice must name every unit once, these differ: {odd}")
            chosen = np.array([chosen[u] for u in self.units])
        found = np.asarray(chosen)
        if found.shape != (len(self.units),):
            raise ValueError(f"choice of shape {found.shape} must be [{len(self.units)}]")
        if found.min() < 0 or found.max() >= len(self.labels):
            raise ValueError(f"choices {found.min()}..{found.max()}: 0..{len(self.labels) - 1}")
        return found.astype(np.int64)

    def uniform(self, k: int, v: int) -> Int[np.ndarray, "U"]:
        """Candidate k for all keys and v for all values."""
        return np.array([k if u.side == "k" else v for u in self.units])

    def to_plan(
        self,
        geometry: ModelGeometry,
        chosen: Chosen,
        *,
        policy: TokenPolicy | None = None,
        provenance: Provenance | None = None,
        quality: Quality | None = None,
    ) -> tuple[Plan, Arrays]:
        """The plan that stores every unit as chosen, and its arrays under the plan's names."""
        at = self.check(chosen)

        def option(layer: int, side: Side, head: int) -> Option:
            return self.options[layer, side][
                at[self.index[Unit(layer=layer, side=side, head=head)]]
            ]

        plan = head_plan(
            geometry,
            lambda layer, side, head: option(layer, side, head).codecs[head],
            policy=policy,
            provenance=provenance,
            quality=quality,
            k_rope=self.k_rope,
            joint=self.joint_heads,
        )
        out: Arrays = {}
        for layer in plan.layers:
            for name, values in self.joint.get(layer.index, {}).items():
                out[array_name(layer.index, "joint", name)] = values.astype(np.float32)
            heads = range(geometry.layers[layer.index].kv_heads)
            for side in SIDES:
                rows = [option(layer.index, side, head).arrays[head] for head in heads]
                if layer.side(side).stacked:
                    for name in rows[0]:
                        out[array_name(layer.index, side, name)] = np.stack([r[name] for r in rows])
                    continue
                for head, row in enumerate(rows):
                    for name, values in row.items():
                        out[array_name(layer.index, side, name, head)] = values
        return plan, check_arrays(plan, compose(plan, out))


def build_table(
    geometry: ModelGeometry,
    makers: Sequence[Maker],
    observed: Callable[[int, Side], Observed] | None = None,
    *,
    source: str = "",
    k_rope: RopeForm = "after",
    joint_heads: int | None = None,
    joint: dict[int, Arrays] | None = None,
    progress: bool = False,
) -> Table:
    """All candidates of a model; what is fitted is fitted per head, when it is first used.

    Args:
      observed: what was seen of a layer's side; None for data-free candidates.
      joint: filled by `observed` with what it has turned every layer by.

    Raises:
      TurboqError: a candidate needs what was observed, or stores blocks of tokens.
    """
    options: dict[tuple[int, Side], tuple[Option, ...]] = {}
    layers = geometry.cache_layers
    with Progress(2 * len(layers), label="fit", unit="sides", enabled=progress) as bar:
        for layer in layers:
            for side in SIDES:
                seen = None if observed is None else observed(layer.index, side)
                options[layer.index, side] = tuple(m.make(layer, side, seen) for m in makers)
                bar.advance(1)
    kept = {layer.index: geometry.kept_window(layer.index) for layer in layers}
    windows = {index: window for index, window in kept.items() if window is not None}
    labels = tuple(m.label for m in makers)
    return Table(labels, options, source, k_rope, windows, joint_heads, joint or {})
