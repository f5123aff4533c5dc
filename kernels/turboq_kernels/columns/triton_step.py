"""One query token's attention to a layer of the one pool on a GPU, three launches in all.

    prepare   queries over their group's own lanes as pairs of int8 (`columns.queries.fold`),
              what they see, parts of the sequences (`decode.triton_parts`), lanes
    (the kernel of `columns.triton`)
    finish    one softmax over the parts and the exact tokens, and out of the bits:
                  out = V-matrix acc + mass mean + exact

For heads by themselves whose keys are stored after their rotary embedding; others take the general
way of `columns.api`, which leaves this to XLA.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int, UInt32

from turboq.cache.contiguous import Tail
from turboq.cache.model_cache import LayerState
from turboq.numbers.packing import PAGE
from turboq_kernels.columns import triton
from turboq_kernels.columns.linear import LinearLayer
from turboq_kernels.decode import triton_step as steps
from turboq_kernels.decode.types import Partial
from turboq_kernels.encode.triton_steps import product
from turboq_kernels.spans import Rules, rules, spans
from turboq_kernels.triton_memory import load, store

_SIZES, _BLOCK, _ROWS = 64, 32, 16  # parts placed at a time; coordinates of a product; query rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """What is static, also what `decode.triton_step` asks of a plan."""

    columns: triton.Plan
    count: int
    splits: int | None
    rules: Rules
    pages: int
    interpret: bool

    whole = False

    @property
    def m(self) -> int:
        return self.columns.m

    @property
    def scale(self) -> float:
        return self.columns.scale

    @property
    def softcap(self) -> float | None:
        return self.columns.softcap


def supported(q: Float[Array, "B T H D"], state: LayerState, tail: Tail) -> bool:
    """Whether a step is read so."""
    layer = state.form.layer
    apart = layer.joint_heads is None and layer.rope is None
    few = q.shape[1] == 1 and q.shape[0] <= steps.MAX_BATCH
    return apart and few and tail.positions.shape[1] == layer.ring


def attend(
    q: Float[Array, "B 1 H D"],
    state: LayerState,
    words: UInt32[Array, "B P R C"],
    tail: Tail,
    layer: LinearLayer,
    *,
    q_positions: Int[Array, "B 1"],
    scale: float,
    window: int | None,
    softcap: float | None,
    splits: int | None,
    interpret: bool,
) -> Float[Array, "B 1 H E"]:
    """Outputs of all query heads."""
    batch, _, rows, dim = q.shape
    pages, kept = words.shape[1], state.form.layer
    plan, count = triton.planned(
        layer, batch, pages, rows, scale=scale, softcap=softcap, splits=splits, turned=False,
        per_token=False, interpret=interpret,
    )  # fmt: skip
    step = Step(
        columns=plan, count=count, splits=splits, rules=rules(kept, window), pages=pages,
        interpret=interpret,
    )  # fmt: skip
    seen = steps.Seen(q_positions, state.lengths, state.dropped)
    by_head = q.reshape(batch, layer.groups, plan.rows, dim)
    ready, start = _prepare(by_head, layer, seen, words.shape[-1], step)
    found = triton.launch(ready, words, layer, plan=plan, count=count, interpret=interpret)
    exact = []
    if kept.policy.sinks:
        exact.append((state.exact.k_sinks, state.exact.v_sinks, None))
    if kept.ring:  # the tail of one token, as the ring has it
        exact.append((state.exact.k_recent, state.exact.v_recent, tail.positions))
    return _finish(by_head, found, start, exact, seen, layer, words.shape[-1], step)


def _prepare(q, layer: LinearLayer, seen, pool_lanes: int, step: Step) -> tuple[triton.Ready, Any]:
    plan, (batch, groups, rows, _) = step.columns, q.shape
    width, units = plan.run * sum(plan.places[0]), len(layer.unit_groups)
    items, room = pl.next_power_of_2(batch + 1), -(-step.count // _SIZES) * _SIZES
    inputs = {"q": q, "seen": seen, "k": _of(layer, 0), "v": _of(layer, 1), "first": layer.first}
    inputs |= {"mean": [layer.k.mean, layer.rest], "gains": layer.v.gains}
    leaves, tree = jax.tree.flatten(inputs)
    shapes = {
        "weights": ((batch, 1, groups, 2 * plan.m, width), jnp.int8),
        "unit": ((batch, groups * rows), jnp.float32),
        "half": ((batch, 1, groups * rows, 1), jnp.float32),
        "bias": ((batch, groups * rows, 1), jnp.float32),
        "starts": ((batch, groups * rows), jnp.int32),
        "ends": ((batch, groups * rows), jnp.int32),
        "parts": [((room,), jnp.int32)] * 3,
        "lanes": [((units,), jnp.int32)] * 2,
        "most": ((units,), jnp.float32),
        "start": ((items,), jnp.int32),
    }
    out, out_tree = jax.tree.flatten(
        jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(*x), shapes, is_leaf=lambda x: isinstance(x, tuple)
        )
    )
    found = pl.pallas_call(
        functools.partial(
            _prepare_kernel, trees=(tree, out_tree), step=step, pool_lanes=pool_lanes
        ),
        grid=(1 + batch * groups,),
        out_shape=out,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=step.interpret,
        name="turboq_prepare",
    )(*leaves)  # fmt: skip
    made = jax.tree.unflatten(out_tree, found)
    start = made.pop("start")
    return triton.Ready(**made), start


def _of(layer: LinearLayer, side: int) -> dict[str, Any]:
    """What says where a side's units lie and what their bits are worth."""
    own = (layer.k, layer.v)[side]
    return {"matrix": own.matrix, "start": own.start, "count": own.count}


