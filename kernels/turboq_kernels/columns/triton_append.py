"""One token of every sequence into the one pool, by one launch: all that a step writes of a layer.

A program takes one sequence, one head and one side (K or V): it turns the vector into the codec's
coordinates, searches its codes (`encode.triton_window`), puts their bits into the token's words and
the token itself among the sinks and the recent ones. All is in place if pool and state are
donated. Keys are turned back to the start of their block, and units of joined heads made, by the
programs that code them (`columns.triton_token`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int, UInt32

from turboq.cache import overflow
from turboq.cache.columns import NONE
from turboq.cache.model_cache import LayerForm, LayerState
from turboq.cache.simulate import take_heads
from turboq.codecs.base import Arrays
from turboq.codecs.transform_padded import PaddedTransform
from turboq.numbers import window_gain
from turboq.numbers.packing import PAGE, ROWS
from turboq_kernels.columns import triton, triton_token
from turboq_kernels.columns.triton_token import Stands
from turboq_kernels.encode import triton_window
from turboq_kernels.encode.triton_search import Search
from turboq_kernels.triton_memory import load, store

_EXACT = ("sinks", "recent")


def unsupported(form: LayerForm, tokens: int) -> str | None:
    """Why a step is not written so, or None."""
    if tokens != 1:
        return f"{tokens} tokens of a sequence; one is appended"
    if any(codec.gain == "float16" for codec in form.codecs):
        return "a float16 gain per vector"
    return None


def append(
    state: LayerState,
    words: UInt32[Array, "N P R C"],
    k: Float[Array, "B 1 K D"],
    v: Float[Array, "B 1 K E"],
    counts: Int[Array, "B"] | None,
    *,
    interpret: bool = False,
) -> tuple[LayerState, UInt32[Array, "N P R C"]]:
    """`turboq.cache.model_cache.put` of one token."""
    form, layer, group = state.form, state.form.layer, state.form.group
    counts = jnp.ones((k.shape[0],), jnp.int32) if counts is None else counts
    fitting, lost = overflow.split(state.lengths, counts, state.room(words))
    k, v = (take_heads(x, group.heads).swapaxes(1, 2) for x in (k, v))  # [B, K, 1, D]
    exact, fresh = state.exact, {}
    searches, inputs, kept = [], [], []
    for name, x in (("k", k), ("v", v)):
        codec, arrays, columns = _of(form, name)
        memory, gains = arrays["taps"].shape[-1] - 1, arrays.get("gains")
        count = 0 if gains is None else gains.shape[1]
        searches.append(triton_window.search_of(memory, count, codec.dim, interpret))
        inputs.append({"exact": x, "arrays": arrays, "columns": columns})
        buffers = {of: getattr(exact, f"{name}_{of}") for of in _EXACT}
        kept.append({of: x if x.shape[2] else None for of, x in buffers.items()})
    shared = {"lengths": state.lengths, "first": state.dropped, "fitting": fitting}
    shared["table"] = state.table
    shared["token"] = triton_token.inputs(layer, k, v, state.lengths)
    how = triton_token.stands(layer)
    apart = searches[0].warps != searches[1].warps
    for sides in ((0,), (1,)) if apart else ((0, 1),):
        held = {"words": words, "exact": [kept[i] for i in sides]}
        held = _launch(
            {i: searches[i] for i in sides},
            {"sides": [inputs[i] for i in sides], **shared},
            held,
            how,
        )
        words = held["words"]
        fresh |= {
            f"{'kv'[i]}_{of}": x
            for i, buffers in zip(sides, held["exact"], strict=True)
            for of, x in buffers.items()
            if x is not None
        }
    new = dataclasses.replace(
        state, exact=dataclasses.replace(exact, **fresh), lengths=state.lengths + fitting,
        overflow=state.overflow + lost,
    )  # fmt: skip
    return new, words


def _of(form: LayerForm, side: str) -> tuple[PaddedTransform, Arrays, Any]:
    codec = form.codecs["kv".index(side)]
    return codec, getattr(form.group, f"{side}_arrays"), getattr(form, side)


def _launch(
    searches: dict[int, Search], inputs: dict[str, Any], held: dict[str, Any], how: Stands
) -> dict[str, Any]:
    """`held` with the token, in place; searches of K (0) and V (1)."""
    batch, heads = inputs["token"]["k"].shape[:2]
    one, most = next(iter(searches.values())), max(s.coded for s in searches.values())
    room = (len(searches), batch, heads)
    leaves, tree = jax.tree.flatten(inputs)
    old, held_tree = jax.tree.flatten(held)
    out = pl.pallas_call(
        functools.partial(_kernel, searches=searches, trees=(tree, held_tree), how=how),
        grid=(len(searches), heads, batch),
        out_shape=[
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in old),
            jax.ShapeDtypeStruct((*room, most), jnp.float32),
            jax.ShapeDtypeStruct((*room, most + 1), jnp.int32),
        ],
        input_output_aliases={len(leaves) + i: i for i in range(len(old))},
        compiler_params=plgpu.CompilerParams(num_warps=one.warps, num_stages=1),
        interpret=one.interpret,
        name="turboq_append",
    )(*leaves, *old)
    return jax.tree.unflatten(held_tree, out[: len(old)])


def _kernel(*refs, searches: dict[int, Search], trees, how: Stands) -> None:
    tree, held_tree = trees
    inputs = jax.tree.unflatten(tree, refs[: tree.num_leaves])
    *outs, values, entries = refs[tree.num_leaves + held_tree.num_leaves :]
    held = jax.tree.unflatten(held_tree, outs)  # what is kept is read where it is written
    which, n, b = (pl.program_id(i) for i in range(3))
    start = inputs["lengths"][b]
    slot = start if inputs["first"] is None else start - inputs["first"][b]
    for i, (kv, search) in enumerate(searches.items()):

        @pl.when((which == i) & (inputs["fitting"][b] > 0))
        def _(i=i, kv=kv, search=search):
            side = inputs["sides"][i]
            _exact(side["exact"], held["exact"][i], n, b, start, search.interpret)
            room = (i, b, n)
            channel = jnp.arange(pl.next_power_of_2(search.coded), dtype=jnp.int32)
            y = triton_token.coordinates(
                inputs["token"], side["arrays"], kv, b, n, channel, search.coded, how
            )
            _encode(side["arrays"], y, channel, (values, entries), room, search)
            page = triton.located(inputs, b, slot // PAGE)
            _write(side["columns"], entries, room, held["words"], page, slot, search)


def _exact(x, kept, n, b, start, interpret: bool) -> None:
    """The token as it came among the first and the last ones."""
    dim = x.shape[3]
    channels = jnp.arange(pl.next_power_of_2(dim), dtype=jnp.int32)
    token = load(x, (b, n, 0, channels), channels < dim)
    for name, ref in kept.items():
        if ref is None:
            continue
        size, own = ref.shape[2], channels < dim
        slot = start % size if name == "recent" else jnp.minimum(start, size - 1)
        own &= (start < size) | (name == "recent")
        store(ref, (b, n, slot, channels), token.astype(ref.dtype), own, interpret=interpret)


def _encode(arrays, y, channel, rooms, room, s: Search) -> None:
    """Codes and the gain's index as the entries of the vector y."""
    (values, entries), (*_, n) = rooms, room
    real = channel < s.coded
    if "gains" in arrays:
        far = window_gain.FAR * arrays["gains"][n, arrays["gains"].shape[1] - 1]
        y = jnp.where(y > far, far, jnp.where(y < -far, -far, y))  # NaN stays
    store(values, (*room, channel), y, real, interpret=s.interpret)
    _barrier(s)
    x = {name: arrays[name] for name in ("weights", "step", "last", "taps")}
    x["gains"] = arrays.get("gains")
    codes, index = triton_window.coded(x, y, lambda c: values[(*room, c)], n, s)
    store(entries, (*room, channel), codes, real, interpret=s.interpret)
    entries[(*room, s.coded)] = index
    _barrier(s)


def _write(columns, entries, room, words, page, slot, s: Search) -> None:
    """The vector's bits into its lanes, in place of what the page may have held there before."""
    (*_, n), count = room, columns.plane.shape[1]
    t = jnp.arange(pl.next_power_of_2(count), dtype=jnp.int32)
    plane = jnp.where(t < count, load(columns.plane, (n, t), t < count), NONE)
    there = plane != NONE
    lane, entry = (load(of, (n, t), there) for of in (columns.lane, columns.entry))
    bit = load(entries, (*room, entry), there) >> jnp.maximum(plane, 0) & 1
    j = slot % PAGE // ROWS
    place = (j % 4 * 8 + j // 4).astype(jnp.uint32)
    at = (*page, slot % ROWS, lane)
    old = load(words, at, there) & ~(jnp.uint32(1) << place)
    new = old | bit.astype(jnp.uint32) << place
    store(words, at, new, there, interpret=s.interpret)


def _barrier(s: Search) -> None:
    if not s.interpret:
        plgpu.debug_barrier()  # of this program, which reads what it wrote
