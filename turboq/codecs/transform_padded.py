"""`transform` with its segments as data: one compiled program for all heads, layers and plans.

A learned plan has other segments in almost every head. Compiled as they are, that is a program per
layer and plan; here the points of every coordinate are an array, padded to a common number, and a
dropped coordinate has the single point 0. A window code is data as it is. What comes out of
`decode(encode(x))` is the same, and so are the codes: a coordinate's code is its entry of the
`transform`'s own fields, which `turboq.cache.columns` stores in exactly their bits.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from turboq.cache import composed
from turboq.cache.layer import HeadGroup, KVLayer
from turboq.codecs.base import Arrays, Codec, Field, Stored
from turboq.codecs.coordinates import Coordinates
from turboq.codecs.scalar import dot, lead
from turboq.codecs.transform import Transform
from turboq.numbers import scale as scales
from turboq.numbers import trellis, window, window_gain

Levels = tuple[int, int]  # of K and V

# Stands for "no such point": its square is finite in float32 and far above any real distance.
_FAR = 1e6


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaddedTransform(Codec):
    """x_hat = mean + S (gain * c(A (x - mean) / gain)) with points [D, levels] of every coordinate.

    Not registered: its fields are as wide as the widest may be. Arrays of one head: mean
    [D], analysis and synthesis [D, D] (zero where nothing is coded), points [D, levels] or the rows
    and weights of a window code, coded [] (how many coordinates are), gains [n] with gain "code".
    Of `Coordinates` mean is 0, analysis and synthesis are 1, and none of them an array.
    """

    name: ClassVar[str] = "padded_transform"
    source: ClassVar[str] = "transform"

    levels: int
    quantizer: str
    states: int
    free_start: bool
    gain: str

    @property
    def fields(self) -> tuple[Field, ...]:
        most = (self.levels - 1).bit_length() - (self.quantizer == "trellis")
        bits = window.MAX_BITS if self.quantizer == "window" else most
        fields = [Field(name="codes", width=self.dim, bits=bits, dtype="codes")]
        if self.free_start:
            start = self.states.bit_length() - 1
            fields.append(Field(name="start", width=1, bits=start, dtype="codes"))
        if self.gain == "code":
            fields.append(Field(name="gain", width=1, bits=8, dtype="codes"))
        if self.gain == "float16":
            fields.append(Field(name="gain", width=1, bits=16, dtype="float16"))
        return tuple(fields)

    def encode(self, arrays: Arrays, x: Float[Array, "*n D"]) -> Stored:
        lead_axes = x.shape[:-1]
        y = self.analyse(arrays, x).reshape(-1, self.dim)
        if self.quantizer == "window" and self.gain == "code":
            codes, gain = window_gain.encode(rows_of(arrays), y, arrays["gains"], arrays["weights"])
            stored = {"codes": codes, "gain": gain[:, None]}
        else:
            u, stored = self.unit(arrays, y)
            stored |= self._codes(arrays, u)
        return {name: entries.reshape(*lead_axes, -1) for name, entries in stored.items()}

    def analyse(self, arrays: Arrays, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        """y, float32; 0 where nothing is coded."""
        x = x.astype(jnp.float32)
        if "analysis" not in arrays:
            there = jnp.arange(self.dim, dtype=jnp.float32) < arrays["coded"]
            return jnp.where(jnp.broadcast_to(there, x.shape), x, 0.0)
        y = dot((x - lead(arrays["mean"], x.ndim)).reshape(-1, self.dim), arrays["analysis"].T)
        return y.reshape(x.shape)

    def _codes(self, arrays: Arrays, u: Float[Array, "N D"]) -> Stored:
        if self.quantizer == "window":
            return {"codes": window.encode(rows_of(arrays), u, arrays["weights"])}
        if self.quantizer == "trellis":
            return self._trellis(arrays["points"], u)
        return {"codes": _nearest(arrays["points"], u.T).T.astype(jnp.uint8)}

    def unit(self, arrays: Arrays, y: Float[Array, "N D"]) -> tuple[Float[Array, "N D"], Stored]:
        """y over its gain, and the gain as it is stored. Rows of A that are not coded give 0."""
        if self.gain == "none":
            return y, {}
        if self.gain == "float16":
            unit, rms = scales.unit_rms(y)
            more = jnp.sqrt(self.dim / arrays["coded"])
            return unit / more, {"gain": (rms * more).astype(jnp.float16)[:, None]}
        rms = jnp.sqrt(jnp.sum(jnp.square(y), axis=-1) / arrays["coded"])
        gains = arrays["gains"]
        edges = jnp.sqrt(gains[1:] * gains[:-1])
        code = jnp.sum(rms[:, None] > edges[None, :], axis=-1).astype(jnp.uint8)[:, None]
        gain = self.gain_of(arrays, {"gain": code})
        return y / gain[:, None], {"gain": code}

    def gain_of(self, arrays: Arrays, stored: Stored) -> Float[Array, "*n"]:
        """Gain of every stored vector, float32."""
        gain = stored["gain"][..., 0]
        if self.gain == "float16":
            return gain.astype(jnp.float32)
        return arrays["gains"].at[gain.astype(jnp.int32)].get(mode="promise_in_bounds")

    def _trellis(self, points: Float[Array, "D P"], u: Float[Array, "N D"]) -> Stored:
        count = max(16, trellis.STEP_VALUES // self.states)
        n = len(u)
        whole = -(-n // count) * count
        parts = jnp.pad(u, ((0, whole - n), (0, 0))).reshape(-1, count, self.dim)
        search = functools.partial(_path, self.states, self.free_start, points)
        codes, start = jax.lax.map(search, parts)
        stored = {"codes": codes.reshape(whole, self.dim)[:n]}
        return stored | ({"start": start.reshape(whole, 1)[:n]} if self.free_start else {})

    def values(self, arrays: Arrays, stored: Stored) -> Float[Array, "*n D"]:
        """Values of the codes times their gain; 0 where a coordinate is not coded."""
        codes = stored["codes"]
        if self.quantizer == "window":
            values = window.decode(rows_of(arrays), codes)
        else:
            if self.quantizer == "trellis":
                start = stored["start"][..., 0] if self.free_start else None
                index = trellis.indices(self.states, codes, start)
            else:
                index = codes.astype(jnp.int32)
            values = _at(arrays["points"], index.reshape(-1, self.dim).T).T.reshape(codes.shape)
        return values if self.gain == "none" else values * self.gain_of(arrays, stored)[..., None]

    def decode(self, arrays: Arrays, stored: Stored) -> Float[Array, "*n D"]:
        values = self.values(arrays, stored)
        if "synthesis" not in arrays:
            return values
        x = dot(values.reshape(-1, self.dim), arrays["synthesis"].T).reshape(values.shape)
        return x + lead(arrays["mean"], x.ndim)

    def fold_query(self, arrays: Arrays, q: Float[Array, "T D"]) -> dict[str, Array]:
        if "synthesis" not in arrays:
            return {"q": q, "offset": jnp.zeros_like(q[:, 0])}
        offset = dot(q, arrays["mean"][:, None])[:, 0]
        return {"q": dot(q, arrays["synthesis"]), "offset": offset}

    def logits(
        self, arrays: Arrays, folded: dict[str, Array], stored: Stored
    ) -> Float[Array, "T S"]:
        return dot(folded["q"], self.values(arrays, stored).T) + folded["offset"][:, None]

    def accumulate(
        self, arrays: Arrays, weights: Float[Array, "T S"], stored: Stored
    ) -> Float[Array, "T C"]:
        return dot(weights, self.values(arrays, stored))

    def unfold_output(
        self, arrays: Arrays, acc: Float[Array, "T C"], mass: Float[Array, "T"]
    ) -> Float[Array, "T D"]:
        if "synthesis" not in arrays:
            return acc
        return dot(acc, arrays["synthesis"].T) + mass[:, None] * arrays["mean"][None, :]


def rows_of(arrays: Arrays) -> window.Rows:
    """The window code of a head, or of all."""
    return window.Rows(step=arrays["step"], last=arrays["last"], taps=arrays["taps"])


def _at(table: Float[Array, "D m"], index: Int[Array, "D N"]) -> Float[Array, "D N"]:
    """table[d, index[d, n]]."""
    row = jnp.arange(table.shape[0], dtype=jnp.int32)[:, None]
    flat = row * table.shape[1] + index
    return table.reshape(-1).at[flat].get(mode="promise_in_bounds")


def _nearest(points: Float[Array, "D P"], columns: Float[Array, "D N"]) -> Int[Array, "D N"]:
    """Number of every coordinate's nearest point (ascending); halfway between two the lower."""
    edges = 0.5 * (points[:, 1:] + points[:, :-1])
    code = jnp.zeros(columns.shape, jnp.int32)
    for bit in reversed(range((points.shape[1] - 1).bit_length())):  # edges are sorted
        step = 1 << bit
        code += jnp.where(columns > _at(edges, code + step - 1), step, 0)
    return code


