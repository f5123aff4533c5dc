"""The body of the TPU kernel that decodes keys: one group of heads of one sequence, page by page.

Lanes of every unit are moved to those of a tile; a bit is an int8 +1 or -1. Per page of 256 tokens,
u over the units of keys, then per head, then over those of values:

    k[c, t] = mean[c, t] + sum_u gain_u[t] (matrix_u[c] . bits_u[t])     [D, 128 tokens] twice
    logits  = q . R(t) k                                                 q and k bfloat16 pairs
    sums_u += (p gain_u) . bits_u                                        both one page later

Matrices and probabilities times gains are pairs of int8, high and low.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from turboq.numbers.packing import PAGE, ROWS
from turboq_kernels.columns.linear import LANES
from turboq_kernels.columns.mosaic_tpu_kernel import (
    HALF,
    LOG2_E,
    LOWEST,
    PIECE,
    ROUND,
    ROUND_BITS,
    by_token,
    copies,
    dot,
    joined,
)
from turboq_kernels.columns.mosaic_tpu_kernel import place as page_of

BYTE_ONES = 0x01010101
MASKS = PAGE // 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """Everything static about a call."""

    heads: int  # of a group
    each: int  # query rows of a head, a multiple of 8
    dim: int  # channels of a key: first and second ones of pairs, then those that do not turn
    half: int  # pairs of channels, a multiple of 8
    tiles: tuple[int, ...]  # of 128 lanes, of the unit at each place of a group
    places: tuple[tuple[int, ...], tuple[int, ...]]  # of units that keys, and values, are made of
    pool: int  # tiles of a row of the pool
    gain_tiles: int  # that hold gains; 0: no gains are stored
    tables: int  # of rotations: 1, or one per sequence
    softcap: float | None

    @property
    def rows(self) -> int:
        """R: query rows of a group."""
        return self.heads * self.each

    @property
    def left(self) -> int:
        """Rows of weights of a unit of values, whole tiles of int8."""
        return -(-2 * self.rows // 32) * 32

    @property
    def read(self) -> tuple[int, ...]:
        """Tiles that are read for each unit: one more, for lanes that begin within one."""
        return tuple(min(n + 1, self.pool) for n in self.tiles)

    def lanes(self, place: int, side: int | None = None) -> slice:
        """Those of a unit among all of a group, or among those of its keys (0) or values (1)."""
        of = range(len(self.tiles)) if side is None else self.places[side]
        before = sum(self.tiles[p] for p in of if p < place) * LANES
        return slice(before, before + self.tiles[place] * LANES)

    def width(self, side: int | None = None) -> int:
        """Lanes of all units, or of those of a side."""
        of = range(len(self.tiles)) if side is None else self.places[side]
        return sum(self.tiles[p] for p in of) * LANES


def kernel(
    spec: Spec, table, plan, tile0, parts, edges, query_ref, start_ref, end_ref, matrix_ref,
    means_ref, gains_ref, weights_ref, rotations, words, acc_ref, stats_ref, raw, raw_gains, bits,
    turns, decoded, held_gains, weighted_ref, factors, semaphores,
):  # fmt: skip
    group, b = pl.program_id(0), pl.program_id(1)
    page0, count = plan[2 * b], plan[2 * b + 1]
    units = len(spec.tiles)
    bases = [sum(spec.read[:p]) for p in range(units)]
    begins = [pl.multiple_of(tile0[group * units + p] * LANES, LANES) for p in range(units)]
    each_part = sum(spec.tiles) + units
    tiles = [
        pl.ds(pl.multiple_of(parts[group * each_part + n] * LANES, LANES), LANES)
        for n in range(each_part)
    ]
    edge = [edges[group * units + p] for p in range(units)]
    gain_tile = edges[edges.shape[0] - 1]
    gain_lanes = pl.ds(pl.multiple_of(gain_tile * LANES, LANES), max(spec.gain_tiles, 1) * LANES)

    def transfers(slot, page):
        item, at = page_of(table, b, page, words)
        for place, n in enumerate(spec.read):
            source = words.at[item, at, :, pl.ds(begins[place], n * LANES)]
            yield source, raw.at[slot, :, pl.ds(bases[place] * LANES, n * LANES)]
        if spec.gain_tiles:
            yield words.at[item, at, :, gain_lanes], raw_gains.at[slot]
        if spec.half:
            yield rotations.at[b if spec.tables > 1 else 0, page], turns.at[slot]

    send, arrived = copies(transfers, semaphores)

    acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)
    stats_ref[0, 0, 0] = jnp.full((spec.rows, LANES), LOWEST, jnp.float32)
    stats_ref[0, 0, 1] = jnp.zeros((spec.rows, LANES), jnp.float32)
    held_gains[...] = jnp.zeros(held_gains.shape, jnp.float32)
    tokens = [by_token(spec.rows, half)[0] for half in (0, 1)]
    lane = jax.lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 1)
    halves = [slice(HALF * half, HALF * (half + 1)) for half in (0, 1)]

    @pl.when(count > 0)
    def _():
        send(0, page0)

    def unpack(slot, place):
        """Bits of a page of a unit, its first lane first."""
        first, at = spec.lanes(place).start, sum(spec.tiles[:place]) + place
        turn = edge[place] & (LANES - 1)
        now = pltpu.roll(raw[slot, :, tiles[at]], turn, 1)
        for k in range(spec.tiles[place]):
            following = pltpu.roll(raw[slot, :, tiles[at + k + 1]], turn, 1)
            held = jnp.where(lane < edge[place], now, following)
            now = following
            for j, y in enumerate(_signs(held)):
                bits[slot, 32 * j : 32 * (j + 1), first + k * LANES : first + (k + 1) * LANES] = y

    def gains_of(slot):
        """Gains of keys and of values [2, U, 128] of both halves of a page."""
        table_of = [gains_ref[side, 0] for side in (0, 1)]
        if not spec.gain_tiles:
            return [table_of, table_of]
        found = dot(weights_ref[0], _bytes(raw_gains[slot]), transposed=True)
        codes = found[: table_of[0].shape[0]]
        return [[jnp.take_along_axis(x, codes[:, own], axis=1) for x in table_of] for own in halves]

    def keys(slot, half, gains):
        """Keys [G D, 128] of half a page, not yet turned."""
        own = halves[half]
        out = means_ref[0, :, own]
        for place in spec.places[0]:
            left = matrix_ref[0, :, spec.lanes(place, 0)]
            found = dot(left, bits[slot, own, spec.lanes(place)], transposed=True)
            size = len(found) // 2
            if spec.tiles[place] * LANES <= 512:  # 2^15 a lane: no sum leaves an int32
                whole = ((found[:size] << 8) + found[size:]).astype(jnp.float32)
            else:
                whole = joined(found, size)
            out = out + whole * gains[place : place + 1]
        return out

    def keep(slot, half, k):
        """Keys of half a page as they are read."""
        own = halves[half]
        for head in range(spec.heads):
            one = k[head * spec.dim : (head + 1) * spec.dim]
            if spec.half:
                x, y = one[: spec.half], one[spec.half : 2 * spec.half]
                cos, sin = turns[slot, 0, :, own], turns[slot, 1, :, own]
                parts = [x * cos - y * sin, y * cos + x * sin]
                if spec.dim > 2 * spec.half:
                    parts.append(one[2 * spec.half :])
                one = jnp.concatenate(parts, axis=0)
            decoded[0, head, :, own], decoded[1, head, :, own] = pair(one)

    def logits_of(half, page):
        out = []
        for head in range(spec.heads):
            query = query_ref[0, 0, head]
            both = _product(query, decoded[0, head, :, halves[half]])
            both = both + _product(query, decoded[1, head, :, halves[half]])
            out.append(both[: spec.each] + both[spec.each :])
        value = jnp.concatenate(out, axis=0) if len(out) > 1 else out[0]
        if spec.softcap:
            value = jnp.tanh(value) * (spec.softcap * LOG2_E)
        at = tokens[half] + page * PAGE
        seen = (at >= start_ref[0, 0]) & (at < end_ref[0, 0])
        return jnp.where(seen, value, 2 * LOWEST)

    def weigh(page):
        """The softmax over a page that is decoded: statistics, and weights of its bits."""
        logits = [logits_of(half, page) for half in (0, 1)]
        here = jnp.max(jnp.maximum(*logits), axis=1, keepdims=True)
        here = jnp.maximum(here, LOWEST)
        top = stats_ref[0, 0, 0]
        new_top = jnp.maximum(top, here)
        old, new = jnp.exp2(top - new_top), jnp.exp2(here - new_top)
        p = [jnp.exp2(x - here) for x in logits]
        stats_ref[0, 0, 0] = new_top
        stats_ref[0, 0, 1] = stats_ref[0, 0, 1] * old + (p[0] + p[1]) * new
        factors[0] = old
        for n, place in enumerate(spec.places[1]):
            both = [x * held_gains[half, place : place + 1] for half, x in enumerate(p)]
            most = jnp.max(jnp.maximum(*(jnp.abs(x) for x in both)), axis=1, keepdims=True)
            most = jnp.maximum(most, 1e-30)
            factor = PIECE / most
            factors[1 + n] = new * most * (0.5 / PIECE)  # a bit is -1/2 or 1/2
            for half, x in enumerate(both):
                whole = jax.lax.bitcast_convert_type(x * factor + ROUND, jnp.int32) - ROUND_BITS
                high = (whole + 128) >> 8
                rows = [high, whole - (high << 8)]
                unused = spec.left - 2 * spec.rows
                if unused:
                    rows.append(jnp.zeros((unused, LANES), jnp.int32))
                own = jnp.concatenate(rows, axis=0).astype(jnp.int8)
                weighted_ref[n, :, halves[half]] = own

    def add_values(slot):
        """Weighted bits of the page in a slot."""
        for n, place in enumerate(spec.places[1]):
            own = spec.lanes(place, 1)
            found = dot(weighted_ref[n], bits[slot, :, spec.lanes(place)], transposed=False)
            fresh = joined(found, spec.rows)
            for k in range(spec.tiles[place]):
                tile = slice(k * LANES, (k + 1) * LANES)
                at = slice(own.start + k * LANES, own.start + (k + 1) * LANES)
                old = acc_ref[0, 0, :, at] * factors[0]
                acc_ref[0, 0, :, at] = old + fresh[:, tile] * factors[1 + n]

    def body(i, _):
        slot, page = i % 2, page0 + i

        @pl.when(i + 1 < count)
        def _():
            send(1 - slot, page + 1)

        @pl.when(i < count)
        def _():
            arrived(slot, page)

        # The page before, of which there is none at first: no row sees its tokens. Its softmax is
        # what the matrix unit would wait for, were it not decoding the next one.
        weigh(page - 1)
        for place in range(units):
            unpack(slot, place)
        gains = gains_of(slot)
        for half in (0, 1):
            keep(slot, half, keys(slot, half, gains[half][0]))
            held_gains[half] = gains[half][1]
        add_values(1 - slot)
        return 0

    # Once more than there are pages: what was read before stands for the page behind the last.
    jax.lax.fori_loop(0, jnp.where(count > 0, count + 1, 0), body, 0)


def pair(x):
    """float32 as two bfloat16, the first one cut: off by 2^-16 of it at most."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
    high = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


def _signs(words):
    """int8 [32, 128] of every mask j: +1 where a byte has bit j, else -1."""
    absent = ~words
    for j in range(MASKS):
        n = (absent >> jnp.uint32(j)) & jnp.uint32(BYTE_ONES)
        yield pltpu.bitcast(((n << 8) - (n << 1)) | jnp.uint32(BYTE_ONES), jnp.int8)


def _bytes(words):
    """int8 [256, lanes]: bits of a page as 0 or 1."""
    ones = jnp.uint32(BYTE_ONES)
    parts = [pltpu.bitcast((words >> jnp.uint32(j)) & ones, jnp.int8) for j in range(MASKS)]
    return jnp.concatenate(parts, axis=0)


def _product(left, right):
    dims = (((1,), (0,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)
