"""Compiles the encode kernel for an H100 on a machine without a GPU or driver, and counts its cost.

    python -m turboq_kernels.aot.cuda_encode                 # rows of all configurations, as JSON
    python -m turboq_kernels.aot.cuda_encode bits=3 dim=128  # those that match

As `turboq_kernels.aot.cuda`. Instructions are those that one program of the grid goes through, its
loops over the coordinates counted as often as they run, times its threads, per coordinate of the
tokens that it encodes: one of the 16 columns at `tokens=1`, all 32 in a chunk.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from turboq.cache import contiguous as caches
from turboq.cache.layer import KVLayer
from turboq.codecs import TurboQuantMSE, TurboQuantProd
from turboq.codecs.base import Codec
from turboq.numbers.packing import PAGE, ROWS, WORD_BITS
from turboq_kernels.aot import compilers, cuda
from turboq_kernels.aot.compilers import Program
from turboq_kernels.aot.cuda import TARGET
from turboq_kernels.aot.cuda import missing as missing
from turboq_kernels.decode.types import contiguous_pages
from turboq_kernels.encode import api, store
from turboq_kernels.encode.types import word_fields

KERNEL = "turboq_encode"
BATCH, HEADS, COUNT = 2, 8, 16  # sequences, KV heads, pages of a sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Configuration:
    """What is compiled: `tokens` new bfloat16 tokens of 2 sequences, 8 KV heads.

    `levels`: "table" is turboquant_mse; "table+sign" turboquant_prod, whose last bit is the sign.
    """

    bits: int
    dim: int
    tokens: int
    levels: str = "table"

    @property
    def codec(self) -> Codec:
        kind = TurboQuantMSE if self.levels == "table" else TurboQuantProd
        return kind(dim=self.dim, bits=self.bits)


CONFIGURATIONS = tuple(
    Configuration(bits=bits, dim=dim, tokens=tokens, levels=levels)
    for dim in (64, 128, 256)
    for bits, levels in ((2, "table"), (3, "table"), (4, "table"), (3, "table+sign"))
    for tokens in (1, PAGE)
)


def rows(only: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """See `turboq_kernels.aot.cuda.rows`."""
    found = compilers.select(only, CONFIGURATIONS, target=TARGET)
    return compilers.rows("turboq_kernels.aot.cuda_encode", "cuda", found)


def row(configuration: Configuration, target: str = TARGET) -> dict[str, Any]:
    """One row of `experiments/results/kernel_costs.json`."""
    from turboq_kernels.encode import triton

    c = configuration
    cost = cuda.compiled_costs(program(c), target)[KERNEL]
    tuned = triton.tuning(c.dim, -(-c.tokens // ROWS))
    products = 1 if c.levels == "table" else 2
    again = products * (c.dim // min(tuned.block, c.dim) - 1)
    executed = cost.instructions + again * cost.loop_instructions
    encoded = min(c.tokens, WORD_BITS) * c.dim
    return {"target": target, "op": "encode"} | dataclasses.asdict(c) | {
        "instructions_per_element": round(executed * 32 * tuned.num_warps / encoded, 1),
        **cost.columns(),
    }  # fmt: skip


def program(configuration: Configuration, page: int = PAGE) -> Program:
    """The kernel's `write` alone."""
    from turboq_kernels.encode import triton

    c, codec = configuration, configuration.codec
    writing = codec.writing
    assert writing is not None

    def struct(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    bits = {f.name: (f.bits, page // WORD_BITS, f.width) for f in codec.fields if f.packed}
    words = tuple(
        struct(BATCH * HEADS * COUNT, *bits[name], dtype=jnp.uint32)
        for name in word_fields(writing)
    )
    tables, pages = jax.eval_shape(
        lambda: (store.tables_of(codec, {}, HEADS), contiguous_pages(BATCH, HEADS, COUNT))
    )
    x = struct(BATCH, HEADS, c.tokens, c.dim, dtype=jnp.bfloat16)
    seen = struct(BATCH, dtype=jnp.int32)

    def run(x, tables, words, pages, starts, counts):
        return triton.write(x, writing, tables, words, pages, starts, counts)

    return Program(run, (x, tables, words, pages, seen, seen))


def layer_program(layer: KVLayer, *, tokens: int, capacity: int) -> Program:
    """`encode` of a whole layer into a contiguous cache, which is donated."""
    cache = jax.eval_shape(lambda: caches.init(layer, batch=BATCH, capacity=capacity))
    k, v = (
        jax.ShapeDtypeStruct((BATCH, tokens, layer.kv_heads, codec.dim), jnp.bfloat16)
        for codec in (layer.groups[0].k, layer.groups[0].v)
    )

    def run(cache, k, v):
        return api.encode(layer, cache, k, v, implementation="triton")

    return Program(run, (cache, k, v), donated=(0,))


if __name__ == "__main__":
    compilers.main(sys.argv[1:], Configuration, lambda c, _: row(c), rows)
