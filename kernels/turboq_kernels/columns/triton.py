"""Columns on GPUs (Pallas-Triton): one group's stored bits as int8 operands of the matrix unit.

One program reads one group (a KV head, or heads that are joined) of one part of the pages
(`decode.triton_parts`), a page at a time; lanes are read in runs of one unit, as many as the widest
group has. Lanes that are none of the unit's have no weight.

    K run [256, run] of bits   S [256, M] = gain (sum over runs of run q - sum(q) / 2) + bias
    softmax over a page, online     acc [run, M] += run^T (p gain)

Bit 8 b + i of a word, masked in its byte, is the int8 number 2^i (-2^7 of bit 7). What a token has
too much is divided out of its logits and weights; bits 4 to 7 of V are moved down first, so weights
lose 3 bits at most. Queries and weights are two int8 numbers each, side by side (`pair`), weights
in units of a page's largest. Sums of products are exact integers.

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
from jaxtyping import Array, Float, Int, Int8, UInt32

from turboq.cache.columns import pages_of
from turboq.numbers.packing import PAGE, ROWS
from turboq_kernels.columns.linear import GAIN_BITS, LinearLayer, units_of
from turboq_kernels.columns.queries import Folded
from turboq_kernels.columns.types import Sums
from turboq_kernels.decode import triton_parts
from turboq_kernels.decode import triton_unpack as unpacking
from turboq_kernels.decode.types import Partial
from turboq_kernels.target import target, too_old

LOG2E, LN2 = 1.4426950408889634, 0.6931471805599453
STAGES = 2
MAX_ROWS = 16  # of a group
# The largest int8 number; a second one counts
# 1 / LOW of the first.
HIGH = 127.0
LOW = 254.0
_EVERY = np.uint32(0x01010101)
_ROUND = 1.5 * 2.0**23  # added to a float32 number leaves the nearest integer in its low bits
BLOCKS = (PAGE,)  # positions of a block of keys that queries are folded for


def unsupported(rows: int) -> str | None:
    """Why this kernel cannot run a case of so many query rows a group, or None."""
    if rows > MAX_ROWS:
        return f"{rows} query rows of a KV head or joined heads; it reads up to {MAX_ROWS}"
    return too_old()


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
    asm: str | None  # instructions of "ptx" or "gcn", or plain operations


def attend(
    folded: Folded,
    words: UInt32[Array, "N P R C"],
    layer: LinearLayer,
    starts: Int[Array, "B M"],
    ends: Int[Array, "B M"],
    *,
    scale: float,
    softcap: float | None,
    table: Int[Array, "B p"] | None = None,
    interpret: bool = False,
    splits: int | None = None,
) -> Sums:
    """Softmax over slots starts[b, m] <= s < ends[b, m] of every row (`columns.queries`).

    Lanes of `folded`, and of the sums, are those of `local`; without `left` its `bias` is the
    logits before their scale, as other kernels make them (`columns.triton_decoded`). `splits` None
    spreads the tokens over what the GPU runs at a time; with a number, what a sequence gives does
    not depend on the others of its batch. `table`: as of `LayerState`.
    """
    batch, rows = starts.shape
    groups, pages = layer.groups, pages_of(words, table)
    left = folded.left
    plan, count = planned(
        layer, batch, pages, rows, scale=scale, softcap=softcap, splits=splits, interpret=interpret,
        turned=left is not None and left.shape[1] > 1, per_token=folded.bias.shape[-1] > 1,
        folded=left is not None,
    )  # fmt: skip
    ends = jnp.minimum(ends, pages * PAGE)
    low, high = seen_pages(starts, ends)
    if count == batch or splits is not None:
        parts = triton_parts.split(low, high, splits or 1)
    else:
        parts = triton_parts.spread(low, high, count)
    largest = jnp.max(jnp.abs(layer.v.gains), axis=1)
    weights, unit, half = (None,) * 3
    if left is not None:
        (weights, unit), half = _weights(folded, groups, plan.m), _half(layer, folded)
    ready = Ready(
        weights=weights, unit=unit, half=half, bias=folded.bias, starts=starts, ends=ends,
        parts=list(parts[:3]), lanes=windows(layer, words.shape[-1]),
        most=jnp.where(largest > 0, largest, 1.0),
    )  # fmt: skip
    whole = launch(
        ready, words, layer, plan=plan, count=count, table=table, interpret=interpret
    )  # fmt: skip
    if count > batch:
        whole = triton_parts.merge(whole, parts.start, batch=batch, interpret=interpret)
    own = jax.tree.map(lambda x: x[:, :, : plan.rows].reshape(batch, rows, *x.shape[3:]), whole)
    return Sums(acc=own.acc, total=own.total, top=own.top)


def located(x: dict[str, Any], item, page) -> tuple[Any, Any]:
    """Where a sequence's page lies in x["words"]: among its own, or where the table has it."""
    if x["table"] is None:
        return item, page
    return 0, jnp.maximum(x["table"][item, page], 0)  # -1: a page that nobody sees


