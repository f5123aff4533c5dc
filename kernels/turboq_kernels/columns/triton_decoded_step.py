"""One query token's attention by keys that are decoded, on a GPU in four launches.

    prepare   queries as pairs of float16, the pages and slots that rows see, parts, lanes
    (the kernel of `columns.triton_decoded`, which makes logits; that of `columns.triton`)
    finish    as of `columns.triton_step`; of joined heads values are made in two products:
                  y = own acc, unit by unit,    out = channels (S_v (scale y)) + mass mean

and tables of rotations, which XLA makes. Several query tokens take the general way of
`columns.api`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int, UInt32

from turboq.cache.contiguous import Tail
from turboq.cache.model_cache import LayerState
from turboq_kernels.columns import triton, triton_decoded, triton_step
from turboq_kernels.columns.linear import LinearLayer
from turboq_kernels.columns.triton_decoded import FULL
from turboq_kernels.columns.triton_step import Step
from turboq_kernels.decode import triton_step as steps
from turboq_kernels.encode.triton_steps import product
from turboq_kernels.triton_memory import load, store

_SIZES, _BLOCK = 64, 32  # parts placed at a time; lanes or coordinates of a step of a product


def attend(
    q: Float[Array, "B 1 H D"],
    state: LayerState,
    words: UInt32[Array, "N P R C"],
    tail: Tail,
    made: LinearLayer,
    *,
    q_positions: Int[Array, "B 1"],
    scale: float,
    window: int | None,
    softcap: float | None,
    splits: int | None,
    sink_logits: Float[Array, "H"] | None,
    interpret: bool,
) -> Float[Array, "B 1 H E"]:
    """Outputs of all query heads."""
    layer = state.form.layer
    step = triton_step.planned(
        q, state, words, made, scale=scale, window=window, softcap=softcap, splits=splits,
        interpret=interpret, folded=False,
    )  # fmt: skip
    seen = steps.Seen(q_positions, state.lengths, state.dropped)
    by_head = q.reshape(q.shape[0], made.k.mean.shape[0], -1, q.shape[3])
    plan = triton_decoded.planned(made, layer, by_head.shape[2], state.dropped, interpret)
    out = _prepare(by_head, made, layer.rope, seen, step, plan)
    bias = triton_decoded.launch(
        out["queries"], out["unit"], out["low"], out["high"], words, made, layer, state.dropped,
        plan=plan, table=state.table,
    )  # fmt: skip
    ready = triton.Ready(
        weights=None, unit=None, half=None, bias=bias, starts=out["starts"], ends=out["ends"],
        parts=out["parts"], lanes=[out["lanes"][1]] * 2, most=out["most"],
    )  # fmt: skip
    found = triton.launch(
        ready, words, made, plan=step.columns, count=step.count, table=state.table,
        interpret=interpret,
    )  # fmt: skip
    exact = triton_step.exact_of(state, tail)
    sink = None if sink_logits is None else sink_logits.reshape(by_head.shape[1:3])
    values = {"mean": made.v.mean, "own": made.decoded.values, "joint": None}
    if made.joined:
        names = ("coded", "synthesis", "synthesis_scale", "synthesis_channels")
        values["joint"] = {name: layer.joint[name] for name in names}
    return triton_step.finish(
        by_head, found, out["start"], exact, seen, sink, values, _values, step,
        units=layer.joint["mean"].shape[1] if made.joined else 0,
    )  # fmt: skip


def _prepare(q, made: LinearLayer, rope, seen: steps.Seen, step: Step, plan) -> dict[str, Any]:
    """What both kernels take, and the first part of every sequence, then their number."""
    (batch, heads, rows, dim), units = q.shape, len(made.unit_groups)
    items, room = pl.next_power_of_2(batch + 1), -(-step.count // _SIZES) * _SIZES
    # Channels of all pairs side by side; D for none.
    order = np.stack(triton_decoded.pairs_of(rope, dim), axis=-1).reshape(-1).astype(np.int32)
    inputs = {
        "q": q, "seen": seen, "gains": made.v.gains, "scale": made.decoded.scale, "order": order,
        "first": made.first, "k": {"start": made.k.start}, "v": {"start": made.v.start},
    }  # fmt: skip
    leaves, tree = jax.tree.flatten(inputs)
    shapes = {
        "queries": ((batch, heads, 2 * plan.m, len(order)), jnp.float16),
        "unit": ((batch, heads * rows), jnp.float32),
        "low": ((items,), jnp.int32),
        "high": ((items,), jnp.int32),
        "starts": ((batch, heads * rows), jnp.int32),
        "ends": ((batch, heads * rows), jnp.int32),
        "parts": [((room,), jnp.int32)] * 3,
        "lanes": [None, ((units,), jnp.int32)],
        "most": ((units,), jnp.float32),
        "start": ((items,), jnp.int32),
    }
    out, out_tree = jax.tree.flatten(
        jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(*x), shapes, is_leaf=lambda x: isinstance(x, tuple)
        )
    )
    found = pl.pallas_call(
        functools.partial(_kernel, trees=(tree, out_tree), step=step, rows=plan.m),
        grid=(1 + heads * batch,),
        out_shape=out,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=step.interpret,
        name="turboq_prepare",
    )(*leaves)  # fmt: skip
    return jax.tree.unflatten(out_tree, found)


def _kernel(*refs, trees, step: Step, rows: int) -> None:
    tree, out_tree = trees
    x = jax.tree.unflatten(tree, refs[: tree.num_leaves])
    out = jax.tree.unflatten(out_tree, refs[tree.num_leaves :])
    program, batch = pl.program_id(0), x["q"].shape[0]

    @pl.when(program == 0)
    def _():
        out["low"][...], out["high"][...] = triton_step.cut(x, out, batch, step)

    @pl.when(program > 0)
    def _():
        _queries(x, out, (program - 1) % batch, (program - 1) // batch, step, rows)


def _queries(x, out, b, n, step: Step, rows: int) -> None:
    """A KV head's rows of one sequence, each two rows of float16, and what they see."""
    _, _, many, dim = x["q"].shape
    put = functools.partial(store, interpret=step.interpret)
    row = jnp.arange(rows, dtype=jnp.int32)
    real, to = row < many, (b, n * many + row)
    begin, end = triton_step.bounds(x["seen"], b, None, step)
    for name, bound in (("starts", begin), ("ends", end)):
        put(out[name], to, jnp.zeros_like(row) + bound, real)
    width = x["order"].shape[0]
    column = jnp.arange(pl.next_power_of_2(width), dtype=jnp.int32)
    channel = load(x["order"], (column,), column < width)
    mask = real[:, None] & ((column < width) & (channel < dim))[None, :]
    q = load(x["q"], (b, n, row[:, None], channel[None, :]), mask).astype(jnp.float32)
    largest = jnp.max(jnp.abs(q), axis=1)
    unit = jnp.where(largest == 0, 1.0, largest)
    put(out["unit"], to, unit * (2.0**15 / FULL) * x["scale"][n], real)
    q /= unit[:, None]
    high = q.astype(jnp.float16).astype(jnp.float32)
    if step.interpret:  # which XLA may leave out
        high = jax.lax.reduce_precision(q, exponent_bits=5, mantissa_bits=10)
    for i, part in enumerate((high, (q - high) * triton.LOW)):
        index = (b, n, (2 * row + i)[:, None], column[None, :])
        put(out["queries"], index, part.astype(jnp.float16), (column < width)[None, :])


