"""What a step of attention needs beside the packed tokens, on GPUs in two launches.

    prepare   parts of the sequences (`triton_parts`), and every query in the coordinates of keys:
                  folded = q A,  bias = q . a
    finish    one softmax over the parts, the exact tokens and a logit sink, and out of code space:
                  out = acc U + mass u + exact

A, a, U and u are those of `turboq_kernels.attention.maps`. Products are of float32 numbers cut into
three bfloat16 ones, exact to 2**-20 (`turboq_kernels.encode.triton_steps`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from turboq_kernels.decode.triton_kernel import Plan
from turboq_kernels.decode.types import Partial
from turboq_kernels.encode.triton_steps import product
from turboq_kernels.spans import Rules, Spans, spans
from turboq_kernels.triton_memory import load, store, three

_SIZES = 64  # lengths of a part that are tried, parts that are placed at a time
_BLOCK = 32  # coordinates per step of a product
_TOKENS = 32  # exact tokens at a time
MAX_BATCH = 127  # sequences that one program cuts into parts
MAX_TILE = 16 * 512  # query rows times coordinates that a program holds


class Seen(NamedTuple):
    """Positions of query tokens, tokens of sequences, positions of their first slots (None: 0)."""

    at: Any  # int32 [B, T]
    lengths: Any  # int32 [B]
    first: Any  # int32 [B]


class Exact(NamedTuple):
    """Exact tokens at positions (negative: none there), or sinks, whose slots are positions."""

    k: Any  # [B, S, N, D], any float
    v: Any  # [B, S, N, E]
    positions: Any  # int32 [B, S], or None
    heads_first: bool  # k and v are [B, N, S, .]


class Ready(NamedTuple):
    """What the decode kernel takes: rows and items are padded with such as see nothing."""

    folded: Any  # float32 [B, N, _, C]
    bias: Any  # float32 [B, N, _], or None
    starts: Any  # int32 [_, _]
    ends: Any  # int32 [_, _]
    start: Any  # int32 [_], the first part of every sequence, then their number
    parts: list[Any]  # of `triton_kernel.launch`


def prepare(
    q: Float[Array, "B N M D"],
    matrix: Float[Array, "#N D C"],
    offset: Float[Array, "#N D"] | None,
    seen: Seen,
    rules: Rules,
    *,
    plan: Plan,
    count: int,
    splits: int | None,
) -> Ready:
    """Row t G + g of a head is query token t."""
    batch, heads, m, _ = q.shape
    coded, rows = matrix.shape[-1], rows_held(m)
    items, room = pl.next_power_of_2(batch + 1), -(-count // _SIZES) * _SIZES
    leaves, tree = jax.tree.flatten((q, matrix, offset, seen))
    integers = [(items, plan.m), (items, plan.m), (items,)]
    integers += [(items,)] * 2 if plan.whole else [(room,)] * 3
    floats = [(batch, heads, rows, coded), *[(batch, heads, rows)] * (offset is not None)]
    out = pl.pallas_call(
        functools.partial(
            _prepare, tree=tree, plan=plan, rules=rules, count=count, splits=splits
        ),
        grid=(1 + batch * heads,),
        out_shape=[
            *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in floats),
            *(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in integers),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=plan.interpret,
        name="turboq_prepare",
    )(*leaves)  # fmt: skip
    starts, ends, start, *parts = out[len(floats) :]
    bias = None if offset is None else out[1]
    return Ready(out[0], bias, starts, ends, start, list(parts))


def rows_held(m: int) -> int:
    """Query rows of a program, padded for the matrix units."""
    return max(16, pl.next_power_of_2(m))


def _prepare(*refs, tree, plan: Plan, rules: Rules, count: int, splits: int | None) -> None:
    q, matrix, offset, seen = jax.tree.unflatten(tree, refs[: tree.num_leaves])
    folded, *rest = refs[tree.num_leaves :]
    bias = None if offset is None else rest.pop(0)
    starts, ends, start, *parts = rest
    program, heads = pl.program_id(0), q.shape[1]

    @pl.when(program == 0)
    def _():
        low, high = _bounds(seen, rules, q.shape[2], (starts, ends), plan)
        place_parts(low, high, start, parts, q.shape[0], plan, count, splits)

    @pl.when(program > 0)
    def _():
        b, n = (program - 1) // heads, (program - 1) % heads
        _fold((q, matrix, offset), (folded, bias), b, n, plan)


def _spans(seen: Seen, rules: Rules, b, row, m: int, real) -> tuple[Array, Spans]:
    """Positions of rows of sequences b, and what they see."""
    at = load(seen.at, (b, row // (m // seen.at.shape[1])), real)
    first = 0 if seen.first is None else load(seen.first, (b,), real)
    return at, spans(rules, at, load(seen.lengths, (b,), real), first)


def _fold(refs, outs, b, n, plan: Plan) -> None:
    (q, matrix, offset), (folded, bias) = refs, outs
    m, dim = q.shape[2:]
    rows, coded = rows_held(m), matrix.shape[2]
    block, wide = min(_BLOCK, max(16, pl.next_power_of_2(dim))), pl.next_power_of_2(coded)
    row, code = jnp.arange(rows, dtype=jnp.int32), jnp.arange(wide, dtype=jnp.int32)
    real, own = row < m, n if matrix.shape[0] > 1 else 0

    def at(k):
        channels = k * block + jnp.arange(block, dtype=jnp.int32)
        return channels, channels < dim

    def left(k):
        channels, inside = at(k)
        mask = (code < coded)[:, None] & inside[None, :]
        return load(matrix, (own, channels[None, :], code[:, None]), mask)

    def right(k):
        channels, inside = at(k)
        mask = real[:, None] & inside[None, :]
        return load(q, (b, n, row[:, None], channels[None, :]), mask).astype(jnp.float32)

    blocks = -(-dim // block)
    put = functools.partial(store, interpret=plan.interpret)
    found = product(left, right, blocks, (max(wide, 16), rows))
    codes = jnp.arange(found.shape[1], dtype=jnp.int32)[None, :]
    put(folded, (b, n, row[:, None], codes), found, codes < coded)
    if bias is None:
        return

    def step(k, total):
        channels, inside = at(k)
        own = n if offset.shape[0] > 1 else 0
        return total + jnp.sum(right(k) * load(offset, (own, channels), inside)[None, :], axis=1)

    bias[b, n, :] = jax.lax.fori_loop(0, blocks, step, jnp.zeros((rows,), jnp.float32))


def _bounds(seen: Seen, rules: Rules, m: int, outs, plan: Plan) -> tuple[Array, Array]:
    """`triton_kernel.bounds` of one tile of rows each, nothing for items that are not there.

    What every row sees goes into `outs`.
    """
    items, batch = outs[0].shape[0], seen.at.shape[0]
    tokens = plan.tile_rows * 32
    unit = max(plan.rows * 32, tokens)
    each = unit // tokens
    item = jnp.arange(items, dtype=jnp.int32)[:, None]
    row = jnp.arange(plan.m, dtype=jnp.int32)[None, :]
    real = (item < batch) & (row < m)
    _, found = _spans(seen, rules, item, row, m, real)
    begin, end = (jnp.where(real, x, 0) for x in (found.starts, found.ends))
    for ref, x in zip(outs, (begin, end), strict=True):
        ref[...] = x
    some = end > begin
    low = jnp.min(jnp.where(some, begin, jnp.int32(2**30)), axis=1) // unit * each
    high = _up(jnp.max(jnp.where(some, end, 0), axis=1), unit) * each
    return low, jnp.minimum(high, plan.steps)


def _up(x, by):
    return (x + by - 1) // by


def place_parts(low, high, start_ref, refs, items: int, plan, count: int, splits) -> None:
    """`triton_parts.spread` or `split`, without a cumulative sum or an index."""
    padded = low.shape[0]
    item = jnp.arange(padded, dtype=jnp.int32)
    length = jnp.where(item < items, jnp.maximum(high - low, 0), 0)
    if plan.whole or splits is not None:
        own = jnp.where(item < items, splits or 1, 0)
    else:
        total = jnp.sum(length)
        least = _up(total, count)
        enough = jnp.max(length) if count == items else _up(total, count - items)
        size = jnp.arange(_SIZES, dtype=jnp.int32)
        tried = jnp.maximum(least + (enough - least) * size // (_SIZES - 1), 1)
        needed = jnp.sum(_up(length[None, :], tried[:, None]), axis=1)
        own = _up(length, jnp.min(jnp.where(needed <= count, tried, jnp.iinfo(jnp.int32).max)))
    end = jnp.sum(jnp.where(item[None, :] <= item[:, None], own[None, :], 0), axis=1)
    start = end - own
    start_ref[...] = start
    if plan.whole:
        for ref, bound in zip(refs, (low, high), strict=True):
            ref[...] = bound
        return
    each = _up(length, jnp.maximum(own, 1))
    item_ref, first_ref, last_ref = refs

    def place(i, _):
        part = i * _SIZES + jnp.arange(_SIZES, dtype=jnp.int32)
        here = (start[None, :] <= part[:, None]) & (part[:, None] < end[None, :])
        begin = low[None, :] + each[None, :] * (part[:, None] - start[None, :])
        stop = jnp.minimum(begin + each[None, :], high[None, :])
        span = pl.ds(i * _SIZES, _SIZES)
        for ref, x in ((item_ref, item[None, :]), (first_ref, begin), (last_ref, stop)):
            ref[span] = jnp.sum(jnp.where(here, x, 0), axis=1)
        return 0

    jax.lax.fori_loop(0, item_ref.shape[0] // _SIZES, place, 0)


def finish(
    q: Float[Array, "B N M D"],
    parts: Partial,
    start: Int[Array, "_"],
    exact: Sequence[Exact],
    seen: Seen,
    rules: Rules,
    sink: Float[Array, "N M"] | None,
    matrix: Float[Array, "#N C E"],
    mean: Float[Array, "#N E"] | None,
    *,
    plan: Plan,
) -> Float[Array, "B T H E"]:
    """Outputs of a group's heads, normalised; query head n G + g of token t is row t G + g.

    A row that saw nothing becomes zero; one that saw Inf or NaN in an exact token NaN.
    """
    batch, heads, m, _ = q.shape
    tokens, (coded, dim) = seen.at.shape[1], matrix.shape[1:]
    inputs = {
        "q": q, "acc": parts.acc, "top": parts.top, "total": parts.total, "start": start,
        "seen": seen, "sink": sink, "matrix": matrix, "mean": mean,
        "exact": [x[:3] for x in exact],
    }  # fmt: skip
    leaves, tree = jax.tree.flatten(inputs)
    out, _ = pl.pallas_call(
        functools.partial(
            _finish, tree=tree, plan=plan, rules=rules,
            heads_first=tuple(x.heads_first for x in exact),
        ),
        grid=(heads, batch),
        out_shape=[
            jax.ShapeDtypeStruct((batch, tokens, heads * (m // tokens), dim), jnp.float32),
            jax.ShapeDtypeStruct((batch, heads, rows_held(m), coded), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=2),
        interpret=plan.interpret,
        name="turboq_finish",
    )(*leaves)  # fmt: skip
    return out


def _finish(*refs, tree, plan: Plan, rules: Rules, heads_first: tuple[bool, ...]) -> None:
    x: dict[str, Any] = jax.tree.unflatten(tree, refs[: tree.num_leaves])
    out, room = refs[tree.num_leaves :]
    n, b = pl.program_id(0), pl.program_id(1)
    m, coded, dim = x["q"].shape[2], x["matrix"].shape[1], out.shape[3]
    rows = rows_held(m)
    row = jnp.arange(rows, dtype=jnp.int32)
    code = jnp.arange(max(16, pl.next_power_of_2(coded)), dtype=jnp.int32)
    acc, top, total = merged(x, n, b, row, row < plan.m, code, plan)
    recent, own_top, own_total, broken = exact(x, n, b, row, dim, heads_first, rules, plan)

    tops, totals = [top, own_top], [total, own_total]
    if x["sink"] is not None:
        tops.append(load(x["sink"], (n, row), row < m))
        totals.append(jnp.ones((rows,), jnp.float32))
    tops = [jnp.where(t > 0, p, -jnp.inf) for p, t in zip(tops, totals, strict=True)]
    whole = functools.reduce(jnp.maximum, tops)
    base = jnp.where(whole == -jnp.inf, 0.0, whole)
    factors = [jnp.exp(p - base) for p in tops]
    weight = sum(f * t for f, t in zip(factors, totals, strict=True))
    factors = [f / jnp.where(weight > 0, weight, 1.0) for f in factors]

    put = functools.partial(store, interpret=plan.interpret)
    put(room, (b, n, row[:, None], code[None, :]), acc * factors[0][:, None], code[None, :] < coded)
    if not plan.interpret:
        plgpu.debug_barrier()  # of this program, which reads it in blocks
    y = _unfolded(x["matrix"], room, n, b, row, recent.shape[1])
    channel = jnp.arange(recent.shape[1], dtype=jnp.int32)
    if x["mean"] is not None:
        own = n if x["mean"].shape[0] > 1 else 0
        mean = load(x["mean"], (own, channel), channel < dim)
        y += (total * factors[0])[:, None] * mean[None, :]
    y += recent * factors[1][:, None]
    y = jnp.where(broken[:, None], jnp.nan, y)
    per = m // out.shape[1]
    at = (b, (row // per)[:, None], (n * per + row % per)[:, None], channel[None, :])
    put(out, at, y, (row < m)[:, None] & (channel < dim)[None, :])


def merged(x, n, b, row, held, code, plan) -> tuple[Array, Array, Array]:
    """The softmax of this sequence's parts, of rows that are `held`, at some coordinates."""
    code = code[None, :]
    mask = held[:, None] & (code < x["acc"].shape[3])

    def step(p, carry):
        acc, top, total = carry
        own = load(x["total"], (p, n, row), held)
        own_top = jnp.where(own > 0, load(x["top"], (p, n, row), held), -jnp.inf)
        new = jnp.maximum(top, own_top)
        base = jnp.where(new == -jnp.inf, 0.0, new)
        old, add = jnp.exp(top - base), jnp.exp(own_top - base)
        more = load(x["acc"], (p, n, row[:, None], code), mask) * add[:, None]
        return acc * old[:, None] + more, new, total * old + own * add

    none = jnp.full(row.shape, -jnp.inf, jnp.float32)
    carry = (jnp.zeros((row.shape[0], code.shape[1]), jnp.float32), none, jnp.zeros_like(none))
    first, last = (b, b + 1) if plan.whole else (x["start"][b], x["start"][b + 1])
    return jax.lax.fori_loop(first, last, step, carry)


