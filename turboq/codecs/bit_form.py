"""Codecs whose reconstruction is linear in the stored bits, and the matrix that says how.

    x_hat = mean + sum over parts i of  scale_i (M_i bits_i + constant_i) + offset_i ones_i

with stored bits 0 or 1 and per-vector numbers scale_i, offset_i (1 and 0 where not stored). So
keys need q^T M against the bits, values M times the weighted sum of bits, and a reader no table;
beside that binary product are a number or two per part. Bits of a part are those of its fields'
entries in order, of each entry the lowest first.

Affine and integer codes, sign planes and `transform` with a window code have this form as they are.
A table of 2^b levels is linear in the parities of subsets m of its code's bits,

    level(c) = sum over m of w_m (-1)^|m & c|,   w_m = 2^-b sum over c of level(c) (-1)^|m & c|

(Walsh's expansion), so it has this form with derived columns: the XOR of stored planes, one
operation on packed words each, which nobody stores. Of a symmetric table w_m = 0 for even |m|: 1
and 2 bits need none, 3 bits one, 4 bits four. Other tables need all 2^b - 1. Tables of more than
`TABLE_BITS` bits, trellises and floats do not have the form.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from turboq.codecs.reading import Part, Reading

if TYPE_CHECKING:
    from turboq.codecs.base import Codec

LEVELS = ("affine", "sign", "int8")  # those of `Reading` that are linear in their bits
TABLE_BITS = 4  # of the largest table that is expanded: 8 columns for a symmetric one, else 15


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BitPart:
    """Bits of some fields with one scale and one offset: what they add to x_hat.

    matrix [D, T], constant [D], ones [D] (what an offset of 1 adds); `fields` of codes, `bits` of
    their entries, and of each field its `derived` columns: behind an entry's own bits the parities
    of the bits in these masks. `scale`, `offset` name the fields with the numbers, or are None.
    """

    matrix: Float[Array, "D T"]
    constant: Float[Array, "D"]
    ones: Float[Array, "D"]
    fields: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    bits: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    derived: tuple[tuple[int, ...], ...] = dataclasses.field(metadata={"static": True})
    scale: str | None = dataclasses.field(metadata={"static": True})
    offset: str | None = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BitForm:
    """All of x_hat of one head (module docstring)."""

    mean: Float[Array, "D"]
    parts: tuple[BitPart, ...]


def unpacked(
    codes: UInt8[Array | np.ndarray, "*n C"], bits: int, derived: tuple[int, ...] = ()
) -> UInt8[np.ndarray, "*n T"]:
    """Bits of codes, of each the lowest first, then the parities of the `derived` masks. NumPy."""
    codes = np.asarray(codes)
    masks = np.array([*(1 << np.arange(bits)), *derived], np.uint8)
    planes = np.bitwise_count(codes[..., None] & masks) & np.uint8(1)
    return planes.reshape(*codes.shape[:-1], -1)


def bits_of(part: BitPart, stored: dict[str, Array]) -> UInt8[np.ndarray, "*n T"]:
    """The columns of a part from the stored fields, derived ones included. NumPy."""
    each = zip(part.fields, part.bits, part.derived, strict=True)
    return np.concatenate([unpacked(stored[name], b, more) for name, b, more in each], axis=-1)


def linear(reading: Reading | None) -> bool:
    """Whether every part's levels are linear in their bits and parities of them."""
    return reading is not None and all(
        part.levels in LEVELS or (part.levels == "table" and part.bits <= TABLE_BITS)
        for part in reading.parts
    )


def of_reading(codec: Codec, arrays: dict[str, Array]) -> BitForm | None:
    """The form of one head that follows from `Codec.reading`; None where a part is not linear."""
    reading = codec.reading
    if reading is None or not linear(reading):
        return None
    eye, none = jnp.eye(reading.width, dtype=jnp.float32), jnp.zeros((reading.width,), jnp.float32)
    turned = codec.unfold_output(arrays, eye, none)  # [C, D]
    mean = codec.unfold_output(arrays, none[None, :], jnp.ones((1,), jnp.float32))[0]
    parts = []
    for part, start, table in zip(
        reading.parts, reading.starts, codec.level_tables(arrays), strict=True
    ):
        columns = turned[start : start + part.width].T
        ones, masks = jnp.sum(columns, axis=1), derived(part)
        if part.levels == "table":
            weights, constant = _table_weights(table, part.bits, masks)
        else:
            of_bit, of_none = _level_weights(part.levels, part.bits)
            weights, constant = table[0] * jnp.asarray(of_bit, jnp.float32), of_none * table[0]
        one = BitPart(
            matrix=(columns[:, :, None] * weights[None, None, :]).reshape(len(columns), -1),
            constant=constant * ones,
            ones=ones,
            fields=(part.field,),
            bits=(part.bits,),
            derived=(masks,),
            scale=part.scale,
            offset=part.offset,
        )
        parts.append(one)
    return BitForm(mean=mean, parts=tuple(parts))


def derived(part: Part) -> tuple[int, ...]:
    """Masks of two bits and more whose parity a part's levels need, ascending."""
    if part.levels != "table":
        return ()
    more = (m for m in range(2**part.bits) if m.bit_count() > 1)
    return tuple(m for m in more if m.bit_count() % 2 or not part.symmetric)


def _table_weights(
    table: Float[Array, "L"], bits: int, more: tuple[int, ...]
) -> tuple[Float[Array, "b"], Float[Array, ""]]:
    """What each bit and each derived parity adds to a level, and what all levels have."""
    masks = np.array([0, *(1 << np.arange(bits)), *more])
    signs = 1 - 2 * (np.bitwise_count(masks[:, None] & np.arange(2**bits)[None, :]) & 1).astype(int)
    walsh = jnp.matmul(
        jnp.asarray(signs, jnp.float32), table, precision=jax.lax.Precision.HIGHEST
    ) / (2**bits)
    return -2 * walsh[1:], jnp.sum(walsh)


def _level_weights(levels: str, bits: int) -> tuple[np.ndarray, float]:
    """(w [bits], c) with level = w . bits + c."""
    w = 2.0 ** np.arange(bits)
    if levels == "sign":
        return 2 * w, -1.0
    if levels == "int8":
        w[-1] = -w[-1]  # two's complement
    return w, 0.0
