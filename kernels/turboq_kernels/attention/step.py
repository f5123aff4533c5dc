"""A head group's attention of a few query rows on an accelerator: three launches for all tokens.

Before and after the decode kernel `turboq_kernels.decode.triton_step` or `mosaic_tpu_step` does
what the general way (`turboq_kernels.attention.base`) leaves to XLA.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from turboq.cache.layer import HeadGroup
from turboq_kernels import sides
from turboq_kernels.attention import maps
from turboq_kernels.decode import api as decoding
from turboq_kernels.spans import Rules
from turboq_kernels.views import GroupView

# Exact tokens: k, v, positions (None: those of sinks), whether heads are before tokens.
Segment = tuple[Any, Any, Any, bool]
# Positions of queries [B, T], tokens of sequences [B], positions of their first slots ([B] or 0).
Where = tuple[Any, Any, Any]


def supported(
    group: HeadGroup, view: GroupView, rows: tuple[int, ...], exact: list[Segment], options: Any
) -> bool:
    """Whether the kernel that would read these query rows [B, N, M, D] has such launches."""
    return _way(group, view, rows, exact, options) is not None


def _way(group: HeadGroup, view: GroupView, rows, exact, options: Any) -> Any:
    """How to attend, or None."""
    on_tpu = options.implementation == "mosaic_tpu" or jax.default_backend() == "tpu"
    k, v = _sides(group, view, coded=not on_tpu)
    q = jnp.zeros((*rows[:3], k.reading.width))  # only asked for its shape
    name = decoding.choose(q, k, v, view.pages, options.implementation, options.interpret)
    if name == "triton":
        return _on_gpu if _fits_gpu(group, rows, k, v) else None
    if name == "mosaic_tpu":
        return _on_tpu if _fits_tpu(group, view, q, exact, options) else None
    return None


def attend(
    q: Float[Array, "B N M D"],
    group: HeadGroup,
    view: GroupView,
    where: Where,
    exact: list[Segment],
    sink: Float[Array, "N M"] | None,
    *,
    rules: Rules,
    options: Any,
) -> Float[Array, "B T H E"]:
    """Outputs of the group's query heads; q may be of any float type."""
    way = _way(group, view, q.shape, exact, options)
    return way(q, group, view, where, exact, sink, rules, options)


def _fits_gpu(group: HeadGroup, rows, k, v) -> bool:
    step = importlib.import_module("turboq_kernels.decode.triton_step")
    if rows[0] > step.MAX_BATCH:
        return False
    widths = (k.reading.width, v.reading.width, group.k.dim, group.v.dim)
    return step.rows_held(rows[2]) * max(map(pl.next_power_of_2, widths)) <= step.MAX_TILE


def _on_gpu(
    q, group: HeadGroup, view: GroupView, where: Where, exact, sink, rules: Rules, options: Any
) -> Float[Array, "B T H E"]:
    from turboq_kernels.decode import triton, triton_kernel, triton_step

    (k, v), heads = _sides(group, view, coded=True), len(group.heads)
    batch, _, m, _ = q.shape
    rows = max(8, pl.next_power_of_2(m))
    tuned = triton.tuning(k, v, rows)
    plan, count = triton_kernel.planned(
        (batch, heads, m), k, v, view.pages, scale=options.scale, softcap=options.softcap,
        splits=options.splits, interpret=options.interpret, tuned=tuned, rows=rows,
    )  # fmt: skip
    plan = dataclasses.replace(plan, clamped=True)
    into = maps.of_queries(group.k, group.k_arrays, heads)
    out = maps.of_outputs(group.v, group.v_arrays, heads)
    seen = triton_step.Seen(*where[:2], None if isinstance(where[2], int) else where[2])
    ready = triton_step.prepare(
        q, into.matrix, into.constant, seen, rules, plan=plan, count=count, splits=options.splits
    )
    found = triton_kernel.launch(
        ready.folded, k, v, view.pages, ready.starts, ready.ends, ready.parts, bias=ready.bias,
        plan=plan, count=count, tuned=tuned, name="turboq_decode",
    )  # fmt: skip
    return triton_step.finish(
        q, found, ready.start, [triton_step.Exact(*segment) for segment in exact], seen, rules,
        sink, out.matrix, out.constant, plan=plan,
    )  # fmt: skip


def _fits_tpu(group: HeadGroup, view: GroupView, q, exact: list[Segment], options: Any) -> bool:
    from turboq_kernels.decode import mosaic_tpu, mosaic_tpu_step

    if options.splits not in (None, 1):
        return False
    spec, _ = mosaic_tpu.specify(q, *_sides(group, view), view.pages)
    tokens = sum(k.shape[2 if first else 1] for k, _, _, first in exact)
    maps_held = max(
        len(group.heads) if arrays else 1 for arrays in (group.k_arrays, group.v_arrays)
    )
    dims = group.k.dim, group.v.dim
    return mosaic_tpu_step.vmem_bytes(spec, dims, tokens, maps_held) <= mosaic_tpu_step.MAX_VMEM


def _on_tpu(
    q, group: HeadGroup, view: GroupView, where: Where, exact, sink, rules: Rules, options: Any
) -> Float[Array, "B T H E"]:
    from turboq_kernels.decode import mosaic_tpu, mosaic_tpu_step

    (k, v), heads = _sides(group, view), len(group.heads)
    into = maps.of_queries(group.k, group.k_arrays, heads)
    out = maps.of_outputs(group.v, group.v_arrays, heads)
    spec, buffers = mosaic_tpu.specify(
        q, k, v, view.pages, softcap=options.softcap, biased=into.constant is not None,
        int8=mosaic_tpu.integer_unit(),
    )  # fmt: skip
    seen = mosaic_tpu_step.Seen(*where)
    ready = mosaic_tpu_step.prepare(
        q, into.matrix, into.constant, seen, rules, spec=spec, k=k, pages=view.pages,
        scale=options.scale, interpret=options.interpret,
    )  # fmt: skip
    *sums, stats = mosaic_tpu.launch(spec, ready, k, v, buffers, options.interpret)
    segments = [
        mosaic_tpu_step.Exact(*(_heads_first(x, first, view) for x in (k, v)), positions)
        for k, v, positions, first in exact
    ]
    outs = mosaic_tpu_step.finish(
        q, sums, stats, segments, seen, rules, sink, out.matrix, out.constant, spec=spec, v=v,
        scale=options.scale, interpret=options.interpret,
    )  # fmt: skip
    return outs.reshape(*outs.shape[:2], -1, outs.shape[-1])


def _heads_first(x: Array, already: bool, view: GroupView) -> Float[Array, "B N S D"]:
    """As what is exact was rounded, which XLA sees through; float16 is not for TPU kernels."""
    kind = jnp.dtype(view.k_sinks.dtype)
    kind = jnp.dtype(jnp.float32) if kind == jnp.float16 else kind
    return (x if already else x.swapaxes(1, 2)).astype(kind)


def _sides(group: HeadGroup, view: GroupView, *, coded: bool = False):
    """Stored K and V; a codec without arrays has its tables once for all heads."""
    return tuple(
        sides.side(
            codec, arrays, stored, view.heads, len(group.heads) if arrays else 1, coded=coded
        )
        for codec, arrays, stored in (
            (group.k, group.k_arrays, view.k), (group.v, group.v_arrays, view.v),
        )
    )  # fmt: skip
