"""What `mosaic_tpu_append` does with a token of every sequence, within its one launch.

The grid goes through two kinds of steps: every group of joined heads (every head, where they are
apart) turns the vectors of all sequences into coordinates, by one product; then lanes search codes,
some vectors at a time. The first step also asks for the tokens' words, makes vectors of the tokens
and puts these themselves among the sinks and the recent ones; the last ORs bits into the words.

Vectors of a sequence are numbered: keys of all heads, values of all heads, up to a power of two. A
lane has the vector l mod V of those that are searched at a time, all heads of some sequences or
some heads of one. A bit of a column is bit `plane` of an entry: a head's entries come to its
columns by a product with ones and zeros, and its columns, which follow each other in lanes
(`turboq.cache.columns.lay_out`), to their place by one rotation.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from turboq.cache.columns import NONE
from turboq.cache.layer import KVLayer
from turboq.numbers import window_gain
from turboq.numbers.packing import PAGE, ROWS
from turboq.numbers.rope import Rope
from turboq_kernels.columns import mosaic_tpu_vectors as vectors
from turboq_kernels.encode import mosaic_tpu_search as search
from turboq_kernels.encode.mosaic_tpu_exact import Token, finish, put_exact, span, transfer
from turboq_kernels.encode.mosaic_tpu_search import LANES, SUBLANES, Search

_NOWHERE = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """What is static: `heads` K, `dims` (D, E), `joined` heads of a group (0: apart), `batch` B.

    `lanes` are those of the words that are read and written of a sequence, `wide` those of a head's
    columns, wherever they begin in a tile.
    """

    search: Search
    heads: int
    dims: tuple[int, int]
    joined: int
    batch: int
    gained: bool
    lanes: int
    wide: int
    rope: Rope | None
    block: int

    @property
    def groups(self) -> int:
        return self.heads // self.joined if self.joined else 2 * self.heads

    @property
    def channels(self) -> tuple[int, int]:
        """Of the vectors of a group: of keys and of values."""
        k, v = ((self.joined or 1) * dim for dim in self.dims)
        return (k, v) if self.joined else (max(k, v), 0)

    @property
    def room(self) -> int:
        """Vectors of a sequence with those added: a power of two, whole registers."""
        return max(SUBLANES, 1 << (2 * self.heads - 1).bit_length())

    @property
    def parts(self) -> int:
        """Searches of a sequence."""
        return max(1, self.room // self.search.vectors)

    @property
    def each(self) -> int:
        """Sequences of a search."""
        return max(1, self.search.vectors // self.room)

    @property
    def sequences(self) -> int:
        """With those added: whole registers, whole searches."""
        many = max(SUBLANES, self.each)
        return -(-self.batch // many) * many

    @property
    def searches(self) -> int:
        return self.parts * -(-self.batch // self.each)


def scratch(s: Step, inputs: dict[str, Any], exact: dict[str, Any]) -> dict[str, Any]:
    """Memory of the kernel."""
    gains, found = inputs["sides"]["k"]["gains"], s.sequences * s.room // s.search.vectors
    rows = max(x.shape[1] for x in inputs["turns"].values())
    out: dict[str, Any] = s.search.scratch() | {
        "gains": pltpu.VMEM((1 if gains is None else gains.shape[1], LANES), jnp.float32),
        "keys": pltpu.VMEM((s.heads, s.sequences, s.dims[0]), jnp.float32),
        "vectors": pltpu.VMEM((s.groups, s.sequences, sum(s.channels)), jnp.float32),
        # Vectors begin at any row of theirs, and have all that a search has.
        "turned": pltpu.VMEM((s.groups, rows + s.search.coded, s.sequences), jnp.float32),
        "codes": pltpu.VMEM((found, s.search.vectors, s.search.coded), jnp.float32),
        "index": pltpu.VMEM((found, s.search.vectors, LANES), jnp.float32),
        "wide": pltpu.VMEM((s.sequences, s.wide), jnp.int32),
        "bits": pltpu.VMEM((s.sequences, s.lanes + s.wide), jnp.int32),
        "pages": pltpu.VMEM((s.batch, ROWS, s.lanes), jnp.uint32),
        "place": pltpu.SMEM((2, 2 * s.heads), jnp.int32),
        "read": pltpu.SemaphoreType.DMA((s.batch,)),
        "in": pltpu.SemaphoreType.DMA((s.batch,)),
        "out": pltpu.SemaphoreType.DMA,
    }
    for side, dim in zip("kv", s.dims, strict=True):
        out[side] = {
            "tokens": pltpu.VMEM((s.batch, s.heads, dim), jnp.float32),
            "exact": {
                name: pltpu.VMEM((s.batch, s.heads, _tokens(name, x.shape[2]), dim), x.dtype)
                for name, x in exact[side].items()
            },
        }
    return out


def _tokens(name: str, count: int) -> int:
    return span(count) if name == "recent" else count


def vmem_bytes(s: Step, turn: tuple[int, int], layer: KVLayer) -> int:
    """Of scratch and (twice) operands; `turn` has rows and channels of a group's matrix."""
    one, lanes = s.search.coded * LANES, -(-s.sequences // LANES) * LANES
    numbers = (6 + 2 * (s.search.memory + 1)) * one + s.search.blocks * (LANES << s.search.memory)
    # int8 twice, then as float32 and bfloat16; of heads apart float32 of both sides twice.
    numbers += s.groups * (turn[0] + s.search.coded) * lanes
    numbers += (2 if s.joined else 4) * turn[0] * turn[1]
    numbers += s.sequences * (s.groups * sum(s.channels) + 2 * s.heads * s.dims[0])
    numbers += s.sequences * (s.room * (s.search.coded + LANES) + s.lanes + 2 * s.wide)
    numbers += s.batch * ROWS * s.lanes
    numbers += 2 * 2 * s.heads * ((s.search.memory + 4) * s.search.coded + 3 * s.wide)
    exact = span(layer.ring) + layer.policy.sinks if layer.ring else layer.policy.sinks
    numbers += s.batch * s.heads * (exact + 3) * sum(s.dims)
    return 4 * numbers


def kernel(*refs, s: Step, trees) -> None:
    refs = list(refs)

    def take(tree):
        out, refs[: tree.num_leaves] = refs[: tree.num_leaves], []
        return jax.tree.unflatten(tree, out)

    scalars, x, _, kept, room = (take(tree) for tree in trees)
    i = pl.program_id(0)
    words = kept["words"]

    def token(b) -> Token:
        start = scalars["lengths"][b]
        slot = start if scalars["first"] is None else start - scalars["first"][b]
        table = scalars["table"]
        pages = words.shape[1] if table is None else table.shape[1]
        page = jnp.clip(slot // PAGE, 0, pages - 1)
        at = (b, page) if table is None else (0, jnp.clip(table[b, page], 0, words.shape[1] - 1))
        return Token(
            row=b, start=start, fits=scalars["fitting"][b] > 0, page=at, slot=slot - page * PAGE
        )

    def each(do):
        def one(b, _):
            do(b, token(b))
            return 0

        jax.lax.fori_loop(0, s.batch, one, 0)

    # The words' first lane: a whole tile, from where all that are copied exist.
    lane = pl.multiple_of(
        jnp.minimum(scalars["lane"][0], words.shape[3] - s.lanes) // LANES * LANES, LANES
    )

    def copied(b, at: Token, out: bool):
        there = words.at[*at.page, :, pl.ds(lane, s.lanes)]
        own = {"in": room["read"], "out": room["out"]}
        return transfer(there, room["pages"].at[b], own, b, out)

    def read(b, at: Token, wait: bool):
        @pl.when(at.fits)
        def _():
            copy = copied(b, at, False)
            copy.wait() if wait else copy.start()

    @pl.when(i == 0)
    def _():
        each(lambda b, at: read(b, at, False))
        _find_places(x["joint"], room["place"], s)
        for name in ("wide", "bits", "keys", "vectors"):
            room[name][...] = jnp.zeros_like(room[name])
        for side in "kv":
            room[side]["tokens"][...] = x[side][...].astype(jnp.float32)
        put_exact(kept["exact"], room, each)
        vectors.make(x, room, s)

    @pl.when(i < s.groups)
    def _():
        vectors.turn(x, room, i, s)

    @pl.when(i >= s.groups)
    def _():
        _search(x, room, i - s.groups, s)

    @pl.when(i == s.groups + s.searches - 1)
    def _():
        _make_bits(x["sides"], room, lane, s)
        ends = [scalars["lane"][n] - lane for n in (0, 2)]  # of the layer's lanes

        def put(b, at: Token):
            read(b, at, True)

            @pl.when(at.fits)
            def _():
                own = room["bits"][pl.ds(b, 1), : s.lanes]
                j = at.slot // ROWS
                bit = (j % 4 * 8 + j // 4).astype(jnp.uint32)
                row, here = (
                    jax.lax.broadcasted_iota(jnp.int32, (ROWS, s.lanes), i) for i in (0, 1)
                )
                mine = (row == at.slot % ROWS) & (here >= ends[0]) & (here < ends[1])
                # A page may hold what was there before.
                new = own.astype(jnp.uint32) << bit
                held = room["pages"][b]
                room["pages"][b] = jnp.where(mine, held & ~(jnp.uint32(1) << bit) | new, held)
                copied(b, at, True).start()

        each(put)
        each(lambda b, at: pl.when(at.fits)(lambda: finish([copied(b, at, True)])))


def _find_places(held, place, s: Step) -> None:
    """Of every vector: its first row among those of its group, and how many it has."""
    whole = s.joined * s.dims[0]
    for n in range(2 * s.heads):
        side, head = divmod(n, s.heads)
        if not s.joined:
            place[0, n], place[1, n] = jnp.int32(0), jnp.int32(s.dims[side])
            continue
        group, own = divmod(head, s.joined)
        first = side * whole + own * s.dims[side]
        at = held["coded"][group : group + 1]
        place[0, n] = jnp.sum((at < first).astype(jnp.int32))
        place[1, n] = jnp.sum(((at >= first) & (at < first + s.dims[side])).astype(jnp.int32))


def _search(x, room, i, s: Step) -> None:
    """Codes of the vectors of one search."""
    # All sequences of one part, then the next: rows are made once for each.
    count = s.searches // s.parts
    part, n = jax.lax.div(i, count), jax.lax.rem(i, count)
    vector = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1) % s.search.vectors
    number = (part * s.search.vectors + vector) % s.room
    sequence = n * s.each + vector // s.room

    def rows_of(name, j=None):
        """[C, 128] of both sides."""
        out = []
        for side, first, dim in zip("kv", (0, s.heads), s.dims, strict=True):
            own = x["sides"][side][name]
            own = own[...] if j is None else own[j]
            found = search.spread(own, _is(number - first, s.heads))
            if found.shape[0] == dim < s.search.coded:
                found = jnp.concatenate([found, jnp.zeros((s.search.coded - dim, LANES))], axis=0)
            out.append(found)
        return out[0] + out[1]

    @pl.when(n == 0)
    def _():
        taps = [rows_of("taps", j) for j in range(s.search.memory + 1)]
        step, last, weights = (rows_of(name) for name in ("step", "last", "weights"))
        search.put_rows(room["rows"], step, last, weights, taps)
        if s.gained:
            room["gains"][...] = rows_of("gains")

    coordinate = jax.lax.broadcasted_iota(jnp.int32, (s.search.coded, s.sequences), 0)

    def of_vector(v, y):
        own = jnp.minimum(part * s.search.vectors + v, 2 * s.heads - 1)
        group = own if not s.joined else jax.lax.div(jax.lax.rem(own, s.heads), s.joined)
        first = pl.multiple_of(room["place"][0, own], SUBLANES)
        rows = room["turned"][group, pl.ds(first, s.search.coded), :]
        rows = jnp.where(coordinate < room["place"][1, own], rows, 0.0)
        there = _is(sequence, s.sequences) * (number == own).astype(jnp.float32)
        return y + jax.lax.dot_general(
            rows, there, (((1,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )  # fmt: skip

    y = jax.lax.fori_loop(
        0, min(s.search.vectors, 2 * s.heads), of_vector,
        jnp.zeros((s.search.coded, LANES), jnp.float32),
    )  # fmt: skip
    gains = room["gains"][...] if s.gained else None
    if gains is not None:
        far = window_gain.FAR * jnp.max(gains, axis=0, keepdims=True)
        y = jnp.clip(y, -far, far)
    codes, index = search.coded(y, gains, room, s.search)
    lanes = _is(vector, s.search.vectors)
    slot = n * s.parts + part
    room["codes"][slot] = search.gathered(codes, lanes)
    if s.gained:
        # All lanes of a vector hold its gain's index.
        tried = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1) < s.search.vectors
        found = search.gathered(jnp.where(tried, index, 0), lanes)[:, :1]
        room["index"][slot] = jnp.broadcast_to(found, (s.search.vectors, LANES))


def _is(number, count: int) -> Float[Array, "n 128"]:
    """1 where lane l has this number, of `count` in sublanes."""
    row = jax.lax.broadcasted_iota(jnp.int32, (count, LANES), 0)
    return (row == number).astype(jnp.float32)


def _make_bits(sides, room, lane, s: Step) -> None:
    """Columns of all heads of all sequences, 0 or 1, from the words' first lane on."""

    def of(name, number):
        """[B', ..] of one vector of every sequence."""
        ref, out = room[name], []
        for b in range(s.sequences):
            place = b * s.room + number
            slot, row = jax.lax.div(place, s.search.vectors), jax.lax.rem(place, s.search.vectors)
            out.append(ref[slot, pl.ds(row, 1), :])
        return jnp.concatenate(out, axis=0)

    for which, side in enumerate("kv"):
        columns, dim = sides[side], s.dims[which]
        count = columns["plane"].shape[1]
        entries = jax.lax.broadcasted_iota(jnp.int32, (s.search.coded, count), 0)
        column = jax.lax.broadcasted_iota(jnp.int32, (1, count), 1)

        def head(h, _, which=which, columns=columns, dim=dim, entries=entries, column=column):
            entry, plane, at = (columns[n][pl.ds(h, 1), :] for n in ("entry", "plane", "lane"))
            number = which * s.heads + h
            taken = (entries == entry).astype(jnp.float32).astype(jnp.bfloat16)
            value = jax.lax.dot_general(
                of("codes", number).astype(jnp.bfloat16), taken, (((1,), (0,)), ((), ())),
                preferred_element_type=jnp.float32,
            )  # fmt: skip
            there, rest = plane != NONE, entry >= dim
            if s.gained:
                value = jnp.where(rest, of("index", number)[:, :1], value)
            bit = value.astype(jnp.int32) >> jnp.maximum(plane, 0) & 1
            for kind in (there & rest, there & ~rest) if s.gained else (there,):
                first = jnp.min(jnp.where(kind, at - column, _NOWHERE))
                first = jnp.where(first == _NOWHERE, 0, first - lane)
                room["wide"][:, : bit.shape[1]] = jnp.where(kind, bit, 0)
                tile = pl.multiple_of(first // LANES * LANES, LANES)
                moved = pltpu.roll(room["wide"][...], first - tile, 1)
                room["bits"][:, pl.ds(tile, s.wide)] += moved
            return 0

        jax.lax.fori_loop(0, s.heads, head, 0)
