"""Stored vectors as rows of bits, any number of them per head: one pool for all layers and heads.

A stored vector is T bits, one column each; T differs from head to head. A page is 256 tokens, and
of a head that begins at column `start` of the pool

    words[page, 8 start + T r + t] bit j  =  column t of token 256 page + 8 j + r

so a head's page is one run of 8 T words: T / 8 bytes per token, nothing is padded, and where a head
lies and what its columns mean is data. One program reads and writes all heads of all plans. A token
is one bit of T words in a row, which an append ORs in.

A column is one bit of an *entry*, an unsigned number of the vector (a code, a gain): entry e of a
vector is the sum of its columns, column t worth 2^plane[t]. Columns are in the order of the codec's
fields, each plane by plane and channel by channel, as in the pages of `turboq.numbers.packing`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt32

from turboq.numbers.packing import PAGE, ROWS, WORD_BITS

NONE = -1  # the plane of a column that is not there


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """Where K heads lie in the pool and what their columns mean; `plane` is NONE behind a head."""

    start: Any  # int32 [K], in columns of the pool
    width: Any  # int32 [K], columns of the head
    entry: Any  # int32 [K, T], T the widest head's columns
    plane: Any  # int32 [K, T]


Planes = Sequence[tuple[int, int]]  # (entry, plane) of every column of one head


def field_planes(first: int, width: int, bits: int) -> list[tuple[int, int]]:
    """Columns of a field of `width` entries from entry `first` on, plane by plane."""
    return [(first + c, p) for p in range(bits) for c in range(width)]


def lay_out(sides: Iterable[Sequence[Planes]]) -> tuple[list[Columns], int]:
    """One `Columns` per side (K or V of a layer), heads one behind the other; columns of the pool.

    All have the same shape if all sides have as many heads.
    """
    sides = list(sides)
    most = max(len(planes) for heads in sides for planes in heads)
    out, start = [], 0
    for heads in sides:
        entry = np.zeros((len(heads), most), np.int32)
        plane = np.full((len(heads), most), NONE, np.int32)
        starts = []
        for h, planes in enumerate(heads):
            entry[h, : len(planes)] = [e for e, _ in planes]
            plane[h, : len(planes)] = [p for _, p in planes]
            starts.append(start)
            start += len(planes)
        width = np.array([len(planes) for planes in heads], np.int32)
        starts = np.array(starts, np.int32)
        out.append(Columns(start=starts, width=width, entry=entry, plane=plane))
    return out, start


def pool(batch: int, pages: int, columns: int) -> UInt32[Array, "B P W"]:
    """An empty pool."""
    return jnp.zeros((batch, pages, ROWS * columns), jnp.uint32)


def write(
    words: UInt32[Array, "B P W"],
    columns: Columns,
    entries: UInt32[Array, "B K T E"],
    start: Int[Array, "B"],
    valid: Bool[Array, "B T"],
) -> UInt32[Array, "B P W"]:
    """ORs the entries of T tokens into slots start[b] onwards, where `valid`.

    Slots must still be zero. Tokens that are not valid leave no trace, nor do those behind the
    pool's last page.
    """
    bits = jnp.where(valid[:, :, None, None], jax.vmap(_bits, (0, 1), 2)(columns, entries), 0)
    first, new = (_one_token if bits.shape[1] == 1 else _pages)(bits, start, words.shape[1])
    where = (
        jnp.arange(len(words), dtype=jnp.int32)[:, None, None, None, None],
        (first[:, None] + jnp.arange(new.shape[1], dtype=jnp.int32)[None])[:, :, None, None, None],
        _index(columns, jnp.arange(columns.plane.shape[1], dtype=jnp.int32)[None])[None, None],
    )
    old = words.at[where].get(mode="fill", fill_value=0)
    return words.at[where].set(old | new, mode="drop", unique_indices=True)


def _bits(one: Columns, entries: UInt32[Array, "B T E"]) -> UInt32[Array, "B T C"]:
    """The columns of one head's entries."""
    there = one.plane != NONE
    shift = jnp.where(there, one.plane, 0).astype(jnp.uint32)[None, None]
    taken = jnp.take(entries, one.entry, axis=-1) >> shift
    return jnp.where(there[None, None], taken & jnp.uint32(1), jnp.uint32(0))


