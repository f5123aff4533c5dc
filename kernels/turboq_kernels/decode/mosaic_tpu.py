"""Decode on TPU (Pallas, Mosaic): packed pages are read by double-buffered copies and multiplied as
bit planes in the matrix unit; codes are never expanded to levels.

See `mosaic_tpu_planes` for the arithmetic, `mosaic_tpu_layout` for the order of tokens and
`mosaic_tpu_kernel` for the loop. The query is multiplied by the planes' weights and rounded to 16
bits (one unit per row and part), probabilities times scales to 16 bits of the largest of their
step; everything else is float32, levels are never rounded. On chips without an integer matrix unit
(v4, TPU7x) the two bytes of the query and two halves of the probabilities are bfloat16 instead.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from turboq_kernels import merge
from turboq_kernels.decode import mosaic_tpu_kernel as inner
from turboq_kernels.decode.mosaic_tpu_kernel import LOG2_E, PartSpec, Spec
from turboq_kernels.decode.mosaic_tpu_layout import (
    LANES,
    ScaleLayout,
    Step,
    buffer_shape,
    by_heads,
    fold_words,
    lies_by_heads,
    part_layout,
    scale_rows,
)
from turboq_kernels.decode.mosaic_tpu_planes import MAX_TABLE_BITS, subsets, weights
from turboq_kernels.decode.types import Pages, Partial, Side, whole_table
from turboq_kernels.target import tpu_generation

MAX_ROWS = 128  # query rows (tokens times group) of one KV head in one call
MAX_VMEM = 14 * 2**20  # of the 16 MiB that one kernel may use by default


def unsupported(q: Float[Array, "B N M C"], k: Side, v: Side, pages: Pages) -> str | None:
    """Why this kernel cannot run a case, or None."""
    if q.shape[2] > MAX_ROWS:
        return f"{q.shape[2]} query rows per KV head are more than {MAX_ROWS}"
    for side in (k, v):
        if side.rows not in (2, 8):
            return f"pages of {side.page} tokens; it reads 64 and 256"
        for part in side.reading.parts:
            if part.levels == "table" and part.bits > MAX_TABLE_BITS:
                return f"a {part.bits}-bit table; it reads up to {MAX_TABLE_BITS} bits"
    used = vmem_bytes(specify(q, k, v, pages)[0])
    if used > MAX_VMEM:
        return f"{q.shape[1]} heads of {q.shape[2]} query rows need {used} bytes of VMEM"
    return None


def vmem_bytes(spec: Spec) -> int:
    """Bytes of VMEM of the kernel's operands (twice: they are double-buffered) and scratch."""
    m, step, heads = spec.rows, spec.step, spec.heads
    row = m * LANES * 4
    queries = sum(
        spec.left_rows(p) * max(len(p.planes), 1) * p.layout.lanes * (1 if spec.integer(p) else 2)
        for p in spec.k
    )
    sums = sum(p.layout.fold * m * max(len(p.planes), 1) * p.layout.lanes * 4 for p in spec.v)
    windows = heads * (queries + sums + row * (3 * len(spec.k) + 1 + 2 + 2 * len(spec.v))) + 2 * row
    words = sum(4 * step.pages * math.prod(p.block) for p in spec.words)
    rooms = [_scale_buffer(s, step.pages) for s in spec.scales]
    scales = sum(math.prod(x.shape) * x.dtype.itemsize for x in rooms)
    blocks = len(step.blocks) * inner.GROUPS
    weights = sum(
        blocks // p.layout.fold * spec.left_rows(p) * LANES * (1 if spec.integer(p) else 2)
        for p in spec.v
    )
    first_terms = heads * len(spec.k) * inner.GROUPS * row
    gathered = len(spec.scales) * len(step.blocks) * 8 * LANES * 4
    return 2 * (windows + words) + scales + weights + first_terms + blocks * row + gathered


