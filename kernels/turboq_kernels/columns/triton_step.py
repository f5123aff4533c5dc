"""One query token's attention to a layer of the one pool on a GPU, three launches in all.

    prepare   queries as the lanes of their groups meet them (`columns.triton_fold`), what they see,
              parts of the sequences (`decode.triton_parts`), lanes
    (the kernel of `columns.triton`)
    finish    of every KV head one softmax over the parts, the exact tokens and a logit sink, and
              out of the bits:  out = V-matrix acc + mass mean + exact

Several query tokens of a sequence take the general way of `columns.api`, which leaves this to XLA.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int, UInt32

from turboq.cache.contiguous import Tail
from turboq.cache.model_cache import LayerState
from turboq.numbers.packing import PAGE
from turboq_kernels.columns import triton, triton_fold
from turboq_kernels.columns.linear import LinearLayer
from turboq_kernels.columns.triton_fold import MIN_ROWS, Lanes, Tiles
from turboq_kernels.decode import triton_step as steps
from turboq_kernels.decode.types import Partial
from turboq_kernels.encode.triton_steps import product
from turboq_kernels.spans import Rules, rules, spans
from turboq_kernels.triton_memory import load, store

_SIZES, _BLOCK = 64, 32  # parts placed at a time; lanes of a step of a product
_LANES = 512  # of sums that a program holds at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """What is static, also what `decode.triton_step` asks of a plan."""

    columns: triton.Plan
    tiles: Tiles
    lanes: Lanes
    count: int
    splits: int | None
    rules: Rules
    pages: int
    interpret: bool

    whole = False

    @property
    def each(self) -> int:
        """KV heads of a group."""
        return max(self.columns.joined, 1)

    @property
    def scale(self) -> float:
        return self.columns.scale

    @property
    def softcap(self) -> float | None:
        return self.columns.softcap


def supported(q: Float[Array, "B T H D"], state: LayerState, tail: Tail) -> bool:
    """Whether a step is read so."""
    few = q.shape[1] == 1 and q.shape[0] <= steps.MAX_BATCH
    return few and tail.positions.shape[1] == state.form.layer.ring


def attend(
    q: Float[Array, "B 1 H D"],
    state: LayerState,
    words: UInt32[Array, "N P R C"],
    tail: Tail,
    layer: LinearLayer,
    *,
    q_positions: Int[Array, "B 1"],
    scale: float,
    window: int | None,
    softcap: float | None,
    sink_logits: Float[Array, "H"] | None,
    splits: int | None,
    interpret: bool,
) -> Float[Array, "B 1 H E"]:
    """Outputs of all query heads."""
    step = planned(
        q, state, words, layer, scale=scale, window=window, softcap=softcap, splits=splits,
        interpret=interpret,
    )  # fmt: skip
    seen = steps.Seen(q_positions, state.lengths, state.dropped)
    by_head = q.reshape(q.shape[0], layer.k.mean.shape[0], -1, q.shape[3])
    ready, start = prepare(by_head, layer, seen, step)
    found = triton.launch(
        ready, words, layer, plan=step.columns, count=step.count, table=state.table,
        interpret=interpret,
    )  # fmt: skip
    exact = exact_of(state, tail)
    sink = None if sink_logits is None else sink_logits.reshape(by_head.shape[1:3])
    values = {"mean": layer.v.mean, **triton_fold.inputs_of(layer)}
    return finish(by_head, found, start, exact, seen, sink, values, _values, step)


def exact_of(state: LayerState, tail: Tail) -> list[tuple[Any, Any, Any]]:
    """Sinks and the ring of recent tokens, which is the tail of one token."""
    kept, out = state.exact, []
    if state.form.layer.policy.sinks:
        out.append((kept.k_sinks, kept.v_sinks, None))
    if state.form.layer.ring:
        out.append((kept.k_recent, kept.v_recent, tail.positions))
    return out


def planned(
    q: Float[Array, "B 1 H D"], state: LayerState, words: UInt32[Array, "N P R C"],
    layer: LinearLayer, *, scale: float, window: int | None, softcap: float | None,
    splits: int | None, interpret: bool, folded: bool = True,
) -> Step:  # fmt: skip
    """What is static about a step; not `folded`: logits come from another kernel."""
    batch, _, rows, _ = q.shape
    pages, kept = state.pages(words), state.form.layer
    turned = kept.rope is not None
    plan, count = triton.planned(
        layer, batch, pages, rows, scale=scale, softcap=softcap, splits=splits,
        turned=turned and folded, per_token=turned, interpret=interpret, folded=folded,
    )  # fmt: skip
    size = kept.rope_block if turned and folded else pages * PAGE
    tiles = Tiles(
        rows=rows // layer.k.mean.shape[0], blocks=pages * PAGE // size, size=size, rope=kept.rope
    )
    return Step(
        columns=plan, tiles=tiles, lanes=triton_fold.lanes_of(plan, layer, words.shape[-1]),
        count=count, splits=splits, rules=rules(kept, window), pages=pages, interpret=interpret,
    )  # fmt: skip


def prepare(
    q: Float[Array, "B K G D"], layer: LinearLayer, seen: steps.Seen, step: Step
) -> tuple[triton.Ready, Int[Array, "_"]]:
    """What the kernel takes, and the first part of every sequence, then their number."""
    plan, tiles, (batch, heads, rows, dim) = step.columns, step.tiles, q.shape
    units = len(layer.unit_groups)
    items, room = pl.next_power_of_2(batch + 1), -(-step.count // _SIZES) * _SIZES
    inputs = {"q": q, "seen": seen, "gains": layer.v.gains, **triton_fold.inputs_of(layer)}
    inputs |= triton_fold.inputs(layer, tiles, seen.first)
    leaves, tree = jax.tree.flatten(inputs)
    shapes = triton_fold.shapes(batch, layer.groups, plan, tiles, dim) | {
        "starts": ((batch, heads * rows), jnp.int32),
        "ends": ((batch, heads * rows), jnp.int32),
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
        functools.partial(_prepare_kernel, trees=(tree, out_tree), step=step),
        grid=(1 + heads * batch * tiles.count,),
        out_shape=out,
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=2),
        interpret=step.interpret,
        name="turboq_prepare",
    )(*leaves)  # fmt: skip
    made = jax.tree.unflatten(out_tree, found)
    del made["room"]
    start = made.pop("start")
    return triton.Ready(**made), start


def _prepare_kernel(*refs, trees, step: Step) -> None:
    tree, out_tree = trees
    x = jax.tree.unflatten(tree, refs[: tree.num_leaves])
    out = jax.tree.unflatten(out_tree, refs[tree.num_leaves :])
    program, batch, tiles = pl.program_id(0), x["q"].shape[0], step.tiles

    @pl.when(program == 0)
    def _():
        cut(x, out, batch, step)

    rest = jnp.maximum(program - 1, 0)
    tile, b, n = rest % tiles.count, rest // tiles.count % batch, rest // tiles.count // batch
    begin, end = bounds(x["seen"], b, None, step)
    wide = tiles.each * tiles.size

    @pl.when((program > 0) & (tile == 0))
    def _():
        row = jnp.arange(tiles.padded, dtype=jnp.int32)
        for name, bound in (("starts", begin), ("ends", end)):
            value = jnp.zeros_like(row) + bound
            to = (b, n * tiles.rows + row)
            store(out[name], to, value, row < tiles.rows, interpret=step.interpret)

    # The first tile is always made: its units are of all.
    @pl.when((program > 0) & ((tile == 0) | (begin < (tile + 1) * wide) & (end > tile * wide)))
    def _():
        triton_fold.fold(
            x, out, b, n, tile, plan=step.columns, tiles=tiles, lanes=step.lanes,
            interpret=step.interpret,
        )  # fmt: skip


def cut(x, out, batch: int, step: Step) -> tuple[Array, Array]:
    """Parts of the sequences, and lanes of units; the pages [low, high) that each sequence sees."""
    item = jnp.arange(out["start"].shape[0], dtype=jnp.int32)
    begin, end = bounds(x["seen"], item, item < batch, step)
    some = end > begin
    low = jnp.where(some, begin, 0) // PAGE
    high = jnp.where(some, (end + PAGE - 1) // PAGE, 0)
    steps.place_parts(low, high, out["start"], out["parts"], batch, step, step.count, step.splits)
    _of_units(x, out, step)
    return low, high


def _of_units(x, out, step: Step) -> None:
    """Where the units begin in the pool, and their largest gains of values."""
    put, units = functools.partial(store, interpret=step.interpret), out["most"].shape[0]
    unit = jnp.arange(pl.next_power_of_2(units), dtype=jnp.int32)
    real = unit < units
    for side, ref in enumerate(out["lanes"]):
        if ref is None:  # not read
            continue
        own = jnp.minimum(unit, units - 1)
        put(ref, (unit,), step.lanes.first(x, side, own), real)
    count = x["gains"].shape[1]
    number = jnp.arange(pl.next_power_of_2(count), dtype=jnp.int32)
    mask = real[:, None] & (number < count)[None, :]
    most = jnp.max(jnp.abs(load(x["gains"], (unit[:, None], number[None, :]), mask)), axis=1)
    put(out["most"], (unit,), jnp.where(most > 0, most, 1.0), real)


def bounds(seen, b, real, step: Step):
    """Slots that the query tokens of sequences b see."""
    first = 0 if seen.first is None else load(seen.first, (b,), real)
    found = spans(
        step.rules, load(seen.at, (b, jnp.int32(0)), real), load(seen.lengths, (b,), real), first
    )
    return found.starts, jnp.minimum(found.ends, step.pages * PAGE)


Values = Callable[..., Float[Array, "M E"]]


def finish(
    q, parts: Partial, start, exact, seen, sink: Float[Array, "K G"] | None,
    layer: dict[str, Any], values: Values, step: Step, units: int = 0,
) -> Float[Array, "B 1 H E"]:  # fmt: skip
    """One softmax of every KV head, whose sums over lanes `values` makes values of.

    Args:
      layer: what `values` reads of it, and the `mean` of values.
      units: coordinates that it keeps between two products.
    """
    batch, heads, rows, _ = q.shape
    dim, width = layer["mean"].shape[1], parts.acc.shape[3]
    inputs = {
        "q": q, "acc": parts.acc, "top": parts.top, "total": parts.total, "start": start,
        "seen": seen, "exact": exact, "sink": sink, **layer,
    }  # fmt: skip
    leaves, tree = jax.tree.flatten(inputs)
    rooms = [width, units] if units else [width]
    out, *_ = pl.pallas_call(
        functools.partial(_finish_kernel, tree=tree, values=values, step=step),
        grid=(heads, batch),
        out_shape=[
            jax.ShapeDtypeStruct((batch, 1, heads * rows, dim), jnp.float32),
            *(jax.ShapeDtypeStruct((batch, heads, MIN_ROWS, n), jnp.float32) for n in rooms),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=2),
        interpret=step.interpret,
        name="turboq_finish",
    )(*leaves)  # fmt: skip
    return out


def _finish_kernel(*refs, tree, values: Values, step: Step) -> None:
    x: dict[str, Any] = jax.tree.unflatten(tree, refs[: tree.num_leaves])
    out, *rooms = refs[tree.num_leaves :]
    room = rooms[0]
    n, b = pl.program_id(0), pl.program_id(1)
    rows, dim, width = x["q"].shape[2], out.shape[3], room.shape[3]
    row = jnp.arange(MIN_ROWS, dtype=jnp.int32)
    recent, own_top, own_total, broken = steps.exact(
        x, n, b, row, dim, (True,) * len(x["exact"]), step.rules, step
    )
    # Parts have the rows of all heads of a group.
    first = n % step.each * rows
    put = functools.partial(store, interpret=step.interpret)
    held = min(_LANES, max(16, pl.next_power_of_2(width)))

    def chunk(i, _):
        lane = i * held + jnp.arange(held, dtype=jnp.int32)
        acc, top, total = steps.merged(x, n // step.each, b, first + row, row < rows, lane, step)
        tops, totals = [top, own_top], [total, own_total]
        if x["sink"] is not None:
            tops.append(load(x["sink"], (n, row), row < rows).astype(jnp.float32))
            totals.append(jnp.ones_like(own_total))
        tops = [jnp.where(t > 0, p, -jnp.inf) for p, t in zip(tops, totals, strict=True)]
        whole = functools.reduce(jnp.maximum, tops)
        base = jnp.where(whole == -jnp.inf, 0.0, whole)
        factors = [jnp.exp(p - base) for p in tops]
        weight = sum(f * t for f, t in zip(factors, totals, strict=True))
        packed, alone = (f / jnp.where(weight > 0, weight, 1.0) for f in factors[:2])
        to = (b, n, row[:, None], lane[None, :])
        put(room, to, acc * packed[:, None], (lane < width)[None, :])
        return total * packed, alone

    zero = jnp.zeros((MIN_ROWS,), jnp.float32)
    mass, alone = jax.lax.fori_loop(0, -(-width // held), chunk, (zero, zero))
    if not step.interpret:
        plgpu.debug_barrier()  # of this program, which reads it in blocks
    channel = jnp.arange(recent.shape[1], dtype=jnp.int32)
    y = values(x, rooms, n, b, row, channel, step)
    mean = load(x["mean"], (n, channel), channel < dim)
    y += mass[:, None] * mean[None, :] + recent * alone[:, None]
    y = jnp.where(broken[:, None], jnp.nan, y)
    at = (b, 0, (n * rows + row)[:, None], channel[None, :])
    put(out, at, y, (row < rows)[:, None] & (channel < dim)[None, :])


def _values(x, rooms, n, b, row, channel, step: Step) -> Float[Array, "M E"]:
    """This program's sums in the room, times what the lanes are worth."""
    (room,) = rooms
    dim, width = x["v"]["matrix"].shape[1], room.shape[3]

    def own(k):
        lane = k * _BLOCK + jnp.arange(_BLOCK, dtype=jnp.int32)
        run = k * _BLOCK // step.columns.run
        return lane, *step.lanes.columns(x, 1, n // step.each, run, lane)

    def left(k):
        _, column, inside = own(k)
        mask = (channel < dim)[:, None] & inside[None, :]
        return load(x["v"]["matrix"], (n % step.each, channel[:, None], column[None, :]), mask)

    def right(k):
        lane, _, inside = own(k)
        return load(room, (b, n, row[:, None], lane[None, :]), inside[None, :])

    return product(left, right, -(-width // _BLOCK), (channel.shape[0], row.shape[0]))
