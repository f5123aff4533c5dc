"""From a codec and its stored fields to what the decode kernels take, and back to outputs.

Buffers are *paged*: every field of a head group lies in head-pages along one leading axis R,

    packed field  uint32 [R, bits, rows, width]     (kept folded in caches, `numbers.packing`)
    raw field     dtype  [R, page, width]            (per block of tokens: [R, page / block, width];
                                                      `turboq.numbers.half`)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from turboq.codecs.base import Arrays, Codec, Stored
from turboq.numbers import half, packing
from turboq_kernels.decode.types import Coded, Side


def of_heads(method):
    """A method of one head -> all sequences and heads: arrays [N, ...], the rest [B, N, ...]."""

    def run(arrays, *rest):
        each = (0,) * len(rest)
        return jax.vmap(jax.vmap(method, in_axes=(0, *each)), in_axes=(None, *each))(arrays, *rest)

    return run


def flat(stored: Stored, codec: Codec, page: int) -> Stored:
    """Buffers of a contiguous cache or of a pool as head-pages [R, ...]: a free reshape."""
    out = {}
    for field in codec.fields:
        x = stored[field.name]
        if field.packed:
            words = packing.kept(x, field.width)
            out[field.name] = words.reshape(-1, *words.shape[-3:])
        else:
            rows = page // codec.block if field.per_block else page
            out[field.name] = x.reshape(-1, rows, x.shape[-1])
    return out


def side(
    codec: Codec,
    arrays: Arrays,
    stored: Stored,
    heads: Int[Array, "R"],
    count: int,
    *,
    coded: bool = False,
) -> Side:
    """The stored side of a group of `count` heads from head-pages; arrays [count, ...].

    Scales that a codec codes are left to the kernel if `coded`, else decoded here, all of the pool;
    `heads` [R], the head of every head-page, is for that.

    Raises:
      ValueError: the codec has no reading.
    """
    reading = codec.reading
    if reading is None:
        raise ValueError(f"codec {codec.name!r} as configured has no reading for kernels")
    fields = {f.name: f for f in codec.fields}

    def rows(name: str | None):
        if name is None:
            return None
        entries = stored[name]
        if not fields[name].packed:
            return half.values(entries[..., 0])
        if coded:
            every = jnp.arange(1 << fields[name].bits, dtype=jnp.uint8)
            return Coded(entries, jax.vmap(lambda a: codec.row_values(a, name, every))(arrays))
        codes = packing.unpack(entries[:, None])[..., 0]  # [R, page]
        of_page = jax.tree.map(lambda x: x[heads], arrays)
        return jax.vmap(lambda a, e: codec.row_values(a, name, e))(of_page, codes)

    return Side(
        words=tuple(stored[p.field] for p in reading.parts),
        scales=tuple(rows(p.scale) for p in reading.parts),
        offsets=tuple(rows(p.offset) for p in reading.parts),
        tables=tuple(
            table if part.levels == "table" else None
            for part, table in zip(reading.parts, level_tables(codec, arrays, count), strict=True)
        ),
        reading=reading,
    )


def level_tables(codec: Codec, arrays: Arrays, count: int) -> tuple[Float[Array, "N L"], ...]:
    """`Codec.level_tables` of all heads; a data-free codec repeats its own."""
    if arrays:
        return jax.vmap(codec.level_tables)(arrays)
    return tuple(jnp.broadcast_to(t, (count, t.shape[0])) for t in codec.level_tables(arrays))


def gains(codec: Codec, arrays: Arrays, count: int) -> Float[Array, "N C"] | None:
    """Static factor of every coordinate of every head (1 in parts with a table); None if all 1.

    Folded into the query for K (`fold`); for V what the kernel summed is multiplied by it.
    """
    reading = codec.reading
    assert reading is not None
    if not arrays or all(part.levels == "table" for part in reading.parts):
        return None
    return jnp.concatenate(
        [
            jnp.ones((count, part.width), jnp.float32)
            if part.levels == "table"
            else jnp.broadcast_to(table, (count, part.width))
            for part, table in zip(reading.parts, level_tables(codec, arrays, count), strict=True)
        ],
        axis=-1,
    )


def fold(
    codec: Codec, arrays: Arrays, q: Float[Array, "B N M D"]
) -> tuple[Float[Array, "B N M C"], Float[Array, "B N M"] | None]:
    """Queries in the coordinates of the stored keys, and their offset (None: zero)."""
    folded, offset = of_heads(codec.reading_query)(arrays, q.astype(jnp.float32))
    gain = gains(codec, arrays, q.shape[1])
    return folded if gain is None else folded * gain[None, :, None], offset
