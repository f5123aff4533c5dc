"""A head group's attention of a few query rows on an accelerator: three launches for all tokens.

Before and after the decode kernel `turboq_kernels.decode.triton_step` or `mosaic_tpu_step` does
what the general way (`turboq_kernels.attention.base`) leaves to XLA.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

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


class Recent(NamedTuple):
    """Exact tokens that are no sinks."""

    k: Any  # [B, S, N, D]
    v: Any  # [B, S, N, E]
    positions: Any  # int32 [B, S]


class Where(NamedTuple):
    """Positions of query tokens, tokens of sequences, positions of their first slots."""

    at: Any  # int32 [B, T]
    lengths: Any  # int32 [B]
    first: Any  # int32 [B], or 0


# Outputs [B, T, H, E] of a group's heads from (query rows [B, N, M, D] of any float type, group,
# view, where, recent or None, logit sinks [N, M] or None, rules, options).
Way = Callable[..., Any]


def way(
    group: HeadGroup, view: GroupView, rows: tuple[int, ...], recent: int, options: Any
) -> Way | None:
    """Launches around the kernel that would read query rows [B, N, M, D]; None: it has none."""
    on_tpu = options.implementation == "mosaic_tpu" or jax.default_backend() == "tpu"
    k, v = _sides(group, view, coded=not on_tpu)
    q = jnp.zeros((*rows[:3], k.reading.width))  # only asked for its shape
    name = decoding.choose(q, k, v, view.pages, options.implementation, options.interpret)
    if name == "triton":
        return _on_gpu if _fits_gpu(group, rows, k, v) else None
    if name == "mosaic_tpu":
        return _on_tpu if _fits_tpu(group, view, q, recent, options) else None
    return None


def _fits_gpu(group: HeadGroup, rows, k, v) -> bool:
    step = importlib.import_module("turboq_kernels.decode.triton_step")
    if rows[0] > step.MAX_BATCH:
        return False
    widths = (k.reading.width, v.reading.width, group.k.dim, group.v.dim)
    return step.rows_held(rows[2]) * max(map(pl.next_power_of_2, widths)) <= step.MAX_TILE


def _on_gpu(
    q,
    group: HeadGroup,
    view: GroupView,
    where: Where,
    recent: Recent | None,
    sink,
    rules: Rules,
    options: Any,
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
    first = None if isinstance(where.first, int) else where.first
    seen = triton_step.Seen(where.at, where.lengths, first)
    exact = []
    if rules.policy.sinks:
        k_sinks, v_sinks = view.sinks()
        exact.append(triton_step.Exact(k_sinks, v_sinks, None, True))
    if recent is not None:
        exact.append(triton_step.Exact(recent.k, recent.v, recent.positions, False))
    ready = triton_step.prepare(
        q, into.matrix, into.constant, seen, rules, plan=plan, count=count, splits=options.splits
    )
    found = triton_kernel.launch(
        ready.folded, k, v, view.pages, ready.starts, ready.ends, ready.parts, bias=ready.bias,
        plan=plan, count=count, tuned=tuned, name="turboq_decode",
    )  # fmt: skip
    return triton_step.finish(
        q, found, ready.start, exact, seen, rules, sink, out.matrix, out.constant, plan=plan
    )


def _fits_tpu(group: HeadGroup, view: GroupView, q, recent: int, options: Any) -> bool:
    from turboq_kernels.decode import mosaic_tpu, mosaic_tpu_step

    if options.splits not in (None, 1):
        return False
    k, v = _sides(group, view)
    spec, _ = mosaic_tpu.specify(q, k, v, view.pages)
    tokens = view.k_sinks.shape[2] + recent
    maps_held = max(
        len(group.heads) if arrays else 1 for arrays in (group.k_arrays, group.v_arrays)
    )
    dims = group.k.dim, group.v.dim
    return mosaic_tpu_step.vmem_bytes(spec, dims, tokens, maps_held) <= mosaic_tpu_step.MAX_VMEM


def _on_tpu(
    q,
    group: HeadGroup,
    view: GroupView,
    where: Where,
    recent: Recent | None,
    sink,
    rules: Rules,
    options: Any,
) -> Float[Array, "B T H E"]:
    from turboq_kernels.decode import mosaic_tpu, mosaic_tpu_step

    (k, v), heads = _sides(group, view), len(group.heads)
    into = maps.of_queries(group.k, group.k_arrays, heads)
    out = maps.of_outputs(group.v, group.v_arrays, heads)
    spec, buffers = mosaic_tpu.specify(
        q, k, v, view.pages, softcap=options.softcap, biased=into.constant is not None,
        int8=mosaic_tpu.integer_unit(),
    )  # fmt: skip
    seen = mosaic_tpu_step.Seen(*where, view.rows)
    # As they were rounded: XLA sees that nothing changes. No kernel takes float16.
    kind = view.k_sinks.dtype if view.k_sinks.dtype == jnp.bfloat16 else jnp.dtype(jnp.float32)
    exact = []
    if rules.policy.sinks:
        k_sinks, v_sinks = (x.astype(kind) for x in (view.k_sinks, view.v_sinks))
        exact.append(mosaic_tpu_step.Exact(k_sinks, v_sinks, None))
    if recent is not None:
        own_k, own_v = (x.swapaxes(1, 2).astype(kind) for x in (recent.k, recent.v))
        exact.append(mosaic_tpu_step.Exact(own_k, own_v, recent.positions))
    ready = mosaic_tpu_step.prepare(
        q, into.matrix, into.constant, seen, rules, spec=spec, k=k, pages=view.pages,
        scale=options.scale, interpret=options.interpret,
    )  # fmt: skip
    *sums, stats = mosaic_tpu.launch(spec, ready, k, v, buffers, options.interpret)
    outs = mosaic_tpu_step.finish(
        q, sums, stats, exact, seen, rules, sink, out.matrix, out.constant, spec=spec, v=v,
        scale=options.scale, interpret=options.interpret,
    )  # fmt: skip
    return outs.reshape(*outs.shape[:2], -1, outs.shape[-1])


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