def exact(
    x, n, b, row, v_dim: int, heads_first, rules: Rules, plan
) -> tuple[Array, Array, Array, Array]:
    """(acc, top, total) over exact tokens, and which rows saw a broken one."""
    m, dim = x["q"].shape[2:]
    width = max(16, pl.next_power_of_2(dim))
    out_width = max(16, pl.next_power_of_2(v_dim))
    channel, real = jnp.arange(width, dtype=jnp.int32)[None, :], row < m
    mask = real[:, None] & (channel < dim)
    q = three(load(x["q"], (b, n, row[:, None], channel), mask).astype(jnp.float32))
    upper, found = _spans(x["seen"], rules, b, row, m, real)
    sinks = rules.policy.sinks
    none = jnp.full(row.shape, -jnp.inf, jnp.float32)
    zero = jnp.zeros_like(none)
    carry = (jnp.zeros((row.shape[0], out_width), jnp.float32), none, zero, zero)
    for (k, v, positions), first in zip(x["exact"], heads_first, strict=True):
        low = found.low if positions is None else found.lower(sinks)
        tokens = k.shape[2 if first else 1]

        def step(i, carry, k=k, v=v, positions=positions, low=low, first=first, tokens=tokens):
            acc, top, total, broken = carry
            token = i * _TOKENS + jnp.arange(_TOKENS, dtype=jnp.int32)
            there, at = token < tokens, token
            if positions is None:
                there &= token < x["seen"].lengths[b]
            else:
                at = load(positions, (b, token), there)
            at = jnp.where(there, at, -1)
            (keys, bad_k), (values, bad_v) = (
                _tokens(ref, n, b, token, there, first, padded)
                for ref, padded in ((k, width), (v, out_width))
            )
            logits = _times(q, three(keys), 1) * plan.scale
            if plan.softcap is not None:
                logits = plan.softcap * jnp.tanh(logits / plan.softcap)
            seen = (at >= 0)[None, :] & (at[None, :] >= low[:, None]) & real[:, None]
            seen &= at[None, :] <= upper[:, None]
            logits = jnp.where(seen, logits, -jnp.inf)
            new = jnp.maximum(top, jnp.max(logits, axis=1))
            base = jnp.where(new == -jnp.inf, 0.0, new)
            weights, old = jnp.exp(logits - base[:, None]), jnp.exp(top - base)
            acc = acc * old[:, None] + _times(three(weights), three(values), 0)
            bad = jnp.where(seen & (bad_k | bad_v)[None, :], 1.0, 0.0)
            broken = jnp.maximum(broken, jnp.max(bad, axis=1))
            return acc, new, total * old + jnp.sum(weights, axis=1), broken

        carry = jax.lax.fori_loop(0, -(-tokens // _TOKENS), step, carry)
    acc, top, total, broken = carry
    return acc, top, total, broken > 0


def _tokens(ref, n, b, token, there, heads_first: bool, width: int) -> tuple[Array, Array]:
    """Vectors [_TOKENS, width], zeros for those that hold Inf or NaN, and which those are."""
    channel = jnp.arange(width, dtype=jnp.int32)[None, :]
    at = (b, n, token[:, None]) if heads_first else (b, token[:, None], n)
    mask = there[:, None] & (channel < ref.shape[3])
    x = load(ref, (*at, channel), mask).astype(jnp.float32)
    bad = jnp.max(jnp.where(jnp.abs(x) < jnp.inf, 0.0, 1.0), axis=1) > 0
    return jnp.where(bad[:, None], 0.0, x), bad


def _times(a: list[Array], x: list[Array], axis: int) -> Array:
    """a [M, K] times x over its axis `axis`, both in three parts."""
    dims = (((1,), (axis,)), ((), ()))
    out = None
    for i, j in ((2, 0), (1, 1), (0, 2), (1, 0), (0, 1), (0, 0)):
        more = jax.lax.dot_general(a[i], x[j], dims, preferred_element_type=jnp.float32)
        out = more if out is None else out + more
    assert out is not None
    return out


def _unfolded(matrix, room, n, b, row, width: int) -> Float[Array, "M E"]:
    """This program's sums in `room`, times its matrix."""
    coded, dim = matrix.shape[1:]
    block, own = min(_BLOCK, max(16, pl.next_power_of_2(coded))), n if matrix.shape[0] > 1 else 0
    channel = jnp.arange(width, dtype=jnp.int32)[:, None]

    def at(k):
        codes = (k * block + jnp.arange(block, dtype=jnp.int32))[None, :]
        return codes, codes < coded

    def left(k):
        codes, inside = at(k)
        return load(matrix, (own, codes, channel), inside & (channel < dim))

    def right(k):
        codes, inside = at(k)
        return load(room, (b, n, row[:, None], codes), inside)

    return product(left, right, -(-coded // block), (width, row.shape[0]))
