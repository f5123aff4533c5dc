"""Packing: codes below 2**b in exactly b bits. The only place that knows the bit layout.

A page is 256 tokens of one head. Codes are split into bit planes and packed *along tokens*:

    words[page, p, r, c] bit j  =  bit p of the code of token 256*page + 8*j + r, channel c
    page: S/256 pages;  p: plane 0..b-1 (0 is the least significant);  r: row 0..7;
    c: channel 0..C-1;  j: bit 0..31 of a uint32

so one page is [b, 8, C] uint32: b*C/8 bytes per token with no padding for any b (D=128 at 3 bits
is 48 bytes). Unpacking bit j is the same shift on every lane, so no lane or gather moves are needed
and the minor axes [8, C] are the tile of a TPU register; appending a token is an OR into zeros.

A pool whose pages are shared between sequences may prefer pages of 64 tokens: the same rule with
2 rows instead of 8, token 32*rows*page + rows*j + r at row r and bit j. Every function reads the
number of rows from the words' shape.

A cache keeps the words of narrow fields folded: where 2, 4 or 8 rows of C channels are exactly 128,
[b, rows, C] is kept as [b, rows / fold, 128], the same words in the same order. A TPU register is
128 lanes wide, and arrays of fewer are padded or laid out anew by its compiler, which then copies
the cache in every call.

Raises:
  ValueError: tokens that fill no whole pages, or bits that are not 1 to 8.

Examples:
  >>> import jax.numpy as jnp
  >>> from turboq import packing
  >>> codes = (jnp.arange(256 * 64) % 8).astype(jnp.uint8).reshape(256, 64)
  >>> words = packing.pack(codes, 3)
  >>> words.shape, words.nbytes == 256 * 64 * 3 // 8
  ((1, 3, 8, 64), True)
  >>> bool((packing.unpack(words) == codes).all())
  True
"""

# pyright: strict, reportUnknownMemberType=false

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt8, UInt32

PAGE = 256  # tokens per page: ROWS * bits of a word
ROWS = 8
LANES = 128
WORD_BITS = 32
PAGE_ROWS = {256: 8, 64: 2}  # page sizes of a pool, and their rows


def words_shape(
    tokens: int, bits: int, channels: int, rows: int = ROWS
) -> tuple[int, int, int, int]:
    """Shape (pages, bits, rows, channels) of the words of `tokens` tokens (whole pages).

    Raises:
      ValueError: tokens not a multiple of 32 * rows (256), or bits not in 1..8.
    """
    page = rows * WORD_BITS
    if tokens < 0 or tokens % page:
        raise ValueError(f"{tokens=} must be a multiple of {page} (one page)")
    if not 1 <= bits <= 8:
        raise ValueError(f"{bits=} must be 1..8")
    return tokens // page, bits, rows, channels


def kept_shape(bits: int, channels: int, rows: int = ROWS) -> tuple[int, int, int]:
    """Shape in which a cache keeps the words [bits, rows, channels] of one page."""
    fold = next((f for f in (8, 4, 2) if f <= rows and channels * f == LANES), 1)
    return bits, rows // fold, channels * fold


def keep(words: UInt32[Array, "*n b r C"]) -> UInt32[Array, "*n b f l"]:
    """Words as a cache keeps them: the same words in the same order."""
    *lead, bits, rows, channels = words.shape
    return words.reshape(*lead, *kept_shape(bits, channels, rows))


