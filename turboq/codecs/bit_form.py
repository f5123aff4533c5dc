"""Codecs whose reconstruction is linear in the stored bits, and the matrix that says how.

    x_hat = mean + sum over parts i of  scale_i (M_i bits_i + constant_i) + offset_i ones_i

with stored bits 0 or 1 and per-vector numbers scale_i, offset_i (1 and 0 where not stored). So
keys need q^T M against the bits, values M times the weighted sum of bits, and a reader no table;
beside that binary product are a number or two per part. Bits of a part are those of its fields'
entries in order, of each entry the lowest first.

Affine and integer codes, sign planes and `transform` with a window code have this form. Tables,
trellises and floats do not.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from turboq.codecs.reading import Reading

if TYPE_CHECKING:
    from turboq.codecs.base import Codec

LEVELS = ("affine", "sign", "int8")  # those of `Reading` that are linear in their bits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BitPart:
    """Bits of some fields with one scale and one offset: what they add to x_hat.

    matrix [D, T], constant [D], ones [D] (what an offset of 1 adds); `fields` of codes and `bits`
    of their entries; `scale`, `offset` name the fields with the numbers, or are None.
    """

    matrix: Float[Array, "D T"]
    constant: Float[Array, "D"]
    ones: Float[Array, "D"]
    fields: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    bits: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    scale: str | None = dataclasses.field(metadata={"static": True})
    offset: str | None = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BitForm:
    """All of x_hat of one head (module docstring)."""

    mean: Float[Array, "D"]
    parts: tuple[BitPart, ...]


def unpacked(codes: UInt8[Array | np.ndarray, "*n C"], bits: int) -> UInt8[np.ndarray, "*n T"]:
    """Bits of codes, of each the lowest first. NumPy."""
    codes = np.asarray(codes)
    planes = codes[..., None] >> np.arange(bits, dtype=np.uint8) & np.uint8(1)
    return planes.reshape(*codes.shape[:-1], -1)


def bits_of(part: BitPart, stored: dict[str, Array]) -> UInt8[np.ndarray, "*n T"]:
    """The bits of a part from the stored fields. NumPy."""
    each = zip(part.fields, part.bits, strict=True)
    return np.concatenate([unpacked(stored[name], bits) for name, bits in each], axis=-1)


def linear(reading: Reading | None) -> bool:
    """Whether every part's levels are linear in their bits."""
    return reading is not None and all(part.levels in LEVELS for part in reading.parts)


def of_reading(codec: Codec, arrays: dict[str, Array]) -> BitForm | None:
    """The form of one head that follows from `Codec.reading`; None where a part is not linear."""
    reading = codec.reading
    if reading is None or not linear(reading):
        return None
    eye, none = jnp.eye(reading.width, dtype=jnp.float32), jnp.zeros((reading.width,), jnp.float32)
    turned = codec.unfold_output(arrays, eye, none)  # [C, D]
    mean = codec.unfold_output(arrays, none[None, :], jnp.ones((1,), jnp.float32))[0]
    parts = []
    for part, start, gain in zip(
        reading.parts, reading.starts, codec.level_tables(arrays), strict=True
    ):
        columns = turned[start : start + part.width].T
        weights, constant = _level_weights(part.levels, part.bits)
        weights, ones = gain[0] * jnp.asarray(weights, jnp.float32), jnp.sum(columns, axis=1)
        one = BitPart(
            matrix=(columns[:, :, None] * weights[None, None, :]).reshape(len(columns), -1),
            constant=constant * gain[0] * ones,
            ones=ones,
            fields=(part.field,),
            bits=(part.bits,),
            scale=part.scale,
            offset=part.offset,
        )
        parts.append(one)
    return BitForm(mean=mean, parts=tuple(parts))


def _level_weights(levels: str, bits: int) -> tuple[np.ndarray, float]:
    """(w [bits], c) with level = w . bits + c."""
    w = 2.0 ** np.arange(bits)
    if levels == "sign":
        return 2 * w, -1.0
    if levels == "int8":
        w[-1] = -w[-1]  # two's complement
    return w, 0.0
