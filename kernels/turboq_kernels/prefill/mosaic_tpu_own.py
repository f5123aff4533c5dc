"""Flash attention over exact keys and values on TPU: tiles of query rows, steps of entries.

The grid's last axis are the steps of a tile; those that no row of the tile sees are neither copied
nor computed. Of keys and values in bfloat16 the logits are exact to 16 bits of the query and
weights are rounded to bfloat16; wider ones, and then weights too, are two bfloat16 numbers each
(their product of the smaller halves is left out).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from turboq_kernels.decode.types import Partial
from turboq_kernels.prefill import mosaic_tpu_softmax as softmax
from turboq_kernels.prefill.mosaic_tpu_softmax import LANES, LOG2_E, Tiling

STEP = 512  # entries


def own(
    q: Float[Array, "B N M D"],
    k: Float[Array, "B N R D"],
    v: Float[Array, "B N R E"],
    positions: Int[Array, "B R"],
    lower: Int[Array, "B M"],
    upper: Int[Array, "B M"],
    *,
    scale: float,
    softcap: float | None,
    interpret: bool | pltpu.InterpretParams = False,
) -> Partial:
    """See `turboq_kernels.prefill.kernels.own`."""
    batch, heads, rows, _ = q.shape
    entries = k.shape[2]
    tiles = softmax.tiling(rows)
    size = min(STEP, -(-entries // LANES) * LANES)
    steps = -(-entries // size)
    lower = jnp.maximum(lower, 0)  # empty entries are at -1
    used = _used(positions, lower, upper)[:, None, :, None]
    room = ((0, 0), (0, 0), (0, steps * size - entries), (0, 0))
    v = jnp.where(used, v, jnp.zeros((), v.dtype))
    keys, values = (_pieces(jnp.pad(x, room)) for x in (k, v))
    positions = jnp.pad(positions, ((0, 0), (0, steps * size - entries)), constant_values=-1)
    q = softmax.halves(q.astype(jnp.float32) * softmax.factor(scale, softcap), tiles)
    planned = plan(tiles, positions.reshape(batch, steps, size), lower, upper)
    limits = softmax.bounds(lower, upper, tiles)

    def row_block(width):
        return pl.BlockSpec((1, 1, tiles.tile, width), lambda b, n, i, s, plan: (b, n, i, 0))

    def at(b, i, s, plan):
        first, count = (plan[(b * tiles.tiles + i) * 2 + j] for j in (0, 1))
        return first + jnp.minimum(s, jnp.maximum(count - 1, 0))

    def entry_block(width):
        return pl.BlockSpec(
            (1, 1, size, width), lambda b, n, i, s, plan: (b, n, at(b, i, s, plan), 0)
        )

    outs = [(batch, heads, tiles.padded, w) for w in (v.shape[-1], LANES)]
    acc, stats = pl.pallas_call(
        functools.partial(_kernel, tiles, softcap, len(keys)),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in outs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, tiles.tiles, steps),
            in_specs=[
                pl.BlockSpec(
                    (1, 1, tiles.runs, *q.shape[3:]), lambda b, n, i, s, plan: (b, n, i, 0, 0)
                ),
                pl.BlockSpec((1, tiles.tile, LANES), lambda b, n, i, s, plan: (b, i, 0)),
                pl.BlockSpec((1, 1, size), lambda b, n, i, s, plan: (b, 0, at(b, i, s, plan))),
                *(entry_block(x.shape[-1]) for x in (*keys, *values)),
            ],
            out_specs=[row_block(shape[-1]) for shape in outs],
            scratch_shapes=[pltpu.VMEM((tiles.tile, LANES), jnp.float32) for _ in range(2)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="turboq_own",
    )(planned, q, limits, positions[:, None], *keys, *values)
    return softmax.finish(acc, stats, rows)


def plan(tiles: Tiling, positions: Int[Array, "B steps size"], lower, upper) -> Int[Array, "plan"]:
    """First step and number of steps, some possibly in vain, of each (b, tile)."""
    batch, steps, _ = positions.shape
    big = jnp.iinfo(jnp.int32).max
    least = jnp.min(jnp.where(positions >= 0, positions, big), axis=2)
    most = jnp.max(positions, axis=2)
    some = upper >= lower
    lower = jnp.where(some, lower, big)
    lower = jnp.pad(lower, ((0, 0), (0, tiles.padded - tiles.rows)), constant_values=big)
    upper = softmax.pad_rows(jnp.where(some, upper, -1) + 1, tiles, 1) - 1
    by_tile = (batch, tiles.tiles, tiles.tile)
    lower, upper = jnp.min(lower.reshape(by_tile), axis=2), jnp.max(upper.reshape(by_tile), axis=2)
    seen = (most[:, None] >= lower[..., None]) & (least[:, None] <= upper[..., None])
    order = jnp.arange(steps, dtype=jnp.int32)[None, None]
    first = jnp.min(jnp.where(seen, order, steps), axis=2)
    count = jnp.maximum(jnp.max(jnp.where(seen, order, -1), axis=2) + 1 - first, 0)
    return jnp.stack([jnp.minimum(first, steps - 1), count], axis=-1).reshape(-1)


def _used(positions, lower, upper) -> Bool[Array, "B R"]:
    """Entries that some row sees. (A reduction over [B, M, R] that is never in memory.)"""
    s = positions[:, None, :]
    return jnp.any((s >= lower[..., None]) & (s <= upper[..., None]), axis=1)


def _pieces(x: jax.Array) -> list[jax.Array]:
    """bfloat16 numbers that add up to x: one, or two."""
    high = x.astype(jnp.bfloat16)
    if x.dtype == jnp.bfloat16:
        return [high]
    x = x.astype(jnp.float32)
    return [high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)]


def _kernel(tiles: Tiling, softcap, pieces, plan, query, bound, position, *refs):
    keys, values = refs[:pieces], refs[pieces : 2 * pieces]
    sums, stats, tops, totals = refs[2 * pieces :]
    step = pl.program_id(3)
    tile = pl.program_id(0) * tiles.tiles + pl.program_id(2)

    @pl.when(step == 0)
    def _():
        sums[...] = jnp.zeros(sums.shape, sums.dtype)
        softmax.clear(tops, totals)

    def logits(r):
        value = softmax.dot_halves(query[0, 0, r], keys[0][0, 0])
        if pieces > 1:
            high = query[0, 0, r, pl.ds(0, tiles.run), :]
            value = value + _product(high, keys[1][0, 0], True)
        return value if softcap is None else jnp.tanh(value) * (softcap * LOG2_E)

    def add(at, p, keep):
        high = p.astype(jnp.bfloat16)
        fresh = _product(high, values[0][0, 0], False)
        if pieces > 1:
            low = (p - high.astype(jnp.float32)).astype(jnp.bfloat16)
            fresh = fresh + _product(low, values[0][0, 0], False)
            fresh = fresh + _product(high, values[1][0, 0], False)
        sums[0, 0, at, :] = sums[0, 0, at, :] * softmax.widen(keep, fresh.shape[1]) + fresh

    @pl.when(step < plan[2 * tile + 1])
    def _():
        softmax.attend(tiles, logits, position[0], bound, tops, totals, add)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        stats[0, 0] = softmax.statistics(tops[...], totals[...])


def _product(left, right, transposed: bool):
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)
