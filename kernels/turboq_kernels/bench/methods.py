"""What is timed: one token, or a prefill chunk, over S cached ones, exact in bfloat16 or packed.

A method gives, for a shape, the arrays it reads and a function of (query, arrays) that runs a
number of dependent calls (each query is the one before plus a trace of its output), so that nothing
can be skipped, merged or overlapped. Calls rotate through copies of the cache: separate arrays for
the exact ones (a slice would be copied), pages of one large pool for the packed ones.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from turboq.codecs import TurboQuantMSE
from turboq.codecs.reading import Part, Reading
from turboq_kernels.bench import timing
from turboq_kernels.decode import types

PAGE = 256
TRACE = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """B sequences of S cached tokens, N KV heads of G query heads, D, T query tokens.

    All query tokens see all cached ones: the chunk's own tokens are not in here.
    """

    batch: int
    tokens: int
    chunk: int = 1
    heads: int = 8
    group: int = 4
    dim: int = 128

    @property
    def elements(self) -> int:
        """Numbers of K and V that a call reads."""
        return 2 * self.batch * self.tokens * self.heads * self.dim

    @property
    def flop(self) -> int:
        """Operations of the two matrix products of a call."""
        return 2 * self.chunk * self.group * self.elements

    @property
    def slower(self) -> int:
        """How many times longer than its reading a call may take."""
        return max(1, self.chunk * self.group // 128)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A method at a shape: `run(q, arrays)` does `calls` calls that read `nbytes` each.

    It gives the last query; where arrays are `donated`, (query, arrays after the calls).
    """

    run: Callable[..., Array]
    query: jax.ShapeDtypeStruct
    make: Callable[[], Any]
    nbytes: int
    calls: int
    resident: int  # bytes of all copies
    donated: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A name, the function that makes its job, and whether it is an exact bfloat16 baseline."""

    name: str
    job: Callable[[Shape], Job]
    exact: bool = False


def all_methods(*, interpret: bool = False, **tuned: Any) -> list[Method]:
    """Baselines first, then packed caches from 8 to 2 bits."""
    out = [
        Method(name="bf16 cudnn", job=lambda s: _exact(s, jax_attention("cudnn")), exact=True),
        Method(name="bf16 xla", job=lambda s: _exact(s, jax_attention("xla")), exact=True),
    ]
    if importlib.util.find_spec("tokamax"):
        out.insert(1, Method(name="bf16 tokamax", job=lambda s: _exact(s, _tokamax()), exact=True))
    options = {"interpret": interpret, **tuned}
    for bits, levels, name in (
        (8, "int8", "int8"), (8, "e4m3", "fp8"), (4, "table", "4 bits"),
        (3, "table", "3 bits"), (2, "table", "2 bits"),
    ):  # fmt: skip
        out.append(packed(name, bits, levels, **options))
    return out


def packed(name: str, bits: int, levels: str, **options: Any) -> Method:
    """The Triton kernel over K and V of these levels with a float16 scale per token each."""
    return Method(name=name, job=lambda s: _packed(s, bits, levels, options))


def jax_attention(implementation: Any) -> Callable[..., Array]:
    """`jax.nn.dot_product_attention` by cuDNN or XLA."""

    def attend(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, implementation=implementation)

    return attend


def _tokamax():
    tokamax: Any = importlib.import_module("tokamax")
    return tokamax.dot_product_attention


def _exact(shape: Shape, attend) -> Job:
    rows = (shape.batch, shape.tokens, shape.heads, shape.dim)
    nbytes = 2 * 2 * math.prod(rows)
    copies = min(-(-timing.COLD_BYTES // nbytes), 16)
    rounds = -(-timing.count(nbytes * shape.slower) // copies)

    def run(q, arrays):
        def step(_, q):
            for k, v in arrays:
                out = attend(q, k, v)
                q = q + (out * TRACE).astype(q.dtype)
            return q

        return jax.lax.fori_loop(0, rounds, step, q)

    def make():
        keys = jax.random.split(jax.random.key(1), 2 * copies)
        one = (1, *rows[1:])
        arrays = [
            jnp.tile(jax.random.normal(key, one, jnp.bfloat16), (shape.batch, 1, 1, 1))
            for key in keys
        ]
        return list(zip(arrays[::2], arrays[1::2], strict=True))

    query = jax.ShapeDtypeStruct(
        (shape.batch, shape.chunk, shape.heads * shape.group, shape.dim), jnp.bfloat16
    )
    return Job(
        run=run, query=query, make=make, nbytes=nbytes, calls=rounds * copies,
        resident=copies * nbytes,
    )  # fmt: skip


def _packed(shape: Shape, bits: int, levels: str, options: dict[str, Any]) -> Job:
    from turboq_kernels.decode import triton
    from turboq_kernels.prefill import triton as prefill

    pages = shape.tokens // PAGE
    total = shape.batch * shape.heads * pages
    part = Part(field="codes", width=shape.dim, bits=bits, levels=levels, scale="scale")
    reading = Reading(parts=(part,))
    nbytes = 2 * total * (bits * 8 * shape.dim * 4 + 2 * PAGE)
    copies = -(-timing.COLD_BYTES // nbytes)
    if options.get("interpret"):
        copies = 2
    calls = 2 if options.get("interpret") else timing.count(nbytes * shape.slower)
    everything = types.contiguous_pages(shape.batch, shape.heads, pages)
    ends = jnp.full((shape.batch, shape.chunk * shape.group), shape.tokens, jnp.int32)
    attend = triton.decode if shape.chunk == 1 else prefill.history

    def run(q, arrays):
        k, v = arrays

        def step(i, q):
            table = everything.table + (i % copies) * total
            here = dataclasses.replace(everything, table=table, contiguous=False)
            part = attend(
                q, k, v, here, jnp.zeros_like(ends), ends,
                bias=None, scale=shape.dim**-0.5, softcap=None, splits=None, **options,
            )  # fmt: skip
            return q + part.acc / part.total[..., None] * TRACE

        return jax.lax.fori_loop(0, calls, step, q)

    def make():
        return tuple(_side(jax.random.key(i), reading, total, copies, shape) for i in (1, 2))

    rows = (shape.batch, shape.heads, shape.chunk * shape.group, shape.dim)
    query = jax.ShapeDtypeStruct(rows, jnp.float32)
    return Job(
        run=run, query=query, make=make, nbytes=nbytes, calls=calls, resident=copies * nbytes
    )


def encoder(shape: Shape, bits: int, *, interpret: bool = False) -> Job:
    """The Triton kernel that encodes T tokens of one side, turboquant_mse, into caches of S.

    Bytes are float32 vectors read and codes written; calls go through the cache.
    """
    from turboq_kernels.encode import store, triton

    codec = TurboQuantMSE(dim=shape.dim, bits=bits)
    writing, tables = codec.writing, store.tables_of(codec, {}, shape.heads)
    assert writing is not None
    everything = types.contiguous_pages(shape.batch, shape.heads, shape.tokens // PAGE)
    words = jax.ShapeDtypeStruct(
        (everything.table.size * shape.heads, bits, 8, shape.dim), "uint32"
    )
    counts = jnp.full((shape.batch,), shape.chunk, jnp.int32)
    nbytes = shape.batch * shape.heads * shape.chunk * shape.dim * (32 + bits) // 8
    calls = 2 if interpret else timing.count(nbytes)

    def run(x, words):
        def step(i, carry):
            x, words = carry
            starts = jnp.full_like(counts, i * shape.chunk % (shape.tokens - shape.chunk))
            words, rows = triton.write(
                x, writing, tables, words, everything, starts, counts, interpret=interpret
            )
            return x + rows[0][..., None] * TRACE, words

        return jax.lax.fori_loop(0, calls, step, (x, words))[0]

    query = jax.ShapeDtypeStruct((shape.batch, shape.heads, shape.chunk, shape.dim), jnp.float32)
    return Job(
        run=run, query=query, make=lambda: (jnp.zeros(words.shape, words.dtype),), nbytes=nbytes,
        calls=calls, resident=4 * math.prod(words.shape),
    )  # fmt: skip


def _side(key: Array, reading: Reading, total: int, copies: int, shape: Shape) -> types.Side:
    """Random words (every code equally likely), scales near 1, levels of a normal variable."""
    (part,) = reading.parts
    one = total // shape.batch  # random for one sequence, repeated
    words = jax.random.bits(key, (one, part.bits, 8, part.width), jnp.uint32)
    scales = jax.random.uniform(key, (one, PAGE), jnp.float16, 0.5, 1.5)
    if part.levels == "int8":
        scales = scales / jnp.float16(128.0)
    repeat = copies * shape.batch
    table = None
    if part.levels == "table":
        places = (jnp.arange(2**part.bits) + 0.5) / 2**part.bits
        table = jnp.tile(jax.scipy.special.ndtri(places)[None], (shape.heads, 1))
    return types.Side(
        words=(jnp.tile(words, (repeat, 1, 1, 1)),), scales=(jnp.tile(scales, (repeat, 1)),),
        offsets=(None,), tables=(table,), reading=reading,
    )  # fmt: skip