def seen_pages(
    starts: Int[Array, "B M"], ends: Int[Array, "B M"]
) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """The first page of which some row sees a slot, and the one behind the last."""
    seen = ends > starts
    low = jnp.min(jnp.where(seen, starts, jnp.iinfo(jnp.int32).max), axis=1) // PAGE
    return low, -(-jnp.max(jnp.where(seen, ends, 0), axis=1) // PAGE)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Ready:
    """What the kernel takes of a step beside the layer and its pool; None: `bias` is the logits."""

    weights: Any  # int8 [B, Q, J, 2 m, U], pairs, or None
    unit: Any  # float32 [B, M], or None
    half: Any  # float32 [B, Q, M, p], or None
    bias: Any  # float32 [B, M, S or 1]
    starts: Any  # int32 [B, M]
    ends: Any  # int32 [B, M], within the pool
    parts: Any  # item, first and last page of every part
    lanes: Any  # of K and V: `_windows`
    most: Any  # float32 [U], the largest gain of each unit's values, or 1


def planned(
    layer: LinearLayer, batch: int, pages: int, rows: int, *, scale: float, softcap: float | None,
    splits: int | None, turned: bool, per_token: bool, interpret: bool, folded: bool = True,
) -> tuple[Plan, int]:  # fmt: skip
    """What is static about a call of so many query rows, and its parts."""
    groups, tuned, gpu = layer.groups, tuning(layer), target()
    count = batch * (splits or 1)
    if splits is None:
        slots = gpu.processors * tuned.residency
        count = triton_parts.count(batch, groups, pages, slots)
    least = 4 if gpu.ptx else 8  # the matrix unit takes pairs in eights; AMD's in sixteens
    k, v = _places(layer)
    plan = Plan(
        run=tuned.run, m=max(least, 1 << (rows // groups - 1).bit_length()), rows=rows // groups,
        places=(k if folded else (), v), joined=len(layer.widest) // 2 if layer.joined else 0,
        turned=turned, per_token=per_token, gained=layer.gained, scale=scale, softcap=softcap,
        asm=None if interpret else "ptx" if gpu.ptx else "gcn",
    )  # fmt: skip
    return plan, count


def launch(
    ready: Ready,
    words: UInt32[Array, "N P R C"],
    layer: LinearLayer,
    *,
    plan: Plan,
    count: int,
    table: Int[Array, "B p"] | None,
    interpret: bool,
) -> Partial:
    """The softmax of every part [P, J, m], lanes of `acc` those of `local`."""
    inputs = {
        "words": padded(words, layer), "table": table, "weights": ready.weights, "unit": ready.unit,
        "bias": ready.bias, "half": ready.half, "starts": ready.starts, "ends": ready.ends,
        "parts": list(ready.parts), "lanes": ready.lanes, "most": ready.most,
        "gains": [layer.k.gains, layer.v.gains], "gain_lanes": layer.gain_lanes,
        # Loaded and not computed: Triton turns the layout of loads, not that of counters.
        "select": _selectors(plan.asm), "masks": _EVERY << np.arange(8, dtype=np.uint32),
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
    k, v = (local_of(layer, i, (layer.k, layer.v)[i].matrix, pool_lanes) for i in range(2))
    return k, v


def local_of(
    layer: LinearLayer, i: int, matrix: Float[Array, "G D W"], pool_lanes: int
) -> Float[Array, "J G D U"]:
    """A matrix of K's lanes (0) or V's (1), as of `local`."""
    units, side, widths_of = units_of(layer.unit_groups), (layer.k, layer.v)[i], widths(layer, i)
    unit = units[:, place_of(layer, i)]
    at = np.concatenate([np.arange(width) for width in widths_of])
    lane = windows(layer, pool_lanes)[i][unit] - layer.first[i] + at[None]
    own = (lane >= side.start[unit]) & (lane - side.start[unit] < side.count[unit])
    matrix = matrix[:, :, jnp.clip(lane, 0, matrix.shape[-1] - 1)]
    return jnp.moveaxis(jnp.where(own[None, None], matrix, 0.0), 2, 0)


def place_of(layer: LinearLayer, i: int) -> Int[np.ndarray, "U"]:
    """The place in its group of the unit that each lane of `local` is read for."""
    widths_of = widths(layer, i)
    return np.repeat(np.arange(len(widths_of)), widths_of)


def padded(words: UInt32[Array, "N P R C"], layer: LinearLayer) -> UInt32[Array, "N P R c"]:
    """A pool of no fewer lanes than one unit's runs."""
    least = tuning(layer).run * max(max(runs) for runs in _places(layer))
    if words.shape[-1] >= least:
        return words
    return jnp.pad(words, [(0, 0)] * 3 + [(0, least - words.shape[-1])])


def windows(layer: LinearLayer, pool_lanes: int) -> list[Int[Array, "U"]]:
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


def widths(layer: LinearLayer, side: int) -> list[int]:
    """Lanes of every unit of K (0) or V (1) of a group, in whole runs."""
    return [runs * tuning(layer).run for runs in _places(layer)[side]]


def _places(layer: LinearLayer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Runs of every unit that K, and V, of a group are read from."""
    runs = tuple(-(-lanes // tuning(layer).run) for lanes in layer.widest)
    return (runs, runs) if layer.joined else (runs[:1], runs[1:])


def _half(layer: LinearLayer, folded: Folded) -> Float[Array, "B Q M p"]:
    """-1/2 of the sum of a row's weights over the lanes of the unit at each place of its group."""
    bounds = np.cumsum(widths(layer, 0))[:-1]
    each = jnp.split(folded.left, bounds, axis=-1)
    return -0.5 * jnp.stack([jnp.sum(x, axis=-1) for x in each], axis=-1)


def _weights(
    folded: Folded, groups: int, m: int
) -> tuple[Int8[Array, "B Q J C U"], Float[Array, "B M"]]:
    """Queries as pairs, 2 i and 2 i + 1 those of a group's row i, and their unit."""
    batch, blocks, rows, lanes = folded.left.shape
    unit = jnp.where(folded.largest == 0, 1.0, folded.largest / HIGH)
    both = jnp.stack(pair(folded.left / unit[:, None, :, None]), axis=3)
    both = both.reshape(batch, blocks, groups, 2 * (rows // groups), lanes)
    return jnp.pad(both, [(0, 0)] * 3 + [(0, 2 * (m - rows // groups)), (0, 0)]), unit


def pair(x: Float[Array, "*s"]) -> tuple[Int8[Array, "*s"], Int8[Array, "*s"]]:
    """high, low with |x - high - low / LOW| <= 1 / (2 LOW), where |x| <= HIGH."""
    high = _nearest(x)
    return high, _nearest((x - high.astype(jnp.float32)) * LOW)


def _nearest(x: Float[Array, "*s"]) -> Int8[Array, "*s"]:
    return jax.lax.bitcast_convert_type(x + _ROUND, jnp.int32).astype(jnp.int8)


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
    unit = x["unit"][b, rows] * gain if plan.places[0] else None
    select = [of[jnp.arange(4, dtype=jnp.int32)] for of in x["select"]]
    masks = x["masks"][jnp.arange(8, dtype=jnp.int32)]
    few = x["masks"][jnp.arange(4, dtype=jnp.int32)]
    # Tokens of K are 4 x 4 x 2 x 8: bit 2 and 1 of i, byte (a warp's own), bit 0 of i, word row.
    at = jnp.arange(PAGE, dtype=jnp.int32)
    i, byte = 2 * (at // 64) + at // 8 % 2, at // 16 % 4
    field, inner = 8 * byte + i, 32 * i + ROWS * byte + at % ROWS  # `turboq.cache.columns`
    worth = jax.lax.bitcast_convert_type((127 - i) << 23, jnp.float32)  # 2^-i
    worth = jnp.where(i == 7, -worth, worth)
    less = jax.lax.bitcast_convert_type((127 - i % 4) << 23, jnp.float32)

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
            return x["weights"][b, block, n, columns[:, None], at[None, :]]

        return [
            ([weights(at) for at in runs], x["half"][b, block, rows, place])
            for place, runs in enumerate(places(0))
        ]

    once = None if plan.turned else queries(0)

    def keys(page, place, i):
        """Bits of a run of K [256, run]."""
        words = x["words"][*page, word_row[:, None], lanes_of(0, place, i)[None, :]]
        pairs = jnp.unstack(words.reshape(ROWS, run // 4, 2, 2), axis=-1)
        four = [y.reshape(1, 1, 1, ROWS, run // 4) for z in pairs for y in jnp.unstack(z, axis=-1)]
        own = _bytes(four, [y.reshape(1, 4, 1, 1, 1) for y in select], plan.asm)
        return _apart(own & masks.reshape(4, 1, 2, 1, 1)).reshape(PAGE, run)

    def levels(page, place, i):
        """Bits of a run of V [run, 256]; tokens are 2 x 4 x 8 x 4: 3 bits of i, row, byte."""
        words = x["words"][*page, word_row[None, :], lanes_of(1, place, i)[:, None]]
        words = jnp.stack([words, words >> 4], axis=-1).transpose(0, 2, 1)
        own = words.reshape(run, 2, 1, ROWS) & few.reshape(1, 1, 4, 1)
        return _apart(own).reshape(run, PAGE)

    def gains(page, side, unit):
        code = jnp.zeros((PAGE,), jnp.int32)
        for p in range(GAIN_BITS):
            at = x["gain_lanes"][side, unit, p]
            word = plgpu.load(
                x["words"].at[*page, inner % ROWS, jnp.maximum(at, 0)], mask=at >= 0, other=0
            )
            code += ((word >> field.astype(jnp.uint32)) & jnp.uint32(1)).astype(jnp.int32) << p
        return x["gains"][side][unit, code]

    def step(page, carry):
        accs, masses, total, top = carry
        slots, where = page * PAGE + inner, located(x, b, page)
        held = queries(page) if once is None else once
        units = plan.places[1] if plan.joined else held  # whose gains are those of both sides
        factors = [jnp.ones((PAGE,), jnp.float32)] * max(len(units), 1)
        if plan.gained:
            factors = [gains(where, 0, unit_at(i)) for i in range(len(units))]
        logits = jnp.zeros((PAGE, m), jnp.float32)
        for place, (query, half) in enumerate(held):
            raw = jnp.zeros((PAGE, 2 * m), jnp.int32)
            for i, weights in enumerate(query):
                raw += _dot(keys(where, place, i), weights)
            assert unit is not None  # with queries
            own = one(raw.astype(jnp.float32))
            logits += own * (worth * factors[place])[:, None] * unit[None, :]
            logits += (half * gain)[None, :] * factors[place][:, None]
        if plan.per_token:
            logits += x["bias"][b, rows[None, :], slots[:, None]] * gain
        else:
            logits += (x["bias"][b, rows, 0] * gain)[None, :]
        if plan.softcap is not None:
            logits = jnp.tanh(logits / plan.softcap) * (plan.softcap * LOG2E)
        seen = (slots[:, None] >= starts[None, :]) & (slots[:, None] < ends[None, :])
        logits = jnp.where(seen, logits, -jnp.inf)

        own_top = jnp.max(logits, axis=0)
        new_top = jnp.maximum(top, own_top)
        base, own_base = (jnp.where(y == -jnp.inf, 0.0, y) for y in (new_top, own_top))
        ptx = plan.asm == "ptx"
        p = unpacking.exp2(logits - own_base[None, :], ptx)  # in units of this page's largest
        own, old = (unpacking.exp2(y - base, ptx) for y in (own_top, top))
        if plan.gained and not plan.joined:
            factors = [gains(where, 1, n)]
        new_accs, new_masses = [], []
        for place, runs in enumerate(plan.places[1]):
            share = factors[place] * less * (HIGH / x["most"][unit_at(place)])
            weights = _two(p * share[:, None])
            new_accs.append([
                accs[place][i] * _twice(old)[None, :]
                + _dot(levels(where, place, i), weights).astype(jnp.float32) * _twice(own)[None, :]
                for i in range(runs)
            ])  # fmt: skip
            new_masses.append(
                masses[place] * old[None, :] + p * factors[place][:, None] * own[None, :]
            )
        return new_accs, new_masses, total * old[None, :] + p * own[None, :], new_top

    zero = jnp.zeros((PAGE, m), jnp.float32)  # summed at the end
    carry = (
        [[jnp.zeros((run, 2 * m), jnp.float32) for _ in range(runs)] for runs in plan.places[1]],
        [zero for _ in plan.places[1]], zero, jnp.full((m,), -jnp.inf, jnp.float32),
    )  # fmt: skip
    accs, masses, total, top = jax.lax.fori_loop(first, last, step, carry)
    for place, (mass, runs) in enumerate(zip(masses, places(1), strict=True)):
        scale = x["most"][unit_at(place)] / HIGH
        half = 0.5 * jnp.sum(mass, axis=0)
        for acc, at in zip(accs[place], runs, strict=True):
            acc_ref[part, n, row[None, :], at[:, None]] = one(acc) * scale - half[None, :]
    for ref, values in ((total_ref, jnp.sum(total, axis=0)), (top_ref, top * LN2)):
        ref[part, n, :] = values


def _selectors(asm: str | None) -> list[np.ndarray]:
    """What `_bytes` is told of each byte."""
    byte = np.arange(4, dtype=np.uint32)
    if asm == "ptx":
        return [0x40 + 0x11 * byte]
    if asm == "gcn":  # a byte each, 12 is zero
        return [0x0C0C0400 + 0x0101 * byte, 0x04000C0C + 0x01010000 * byte]
    return [8 * byte]


def _bytes(four: list[Array], select: list[Array], asm: str | None) -> Array:
    """Words of one byte each of four words (0, 2, 1, 3), those of the selectors."""
    w0, w2, w1, w3 = four
    if asm == "ptx":
        low, high = (
            assembly("prmt.b32 $0, $1, $2, $3;", *y, select[0]) for y in ((w0, w1), (w2, w3))
        )
        return assembly("prmt.b32 $0, $1, $2, 0x5410;", low, high)
    if asm == "gcn":
        low = assembly("v_perm_b32 $0, $2, $1, $3", w0, w1, select[0])
        return low | assembly("v_perm_b32 $0, $2, $1, $3", w2, w3, select[1])
    one = [(w >> select[0] & 255) << 8 * i for i, w in enumerate((w0, w1, w2, w3))]
    return one[0] | one[1] | one[2] | one[3]


def assembly(code: str, *args: Array) -> Array:
    shape, kind = jnp.broadcast_shapes(*(y.shape for y in args)), "v" if code[:2] == "v_" else "r"
    args = tuple(jax.lax.bitcast_convert_type(jnp.broadcast_to(y, shape), jnp.int32) for y in args)
    (out,) = plgpu.elementwise_inline_asm(
        code, args=list(args), constraints=",".join([f"={kind}"] + [kind] * len(args)), pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.int32)],
    )  # fmt: skip
    return jax.lax.bitcast_convert_type(out, jnp.uint32)


def _apart(words: UInt32[Array, "*s"]) -> Int8[Array, "*s 2 2"]:
    """The four bytes of words: in a register as they lie there."""
    one = [(words >> 8 * i).astype(jnp.int8) for i in range(4)]
    return jnp.stack([jnp.stack(one[::2], axis=-1), jnp.stack(one[1::2], axis=-1)], axis=-1)


def _two(x: Float[Array, "256 M"]) -> Int8[Array, "M2 256"]:
    """Pairs, side by side; tokens in the order of `levels` instead of that of `keys`."""
    columns = 2 * x.shape[1]
    both = jnp.stack(pair(x), axis=-1).reshape(4, 4, 2, ROWS, columns)
    return both.transpose(4, 0, 2, 3, 1).reshape(columns, PAGE)


def _twice(x: Float[Array, "M"]) -> Float[Array, "M2"]:
    return jnp.broadcast_to(x[:, None], (x.shape[0], 2)).reshape(2 * x.shape[0])


def one(x: Float[Array, "T M2"]) -> Float[Array, "T M"]:
    """high + low / LOW of the two columns of every row."""
    pairs = x.reshape(x.shape[0], x.shape[1] // 2, 2)
    share = jnp.where(jnp.arange(2, dtype=jnp.int32) == 0, 1.0, 1.0 / LOW)
    return jnp.sum(pairs * share[None, None, :], axis=-1)


def _dot(bits: Array, other: Array) -> Array:
    return jax.lax.dot_general(
        bits, other, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
    )
