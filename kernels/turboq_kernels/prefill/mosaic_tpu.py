"""Prefill on TPU (Pallas, Mosaic): tiles of many query rows over packed pages, and over exact keys.

Stored tokens are unpacked to bfloat16 levels once per tile of up to 512 rows
(`mosaic_tpu_history`); the decode kernel's products of bit planes would cost the matrix unit more
than unpacking costs here. Exact tokens are read by flash attention (`mosaic_tpu_own`). Both skip
what no row of a tile sees.

Rounding: level tables and weights to bfloat16 (the sum of weights is not), queries and exact keys
and values to two bfloat16 numbers; everything else is float32.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from turboq_kernels.decode.mosaic_tpu_layout import (
    ScaleLayout,
    buffer_shape,
    fold_words,
    part_layout,
    scale_rows,
)
from turboq_kernels.decode.mosaic_tpu_planes import MAX_TABLE_BITS
from turboq_kernels.decode.types import Pages, Partial, Side, whole_table
from turboq_kernels.prefill import mosaic_tpu_history as inner
from turboq_kernels.prefill import mosaic_tpu_levels as levels
from turboq_kernels.prefill import mosaic_tpu_softmax as softmax
from turboq_kernels.prefill.mosaic_tpu_history import PartSpec, Spec, Step
from turboq_kernels.prefill.mosaic_tpu_own import own as own
from turboq_kernels.prefill.mosaic_tpu_softmax import LANES

MAX_VMEM = 14 * 2**20  # of the 16 MiB that one kernel may use by default


def unsupported(q: Float[Array, "B N M C"], k: Side, v: Side, pages: Pages) -> str | None:
    """Why `history` cannot run a case, or None."""
    for side in (k, v):
        if side.rows not in (2, 8):
            return f"pages of {side.page} tokens; it reads 64 and 256"
        for part in side.reading.parts:
            if part.levels == "table" and part.bits > MAX_TABLE_BITS:
                return f"a {part.bits}-bit table; it reads up to {MAX_TABLE_BITS} bits"
    used = vmem_bytes(specify(q, k, v, pages)[0])
    if used > MAX_VMEM:
        return f"{k.reading.width} and {v.reading.width} coordinates need {used} bytes of VMEM"
    return None


def vmem_bytes(spec: Spec) -> int:
    """Bytes of VMEM of the kernel's operands (twice: they are double-buffered) and scratch."""
    tile, step = spec.tiling.tile, spec.step
    row = tile * LANES * 4
    keys, sums = spec.width(spec.k), spec.width(spec.v)
    windows = tile * (2 * 2 * keys + 4 * sums) + row * (2 + (spec.extras > 0))
    words = sum(4 * step.pages * math.prod(p.layout.block) for p in spec.parts)
    scales = sum(step.pages * s.page_rows * LANES * 4 for s in spec.scales)
    unpacked = 2 * step.tokens * (keys + sums)
    logits = 3 * spec.tiling.run * step.tokens * 4
    return 2 * (windows + words + scales) + row * (2 + len(spec.v)) + unpacked + logits


def history(
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
    interpret: bool | pltpu.InterpretParams = False,
) -> Partial:
    """See `turboq_kernels.prefill.kernels.history`."""
    spec, buffers = specify(q, k, v, pages, softcap=softcap, biased=bias is not None)
    table = whole_table(pages, spec.pages)
    ends = jnp.minimum(ends, pages.table.shape[1] * k.page)
    factor = softmax.factor(scale, softcap)
    q = q.astype(jnp.float32) * factor
    bias = None if bias is None else bias * factor
    acc, stats = _call(
        spec, interpret, table.reshape(-1), plan(spec.tiling, spec.step.tokens, starts, ends - 1),
        _entries(spec, k, v), _queries(spec, q, k), softmax.bounds(starts, ends - 1, spec.tiling),
        _extras(spec, q, k, bias),
        [fold_words(w, p.layout) for w, p in zip((*k.words, *v.words), spec.parts, strict=True)],
        [scale_rows(x) for x in buffers],
    )  # fmt: skip
    pieces = [acc[:, :, : q.shape[2], p.column : p.column + p.part.width] for p in spec.v]
    return softmax.finish(jnp.concatenate(pieces, axis=-1), stats, q.shape[2])


