"""How the TPU kernel sees packed pages: words folded to 128 lanes, and which token is where.

A page of a part of `width` coordinates is [bits, rows, width] words. Below 128 coordinates `fold`
consecutive rows lie side by side, [bits, rows / fold, fold * width]: the same bytes in the same
order, so a cache kept in this form needs no copy, and no tile of a TPU register is padded.

One step of the kernel reads one or two chunks of 32 register rows of every bit plane (four
registers of eight rows): a chunk is 32 / (rows / fold) pages. Masking a word with 0x01010101 << j
keeps one bit of each of its four bytes, so as int8 the four registers are a [128, lanes] matrix
whose row 32 u + 4 r + b belongs to bit t = j + 8 b of register row R = 8 u + r. The logits of a
chunk are therefore 8 * fold registers, one for each (h, j), h being the lane block, and lane l of
one of them is the token

    page R // (rows / fold) of the chunk,  slot rows * t + (R % (rows / fold)) * fold + h,
    R = l // 4,  t = j + 8 * (l % 4).

Everything else (scales, masks) is brought into that order, which is the same for K and V: no logit
is ever moved across lanes.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from turboq.codecs.reading import Part
from turboq.numbers import half
from turboq.numbers.packing import WORD_BITS

LANES = 128
CHUNK_ROWS = 32  # register rows of one bit plane that meet in one product: four registers
GROUPS = 8  # values of j
TILE_HEADS = 8  # heads whose 16-bit numbers fill a tile


@dataclasses.dataclass(frozen=True)
class PartLayout:
    """A part's words as the kernel reads them."""

    bits: int
    width: int  # coordinates
    padded: int  # coordinates with those added to fill lanes
    fold: int  # rows side by side in the lanes
    rows: int  # rows of a page before folding
    whole: bool = False  # a page is one register row of every plane, and no part needs another fold

    @property
    def lanes(self) -> int:
        return self.padded * self.fold

    @property
    def page_rows(self) -> int:
        """Register rows of one page and plane."""
        return self.rows // self.fold

    @property
    def block(self) -> tuple[int, int, int]:
        """Shape of one page."""
        return self.bits, self.page_rows, self.lanes