def integer_unit() -> bool:
    """Whether the matrix unit of the chip this is traced for multiplies int8.

    Without a TPU (interpret mode) the answer is yes.
    """
    return tpu_generation() in (None, 5, 6)


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
    interpret: bool | pltpu.InterpretParams = False,
    int8: bool | None = None,
    chunks: int | None = None,
    symmetric: bool = False,
) -> Partial:
    """See `turboq_kernels.decode.api.decode`.

    Args:
      splits: None is 1: a TPU core runs its grid one cell after the other.
      int8: use the integer matrix unit; None asks the chip.
      chunks: 1 or 2, steps of 1024 or 2048 tokens (for pages of 256 and 128 coordinates); None
        takes the longer ones where the page table has room for several.
      symmetric: promises level(~code) = -level(code) for every table, which saves planes.
    """
    m = q.shape[2]
    spec, buffers = specify(
        q, k, v, pages, softcap=softcap, splits=splits or 1, biased=bias is not None,
        int8=integer_unit() if int8 is None else int8, chunks=chunks, symmetric=symmetric,
    )  # fmt: skip
    table = whole_table(pages, spec.pages)
    extra = spec.rows - m
    q = jnp.pad(q.astype(jnp.float32), ((0, 0), (0, 0), (0, extra), (0, 0)))
    ends = jnp.minimum(ends, pages.table.shape[1] * k.page)
    starts, ends = (jnp.pad(x, ((0, 0), (0, extra))) for x in (starts, ends))
    bias = None if bias is None else jnp.pad(bias, ((0, 0), (0, 0), (0, extra)))
    queries, rows = _queries(spec, q, k, bias, scale / softcap if softcap else scale * LOG2_E)
    wide = [jnp.broadcast_to(x[..., None], (*x.shape, LANES)) for x in (starts, ends)]
    ready = Operands(table, _plan(spec, starts, ends), queries, rows, *wide)
    partial = _finish(spec, v, launch(spec, ready, k, v, buffers, interpret))
    whole = merge.merge(partial) if spec.splits > 1 else jax.tree.map(lambda x: x[0], partial)
    return Partial(acc=whole.acc[:, :, :m], top=whole.top[:, :, :m], total=whole.total[:, :, :m])


class Operands(NamedTuple):
    """What the kernel takes beside stored tokens; row vectors are the same in all lanes."""

    table: Any  # int32 [B, pages], of whole steps, times the stride of pages
    plan: Any  # int32 [B * splits * 3], see `steps_of`
    queries: Any  # of every part of K [B, N, *query_shape], int8 or bfloat16
    rows: Any  # float32 [B, N, *rows_shape], see `_queries`
    starts: Any  # int32 [B, M, 128], the slots that rows see
    ends: Any


def query_shape(spec: Spec, part: PartSpec) -> tuple[int, int]:
    """Of the left operand of one head: rows, and lanes of all planes."""
    return spec.left_rows(part), max(len(part.planes), 1) * part.layout.lanes


def rows_shape(spec: Spec) -> tuple[int, int, int]:
    """Of the row vectors of one head."""
    return 3 * len(spec.k) + 1, spec.rows, LANES


def sums_shape(spec: Spec, part: PartSpec) -> tuple[int, int]:
    """Of the sums over a part of V of one head."""
    return part.layout.fold * spec.rows, max(len(part.planes), 1) * part.layout.lanes


def _chunks(capacity: int) -> int:
    return 2 if capacity >= 8192 else 1


