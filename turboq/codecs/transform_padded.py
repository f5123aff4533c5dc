"""`transform` with its segments as data: one compiled program for all heads, layers and plans.

A learned plan has other segments in almost every head. Compiled as they are, that is a program per
layer and plan; here the points of every coordinate are an array, padded to a common number, and a
dropped coordinate has the single point 0. A window code is data as it is. What comes out of
`decode(encode(x))` is the same.
For simulation only (`turboq.cache.simulate`): nothing is packed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from turboq.cache.layer import HeadGroup, KVLayer
from turboq.codecs.base import Arrays, Codec, Field, Stored
from turboq.codecs.scalar import dot, lead
from turboq.codecs.transform import Transform
from turboq.numbers import scale as scales
from turboq.numbers import trellis, window

# Stands for "no such point": its square is finite in float32 and far above any real distance.
_FAR = 1e6


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaddedTransform(Codec):
    """x_hat = mean + S (gain * c(A (x - mean) / gain)) with points [D, levels] of every coordinate.

    Not registered and never stored: its one field is the float32 value. Arrays of one head: mean
    [D], analysis and synthesis [D, D] (zero where nothing is coded), points [D, levels] or the rows
    and weights of a window code, coded [] (how many coordinates are), gains [n] with gain "code".
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
        return (Field(name="values", width=self.dim, bits=32, dtype="float32"),)

    def encode(self, arrays: Arrays, x: Float[Array, "*n D"]) -> Stored:
        x = x.astype(jnp.float32)
        y = dot((x - lead(arrays["mean"], x.ndim)).reshape(-1, self.dim), arrays["analysis"].T)
        gain = self._gain(arrays, y)
        u = y if gain is None else y / gain[:, None]
        c = self._values(arrays, u)
        values = c if gain is None else c * gain[:, None]
        return {"values": values.reshape(x.shape)}

    def _values(self, arrays: Arrays, u: Float[Array, "N D"]) -> Float[Array, "N D"]:
        if self.quantizer == "window":
            code = window.Rows(step=arrays["step"], last=arrays["last"], taps=arrays["taps"])
            return window.decode(code, window.encode(code, u, arrays["weights"]))
        if self.quantizer == "trellis":
            return self._trellis(arrays["points"], u)
        return _nearest(arrays["points"], u.T).T

    def _gain(self, arrays: Arrays, y: Float[Array, "N D"]) -> Float[Array, "N"] | None:
        if self.gain == "none":
            return None
        # Rows of A that are not coded give 0.
        if self.gain == "float16":
            rms = scales.unit_rms(y)[1] * jnp.sqrt(self.dim / arrays["coded"])
            return rms.astype(jnp.float16).astype(jnp.float32)
        rms = jnp.sqrt(jnp.sum(jnp.square(y), axis=-1) / arrays["coded"])
        gains = arrays["gains"]
        edges = jnp.sqrt(gains[1:] * gains[:-1])
        code = jnp.sum(rms[:, None] > edges[None, :], axis=-1)
        return gains.at[code].get(mode="promise_in_bounds")

    def _trellis(self, points: Float[Array, "D P"], u: Float[Array, "N D"]) -> Float[Array, "N D"]:
        count = max(16, trellis.STEP_VALUES // self.states)
        n = len(u)
        whole = -(-n // count) * count
        parts = jnp.pad(u, ((0, whole - n), (0, 0))).reshape(-1, count, self.dim)
        search = functools.partial(_path, self.states, self.free_start, points)
        return jax.lax.map(search, parts).reshape(whole, self.dim)[:n]

    def decode(self, arrays: Arrays, stored: Stored) -> Float[Array, "*n D"]:
        values = stored["values"]
        x = dot(values.reshape(-1, self.dim), arrays["synthesis"].T).reshape(values.shape)
        return x + lead(arrays["mean"], x.ndim)

    def fold_query(self, arrays: Arrays, q: Float[Array, "T D"]) -> dict[str, Array]:
        offset = dot(q, arrays["mean"][:, None])[:, 0]
        return {"q": dot(q, arrays["synthesis"]), "offset": offset}

    def logits(
        self, arrays: Arrays, folded: dict[str, Array], stored: Stored
    ) -> Float[Array, "T S"]:
        return dot(folded["q"], stored["values"].T) + folded["offset"][:, None]

    def accumulate(
        self, arrays: Arrays, weights: Float[Array, "T S"], stored: Stored
    ) -> Float[Array, "T C"]:
        return dot(weights, stored["values"])

    def unfold_output(
        self, arrays: Arrays, acc: Float[Array, "T C"], mass: Float[Array, "T"]
    ) -> Float[Array, "T D"]:
        return dot(acc, arrays["synthesis"].T) + mass[:, None] * arrays["mean"][None, :]


def _nearest(points: Float[Array, "D P"], columns: Float[Array, "D N"]) -> Float[Array, "D N"]:
    """Nearest point of every coordinate, points ascending; halfway between two the lower one."""
    rows, levels = points.shape
    edges = 0.5 * (points[:, 1:] + points[:, :-1])
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]

    def at(table: Float[Array, "D m"], index: Int[Array, "D N"]) -> Float[Array, "D N"]:
        flat = row * table.shape[1] + index
        return table.reshape(-1).at[flat].get(mode="promise_in_bounds")

    code = jnp.zeros(columns.shape, jnp.int32)
    for bit in reversed(range((levels - 1).bit_length())):  # from the top bit: edges are sorted
        step = 1 << bit
        code += jnp.where(columns > at(edges, code + step - 1), step, 0)
    return at(points, code)


def _path(
    states: int, free: bool, points: Float[Array, "D P"], u: Float[Array, "N D"]
) -> Float[Array, "N D"]:
    """Values of the path of least squared error (`turboq.numbers.trellis_runs.encode`)."""
    columns = u.T
    left = jnp.stack([columns - _nearest(points[:, z::4], columns) for z in range(4)], axis=1)
    left = jax.lax.optimization_barrier(left)
    never = jnp.where(jnp.arange(states) == 0, 0.0, 0.0 if free else 1e12).astype(jnp.float32)
    cost, kept = jax.lax.scan(
        functools.partial(trellis.advance, states),
        jnp.broadcast_to(never[:, None], (states, len(u))),
        jnp.square(left),
    )
    end = jnp.argmin(cost, axis=0).astype(jnp.int32)
    _, (z1, z0) = jax.lax.scan(functools.partial(trellis.back, states), end, kept, reverse=True)
    own = jnp.where(
        z1 == 1,
        jnp.where(z0 == 1, left[:, 3], left[:, 2]),
        jnp.where(z0 == 1, left[:, 1], left[:, 0]),
    )
    return (columns - own).T


def shared_layer(layer: KVLayer) -> KVLayer:
    """The layer with one group of padded codecs, if all its codecs are `transform`s of one kind.

    Any other layer comes back as it is.
    """
    sides = {}
    for side in ("k", "v"):
        codecs = [getattr(g, side) for g in layer.groups]
        if not one_kind(codecs):
            return layer
        sides[side] = pad_side(codecs, [getattr(g, f"{side}_arrays") for g in layer.groups])
    group = HeadGroup(
        heads=tuple(h for g in layer.groups for h in g.heads),
        k=sides["k"][0],
        v=sides["v"][0],
        k_arrays=sides["k"][1],
        v_arrays=sides["v"][1],
    )
    return dataclasses.replace(layer, groups=(group,))


def one_kind(codecs: Sequence[Codec]) -> bool:
    """Whether these are `transform`s that differ in segments and codebooks at most."""
    if not all(isinstance(c, Transform) for c in codecs):
        return False
    fields = ("dim", "quantizer", "states", "free_start", "gain", "gain_bits")
    return len({tuple(getattr(c, f) for f in fields) for c in codecs}) == 1


def pad_side(
    codecs: Sequence[Transform], groups: Sequence[Arrays]
) -> tuple[PaddedTransform, Arrays]:
    """One codec and arrays [K, ...] for codecs of one kind and arrays [n, ...] of their heads."""
    points = max(2**b for c in codecs for _, b in c.segments)
    # Few different numbers, so few programs.
    levels = next(n for n in (8, 32, 256) if n >= points)
    quantizer = codecs[0].quantizer
    padded = PaddedTransform(
        dim=codecs[0].dim,
        levels={"scalar": levels, "trellis": 2 * levels, "window": 0}[quantizer],
        quantizer=quantizer,
        states=0 if quantizer == "scalar" else codecs[0].states,
        free_start=codecs[0].free_start,
        gain=codecs[0].gain,
    )
    arrays = [_pad(padded, codec, group) for codec, group in zip(codecs, groups, strict=True)]
    return padded, {name: jnp.concatenate([a[name] for a in arrays]) for name in arrays[0]}


def _pad(padded: PaddedTransform, codec: Transform, arrays: Arrays) -> Arrays:
    """Arrays [n, ...] of a group's heads in the padded form."""
    rest = codec.dim - codec.coded
    heads = arrays["mean"].shape[0]

    def each(matrix: Callable[[Arrays], Array]) -> np.ndarray:
        return np.asarray(jax.vmap(matrix)(arrays))

    out = {
        "mean": arrays["mean"],
        "analysis": jnp.asarray(np.pad(each(codec.analysis_of), ((0, 0), (0, rest), (0, 0)))),
        "synthesis": jnp.asarray(np.pad(each(codec.synthesis_of), ((0, 0), (0, 0), (0, rest)))),
        "coded": jnp.full(heads, codec.coded, jnp.float32),
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