def part_layout(part: Part, rows: int) -> PartLayout:
    """The layout of a part in pages of `rows` rows (8 or 2)."""
    if part.width >= LANES:
        padded = -(-part.width // LANES) * LANES
        return PartLayout(part.bits, part.width, padded, 1, rows)
    fold = max(f for f in (1, 2, 4, 8) if f <= rows and part.width * f <= LANES)
    return PartLayout(part.bits, part.width, LANES // fold, fold, rows)


def fold_words(words: jax.Array, layout: PartLayout) -> jax.Array:
    """[R, bits, rows, width] -> [R, bits, rows / fold, lanes]; a copy only if lanes are added."""
    extra = layout.padded - layout.width
    if extra:
        words = jnp.pad(words, ((0, 0), (0, 0), (0, 0), (0, extra)))
    return words.reshape(words.shape[0], *layout.block)


def buffer_shape(layout: PartLayout, pages: int) -> tuple[int, ...]:
    """The words of a step: by pages where a page fills registers, else all rows of a plane."""
    if layout.whole:
        return pages, *layout.block
    return layout.bits, pages * layout.page_rows, layout.lanes


@dataclasses.dataclass(frozen=True)
class Step:
    """The tokens of one step: `fold` is the largest of all parts of K and V."""

    rows: int
    fold: int
    chunks: int

    @property
    def page(self) -> int:
        return self.rows * WORD_BITS

    @property
    def page_rows(self) -> int:
        return self.rows // self.fold

    @property
    def chunk_pages(self) -> int:
        return CHUNK_ROWS // self.page_rows

    @property
    def pages(self) -> int:
        return self.chunks * self.chunk_pages

    @property
    def tokens(self) -> int:
        return self.pages * self.page

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """All (chunk, h): each has logits for every j."""
        return tuple((c, h) for c in range(self.chunks) for h in range(self.fold))

    def page_of(self, lane):
        """Page of the chunk that lane l belongs to."""
        return (lane // 4) // self.page_rows

    def slot_of(self, lane, h: int, j):
        """Slot within its page of lane l of the logits (h, j)."""
        row = (lane // 4) % self.page_rows
        return self.rows * (j + 8 * (lane % 4)) + row * self.fold + h


# Scales and offsets: how a buffer [R, page] lies in rows of 128 words of 32 bits.
def scale_rows(buffer: jax.Array) -> jax.Array:
    """[R, page] float16, bfloat16 or float32 -> uint32 [rows, 128], the same bytes in order.

    Two 16-bit entries share a word, the first in its low half.
    """
    if buffer.dtype.itemsize == 2:  # an array [-1, 2] would be padded to 128 lanes, 64 times
        buffer = buffer.reshape(buffer.shape[0], -1, 2)
    flat = jax.lax.bitcast_convert_type(buffer, jnp.uint32).reshape(-1)
    return jnp.pad(flat, (0, -flat.shape[0] % LANES)).reshape(-1, LANES)


def lies_by_heads(dtype, heads: int, page: int) -> bool:
    """Whether 16-bit numbers [pages, N, page, 1] of a pool lie as [N, page] in tiles of registers.

    So XLA keeps them where no tile is padded; others it would lay out anew for a kernel.
    """
    whole = heads in (2, 4) or heads % TILE_HEADS == 0
    return jnp.dtype(dtype).itemsize == 2 and page == 2 * LANES and whole


def by_heads(buffer: jax.Array, heads: int) -> jax.Array:
    """[R, page] of such a pool as [R / tile, tile, page], float16 as its bits.

    Where the pool holds bits (`turboq.cache.paged.init`) nothing moves, nor of bfloat16.
    """
    return half.bits(buffer).reshape(-1, min(heads, TILE_HEADS), buffer.shape[1])


@dataclasses.dataclass(frozen=True)
class ScaleLayout:
    """Where the entries of a page lie in the rows of `scale_rows`, or of a pool with so many heads.

    A pool that lies by heads is read by tiles of up to 8 heads; as all heads of a page share them,
    a step's tiles are read once, an equal share while each head is at work, two steps ahead.
    """

    dtype: str
    page: int
    heads: int = 0  # of a pool that lies by heads (`lies_by_heads`), else 0

    @property
    def per_word(self) -> int:
        return 2 if jnp.dtype(self.dtype).itemsize == 2 else 1

    @property
    def tile(self) -> int:
        """Heads that lie in one tile."""
        return min(self.heads, TILE_HEADS)

    def share(self, pages: int) -> int:
        """Tiles that are read while one head is at work, of a step of so many pages."""
        return -(-pages // self.tile)

    def tile_of(self, page, head):
        """Index of the tile among those of a step, in which a head of its page lies."""
        return page * (self.heads // self.tile) + head // self.tile

    def words_of(self, row, head):
        """uint32 [1, 128] of a head, slots l and 128 + l in word l, from [1, 256] of two heads.

        These are row head % tile // 2 of their tile, as words of 32 bits.
        """
        row = (row >> (head % 2 * 16).astype(jnp.uint32)) & jnp.uint32(0xFFFF)
        return row[:, :LANES] | (row[:, LANES:] << 16)

    @property
    def words(self) -> int:
        """Words of one page."""
        return self.page // self.per_word

    @property
    def page_rows(self) -> int:
        """Rows that are read for one page."""
        return max(1, self.words // LANES)

    # Sizes are powers of two: shifts and masks instead of signed divisions on the scalar unit.
    def first_row(self, head_page):
        if self.words >= LANES:
            return head_page * self.page_rows
        return head_page >> (LANES // self.words).bit_length() - 1

    def first_lane(self, head_page):
        """Lane where a page starts in its row (pages of 64 tokens share rows)."""
        if self.words >= LANES:
            return 0
        return (head_page & LANES // self.words - 1) * self.words

    def decode(self, word: jax.Array, high: jax.Array | bool) -> jax.Array:
        """float32 of the words' entries; `high` takes the second of a pair. Never NaN.

        What lies in unused slots may be anything, but it must be finite: it is multiplied by zero.
        """
        if self.per_word == 2:
            word = jnp.where(high, word >> 16, word & jnp.uint32(0xFFFF))
        if self.dtype == "float16":
            return _half(word)
        if self.dtype == "bfloat16":
            word = word << 16
        value = jax.lax.bitcast_convert_type(word, jnp.float32)
        return jnp.where(jnp.abs(value) < jnp.inf, value, 0.0)


def _half(bits: jax.Array) -> jax.Array:
    """float32 of float16 bits; infinities and NaN become numbers of 2**16 and more."""
    magnitude = bits & jnp.uint32(0x7FFF)
    normal = jax.lax.bitcast_convert_type(
        (magnitude << 13) + jnp.uint32(112 << 23), jnp.float32
    )  # the exponent's bias is 127 instead of 15
    tiny = magnitude.astype(jnp.int32).astype(jnp.float32) * 2.0**-24
    value = jnp.where(magnitude < jnp.uint32(0x400), tiny, normal)
    return jnp.where(bits < jnp.uint32(0x8000), value, -value)
