"""Stored vectors as rows of bits, any number of them per head: one pool for all layers and heads.

A stored vector is T bits, one column each; T differs from head to head. A page is 256 tokens, the
columns of all heads and layers side by side, nothing padded:

    words[page, r, lane] bit 8 b + j  =  column `lane` of token 256 page + 32 j + 8 b + r

so a mask 0x01010101 << j takes 32 tokens in a row out of the words, as bytes that a matrix unit
reads without a shift. Which lanes a head has and what they mean is data: a token of a layer is one
row of bits, a plan the matrix that it is multiplied by, and one program reads and writes all heads
of all plans. A token is one bit of a word per column, which an append sets.

A column is one bit of an *entry*, an unsigned number of the vector (a code, a gain): entry e of a
vector is the sum of its columns, column t worth 2^plane[t]. A layer has what its keys and values
store beside their codes (gains), head by head; the codes of its keys; the codes of its values. So a
reader finds all that it must know before it weighs values in one run of lanes, what is not codes
first, and the rest in another.
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
BYTES = 4  # of a word
# Bit of a word of the tokens r, 8 + r, 16 + r, ... of a page.
BIT_OF = np.arange(WORD_BITS) % BYTES * 8 + np.arange(WORD_BITS) // BYTES


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """Where K heads lie in a page and what their columns mean; `plane` is NONE behind a head."""

    lane: Any  # int32 [K, T], T the widest head's columns
    entry: Any  # int32 [K, T]
    plane: Any  # int32 [K, T]


Planes = Sequence[tuple[int, int]]  # (entry, plane) of every column of one head
Head = tuple[Planes, Planes]  # of its codes, and of the rest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Columns of K and V of a layer, and the lanes of both runs: [start, stop) of each."""

    k: Columns
    v: Columns
    runs: tuple[tuple[int, int], tuple[int, int]]


def field_planes(first: int, width: int, bits: int) -> list[tuple[int, int]]:
    """Columns of a field of `width` entries from entry `first` on, plane by plane."""
    return [(first + c, p) for p in range(bits) for c in range(width)]


def lay_out(
    layers: Iterable[tuple[Sequence[Head], Sequence[Head]]],
) -> tuple[list[Layout], int]:
    """A `Layout` per layer, one behind the other, of its heads' K and V; lanes of a page.

    All have the same shapes if all layers have as many heads.
    """
    layers = list(layers)
    most = max(len(codes) + len(rest) for sides in layers for s in sides for codes, rest in s)
    out, lane = [], 0
    for k, v in layers:
        sides = [np.full((3, len(heads), most), NONE, np.int32) for heads in (k, v)]
        used = [[0] * len(heads) for heads in (k, v)]
        first = lane
        for side, part in ((0, 1), (1, 1), (0, 0), (1, 0)):
            if (side, part) == (1, 0):
                middle = lane
            for h, head in enumerate((k, v)[side]):
                for entry, plane in head[part]:
                    sides[side][:, h, used[side][h]] = lane, entry, plane
                    used[side][h], lane = used[side][h] + 1, lane + 1
        k_columns, v_columns = (
            Columns(lane=np.maximum(a, 0), entry=np.maximum(e, 0), plane=p) for a, e, p in sides
        )
        runs = ((first, middle), (middle, lane))
        out.append(Layout(k=k_columns, v=v_columns, runs=runs))
    return out, lane


def pool(batch: int, pages: int, lanes: int) -> UInt32[Array, "B P R C"]:
    """An empty pool."""
    return jnp.zeros((batch, pages, ROWS, lanes), jnp.uint32)


def pages_of(words: UInt32[Array, "N P R C"], table: Int[Array, "b p"] | None = None) -> int:
    """Pages of a sequence: its own, or as many as its row of the table of shared pages has."""
    return words.shape[1] if table is None else table.shape[1]


