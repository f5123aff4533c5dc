"""Columns on GPUs (Pallas-Triton): one group's stored bits as bfloat16 zeros and ones.

One program reads one sequence, one group (a KV head, or heads that are joined) and one part of its
pages, `TILE` word rows (32 tokens each) at a time; lanes are read in runs of `RUN` of one unit, as
many as the widest group has, those behind its last masked.

    K run [RUN, T] of bits   S [T, M] = gain (sum over runs of run^T q - sum(q) / 2) + bias
    softmax over T, online   acc [RUN, M] += run (p gain)

Of joined heads every unit has its gain and both sides read all runs. Queries and weights of up to
16 rows are two bfloat16 numbers each, side by side.
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

from turboq.numbers.packing import PAGE, ROWS, WORD_BITS
from turboq_kernels import merge
from turboq_kernels.columns.linear import GAIN_BITS, HIGHEST, LinearLayer
from turboq_kernels.columns.queries import Folded
from turboq_kernels.columns.types import Sums
from turboq_kernels.decode.triton import join
from turboq_kernels.decode.types import Partial

LOG2E, LN2 = 1.4426950408889634, 0.6931471805599453
RUN = 64  # lanes of a run
TILE = 4  # word rows of a step
WARPS, JOINED_WARPS = 4, 8
MAX_ROWS = 16  # of a group
PROGRAMS = 396  # three per SM of an H100
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
class Plan:
    """Everything static about a call."""

    m: int  # query rows of a group, padded
    rows: int  # query rows of a group
    places: tuple[tuple[int, ...], tuple[int, ...]]  # runs of K, and of V, at each place of a group
    joined: int  # heads; 0: none, K and V have units of their own
    splits: int
    turned: bool
    per_token: bool
    gained: bool
    scale: float
    softcap: float | None
    interpret: bool


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
    """Softmax over slots starts[b, m] <= s < ends[b, m] of every row (`columns.queries`)."""
    batch, rows = starts.shape
    groups, pages = layer.groups, words.shape[1]
    if splits is None:
        splits = max(1, min(PROGRAMS // (batch * groups), pages))
    places = _places(layer)
    plan = Plan(
        m=max(8, 1 << (rows // groups - 1).bit_length()), rows=rows // groups,
        places=places, joined=len(layer.widest) // 2 if layer.joined else 0, splits=splits,
        turned=folded.left.shape[1] > 1, per_token=folded.bias.shape[-1] > 1,
        gained=layer.gained, scale=scale, softcap=softcap, interpret=interpret,
    )  # fmt: skip
    ends = jnp.minimum(ends, pages * PAGE)
    seen = ends > starts
    low = jnp.min(jnp.where(seen, starts, jnp.iinfo(jnp.int32).max), axis=1) // PAGE
    high = -(-jnp.max(jnp.where(seen, ends, 0), axis=1) // PAGE)
    share = -(-jnp.maximum(high - low, 0) // splits)
    first = low[:, None] + share[:, None] * jnp.arange(splits, dtype=jnp.int32)[None]
    inputs = {
        "words": words, "left": folded.left, "bias": folded.bias, "starts": starts, "ends": ends,
        "half": _half(layer, folded), "first": layer.first,
        "bounds": jnp.stack([first, jnp.minimum(first + share[:, None], high[:, None])], axis=-1),
        "lanes": [jnp.stack([side.start, side.count], axis=-1) for side in (layer.k, layer.v)],
        "gains": [layer.k.gains, layer.v.gains], "gain_lanes": layer.gain_lanes,
    }  # fmt: skip
    leaves, tree = jax.tree.flatten(inputs)
    width = layer.v.matrix.shape[-1]
    lead = (batch, splits, groups * plan.m)
    acc, *stats = pl.pallas_call(
        functools.partial(_kernel, plan=plan, tree=tree),
        grid=(splits, groups, batch),
        out_shape=[
            jax.ShapeDtypeStruct((*lead, width), jnp.float32),
            *[jax.ShapeDtypeStruct(lead, jnp.float32)] * 2,
        ],
        compiler_params=plgpu.CompilerParams(
            num_warps=JOINED_WARPS if layer.joined else WARPS, num_stages=2
        ),
        interpret=interpret,
        name="turboq_columns",
    )(*leaves)
    own = (jnp.arange(groups, dtype=jnp.int32)[:, None] * plan.m
           + jnp.arange(plan.rows, dtype=jnp.int32)[None]).reshape(-1)  # fmt: skip
    acc, total, top = (y[:, :, own] for y in (acc, *stats))
    if splits == 1:
        return Sums(acc=acc[:, 0], total=total[:, 0], top=top[:, 0])
    # Lanes that no program wrote hold anything: they are no code of the row's group.
    parts = Partial(acc=acc, top=top, total=total)
    whole = merge.merge(jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), parts))
    return Sums(acc=whole.acc, total=whole.total, top=whole.top)


def _places(layer: LinearLayer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Runs of every unit that K, and V, of a group are read from."""
    runs = tuple(-(-lanes // RUN) for lanes in layer.widest)
    return (runs, runs) if layer.joined else (runs[:1], runs[1:])


def _half(layer: LinearLayer, folded: Folded) -> Float[Array, "B Q M p"]:
    """-1/2 of the sum of a row's weights over the lanes of the unit at each place of its group."""
    if not layer.joined:
        return -0.5 * jnp.sum(folded.left, axis=-1, keepdims=True)
    own, rows = np.asarray(layer.unit_groups), folded.left.shape[2] // layer.groups
    units = jnp.asarray([np.flatnonzero(own == j) for j in range(layer.groups)], jnp.int32)
    there = layer.k.unit[None, :, None] == jnp.repeat(units, rows, axis=0)[:, None]
    there = there.astype(jnp.float32)
    return -0.5 * jnp.einsum("bqmw,mwp->bqmp", folded.left, there, precision=HIGHEST)


def _kernel(*refs, plan: Plan, tree) -> None:
    x: dict[str, Any] = jax.tree.unflatten(tree, refs[: tree.num_leaves])
    acc_ref, total_ref, top_ref = refs[tree.num_leaves :]
    split, n, b = (pl.program_id(i) for i in range(3))
    m = plan.m
    row = jnp.arange(m, dtype=jnp.int32)
    real = row < plan.rows  # padding rows see nothing
    rows = n * plan.rows + jnp.minimum(row, plan.rows - 1)
    starts = jnp.where(real, x["starts"][b, rows], 0)
    ends = jnp.where(real, x["ends"][b, rows], 0)
    gain = plan.scale * (LOG2E if plan.softcap is None else 1.0)
    lane = jnp.arange(RUN, dtype=jnp.int32)
    fields = jnp.arange(WORD_BITS, dtype=jnp.int32)
    bits = fields // 2 + 16 * (fields % 2)
    inner = 32 * (bits % 8) + ROWS * (bits // 8)  # of row 0 of a page

    def unit_at(place):
        """The unit at a place of this group: of joined heads those of K, then those of V."""
        if not plan.joined:
            return n
        behind = pl.num_programs(1) - 1 if place >= plan.joined else 0
        return (n + behind) * plan.joined + place

    def run_of(side, place, i):
        """Lanes [RUN] of a run of a unit, and which of them are its own."""
        at, unit = i * RUN + lane, unit_at(place)
        return x["lanes"][side][unit, 0] + at, at < x["lanes"][side][unit, 1]

    def queries(block):
        """Of every place: runs of weights, and half of their sum."""
        out = []
        for place, runs in enumerate(plan.places[0]):
            held = [run_of(0, place, i) for i in range(runs)]
            weights = [
                plgpu.load(
                    x["left"].at[b, block, rows[None, :], at[:, None]],
                    mask=own[:, None] & real[None, :], other=0.0,
                )
                for at, own in held
            ]  # fmt: skip
            out.append(([_two(w) for w in weights], x["half"][b, block, rows, place]))
        return out

    once = None if plan.turned else queries(0)

    def step(s, carry):
        accs, masses, total, top = carry
        page, part = s // (ROWS // TILE), s % (ROWS // TILE)
        word_rows = part * TILE + jnp.arange(TILE, dtype=jnp.int32)
        slots = page * PAGE + (word_rows[:, None] + inner[None, :]).reshape(TILE * WORD_BITS)

        def run(side, place, i):
            at, held = run_of(side, place, i)
            held = jnp.broadcast_to(held[None, :], (TILE, RUN))
            ref = x["words"].at[b, page, word_rows[:, None], (x["first"][side] + at)[None, :]]
            return _bits(plgpu.load(ref, mask=held, other=0), plan)

        def gains(side, unit):
            code = jnp.zeros((TILE * WORD_BITS,), jnp.int32)
            for p in range(GAIN_BITS):
                at = x["gain_lanes"][side, unit, p]
                word = plgpu.load(
                    x["words"].at[b, page, word_rows, jnp.maximum(at, 0)], mask=at >= 0, other=0
                )
                bit = (word[:, None] >> bits[None, :].astype(jnp.uint32)) & jnp.uint32(1)
                code += bit.astype(jnp.int32).reshape(TILE * WORD_BITS) << p
            return x["gains"][side][unit, code]

        held = queries(page) if once is None else once
        factors = [gains(0, unit_at(i))[:, None] if plan.gained else 1.0 for i in range(len(held))]
        logits = jnp.zeros((TILE * WORD_BITS, m), jnp.float32)
        for place, (query, half) in enumerate(held):
            raw = jnp.zeros((TILE * WORD_BITS, 2 * m), jnp.float32)
            for i, weights in enumerate(query):
                raw += _dot(run(0, place, i), weights, 0)
            logits += (_one(raw, m) + half[None, :]) * factors[place]
        if plan.per_token:
            logits += x["bias"][b, rows[None, :], slots[:, None]]
        else:
            logits += x["bias"][b, rows, 0][None, :]
        logits = logits * gain
        if plan.softcap is not None:
            logits = jnp.tanh(logits / plan.softcap) * (plan.softcap * LOG2E)
        seen = (slots[:, None] >= starts[None, :]) & (slots[:, None] < ends[None, :])
        logits = jnp.where(seen, logits, -jnp.inf)

        new_top = jnp.maximum(top, jnp.max(logits, axis=0))
        base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        p = jnp.exp2(logits - base[None, :])
        old = jnp.exp2(top - base)
        if plan.gained and not plan.joined:
            factors = [gains(1, n)[:, None]]
        new_accs, new_masses = [], []
        for place, runs in enumerate(plan.places[1]):
            weighted = p * factors[place]
            two = _two(weighted)
            new_accs.append([
                accs[place][i] * old[None, :] + _one(_dot(run(1, place, i), two, 1), m)
                for i in range(runs)
            ])  # fmt: skip
            new_masses.append(masses[place] * old + jnp.sum(weighted, axis=0))
        return new_accs, new_masses, total * old + jnp.sum(p, axis=0), new_top

    zero = jnp.zeros((m,), jnp.float32)
    carry = (
        [[jnp.zeros((RUN, m), jnp.float32) for _ in range(runs)] for runs in plan.places[1]],
        [zero for _ in plan.places[1]], zero, jnp.full((m,), -jnp.inf, jnp.float32),
    )  # fmt: skip
    pages = [x["bounds"][b, split, i] * (ROWS // TILE) for i in range(2)]
    accs, masses, total, top = jax.lax.fori_loop(pages[0], pages[1], step, carry)
    for place, mass in enumerate(masses):
        for i, acc in enumerate(accs[place]):
            at, held = run_of(1, place, i)
            target = acc_ref.at[b, split, (n * m + row)[None, :], at[:, None]]
            held = jnp.broadcast_to(held[:, None], acc.shape)
            plgpu.store(target, acc - 0.5 * mass[None, :], mask=held)
    for ref, values in ((total_ref, total), (top_ref, top * LN2)):
        ref[b, split, pl.ds(n * m, m)] = values


def _bits(words: UInt32[Array, "R L"], plan: Plan) -> Array:
    """bfloat16 [L, 32 R] of zeros and ones; field 2 i + h is bit i + 16 h."""
    pairs = [(words >> jnp.uint32(i)) & jnp.uint32(0x00010001) for i in range(16)]
    pairs = [pair * jnp.uint32(0x3F80) for pair in pairs]  # 1.0
    joined = jnp.stack(pairs, axis=-1) if plan.interpret else join(pairs)
    halves = (joined.astype(jnp.uint16), (joined >> 16).astype(jnp.uint16))
    halves = [jax.lax.bitcast_convert_type(half, jnp.bfloat16) for half in halves]
    tile = jnp.stack(halves, axis=-1).reshape(*words.shape, WORD_BITS).transpose(1, 0, 2)
    return tile.reshape(words.shape[1], -1)


def _two(x: Float[Array, "L M"]) -> Array:
    """bfloat16 [L, 2 M]: x cut to 8 leading bits, and beside it the next 8."""
    high, rest = _cut(x)
    pair = jnp.stack([high, _cut(rest)[0]], axis=-1)
    return pair.swapaxes(-1, -2).reshape(x.shape[0], 2 * x.shape[1])


def _cut(x: Array) -> tuple[Array, Array]:
    """x cut to bfloat16, and what is left in float32."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    high = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    kept = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return high, x - kept


def _one(x: Float[Array, "T M2"], m: int) -> Float[Array, "T M"]:
    high, low = jax.lax.split(x, (m, m), axis=1)
    return high + low


def _dot(levels: Array, other: Array, axis: int) -> Array:
    """Product of levels [L, T], over their axis `axis`, with queries or weights, in float32."""
    axes = (((axis,), (0,)), ((), ()))
    return jax.lax.dot_general(levels, other, axes, preferred_element_type=jnp.float32)