def _prepare_kernel(*refs, trees, step: Step, pool_lanes: int) -> None:
    tree, out_tree = trees
    x = jax.tree.unflatten(tree, refs[: tree.num_leaves])
    out = jax.tree.unflatten(out_tree, refs[tree.num_leaves :])
    program, groups = pl.program_id(0), x["q"].shape[1]

    @pl.when(program == 0)
    def _():
        batch = x["q"].shape[0]
        item = jnp.arange(out["start"].shape[0], dtype=jnp.int32)
        begin, end = _bounds(x["seen"], item, item < batch, step)
        some = end > begin
        low = jnp.where(some, begin, 0) // PAGE
        high = jnp.where(some, (end + PAGE - 1) // PAGE, 0)
        steps.place_parts(
            low, high, out["start"], out["parts"], batch, step, step.count, step.splits
        )
        unit = jnp.arange(pl.next_power_of_2(out["most"].shape[0]), dtype=jnp.int32)
        real = unit < out["most"].shape[0]
        for i, name in enumerate("kv"):
            lanes = _first_lane(x, i, load(x[name]["start"], (unit,), real), pool_lanes, step)
            store(out["lanes"][i], (unit,), lanes, real, interpret=step.interpret)
        count = x["gains"].shape[1]
        number = jnp.arange(pl.next_power_of_2(count), dtype=jnp.int32)
        mask = real[:, None] & (number < count)[None, :]
        most = jnp.max(jnp.abs(load(x["gains"], (unit[:, None], number[None, :]), mask)), axis=1)
        store(out["most"], (unit,), jnp.where(most > 0, most, 1.0), real, interpret=step.interpret)

    @pl.when(program > 0)
    def _():
        _fold(x, out, (program - 1) // groups, (program - 1) % groups, pool_lanes, step)


def _bounds(seen, b, real, step: Step):
    """Slots that the query tokens of sequences b see."""
    first = 0 if seen.first is None else load(seen.first, (b,), real)
    found = spans(step.rules, load(seen.at, (b, 0), real), load(seen.lengths, (b,), real), first)
    return found.starts, jnp.minimum(found.ends, step.pages * PAGE)


def _first_lane(x, side: int, start, pool_lanes: int, step: Step):
    """`triton._windows` of units that begin at these lanes of their side."""
    width = step.columns.run * sum(step.columns.places[side])
    return jnp.clip(x["first"][side] + start, 0, max(pool_lanes - width, 0))


def _own_lanes(x, side: int, n, at, pool_lanes: int, step: Step):
    """Where a group's lanes lie in its side's matrix, and which of them are its own."""
    of = x["kv"[side]]
    start = of["start"][n]
    lane = _first_lane(x, side, start, pool_lanes, step) - x["first"][side] + at
    width = step.columns.run * sum(step.columns.places[side])
    inside = (lane >= start) & (lane < start + of["count"][n]) & (at < width)
    return lane, inside & (lane < of["matrix"].shape[2])


def _fold(x, out, b, n, pool_lanes: int, step: Step) -> None:
    """The queries of a group as its lanes meet them."""
    plan, (_, _, rows, dim) = step.columns, x["q"].shape
    width = plan.run * sum(plan.places[0])
    row = jnp.arange(_ROWS, dtype=jnp.int32)
    lane = jnp.arange(pl.next_power_of_2(width), dtype=jnp.int32)
    column, own = _own_lanes(x, 0, n, lane, pool_lanes, step)
    real, block = row < rows, min(_BLOCK, max(16, pl.next_power_of_2(dim)))

    def at(k):
        channels = k * block + jnp.arange(block, dtype=jnp.int32)
        return channels, channels < dim

    def left(k):
        channels, inside = at(k)
        mask = own[:, None] & inside[None, :]
        return load(x["k"]["matrix"], (0, channels[None, :], column[:, None]), mask)

    def right(k):
        channels, inside = at(k)
        mask = real[:, None] & inside[None, :]
        return load(x["q"], (b, n, row[:, None], channels[None, :]), mask).astype(jnp.float32)

    blocks = -(-dim // block)
    folded = product(left, right, blocks, (lane.shape[0], _ROWS))  # [rows, lanes]
    largest = jnp.max(jnp.abs(folded), axis=1)
    unit = jnp.where(largest == 0, 1.0, largest / triton.HIGH)
    put = functools.partial(store, interpret=step.interpret)
    held = (row < plan.m)[:, None] & (lane < width)[None, :]
    for i, part in enumerate(triton.pair(folded / unit[:, None])):
        to = (b, 0, n, 2 * row[:, None] + i, lane[None, :])
        put(out["weights"], to, part, held)

    def mean(k, total):
        channels, inside = at(k)
        turning, rest = (load(of, (n, channels), inside) for of in x["mean"])
        return total + jnp.sum(right(k) * (turning + rest)[None, :], axis=1)

    bias = jax.lax.fori_loop(0, blocks, mean, jnp.zeros((_ROWS,), jnp.float32))
    begin, end = _bounds(x["seen"], jnp.zeros_like(row) + b, real, step)
    to = n * rows + row
    put(out["unit"], (b, to), unit, real)
    put(out["half"], (b, 0, to, 0), -0.5 * jnp.sum(folded, axis=1), real)
    put(out["bias"], (b, to, 0), bias, real)
    for name, bound in (("starts", begin), ("ends", end)):
        put(out[name], (b, to), bound, real)


def _finish(
    q, parts: Partial, start, exact, seen, layer: LinearLayer, pool_lanes: int, step: Step
) -> Float[Array, "B 1 H E"]:
    batch, groups, rows, _ = q.shape
    dim = layer.v.matrix.shape[1]
    inputs = {
        "q": q, "acc": parts.acc, "top": parts.top, "total": parts.total, "start": start,
        "seen": seen, "exact": exact, "v": _of(layer, 1), "first": layer.first,
        "mean": layer.v.mean,
    }  # fmt: skip
    leaves, tree = jax.tree.flatten(inputs)
    out, _ = pl.pallas_call(
        functools.partial(_finish_kernel, tree=tree, step=step, pool_lanes=pool_lanes),
        grid=(groups, batch),
        out_shape=[
            jax.ShapeDtypeStruct((batch, 1, groups * rows, dim), jnp.float32),
            jax.ShapeDtypeStruct((batch, groups, _ROWS, parts.acc.shape[3]), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=2),
        interpret=step.interpret,
        name="turboq_finish",
    )(*leaves)  # fmt: skip
    return out


def _finish_kernel(*refs, tree, step: Step, pool_lanes: int) -> None:
    x: dict[str, Any] = jax.tree.unflatten(tree, refs[: tree.num_leaves])
    out, room = refs[tree.num_leaves :]
    n, b = pl.program_id(0), pl.program_id(1)
    rows, dim, width = x["q"].shape[2], out.shape[3], room.shape[3]
    row = jnp.arange(_ROWS, dtype=jnp.int32)
    acc, top, total = steps.merged(x, n, b, row, step)
    recent, own_top, own_total, broken = steps.exact(
        x, n, b, row, dim, (True,) * len(x["exact"]), step.rules, step
    )
    tops, totals = (top, own_top), (total, own_total)
    tops = [jnp.where(t > 0, p, -jnp.inf) for p, t in zip(tops, totals, strict=True)]
    whole = jnp.maximum(*tops)
    base = jnp.where(whole == -jnp.inf, 0.0, whole)
    factors = [jnp.exp(p - base) for p in tops]
    weight = sum(f * t for f, t in zip(factors, totals, strict=True))
    packed, alone = (f / jnp.where(weight > 0, weight, 1.0) for f in factors)

    put = functools.partial(store, interpret=step.interpret)
    lane = jnp.arange(acc.shape[1], dtype=jnp.int32)[None, :]
    put(room, (b, n, row[:, None], lane), acc * packed[:, None], lane < width)
    if not step.interpret:
        plgpu.debug_barrier()  # of this program, which reads it in blocks
    channel = jnp.arange(recent.shape[1], dtype=jnp.int32)
    y = _values(x, room, n, b, row, channel, pool_lanes, step)
    mean = load(x["mean"], (n, channel), channel < dim)
    y += (total * packed)[:, None] * mean[None, :] + recent * alone[:, None]
    y = jnp.where(broken[:, None], jnp.nan, y)
    at = (b, 0, (n * rows + row)[:, None], channel[None, :])
    put(out, at, y, (row < rows)[:, None] & (channel < dim)[None, :])


def _values(x, room, n, b, row, channel, pool_lanes: int, step: Step) -> Float[Array, "M E"]:
    """This program's sums in `room`, times what the lanes are worth."""
    dim, width = x["v"]["matrix"].shape[1], room.shape[3]

    def own(k):
        lane = k * _BLOCK + jnp.arange(_BLOCK, dtype=jnp.int32)
        return lane, *_own_lanes(x, 1, n, lane, pool_lanes, step)

    def left(k):
        _, column, inside = own(k)
        mask = (channel < dim)[:, None] & inside[None, :]
        return load(x["v"]["matrix"], (0, channel[:, None], column[None, :]), mask)

    def right(k):
        lane, _, inside = own(k)
        return load(room, (b, n, row[:, None], lane[None, :]), inside[None, :])

    return product(left, right, -(-width // _BLOCK), (channel.shape[0], row.shape[0]))