def _path(
    states: int, free: bool, points: Float[Array, "D P"], u: Float[Array, "N D"]
) -> tuple[UInt8[Array, "N D"], UInt8[Array, "N"]]:
    """Codes and start states of the path of least squared error (`numbers.trellis_runs.encode`)."""
    columns = u.T
    subsets = [points[:, z::4] for z in range(4)]
    places = [_nearest(own, columns) for own in subsets]
    left = [columns - _at(own, place) for own, place in zip(subsets, places, strict=True)]
    left = jax.lax.optimization_barrier(jnp.stack(left, axis=1))
    never = jnp.where(jnp.arange(states) == 0, 0.0, 0.0 if free else 1e12).astype(jnp.float32)
    cost, kept = jax.lax.scan(
        functools.partial(trellis.advance, states),
        jnp.broadcast_to(never[:, None], (states, len(u))),
        jnp.square(left),
    )
    end = jnp.argmin(cost, axis=0).astype(jnp.int32)
    start, (z1, z0) = jax.lax.scan(functools.partial(trellis.back, states), end, kept, reverse=True)
    place = jnp.where(
        z1 == 1,
        jnp.where(z0 == 1, places[3], places[2]),
        jnp.where(z0 == 1, places[1], places[0]),
    )
    return (z1 + 2 * place).astype(jnp.uint8).T, start.astype(jnp.uint8)