def specify(
    q, k: Side, v: Side, pages: Pages, *, softcap: float | None = None, biased: bool = False
) -> tuple[Spec, list]:
    """What is static about a call, and its scale and offset buffers."""
    layouts = [[part_layout(p, side.rows) for p in side.reading.parts] for side in (k, v)]
    if all(x.page_rows == 8 for side in layouts for x in side):
        layouts = [[dataclasses.replace(x, whole=True) for x in side] for side in layouts]
    fold, count = max(x.fold for side in layouts for x in side), pages.table.shape[1]
    step = Step(k.rows, fold, 2 if fold == 1 else 1)
    buffers: list = []
    parts: list[tuple[PartSpec, ...]] = []
    entries = words = 0
    for side, side_layouts in zip((k, v), layouts, strict=True):
        seen: dict[str, int] = {}

        def held(name: str | None, buffer, seen=seen) -> int | None:
            if buffer is None:
                return None
            if name is not None and name in seen:
                return seen[name]
            buffers.append(buffer)
            if name is not None:
                seen[name] = len(buffers) - 1
            return len(buffers) - 1

        out, column = [], 0
        for part, layout, scale, offset in zip(
            side.reading.parts, side_layouts, side.scales, side.offsets, strict=True
        ):
            scale, offset = held(part.scale, scale), held(part.offset, offset)
            out.append(
                PartSpec(part, layout, part.symmetric, words, scale, offset, entries, column)
            )
            entries += levels.entry_count(part, part.symmetric)
            words, column = words + 1, column + layout.lanes
        parts.append(tuple(out))
    spec = Spec(
        k=parts[0], v=parts[1], step=step, tiling=softmax.tiling(q.shape[2]),
        scales=tuple(ScaleLayout(str(x.dtype), k.page) for x in buffers), entries=entries + 1,
        pages=-(-count // step.pages) * step.pages, stride_head=pages.stride_head,
        softcap=softcap, biased=biased,
    )  # fmt: skip
    return spec, buffers


def plan(tiles: softmax.Tiling, tokens: int, low, high) -> Int[Array, "plan"]:
    """First step and number of steps of `tokens` that some row of each (b, tile) sees.

    Rows see the numbers low[b, m] to high[b, m], both included.
    """
    seen = (high >= low) & (high >= 0)
    first = jnp.where(seen, jnp.maximum(low, 0), jnp.iinfo(jnp.int32).max) // tokens
    end = jnp.where(seen, high // tokens + 1, 0)
    first = jnp.pad(first, ((0, 0), (0, tiles.padded - tiles.rows)), mode="edge")
    end = softmax.pad_rows(end, tiles, 1)
    by_tile = (first.shape[0], tiles.tiles, tiles.tile)
    first, end = jnp.min(first.reshape(by_tile), axis=2), jnp.max(end.reshape(by_tile), axis=2)
    count = jnp.maximum(end - first, 0)
    return jnp.stack([first, count], axis=-1).astype(jnp.int32).reshape(-1)


def _entries(spec: Spec, k: Side, v: Side) -> Int[Array, "entries"]:
    heads = next((t.shape[0] for t in (*k.tables, *v.tables) if t is not None), 1)
    tables = (*k.tables, *v.tables)
    found = [
        levels.entries(p.part, p.symmetric, t, heads)
        for p, t in zip(spec.parts, tables, strict=True)
    ]
    # At least one: there is no empty operand.
    return jnp.pad(jnp.concatenate(found, axis=1), ((0, 0), (0, 1))).reshape(-1)


def _queries(spec: Spec, q, k: Side):
    """bfloat16 [B, N, runs, 2 run, lanes], each part's coordinates at its column."""
    pieces = []
    for part, start in zip(spec.k, k.reading.starts, strict=True):
        piece = q[..., start : start + part.part.width]
        room = part.layout.lanes - part.part.width
        pieces.append(jnp.pad(piece, ((0, 0), (0, 0), (0, 0), (0, room))))
    return softmax.halves(jnp.concatenate(pieces, axis=-1), spec.tiling)


def _extras(spec: Spec, q, k: Side, bias):
    """float32 [B, N, M, 128] of the columns that `Spec.extras` counts, or nothing."""
    columns = [] if bias is None else [bias]
    for part, start in zip(spec.k, k.reading.starts, strict=True):
        if part.offset is not None:
            columns.append(jnp.sum(q[..., start : start + part.part.width], axis=-1))
    if not columns:
        return []
    stacked = softmax.pad_rows(jnp.stack(columns, axis=-1), spec.tiling, 2)
    return [jnp.pad(stacked, ((0, 0), (0, 0), (0, 0), (0, LANES - len(columns))))]


def _call(spec: Spec, interpret, table, planned, entries, queries, bounds, extras, words, scales):
    batch, heads = queries.shape[:2]
    tiles, step = spec.tiling, spec.step

    def rows(width):
        return pl.BlockSpec((1, 1, tiles.tile, width), lambda b, n, i, *_: (b, n, i, 0))

    outs = [(batch, heads, tiles.padded, w) for w in (spec.width(spec.v), LANES)]
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(batch, heads, tiles.tiles),
        in_specs=[
            pl.BlockSpec(
                (1, 1, tiles.runs, *queries.shape[3:]), lambda b, n, i, *_: (b, n, i, 0, 0)
            ),
            pl.BlockSpec((1, tiles.tile, LANES), lambda b, n, i, *_: (b, i, 0)),
            *(rows(LANES) for _ in extras),
            *(pl.BlockSpec(memory_space=pltpu.HBM) for _ in (*words, *scales)),
        ],
        out_specs=[rows(shape[-1]) for shape in outs],
        scratch_shapes=[
            *(pltpu.VMEM((2, *buffer_shape(p.layout, step.pages)), jnp.uint32) for p in spec.parts),
            *(pltpu.VMEM((2, step.pages * s.page_rows, LANES), jnp.uint32) for s in spec.scales),
            *(pltpu.VMEM((tiles.tile, LANES), jnp.float32) for _ in range(2)),
            pltpu.VMEM((len(spec.v), tiles.tile, LANES), jnp.float32),
            pltpu.SemaphoreType.DMA((2,)),
        ],
    )
    if not interpret:  # the compiler would move small buffers into VMEM, and copies become loops
        words, scales = (
            [pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in held]
            for held in (words, scales)
        )
    return pl.pallas_call(
        functools.partial(inner.kernel, spec),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in outs],
        grid_spec=grid_spec,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel"),
            # As in decode: a check per copy costs as much as the copy's start.
            disable_bounds_checks=True,
        ),
        interpret=interpret,
        name="turboq_prefill",
    )(table, planned, entries, queries, bounds, *extras, *words, *scales)
