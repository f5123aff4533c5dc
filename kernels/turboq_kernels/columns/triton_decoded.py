"""Logits of keys that no query can be folded for: decoded and turned inside a kernel (GPU).

Keys before their rotary embedding, or in blocks of few positions, have a rotation each or nearly so
(`turboq.cache.key_form`); `columns.queries` would need as many rows of folded queries. A program of
`turboq_logits` takes half a page and a KV head, whose pairs of channels (a, b) turn together:

    k = mean + sum over lanes l of own[t, l] matrix[:, l],    own = gain (2 bit - 1), float16
    k = (a cos - b sin, b cos + a sin) of all pairs, at the start of t's block;    logit = q . k

a and b lie side by side in the matrix, whatever the layout of pairs; channels that do not turn have
cosine 1. Bits become the matrix unit's operand in registers, a head's matrix passes shared memory
once for 128 tokens. Logits go to memory, 4 bytes a row and token, where the kernel of
`columns.triton` takes them for its own: masks, softmax and values are its.

Matrix, gains (of the largest) and decoded keys are float16, every head times a power of two under
which no key exceeds 2^15; queries are two float16 numbers, products float32. A key's coordinate is
off by at most 2^-10 of sum_l |gain matrix[c, l]| / 2 and 2^-11 of itself.
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
from jaxtyping import Array, Float, Int, UInt32

from turboq.cache.columns import pages_of
from turboq.cache.layer import KVLayer
from turboq.numbers import rope as rotary
from turboq.numbers.packing import PAGE, ROWS
from turboq.numbers.rope import Rope
from turboq_kernels.columns import triton
from turboq_kernels.columns.linear import GAIN_BITS, LinearLayer, units_of
from turboq_kernels.columns.queries import Folded
from turboq_kernels.target import target
from turboq_kernels.triton_memory import store

PAIRS = 64  # of channels, at a time
WARPS, STAGES = 4, 3
LARGEST = 2.0**15  # of a decoded key
FULL = 2**15 - 1  # 1 among cosines and sines, 16 bits each
_SIGN, _ONE = np.uint32(0x80008000), np.uint32(0x00010001)
# Tokens of a program are those of half of every word's bits: 8 x 2 x 8, bit 3 to 1, bit 0, word
# row, which is how the matrix unit's left operand lies in warps.
TILE = PAGE // 2
_SHAPE = (8, 2, ROWS)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoded:
    """K of a layer as this kernel reads it: U lanes of a group's units, C pairs, padded."""

    matrix: Any  # float16 [K, 2 C, U], a and b of every pair side by side
    means: Any  # float32 [K, P, 2 C]
    gains: Any  # float32 [units, 16], of each unit's largest
    scale: Any  # float32 [K], what logits are multiplied by
    lanes: Any  # int32 [J, p], first lane of the pool of the unit at each place of a group
    units: Any  # int32 [J, p]
    values: Any  # float32 [J, P, Y] of joined heads, for `unit_values`, else [J, 1, E, Y]


def reads(layer: KVLayer) -> bool:
    """Whether keys of a layer are read so: those that no query is folded for."""
    return layer.rope is not None and layer.rope_block not in triton.BLOCKS


def added(made: LinearLayer, layer: KVLayer, words: UInt32[Array, "N P R C"]) -> LinearLayer:
    """With what this kernel needs, where it is the one, and without what it does not."""
    if layer.rope is None or not reads(layer) or made.decoded is not None:
        return made
    return made.as_decoded(prepare(made, layer.rope, pool_lanes=words.shape[-1]))


@functools.partial(jax.jit, static_argnames=("rope", "pool_lanes"))
def prepare(layer: LinearLayer, rope: Rope, *, pool_lanes: int) -> Decoded:
    """Once per plan."""
    whole = triton.local_of(layer, 0, layer.k.matrix, pool_lanes)
    largest = jnp.max(jnp.abs(layer.k.gains), axis=1)
    largest = jnp.where(largest > 0, largest, 1.0)
    widths = triton.widths(layer, 0)
    units = units_of(layer.unit_groups)[:, : len(widths)]
    worth = 0.5 * largest[np.repeat(units, widths, axis=1)]  # [J, U]
    matrix = (whole * worth[:, None, None]).reshape(-1, *whole.shape[2:])  # [K, D, U]
    bound = jnp.sum(jnp.abs(matrix), axis=2) + jnp.max(jnp.abs(layer.means), axis=1)
    bound = jnp.sqrt(2.0) * jnp.max(bound, axis=1)  # of a pair, turned
    power = jnp.floor(jnp.log2(LARGEST / jnp.where(bound > 0, bound, 1.0)))
    scale = jnp.exp2(power)[:, None, None]
    places = pairs_of(rope, matrix.shape[1])

    def in_pairs(x):
        """a and b of every pair side by side, along the last axis."""
        padded = jnp.pad(x * scale, ((0, 0), (0, 0), (0, 1)))
        both = jnp.stack([padded[..., at] for at in places], axis=-1)
        return both.reshape(*x.shape[:2], -1)

    values = triton.local_of(
        layer, 1, layer.v.matrix if layer.own is None else layer.own[None], pool_lanes
    )
    if layer.own is not None:
        values = values[:, 0]
    return Decoded(
        matrix=in_pairs(matrix.swapaxes(1, 2)).swapaxes(1, 2).astype(jnp.float16),
        means=in_pairs(layer.means), gains=layer.k.gains / largest[:, None],
        scale=jnp.exp2(-power),
        lanes=triton.windows(layer, pool_lanes)[0][units], units=jnp.asarray(units, jnp.int32),
        values=values,
    )  # fmt: skip