def _values(x, rooms, n, b, row, channel, step: Step) -> Float[Array, "M E"]:
    """This program's sums in the first room, as values."""
    own, dim = x["own"], x["mean"].shape[1]
    room, held = rooms[0], x["joint"]
    if held is None:
        mask = (channel < dim)[:, None]
        return _times(
            lambda lane, real: load(
                own, (n, 0, channel[:, None], lane[None, :]), mask & real[None, :]
            ),
            room, room.shape[3], n, b, row, channel.shape[0],
        )  # fmt: skip
    group, head, each = n // step.each, n % step.each, step.each
    cut = held["synthesis"].shape[1] - each * dim  # coordinates of keys
    most, first = own.shape[1], 0
    unit = jnp.arange(max(16, pl.next_power_of_2(most)), dtype=jnp.int32)
    put = functools.partial(store, interpret=step.interpret)
    for place, runs in enumerate(step.columns.places[1]):
        side, at = divmod(place, each)
        width, start = (cut // each, 0) if side == 0 else (dim, cut)

        def of_lanes(lane, real, first=first):
            mask = (unit < most)[:, None] & real[None, :]
            return load(own, (group, unit[:, None], first + lane[None, :]), mask)

        lanes = runs * step.columns.run
        y = _times(of_lanes, room, lanes, n, b, row, unit.shape[0], first)
        to = (b, n, row[:, None], (start + at * width + unit)[None, :])
        put(rooms[1], to, y, (unit < width)[None, :])
        first += lanes
    if not step.interpret:
        plgpu.debug_barrier()  # of this program, which reads it in blocks
    output = cut + head * dim + channel
    count, every = held["coded"].shape[1], rooms[1].shape[3]

    def left(k):
        w = k * _BLOCK + jnp.arange(_BLOCK, dtype=jnp.int32)
        mask = (channel < dim)[:, None] & (w < count)[None, :]
        turn = load(held["synthesis"], (group, output[:, None], w[None, :]), mask)
        return turn.astype(jnp.float32)

    def right(k):
        w = k * _BLOCK + jnp.arange(_BLOCK, dtype=jnp.int32)
        at = load(held["coded"], (group, w), w < count)
        there = (w < count) & (at < every)
        y = load(rooms[1], (b, n, row[:, None], at[None, :]), there[None, :])
        return y * load(held["synthesis_scale"], (group, w), there)[None, :]

    out = product(left, right, -(-count // _BLOCK), (channel.shape[0], row.shape[0]))
    return out * load(held["synthesis_channels"], (group, output), channel < dim)[None, :]


def _times(of_lanes, room, lanes: int, n, b, row, width: int, first: int = 0) -> Array:
    """Sums over some lanes, times of_lanes(lanes) [width, lanes]."""

    def own(k):
        lane = k * _BLOCK + jnp.arange(_BLOCK, dtype=jnp.int32)
        return lane, lane < lanes

    def right(k):
        lane, real = own(k)
        return load(room, (b, n, row[:, None], first + lane[None, :]), real[None, :])

    return product(
        lambda k: of_lanes(*own(k)), right, -(-lanes // _BLOCK), (width, row.shape[0])
    )  # fmt: skip
