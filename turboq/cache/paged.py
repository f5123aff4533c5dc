"""The packed cache of one layer over a pool of pages that sequences share: arrays of JAX.

Per head group, with N heads, the buffers are those of `turboq.cache.contiguous` with pages outside:

    packed field     uint32 [pages, N, bits, page / 32, width]           (folded: `numbers.packing`)
    raw field        dtype  [pages, N, page, width]   (per block: page / block; `numbers.half`)
    exact sinks      dtype  [rows, N, sinks, D]
    exact recent     dtype  [rows, N, ring, D]

`cache.pager.Pager` decides on the host which page and row belongs to which sequence; all layers
of a model share one pager. A step is

    step = pager.plan(names, counts)                       # host: pages, copies
    caches = [copy(cache, step) for cache in caches]       # copy-on-write, once per layer
    where = locate(step)
    cache, tail = write(layer, cache, where, k, v)         # per layer, jitted
    out = turboq_kernels.cache_attention(q, layer, view(cache, where), tail, q_positions=...)

A page needs no clearing: what lies behind the tokens of its sequence is dropped when it is written.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from turboq.cache import contiguous as caches
from turboq.cache import joint, overflow
from turboq.cache.contiguous import GroupBuffers, Tail
from turboq.cache.layer import KVLayer
from turboq.cache.pager import PoolReport, Step
from turboq.cache.simulate import check_heads
from turboq.codecs.base import Arrays, Codec, Stored
from turboq.errors import TurboqError
from turboq.numbers import half, packing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedCache:
    """Pool buffers of one layer.

    `overflow[row]` tokens of the sequence in that row were written behind its pages: they are not
    stored, and what is computed from them is wrong (`turboq.cache.overflow.check`).
    """

    groups: tuple[GroupBuffers, ...]
    overflow: Any  # int32 [rows]
    page: int = dataclasses.field(metadata={"static": True})
    pool: int = dataclasses.field(default=0, metadata={"static": True})  # which of the pager's

    @property
    def nbytes(self) -> int:
        """Bytes of the whole pool, free pages and rows included."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.groups))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Where:
    """A `turboq.cache.pager.Step` on the device: where B sequences write and read."""

    tables: tuple[Any, ...]  # int32 [B, P], of each pool
    rows: Any  # int32 [B]
    starts: Any  # int32 [B]
    counts: Any  # int32 [B]
    room: Any  # int32 [B], slots of the sequence's pages

    @property
    def table(self) -> Any:
        """Of the first pool."""
        return self.tables[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedView:
    """Some sequences of a pool, as attention reads them: the pool's own buffers, and which rows."""

    groups: tuple[GroupBuffers, ...]
    table: Any  # int32 [B, P]
    rows: Any  # int32 [B], of the exact buffers
    lengths: Any  # int32 [B]
    page: int = dataclasses.field(metadata={"static": True})

    def own(self) -> tuple[GroupBuffers, ...]:
        """The groups with the exact buffers of these sequences only, [B, N, tokens, D]."""
        return _exact_of(self.groups, self.rows)

    @property
    def first(self) -> int:
        """Position of slot 0: a page table counts from the first token, whatever was given up."""
        return 0


def init(
    layer: KVLayer, *, pages: int, rows: int, page: int = packing.PAGE, pool: int = 0,
    float16_bits: bool | None = None,
) -> PagedCache:  # fmt: skip
    """Empty buffers for `pages` pages and `rows` sequences; `pool` of the pager's has them.

    Args:
      float16_bits: float16 numbers lie there as their bits, uint16 (`turboq.numbers.half`), which
        kernels on a TPU read and write in place; None: on a TPU.

    Raises:
      ValueError: a count that is not positive, an unknown page size, or one that a codec's blocks
        do not divide.
    """
    if pages < 1 or rows < 1:
        raise ValueError(f"{pages=} and {rows=} must be at least 1")
    joint.refuse(layer, "turboq.cache.paged")
    if page not in packing.PAGE_ROWS:
        raise ValueError(f"{page=} must be one of {tuple(packing.PAGE_ROWS)}")
    if page % layer.block:
        raise ValueError(
            f"{page=} must be a multiple of the layer's blocks of {layer.block} tokens"
        )

    as_bits = jax.default_backend() == "tpu" if float16_bits is None else float16_bits

    def kind(name: str) -> Any:
        return jnp.uint16 if as_bits and name == "float16" else jnp.dtype(name)

    def stored(codec: Codec, heads: int) -> Stored:
        return {
            f.name: jnp.zeros(
                (pages, heads, *packing.kept_shape(f.bits, f.width, packing.PAGE_ROWS[page])),
                jnp.uint32,
            )
            if f.packed
            else jnp.zeros(
                (pages, heads, page // codec.block if f.per_block else page, f.width),
                kind(f.dtype),
            )
            for f in codec.fields
        }

    def exact(codec: Codec, heads: int, tokens: int) -> Array:
        return jnp.zeros((rows, heads, tokens, codec.dim), jnp.dtype(layer.policy.exact_dtype))

    return PagedCache(
        groups=tuple(
            GroupBuffers(
                k=stored(g.k, len(g.heads)),
                v=stored(g.v, len(g.heads)),
                k_sinks=exact(g.k, len(g.heads), layer.policy.sinks),
                v_sinks=exact(g.v, len(g.heads), layer.policy.sinks),
                k_recent=exact(g.k, len(g.heads), layer.ring),
                v_recent=exact(g.v, len(g.heads), layer.ring),
            )
            for g in layer.groups
        ),
        overflow=jnp.zeros((rows,), jnp.int32),
        page=page,
        pool=pool,
    )


def locate(step: Step) -> Where:
    """The step's arrays on the device."""
    arrays = (step.rows, step.starts, step.counts, step.room)
    rows, starts, counts, room = (jnp.asarray(x, jnp.int32) for x in arrays)
    tables = tuple(jnp.asarray(table, jnp.int32) for table in step.tables)
    return Where(tables=tables, rows=rows, starts=starts, counts=counts, room=room)


def copy(cache: PagedCache, step: Step) -> PagedCache:
    """The copies that a step owes (copy-on-write pages, rows of forks); often none."""
    copies = step.copies[cache.pool]
    if not len(copies) and not len(step.rows_copied):
        return cache
    return _copy(cache, *padded(copies), *padded(step.rows_copied))


@jax.jit
def _copy(cache: PagedCache, page_from, page_to, row_from, row_to) -> PagedCache:
    def pages(x):
        return x.at[page_to].set(x[page_from], mode="drop")

    def rows(x):
        return x.at[row_to].set(x[row_from], mode="drop")

    groups = tuple(
        GroupBuffers(
            k=jax.tree.map(pages, g.k),
            v=jax.tree.map(pages, g.v),
            k_sinks=rows(g.k_sinks),
            v_sinks=rows(g.v_sinks),
            k_recent=rows(g.k_recent),
            v_recent=rows(g.v_recent),
        )
        for g in cache.groups
    )
    return dataclasses.replace(cache, groups=groups, overflow=rows(cache.overflow))


def padded(copies: np.ndarray) -> tuple[Array, Array]:
    """(from, to) of a power-of-two length, so that few are compiled; the padding goes nowhere."""
    size = 1 << max(len(copies) - 1, 0).bit_length()
    out = np.full((size, 2), (0, np.iinfo(np.int32).max), np.int32)
    out[: len(copies)] = copies
    return jnp.asarray(out[:, 0]), jnp.asarray(out[:, 1])


# Encodes x [B, N, T, D] into the pages table [B, P] of a pool, from slots positions[:, 0] on.
PoolStore = Callable[[int, Any, Codec, Arrays, Stored, Any, Any, Any], Stored]
# Writes one token [B, 1, K, D] of every sequence, and all that a pool keeps of it.
Append = Callable[[KVLayer, PagedCache, Where, Any, Any], PagedCache]


def check_room(where: Where) -> None:
    """Refuses, outside jit, tokens that the pages of `where` do not hold.

    Raises:
      TurboqError: a sequence would outgrow its pages.
    """
    found = [overflow.known(x) for x in (where.starts, where.counts, where.room)]
    if any(x is None for x in found):
        return
    starts, counts, room = (np.asarray(x) for x in found)
    over = np.flatnonzero(starts + counts > room)
    if len(over):
        b = over[0]
        raise TurboqError(
            f"{starts[b]} + {counts[b]} tokens do not fit the {room[b]} slots of their pages: plan"
            " the step with Pager.plan"
        )


def write(
    layer: KVLayer,
    cache: PagedCache,
    where: Where,
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K E"],
    store: PoolStore | None = None,
    append: Append | None = None,
) -> tuple[PagedCache, Tail]:
    """Encodes and stores the next T tokens of B sequences, the first where.counts[b] being real.

    As `cache.contiguous.write`: equal bytes in every page, whatever the chunks. Pages must be the
    sequences' own from their first new token on, which `Pager.plan` and `copy` see to. Tokens past
    a sequence's pages (a compiled loop that goes on after its step) are not stored but counted in
    `overflow`. `store` encodes and writes (default: XLA, through the codec's own `encode`);
    `append` writes one token whole, exact ones and counts included.

    Raises:
      TurboqError: outside jit, tokens that do not fit.
    """
    check_room(where)
    if append is not None:
        return _append(layer, cache, where, k, v, append)
    return _write(layer, cache, where, k, v, store)


@functools.partial(jax.jit, static_argnames=("append",))
def _append(layer: KVLayer, cache: PagedCache, where: Where, k, v, append: Append):
    check_heads(layer, k.shape[2])
    new = append(layer, cache, where, k, v)
    lengths = jnp.minimum(where.starts + where.counts, where.room)
    return new, _newest(layer, new, where.rows, lengths, k, v)


def _newest(layer: KVLayer, cache: PagedCache, rows, lengths: Int[Array, "B"], k, v) -> Tail:
    """The tail of one token that is written: the ring holds all that its query may see."""
    if not layer.ring:
        return Tail(k=k[:, :0], v=v[:, :0], positions=lengths[:, None][:, :0])
    ring_k, ring_v = caches.ring_of(layer, _exact_of(cache.groups, rows))
    positions = caches.ring_positions(lengths, layer.ring)
    return Tail(k=ring_k, v=ring_v, positions=positions)


@functools.partial(jax.jit, static_argnames=("store",))
def _write(layer: KVLayer, cache: PagedCache, where: Where, k, v, store: PoolStore | None):
    check_heads(layer, k.shape[2])
    starts = jnp.minimum(where.starts, where.room)  # behind an overflow: where it began
    steps = jnp.arange(k.shape[1], dtype=jnp.int32)[None, :]
    positions = starts[:, None] + steps
    fitting, lost = overflow.split(starts, where.counts, where.room)
    valid = steps < fitting[:, None]
    into_pages = functools.partial(store or _store, cache.page, where.tables[cache.pool])
    # One token goes to its row at once; of several the rows are taken out and put back.
    one = k.shape[1] == 1 and layer.block == 1
    rows = where.rows if one else None
    old = cache.groups if one else _exact_of(cache.groups, where.rows)
    new = tuple(
        caches.write_group(
            layer, g, buffers, k, v, starts, positions, valid, fitting, into_pages, rows
        )
        for g, buffers in zip(layer.groups, old, strict=True)
    )
    if one:
        held = dataclasses.replace(cache, groups=new)
        tail = _newest(layer, held, where.rows, starts + fitting, k, v)
    else:
        both = (old, starts), (new, starts + fitting)
        tail = caches.tail_of(layer, *both, k, v, positions, valid)
    groups = (
        new
        if one
        else tuple(
            GroupBuffers(
                k=n.k,
                v=n.v,
                k_sinks=o.k_sinks.at[where.rows].set(n.k_sinks),
                v_sinks=o.v_sinks.at[where.rows].set(n.v_sinks),
                k_recent=o.k_recent.at[where.rows].set(n.k_recent),
                v_recent=o.v_recent.at[where.rows].set(n.v_recent),
            )
            for n, o in zip(new, cache.groups, strict=True)
        )
    )
    # A row begins anew with its sequence.
    before = jnp.where(starts > 0, cache.overflow[where.rows], 0)
    counted = cache.overflow.at[where.rows].set(before + lost)
    return dataclasses.replace(cache, groups=groups, overflow=counted), tail


def view(cache: PagedCache, where: Where, *, before: bool = False) -> PagedView:
    """The sequences of `where` after its tokens were written, or as they were `before`."""
    lengths = jnp.minimum(where.starts if before else where.starts + where.counts, where.room)
    return PagedView(
        groups=cache.groups, table=where.tables[cache.pool], rows=where.rows, lengths=lengths,
        page=cache.page,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Residency:
    """Bytes of a pool over all layers.

    `reserved` is allocated, `active` its pages in use, `shared` the pages in use that have several
    owners, `saved` what those owners would need besides without sharing; `exact` holds sinks and
    recent windows of living sequences (`exact_reserved` of all rows).
    """

    reserved: int
    active: int
    shared: int
    saved: int
    exact: int
    exact_reserved: int
    fragmentation: float


def residency(cache_list: list[PagedCache], reports: Sequence[PoolReport]) -> Residency:
    """What pages and rows cost: live buffers of all layers, and `Pager.report` of each pool."""
    pools = [0] * len(reports)
    for c in cache_list:
        pools[c.pool] += sum(x.nbytes for g in c.groups for x in jax.tree.leaves((g.k, g.v)))
    exact = [
        x for c in cache_list for g in c.groups
        for x in (g.k_sinks, g.v_sinks, g.k_recent, g.v_recent)
    ]  # fmt: skip
    return residency_of(pools, exact, reports)


def residency_of(
    pools: Sequence[int], exact: Sequence[Array], reports: Sequence[PoolReport]
) -> Residency:
    """Of the bytes of each pool, and the exact tokens [rows, ...] of all layers.

    Fragmentation is that of the bytes of active pages.
    """
    empty = 0.0
    rows = sum(x.nbytes for x in exact)
    per_row = rows // exact[0].shape[0] if exact else 0
    active = shared = saved = 0
    for nbytes, report in zip(pools, reports, strict=True):
        per_page = nbytes // report.pages
        active += report.active * per_page
        shared += report.shared * per_page
        saved += report.saved * per_page
        empty += report.fragmentation * report.active * per_page
    return Residency(
        reserved=sum(pools) + rows,
        active=active,
        shared=shared,
        saved=saved,
        exact=reports[0].sequences * per_row,
        exact_reserved=rows,
        fragmentation=empty / active if active else 0.0,
    )


def _exact_of(groups: tuple[GroupBuffers, ...], rows: Int[Array, "B"]) -> tuple[GroupBuffers, ...]:
    """Groups of a pool, with the exact buffers of the given rows only."""
    return tuple(
        GroupBuffers(
            k=g.k,
            v=g.v,
            k_sinks=rows_of(g.k_sinks, rows),
            v_sinks=rows_of(g.v_sinks, rows),
            k_recent=rows_of(g.k_recent, rows),
            v_recent=rows_of(g.v_recent, rows),
        )
        for g in groups
    )


def rows_of(buffer: Array, rows: Int[Array, "B"]) -> Array:
    """Those of some sequences; no row is negative, which would cost one operation more."""
    return jnp.take(buffer, rows, axis=0, mode="clip")


def _store(
    page: int, table: Int[Array, "B P"], codec: Codec, arrays: Arrays, stored: Stored,
    x, positions, valid,
) -> Stored:  # fmt: skip
    encoded = jax.vmap(codec.encode, in_axes=(0, 1), out_axes=1)(arrays, x)
    return put(page, table, codec, encoded, stored, positions, valid)


def put(
    page: int, table: Int[Array, "B P"], codec: Codec, encoded: Stored, stored: Stored,
    positions, valid,
) -> Stored:  # fmt: skip
    """`cache.contiguous.put` on the few pages that the tokens touch, taken out and put back."""
    batch, width = table.shape
    tokens = positions.shape[1]
    encoded = {name: half.like(x, stored[name]) for name, x in encoded.items()}
    count = min((tokens - 1) // page + (2 if tokens > 1 else 1), width)
    start = positions[:, 0]
    end = start + jnp.sum(valid, axis=1, dtype=jnp.int32)
    first = jnp.minimum(start // page, width - count)
    which = first[:, None] + jnp.arange(count, dtype=jnp.int32)[None, :]  # [B, count]
    # A sum of few integers: one operation on an accelerator, where taking them is five.
    slots = jnp.arange(width, dtype=jnp.int32)[None, None, :]
    pages = jnp.sum(jnp.where(slots == which[..., None], table[:, None], 0), axis=2)
    here = start - first * page
    fields = [f for f in codec.fields if f.name in encoded]
    taken = {}
    for field in fields:
        local = stored[field.name][pages].swapaxes(1, 2)  # [B, N, count, ...]
        if field.packed:
            words = packing.kept(local, field.width)
            before = _before(here, count, words.shape[-2])[:, None, :, None, :, None]
            taken[field.name] = words & before
        else:
            taken[field.name] = local.reshape(*local.shape[:2], -1, local.shape[-1])
    local_positions = positions - (first * page)[:, None]
    raw = [f.name for f in fields if tokens == 1 and not f.packed and not f.per_block]
    others = {name: x for name, x in encoded.items() if name not in raw}
    written = caches.put(codec, others, taken, local_positions, valid)
    # One token's numbers by a choice, which fuses: a scatter would lay the pages out anew.
    slot = jnp.arange(page, dtype=jnp.int32)[None, None, :, None] == here[:, None, None, None]
    written |= {name: jnp.where(slot, encoded[name], taken[name]) for name in raw}
    touched = (end[:, None] > which * page) & (start[:, None] < (which + 1) * page)
    touched &= (end > start)[:, None]
    out = {}
    for field in fields:
        old = stored[field.name]
        new = written[field.name].reshape(batch, -1, count, *old.shape[2:]).swapaxes(1, 2)
        target = jnp.where(touched, pages, old.shape[0])
        out[field.name] = old.at[target].set(new, mode="drop")
    return out


def _before(start: Int[Array, "B"], pages: int, rows: int) -> Array:
    """uint32 [B, pages, rows]: which bits of each row belong to slots below `start`."""
    slot = (
        jnp.arange(pages, dtype=jnp.int32)[:, None, None] * (rows * packing.WORD_BITS)
        + jnp.arange(packing.WORD_BITS, dtype=jnp.int32)[None, None, :] * rows
        + jnp.arange(rows, dtype=jnp.int32)[None, :, None]
    )  # [pages, rows, 32]
    bit = jnp.uint32(1) << jnp.arange(packing.WORD_BITS, dtype=jnp.uint32)
    kept = slot[None] < start[:, None, None, None]
    return jnp.sum(jnp.where(kept, bit[None, None, None, :], jnp.uint32(0)), -1, dtype=jnp.uint32)
