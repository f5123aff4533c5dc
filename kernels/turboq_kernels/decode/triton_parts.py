"""How the tokens of all sequences are spread over a GPU: parts, a program each and KV head.

An *item* is one sequence and one tile of its query rows. Parts are about equally long whatever item
they are of, so that a long sequence of a ragged batch gets more of them than a short one, and there
are as many as fill whole waves of programs. With a number of splits given, every item has so many:
how a sequence is cut then depends on its own length alone, not on what else is in the batch.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int

from turboq_kernels.decode.types import Partial

_WAVES = 8
_GOOD = 0.9  # share of the last wave's programs that is worth no further wave
_SIZES = 64  # lengths of a part that are tried


class Parts(NamedTuple):
    """Part p reads steps first[p] to last[p] of item[p]; item i has parts start[i] to start[i + 1].

    J = I + 1.
    """

    item: Int[Array, "P"]
    first: Int[Array, "P"]
    last: Int[Array, "P"]
    start: Int[Array, "J"]


def count(items: int, heads: int, steps: int, slots: int) -> int:
    """Parts of `items` items of at most `steps` steps where `slots` programs run at a time.

    The fewest waves whose last one is full where items are equally long; at least one part an item,
    at most one a step.
    """

    def full(waves: int) -> float:
        parts = waves * slots // heads
        return parts // items * items * heads / (waves * slots)

    waves = range(1, _WAVES + 1)
    best = next((w for w in waves if full(w) >= _GOOD), max(waves, key=full))
    return min(max(best * slots // heads, items), items * max(steps, 1))


def spread(low: Int[Array, "I"], high: Int[Array, "I"], parts: int) -> Parts:
    """`parts` parts of steps low[i] <= s < high[i]: as equal as one length for all items allows."""
    items = low.shape[0]
    length = jnp.maximum(high - low, 0)
    total = jnp.sum(length)
    least = -(-total // parts)
    # So long that rounding every item up still leaves enough parts.
    enough = jnp.max(length) if parts == items else -(-total // (parts - items))
    tried = least + (enough - least) * jnp.arange(_SIZES, dtype=jnp.int32) // (_SIZES - 1)
    tried = jnp.maximum(tried, 1)
    needed = jnp.sum(-(-length[None] // tried[:, None]), axis=1)
    size = jnp.min(jnp.where(needed <= parts, tried, jnp.iinfo(jnp.int32).max))
    return _cut(low, high, -(-length // size), parts)


def split(low: Int[Array, "I"], high: Int[Array, "I"], splits: int) -> Parts:
    """`splits` equal parts of every item."""
    return _cut(low, high, jnp.full_like(low, splits), low.shape[0] * splits)


def _cut(low: Array, high: Array, own: Int[Array, "I"], parts: int) -> Parts:
    """Item i in own[i] equal parts; those left over read nothing."""
    start = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(own, dtype=jnp.int32)])
    each = -(-jnp.maximum(high - low, 0) // jnp.maximum(own, 1))
    part = jnp.arange(parts, dtype=jnp.int32)
    item = jnp.sum(start[1:][None] <= part[:, None], axis=1, dtype=jnp.int32)
    real = item < low.shape[0]
    item = jnp.minimum(item, low.shape[0] - 1)
    first = low[item] + each[item] * (part - start[item])
    last = jnp.minimum(first + each[item], high[item])
    return Parts(item, jnp.where(real, first, 0), jnp.where(real, last, 0), start)


def merge(parts: Partial, start: Int[Array, "J"], *, batch: int, interpret: bool) -> Partial:
    """The softmax of every item from those of its parts [P, N, rows], in one launch.

    `turboq_kernels.merge` states the formula; items are tiles of rows of `batch` sequences, and the
    result is [B, N, tiles * rows].
    """
    _, heads, rows, width = parts.acc.shape
    tiles = (start.shape[0] - 1) // batch
    lead = (batch, heads, tiles * rows)
    run = width & -width  # a power of two, as all shapes of Triton's
    acc, top, total = pl.pallas_call(
        functools.partial(_merge_kernel, tiles=tiles, rows=rows, run=run),
        grid=(batch * tiles, heads, width // run),
        out_shape=[
            jax.ShapeDtypeStruct((*lead, width), jnp.float32),
            *[jax.ShapeDtypeStruct(lead, jnp.float32)] * 2,
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=interpret,
        name="turboq_merge",
    )(start, parts.acc, parts.top, parts.total)
    return Partial(acc=acc, top=top, total=total)


def _merge_kernel(start, accs, tops, totals, acc_ref, top_ref, total_ref, *, tiles, rows, run):
    item, n, place = (pl.program_id(i) for i in range(3))
    span, columns = pl.ds(item % tiles * rows, rows), pl.ds(place * run, run)

    def step(p, carry):
        acc, top, total = carry
        own = totals[p, n, :]
        own_top = jnp.where(own > 0, tops[p, n, :], -jnp.inf)
        new = jnp.maximum(top, own_top)
        base = jnp.where(new == -jnp.inf, 0.0, new)
        old, add = jnp.exp(top - base), jnp.exp(own_top - base)
        acc = acc * old[:, None] + accs[p, n, :, columns] * add[:, None]
        return acc, new, total * old + own * add

    none = jnp.full((rows,), -jnp.inf, jnp.float32)
    carry = (jnp.zeros((rows, run), jnp.float32), none, jnp.zeros_like(none))
    acc, top, total = jax.lax.fori_loop(start[item], start[item + 1], step, carry)
    acc_ref[item // tiles, n, span, columns] = acc

    @pl.when(place == 0)
    def _():
        top_ref[item // tiles, n, span] = top
        total_ref[item // tiles, n, span] = total
