"""The body of the TPU prefill kernel over stored tokens: one head, one tile of query rows.

Steps of a few pages arrive by double-buffered copies. Of each step the blocks of 256 tokens are
unpacked once (`mosaic_tpu_levels`) and meet every run of the tile's rows: logits and weights are
[run, tokens of a step], levels bfloat16. Scales of K multiply columns of the logits, those of V
columns of the weights.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from turboq.codecs.reading import Part
from turboq.numbers.packing import WORD_BITS
from turboq_kernels.decode.mosaic_tpu_layout import PartLayout, ScaleLayout
from turboq_kernels.prefill import mosaic_tpu_levels as levels
from turboq_kernels.prefill import mosaic_tpu_softmax as softmax
from turboq_kernels.prefill.mosaic_tpu_levels import BLOCK, ROWS
from turboq_kernels.prefill.mosaic_tpu_softmax import LANES, LOG2_E, Tiling


@dataclasses.dataclass(frozen=True)
class Step:
    """The tokens of one step; `fold` is the largest of all parts of K and V."""

    rows: int
    fold: int
    units: int

    @property
    def page(self) -> int:
        return self.rows * WORD_BITS

    @property
    def page_rows(self) -> int:
        """Register rows of a page, `fold` word rows each."""
        return self.rows // self.fold

    @property
    def unit_pages(self) -> int:
        """Pages whose words fill the eight rows of a register."""
        return ROWS // self.page_rows

    @property
    def pages(self) -> int:
        return self.units * self.unit_pages

    @property
    def tokens(self) -> int:
        return self.pages * self.page

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """All (unit, h), h the lane block of the part with the largest fold."""
        return tuple((u, h) for u in range(self.units) for h in range(self.fold))

    def page_of(self, entry):
        """Page of the unit that entry i of a block belongs to."""
        return (entry % 16) // 2 // self.page_rows

    def slot_of(self, entry, h: int):
        """Slot within its page of entry i of the blocks h."""
        row = (entry % 16) // 2 % self.page_rows
        return self.rows * (entry // 16 + 16 * (entry % 2)) + row * self.fold + h


@dataclasses.dataclass(frozen=True)
class PartSpec:
    """One part of K or V: which buffers, table entries and columns of q or of the sums it uses."""

    part: Part
    layout: PartLayout
    symmetric: bool
    words: int
    scale: int | None
    offset: int | None
    table: int  # first of the head's entries
    column: int


@dataclasses.dataclass(frozen=True)
class Spec:
    """Everything static about a call."""

    k: tuple[PartSpec, ...]
    v: tuple[PartSpec, ...]
    step: Step
    tiling: Tiling
    scales: tuple[ScaleLayout, ...]
    entries: int  # of the tables of one head, and one more
    pages: int  # entries of a sequence's page table, a multiple of the step's pages
    stride_head: int
    softcap: float | None
    biased: bool

    @property
    def parts(self) -> tuple[PartSpec, ...]:
        return self.k + self.v

    @property
    def extras(self) -> int:
        """Columns of numbers per row: the bias, then sums of q for parts of K with an offset."""
        return int(self.biased) + sum(p.offset is not None for p in self.k)

    def width(self, parts: tuple[PartSpec, ...]) -> int:
        return sum(p.layout.lanes for p in parts)


def kernel(spec: Spec, *refs):
    """Order of refs: table, plan, entries; q, bounds, extras?, words, scales; sums, stats; scratch.

    The plan holds the first step and the number of steps (possibly none) of each (b, tile).
    """
    refs = list(refs)

    def take(n):
        out, refs[:n] = refs[:n], []
        return out

    table, plan, entry_ref = take(3)
    query, bound = take(2)
    extra = take(1)[0] if spec.extras else None
    words, scales = take(len(spec.parts)), take(len(spec.scales))
    sums, stats = take(2)
    word_buffers, scale_buffers = take(len(spec.parts)), take(len(spec.scales))
    tops, totals, moved, semaphores = take(4)

    b, n, tile = (pl.program_id(i) for i in range(3))
    step, tiles = spec.step, spec.tiling
    entry = (b * pl.num_programs(2) + tile) * 2
    first, count = plan[entry], plan[entry + 1]

    def head_pages(i):
        at = b * spec.pages + (first + i) * step.pages
        return [table[at + p] + n * spec.stride_head for p in range(step.pages)]

    def send(i, slot):
        semaphore = semaphores.at[slot]
        for p, at in enumerate(head_pages(i)):
            for part, source, target in zip(spec.parts, words, word_buffers, strict=True):
                held = target.at[slot, p]
                if not part.layout.whole:
                    rows = part.layout.page_rows
                    held = target.at[slot, :, pl.ds(p * rows, rows), :]
                pltpu.make_async_copy(source.at[at], held, semaphore).start()
            for layout, source, target in zip(spec.scales, scales, scale_buffers, strict=True):
                rows = layout.page_rows
                found = source.at[pl.ds(layout.first_row(at), rows)]
                held = target.at[slot, pl.ds(p * rows, rows)]
                pltpu.make_async_copy(found, held, semaphore).start()

    def arrived(slot):
        for buffer in (*word_buffers, *scale_buffers):
            done = buffer.at[slot]  # a wait needs the destination's size only
            pltpu.make_async_copy(done, done, semaphores.at[slot]).wait()

    @pl.when(count > 0)
    def _():
        send(0, 0)

    for ref in (sums, moved):
        ref[...] = jnp.zeros(ref.shape, ref.dtype)
    softmax.clear(tops, totals)
    tables = [entry_ref[n * spec.entries + i] for i in range(spec.entries)]
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, BLOCK), 1)
    slots = [
        (u * step.unit_pages + step.page_of(lane)) * step.page + step.slot_of(lane, h)
        for u, h in step.blocks
    ]
    slots = jnp.concatenate(slots, axis=1)

    def body(i, _):
        slot = i & 1

        @pl.when(i + 1 < count)
        def _():
            send(i + 1, 1 - slot)

        arrived(slot)
        at = head_pages(i)
        rows = [
            _in_order(step, layout, buffer.at[slot], at)
            for layout, buffer in zip(spec.scales, scale_buffers, strict=True)
        ]
        here = slots + (first + i) * step.tokens
        levels_of = [
            _levels(step, part, buffer, slot, tables)
            for part, buffer in zip(spec.parts, word_buffers, strict=True)
        ]

        def logits(r):
            return _logits(spec, r, query, extra, levels_of, rows)

        def add(at, p, keep):
            _add(spec, p, keep, at, levels_of, rows, sums, moved)

        softmax.attend(tiles, logits, here, bound, tops, totals, add)
        return 0

    jax.lax.fori_loop(0, count, body, 0)
    stats[0, 0] = softmax.statistics(tops[...], totals[...])
    for i, part in enumerate(spec.v):
        if part.offset is not None:
            total = jnp.sum(moved[i], axis=1, keepdims=True)
            columns = pl.ds(part.column, part.layout.lanes)
            sums[0, 0, :, columns] = sums[0, 0, :, columns] + total


def _levels(step: Step, part: PartSpec, buffer, slot, tables) -> jax.Array:
    """bfloat16 [tokens, lanes]: the levels of a step, in the first lanes."""
    layout = part.layout
    stride = step.fold // layout.fold
    held = tables[part.table : part.table + levels.entry_count(part.part, part.symmetric)]
    out = []
    for u, h in step.blocks:
        words = []
        for plane in range(layout.bits):
            if layout.whole:
                w = buffer[slot, u, plane]
            else:
                start = ROWS * u * stride + h // layout.fold
                if stride == 1:
                    w = buffer[slot, plane, pl.ds(start, ROWS), :]
                else:  # interpret mode takes no integer beside a stride
                    rows = pl.ds(start, ROWS, stride=stride)
                    w = buffer[pl.ds(slot, 1), pl.ds(plane, 1), rows, :]
                    w = w.reshape(ROWS, layout.lanes)
            w = jax.lax.bitcast_convert_type(w, jnp.int32)
            if h % layout.fold:  # to the first lanes; what others hold is never used
                w = pltpu.roll(w, layout.lanes - h % layout.fold * layout.padded, 1)
            words.append(w)
        out.append(levels.block(part.part, part.symmetric, words, held))
    return jnp.concatenate(out, axis=0)


def _in_order(step: Step, layout: ScaleLayout, buffer, head_pages) -> jax.Array:
    """float32 [1, tokens]: a step's entries of one buffer in the order of its levels."""
    half = jax.lax.broadcasted_iota(jnp.int32, (8, LANES), 0) % 2
    entry = jax.lax.broadcasted_iota(jnp.int32, (8, LANES), 1) + LANES * half
    page_of = step.page_of(entry)
    out = []
    for u, h in step.blocks:
        token = step.slot_of(entry, h)
        word = token // layout.per_word
        found = jnp.zeros((8, LANES), jnp.uint32)
        for i in range(step.unit_pages):
            p = u * step.unit_pages + i
            at = word + layout.first_lane(head_pages[p])
            for row in range(layout.page_rows):
                held = buffer[pl.ds(p * layout.page_rows + row, 1), :]
                held = jnp.broadcast_to(held, (8, LANES))
                picked = jnp.take_along_axis(held, at & (LANES - 1), axis=1)
                here = page_of == i
                if layout.page_rows > 1:
                    here &= at // LANES == row
                found = jnp.where(here, picked, found)
        value = layout.decode(found, token % 2 == 1)
        out += [value[0:1], value[1:2]]
    return jnp.concatenate(out, axis=1)


