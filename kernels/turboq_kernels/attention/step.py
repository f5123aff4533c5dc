"""A head group's attention of a few query rows on a GPU: three launches for all its tokens.

`turboq_kernels.decode.triton_step` before and after the decode kernel does what the general way
(`turboq_kernels.attention.base`) leaves to XLA.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

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
_IMPLEMENTATION = "triton"


def supported(group: HeadGroup, view: GroupView, rows: tuple[int, ...], options: Any) -> bool:
    """Whether these query rows [B, N, M, D] are what the decode kernel of a GPU would read."""
    k, v = _sides(group, view)
    q = jnp.zeros((*rows[:3], k.reading.width))  # only asked for its shape
    name = decoding.choose(q, k, v, view.pages, options.implementation, options.interpret)
    if name != _IMPLEMENTATION:
        return False
    step = importlib.import_module("turboq_kernels.decode.triton_step")
    if rows[0] > step.MAX_BATCH:
        return False
    widths = (k.reading.width, v.reading.width, group.k.dim, group.v.dim)
    return step.rows_held(rows[2]) * max(map(pl.next_power_of_2, widths)) <= step.MAX_TILE


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
    from turboq_kernels.decode import triton, triton_kernel, triton_step

    (k, v), heads = _sides(group, view), len(group.heads)
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


def _sides(group: HeadGroup, view: GroupView):
    """Stored K and V; a codec without arrays has its tables once for all heads."""
    return tuple(
        sides.side(
            codec, arrays, stored, view.heads, len(group.heads) if arrays else 1, coded=True
        )
        for codec, arrays, stored in (
            (group.k, group.k_arrays, view.k), (group.v, group.v_arrays, view.v),
        )
    )  # fmt: skip
