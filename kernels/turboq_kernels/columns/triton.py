"""Columns on GPUs (Pallas-Triton): one group's stored bits as float16 operands of the matrix unit.

One program reads one group (a KV head, or heads that are joined) of one part of the pages
(`decode.triton_parts`), a page at a time; lanes are read in runs of one unit, as many as the widest
group has. Lanes that are none of the unit's have no weight.

    K run [256, run] of bits   S [256, M] = gain (sum over runs of run q - sum(q) / 2) + bias
    softmax over a page, online     acc [run, M] += run^T (p gain)

Bit 8 b + i of a word is masked where byte b lies in its half word: the subnormal float16 number
2^(i - 24), exact in the matrix unit (Fasi, Higham, Mikaitis, Pranesh, PeerJ CS 7:e330, 2021); plain
operations, without NVIDIA's, convert it to 2^i. What a token has too little is multiplied into its
logits and weights. Queries and weights are two float16 numbers each, side by side, 22 bits of the
largest.

Tokens and lanes are so ordered that the thread that holds a word is one whose fragment of the
matrix unit's left operand the word's bits are: only words pass shared memory. Of joined heads every
unit has its gain and both sides read all runs. Lanes of queries and sums are a group's own
(`local`): its runs, one after another.
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

from turboq.numbers.packing import PAGE, ROWS
from turboq_kernels.columns.linear import GAIN_BITS, LinearLayer, units_of
from turboq_kernels.columns.queries import Folded
from turboq_kernels.columns.types import Sums
from turboq_kernels.decode import triton_parts
from turboq_kernels.decode import triton_unpack as unpacking
from turboq_kernels.decode.types import Partial
from turboq_kernels.target import target

LOG2E, LN2 = 1.4426950408889634, 0.6931471805599453
STAGES = 2
MAX_ROWS = 16  # of a group
LARGEST = 2.0**14  # of queries and weights as float16
_SMALLEST = 24  # 2^-24: what bit 0 of a half word is as float16
# Two elements at a time: a selector of two bytes (the same in every step), those bytes, the masks.
BYTES_ASM = (
    "{ .reg .b32 a; prmt.b32 a, $3, 0, 0x4420; or.b32 a, a, 0x400; "
    "prmt.b32 a, $1, $2, a; and.b32 $0, a, $4; }"
)
BLOCKS = (PAGE,)  # positions of a block of keys


def unsupported(rows: int, block: int | None) -> str | None:
    """Why this kernel cannot run a case, or None.

    `rows` of queries a group; `block` None: keys after RoPE.
    """
    if rows > MAX_ROWS:
        return f"{rows} query rows of a KV head or joined heads; it reads up to {MAX_ROWS}"
    if block is not None and block not in BLOCKS:
        return f"keys of blocks of {block} positions; it reads blocks of {BLOCKS} positions"
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """Lanes of a run, warps (16 lanes of a run each), programs a multiprocessor holds."""

    run: int
    num_warps: int
    residency: int


APART = Tuning(run=64, num_warps=4, residency=2)
JOINED = Tuning(run=128, num_warps=8, residency=1)


def tuning(layer: LinearLayer) -> Tuning:
    return JOINED if layer.joined else APART


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything static about a call."""

    run: int  # lanes
    m: int  # query rows of a group, padded
    rows: int  # query rows of a group
    places: tuple[tuple[int, ...], tuple[int, ...]]  # runs of K, and of V, at each place of a group
    joined: int  # heads; 0: none, K and V have units of their own
    turned: bool
    per_token: bool
    gained: bool
    scale: float
    softcap: float | None
    asm: bool  # NVIDIA's instructions, or plain operations

    @property
    def shift(self) -> int:
        """Bit 0 of a byte is 2^-shift: plain operations convert it, compilers flush subnormals."""
        return _SMALLEST if self.asm else 0


