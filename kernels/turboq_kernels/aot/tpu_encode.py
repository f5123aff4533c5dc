"""Compiles the encode kernel for TPU generations on a machine without one, and reads its schedule.

    python -m turboq_kernels.aot.tpu_encode                    # rows of all configurations, as JSON
    python -m turboq_kernels.aot.tpu_encode target=v5e bits=3  # those that match

As `turboq_kernels.aot.tpu`. A chunk of a prefill costs the bundles of one step of the kernel, which
encodes 256 tokens of one head; tokens appended to many sequences cost a step's bundles, those of
its loops over sequences counted once for each, scaled to 256 tokens. Branches count as taken.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from turboq.cache.layer import KVLayer
from turboq.codecs import TurboQuantMSE, TurboQuantProd
from turboq.codecs.base import Codec
from turboq.numbers.packing import PAGE, ROWS
from turboq_kernels.aot import compilers, tpu
from turboq_kernels.aot.compilers import Program
from turboq_kernels.aot.tpu import missing as missing
from turboq_kernels.decode.types import Pages
from turboq_kernels.encode import api, mosaic_tpu, store
from turboq_kernels.encode.types import word_fields

KERNEL = "turboq_encode"
BATCH, HEADS, COUNT = 16, 8, 64  # sequences, KV heads, pages of a sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Configuration:
    """What is compiled: `tokens` new tokens of 16 sequences, 8 KV heads, bfloat16, a pool of pages.

    `levels`: "table" is turboquant_mse; "table+sign" turboquant_prod, whose last bit is the sign.
    """

    target: str
    bits: int
    dim: int
    tokens: int
    levels: str = "table"

    def __post_init__(self):
        if self.target not in tpu.TOPOLOGIES:
            raise ValueError(f"{self.target=} must be one of {tuple(tpu.TOPOLOGIES)}")
        if self.levels not in ("table", "table+sign"):
            raise ValueError(f"{self.levels=} must be 'table' or 'table+sign'")

    @property
    def codec(self) -> Codec:
        kind = TurboQuantMSE if self.levels == "table" else TurboQuantProd
        return kind(dim=self.dim, bits=self.bits)


CONFIGURATIONS = tuple(
    Configuration(target=target, bits=bits, dim=128, tokens=tokens, levels=levels)
    for target in ("v5e", "v6e")
    for bits, levels in ((2, "table"), (3, "table"), (4, "table"), (3, "table+sign"))
    for tokens in (1, 256)
)


def program(configuration: Configuration, page: int = PAGE, pool: int | None = None) -> Program:
    """The kernel's `write` alone; the words are donated, and kept folded.

    Args:
      pool: head-pages that exist, by default as many as the table names.
    """
    c, codec, rows = configuration, configuration.codec, page // 32
    writing = codec.writing
    assert writing is not None

    def struct(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    bits = {f.name: (f.bits, rows, f.width) for f in codec.fields if f.packed}
    total = pool or BATCH * HEADS * COUNT
    shapes = [(total, *bits[name]) for name in word_fields(writing)]
    folds = mosaic_tpu.specify(writing, c.dim, page, 1).fields
    words = tuple(
        struct(shape[0], *field.block, dtype=jnp.uint32)
        for shape, field in zip(shapes, folds, strict=True)
    )
    tables = jax.eval_shape(lambda: store.tables_of(codec, {}, HEADS))
    pages = Pages(table=struct(BATCH, COUNT, dtype=jnp.int32), stride_page=HEADS, stride_head=1)
    seen = struct(BATCH, dtype=jnp.int32)

    def run(kept, x, tables, pages, starts, counts):
        words = tuple(w.reshape(shape) for w, shape in zip(kept, shapes, strict=True))
        words, numbers = mosaic_tpu.write(x, writing, tables, words, pages, starts, counts)
        return tuple(w.reshape(k.shape) for w, k in zip(words, kept, strict=True)), numbers

    x = struct(BATCH, HEADS, c.tokens, c.dim, dtype=jnp.bfloat16)
    return Program(run, (words, x, tables, pages, seen, seen), donated=(0,))


def layer_program(layer: KVLayer, cache: Any, tokens: int) -> Program:
    """`encode` of a whole layer into a contiguous cache, which is donated.

    Args:
      cache: shapes of a `turboq.cache.contiguous.LayerCache`.
    """
    batch, heads = len(cache.lengths), layer.kv_heads
    k, v = (
        jax.ShapeDtypeStruct((batch, tokens, heads, codec.dim), jnp.bfloat16)
        for codec in (layer.groups[0].k, layer.groups[0].v)
    )

    def run(cache, k, v):
        return api.encode(layer, cache, k, v, implementation="mosaic_tpu")

    return Program(run, (cache, k, v), donated=(0,))


def row(configuration: Configuration, dump: pathlib.Path) -> dict[str, Any]:
    """One row; `dump` is the empty folder the compiler writes its schedule to."""
    executable = tpu.compile_for(configuration.target, program(configuration))
    analysis = executable.memory_analysis()
    if analysis is None:
        raise RuntimeError("the compiler reports no memory analysis")
    cost, c = tpu.read_cost(dump, KERNEL), configuration
    words = BATCH * HEADS * COUNT * c.bits * ROWS * c.dim * 4
    bundles, tokens = cost.loop_bundles, PAGE
    if c.tokens <= mosaic_tpu.APPEND:
        sequences = min(BATCH, mosaic_tpu.SEQUENCES)
        bundles += (sequences - 1) * cost.nested_bundles
        tokens = sequences * c.tokens
    return {"op": "encode"} | dataclasses.asdict(c) | {
        "bundles_per_256_tokens": round(bundles * PAGE / tokens, 1),
        "loop_bundles": bundles,
        "loop_tokens": tokens,
        "slots_used": cost.busy,
        "vmem_bytes": cost.vmem_bytes,
        # Donated words are written in place, and no tile of theirs is padded: one.
        "padding": round(analysis.alias_size_in_bytes / words, 3),
    }  # fmt: skip


def rows(only: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """See `turboq_kernels.aot.tpu.rows`."""
    found = compilers.select(only, CONFIGURATIONS)
    return compilers.rows("turboq_kernels.aot.tpu_encode", "tpu", found)


if __name__ == "__main__":
    compilers.main(sys.argv[1:], Configuration, row, rows)
