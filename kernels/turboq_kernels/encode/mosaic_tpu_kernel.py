"""The bodies of the TPU encode kernels; see `mosaic_tpu`.

Every sequence's first page may hold earlier tokens, whose bits are read back and kept. Pages are
written by copies of their own, so that pages without a new token are never written.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int, UInt32

from turboq.numbers.packing import WORD_BITS
from turboq_kernels.encode import mosaic_tpu_codes as codes
from turboq_kernels.encode.mosaic_tpu_codes import LANES, CodeSpec
from turboq_kernels.encode.mosaic_tpu_pages import SUBLANES, FieldSpec, merge


@dataclasses.dataclass(frozen=True)
class Spec:
    """Everything static about a call."""

    codes: CodeSpec
    fields: tuple[FieldSpec, ...]
    page: int  # tokens
    stride_head: int

    @property
    def rows(self) -> int:
        return self.page // WORD_BITS

    @property
    def planes(self) -> int:
        """Registers of bits: those of the codes, then that of the signs."""
        return self.codes.bits + (self.codes.writing.signs is not None)

    def first_plane(self, field: int) -> int:
        return 0 if field < len(self.codes.writing.parts) else self.codes.bits


class _Refs:
    """A kernel's references in the order in which `pallas_call` hands them over.

    `rest` are those of its own.
    """

    def __init__(self, spec: Spec, refs):
        refs, fields = list(refs), len(spec.fields)

        def take(n):
            out, refs[:n] = refs[:n], []
            return out

        self.starts, self.counts, self.table, self.x = take(4)
        self.held = take(spec.codes.held)
        take(fields)  # the words as given: the same memory as the outputs
        self.words = take(fields)
        self.numbers = take(1)[0] if spec.codes.writing.rows else None
        self.pages = take(fields)
        self.rest = refs


def _copy(source, target, semaphore):
    return pltpu.make_async_copy(source, target, semaphore)


def chunk_kernel(spec: Spec, tile: int, *refs):
    """Grid (heads, sequences, tiles): x[r] is slot r of the pages of this tile.

    While a tile is encoded the pages of the one before are on their way out.
    """
    r = _Refs(spec, refs)
    *earlier, gathered, pending, out_done, in_done = r.rest
    n, b, i = (pl.program_id(axis) for axis in range(3))
    sequences, tiles = pl.num_programs(1), pl.num_programs(2)
    step, per_tile = b * tiles + i, tile // spec.page
    slot = step & 1
    low = r.starts[b] & (spec.page - 1)
    high = low + r.counts[b]
    begin, shift = i * tile, spec.page.bit_length() - 1

    def head_page(q):
        return r.table[(b * tiles + i) * per_tile + q] + n * spec.stride_head

    def settle(slot):
        def wait(q, _):
            for buffer in r.pages:
                done = buffer.at[slot, q]  # a wait needs the size only
                _copy(done, done, out_done.at[slot]).wait()
            return 0

        jax.lax.fori_loop(0, pending[slot], wait, 0)
        pending[slot] = 0

    @pl.when(step == 0)
    def _():
        pending[0] = 0
        pending[1] = 0

    @pl.when((r.counts[b] > 0) & (begin < high))
    def _():
        reads = (i == 0) & (low > 0)

        def reading():
            return [
                _copy(words.at[head_page(0)], old, in_done)
                for words, old in zip(r.words, earlier, strict=True)
            ]

        @pl.when(reads)
        def _():
            for copy in reading():
                copy.start()

        planes, numbers = encoded(spec, r.held, r.x[...])
        if r.numbers is not None:
            r.numbers[...] = jnp.concatenate([_along_lanes(x) for x in numbers], axis=0)

        @pl.when(reads)
        def _():
            for copy in reading():
                copy.wait()

        settle(slot)
        for q in range(per_tile):
            for p, plane in enumerate(planes):
                _keep(gathered, q, p, _gather(spec, plane[q * spec.page : (q + 1) * spec.page]))
        written = jnp.minimum((high - begin + spec.page - 1) >> shift, per_tile)

        def put(q, _):
            first, bits = begin + q * spec.page, gathered.at[q]
            for at, field in enumerate(spec.fields):
                plane, old = spec.first_plane(at), earlier[at][...]
                r.pages[at][slot, q] = merge(field, bits, plane, old, low - first, high - first)
                target = r.words[at].at[head_page(q)]
                _copy(r.pages[at].at[slot, q], target, out_done.at[slot]).start()
            return 0

        jax.lax.fori_loop(0, written, put, 0)
        pending[slot] = written

    @pl.when(step == sequences * tiles - 1)
    def _():
        settle(0)
        settle(1)


def append_kernel(spec: Spec, sequences: int, tokens: int, *refs):
    """Grid (heads, groups of sequences): rows of x are the tokens of one sequence after another."""
    r = _Refs(spec, refs)
    gathered, code, out_done, in_done = r.rest
    n, group = pl.program_id(0), pl.program_id(1)
    spans, sublane = append_spans(tokens), sublanes(spec)

    def facts(i):
        """Of page i % spans of sequence i / spans: both, its first and last new slot, any new."""
        s, k = (i >> 1, i & 1) if spans == 2 else (i, 0)
        b = group * sequences + s
        low = (r.starts[b] & (spec.page - 1)) - k * spec.page
        high = low + r.counts[b]
        return s, k, low, high, (high > 0) & (high > low)

    def copies(i, out):
        s, k, *_ = facts(i)
        head_page = r.table[(group * sequences + s) * spans + k] + n * spec.stride_head
        for words, buffer in zip(r.words, r.pages, strict=True):
            there, here = words.at[head_page], buffer.at[s, k]
            yield _copy(here, there, out_done) if out else _copy(there, here, in_done.at[s])

    def read(i, wait):
        low, some = facts(i)[2], facts(i)[-1]

        @pl.when(some & (low > 0))  # earlier tokens: in a sequence's first page at most
        def _():
            for copy in copies(i, False):
                copy.wait() if wait else copy.start()

    def each(do):
        def one(i, _):
            do(i)
            return 0

        jax.lax.fori_loop(0, sequences * spans, one, 0)

    each(lambda i: read(i, False))
    planes, numbers = encoded(spec, r.held, r.x[...])
    code[...] = code_words(planes)
    if r.numbers is not None:
        lane = jax.lax.broadcasted_iota(jnp.int32, (r.x.shape[0], LANES), 1)
        out = jnp.broadcast_to(numbers[0], lane.shape)
        for k, number in enumerate(numbers[1:], 1):
            out = jnp.where(lane == k, number, out)
        r.numbers[...] = out

    def put(i):
        s, k, low, high, some = facts(i)
        read(i, True)

        @pl.when(some)
        def _():
            pages = [buffer.at[s, k] for buffer in r.pages]
            put_page(spec, code, gathered, pages, s * tokens, tokens, low, high, sublane)
            for copy in copies(i, True):
                copy.start()

    each(put)

    def settle(i):
        @pl.when(facts(i)[-1])
        def _():
            for copy in copies(i, True):
                copy.wait()

    each(settle)


def append_spans(tokens: int) -> int:
    """Pages that a sequence's tokens may lie in."""
    return 1 if tokens == 1 else 2