def _index(columns: Columns, column: Int[Array, "*k c"]) -> Int[Array, "K R c"]:
    """Place in a page of the words of `column`, of all rows; out of bounds where there is none."""
    row = jnp.arange(ROWS, dtype=jnp.int32)[None, :, None] * columns.width[:, None, None]
    column = jnp.broadcast_to(column, (len(columns.start), column.shape[-1]))[:, None]
    place = ROWS * columns.start[:, None, None] + row + column
    return jnp.where(column < columns.width[:, None, None], place, jnp.iinfo(jnp.int32).max)


def _pages(
    bits: UInt32[Array, "B T K C"], slot: Int[Array, "B"], pages: int
) -> tuple[Int[Array, "B"], UInt32[Array, "B p K R C"]]:
    """The first page that these tokens touch, and the words of as many as they may touch."""
    tokens, heads, width = bits.shape[1:]
    count = min(-(-tokens // PAGE) + 1, pages)
    # Moved left at the end of the pool: dynamic_slice, which clamps silently, has nothing to clamp.
    first = jnp.minimum(slot // PAGE, pages - count)

    def one(bits, slot):
        room = jnp.zeros((count * PAGE + tokens, heads, width), jnp.uint32)
        room = jax.lax.dynamic_update_slice_in_dim(room, bits, slot, axis=0)
        split = room[: count * PAGE].reshape(count, WORD_BITS, ROWS, heads, width)
        shifts = jnp.arange(WORD_BITS, dtype=jnp.uint32).reshape(1, -1, 1, 1, 1)
        # Disjoint bits: their sum is their OR.
        return jnp.sum(split << shifts, axis=1, dtype=jnp.uint32).swapaxes(1, 2)

    return first, jax.vmap(one)(bits, slot - first * PAGE)


def _one_token(
    bits: UInt32[Array, "B 1 K C"], slot: Int[Array, "B"], pages: int
) -> tuple[Int[Array, "B"], UInt32[Array, "B 1 K R C"]]:
    """`_pages` of one token: one row of one page."""
    row = jnp.arange(ROWS, dtype=jnp.int32)[None] == (slot % ROWS)[:, None]
    word = bits << (slot % PAGE // ROWS).astype(jnp.uint32)[:, None, None, None]
    new = jnp.where(row[:, None, None, :, None], word[:, :, :, None], jnp.uint32(0))
    return slot // PAGE, new


def read(
    words: UInt32[Array, "B P W"], columns: Columns, count: int, planes: int
) -> UInt32[Array, "K B S E"]:
    """All entries of all heads, `count` per vector of up to `planes` bits; S = 256 P slots."""
    heads, width = columns.plane.shape
    # Words are put in the order of the entries before they are taken apart, 32 tokens at a time.
    there = jnp.where(columns.plane == NONE, planes, columns.plane)
    head = jnp.arange(heads, dtype=jnp.int32)[:, None]
    column = jnp.full((heads, planes, count), width, jnp.int32)
    numbers = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None], there.shape)
    column = column.at[head, there, columns.entry].set(numbers, mode="drop", unique_indices=True)
    at = _index(columns, column.reshape(heads, -1))
    own = jnp.moveaxis(words.at[:, :, at].get(mode="fill", fill_value=0), 2, 0)
    own = jax.lax.optimization_barrier(own.reshape(*own.shape[:-1], planes, count))
    own = own[:, :, :, None]  # [K, B, P, 1, R, planes, E]
    shifts = jnp.arange(WORD_BITS, dtype=jnp.uint32).reshape(1, 1, 1, -1, 1, 1)
    entries = functools.reduce(
        jnp.bitwise_or,
        [((own[..., p, :] >> shifts) & jnp.uint32(1)) << jnp.uint32(p) for p in range(planes)],
    )
    return entries.reshape(heads, len(words), -1, count)


def bits_per_token(columns: Sequence[Any]) -> int:
    """Columns of all heads: stored bits of one token."""
    return int(sum(np.count_nonzero(np.asarray(c.plane) != NONE) for c in columns))
