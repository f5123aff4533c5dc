"""Packed words to levels for the matrix unit, two tokens per 32-bit lane, on TPU.

A register of words [8, lanes] holds 32 tokens per row. Bits j and j + 16 of a word become the two
halves of a 32-bit lane, which as bfloat16 is a [16, lanes] tile whose row 2 r + h is the token of
word row r and bit j + 16 h; 16 such tiles are one *block* [256, lanes] of levels. Entry i of it
(and lane i of its logits) is therefore

    word row r = (i % 16) // 2,   bit t = i // 16 + 16 (i % 2).

A table is a tree of bitwise selections between the bfloat16 patterns of its levels; if
level(~code) = -level(code), the top bit is the sign and half of the tree is left. Codes that are
numbers are exact in bfloat16.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from turboq.codecs.reading import Part
from turboq_kernels.decode.mosaic_tpu_planes import FLOATS, decode_float

ROWS = 8  # word rows of a block
BLOCK = 256  # tokens of a block
_ONES = 0x00010001  # the lowest bit of both halves


def is_table(part: Part) -> bool:
    return part.levels in ("table", "sign")


def entry_count(part: Part, symmetric: bool) -> int:
    """Entries that `entries` has per head."""
    if not is_table(part):
        return 0
    return 2**part.bits >> int(symmetric or part.levels == "sign")


def entries(part: Part, symmetric: bool, table: jax.Array | None, heads: int) -> jax.Array:
    """int32 [N, entry_count]: bfloat16 patterns of the levels, in both halves."""
    count = entry_count(part, symmetric)
    if part.levels == "sign":
        table = jnp.full((heads, 2), -1.0, jnp.float32)
    if not count:
        return jnp.zeros((heads, 0), jnp.int32)
    assert table is not None
    half = jax.lax.bitcast_convert_type(table[:, :count].astype(jnp.bfloat16), jnp.uint16)
    half = half.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(half | half << 16, jnp.int32)


def block(part: Part, symmetric: bool, words: list[jax.Array], table: list) -> jax.Array:
    """bfloat16 [256, lanes] of int32 words [8, lanes], one for each bit plane.

    Args:
      table: the head's `entries`, scalars.
    """
    if not is_table(part):
        return _numbers(part, words)
    flip = symmetric or part.levels == "sign"
    *lower, top = words
    if flip:  # the codes of the negative half, counted from its lowest level
        lower = [w ^ top for w in lower]
    value = _select([_mask(_bits(w)) for w in (lower if flip else words)], table)
    return _tiles((_bits(top) << 15) ^ value if flip else value)


def _bits(words: jax.Array) -> jax.Array:
    """[16, 8, lanes]: bits j and j + 16 as the lowest bits of both halves."""
    shape = (BLOCK // 16, *words.shape)
    shifts = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return (jnp.broadcast_to(words[None], shape) >> shifts) & _ONES


def _tiles(pairs: jax.Array) -> jax.Array:
    return pltpu.bitcast(pairs, jnp.bfloat16).reshape(BLOCK, pairs.shape[-1])


def _mask(bits: jax.Array) -> jax.Array:
    """All bits of each half whose lowest bit is set."""
    return (bits << 16) - bits


def _select(masks: list[jax.Array], table: list):
    """table[code], the masks being the bits of the code, lowest first."""
    if not masks:
        return table[0]
    half = len(table) // 2
    low, high = (_select(masks[:-1], part) for part in (table[:half], table[half:]))
    return low ^ ((low ^ high) & masks[-1])


def _numbers(part: Part, words: list[jax.Array]) -> jax.Array:
    code = _bits(words[0])
    for p, w in enumerate(words[1:], 1):
        code = code | (_bits(w) << p)
    low, high = (jax.lax.bitcast_convert_type(_number(part, code, h), jnp.int32) for h in (0, 1))
    return _tiles(jax.lax.shift_right_logical(low, jnp.full(low.shape, 16, jnp.int32)) | high)


def _number(part: Part, code: jax.Array, h: int) -> jax.Array:
    """float32 of the codes in one half; its lower 16 bits are zero."""
    if part.levels == "int8":
        return ((code << (8 if h else 24)) >> 24).astype(jnp.float32)
    code = ((code >> 16) if h else code) & 0xFF
    if part.levels in FLOATS:
        return decode_float(part.levels, code)
    return code.astype(jnp.float32)
