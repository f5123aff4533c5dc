"""Queries of a step as the lanes of their group meet them, the work of `turboq_prepare` on a GPU.

A program takes one KV head of one sequence and some blocks of positions, whose query rows are the
rows of its products:

    turned = R(-p0) q                        of every block, put into memory of its own; then
    weights = matrix^T turned / unit         run by run of the group's lanes, as pairs of int8
    half = -1/2 sums^T turned,  bias = turned . means       (`columns.linear.LinearLayer`)

`unit` is of a bound, |q| times the longest column, and so the same in all blocks. Blocks that a
sequence does not see are left out. Of keys after their rotary embedding all positions are one block
and nothing turns.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int

from turboq.numbers.rope import Rope
from turboq_kernels.columns import triton, triton_token
from turboq_kernels.columns.linear import LinearLayer
from turboq_kernels.encode.triton_steps import product
from turboq_kernels.triton_memory import load, store

CHANNELS = 32  # coordinates of a step of a product
MIN_ROWS = 16  # of a product
_ROWS, _OFFSETS = 64, 64  # rows of a program; offsets in a block at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lanes:
    """Where the lanes of a layer's units lie in the pool: `triton.windows` for kernels."""

    run: int
    places: tuple[tuple[int, ...], tuple[int, ...]]  # of `triton.Plan`
    joined: int
    groups: int
    pool: int  # lanes

    def first(self, layer: dict[str, Any], side: int, unit):
        """The first lane of the pool that is read of units."""
        place, sizes = jnp.zeros_like(unit), [self.run * runs for runs in self.places[side]]
        if self.joined:
            behind = _reached(unit, self.groups * self.joined)
            place = unit % self.joined + self.joined * behind
        width = sizes[0]
        for i in range(1, len(sizes)):
            width += (sizes[i] - sizes[i - 1]) * _reached(place, i)
        start = layer["first"][side] + layer["kv"[side]]["start"][unit]
        return jnp.clip(start, 0, jnp.maximum(self.pool - width, 0))

    def columns(self, layer: dict[str, Any], side: int, j, run, at):
        """Of lanes `at` of a run among those of group j: columns of the matrix, and which are real.

        A lane that is not of the run's unit is not.
        """
        place, before, unit = jnp.zeros_like(run), jnp.zeros_like(run), j
        for runs, end in zip(self.places[side], np.cumsum(self.places[side][:-1]), strict=False):
            behind = _reached(run, int(end))
            place, before = place + behind, before + runs * behind
        if self.joined:
            behind = _reached(place, self.joined)
            unit = (j + (self.groups - 1) * behind) * self.joined + place
        of = layer["kv"[side]]
        first, start = self.first(layer, side, unit), of["start"][unit]
        lane = first - layer["first"][side] + at - before * self.run
        own = (lane >= start) & (lane < start + of["count"][unit])
        return lane, own & (lane < of["matrix"].shape[2])


def _reached(x, least: int):
    """1 where x >= least, else 0: of scalars, whose choices Triton takes for one bit."""
    return jnp.clip(x - (least - 1), 0, 1)


def lanes_of(plan: triton.Plan, layer: LinearLayer, pool_lanes: int) -> Lanes:
    return Lanes(
        run=plan.run, places=plan.places, joined=plan.joined, groups=layer.groups, pool=pool_lanes
    )