def kept(words: UInt32[Array, "*n b f l"], channels: int) -> UInt32[Array, "*n b r C"]:
    """The words [..., bits, rows, channels] of what a cache keeps, folded or not."""
    *lead, bits, rows, lanes = words.shape
    return words.reshape(*lead, bits, rows * lanes // channels, channels)


def pack(
    codes: UInt8[Array, "*n S C"], bits: int, rows: int = ROWS
) -> UInt32[Array, "*n P b {rows} C"]:
    """Codes to words; bits above `bits` of a code are not stored. S is a multiple of 32 * rows."""
    *lead, tokens, channels = codes.shape
    pages = words_shape(tokens, bits, channels, rows)[0]
    # Without the barrier XLA computes the codes anew for every bit plane.
    codes = jax.lax.optimization_barrier(codes)
    split = codes.reshape(*lead, pages, 1, WORD_BITS, rows, channels).astype(jnp.uint32)
    planes = _along(jnp.arange(bits, dtype=jnp.uint32), split.ndim, -4)
    shifts = _along(jnp.arange(WORD_BITS, dtype=jnp.uint32), split.ndim, -3)
    one = jnp.uint32(1)
    # The bits of a word are disjoint, so their sum is their OR, and XLA fuses a sum well.
    return jnp.sum(((split >> planes) & one) << shifts, axis=-3, dtype=jnp.uint32)


def unpack(words: UInt32[Array, "*n P b r C"]) -> UInt8[Array, "*n S C"]:
    """Words to codes, the inverse of `pack`; the number of bits is read from the shape."""
    *lead, pages, bits, rows, channels = words.shape
    split = words[..., None, :, :]  # [*n, P, b, 1, r, C]
    shifts = _along(jnp.arange(WORD_BITS, dtype=jnp.uint32), split.ndim - 1, -3)
    one = jnp.uint32(1)
    codes = jnp.zeros((*lead, pages, WORD_BITS, rows, channels), jnp.uint32)
    for p in range(bits):
        codes |= ((split[..., p, :, :, :] >> shifts) & one) << p
    return codes.astype(jnp.uint8).reshape(*lead, pages * WORD_BITS * rows, channels)


def insert(
    words: UInt32[Array, "P b r C"], codes: UInt8[Array, "T C"], start: Int[Array, ""] | int
) -> UInt32[Array, "P b r C"]:
    """ORs T tokens into the words at token position `start` (may be traced).

    Preconditions the caller keeps (they cannot be checked on traced values): the slots
    start..start+T-1 are still zero, start < 32 r P, and codes past slot 32 r P are padding,
    which is dropped.

    Raises:
      ValueError: T exceeds the 32 r P tokens that the words hold.
    """
    pages, bits, rows, channels = words.shape
    page = rows * WORD_BITS
    tokens = codes.shape[0]
    if tokens > pages * page:
        raise ValueError(f"{tokens=} exceed the {pages * page} slots of {pages=}")
    start = jnp.asarray(start, jnp.int32)
    if tokens == 1:
        return _insert_one(words, codes[0], start)
    # Whole pages that surely hold the tokens; moved left at the end of the buffer so that
    # dynamic_slice, which clamps silently, has nothing to clamp.
    count = min(-(-tokens // page) + 1, pages)
    first = jnp.minimum(start // page, pages - count)
    # Room for T more: padding of a chunk (zero codes) may reach past the last page and is cut off.
    block = jnp.zeros((count * page + tokens, channels), jnp.uint8)
    block = jax.lax.dynamic_update_slice_in_dim(block, codes, start - first * page, axis=0)
    block = block[: count * page]
    old = jax.lax.dynamic_slice_in_dim(words, first, count, axis=0)
    return jax.lax.dynamic_update_slice_in_dim(words, old | pack(block, bits, rows), first, axis=0)


def _insert_one(
    words: UInt32[Array, "P b r C"], code: UInt8[Array, "C"], start: Int[Array, ""]
) -> UInt32[Array, "P b r C"]:
    """One token touches one row [b, C] of one page."""
    _, bits, rows, channels = words.shape
    page, slot = start // (rows * WORD_BITS), start % (rows * WORD_BITS)
    bit, row = (slot // rows).astype(jnp.uint32), slot % rows
    planes = jnp.arange(bits, dtype=jnp.uint32)[:, None]
    new = ((code.astype(jnp.uint32)[None, :] >> planes) & jnp.uint32(1)) << bit
    zero = jnp.zeros((), page.dtype)
    at = (page, zero, row, zero)
    old = jax.lax.dynamic_slice(words, at, (1, bits, 1, channels))
    return jax.lax.dynamic_update_slice(words, old | new[None, :, None, :], at)


def pack_host(
    codes: UInt8[np.ndarray, "*n S C"], bits: int, rows: int = ROWS
) -> UInt32[np.ndarray, "*n P b rows C"]:
    """NumPy twin of `pack`: uint8 [..., S, C] -> uint32 [..., P, b, rows, C]."""
    *lead, tokens, channels = codes.shape
    pages = words_shape(tokens, bits, channels, rows)[0]
    split = codes.reshape(*lead, pages, WORD_BITS, rows, channels)
    words = np.zeros((*lead, pages, bits, rows, channels), np.uint32)
    for p in range(bits):
        for j in range(WORD_BITS):
            plane = (split[..., j, :, :] >> np.uint8(p)) & np.uint8(1)
            words[..., p, :, :] |= plane.astype(np.uint32) << np.uint32(j)
    return words


def unpack_host(words: UInt32[np.ndarray, "*n P b rows C"]) -> UInt8[np.ndarray, "*n S C"]:
    """NumPy twin of `unpack`: uint32 [..., P, b, rows, C] -> uint8 [..., S, C]."""
    *lead, pages, bits, rows, channels = words.shape
    codes = np.zeros((*lead, pages, WORD_BITS, rows, channels), np.uint8)
    for p in range(bits):
        for j in range(WORD_BITS):
            plane = (words[..., p, :, :] >> np.uint32(j)) & np.uint32(1)
            codes[..., j, :, :] |= plane.astype(np.uint8) << np.uint8(p)
    return codes.reshape(*lead, pages * WORD_BITS * rows, channels)


def _along(values: Array, ndim: int, axis: int) -> Array:
    """A 1-D array laid along `axis` of `ndim` axes, the others of size one."""
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)