def encoded(spec: Spec, held, x):
    """Bit planes, those of the signs last, and row numbers (`mosaic_tpu_codes.encode`)."""
    planes, signs, numbers = codes.encode(spec.codes, held, x)
    return ([*planes, signs] if signs is not None else planes), numbers


def code_words(planes) -> UInt32[Array, "R lanes"]:
    """Plane p as bit p."""
    word = jnp.zeros(planes[0].shape, jnp.uint32)
    for p, plane in enumerate(planes):
        word = word | jnp.where(plane, jnp.uint32(1 << p), jnp.uint32(0))
    return word


def sublanes(spec: Spec) -> Int[Array, "8 lanes"]:
    """For `put_page`: made once, not for every page."""
    return jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, spec.codes.lanes), 0)


def put_page(spec: Spec, code, gathered, pages, first, tokens: int, low, high, sublane) -> None:
    """Rows first.. of `code` into slots low..high - 1 of one page, whose `pages` hold old words."""

    def add(t, words):
        slot = low + t  # outside the page or past the count: `merge` drops it
        here = sublane == (slot & (spec.rows - 1))
        bit = ((slot >> (spec.rows.bit_length() - 1)) & 31).astype(jnp.uint32)
        row = code[pl.ds(first + t, 1), :]
        fresh = [((row >> p) & jnp.uint32(1)) << bit for p in range(spec.planes)]
        return tuple(
            w | jnp.where(here, f, jnp.uint32(0)) for w, f in zip(words, fresh, strict=True)
        )

    none = jnp.zeros(sublane.shape, jnp.uint32)
    for p, word in enumerate(jax.lax.fori_loop(0, tokens, add, (none,) * spec.planes)):
        _keep(gathered, 0, p, word)
    for at, (field, page) in enumerate(zip(spec.fields, pages, strict=True)):
        page[...] = merge(field, gathered.at[0], spec.first_plane(at), page[...], low, high)


def _gather(spec: Spec, plane):
    """Bits of one page [page, lanes] in one register: sublane s is slot 8 v + s of register v."""
    shape = (spec.page // SUBLANES, SUBLANES, spec.codes.lanes)
    register = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    sublane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    bit = jnp.int32(1) << (register * (SUBLANES // spec.rows) + sublane // spec.rows)
    word = jnp.sum(jnp.where(plane.reshape(shape), bit, 0), axis=0)  # disjoint bits: their OR
    return jax.lax.bitcast_convert_type(word, jnp.uint32)


def _keep(gathered, page, plane: int, word) -> None:
    """A strided load needs 128 lanes: those beyond lie in registers of their own."""
    for block in range(word.shape[1] // LANES):
        gathered[page, plane, block] = word[:, block * LANES : (block + 1) * LANES]


def _along_lanes(x):
    """[R, 1] -> [R / 128, 128]."""
    shape = (x.shape[0] // LANES, LANES, LANES)
    diagonal = jax.lax.broadcasted_iota(jnp.int32, shape, 1) == jax.lax.broadcasted_iota(
        jnp.int32, shape, 2
    )
    wide = jnp.broadcast_to(x, (x.shape[0], LANES)).reshape(shape)
    return jnp.sum(jnp.where(diagonal, wide, 0.0), axis=1)