def attend(
    folded: Folded,
    words: UInt32[Array, "B P R C"],
    layer: LinearLayer,
    starts: Int[Array, "B M"],
    ends: Int[Array, "B M"],
    *,
    scale: float,
    softcap: float | None,
    interpret: bool = False,
    splits: int | None = None,
) -> Sums:
    """Softmax over slots starts[b, m] <= s < ends[b, m] of every row (`columns.queries`).

    Lanes of `folded`, and of the sums, are those of `local`. `splits` None spreads the tokens over
    what the GPU runs at a time; with a number, what a sequence gives does not depend on the others
    of its batch.
    """
    batch, rows = starts.shape
    groups, pages = layer.groups, words.shape[1]
    plan, count = planned(
        layer, batch, pages, rows, scale=scale, softcap=softcap, splits=splits, interpret=interpret,
        turned=folded.left.shape[1] > 1, per_token=folded.bias.shape[-1] > 1,
    )  # fmt: skip
    ends = jnp.minimum(ends, pages * PAGE)
    seen = ends > starts
    low = jnp.min(jnp.where(seen, starts, jnp.iinfo(jnp.int32).max), axis=1) // PAGE
    high = -(-jnp.max(jnp.where(seen, ends, 0), axis=1) // PAGE)
    if count == batch or splits is not None:
        parts = triton_parts.split(low, high, splits or 1)
    else:
        parts = triton_parts.spread(low, high, count)
    largest = jnp.max(jnp.abs(layer.v.gains), axis=1)
    weights, unit = _weights(folded, groups, plan.m)
    ready = Ready(
        weights=weights, unit=unit, half=_half(layer, folded), bias=folded.bias, starts=starts,
        ends=ends, parts=list(parts[:3]), lanes=_windows(layer, words.shape[-1]),
        most=jnp.where(largest > 0, largest, 1.0),
    )  # fmt: skip
    whole = launch(ready, words, layer, plan=plan, count=count, interpret=interpret)
    if count > batch:
        whole = triton_parts.merge(whole, parts.start, batch=batch, interpret=interpret)
    own = jax.tree.map(lambda x: x[:, :, : plan.rows].reshape(batch, rows, *x.shape[3:]), whole)
    return Sums(acc=own.acc, total=own.total, top=own.top)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Ready:
    """What the kernel takes of a step beside the layer and its pool."""

    weights: Any  # float16 [B, Q, J, U, 2 m]
    unit: Any  # float32 [B, M]
    half: Any  # float32 [B, Q, M, p]
    bias: Any  # float32 [B, M, S or 1]
    starts: Any  # int32 [B, M]
    ends: Any  # int32 [B, M], within the pool
    parts: Any  # item, first and last page of every part
    lanes: Any  # of K and V: `_windows`
    most: Any  # float32 [U], the largest gain of each unit's values, or 1


def planned(
    layer: LinearLayer, batch: int, pages: int, rows: int, *, scale: float, softcap: float | None,
    splits: int | None, turned: bool, per_token: bool, interpret: bool,
) -> tuple[Plan, int]:  # fmt: skip
    """What is static about a call of so many query rows, and its parts."""
    groups, tuned, gpu = layer.groups, tuning(layer), target()
    count = batch * (splits or 1)
    if splits is None:
        slots = gpu.processors * tuned.residency
        count = triton_parts.count(batch, groups, pages, slots)
    plan = Plan(
        run=tuned.run, m=max(4, 1 << (rows // groups - 1).bit_length()), rows=rows // groups,
        places=_places(layer), joined=len(layer.widest) // 2 if layer.joined else 0,
        turned=turned, per_token=per_token, gained=layer.gained, scale=scale, softcap=softcap,
        asm=gpu.ptx and not interpret,
    )  # fmt: skip
    return plan, count


def launch(
    ready: Ready,
    words: UInt32[Array, "B P R C"],
    layer: LinearLayer,
    *,
    plan: Plan,
    count: int,
    interpret: bool,
) -> Partial:
    """The softmax of every part [P, J, m], lanes of `acc` those of `local`."""
    least = plan.run * max(max(runs) for runs in plan.places)
    if words.shape[-1] < least:  # a pool of less than one unit's runs
        words = jnp.pad(words, [(0, 0)] * 3 + [(0, least - words.shape[-1])])
    inputs = {
        "words": words, "weights": ready.weights, "unit": ready.unit, "bias": ready.bias,
        "half": ready.half, "starts": ready.starts, "ends": ready.ends,
        "parts": list(ready.parts), "lanes": ready.lanes, "most": ready.most,
        "gains": [layer.k.gains, layer.v.gains], "gain_lanes": layer.gain_lanes,
        # Loaded and not computed: Triton turns the layout of loads, not that of counters. XLA would
        # make what it sees to be one, 0 to 3, in a launch of its own.
        "bytes": np.array([0, 1, 2, 3, 0], np.int16),
        "masks": np.left_shift(1, np.arange(8), dtype=np.int16),
    }  # fmt: skip
    leaves, tree = jax.tree.flatten(inputs)
    lead, width = (count, layer.groups, plan.m), plan.run * sum(plan.places[1])
    tuned = tuning(layer)
    out = pl.pallas_call(
        functools.partial(_kernel, plan=plan, tree=tree),
        grid=(count, layer.groups),
        out_shape=[
            jax.ShapeDtypeStruct((*lead, width), jnp.float32),
            *[jax.ShapeDtypeStruct(lead, jnp.float32)] * 2,
        ],
        compiler_params=plgpu.CompilerParams(num_warps=tuned.num_warps, num_stages=STAGES),
        interpret=interpret,
        name="turboq_columns",
    )(*leaves)
    return Partial(acc=out[0], top=out[1], total=out[2])


def local(
    layer: LinearLayer, pool_lanes: int
) -> tuple[Float[Array, "J G D U"], Float[Array, "J G D Y"]]:
    """The matrices of K and V over each group's own lanes: runs of its units, one after another."""
    units, run = units_of(layer.unit_groups), tuning(layer).run
    windows, sides = _windows(layer, pool_lanes), []
    for i, (side, places) in enumerate(zip((layer.k, layer.v), _places(layer), strict=True)):
        place = np.repeat(np.arange(len(places)), np.asarray(places) * run)
        at = np.concatenate([np.arange(runs * run) for runs in places])
        unit = units[:, place]
        lane = windows[i][unit] - layer.first[i] + at[None]
        own = (lane >= side.start[unit]) & (lane - side.start[unit] < side.count[unit])
        matrix = side.matrix[:, :, jnp.clip(lane, 0, side.matrix.shape[-1] - 1)]
        sides.append(jnp.moveaxis(jnp.where(own[None, None], matrix, 0.0), 2, 0))
    return sides[0], sides[1]


def _windows(layer: LinearLayer, pool_lanes: int) -> list[Int[Array, "U"]]:
    """The first lane of the pool that is read of every unit, for K and for V.

    Its own, or so far before it that the window ends with the pool.
    """
    units, out = units_of(layer.unit_groups), []
    for i, (side, places) in enumerate(zip((layer.k, layer.v), _places(layer), strict=True)):
        width = np.zeros(len(layer.unit_groups), np.int32)
        width[units] = np.asarray(places)[None] * tuning(layer).run
        most = np.maximum(pool_lanes, width) - width
        out.append(jnp.clip(layer.first[i] + side.start, 0, most))
    return out


def _places(layer: LinearLayer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Runs of every unit that K, and V, of a group are read from."""
    runs = tuple(-(-lanes // tuning(layer).run) for lanes in layer.widest)
    return (runs, runs) if layer.joined else (runs[:1], runs[1:])


def _half(layer: LinearLayer, folded: Folded) -> Float[Array, "B Q M p"]:
    """-1/2 of the sum of a row's weights over the lanes of the unit at each place of its group."""
    bounds = np.cumsum([runs * tuning(layer).run for runs in _places(layer)[0]])[:-1]
    each = jnp.split(folded.left, bounds, axis=-1)
    return -0.5 * jnp.stack([jnp.sum(x, axis=-1) for x in each], axis=-1)


def _weights(
    folded: Folded, groups: int, m: int
) -> tuple[Float[Array, "B Q J U C"], Float[Array, "B M"]]:
    """Queries as pairs of float16, row 2 i and 2 i + 1 those of a group's row i, and their unit."""
    batch, blocks, rows, lanes = folded.left.shape
    unit = jnp.where(folded.largest > 0, folded.largest / LARGEST, 1.0)
    whole = folded.left / unit[:, None, :, None]
    high = jax.lax.reduce_precision(whole, exponent_bits=5, mantissa_bits=10)
    pair = jnp.stack([high, whole - high], axis=-1).astype(jnp.float16)
    pair = pair.reshape(batch, blocks, groups, rows // groups, lanes, 2)
    pair = jnp.pad(pair, [(0, 0)] * 3 + [(0, m - rows // groups)] + [(0, 0)] * 2)
    return pair.swapaxes(3, 4).reshape(batch, blocks, groups, lanes, 2 * m), unit


def _kernel(*refs, plan: Plan, tree) -> None:
    x: dict[str, Any] = jax.tree.unflatten(tree, refs[: tree.num_leaves])
    acc_ref, top_ref, total_ref = refs[tree.num_leaves :]
    part, n = pl.program_id(0), pl.program_id(1)
    b, first, last = (of[part] for of in x["parts"])
    m, run = plan.m, plan.run
    row, lane, word_row = (jnp.arange(k, dtype=jnp.int32) for k in (m, run, ROWS))
    columns = jnp.arange(2 * m, dtype=jnp.int32)
    real = row < plan.rows  # padding rows see nothing
    rows = n * plan.rows + jnp.minimum(row, plan.rows - 1)
    starts = jnp.where(real, x["starts"][b, rows], 0)
    ends = jnp.where(real, x["ends"][b, rows], 0)
    gain = plan.scale * (LOG2E if plan.softcap is None else 1.0)
    unit = x["unit"][b, rows] * gain
    small = LARGEST * 2.0**-plan.shift
    which = x["bytes"][jnp.arange(4, dtype=jnp.int32)]
    masks = x["masks"][jnp.arange(8, dtype=jnp.int32)]
    # Tokens are 4 x 4 x 2 x 8: bit 2 and 1 of i, byte b, bit 0 of i, word row.
    at = jnp.arange(PAGE, dtype=jnp.int32)
    i, byte = 2 * (at // 64) + at // 8 % 2, at // 16 % 4
    field, inner = 8 * byte + i, 32 * i + ROWS * byte + at % ROWS  # `turboq.cache.columns`
    worth = jax.lax.bitcast_convert_type((127 + plan.shift - i) << 23, jnp.float32)

    def unit_at(place):
        """The unit at a place of this group: of joined heads those of K, then those of V."""
        if not plan.joined:
            return n
        behind = pl.num_programs(1) - 1 if place >= plan.joined else 0
        return (n + behind) * plan.joined + place

    def lanes_of(side, place, i):
        """Lanes of the pool of a run of a unit; not its own have no weight."""
        return x["lanes"][side][unit_at(place)] + i * run + lane

    def places(side):
        """Where the runs of each place lie among a group's own lanes."""
        ends = np.cumsum([0, *plan.places[side]])
        return [[run * (end + i) + lane for i in range(runs)]
                for end, runs in zip(ends[:-1], plan.places[side], strict=True)]  # fmt: skip

    def queries(block):
        """Of every place: runs of weights, and half of their sum."""

        def weights(at):
            return x["weights"][b, block, n, at[:, None], columns[None, :]]

        return [
            ([weights(at) for at in runs], x["half"][b, block, rows, place])
            for place, runs in enumerate(places(0))
        ]

    once = None if plan.turned else queries(0)

    def keys(page, place, i):
        """Bits of a run of K [256, run]."""
        words = x["words"][b, page, word_row[:, None], lanes_of(0, place, i)[None, :]]
        own = _bits(
            words.reshape(1, 1, 1, ROWS, run), which.reshape(1, 4, 1, 1, 1),
            masks.reshape(4, 1, 2, 1, 1), (4, 4, 2, ROWS, run), plan,
        )  # fmt: skip
        return own.reshape(PAGE, run)

    def levels(page, place, i):
        """Bits of a run of V [run, 256]; tokens are bit 0 of b, 3 bits of i, row, bit 1 of b."""
        words = x["words"][b, page, word_row[None, :], lanes_of(1, place, i)[:, None]]
        own = _bits(
            words.reshape(run, 1, 1, 1, 2, 4, 1),
            which.reshape(2, 2).T.reshape(1, 2, 1, 1, 1, 1, 2),
            masks.reshape(1, 1, 4, 2, 1, 1, 1), (run, 2, 4, 2, 2, 4, 2), plan,
        )  # fmt: skip
        return own.reshape(run, PAGE)

    def gains(page, side, unit):
        code = jnp.zeros((PAGE,), jnp.int32)
        for p in range(GAIN_BITS):
            at = x["gain_lanes"][side, unit, p]
            word = plgpu.load(
                x["words"].at[b, page, inner % ROWS, jnp.maximum(at, 0)], mask=at >= 0, other=0
            )
            code += ((word >> field.astype(jnp.uint32)) & jnp.uint32(1)).astype(jnp.int32) << p
        return x["gains"][side][unit, code]

    def step(page, carry):
        accs, masses, total, top = carry
        slots = page * PAGE + inner
        held = queries(page) if once is None else once
        factors = [jnp.ones((PAGE,), jnp.float32)] * len(held)
        if plan.gained:
            factors = [gains(page, 0, unit_at(i)) for i in range(len(held))]
        logits = jnp.zeros((PAGE, m), jnp.float32)
        for place, (query, half) in enumerate(held):
            raw = jnp.zeros((PAGE, 2 * m), jnp.float32)
            for i, weights in enumerate(query):
                raw += _dot(keys(page, place, i), weights)
            logits += _one(raw) * (worth * factors[place])[:, None] * unit[None, :]
            logits += (half * gain)[None, :] * factors[place][:, None]
        if plan.per_token:
            logits += x["bias"][b, rows[None, :], slots[:, None]] * gain
        else:
            logits += (x["bias"][b, rows, 0] * gain)[None, :]
        if plan.softcap is not None:
            logits = jnp.tanh(logits / plan.softcap) * (plan.softcap * LOG2E)
        seen = (slots[:, None] >= starts[None, :]) & (slots[:, None] < ends[None, :])
        logits = jnp.where(seen, logits, -jnp.inf)

        new_top = jnp.maximum(top, jnp.max(logits, axis=0))
        base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        p = unpacking.exp2(logits - base[None, :], plan.asm)
        old = unpacking.exp2(top - base, plan.asm)
        twice = jnp.broadcast_to(old[:, None], (m, 2)).reshape(2 * m)
        if plan.gained and not plan.joined:
            factors = [gains(page, 1, n)]
        new_accs, new_masses = [], []
        for place, runs in enumerate(plan.places[1]):
            most = x["most"][unit_at(place)]
            weighted = _two(p * (worth * factors[place] * (small / most))[:, None])
            new_accs.append([
                accs[place][i] * twice[None, :] + _dot(levels(page, place, i), weighted)
                for i in range(runs)
            ])  # fmt: skip
            new_masses.append(masses[place] * old[None, :] + p * factors[place][:, None])
        return new_accs, new_masses, total * old[None, :] + p, new_top

    zero = jnp.zeros((PAGE, m), jnp.float32)  # summed at the end
    carry = (
        [[jnp.zeros((run, 2 * m), jnp.float32) for _ in range(runs)] for runs in plan.places[1]],
        [zero for _ in plan.places[1]], zero, jnp.full((m,), -jnp.inf, jnp.float32),
    )  # fmt: skip
    accs, masses, total, top = jax.lax.fori_loop(first, last, step, carry)
    for place, (mass, runs) in enumerate(zip(masses, places(1), strict=True)):
        scale = x["most"][unit_at(place)] / small
        less = 0.5 * jnp.sum(mass, axis=0)
        for acc, at in zip(accs[place], runs, strict=True):
            acc_ref[part, n, row[None, :], at[:, None]] = _one(acc) * scale - less[None, :]
    for ref, values in ((total_ref, jnp.sum(total, axis=0)), (top_ref, top * LN2)):
        ref[part, n, :] = values


def _bits(words: Array, which: Array, masks: Array, shape: tuple[int, ...], plan: Plan) -> Array:
    """float16 2^-shift times: byte `which` of words, masked, all broadcast to `shape`."""
    words, which, masks = (jnp.broadcast_to(y, shape) for y in (words, which, masks))
    if not plan.asm:
        shifts = 8 * which.astype(jnp.uint32)
        out = (words >> shifts).astype(jnp.uint16) & masks.astype(jnp.uint16)
        return out.astype(jnp.float16)
    (out,) = plgpu.elementwise_inline_asm(
        BYTES_ASM, args=[jax.lax.bitcast_convert_type(words, jnp.int32), which, masks],
        constraints="=r,r,r,r,r", pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.int16)],
    )  # fmt: skip
    return jax.lax.bitcast_convert_type(out, jnp.float16)


def _two(x: Float[Array, "256 M"]) -> Array:
    """float16 [256, 2 M]: x cut to 11 leading bits, and beside it what is left.

    Tokens in the order of `levels`.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    high = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFFE000), jnp.float32)
    pair = jnp.stack([high, x - high], axis=-1).astype(jnp.float16)
    columns = 2 * x.shape[1]
    by_bit = pair.reshape(4, 2, 2, 2, 2, 4, columns).transpose(2, 0, 3, 4, 5, 1, 6)
    return by_bit.reshape(PAGE, columns)


def _one(x: Float[Array, "T M2"]) -> Float[Array, "T M"]:
    """The sum of the two columns of every row."""
    return jnp.sum(x.reshape(x.shape[0], x.shape[1] // 2, 2), axis=-1)


def _dot(bits: Array, other: Array) -> Array:
    return jax.lax.dot_general(
        bits, other, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
