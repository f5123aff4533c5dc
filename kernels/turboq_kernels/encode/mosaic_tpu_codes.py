"""Codes and row numbers of a tile of vectors in registers of the TPU: one vector per sublane.

The lanes of a tile are the coordinates of all parts, each part at a place of its own (`places`), so
thresholds and levels are vectors along lanes and parts of different bits are searched together: the
parts with fewer bits have infinite thresholds in front. A code is found from its top bit down, by
one comparison per bit.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from turboq.codecs.writing import WriteTables, Writing

LANES = 128
_HALF = 0x3F000000  # the bits of 0.5
_TINY = 4 * float(np.finfo(np.float32).tiny)  # vectors below are zero, as in `scale.unit_rms`


@dataclasses.dataclass(frozen=True)
class CodeSpec:
    """What is static about the arithmetic of a call."""

    writing: Writing
    dim: int
    coded: int  # C
    places: tuple[int, ...]  # first lane of every part
    lanes: int  # of all parts, a multiple of 128
    centered: bool = True  # a mean is removed

    @property
    def bits(self) -> int:
        """The most of any part."""
        return max((run.bits for run in self.writing.parts), default=0)

    @property
    def held(self) -> int:
        """How many arrays `operands` makes."""
        w = self.writing
        return (
            1
            + self.centered
            + bool(w.parts)
            + self.uses_levels
            + (w.gain == "code")
            + (w.signs is not None)
        )

    @property
    def uses_levels(self) -> bool:
        w = self.writing
        return bool(w.parts) and w.gain == "rms" and (w.rule != "raw" or w.signs is not None)


def code_spec(writing: Writing, dim: int) -> CodeSpec:
    """Parts one after the other, none across a boundary of 128 lanes unless it is wider."""
    places, end = [], 0
    for run in writing.parts:
        if end % LANES + run.width > LANES:
            end = -(-end // LANES) * LANES
        places.append(end)
        end += run.width
    coded = sum(run.width for run in writing.parts) or dim
    lanes = -(-max(end, coded) // LANES) * LANES
    return CodeSpec(writing, dim, coded, tuple(places), lanes)


def operands(spec: CodeSpec, tables: WriteTables) -> list[Array]:
    """Arrays [N, ...] that the kernel holds for one head, in the order of `Held`."""
    writing, lanes = spec.writing, spec.lanes
    heads = tables.matrix.shape[0]
    parts = [
        (place, start, run)
        for place, start, run in zip(spec.places, writing.starts, writing.parts, strict=True)
    ] or [(0, 0, None)]

    def placed(pieces, fill):
        """[N, k, coordinates] of every part -> [N, k, lanes]."""
        out, end = [], 0
        for (place, _, _), piece in zip(parts, pieces, strict=True):
            out.append(jnp.full((heads, piece.shape[1], place - end), fill, jnp.float32))
            out.append(piece)
            end = place + piece.shape[2]
        out.append(jnp.full((heads, pieces[0].shape[1], lanes - end), fill, jnp.float32))
        return jnp.concatenate(out, axis=2)

    def cut(x):
        """[N, k, C] in pieces of parts."""
        ends = [start for _, start, _ in parts[1:]]
        return jnp.split(x, ends, axis=2)

    held = [tables.mean[:, None, :]] if spec.centered else []
    held.append(placed(cut(tables.matrix.swapaxes(1, 2)), 0.0))
    if writing.parts:
        middles, levels = [], []
        for run, table in zip(writing.parts, tables.levels, strict=True):
            wide = (heads, 2**spec.bits, run.width)
            room = 2**spec.bits - 2**run.bits
            middle = jnp.pad(0.5 * (table[:, 1:] + table[:, :-1]), ((0, 0), (0, room + 1)),
                             constant_values=np.inf)  # fmt: skip
            level = jnp.pad(table, ((0, 0), (0, room)))
            middles.append(jnp.broadcast_to(middle[:, :, None], wide))
            levels.append(jnp.broadcast_to(level[:, :, None], wide))
        held.append(placed(middles, np.inf))
        if spec.uses_levels:
            held.append(placed(levels, 0.0))
    if writing.gain == "code":
        gains = tables.gains
        room = (0, 0), (0, -gains.shape[1] % LANES)
        edges = jnp.sqrt(gains[:, 1:] * gains[:, :-1])
        edges = jnp.pad(edges, ((0, 0), (0, room[1][1] + 1)), constant_values=np.inf)
        held.append(jnp.stack([edges, jnp.pad(gains, room, constant_values=1.0)], axis=1))
    if writing.signs is not None:
        sketch = placed(cut(tables.sketch), 0.0)  # [N, C, lanes]
        held.append(jnp.pad(sketch.swapaxes(1, 2), ((0, 0), (0, 0), (0, lanes - spec.coded))))
    return held


def encode(
    spec: CodeSpec, held, x: Float[Array, "R D"]
) -> tuple[list[Array], Array | None, list[Array]]:
    """Of every vector: bit planes of the codes and the signs (both bool [R, lanes]), row numbers.

    Planes are in order of significance, least first; row numbers [R, 1] in that of `writing.rows`.

    Args:
      held: refs of one head, in the order of `operands`, without the axis of heads.
    """
    held, writing = list(held), spec.writing
    x = x.astype(jnp.float32)
    if spec.centered:
        x = x - held.pop(0)[...]
    matrix = held.pop(0)
    rows: list[Array] = []
    gain = None
    if writing.gain == "rms":
        x, unit = _unit(x)
    y = _dot(x, matrix[...])
    if writing.gain == "rms":
        square = _sum(y * y) * (1.0 / spec.coded)
        inverse = jax.lax.rsqrt(jnp.where(square == 0, 1.0, square))
        # Inf * 0 is NaN, which vectors with Inf are to have.
        gain = jnp.where(square == 0, 0.0, unit * (square * inverse))
        y = y * inverse
    middles = held.pop(0) if writing.parts else None
    levels = held.pop(0) if spec.uses_levels else None
    if writing.gain == "code":
        index, factor = _coded_gain(spec, held.pop(0), y)
        rows.append(index)
        y = y * (1.0 / factor)
    planes: list[Array] = []
    c = None
    if middles is not None:
        planes, c = _search(spec.bits, middles, levels, y)
    residual = y
    if writing.parts and gain is not None:
        scale = gain
        if writing.rule != "raw":
            assert c is not None
            scale = gain * _factor(writing.rule, y, c)
        if writing.signs is not None:
            assert c is not None
            scale = rounded(scale, writing.dtype)
            residual = y - scale * (1.0 / jnp.where(gain == 0, 1.0, gain)) * c
        rows.append(scale)
    if writing.signs is None:
        return planes, None, rows
    assert gain is not None
    signs = _dot(residual, held.pop(0)[...]) >= 0
    norm = jnp.sqrt(_sum(residual * residual))
    rows.append(norm * gain * spec.dim**-0.5)
    return planes, signs, rows


def _dot(a, b):
    return jax.lax.dot_general(
        a, b, (((1,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )  # fmt: skip


def _sum(x):
    return jnp.sum(x, axis=1, keepdims=True)


def _unit(x):
    """x times a power of two, so that its largest entry is in [4, 8), and one over that power.

    Zero vectors are those of `turboq.numbers.scale.unit_rms`; Inf and NaN stay what they are.
    """
    peak = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    exponent = jax.lax.bitcast_convert_type(peak, jnp.int32) & (0xFF << 23)

    def power(bits):
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    inverse = jnp.where(peak < _TINY, 0.0, power(jnp.int32(-(2**31)) - exponent))  # 256 - e
    return x * inverse, power(exponent - (2 << 23))


def _coded_gain(spec: CodeSpec, table, y):
    """Index and value of the gain nearest to rms(y), on a logarithmic scale."""
    rms = jnp.sqrt(_sum(y * y) * (1.0 / spec.coded))
    edges, gains = table[pl.ds(0, 1), :], table[pl.ds(1, 1), :]
    index = _sum((rms > edges).astype(jnp.float32))
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, gains.shape[1]), 1).astype(jnp.float32)
    return index, _sum(jnp.where(index == lane, gains, 0.0))


def _search(bits: int, middles, levels, u):
    """Bit planes of the number of middles below u, and the level of that number (or None)."""
    planes: list[Array] = []

    def chosen(ref, candidates):
        """The entry of `candidates` at the code whose top bits are found; bits in that order."""
        values = [ref[pl.ds(i, 1), :] for i in candidates]
        for plane in reversed(planes):
            pairs = zip(values[::2], values[1::2], strict=True)
            values = [jnp.where(plane, b, a) for a, b in pairs]
        return values[0]

    for p in reversed(range(bits)):
        step = 1 << p  # middles i of codes ...1000 at bit p: i = code - 1
        planes.append(u > chosen(middles, range(step - 1, 2**bits - 1, 2 * step)))
    c = None if levels is None else chosen(levels, range(2**bits))
    return planes[::-1], c


def _factor(rule: str, u, c):
    """`turboq.numbers.scale.vector_scale` over rms."""
    sums = {"matched": (u * u, c * c), "unbiased": (u * u, u * c), "least_squares": (u * c, c * c)}
    top, bottom = (_sum(s) for s in sums[rule])
    if rule == "matched":
        top = jnp.sqrt(top * bottom)
    # `<= 0`, not `> 0`: NaN must stay.
    return jnp.where(bottom <= 0, 0.0, top / jnp.where(bottom <= 0, 1.0, bottom))


def rounded(x: Float[Array, "*n"], dtype: str) -> Float[Array, "*n"]:
    """float32 of x >= 0 (or NaN) rounded to nearest even in `dtype`, without that type's help.

    Not every generation of TPU has float16.
    """
    if dtype == "float32":
        return x
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    drop = 13 if dtype == "float16" else 16
    even = bits + ((1 << drop - 1) - 1) + ((bits >> drop) & 1)
    out = jax.lax.bitcast_convert_type((even >> drop) << drop, jnp.float32)
    if dtype == "float16":
        out = jnp.where(out >= 2.0**16, np.inf, out)
        # Below the least normal number the unit is that of 0.5 in float32. By integers: a compiler
        # would make x of (x + 0.5) - 0.5.
        units = jax.lax.bitcast_convert_type(x + 0.5, jnp.int32) - _HALF
        out = jnp.where(x < 2.0**-14, units.astype(jnp.float32) * 2.0**-24, out)
    return jnp.where(x == x, out, np.nan)


def half_bits(x: Float[Array, "*n"]) -> Int[Array, "*n"]:
    """int32 of the bits of float32 rounded to float16, nearest even; of NaN 0x7E00."""
    word = jax.lax.bitcast_convert_type(x, jnp.int32)
    size = word & 0x7FFFFFFF
    # The exponent's bias is 15 instead of 127; what is too large becomes infinite.
    normal = (size + 0xFFF + ((size >> 13) & 1) - (112 << 23)) >> 13
    tiny = jax.lax.bitcast_convert_type(jnp.abs(x) + 0.5, jnp.int32) - _HALF  # as in `rounded`
    out = jnp.where(size < 113 << 23, tiny, jnp.minimum(normal, 0x7C00))
    return jnp.where(x == x, ((word >> 16) & 0x8000) | out, 0x7E00)