def _logits(spec: Spec, r: int, query, extra, levels_of, rows) -> jax.Array:
    """[run, tokens] of run r, in units in which the softmax is a power of two."""
    at = pl.ds(r * spec.tiling.run, spec.tiling.run)
    total = None
    column = int(spec.biased)
    for part, values in zip(spec.k, levels_of[: len(spec.k)], strict=True):
        width = part.layout.lanes
        value = softmax.dot_halves(query[0, 0, r, :, pl.ds(part.column, width)], values)
        if part.scale is not None:
            value = value * rows[part.scale]
        if part.offset is not None:
            value = value + rows[part.offset] * extra[0, 0, at, column : column + 1]
            column += 1
        total = value if total is None else total + value
    assert total is not None
    if spec.biased:
        total = total + extra[0, 0, at, 0:1]
    if spec.softcap is not None:
        total = jnp.tanh(total) * (spec.softcap * LOG2_E)
    return total


def _add(spec: Spec, p, keep, at, levels_of, rows, sums, moved) -> None:
    """sums = sums * keep + weights @ levels, for one run of rows."""
    for i, (part, values) in enumerate(zip(spec.v, levels_of[len(spec.k) :], strict=True)):
        weights = p if part.scale is None else p * rows[part.scale]
        fresh = jax.lax.dot_general(
            weights.astype(jnp.bfloat16), values, (((1,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        width = part.layout.lanes
        columns = pl.ds(part.column, width)
        sums[0, 0, at, columns] = sums[0, 0, at, columns] * softmax.widen(keep, width) + fresh
        if part.offset is not None:
            offset = softmax.fold_lanes(jnp.add, p * rows[part.offset])
            moved[i, at, :] = moved[i, at, :] * keep + offset
