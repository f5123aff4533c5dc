"""Decode in plain XLA: the oracle of the Pallas kernels and the implementation on a CPU.

Online softmax over blocks of pages: one block is unpacked at a time, keys meet the folded query,
values are summed in code space. Blocks before the first visible slot and behind the last are never
read. Nothing here knows a codec: only parts, words, scales and level tables.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from turboq.cache.exact_attention import HIGHEST, soft_cap
from turboq.codecs.minifloat import E4M3, E5M2
from turboq.codecs.reading import Part
from turboq.numbers import codebook, packing
from turboq_kernels import merge
from turboq_kernels.decode.types import Pages, Partial, Side

BLOCK_TOKENS = 1024
TILE_ROWS = 2048  # query rows that read the same blocks; twice as many are cut
FLOATS = ("e4m3", "e5m2")  # levels of which some are not finite


def decode(
    q: Float[Array, "B N M C"],
    k: Side,
    v: Side,
    pages: Pages,
    starts: Int[Array, "B M"],
    ends: Int[Array, "B M"],
    *,
    bias: Float[Array, "B N M"] | None,
    scale: float,
    softcap: float | None,
    splits: int | None,
    block_tokens: int | None = None,
) -> Partial:
    """See `turboq_kernels.decode.api.decode`."""
    run = functools.partial(
        _decode, k=k, v=v, pages=pages, scale=scale, softcap=softcap, splits=splits,
        block_tokens=block_tokens,
    )  # fmt: skip
    return by_tiles(run, q, starts, ends, bias)


def by_tiles(run, q, starts, ends, bias=None) -> Partial:
    """run(q, starts, ends, bias) of some rows at a time, so that each reads only what some of them
    see: of a long prompt half of all."""
    rows = starts.shape[1]
    if rows <= 2 * TILE_ROWS:
        return run(q, starts, ends, bias)
    tiles = -(-rows // TILE_ROWS)

    def cut(x, axis: int):  # rows added at the end see nothing
        pads = [(0, 0)] * x.ndim
        pads[axis] = (0, tiles * TILE_ROWS - rows)
        shape = (*x.shape[:axis], tiles, TILE_ROWS, *x.shape[axis + 1 :])
        return jnp.moveaxis(jnp.pad(x, pads).reshape(shape), axis, 0)

    each = (cut(q, 2), cut(starts, 1), cut(ends, 1), None if bias is None else cut(bias, 2))
    found = jax.lax.map(lambda x: run(*x), each)

    def joined(x):
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(*x.shape[:2], tiles * TILE_ROWS, *x.shape[4:])[:, :, :rows]

    return jax.tree.map(joined, found)


def _decode(
    q, starts, ends, bias, *, k: Side, v: Side, pages, scale, softcap, splits, block_tokens
):
    count = pages.table.shape[1]
    block = max(1, min((block_tokens or BLOCK_TOKENS) // k.page, count))
    q, heads = q.astype(jnp.float32), q.shape[1]

    def logits(first, valid):
        raw = _products(q, k, fetch(k, pages, heads, first, block, valid))
        return raw if bias is None else raw + bias[..., None]

    def sums(p, seen, first, valid):
        found, broken = without_broken(v, fetch(v, pages, heads, first, block, valid))
        return _sums(to_those_who_see(p, seen, broken), found)

    return online_softmax(
        logits, sums, starts, ends,
        heads=heads, width=v.reading.width, page=k.page, pages=count, block=block,
        scale=scale, softcap=softcap, splits=splits,
    )  # fmt: skip


def online_softmax(
    logits, sums, starts, ends,
    *, heads: int, width: int, page: int, pages: int, block: int, scale: float,
    softcap: float | None, splits: int | None,
) -> Partial:  # fmt: skip
    """The recurrence over blocks of `block` pages.

    `logits(first, valid)` are the raw logits [B, N, M, S] of the block whose first page is `first`
    (traced), `sums(p, seen, first, valid)` the weighted values [B, N, M, width]; `seen` [B, M, S]
    are the slots that a row sees, `valid` [B, S] those that some row sees.
    """
    batch, m = starts.shape
    tokens = block * page
    low = jnp.min(jnp.where(ends > starts, starts, pages * page)) // tokens
    high = jnp.minimum(-(-jnp.max(ends) // tokens), -(-pages // block))

    def step(i, state):
        # The last block is moved left to end with the buffer; what it repeats is masked.
        first = jnp.minimum(i * block, pages - block)
        slots = first * page + jnp.arange(tokens, dtype=jnp.int32)
        slots = jnp.where(slots >= i * tokens, slots, -1)[None, None, :]
        seen = (slots >= starts[:, :, None]) & (slots < ends[:, :, None])
        valid = jnp.any(seen, axis=1)
        capped = soft_cap(logits(first, valid) * scale, softcap)
        capped = jnp.where(seen[:, None], capped, -jnp.inf)
        top = jnp.maximum(state.top, jnp.max(capped, axis=-1))
        p = jnp.exp(capped - _finite(top)[..., None])
        state = rescaled(state, top)
        return Partial(
            acc=state.acc + sums(p, seen, first, valid),
            top=top,
            total=state.total + jnp.sum(p, axis=-1),
        )

    empty = Partial(
        acc=jnp.zeros((batch, heads, m, width), jnp.float32),
        top=jnp.full((batch, heads, m), -jnp.inf, jnp.float32),
        total=jnp.zeros((batch, heads, m), jnp.float32),
    )
    if splits is None or splits == 1:
        return jax.lax.fori_loop(low, high, step, empty)
    each = -(-jnp.maximum(high - low, 0) // splits)

    def split(j):
        begin = low + j * each
        return jax.lax.fori_loop(begin, jnp.minimum(begin + each, high), step, empty)

    return merge.merge(jax.lax.map(split, jnp.arange(splits, dtype=jnp.int32)))


def rescaled(state: Partial, top: Float[Array, "B N M"]) -> Partial:
    """The same sums relative to a larger maximum."""
    factor = jnp.exp(state.top - _finite(top))
    return Partial(acc=state.acc * factor[..., None], top=top, total=state.total * factor)


def _finite(top: Float[Array, "B N M"]) -> Float[Array, "B N M"]:
    """Rows that saw nothing (-inf) are measured from zero, so that they stay at zero."""
    return jnp.where(jnp.isfinite(top), top, 0.0)


def to_those_who_see(
    p: Float[Array, "B N M S"], seen: Bool[Array, "B M S"], broken: Bool[Array, "B N S"] | None
) -> Float[Array, "B N M S"]:
    """Weights that are NaN where a row sees a broken value, which itself has become zero.

    0 * NaN is NaN: a row that must not see the value would have it too.
    """
    if broken is None:
        return p
    return jnp.where(seen[:, None] & broken[:, :, None], jnp.nan, p)


def head_pages(
    pages: Pages, first: Int[Array, ""], block: int, heads: int
) -> Int[Array, "B N block"]:
    """Where the head-pages of `block` pages from page `first` lie."""
    table = jax.lax.dynamic_slice_in_dim(pages.table, first, block, axis=1)
    offsets = jnp.arange(heads, dtype=jnp.int32) * pages.stride_head
    return table[:, None, :] * pages.stride_page + offsets[None, :, None]


def take_pages(buffer: Array, pages: Pages, first: Int[Array, ""], block: int, heads: int) -> Array:
    """[R, ...] -> [B, N, block, ...]: a slice where the pages are contiguous, a gather else."""
    if not pages.contiguous:
        at = head_pages(pages, first, block, heads)
        return buffer.at[at].get(mode="clip")
    batch, count = pages.table.shape
    whole = buffer.reshape(batch, heads, count, *buffer.shape[1:])
    return jax.lax.dynamic_slice_in_dim(whole, first, block, axis=2)


def fetch(
    side: Side,
    pages: Pages,
    heads: int,
    first: Int[Array, ""],
    block: int,
    valid: Bool[Array, "B S"],
) -> list[tuple[Array, Array | None, Array | None]]:
    """Levels [B, N, S, width], scales and offsets [B, N, S] of one block, per part."""
    held = valid[:, None]

    def row(buffer):
        if buffer is None:
            return None
        found = take_pages(buffer, pages, first, block, heads).astype(jnp.float32)
        # A NaN in a slot nobody sees must not reach the sums as 0 * NaN.
        return jnp.where(held, found.reshape(*found.shape[:2], -1), 0.0)

    out = []
    for part, words, scale, offset, table in zip(
        side.reading.parts, side.words, side.scales, side.offsets, side.tables, strict=True
    ):
        codes = packing.unpack(take_pages(words, pages, first, block, heads))
        if part.levels in FLOATS:
            codes = jnp.where(held[..., None], codes, jnp.uint8(0))  # some codes are NaN
        out.append((levels(part, table, codes), row(scale), row(offset)))
    return out


def without_broken(
    side: Side, block: list[tuple[Array, Array | None, Array | None]]
) -> tuple[list[tuple[Array, Array | None, Array | None]], Bool[Array, "B N S"] | None]:
    """A fetched block with zeros for tokens that are not finite, and which those are.

    Only what is stored as a float can be so: scales, offsets, codes that are floats themselves.
    """
    broken = None
    for part, (values, scale, offset) in zip(side.reading.parts, block, strict=True):
        floats = [jnp.isfinite(x) for x in (scale, offset) if x is not None]
        if part.levels in FLOATS:
            floats.append(jnp.all(jnp.isfinite(values), axis=-1))
        for finite in floats:
            broken = ~finite if broken is None else broken | ~finite
    if broken is None:
        return block, None

    def whole(x):
        return None if x is None else jnp.where(broken, jnp.float32(0.0), x)

    out = []
    for part, (values, scale, offset) in zip(side.reading.parts, block, strict=True):
        if part.levels in FLOATS:
            values = jnp.where(broken[..., None], jnp.float32(0.0), values)
        out.append((values, whole(scale), whole(offset)))
    return out, broken


def levels(
    part: Part, table: Float[Array, "N L"] | None, codes: UInt8[Array, "B N S W"]
) -> Float[Array, "B N S W"]:
    """The level of every code, float32."""
    if part.levels == "table":
        assert table is not None
        return jax.vmap(codebook.lookup, in_axes=(0, 1), out_axes=1)(table, codes)
    if part.levels == "affine":
        return codes.astype(jnp.float32)
    if part.levels == "sign":
        return codes.astype(jnp.float32) * 2.0 - 1.0
    if part.levels == "int8":
        return jax.lax.bitcast_convert_type(codes, jnp.int8).astype(jnp.float32)
    return {"e4m3": E4M3, "e5m2": E5M2}[part.levels].decode(codes)


def _products(q, side: Side, block) -> Float[Array, "B N M S"]:
    """sum_i scale_i (q_i . level_i) + offset_i sum(q_i)."""
    out = jnp.float32(0.0)
    for part, start, (values, scale, offset) in zip(
        side.reading.parts, side.reading.starts, block, strict=True
    ):
        piece = q[..., start : start + part.width]
        raw = jnp.einsum("bnmc,bnsc->bnms", piece, values, precision=HIGHEST)
        raw = raw if scale is None else raw * scale[:, :, None]
        if offset is not None:
            raw = raw + jnp.sum(piece, axis=-1)[..., None] * offset[:, :, None]
        out = out + raw
    return out


def _sums(p, block) -> Float[Array, "B N M C"]:
    """sum_s p_s (scale_s level_s + offset_s), parts side by side."""
    out = []
    for values, scale, offset in block:
        weighted = p if scale is None else p * scale[:, :, None]
        acc = jnp.einsum("bnms,bnsc->bnmc", weighted, values, precision=HIGHEST)
        if offset is not None:
            acc = acc + jnp.sum(p * offset[:, :, None], axis=-1)[..., None]
        out.append(acc)
    return jnp.concatenate(out, axis=-1) if len(out) > 1 else out[0]
