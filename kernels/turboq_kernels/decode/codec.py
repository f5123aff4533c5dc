"""Decode in XLA through the codec's own methods: for what no kernel reads.

Block codecs (scales per channel over a run of tokens), trellis and window codes, exact vectors,
formats of other engines: whatever has `logits` and `accumulate`, block of pages by block of pages.
Keys stored before their rotary embedding, or relative to a block of positions, are decoded and
turned, some pages at a time, and meet the query there; so do those of latent attention, which are
values too.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from turboq.cache.exact_attention import HIGHEST
from turboq.cache.key_form import from_stored
from turboq.cache.layer import KVLayer
from turboq.codecs.base import Arrays, Codec, Field, Stored
from turboq.numbers import half, packing
from turboq_kernels.decode import base
from turboq_kernels.decode.types import Pages, Partial
from turboq_kernels.sides import of_heads


def decode(
    q: Float[Array, "B N M D"],
    k: tuple[Codec, Arrays, Stored],
    v: tuple[Codec, Arrays, Stored],
    pages: Pages,
    starts: Int[Array, "B M"],
    ends: Int[Array, "B M"],
    *,
    page: int,
    scale: float,
    softcap: float | None,
    layer: KVLayer | None = None,
    first: Int[Array, "B"] | int = 0,
    splits: int | None = None,
    block_tokens: int | None = None,
) -> Partial:
    """As `turboq_kernels.decode.decode`, of queries that are not folded yet.

    `k` and `v` are codec, arrays [N, ...] and head-pages (`turboq_kernels.sides`). Stored keys of a
    `layer` with a rotary embedding are turned (`turboq.cache.key_form`); slot s is position
    `first` + s.
    """
    run = functools.partial(
        _decode, k=k, v=v, pages=pages, page=page, scale=scale, softcap=softcap, layer=layer,
        first=first, splits=splits, block_tokens=block_tokens,
    )  # fmt: skip
    return base.by_tiles(run, q, starts, ends)


def _decode(
    q, starts, ends, _, *, k, v, pages, page: int, scale: float, softcap, layer: KVLayer | None,
    first, splits, block_tokens,
) -> Partial:  # fmt: skip
    heads, count = q.shape[1], pages.table.shape[1]
    block = max(1, min((block_tokens or base.BLOCK_TOKENS) // page, count))
    (k_codec, k_arrays, k_stored), (v_codec, v_arrays, v_stored) = k, v
    q = q.astype(jnp.float32)
    whole = layer if layer is not None and (layer.rope is not None or layer.latent) else None
    folded = {} if whole else of_heads(k_codec.fold_query)(k_arrays, q)
    origin = jnp.reshape(jnp.asarray(first, jnp.int32), (-1, 1))

    def logits(first, valid):
        fields = fetch(k_codec, k_stored, pages, heads, first, block, valid)
        if whole is None:
            return of_heads(k_codec.logits)(k_arrays, folded, fields)
        slots = first * page + jnp.arange(block * page, dtype=jnp.int32)
        keys = of_heads(k_codec.decode)(k_arrays, fields)
        keys = from_stored(whole, k_arrays, keys, origin + slots[None])
        if whole.latent:
            values = fetch(v_codec, v_stored, pages, heads, first, block, valid)
            keys = whole.keys(keys, of_heads(v_codec.decode)(v_arrays, values))
        return jnp.einsum("bnmd,bnsd->bnms", q, keys, precision=HIGHEST)

    def sums(p, seen, first, valid):
        fields = fetch(v_codec, v_stored, pages, heads, first, block, valid)
        broken = ~v_codec.finite(fields)
        fields = {f.name: where_held(v_codec, f, ~broken, fields[f.name]) for f in v_codec.fields}
        p = base.to_those_who_see(p, seen, broken)
        return of_heads(v_codec.accumulate)(v_arrays, p, fields)

    def width():
        batch, _, rows = q.shape[:3]
        p = jnp.zeros((*q.shape[:3], block * page), jnp.float32)
        seen = jnp.ones((batch, rows, block * page), bool)
        return sums(p, seen, jnp.int32(0), seen[:, 0])

    return base.online_softmax(
        logits, sums, starts, ends,
        heads=heads, width=jax.eval_shape(width).shape[-1], page=page, pages=count, block=block,
        scale=scale, softcap=softcap, splits=splits,
    )  # fmt: skip


def fetch(
    codec: Codec,
    stored: Stored,
    pages: Pages,
    heads: int,
    first: Int[Array, ""],
    block: int,
    valid: Bool[Array, "B S"],
) -> Stored:
    """Unpacked fields [B, N, S, width] of one block of pages; rows that nobody sees are zero."""
    out = {}
    for field in codec.fields:
        part = half.values(base.take_pages(stored[field.name], pages, first, block, heads))
        if field.packed:
            out[field.name] = packing.unpack(part)
            continue
        rows = part.reshape(*part.shape[:2], -1, part.shape[-1])
        # A NaN in a slot that nobody wrote must not reach the sums as 0 * NaN.
        out[field.name] = where_held(codec, field, valid[:, None], rows)
    return out


def where_held(codec: Codec, field: Field, held: Bool[Array, "B #N S"], rows: Array) -> Array:
    """Entries [B, N, S, width] (or per block) of the tokens that are `held`, zeros for others."""
    if field.per_block:
        held = jnp.any(held.reshape(*held.shape[:2], -1, codec.block), axis=-1)
    return jnp.where(held[..., None], rows, jnp.zeros((), rows.dtype))