def specify(
    q, k: Side, v: Side, pages: Pages, *, softcap: float | None = None, splits: int = 1,
    biased: bool = False, int8: bool = True, chunks: int | None = None, symmetric: bool = False,
) -> tuple[Spec, list]:  # fmt: skip
    """What is static about a call, and its scale and offset buffers."""
    layouts = [[part_layout(p, side.rows) for p in side.reading.parts] for side in (k, v)]
    if all(x.page_rows == 8 for side in layouts for x in side):
        layouts = [[dataclasses.replace(x, whole=True) for x in side] for side in layouts]
    fold, count = max(x.fold for side in layouts for x in side), pages.table.shape[1]
    step = Step(k.rows, fold, _chunks(count * k.page) if chunks is None else chunks)
    buffers: list = []
    heads = q.shape[1]
    pooled = (pages.stride_page, pages.stride_head, pages.contiguous) == (heads, 1, False)
    k_parts = _parts(k, layouts[0], buffers, 0, symmetric)
    v_parts = _parts(v, layouts[1], buffers, len(k_parts), symmetric)
    spec = Spec(
        k=k_parts, v=v_parts, step=step,
        scales=tuple(
            ScaleLayout(
                str(x.dtype), k.page,
                heads if pooled and lies_by_heads(x.dtype, heads, k.page) else 0,
            )
            for x in buffers
        ),
        rows=-(-q.shape[2] // 8) * 8, heads=heads, splits=splits,
        pages=-(-count // step.pages) * step.pages, stride_head=pages.stride_head,
        bulk=pages.contiguous and layouts[0][0].whole and count % step.pages == 0,
        softcap=softcap, biased=biased, int8=int8,
    )  # fmt: skip
    return spec, buffers


def _parts(side: Side, layouts, buffers: list, first: int, symmetric: bool) -> tuple[PartSpec, ...]:
    """Specs of a side's parts; buffers that several parts share are read once."""
    seen: dict[str | None, int] = {}

    def held(name: str | None, buffer) -> int | None:
        if buffer is None:
            return None
        if name is None or name not in seen:
            buffers.append(buffer)
            seen[name] = len(buffers) - 1
        return seen[name]

    out = []
    for part, layout, scale, offset in zip(
        side.reading.parts, layouts, side.scales, side.offsets, strict=True
    ):
        planes = subsets(part, symmetric or part.symmetric)
        scale, offset = held(part.scale, scale), held(part.offset, offset)
        out.append(PartSpec(part, layout, first + len(out), scale, offset, planes))
    return tuple(out)


def steps_of(spec: Spec, low, high, split):
    """First step of a split, number (at least one), first slot not to be seen; low <= slot < high.

    Where nobody sees a token high is 0 and low anything from 0 on.
    """
    tokens = spec.step.tokens
    low, high = low // tokens, (high + tokens - 1) // tokens
    low = jnp.minimum(low, high)
    each = (high - low + spec.splits - 1) // spec.splits
    first = jnp.minimum(low + split * each, high)
    count = jnp.minimum(jnp.maximum(high - first, 0), each)
    return first, jnp.maximum(count, 1), (first + count) * tokens


def _plan(spec: Spec, starts, ends) -> Int[Array, "plan"]:
    """`steps_of` for all (b, split)."""
    any_row = ends > starts
    low = jnp.min(jnp.where(any_row, starts, jnp.iinfo(jnp.int32).max), axis=1)
    high = jnp.max(jnp.where(any_row, ends, 0), axis=1)
    split = jnp.arange(spec.splits, dtype=jnp.int32)[None, :]
    plan = jnp.stack(steps_of(spec, low[:, None], high[:, None], split), axis=-1)
    return plan.astype(jnp.int32).reshape(-1)


def _queries(spec: Spec, q, k: Side, bias, factor: float):
    """Left operands per part [B, N, rows, planes * lanes] and row vectors [B, N, .., M, 128].

    Row vectors of part i: unit of its integers times `factor`, its constant term in that unit, its
    sum of q times `factor`; last the bias times `factor`.
    """
    heads = spec.heads
    operands, rows = [], []
    for spec_part, start, table in zip(spec.k, k.reading.starts, k.tables, strict=True):
        part, layout = spec_part.part, spec_part.layout
        piece = q[..., start : start + part.width]
        total = jnp.sum(piece, axis=-1)
        piece = jnp.pad(piece, ((0, 0),) * 3 + ((0, layout.padded - part.width),))
        if spec_part.float_levels:
            high = piece.astype(jnp.bfloat16)
            low = (piece - high.astype(jnp.float32)).astype(jnp.bfloat16)
            both = [x[:, :, None, :, None, :] for x in (high, low)]  # 2 1 [B, N, 1, M, 1, C]
            unit, constant = jnp.ones_like(total), jnp.zeros_like(total)
        else:
            v, first = weights(part, spec_part.planes, table, heads)
            each = piece[:, :, :, None, :] * v[None, :, None, :, None]  # [B, N, M, planes, C]
            # Twice: no integer above 2**31 can arise in the sum over coordinates and planes.
            size = jnp.max(jnp.abs(each), axis=(3, 4)) / inner.PIECE
            size = jnp.maximum(size, jnp.sum(jnp.abs(each), axis=(3, 4)) * 2.0**-23)
            unit = jnp.where(size > 0, size, 1.0)
            whole = jnp.round(each / unit[..., None, None]).astype(jnp.int32)
            high = (whole + 128) >> 8
            kind = jnp.int8 if spec.int8 else jnp.bfloat16
            both = [x.astype(kind)[:, :, None] for x in (high, whole - (high << 8))]
            constant = first[None, :, None] * total / unit
        operands.append(_in_blocks(layout.fold, layout.lanes, spec.left_rows(spec_part), both))
        rows += [unit * factor, constant, total * factor]
    rows.append(jnp.zeros_like(rows[0]) if bias is None else bias * factor)
    stacked = jnp.stack(rows, axis=2)[..., None]
    return operands, jnp.broadcast_to(stacked, (*stacked.shape[:-1], LANES))


def _in_blocks(fold: int, lanes: int, rows: int, both):
    """[B, N, 1, M, planes, C] high and low -> [B, N, rows, planes * lanes], h in lane block h."""
    pieces = []
    for x in both:
        batch, heads, _, m, planes, width = x.shape
        for h in range(fold):
            room = ((0, 0),) * 5 + ((h * width, lanes - (h + 1) * width),)
            padded = jnp.pad(x, room).reshape(batch, heads, m, planes * lanes)
            pieces.append(padded)
    whole = jnp.concatenate(pieces, axis=2)
    return jnp.pad(whole, ((0, 0), (0, 0), (0, rows - whole.shape[2]), (0, 0)))


def _kept(buffer: Array, interpret) -> Array:
    """Where it is: the compiler would move small buffers into VMEM, and copies become loops."""
    return buffer if interpret else pltpu.with_memory_space_constraint(buffer, pltpu.HBM)


def _scale_buffer(layout: ScaleLayout, pages: int):
    if not layout.heads:
        return pltpu.VMEM((2, pages * layout.page_rows, LANES), jnp.uint32)
    shape = (inner.STEPS_HELD, layout.heads * layout.share(pages), layout.tile, layout.page)
    return pltpu.VMEM(shape, jnp.uint16 if layout.dtype == "float16" else jnp.bfloat16)


def launch(spec: Spec, ready: Operands, k: Side, v: Side, buffers, interpret) -> list[Array]:
    """Sums [splits, B, N, *sums_shape] of every part of V, then [splits, B, N, _, M, 128].

    The latter are, in every lane or to be summed over them: top in powers of two, total, and of
    every part the sum of weights and that of offsets.
    """
    words = [
        fold_words(w, layout) for w, layout in zip((*k.words, *v.words), spec.words, strict=True)
    ]
    scales = [
        by_heads(x, layout.heads) if layout.heads else scale_rows(x)
        for x, layout in zip(buffers, spec.scales, strict=True)
    ]
    queries, rows, wide = ready.queries, ready.rows, (ready.starts, ready.ends)
    batch, heads, m = rows.shape[0], spec.heads, spec.rows
    v_shapes = [sums_shape(spec, p) for p in spec.v]
    stats = 2 + 2 * len(spec.v)

    def block(shape):
        return pl.BlockSpec((1, *shape), lambda b, s, *_: (b, *(0 for _ in shape)))

    def split_block(shape):
        return pl.BlockSpec((1, 1, *shape), lambda b, s, *_: (s, b, *(0 for _ in shape)))

    out_shapes = [(heads, *shape) for shape in (*v_shapes, (stats, m, LANES))]
    step = spec.step
    scratch = [
        *(pltpu.VMEM((2, *buffer_shape(p, step.pages)), jnp.uint32) for p in spec.words),
        *(_scale_buffer(s, step.pages) for s in spec.scales),
        *(
            pltpu.VMEM(
                (len(step.blocks) // p.layout.fold, inner.GROUPS, spec.left_rows(p), LANES),
                jnp.int8 if spec.integer(p) else jnp.bfloat16,
            )
            for p in spec.v
        ),
        pltpu.VMEM((heads, len(spec.k), inner.GROUPS, m, LANES), jnp.float32),  # first terms
        pltpu.VMEM((len(step.blocks), inner.GROUPS, m, LANES), jnp.float32),  # logits
        pltpu.VMEM((max(len(spec.scales), 1), len(step.blocks), 8, LANES), jnp.float32),
        pltpu.VMEM((1 + len(spec.v), m, LANES), jnp.float32),  # factors
        pltpu.SemaphoreType.DMA((4, 2)),
    ]
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(batch, spec.splits),
        in_specs=[
            *(block(x.shape[1:]) for x in (*queries, rows, *wide)),
            *(pl.BlockSpec(memory_space=pltpu.HBM) for _ in (*words, *scales)),
        ],
        out_specs=[split_block(shape) for shape in out_shapes],
        scratch_shapes=scratch,
    )
    words, scales = ([_kept(x, interpret) for x in held] for held in (words, scales))
    found = pl.pallas_call(
        functools.partial(inner.kernel, spec),
        out_shape=[
            jax.ShapeDtypeStruct((spec.splits, batch, *shape), jnp.float32) for shape in out_shapes
        ],
        grid_spec=grid_spec,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"),
            # A check per copy costs as much as the copy's start. The table holds pages of the
            # buffer by contract; tests run with out-of-bounds detection instead.
            disable_bounds_checks=True,
        ),
        interpret=interpret,
        name="turboq_decode",
    )(ready.table, ready.plan, *queries, rows, *wide, *words, *scales)
    return list(found)


def _finish(spec: Spec, v: Side, outs) -> Partial:
    """Partial states [splits, B, N, M, ..] from sums over planes and rows of lanes."""
    *sums, stats = outs
    total = jnp.sum(stats[:, :, :, 1], axis=-1)
    top = stats[:, :, :, 0, :, 0] * (1 / LOG2_E)
    pieces = []
    for i, (spec_part, table, planes) in enumerate(zip(spec.v, v.tables, sums, strict=True)):
        layout, m = spec_part.layout, spec.rows
        mass, offset = (jnp.sum(stats[:, :, :, j], axis=-1) for j in (2 + 2 * i, 3 + 2 * i))
        count = max(len(spec_part.planes), 1)
        shape = (*planes.shape[:3], layout.fold, m, count, layout.fold, layout.padded)
        # Row block h holds the tokens of lane block h: the others are other tokens' channels.
        blocks = planes.reshape(shape)
        own = blocks[:, :, :, 0, :, :, 0]
        for h in range(1, layout.fold):
            own = own + blocks[:, :, :, h, :, :, h]
        if spec_part.float_levels:
            acc = own[..., 0, :]
        else:
            w, first = weights(spec_part.part, spec_part.planes, table, spec.heads)
            acc = jnp.einsum("sbnmpc,np->sbnmc", own, w, precision=jax.lax.Precision.HIGHEST)
            acc = acc + (first[None, None, :, None] * mass)[..., None]
        pieces.append(acc[..., : layout.width] + offset[..., None])
    return Partial(acc=jnp.concatenate(pieces, axis=-1), top=top, total=total)
