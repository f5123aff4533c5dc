"""From bit planes of vectors to the words of pages, as they lie in the (folded) cache.

Bits are first gathered in registers [8, lanes], sublane s of which holds row s % rows of a page
(pages of 64 tokens have 2 rows, so that four groups of rows lie in one register). A field's lanes
are then cut out of it and its rows laid side by side (`decode.mosaic_tpu_layout`): work per page,
not per token.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from turboq.numbers import packing
from turboq.numbers.packing import WORD_BITS
from turboq_kernels.decode.mosaic_tpu_layout import LANES

SUBLANES = 8


@dataclasses.dataclass(frozen=True)
class FieldSpec:
    """Where one field's words come from and how they are stored."""

    bits: int
    width: int
    rows: int  # of a page
    place: int  # first lane in the registers

    @property
    def fold(self) -> int:
        """Rows that lie side by side; 1 where lanes would have to be added."""
        return self.block[2] // self.width

    @property
    def block(self) -> tuple[int, int, int]:
        """Shape of a stored page."""
        return packing.kept_shape(self.bits, self.width, self.rows)


def fold(words: Array, field: FieldSpec) -> Array:
    """[R, bits, rows, width] as a cache keeps them; the bytes stay where they are."""
    return words.reshape(words.shape[0], *field.block)


def merge(field: FieldSpec, gathered, at, old: Array, low, high) -> Array:
    """The words of a page: new bits for slots in low..high - 1, old ones below, zero above.

    Args:
      gathered: ref uint32 [.., lanes / 128, 8, 128]; `at` is the index of the field's first plane.
      old: [bits, rows / fold, width * fold].
    """
    _, rows, lanes = field.block
    row = jax.lax.broadcasted_iota(jnp.int32, (rows, lanes), 0) * field.fold
    if field.fold > 1:
        row = row + jax.lax.broadcasted_iota(jnp.int32, (rows, lanes), 1) // field.width
    below, until = _slots_below(field.rows, row, low), _slots_below(field.rows, row, high)
    fresh = until & ~below
    return jnp.stack(
        [(_cut(field, gathered, at + p) & fresh) | (old[p] & below) for p in range(field.bits)]
    )


def _cut(field: FieldSpec, gathered, plane: int) -> Array:
    """One stored plane of a page from its registers."""
    _, rows, lanes = field.block
    first = field.place // LANES
    lane = jax.lax.broadcasted_iota(jnp.int32, (rows, lanes), 1)
    out = jnp.zeros((rows, lanes), jnp.uint32)
    for h in range(field.fold):
        blocks = []
        for block in range(first, first + -(-lanes // LANES)):
            word = None
            for group in range(0, SUBLANES, field.rows):
                at = pl.ds(group + h, rows, stride=field.fold)
                held = gathered[pl.ds(plane, 1), pl.ds(block, 1), at, :].reshape(rows, LANES)
                word = held if word is None else word | held
            blocks.append(word)
        piece = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)
        shift = (h * field.width - field.place) % LANES
        if shift:  # a field below 128 lanes lies in one block
            piece = pltpu.roll(piece, shift, 1)
        piece = piece[:, :lanes]
        if field.fold > 1:
            piece = jnp.where(lane // field.width == h, piece, jnp.uint32(0))
        out = out | piece
    return out


def _slots_below(rows: int, row: Array, limit) -> Array:
    """uint32: bit j of a word of row r is set if rows * j + r < limit."""
    count = jnp.clip((limit - row + (rows - 1)) >> (rows.bit_length() - 1), 0, WORD_BITS)
    ones = (jnp.uint32(1) << jnp.minimum(count, WORD_BITS - 1).astype(jnp.uint32)) - jnp.uint32(1)
    return jnp.where(count == WORD_BITS, jnp.uint32(0xFFFFFFFF), ones)
