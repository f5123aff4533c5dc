"""The body of the TPU column kernel: all units of one sequence, page by page.

Twice a page, for 128 tokens, and for every tile of 128 lanes with the units u, u + 1, ... that have
codes there:

    [high; low] of their query rows [L, 128] @ bits [128 tokens, 128]^T  -> added to their logits
    [high; low] of their weights [L, 128] @ bits [128 tokens, 128]       -> added to the tile's sums

A unit's rows are those of its group; of joined heads a group has several units, whose logits, each
times its own gain, are added, and whose lanes are read once for keys and values.

A mask leaves bytes 2^j (bit 7: -128). Logits and gains are divided by them per token; for values
the weights of half a page are multiplied by what its bytes lack to 8 or 128, at the cost of 3 of
their 15 bits. Stored gains are a product of their own, of the few lanes that hold them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from turboq.numbers.packing import PAGE, ROWS
from turboq_kernels.columns.linear import GAIN_BITS, LANES, group_count

HALF = PAGE // 2  # tokens of one operand of the matrix unit
MASKS = 4  # of half a page
LOWEST = -1e38
LOG2_E = 1.4426950408889634
ROUND = 1.5 * 2.0**23  # added to |x| < 2**22, leaves round(x) in the low bits of the float
ROUND_BITS = 0x4B400000  # the bits of ROUND
PIECE = 32639.0  # 127 * 256 + 127: the largest integer of a signed high and low byte


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """Everything static about a call."""

    each: int  # query rows of a group, a multiple of 8
    unit_groups: tuple[int, ...]  # of every unit
    joined: bool  # K and V are read from the same lanes
    slots: int  # units that a tile may have
    widths: tuple[int, int]  # lanes of K and V, multiples of 128
    blocks: int  # of queries; 1: the same for all tokens
    pages: int
    per_token: bool  # a bias per token
    softcap: float | None
    gained: bool
    gain_lanes: int  # lanes of K that may hold gains

    @property
    def units(self) -> int:
        return len(self.unit_groups)

    @property
    def groups(self) -> int:
        return group_count(self.unit_groups)

    @property
    def rows(self) -> int:
        """M: query rows of all groups."""
        return self.groups * self.each

    @property
    def left(self) -> int:
        """L: rows of a tile's left operand, whole tiles of int8."""
        return -(-2 * self.slots * self.each // 32) * 32

    @property
    def turned(self) -> bool:
        """Whether queries differ from block to block of positions."""
        return self.blocks > 1

    @property
    def per_page(self) -> int:
        return self.blocks // self.pages if self.turned else 1


def place(table, b, page, words) -> tuple[Any, Any]:
    """Where a page of a sequence lies: its own, or by a table in a pool that sequences share.

    What a table has where a sequence has no page is not read, but must not lie outside.
    """
    if table is None:
        return b, page
    return 0, jnp.clip(table[b, page], 0, words.shape[1] - 1)


def kernel(
    spec: Spec, table, plan, places, k_units, v_units, unit_ref, start_ref, end_ref, gains_ref,
    weights_ref, query_ref, constant_ref, bias_ref, words, acc_ref, stats_ref, k_words, v_words,
    queries, constants, biases, products, weighted_ref, factors, semaphores,
):  # fmt: skip
    b, m, size = pl.program_id(0), spec.rows, spec.slots * spec.each
    of_units = spec.units * spec.each
    page0, count = plan[2 * b], plan[2 * b + 1]
    k_tiles, v_tiles = (width // LANES for width in spec.widths)
    k_lanes, v_lanes, gain_lanes = (
        pl.ds(pl.multiple_of(places[i] * LANES, LANES), width)
        for i, width in enumerate((*spec.widths, spec.gain_lanes))
    )

    def transfers(slot, page):
        item, at = place(table, b, page, words)
        # Values are read one page later.
        yield words.at[item, at, :, v_lanes], v_words.at[(page - page0) % 3]
        if not spec.joined:
            yield words.at[item, at, :, k_lanes], k_words.at[slot]
        if spec.turned:
            own = pl.ds(page * spec.per_page, spec.per_page)
            yield query_ref.at[b, own], queries.at[slot]
            yield constant_ref.at[b, own], constants.at[slot]
        if spec.per_token:
            yield bias_ref.at[b, page], biases.at[slot]

    send, arrived = copies(transfers, semaphores)

    def rows_of(units, tile):
        """Rows of the units of a tile."""
        return pl.ds(pl.multiple_of(units[tile] * spec.each, 8), size)

    def spread(x):
        """Rows of groups, one after the other for all units."""
        if not spec.joined:
            return x
        parts = [x[g * spec.each : (g + 1) * spec.each] for g in spec.unit_groups]
        return jnp.concatenate(parts, axis=0)

    def gathered(x):
        """Sums over the units of every group."""
        if not spec.joined:
            return x
        parts = [x[u * spec.each : (u + 1) * spec.each] for u in range(spec.units)]
        return jnp.concatenate([
            sum(part for part, own in zip(parts, spec.unit_groups, strict=True) if own == g)
            for g in range(spec.groups)
        ], axis=0)  # fmt: skip

    def keys(i, slot, lanes):
        """Words of keys of page i of the call."""
        return v_words[i % 3, :, lanes] if spec.joined else k_words[slot, :, lanes]

    acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)
    stats_ref[...] = jnp.zeros(stats_ref.shape, jnp.float32)
    stats_ref[0, 0] = jnp.full((of_units, LANES), LOWEST, jnp.float32)
    factors[...] = jnp.zeros(factors.shape, jnp.float32)
    weighted_ref[...] = jnp.zeros(weighted_ref.shape, jnp.int8)
    orders = [by_token(of_units, half) for half in (0, 1)]
    restores = [1.0 / order[3] for order in orders]

    @pl.when(count > 0)
    def _():
        send(0, page0)

    def add_values(i, tile):
        """Weighted values of page i of the call: of nothing, with weights of zero, for -1."""
        held = v_words[(i + 3) % 3, :, tile * LANES : (tile + 1) * LANES]
        rows, left = rows_of(v_units, tile), v_units[tile]
        raw = [
            dot(weighted_ref[half, left], _bytes_of(held, half), transposed=False)
            for half in (0, 1)
        ]
        fresh = joined((raw[0] << MASKS) + raw[1], size)
        acc_ref[0, tile] = acc_ref[0, tile] * factors[0, rows] + fresh * factors[1, rows]

    def add_products(i, slot, tile):
        held = keys(i, slot, slice(tile * LANES, (tile + 1) * LANES))
        rows = rows_of(k_units, tile)
        for half in (0, 1):
            which = half if spec.per_page > 1 else 0
            query = queries[slot, which, tile] if spec.turned else query_ref[0, 0, tile]
            raw = dot(query, _bytes_of(held, half), transposed=True)
            whole = (raw[:size] << 8) + raw[size : 2 * size]
            products[half, rows] = products[half, rows] + whole

    def body(i, _):
        slot, page = i % 2, page0 + i

        @pl.when(i + 1 < count)
        def _():
            send(1 - slot, page + 1)

        arrived(slot, page)
        products[...] = jnp.zeros(products.shape, jnp.int32)
        # Side by side, so that each fills the other's gaps.
        for tile in range(max(k_tiles, v_tiles)):
            if tile < k_tiles:
                add_products(i, slot, tile)
            if tile < v_tiles:
                add_values(i - 1, tile)

        logits, gained = [], []
        for half, (token, byte, inverse, _lacking) in enumerate(orders):
            which = half if spec.per_page > 1 else 0
            constant = constants[slot, which] if spec.turned else constant_ref[0, 0]
            size_of = products[half, :of_units].astype(jnp.float32) * inverse
            value = size_of * spread(unit_ref[0]) + constant
            if spec.gained:
                found = _bytes_of(keys(i, slot, gain_lanes), half)
                found = dot(weights_ref[...], found, transposed=True)[:of_units]
                code = jnp.where(byte == 7, -found, found) >> byte
                low = code & ((1 << GAIN_BITS) - 1)
                own = jnp.take_along_axis(gains_ref[0], low, axis=1)
                value = value * own
                if not spec.joined:
                    high = (code >> GAIN_BITS) & ((1 << GAIN_BITS) - 1)
                    own = jnp.take_along_axis(gains_ref[1], high, axis=1)
                gained.append(own)
            value = gathered(value)
            if spec.per_token:
                value = value + biases[slot, :, half * HALF : (half + 1) * HALF]
            else:
                value = value + bias_ref[0]
            if spec.softcap:
                value = jnp.tanh(value) * (spec.softcap * LOG2_E)
            at = token[:m] + page * PAGE
            seen = (at >= start_ref[0]) & (at < end_ref[0])
            logits.append(jnp.where(seen, value, 2 * LOWEST))

        here = jnp.max(jnp.maximum(*logits), axis=1, keepdims=True)
        here = jnp.maximum(here, LOWEST)
        top = stats_ref[0, 0, :m]
        new_top = jnp.maximum(top, here)
        old, new = jnp.exp2(top - new_top), jnp.exp2(here - new_top)
        p = [jnp.exp2(x - here) for x in logits]
        stats_ref[0, 0, :m] = new_top
        stats_ref[0, 1, :m] = stats_ref[0, 1, :m] * old + (p[0] + p[1]) * new

        weighted, old, new = [spread(x) for x in p], spread(old), spread(new)
        if spec.gained:
            weighted = [x * g for x, g in zip(weighted, gained, strict=True)]
        scaled = [x * order[3] for x, order in zip(weighted, orders, strict=True)]
        most = jnp.max(jnp.maximum(*(jnp.abs(x) for x in scaled)), axis=1, keepdims=True)
        most = jnp.maximum(most, 1e-30)
        factor = PIECE / most
        rounded = [x * factor + ROUND for x in scaled]
        # What the bits are multiplied with is summed, not what it was before rounding.
        mass = sum((x - ROUND) * restore for x, restore in zip(rounded, restores, strict=True))
        gain = new * most * (1.0 / PIECE)
        stats_ref[0, 2] = stats_ref[0, 2] * old + mass * gain
        factors[0, :of_units], factors[1, :of_units] = old, gain * (1.0 / 128.0)
        for half, x in enumerate(rounded):
            integers = jax.lax.bitcast_convert_type(x, jnp.int32) - ROUND_BITS
            high = (integers + 128) >> 8
            _by_unit(spec, weighted_ref, half, high, integers - (high << 8))

        return 0

    jax.lax.fori_loop(0, count, body, 0)
    for tile in range(v_tiles):
        add_values(count - 1, tile)


def copies(transfers, semaphores):
    """What starts, and what waits for, the copies (source, target) of a slot and a page."""

    def each(slot, page):
        for source, target in transfers(slot, page):
            yield pltpu.make_async_copy(source, target, semaphores.at[slot])

    def send(slot, page):
        for copy in each(slot, page):
            copy.start()

    def arrived(slot, page):
        for copy in each(slot, page):
            copy.wait()

    return send, arrived


def joined(raw, size: int):
    """float32 256 high + low of integers [L, 128], high rows first."""
    high, low = raw[:size].astype(jnp.float32), raw[size : 2 * size].astype(jnp.float32)
    return high * 256.0 + low


def _by_unit(spec: Spec, ref, half: int, high, low) -> None:
    """Left operands of V of every unit and those after it, as far as a tile may have them."""
    zeros = jnp.zeros((spec.each, LANES), jnp.int32)
    unused = spec.left - 2 * spec.slots * spec.each
    spare = [jnp.zeros((unused, LANES), jnp.int32)] if unused else []

    def rows(x, unit: int):
        return x[unit * spec.each : (unit + 1) * spec.each] if unit < spec.units else zeros

    for unit in range(spec.units):
        both = [rows(x, unit + s) for x in (high, low) for s in range(spec.slots)]
        ref[half, unit] = jnp.concatenate([*both, *spare], axis=0).astype(jnp.int8)


def by_token(m: int, half: int):
    """Of the 128 tokens of half a page, [M, 128]: slot, bit, 1 / byte, what a byte lacks."""
    n = jax.lax.broadcasted_iota(jnp.int32, (m, LANES), 1)
    mask, inner = n // 32, n % 32
    j = mask + MASKS * half
    token = 32 * j + ROWS * (inner % 4) + inner // 4
    size = jnp.exp2(-j.astype(jnp.float32))
    inverse = jnp.where(j == 7, -size, size)
    lacking = inverse * (128.0 if half else 8.0)
    return token, j, inverse, lacking


def _bytes_of(words, half: int):
    """int8 [128, lanes]: bytes of half a page, 32 tokens of a mask after the other."""
    masks = [jnp.uint32((0x01010101 << (j + MASKS * half)) & 0xFFFFFFFF) for j in range(MASKS)]
    return jnp.concatenate([pltpu.bitcast(words & mask, jnp.int8) for mask in masks], axis=0)


def dot(left, right, transposed: bool):
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.int32)