def pairs_of(rope: Rope, dim: int) -> tuple[Int[np.ndarray, "C"], Int[np.ndarray, "C"]]:
    """Channels of all pairs, first those that turn; `dim` where there is none."""
    half, rest = rope.dim // 2, np.arange(rope.dim, dim)
    turning = np.arange(rope.dim)
    split = (turning[:half], turning[half:])
    if rope.layout == "interleaved":
        split = (turning[::2], turning[1::2])
    cut = -(-len(rest) // 2)
    a, b = (np.concatenate(x) for x in zip(split, (rest[:cut], rest[cut:]), strict=True))
    count = _padded(len(a))
    a, b = (np.pad(x, (0, count - len(x)), constant_values=dim) for x in (a, b))
    return a, b


def _chunk(pairs: int) -> int:
    """Pairs at a time; of more than can be, so few that turning them spills no registers."""
    return PAIRS // 2 if pairs > PAIRS else max(8, pl.next_power_of_2(pairs))


def _padded(pairs: int) -> int:
    chunk = _chunk(pairs)
    return -(-pairs // chunk) * chunk


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything static about a call."""

    m: int  # query rows of a KV head, padded
    rows: int
    run: int  # lanes of a step
    places: tuple[int, ...]  # steps of every unit of a group
    each: int  # KV heads of a group
    block: int
    shared: bool  # rotations are those of all sequences
    gained: bool
    asm: bool
    interpret: bool


def logits(
    rows: Float[Array, "B M D"],
    words: UInt32[Array, "N P R C"],
    made: LinearLayer,
    layer: KVLayer,
    first: Int[Array, "B"] | None,
    starts: Int[Array, "B M"],
    ends: Int[Array, "B M"],
    *,
    table: Int[Array, "B p"] | None = None,
    interpret: bool = False,
) -> Folded:
    """q . k of every row and slot, a `bias`; anything in pages of which no row sees a slot.

    Slot 0 is position first[b] (None: 0). `table`: as of `LayerState`.
    """
    own, heads, pages = made.decoded, made.decoded.matrix.shape[0], pages_of(words, table)
    assert layer.rope is not None
    plan = planned(made, layer, rows.shape[1] // heads, first, interpret)
    queries, unit = _queries(rows, layer.rope, own, plan)
    pages_seen = triton.seen_pages(starts, jnp.minimum(ends, pages * PAGE))
    bias = launch(queries, unit, *pages_seen, words, made, layer, first, plan=plan, table=table)
    return Folded(left=None, largest=None, bias=bias)


def planned(
    made: LinearLayer, layer: KVLayer, rows: int, first: Int[Array, "B"] | None, interpret: bool
) -> Plan:
    """What is static about a call of so many query rows of a KV head."""
    least, run = 4 if target().ptx else 8, triton.tuning(made).run
    return Plan(
        m=max(least, pl.next_power_of_2(rows)), rows=rows,
        each=made.decoded.matrix.shape[0] // made.groups, run=run,
        places=tuple(width // run for width in triton.widths(made, 0)), block=layer.rope_block,
        shared=first is None, gained=made.gained, asm=target().ptx and not interpret,
        interpret=interpret,
    )  # fmt: skip


def launch(
    queries: Float[Array, "B K n c"],
    unit: Float[Array, "B M"],
    low: Int[Array, "_"],
    high: Int[Array, "_"],
    words: UInt32[Array, "N P R C"],
    made: LinearLayer,
    layer: KVLayer,
    first: Int[Array, "B"] | None,
    *,
    plan: Plan,
    table: Int[Array, "B p"] | None,
) -> Float[Array, "B M S"]:
    """`logits` of queries as `_queries` makes them, in pages low[b] to high[b]."""
    rope, block, own = layer.rope, layer.rope_block, made.decoded
    assert rope is not None
    pages = pages_of(words, table)
    words = triton.padded(words, made)
    inputs = {
        "words": words, "table": table, "queries": queries, "unit": unit, "low": low, "high": high,
        "turns": _turns(rope, block, first, pages * PAGE, own.means.shape[2] // 2),
        "after": jnp.zeros(1, jnp.int32) if first is None else first % block,
        "gain_lanes": made.gain_lanes, "matrix": own.matrix, "means": own.means,
        "gains": own.gains, "lanes": own.lanes, "units": own.units,
        "steps": np.full(1, sum(plan.places), np.int32),  # loaded, or short loops are unrolled
        # Loaded and not computed: see `columns.triton`.
        "left": np.arange(15, -1, -1, dtype=np.uint32).reshape(8, 2),
    }  # fmt: skip
    leaves, tree = jax.tree.flatten(inputs)
    batch, heads, m = len(queries), own.matrix.shape[0], unit.shape[1]
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan, tree=tree),
        grid=(2 * pages, heads, batch),
        out_shape=jax.ShapeDtypeStruct((batch, m, pages * PAGE), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=plan.interpret,
        name="turboq_logits",
    )(*leaves)


def _queries(
    rows: Float[Array, "B M D"], rope: Rope, own: Decoded, plan: Plan
) -> tuple[Float[Array, "B K n c"], Float[Array, "B M"]]:
    """Pairs of channels of pairs of float16 (2 i and 2 i + 1 are row i), and their unit."""
    batch, _, dim = rows.shape
    heads = len(own.scale)
    largest = jnp.max(jnp.abs(rows), axis=-1)
    unit = jnp.where(largest == 0, 1.0, largest)
    padded = jnp.pad(rows / unit[..., None], ((0, 0), (0, 0), (0, 1)))
    both = jnp.stack([padded[..., at] for at in pairs_of(rope, dim)], axis=-1)
    both = both.reshape(*rows.shape[:2], -1)  # [B, M, 2 C]
    # Not astype there and back, which XLA may leave out.
    high = jax.lax.reduce_precision(both, exponent_bits=5, mantissa_bits=10)
    both = (
        jnp.stack([high, (both - high) * triton.LOW], axis=2)
        .astype(jnp.float16)
        .reshape(batch, heads, 2 * plan.rows, -1)
    )
    both = jnp.pad(both, [(0, 0)] * 2 + [(0, 2 * (plan.m - plan.rows)), (0, 0)])
    return both, unit * (2.0**15 / FULL) * jnp.repeat(own.scale, plan.rows)[None]


def _turns(
    rope: Rope, block: int, first: Int[Array, "B"] | None, slots: int, pairs: int
) -> UInt32[Array, "b Q C"]:
    """cos and sin, as `_unpacked` reads them, at the start of every block that has a slot."""
    count = -(-slots // block) + (block > 1)
    start = block * jnp.arange(count, dtype=jnp.int32)[None]
    if first is not None:
        start = start + (first // block * block)[:, None]
    cos, sin = (
        (jnp.round(x * FULL) + 2.0**15).astype(jnp.uint32) for x in rotary.tables(rope, start)
    )
    more = ((0, 0), (0, 0), (0, pairs - cos.shape[-1]))
    return jnp.pad(cos | sin << 16, more, constant_values=np.uint32(FULL + 2**15 | 2**31))


def _unpacked(word: UInt32[Array, "*s"]) -> Float[Array, "*s"]:
    """x FULL / 2^15 of round(x FULL) + 2^15 in bits 7 to 22 of a word: a number from 2 to 4."""
    bits = (word & jnp.uint32(0x007FFF80)) | jnp.uint32(0x40000000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32) - 3.0


def _kernel(*refs, plan: Plan, tree) -> None:
    x: dict[str, Any] = jax.tree.unflatten(tree, refs[: tree.num_leaves])
    out_ref = refs[tree.num_leaves]
    tile, n, b = (pl.program_id(i) for i in range(3))
    page = tile // 2
    pl.when((page >= x["low"][b]) & (page < x["high"][b]))(
        lambda: _tile(x, out_ref, page, tile % 2, n, b, plan)
    )


def _tile(x, out_ref, page, half, n, item, plan: Plan) -> None:
    group = n // plan.each
    pairs = x["means"].shape[2] // 2
    chunk = _chunk(pairs)
    at, lane = (jnp.arange(k, dtype=jnp.int32) for k in (TILE, plan.run))
    word_row = jnp.arange(ROWS, dtype=jnp.int32)
    where = triton.located(x, item, page)
    bit = 16 * half + at // ROWS
    slots = page * PAGE + 32 * (bit % 8) + 8 * (bit // 8) + at % ROWS  # `turboq.cache.columns`
    left = x["left"][jnp.arange(8, dtype=jnp.int32)[:, None], jnp.arange(2, dtype=jnp.int32)[None]]
    left = left.reshape(*_SHAPE[:2], 1, 1)

    def gains(unit):
        """Of a unit at every token, negative, twice in a word."""
        gain = jnp.full((TILE,), -1.0, jnp.float32)
        if plan.gained:
            code = jnp.zeros((TILE,), jnp.int32)
            for p in range(GAIN_BITS):
                lane = x["gain_lanes"][0, unit, p]
                word = plgpu.load(
                    x["words"].at[*where, at % ROWS, jnp.maximum(lane, 0)],
                    mask=lane >= 0,
                    other=0,
                )
                code += ((word >> bit.astype(jnp.uint32)) & jnp.uint32(1)).astype(jnp.int32) << p
            gain = -x["gains"][unit, code]
        gain = jax.lax.bitcast_convert_type(gain.astype(jnp.float16), jnp.uint16)
        return gain.astype(jnp.uint32) * _ONE

    starts = np.cumsum([0, *plan.places])
    units = [x["units"][group, place] for place in range(len(plan.places))]
    firsts = [x["lanes"][group, place] - plan.run * i for place, i in enumerate(starts[:-1])]
    factors = [gains(unit) for unit in units]

    def own(step):
        """+-gain of a step's lanes, float16 [TILE, run]."""
        first, gain = firsts[0], factors[0]
        for i in range(1, len(firsts)):
            first = jnp.where(step >= starts[i], firsts[i], first)
            gain = jnp.where(step >= starts[i], factors[i], gain)
        words = x["words"][*where, word_row[:, None], (first + step * plan.run + lane)[None, :]]
        low, high = jnp.unstack(words.reshape(ROWS, plan.run // 2, 2), axis=-1)
        both = _halves(low, high, half, plan.asm).reshape(1, 1, ROWS, plan.run // 2)
        signed = ((both << left) & _SIGN) ^ gain.reshape(*_SHAPE, 1)
        parts = [(signed >> 16 * i).astype(jnp.uint16) for i in range(2)]
        numbers = jnp.stack(parts, axis=-1).reshape(TILE, plan.run)
        return jax.lax.bitcast_convert_type(numbers, jnp.float16)

    columns = jnp.arange(2 * plan.m, dtype=jnp.int32)
    found = jnp.zeros((TILE, 2 * plan.m), jnp.float32)
    after = slots if plan.shared else slots + x["after"][item]
    turn, turned_as = after // plan.block, 0 if plan.shared else item
    offset = (after % plan.block)[:, None] if plan.block > 1 else jnp.zeros((1, 1), jnp.int32)

    def logits(i, found):
        """Those of some pairs' channels, added."""
        pair = i * chunk + jnp.arange(chunk, dtype=jnp.int32)
        channel = 2 * chunk * i + jnp.arange(2 * chunk, dtype=jnp.int32)

        def step(i, key):
            lanes = i * plan.run + lane
            return key + _dot(own(i), x["matrix"][n, channel[:, None], lanes[None, :]])

        mean = jnp.broadcast_to(x["means"][n, offset, channel[None, :]], (TILE, 2 * chunk))
        key = jax.lax.fori_loop(0, x["steps"][0], step, mean)
        a, b = jnp.unstack(key.reshape(TILE, chunk, 2), axis=-1)
        word = x["turns"][turned_as, turn[:, None], pair[None, :]]
        cos, sin = (_unpacked(y) for y in (word << 7, word >> 9))
        key = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
        key = key.reshape(TILE, 2 * chunk).astype(jnp.float16)
        return found + _dot(key, x["queries"][item, n, columns[:, None], channel[None, :]])

    found = jax.lax.fori_loop(0, pairs // chunk, logits, found)
    row = jnp.arange(plan.m, dtype=jnp.int32)
    rows = n * plan.rows + jnp.minimum(row, plan.rows - 1)
    value = triton.one(found) * x["unit"][item, rows][None, :]
    mask = (row < plan.rows)[None, :] & (slots >= 0)[:, None]
    index = (item, (n * plan.rows + row)[None, :], slots[:, None])
    store(out_ref, index, value, mask, interpret=plan.interpret)


def _halves(low: Array, high: Array, half: Array, asm: bool) -> Array:
    """The low (0) or high (1) 16 bits of two words side by side."""
    if asm:
        select = jnp.where(half == 0, jnp.uint32(0x5410), jnp.uint32(0x7632))
        return triton.assembly("prmt.b32 $0, $1, $2, $3;", low, high, select)
    shift = 16 * half.astype(jnp.uint32)
    return (low >> shift & 0xFFFF) | (high >> shift) << 16


def _dot(left: Array, right: Array) -> Array:
    return jax.lax.dot_general(
        left, right, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
