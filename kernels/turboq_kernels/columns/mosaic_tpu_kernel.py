"""The body of the TPU column kernel: all heads of one sequence, page by page.

    raw [2 M, 128] = [high; low] [2 M, W] @ bits [128 tokens, W]^T     twice a page
    sums [2 M, W'] = [high; low] [2 M, 128] @ bits [128 tokens, W']

and the gains, which are in a few lanes, as integers: weights [M, .] @ bits^T.

A mask leaves bytes 2^j (bit 7: -128). Logits and gains are divided by them per token; for values
the weights of half a page are multiplied by what its bytes lack to 8 or 128, at the cost of 3 of
their 15 bits.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from turboq.numbers.packing import PAGE, ROWS
from turboq_kernels.columns.linear import GAIN_BITS, LANES

HALF = PAGE // 2  # tokens of one operand of the matrix unit
MASKS = 4  # of half a page
LOWEST = -1e38
LOG2_E = 1.4426950408889634
PIECE = 32639.0  # 127 * 256 + 127: the largest integer of a signed high and low byte
ROW_TILE = 16  # twice that is a tile of int8


@dataclasses.dataclass(frozen=True)
class Spec:
    """Everything static about a call."""

    rows: int  # M, a multiple of ROW_TILE
    widths: tuple[int, int]  # lanes of K and V, multiples of 128
    blocks: int  # of queries; 1: the same for all tokens
    pages: int
    per_token: bool  # a bias per token
    softcap: float | None
    gained: bool
    gain_lanes: int  # lanes of K that may hold gains

    @property
    def turned(self) -> bool:
        """Whether queries differ from block to block of positions."""
        return self.blocks > 1

    @property
    def per_page(self) -> int:
        return self.blocks // self.pages if self.turned else 1


def kernel(
    spec: Spec, plan, first, row_ref, start_ref, end_ref, gains_ref, weights_ref, query_ref,
    constant_ref, bias_ref, words, acc_ref, stats_ref, k_words, v_words, queries, constants,
    biases, semaphores,
):  # fmt: skip
    b, m = pl.program_id(0), spec.rows
    page0, count = plan[2 * b], plan[2 * b + 1]
    k_lanes, v_lanes = (
        pl.ds(pl.multiple_of(first[i] * LANES, LANES), spec.widths[i]) for i in range(2)
    )
    gain_lanes = pl.ds(pl.multiple_of(first[2] * LANES, LANES), spec.gain_lanes)

    def transfers(slot, page):
        yield words.at[b, page, :, k_lanes], k_words.at[slot]
        yield words.at[b, page, :, v_lanes], v_words.at[slot]
        if spec.turned:
            own = pl.ds(page * spec.per_page, spec.per_page)
            yield query_ref.at[b, own], queries.at[slot]
            yield constant_ref.at[b, own], constants.at[slot]
        if spec.per_token:
            yield bias_ref.at[b, page], biases.at[slot]

    def send(slot, page):
        for source, target in transfers(slot, page):
            pltpu.make_async_copy(source, target, semaphores.at[slot]).start()

    def arrived(slot, page):
        for source, target in transfers(slot, page):
            pltpu.make_async_copy(source, target, semaphores.at[slot]).wait()

    acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)
    stats_ref[...] = jnp.zeros(stats_ref.shape, jnp.float32)
    stats_ref[0, 0] = jnp.full((m, LANES), LOWEST, jnp.float32)
    unit = row_ref[0]
    orders = [_order(m, half) for half in (0, 1)]

    @pl.when(count > 0)
    def _():
        send(0, page0)

    def body(i, _):
        slot, page = i % 2, page0 + i

        @pl.when(i + 1 < count)
        def _():
            send(1 - slot, page + 1)

        arrived(slot, page)
        logits, gained = [], []
        for half, (token, inverse, _lacking) in enumerate(orders):
            which = half if spec.per_page > 1 else 0
            query = queries[slot, which] if spec.turned else query_ref[0, 0]
            constant = constants[slot, which] if spec.turned else constant_ref[0, 0]
            raw = _dot(query, _bytes_of(k_words[slot], half), transposed=True)
            value = raw[:m].astype(jnp.float32) * 256.0 + raw[m : 2 * m].astype(jnp.float32)
            value = value * inverse * unit + constant
            if spec.gained:
                gains = _bytes_of(k_words[slot, :, gain_lanes], half)
                found = _dot(weights_ref[...], gains, transposed=True)
                code = (found[:m].astype(jnp.float32) * inverse).astype(jnp.int32)
                low = code & ((1 << GAIN_BITS) - 1)
                high = (code >> GAIN_BITS) & ((1 << GAIN_BITS) - 1)
                value = value * jnp.take_along_axis(gains_ref[0], low, axis=1)
                gained.append(jnp.take_along_axis(gains_ref[1], high, axis=1))
            if spec.per_token:
                value = value + biases[slot, :, half * HALF : (half + 1) * HALF]
            else:
                value = value + bias_ref[0, 0]
            if spec.softcap:
                value = jnp.tanh(value) * (spec.softcap * LOG2_E)
            at = token + page * PAGE
            seen = (at >= start_ref[0]) & (at < end_ref[0])
            logits.append(jnp.where(seen, value, 2 * LOWEST))

        here = jnp.max(jnp.maximum(*logits), axis=1, keepdims=True)
        here = jnp.maximum(here, LOWEST)
        top = stats_ref[0, 0]
        new_top = jnp.maximum(top, here)
        old, new = jnp.exp2(top - new_top), jnp.exp2(here - new_top)
        p = [jnp.exp2(x - here) for x in logits]
        stats_ref[0, 0] = new_top
        stats_ref[0, 1] = stats_ref[0, 1] * old + (p[0] + p[1]) * new

        weighted = [x * g for x, g in zip(p, gained, strict=True)] if spec.gained else p
        scaled = [x * lacking for x, (_, _, lacking) in zip(weighted, orders, strict=True)]
        size = jnp.max(jnp.maximum(*(jnp.abs(x) for x in scaled)), axis=1, keepdims=True)
        size = jnp.maximum(size, 1e-30)
        whole = [jnp.round(x * (PIECE / size)) for x in scaled]
        # What the bits are multiplied with is summed, not what it was before rounding.
        mass = sum(x / lacking for x, (_, _, lacking) in zip(whole, orders, strict=True))
        gain = new * size * (1.0 / PIECE)
        stats_ref[0, 2] = stats_ref[0, 2] * old + mass * gain
        total = jnp.zeros((2 * m, spec.widths[1]), jnp.int32)
        for half, x in enumerate(whole):
            integers = x.astype(jnp.int32)
            high = (integers + 128) >> 8
            left = jnp.concatenate([high, integers - (high << 8)], axis=0).astype(jnp.int8)
            raw = _dot(left, _bytes_of(v_words[slot], half), transposed=False)
            total = total + (raw if half else raw << MASKS)
        fresh = total[:m].astype(jnp.float32) * 256.0 + total[m:].astype(jnp.float32)
        keep, take = (x[:, :1] for x in (old, gain * (1.0 / 128.0)))
        acc_ref[0] = acc_ref[0] * keep + fresh * take
        return 0

    jax.lax.fori_loop(0, count, body, 0)


def _order(m: int, half: int):
    """Of the 128 tokens of half a page, [M, 128]: slot in the page, 1 / byte, what a byte lacks."""
    n = jax.lax.broadcasted_iota(jnp.int32, (m, LANES), 1)
    mask, inner = n // 32, n % 32
    j = mask + MASKS * half
    token = 32 * j + ROWS * (inner % 4) + inner // 4
    size = jnp.exp2(-j.astype(jnp.float32))
    inverse = jnp.where(j == 7, -size, size)
    lacking = inverse * (128.0 if half else 8.0)
    return token, inverse, lacking


def _bytes_of(words, half: int):
    """int8 [128, W]: bytes of half a page, 32 tokens of a mask after the other."""
    masks = [jnp.uint32((0x01010101 << (j + MASKS * half)) & 0xFFFFFFFF) for j in range(MASKS)]
    return jnp.concatenate([pltpu.bitcast(words & mask, jnp.int8) for mask in masks], axis=0)


def _dot(left, right, transposed: bool):
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.int32)
