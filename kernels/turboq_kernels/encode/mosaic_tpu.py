"""Encode on TPU (Pallas, Mosaic): rotate, scale, code and pack in registers, pages by copies.

`chunk` is for prefill: x is moved in XLA so that row i of a tile of 256 vectors is slot i of its
pages, and bits are gathered without a move. `append` is for a few tokens of many sequences: one
product for all of them, then every token's bits go to its row. Both read an old page only where it
holds earlier tokens and write pages that their tokens touch, no others.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, UInt32

from turboq.codecs.writing import WriteTables, Writing
from turboq.numbers.packing import WORD_BITS
from turboq_kernels.decode.types import Pages
from turboq_kernels.encode import mosaic_tpu_codes as codes
from turboq_kernels.encode.mosaic_tpu_kernel import Spec, append_kernel, append_spans, chunk_kernel
from turboq_kernels.encode.mosaic_tpu_pages import LANES, SUBLANES, FieldSpec, fold

MAX_BITS = 4
MAX_DIM = 256
APPEND = 8  # tokens of a sequence that `append` takes
SEQUENCES = 16  # of one step of `append`
TILE = 256


def unsupported(writing: Writing, dim: int, page: int) -> str | None:
    """Why this kernel cannot encode, or None."""
    if page not in (64, 256):
        return f"pages of {page} tokens; it writes 64 and 256"
    if dim > MAX_DIM:
        return f"{dim} coordinates; it encodes up to {MAX_DIM}"
    for run in writing.parts:
        if run.bits > MAX_BITS:
            return f"a {run.bits}-bit table; it writes up to {MAX_BITS} bits"
    return None


def specify(writing: Writing, dim: int, page: int, stride_head: int) -> Spec:
    """What is static about a call."""
    spec, rows = codes.code_spec(writing, dim), page // WORD_BITS
    fields = [
        FieldSpec(run.bits, run.width, rows, place)
        for run, place in zip(writing.parts, spec.places, strict=True)
    ]
    if writing.signs is not None:
        fields.append(FieldSpec(1, spec.coded, rows, 0))
    return Spec(spec, tuple(fields), page, stride_head)


def write(
    x: Float[Array, "B N T D"],
    writing: Writing,
    tables: WriteTables,
    words: tuple[UInt32[Array, "R _ r _"], ...],
    pages: Pages,
    starts: Int[Array, "B"],
    counts: Int[Array, "B"],
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[tuple[UInt32[Array, "R _ r _"], ...], tuple[Float[Array, "B N T"], ...]]:
    """See `turboq_kernels.encode.types.Write`."""
    page = words[0].shape[-2] * WORD_BITS
    spec = specify(writing, x.shape[-1], page, pages.stride_head)
    held = codes.operands(spec.codes, tables)
    folded = [fold(w, f) for w, f in zip(words, spec.fields, strict=True)]
    if not interpret:  # the compiler would move small buffers into VMEM, and copies become loops
        folded = [pltpu.with_memory_space_constraint(w, pltpu.HBM) for w in folded]
    call = _append if x.shape[2] <= APPEND else _chunk
    new, rows = call(spec, x, held, folded, pages, starts, counts, interpret)
    return tuple(w.reshape(old.shape) for w, old in zip(new, words, strict=True)), rows


def _entries(pages: Pages, first: Int[Array, "B"], count: int) -> Int[Array, "e"]:
    """Table entries of `count` pages of every sequence, times their stride."""
    at = jnp.minimum(
        first[:, None] + jnp.arange(count, dtype=jnp.int32)[None, :], pages.table.shape[1] - 1
    )
    return (jnp.take_along_axis(pages.table, at, axis=1) * pages.stride_page).reshape(-1)


def _chunk(spec: Spec, x, held, words, pages: Pages, starts, counts, interpret):
    batch, heads, tokens, dim = x.shape
    per_tile = TILE // spec.page
    # The first token lies anywhere in the first page.
    tiles = -(-(spec.page - 1 + tokens) // TILE)
    length, skip = tiles * TILE, starts % spec.page

    def moved(x, skip):
        x = jnp.pad(x, ((0, 0), (spec.page, length - tokens), (0, 0)))
        return jax.lax.dynamic_slice_in_dim(x, spec.page - skip, length, axis=1)

    def numbers_of(out):
        """[N, B, tiles, 2 * rows, 128] -> [rows, B, N, T]."""
        out = out.reshape(heads, batch, tiles, -1, TILE).transpose(3, 1, 0, 2, 4)
        out = out.reshape(-1, batch, heads, length)
        take = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=tokens, axis=2)
        return jax.vmap(take, in_axes=(1, 0), out_axes=1)(out, skip)

    per_number = TILE // LANES
    return _call(
        spec,
        functools.partial(chunk_kernel, spec, TILE),
        grid=(heads, batch, tiles),
        scalars=(starts, counts, _entries(pages, starts // spec.page, tiles * per_tile)),
        x=jax.vmap(moved)(x, skip),
        x_spec=pl.BlockSpec((None, None, TILE, dim), lambda n, b, i, *_: (b, n, i, 0)),
        held=held,
        words=words,
        buffers=(2, per_tile),
        number_shape=(heads, batch, tiles, per_number * len(spec.codes.writing.rows), LANES),
        number_blocks=3,
        numbers_of=numbers_of,
        scratch=[
            *(pltpu.VMEM(f.block, jnp.uint32) for f in spec.fields),
            registers(spec, per_tile),
            pltpu.SMEM((2,), jnp.int32),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA,
        ],
        interpret=interpret,
    )


def _append(spec: Spec, x, held, words, pages: Pages, starts, counts, interpret):
    batch, heads, tokens, dim = x.shape
    sequences = min(batch, SEQUENCES)
    groups = -(-batch // sequences)
    room = groups * sequences - batch  # sequences without tokens
    x = jnp.pad(x, ((0, room), (0, 0), (0, 0), (0, 0)))
    starts, counts = (jnp.pad(a, (0, room)) for a in (starts, counts))
    pages = dataclasses.replace(pages, table=jnp.pad(pages.table, ((0, room), (0, 0))))
    x = x.swapaxes(0, 1).reshape(heads, groups, sequences * tokens, dim)
    height = -(-sequences * tokens // SUBLANES) * SUBLANES
    x = jnp.pad(x, ((0, 0), (0, 0), (0, height - sequences * tokens), (0, 0)))

    def numbers_of(out):
        out = out[:, :, : sequences * tokens, : len(spec.codes.writing.rows)]
        out = out.reshape(heads, groups * sequences, tokens, -1)[:, :batch]
        return out.transpose(3, 1, 0, 2)

    spans = append_spans(tokens)
    return _call(
        spec,
        functools.partial(append_kernel, spec, sequences, tokens),
        grid=(heads, groups),
        scalars=(starts, counts, _entries(pages, starts // spec.page, spans)),
        x=x,
        x_spec=pl.BlockSpec((None, None, height, dim), lambda n, g, *_: (n, g, 0, 0)),
        held=held,
        words=words,
        buffers=(sequences, spans),
        number_shape=(heads, groups, height, LANES),
        number_blocks=2,
        numbers_of=numbers_of,
        scratch=[
            registers(spec, 1),
            pltpu.VMEM((height, spec.codes.lanes), jnp.uint32),
            pltpu.SemaphoreType.DMA,
            pltpu.SemaphoreType.DMA((sequences,)),
        ],
        interpret=interpret,
    )


def registers(spec: Spec, pages: int):
    """Where the bits of pages meet (`mosaic_tpu_pages`)."""
    return pltpu.VMEM((pages, spec.planes, spec.codes.lanes // LANES, SUBLANES, LANES), jnp.uint32)


def _call(
    spec: Spec, body, *, grid, scalars, x, x_spec, held, words, buffers, number_shape,
    number_blocks, numbers_of, scratch, interpret,
):  # fmt: skip
    """Runs a body; returns words and row numbers."""
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    out_shape = [jax.ShapeDtypeStruct(w.shape, w.dtype) for w in words]
    out_specs, rows = [hbm] * len(words), spec.codes.writing.rows
    if rows:
        block = (*(None for _ in range(number_blocks)), *number_shape[number_blocks:])
        inside = (0,) * (len(number_shape) - number_blocks)
        out_shape.append(jax.ShapeDtypeStruct(number_shape, jnp.float32))
        out_specs.append(pl.BlockSpec(block, lambda *g: (*g[:number_blocks], *inside)))
    first = len(scalars) + 1 + len(held)
    outs = pl.pallas_call(
        body,
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=[
                x_spec,
                *(pl.BlockSpec((None, *a.shape[1:]), lambda n, *_: (n, 0, 0)) for a in held),
                *(hbm for _ in words),
            ],
            out_specs=out_specs,
            scratch_shapes=[
                *(pltpu.VMEM((*buffers, *f.block), jnp.uint32) for f in spec.fields),
                *scratch,
            ],
        ),
        input_output_aliases={first + i: i for i in range(len(words))},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", *("arbitrary" for _ in grid[1:])),
            # The table holds pages of the buffer by contract; tests run with detection instead.
            disable_bounds_checks=True,
        ),
        interpret=interpret,
        name="turboq_encode",
    )(*(a.astype(jnp.int32) for a in scalars), x, *held, *words)
    numbers = tuple(numbers_of(outs[-1])) if rows else ()
    return outs[: len(words)], numbers