def write(
    words: UInt32[Array, "N P R C"],
    columns: Columns,
    entries: UInt32[Array, "B K T E"],
    start: Int[Array, "B"],
    valid: Bool[Array, "B T"],
    table: Int[Array, "b p"] | None = None,
) -> UInt32[Array, "N P R C"]:
    """Puts the entries of T tokens into slots start[b] onwards, where `valid`.

    Tokens that are not valid leave no trace, nor do those behind the pool's last page. With a
    `table` pages of sequence b are words[0, table[b]]; no two sequences write one page.
    """
    bits = jnp.where(valid[:, :, None, None], jax.vmap(_bits, (0, 1), 2)(columns, entries), 0)
    count = words.shape[1] if table is None else table.shape[1]
    place = _one_token if bits.shape[1] == 1 else _pages
    first, new = place(bits, start, count)
    _, written = place(valid[:, :, None, None].astype(jnp.uint32), start, count)
    pages = first[:, None] + jnp.arange(new.shape[1], dtype=jnp.int32)[None]
    item, row = (jnp.arange(n, dtype=jnp.int32) for n in (len(start), ROWS))
    item = item[:, None]
    if table is not None:
        # Pages that no token touches may be another's: each lies behind the pool, for itself.
        touched = jnp.any(written != 0, axis=(2, 3, 4)) & (pages < count)
        behind = words.shape[1] + jnp.arange(pages.size, dtype=jnp.int32).reshape(pages.shape)
        own = table[item, jnp.minimum(pages, count - 1)]
        pages, item = jnp.where(touched, own, behind), jnp.zeros_like(item)
    where = (
        item[..., None, None, None],
        pages[:, :, None, None, None],
        row[None, None, None, :, None],
        # Columns that are not there lie behind the pool, each for itself.
        _lanes(columns, words.shape[-1])[None, None, :, None, :],
    )
    # A page may hold what was there before: tokens of another sequence, or ones taken back.
    old = words.at[where].get(mode="fill", fill_value=0) & ~written
    return words.at[where].set(old | new, mode="drop", unique_indices=True)


def _lanes(columns: Columns, lanes: int) -> Int[Array, "K T"]:
    """Lanes of columns; from `lanes` on where there is none."""
    behind = lanes + jnp.arange(columns.plane.size, dtype=jnp.int32).reshape(columns.plane.shape)
    return jnp.where(columns.plane == NONE, behind, columns.lane)


def _bits(one: Columns, entries: UInt32[Array, "B T E"]) -> UInt32[Array, "B T C"]:
    """The columns of one head's entries."""
    there = one.plane != NONE
    shift = jnp.where(there, one.plane, 0).astype(jnp.uint32)[None, None]
    taken = jnp.take(entries, one.entry, axis=-1) >> shift
    return jnp.where(there[None, None], taken & jnp.uint32(1), jnp.uint32(0))


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
        shifts = jnp.asarray(BIT_OF, jnp.uint32).reshape(1, -1, 1, 1, 1)
        # Disjoint bits: their sum is their OR.
        return jnp.sum(split << shifts, axis=1, dtype=jnp.uint32).swapaxes(1, 2)

    return first, jax.vmap(one)(bits, slot - first * PAGE)


def _one_token(
    bits: UInt32[Array, "B 1 K C"], slot: Int[Array, "B"], pages: int
) -> tuple[Int[Array, "B"], UInt32[Array, "B 1 K R C"]]:
    """`_pages` of one token: one row of one page."""
    row = jnp.arange(ROWS, dtype=jnp.int32)[None] == (slot % ROWS)[:, None]
    bit = jnp.asarray(BIT_OF, jnp.uint32)[slot % PAGE // ROWS]
    word = bits << bit[:, None, None, None]
    new = jnp.where(row[:, None, None, :, None], word[:, :, :, None], jnp.uint32(0))
    return slot // PAGE, new


def read(
    words: UInt32[Array, "N P R C"],
    columns: Columns,
    count: int,
    planes: int,
    table: Int[Array, "b p"] | None = None,
) -> UInt32[Array, "K b S E"]:
    """All entries of all heads, `count` per vector of up to `planes` bits; S = 256 P slots.

    `table`: as of `write`.
    """
    heads = len(columns.plane)
    # Words are put in the order of the entries before they are taken apart, 32 tokens at a time.
    there = jnp.where(columns.plane == NONE, planes, columns.plane)
    head = jnp.arange(heads, dtype=jnp.int32)[:, None]
    lane = jnp.full((heads, planes, count), words.shape[-1], jnp.int32)
    lane = lane.at[head, there, columns.entry].set(columns.lane, mode="drop", unique_indices=True)
    if table is None:
        own = words.at[..., lane.reshape(-1)].get(mode="fill", fill_value=0)
    else:
        row = jnp.arange(ROWS, dtype=jnp.int32)[None, None, :, None]
        at = (0, table[..., None, None], row, lane.reshape(1, 1, 1, -1))
        own = words.at[at].get(mode="fill", fill_value=0)
    own = jax.lax.optimization_barrier(own.reshape(*own.shape[:-1], heads, planes, count))
    own = jnp.moveaxis(own, 3, 0)[:, :, :, None]  # [K, B, P, 1, R, planes, E]
    shifts = jnp.asarray(BIT_OF, jnp.uint32).reshape(1, 1, 1, -1, 1, 1)
    entries = functools.reduce(
        jnp.bitwise_or,
        [((own[..., p, :] >> shifts) & jnp.uint32(1)) << jnp.uint32(p) for p in range(planes)],
    )
    return entries.reshape(heads, own.shape[1], -1, count)


def bits_per_token(columns: Sequence[Any]) -> int:
    """Columns of all heads: stored bits of one token."""
    return int(sum(np.count_nonzero(np.asarray(c.plane) != NONE) for c in columns))