def shared_layer(layer: KVLayer, levels: Levels | None = None) -> KVLayer:
    """The layer with one group of padded codecs, if all its codecs are `transform`s of one kind.

    Any other layer comes back as it is. Heads are in order, so that layers differ in data only.
    """
    if not all(one_kind(side) for side in _sides(layer)):
        return layer
    heads = [h for g in layer.groups for h in g.heads]
    sides = []
    for side, at_least in zip(("k", "v"), levels or (0, 0), strict=True):
        codecs = [getattr(g, side) for g in layer.groups]
        rows = [getattr(g, f"{side}_arrays") for g in layer.groups]
        counts = [len(g.heads) for g in layer.groups]
        codec, arrays = pad_side(codecs, rows, counts, levels=at_least)
        sides.append((codec, {name: a[np.argsort(heads)] for name, a in arrays.items()}))
    (k, k_arrays), (v, v_arrays) = sides
    group = HeadGroup(heads=tuple(sorted(heads)), k=k, v=v, k_arrays=k_arrays, v_arrays=v_arrays)
    return dataclasses.replace(layer, groups=(group,))


def shared_layers(layers: Sequence[KVLayer]) -> list[KVLayer] | None:
    """`shared_layer` of all layers, with as many levels and joined coordinates in each.

    None: some are of another kind.
    """
    both = [_sides(layer) for layer in layers]
    if not all(one_kind(side) for sides in both for side in sides):
        return None
    k, v = (max(_levels(sides[i]) for sides in both) for i in range(2))
    return composed.as_wide([shared_layer(layer, (k, v)) for layer in layers])


def _sides(layer: KVLayer) -> tuple[list[Codec], list[Codec]]:
    return [g.k for g in layer.groups], [g.v for g in layer.groups]


