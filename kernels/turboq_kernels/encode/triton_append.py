"""One token of every sequence into a pool, by one launch: all that a step writes of a layer.

A program takes one sequence, one head and one side (K or V). It encodes the token
(`triton_kernel`), puts words and numbers in their places and the token itself among the sinks and
the recent ones, and counts a token that found no room. All is in place if the pool is donated.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from turboq.cache import paged as paged_cache
from turboq.cache.contiguous import GroupBuffers
from turboq.cache.layer import HeadGroup, KVLayer
from turboq.cache.paged import PagedCache, Where
from turboq.cache.simulate import take_heads
from turboq.codecs.base import Arrays, Codec, Stored
from turboq.numbers import half, packing
from turboq.numbers.packing import WORD_BITS
from turboq_kernels.decode.types import pool_pages
from turboq_kernels.encode import triton
from turboq_kernels.encode.store import tables_of, writing_of
from turboq_kernels.encode.triton import Tuning
from turboq_kernels.encode.triton_kernel import Plan, row_of, write_row
from turboq_kernels.encode.types import word_fields
from turboq_kernels.triton_memory import load, store


def unsupported(layer: KVLayer, tokens: int) -> str | None:
    """Why a step is not written so, or None."""
    if tokens != 1:
        return f"{tokens} tokens of a sequence; one is appended"
    if layer.block != 1:
        return f"blocks of {layer.block} tokens, which are encoded together"
    return None


def append(
    layer: KVLayer,
    cache: PagedCache,
    where: Where,
    k: Float[Array, "B 1 K D"],
    v: Float[Array, "B 1 K E"],
    *,
    interpret: bool = False,
) -> PagedCache:
    """`turboq.cache.paged.write` of one token, by a launch for each head group."""
    groups, lost = [], cache.overflow
    for i, (group, buffers) in enumerate(zip(layer.groups, cache.groups, strict=True)):
        counted = lost if i == 0 else None
        new, counted = _group(group, buffers, cache, where, (k, v), counted, interpret)
        groups.append(new)
        lost = lost if counted is None else counted
    return dataclasses.replace(cache, groups=tuple(groups), overflow=lost)


@dataclasses.dataclass(frozen=True)
class _Side:
    """K or V of a group: what is read, and what is written in place."""

    plan: Plan
    tuned: Tuning
    inputs: dict[str, Any]
    kept: dict[str, Any]  # words, numbers, sinks, recent
    coded: tuple[str, ...]  # fields of numbers that are stored as codes


def _group(
    group: HeadGroup, buffers: GroupBuffers, cache: PagedCache, where: Where, x, lost, interpret
) -> tuple[GroupBuffers, Any]:
    table = where.tables[cache.pool]
    sides = {
        "k": _side(group.k, group.k_arrays, buffers.k, group, x[0], table, interpret),
        "v": _side(group.v, group.v_arrays, buffers.v, group, x[1], table, interpret),
    }
    for name, side in sides.items():
        for exact in ("sinks", "recent"):
            buffer = getattr(buffers, f"{name}_{exact}")
            side.kept[exact] = buffer if buffer.shape[2] else None
    shared = {
        "table": table, "rows": where.rows, "starts": where.starts, "counts": where.counts,
        "room": where.room,
    }  # fmt: skip
    apart = sides["k"].tuned != sides["v"].tuned
    out: dict[str, Any] = {}
    for names in (("k",), ("v",)) if apart else (("k", "v"),):
        kept = {name: sides[name].kept for name in names}
        counted = lost if names[0] == "k" else None
        found, fresh, count = _launch({n: sides[n] for n in names}, shared, kept, counted)
        lost = count if counted is not None else lost
        out |= {name: (found[name], fresh[name]) for name in names}
    stored: dict[str, Stored] = {}
    for name, codec in (("k", group.k), ("v", group.v)):
        kept, fresh = out[name]
        old = getattr(buffers, name)
        stored[name] = _stored(codec, old, kept, fresh, cache.page, table, where)
    exact = {
        f"{name}_{kind}": getattr(buffers, f"{name}_{kind}") if out[name][0][kind] is None
        else out[name][0][kind]
        for name in ("k", "v") for kind in ("sinks", "recent")
    }  # fmt: skip
    return GroupBuffers(k=stored["k"], v=stored["v"], **exact), lost


def _side(
    codec: Codec, arrays: Arrays, stored: Stored, group: HeadGroup, x, table, interpret: bool
) -> _Side:
    writing, fields = writing_of(codec), {f.name: f for f in codec.fields}
    heads = len(group.heads)
    x = take_heads(x, group.heads).swapaxes(1, 2)  # [B, N, 1, D]
    if arrays:
        tables = tables_of(codec, arrays, 1)
    else:
        with jax.ensure_compile_time_eval():  # constants, and no mean that is zero
            tables = tables_of(codec, arrays, 1)
            tables = tables if tables.mean.any() else dataclasses.replace(tables, mean=None)
    words = [packing.kept(stored[n], fields[n].width) for n in word_fields(writing)]
    words = tuple(w.reshape(-1, *w.shape[-3:]) for w in words)
    pages = pool_pages(table, heads)
    plan, tuned = triton.planned(x, writing, tables, words, pages, interpret)
    kept = [name for name in writing.rows if not fields[name].packed]
    numbers = [half.values(stored[n]).reshape(-1, words[0].shape[2] * WORD_BITS) for n in kept]
    coded = tuple(name for name in writing.rows if fields[name].packed)
    plan = dataclasses.replace(plan, in_place=tuple(name in kept for name in writing.rows))
    return _Side(
        plan=plan, tuned=tuned, inputs=triton.operands(x, tables),
        kept={"words": list(words), "numbers": numbers}, coded=coded,
    )  # fmt: skip


def _launch(sides: dict[str, _Side], shared, kept, lost) -> tuple[Any, Any, Any]:
    """(kept, fresh numbers and residuals by side, lost) after the token."""
    one = next(iter(sides.values()))
    batch, heads = one.inputs["x"].shape[:2]
    inputs = {"shared": shared, "sides": {name: side.inputs for name, side in sides.items()}}
    held, fresh = {"kept": kept, "lost": lost}, {}
    for name, side in sides.items():
        fresh[name] = [jax.ShapeDtypeStruct((batch, heads, 1), jnp.float32)] * len(side.coded)
        if side.inputs["sketch"] is not None:
            room = (batch, heads, side.plan.columns, side.plan.coded)
            fresh[name].append(jax.ShapeDtypeStruct(room, jnp.float32))
    read, tree = jax.tree.flatten(inputs)
    old, held_tree = jax.tree.flatten(held)
    new, new_tree = jax.tree.flatten(fresh)
    plans = {name: (side.plan, len(side.coded)) for name, side in sides.items()}
    out = pl.pallas_call(
        functools.partial(_kernel, plans=plans, trees=(tree, held_tree, new_tree)),
        grid=(len(sides), heads, batch),
        out_shape=[*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in old), *new],
        input_output_aliases={len(read) + i: i for i in range(len(old))},
        compiler_params=plgpu.CompilerParams(
            num_warps=one.tuned.num_warps, num_stages=one.tuned.num_stages
        ),
        interpret=one.plan.interpret,
        name="turboq_append",
    )(*read, *old)
    after = jax.tree.unflatten(held_tree, out[: len(old)])
    return after["kept"], jax.tree.unflatten(new_tree, out[len(old) :]), after["lost"]


def _kernel(*refs, plans: dict[str, tuple[Plan, int]], trees) -> None:
    tree, held_tree, new_tree = trees
    counts = [t.num_leaves for t in trees]
    inputs = jax.tree.unflatten(tree, refs[: counts[0]])
    outs = refs[counts[0] + counts[1] :]  # what is kept is read where it is written
    held = jax.tree.unflatten(held_tree, outs[: counts[1]])
    fresh = jax.tree.unflatten(new_tree, outs[counts[1] :])
    which, n, b = (pl.program_id(i) for i in range(3))
    shared = inputs["shared"]
    row, start = shared["rows"][b], jnp.minimum(shared["starts"][b], shared["room"][b])
    fits = jnp.minimum(shared["counts"][b], shared["room"][b] - start)

    if held["lost"] is not None:

        @pl.when((which == 0) & (n == 0))
        def _():
            # A row begins anew with its sequence.
            before = jnp.where(start > 0, held["lost"][row], 0)
            held["lost"][row] = before + shared["counts"][b] - fits

    for i, (name, (plan, _programs)) in enumerate(plans.items()):

        @pl.when((which == i) & (fits > 0))
        def _(name=name, plan=plan):
            kept, side = held["kept"][name], inputs["sides"][name]
            _exact(kept, side["x"], (row, n, b), start, plan)
            size = plan.rows * WORD_BITS
            page, slot = start // size, start % size
            place = (page, slot % plan.rows, slot // plan.rows)
            where = row_of(shared["table"], (0, n, b), place, 0, jnp.int32(1), plan)
            numbers, more = iter(kept["numbers"]), iter(fresh[name])
            found = [next(numbers if here else more) for here in plan.in_place]
            write_row(side, kept["words"], [*found, *more], where, plan)


def _exact(kept, x, at, start, plan: Plan) -> None:
    """The token as it came among the first and the last ones."""
    row, n, b = at
    width = pl.next_power_of_2(plan.dim)
    channels = jnp.arange(width, dtype=jnp.int32)
    token = load(x, (b, n, 0, channels), channels < plan.dim)
    for name in ("recent", "sinks"):
        ref = kept[name]
        if ref is None:
            continue
        slot = start % ref.shape[2] if name == "recent" else jnp.minimum(start, ref.shape[2] - 1)
        own = channels < plan.dim
        if name == "sinks":
            own &= start < ref.shape[2]
        store(ref, (row, n, slot, channels), token.astype(ref.dtype), own, interpret=plan.interpret)


def _stored(
    codec: Codec, old: Stored, kept: dict[str, Any], fresh: list[Any], page: int, table, where
) -> Stored:
    """The fields of one side; numbers stored as codes are put by XLA."""
    writing, fields = writing_of(codec), {f.name: f for f in codec.fields}
    raw = [name for name in writing.rows if not fields[name].packed]
    new = dict(zip(word_fields(writing), kept["words"], strict=True))
    new |= dict(zip(raw, kept["numbers"], strict=True))
    out = {name: half.like(x.reshape(old[name].shape), old[name]) for name, x in new.items()}
    coded = [name for name in writing.rows if fields[name].packed]
    if not coded:
        return out
    entries = {
        name: x.astype(jnp.uint8)[..., None]
        for name, x in zip(coded, fresh[: len(coded)], strict=True)
    }
    starts = jnp.minimum(where.starts, where.room)[:, None]
    valid = (where.counts > 0)[:, None] & (starts < where.room[:, None])
    return out | paged_cache.put(page, table, codec, entries, old, starts, valid)