def inputs_of(layer: LinearLayer) -> dict[str, Any]:
    """What `Lanes` asks of a layer."""
    sides = {
        name: {"matrix": own.matrix, "start": own.start, "count": own.count}
        for name, own in (("k", layer.k), ("v", layer.v))
    }
    return sides | {"first": layer.first}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How blocks and the query rows of a KV head are rows of programs; `rope` None: one block."""

    rows: int  # of a KV head
    blocks: int
    size: int  # positions of a block
    rope: Rope | None

    @property
    def padded(self) -> int:
        return pl.next_power_of_2(self.rows)

    @property
    def each(self) -> int:
        """Blocks of a program."""
        return min(max(_ROWS // self.padded, 1), pl.next_power_of_2(self.blocks))

    @property
    def count(self) -> int:
        return -(-self.blocks // self.each)

    @property
    def height(self) -> int:
        """Rows of a program."""
        return max(MIN_ROWS, self.padded * self.each)


def inputs(layer: LinearLayer, tiles: Tiles, first: Int[Array, "B"] | None) -> dict[str, Any]:
    """What `fold` reads beside queries and `inputs_of`; slots of sequences begin at `first`."""
    plan = {"means": layer.means, "sums": layer.sums, "longest": layer.longest}
    if tiles.rope is None:
        return plan
    start = tiles.size * jnp.arange(tiles.blocks, dtype=jnp.int32)[None]
    start = start if first is None else start + first[:, None]
    return plan | {"turns": triton_token.turns(tiles.rope, start)}


def shapes(batch: int, groups: int, plan: triton.Plan, tiles: Tiles, dim: int) -> dict[str, Any]:
    """What `fold` writes: parts of `triton.Ready`, and `room`."""
    heads = groups * max(plan.joined, 1)
    blocks, width, m = tiles.blocks, plan.run * sum(plan.places[0]), heads * tiles.rows
    offsets = 1 if tiles.rope is None else blocks * tiles.size
    return {
        "weights": ((batch, blocks, groups, 2 * plan.m, width), jnp.int8),
        "unit": ((batch, m), jnp.float32),
        "half": ((batch, blocks, m, len(plan.places[0])), jnp.float32),
        "bias": ((batch, m, offsets), jnp.float32),
        "room": ((batch, heads, tiles.count, tiles.height, dim), jnp.float32),
    }


def fold(
    x, out, b, n, tile, *, plan: triton.Plan, tiles: Tiles, lanes: Lanes, interpret: bool
) -> None:
    """A KV head's queries in some blocks."""
    dim, each = x["q"].shape[3], max(plan.joined, 1)
    row = jnp.arange(tiles.height, dtype=jnp.int32)
    own, block = row % tiles.padded, tile * tiles.each + row // tiles.padded
    real = (own < tiles.rows) & (row // tiles.padded < tiles.each) & (block < tiles.blocks)
    head_row = n * tiles.rows + own
    chunk = min(CHANNELS, max(16, pl.next_power_of_2(dim)))
    steps, put = -(-dim // chunk), functools.partial(store, interpret=interpret)

    def at(k):
        channels = k * chunk + jnp.arange(chunk, dtype=jnp.int32)
        return channels, channels < dim

    def turn(k, squares):
        channels, inside = at(k)
        mask = real[:, None] & inside[None, :]

        def query(channels):
            return load(x["q"], (b, n, own[:, None], channels), mask).astype(jnp.float32)

        q = query(channels[None, :])
        turned = q
        if tiles.rope is not None:
            turned = _turned(tiles.rope, query, q, x["turns"], b, block, channels)
        put(out["room"], (b, n, tile, row[:, None], channels[None, :]), turned, inside[None, :])
        return squares + q * q

    squares = jax.lax.fori_loop(0, steps, turn, jnp.zeros((tiles.height, chunk), jnp.float32))
    largest = jnp.sqrt(jnp.sum(squares, axis=1)) * x["longest"][n]
    unit = jnp.where(largest == 0, 1.0, largest / triton.HIGH)
    put(out["unit"], (b, head_row), unit, real & (block == 0))
    if not interpret:
        plgpu.debug_barrier()  # of this program, which reads what it turned

    def right(k):
        channels, inside = at(k)
        return load(out["room"], (b, n, tile, row[:, None], channels[None, :]), inside[None, :])

    def times(of, index, width: int, mask) -> Array:
        """turned [rows, D] times of[index(channels)] [width, D].T."""

        def left(k):
            channels, inside = at(k)
            return load(of, index(channels[None, :]), mask[:, None] & inside[None, :])

        return product(left, right, steps, (width, tiles.height))

    place = jnp.arange(MIN_ROWS, dtype=jnp.int32)
    there = place < x["sums"].shape[2]
    sums = times(x["sums"], lambda c: (n, c, place[:, None]), MIN_ROWS, there)
    put(
        out["half"], (b, block[:, None], head_row[:, None], place[None, :]), -0.5 * sums,
        real[:, None] & there[None, :],
    )  # fmt: skip
    count = x["means"].shape[1]
    wide = min(_OFFSETS, max(MIN_ROWS, pl.next_power_of_2(count)))

    def biases(i, _):
        offset = i * wide + jnp.arange(wide, dtype=jnp.int32)
        found = times(x["means"], lambda c: (n, offset[:, None], c), wide, offset < count)
        to = (b, head_row[:, None], block[:, None] * count + offset[None, :])
        put(out["bias"], to, found, real[:, None] & (offset < count)[None, :])
        return 0

    jax.lax.fori_loop(0, -(-count // wide), biases, 0)
    group, head = n // each, n % each

    def weights(run, _):
        lane = run * plan.run + jnp.arange(plan.run, dtype=jnp.int32)
        column, inside = lanes.columns(x, 0, group, run, lane)
        found = times(x["k"]["matrix"], lambda c: (head, c, column[:, None]), plan.run, inside)
        to = 2 * (head * tiles.rows + own)[:, None]
        for i, value in enumerate(triton.pair(found / unit[:, None])):
            index = (b, block[:, None], group, to + i, lane[None, :])
            put(out["weights"], index, value, real[:, None])
        return 0

    jax.lax.fori_loop(0, sum(plan.places[0]), weights, 0)


def _turned(rope: Rope, query, q, turns, b, block, channels) -> Array:
    """R(-p0) q at some channels."""
    pair, other, sign, turning = triton_token.partner(rope, channels)
    mask = turning[None, :] & (block < turns.shape[1])[:, None]
    own = b if turns.shape[0] > 1 else 0
    cos, sin = (load(turns, (own, block[:, None], pair[None, :], i), mask) for i in range(2))
    return jnp.where(turning[None, :], q * cos - sign[None, :] * query(other[None, :]) * sin, q)