def _levels(codecs: Sequence[Codec]) -> int:
    """Points of a coordinate: few different numbers, so few programs. A window code has none."""
    transforms = [c for c in codecs if isinstance(c, Transform)]
    if transforms[0].quantizer == "window":
        return 0
    points = max(2**b for c in transforms for _, b in c.segments)
    levels = next(n for n in (8, 32, 256) if n >= points)
    return 2 * levels if transforms[0].quantizer == "trellis" else levels


def one_kind(codecs: Sequence[Codec]) -> bool:
    """Whether these are `transform`s that differ in segments and codebooks at most."""
    if not all(isinstance(c, Transform) for c in codecs):
        return False
    fields = ("dim", "quantizer", "states", "free_start", "gain", "gain_bits")
    kinds = {(isinstance(c, Coordinates), *(getattr(c, f) for f in fields)) for c in codecs}
    return len(kinds) == 1


def pad_side(
    codecs: Sequence[Transform], groups: Sequence[Arrays], heads: Sequence[int], *, levels: int = 0
) -> tuple[PaddedTransform, Arrays]:
    """One codec and arrays [K, ...] for codecs of one kind and arrays [n, ...] of their n heads."""
    quantizer = codecs[0].quantizer
    padded = PaddedTransform(
        dim=codecs[0].dim,
        levels=max(levels, _levels(codecs)),
        quantizer=quantizer,
        states=0 if quantizer == "scalar" else codecs[0].states,
        free_start=codecs[0].free_start,
        gain=codecs[0].gain,
    )
    each = zip(codecs, groups, heads, strict=True)
    arrays = [_pad(padded, codec, group, n) for codec, group, n in each]
    return padded, {name: jnp.concatenate([a[name] for a in arrays]) for name in arrays[0]}


def _pad(padded: PaddedTransform, codec: Transform, arrays: Arrays, heads: int) -> Arrays:
    """Arrays [n, ...] of a group's heads in the padded form."""
    rest = codec.dim - codec.coded

    def each(matrix: Callable[[Arrays], Array]) -> np.ndarray:
        return np.asarray(jax.vmap(matrix)(arrays))

    out: Arrays = {"coded": jnp.full(heads, codec.coded, jnp.float32)}
    if not isinstance(codec, Coordinates):
        out |= {
            "mean": arrays["mean"],
            "analysis": jnp.asarray(np.pad(each(codec.analysis_of), ((0, 0), (0, rest), (0, 0)))),
            "synthesis": jnp.asarray(np.pad(each(codec.synthesis_of), ((0, 0), (0, 0), (0, rest)))),
        }
    out |= {"gains": arrays["gains"]} if codec.gain == "code" else {}
    if codec.quantizer == "window":
        code = dataclasses.asdict(window.rows(codec.states, codec.segments, codec.dim))
        out["weights"] = jnp.asarray(np.pad(np.asarray(arrays["weights"]), ((0, 0), (0, rest))))
        return out | {name: jnp.asarray(np.stack([a] * heads)) for name, a in code.items()}
    return out | {"points": _points(padded, codec, arrays, heads)}


def _points(
    padded: PaddedTransform, codec: Transform, arrays: Arrays, heads: int
) -> Float[Array, "n D P"]:
    """Points of every coordinate of a group's heads, padded."""
    points = []
    for i, (width, _) in enumerate(codec.segments):
        if codec.codebook == "fitted":
            table = np.asarray(arrays[f"codebook{i}"], np.float32)
        else:
            table = np.broadcast_to(
                codec.tables[f"codebook{i}"], (heads, len(codec.tables[f"codebook{i}"]))
            )
        full = np.full((heads, padded.levels), _FAR, np.float32)
        full[:, : table.shape[1]] = table
        points.append(np.broadcast_to(full[:, None], (heads, width, padded.levels)))
    # A coordinate that is not coded costs every path the same: all its points are 0.
    points.append(np.zeros((heads, codec.dim - codec.coded, padded.levels), np.float32))
    return jnp.asarray(np.concatenate(points, axis=1))
