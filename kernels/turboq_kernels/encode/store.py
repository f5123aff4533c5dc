"""A kernel as the `store` of a cache: words by the kernel in place, row numbers by XLA."""

from __future__ import annotations

import contextlib
import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from turboq.cache import contiguous as caches
from turboq.cache import paged as paged_cache
from turboq.cache.layer import KVLayer
from turboq.codecs.base import Arrays, Codec, Stored
from turboq.codecs.writing import WriteTables, Writing
from turboq.numbers import packing
from turboq_kernels.decode.types import Pages, contiguous_pages, pool_pages
from turboq_kernels.encode.types import word_fields

MODULES = {
    "mosaic_tpu": "turboq_kernels.encode.mosaic_tpu",
    "triton": "turboq_kernels.encode.triton",
}

APPENDS = {
    "mosaic_tpu": "turboq_kernels.encode.mosaic_tpu_append",
    "triton": "turboq_kernels.encode.triton_append",
}


def unsupported(name: str, codec: Codec, page: int) -> str | None:
    """Why a kernel cannot encode with a codec into pages of `page` tokens, or None."""
    if codec.writing is None:
        return f"codec {codec.name!r} as configured has no writing for kernels"
    return _module(MODULES[name]).unsupported(codec.writing, codec.dim, page)


# Cached, so that one setting is one function: `cache.contiguous.write` compiles once for each.
@functools.cache
def contiguous(name: str, interpret: bool) -> caches.Store:
    """The store of `turboq.cache.contiguous.write` by the kernels of `name`."""

    def store(codec: Codec, arrays: Arrays, stored: Stored, x, positions, valid) -> Stored:
        batch, heads = x.shape[:2]
        count = stored[word_fields(writing_of(codec))[0]].shape[2]
        pages = contiguous_pages(batch, heads, count)
        words, rows = _run(name, interpret, codec, arrays, stored, x, pages, positions, valid)
        return words | caches.put(codec, rows, stored, positions, valid)

    return store


@functools.cache
def pool(name: str, interpret: bool) -> paged_cache.PoolStore:
    """The store of `turboq.cache.paged.write` by the kernels of `name`."""

    def store(
        page: int, table: Int[Array, "B P"], codec: Codec, arrays: Arrays, stored: Stored,
        x, positions, valid,
    ) -> Stored:  # fmt: skip
        pages = pool_pages(table, x.shape[1])
        with contextlib.nullcontext() if arrays else jax.ensure_compile_time_eval():
            tables = tables_of(codec, arrays, x.shape[1])
        words, rows = _run(
            name, interpret, codec, arrays, stored, x, pages, positions, valid, tables
        )
        return words | paged_cache.put(page, table, codec, rows, stored, positions, valid)

    return store


def appending(name: str, layer: KVLayer, tokens: int, interpret: bool) -> paged_cache.Append | None:
    """What writes a step of one token into a pool whole, or None where there is nothing."""
    if name not in APPENDS or _module(APPENDS[name]).unsupported(layer, tokens) is not None:
        return None
    return _appending(name, interpret)


@functools.cache
def _appending(name: str, interpret: bool) -> paged_cache.Append:
    return functools.partial(_module(APPENDS[name]).append, interpret=interpret)


def _module(name: str) -> Any:
    return importlib.import_module(name)


def _run(
    name: str, interpret: bool, codec: Codec, arrays: Arrays, stored: Stored,
    x: Float[Array, "B N T D"], pages: Pages, positions, valid, tables: WriteTables | None = None,
) -> tuple[Stored, Stored]:  # fmt: skip
    """New words of every packed field that the kernel writes, and the entries of all others."""
    writing, heads = writing_of(codec), x.shape[1]
    names = word_fields(writing)
    fields = {f.name: f for f in codec.fields}
    old = {n: packing.kept(stored[n], fields[n].width) for n in names}
    reason = unsupported(name, codec, old[names[0]].shape[-2] * packing.WORD_BITS)
    if reason is not None:
        raise ValueError(
            f"implementation={name!r} cannot encode this case: {reason}; use 'xla' or None"
        )
    words, rows = _module(MODULES[name]).write(
        x, writing, tables or tables_of(codec, arrays, heads),
        tuple(words.reshape(-1, *words.shape[-3:]) for words in old.values()),
        pages, positions[:, 0], jnp.sum(valid, axis=1, dtype=jnp.int32), interpret=interpret,
    )  # fmt: skip
    new = {n: w.reshape(stored[n].shape) for n, w in zip(names, words, strict=True)}
    kinds = {n: "uint8" if f.packed else f.dtype for n, f in fields.items()}
    entries = {
        n: row.astype(kinds[n])[..., None] for n, row in zip(writing.rows, rows, strict=True)
    }
    return new, entries


def tables_of(codec: Codec, arrays: Arrays, heads: int) -> WriteTables:
    """`Codec.write_tables` of all heads; a data-free codec repeats its own."""
    if arrays:
        return jax.vmap(codec.write_tables)(arrays)
    return jax.tree.map(
        lambda t: jnp.broadcast_to(t, (heads, *t.shape)), codec.write_tables(arrays)
    )


def writing_of(codec: Codec) -> Writing:
    """How a kernel writes a codec's codes.

    Raises:
      ValueError: it has no such form.
    """
    if codec.writing is None:
        raise ValueError(f"codec {codec.name!r} as configured has no writing for kernels")
    return codec.writing
