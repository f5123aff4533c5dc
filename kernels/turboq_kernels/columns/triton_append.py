"""One token of every sequence into the one pool, by one launch: all that a step writes of a layer.

A program takes one sequence, one head and one side (K or V): it turns the vector into the codec's
coordinates, searches its codes (`encode.triton_window`), ORs their bits into the token's words and
puts the token itself among the sinks and the recent ones. All is in place if pool and state are
donated. Keys that are stored relative to a block, and units of joined heads, are made by XLA.
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

from turboq.cache import joint, overflow
from turboq.cache.columns import NONE
from turboq.cache.key_form import to_stored
from turboq.cache.model_cache import LayerForm, LayerState
from turboq.cache.simulate import take_heads
from turboq.codecs.base import Arrays
from turboq.codecs.transform_padded import PaddedTransform
from turboq.numbers import window_gain
from turboq.numbers.packing import PAGE, ROWS
from turboq_kernels.encode import triton_window
from turboq_kernels.encode.triton_search import Search
from turboq_kernels.triton_memory import load, store

_BLOCK = 32  # channels of a step of the product
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
    words: UInt32[Array, "B P R C"],
    k: Float[Array, "B 1 K D"],
    v: Float[Array, "B 1 K E"],
    counts: Int[Array, "B"] | None,
    *,
    interpret: bool = False,
) -> tuple[LayerState, UInt32[Array, "B P R C"]]:
    """`turboq.cache.model_cache.put` of one token."""
    form, layer, group = state.form, state.form.layer, state.form.group
    counts = jnp.ones((k.shape[0],), jnp.int32) if counts is None else counts
    fitting, lost = overflow.split(
        state.lengths, counts, jnp.int32(words.shape[1] * PAGE) + state.first
    )
    positions = state.lengths[:, None]
    units = joint.to_units(layer, k, v, positions)
    k, v, k_coded, v_coded = (  # [B, K, 1, D]
        take_heads(x, group.heads).swapaxes(1, 2) for x in (k, v, *units)
    )
    if layer.joint_heads is None:
        k_coded = to_stored(layer, group.k_arrays, k_coded, positions)
    exact, fresh = state.exact, {}
    searches, inputs, kept = [], [], []
    for name, codec, arrays, columns, x, y in (
        ("k", *_of(form, "k"), k, k_coded), ("v", *_of(form, "v"), v, v_coded),
    ):  # fmt: skip
        memory, gains = arrays["taps"].shape[-1] - 1, arrays.get("gains")
        count = 0 if gains is None else gains.shape[1]
        searches.append(triton_window.search_of(memory, count, codec.dim, interpret))
        inputs.append({"exact": x, "x": y, "arrays": arrays, "columns": columns})
        buffers = {of: getattr(exact, f"{name}_{of}") for of in _EXACT}
        kept.append({of: x if x.shape[2] else None for of, x in buffers.items()})
    shared = {"lengths": state.lengths, "first": state.dropped, "fitting": fitting}
    apart = searches[0].warps != searches[1].warps
    for sides in ((0,), (1,)) if apart else ((0, 1),):
        held = {"words": words, "exact": [kept[i] for i in sides]}
        held = _launch(
            [searches[i] for i in sides], {"sides": [inputs[i] for i in sides], **shared}, held
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


def _launch(searches: list[Search], inputs: dict[str, Any], held: dict[str, Any]) -> dict[str, Any]:
    """`held` with the token, in place."""
    batch, heads = inputs["sides"][0]["x"].shape[:2]
    most = max(s.coded for s in searches)
    room = (len(searches), batch, heads)
    leaves, tree = jax.tree.flatten(inputs)
    old, held_tree = jax.tree.flatten(held)
    out = pl.pallas_call(
        functools.partial(_kernel, searches=searches, trees=(tree, held_tree)),
        grid=(len(searches), heads, batch),
        out_shape=[
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in old),
            jax.ShapeDtypeStruct((*room, most), jnp.float32),
            jax.ShapeDtypeStruct((*room, most + 1), jnp.int32),
        ],
        input_output_aliases={len(leaves) + i: i for i in range(len(old))},
        compiler_params=plgpu.CompilerParams(num_warps=searches[0].warps, num_stages=1),
        interpret=searches[0].interpret,
        name="turboq_append",
    )(*leaves, *old)
    return jax.tree.unflatten(held_tree, out[: len(old)])


def _kernel(*refs, searches: list[Search], trees) -> None:
    tree, held_tree = trees
    inputs = jax.tree.unflatten(tree, refs[: tree.num_leaves])
    *outs, values, entries = refs[tree.num_leaves + held_tree.num_leaves :]
    held = jax.tree.unflatten(held_tree, outs)  # what is kept is read where it is written
    which, n, b = (pl.program_id(i) for i in range(3))
    start = inputs["lengths"][b]
    slot = start if inputs["first"] is None else start - inputs["first"][b]
    for i, search in enumerate(searches):

        @pl.when((which == i) & (inputs["fitting"][b] > 0))
        def _(i=i, search=search):
            side = inputs["sides"][i]
            _exact(side["exact"], held["exact"][i], n, b, start, search.interpret)
            room = (i, b, n)
            _encode(side, (values, entries), room, search)
            _write(side["columns"], entries, room, held["words"], slot, search)


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


def _encode(side, rooms, room, s: Search) -> None:
    """Codes and the gain's index as the entries of the vector."""
    (values, entries), (_, b, n) = rooms, room
    arrays = side["arrays"]
    channel = jnp.arange(pl.next_power_of_2(s.coded), dtype=jnp.int32)
    real = channel < s.coded
    y = _coordinates(side["x"], arrays, b, n, channel, s)
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


def _coordinates(x, arrays, b, n, channel, s: Search) -> Float[Array, "P"]:
    """y = A (x - mean), or of units the coordinates that are coded."""
    if "analysis" not in arrays:
        there = channel.astype(jnp.float32) < arrays["coded"][n]
        return load(x, (b, n, 0, channel), there & (channel < s.coded)).astype(jnp.float32)
    dim = x.shape[3]
    block = min(_BLOCK, pl.next_power_of_2(dim))

    def step(i, total):
        at = i * block + jnp.arange(block, dtype=jnp.int32)
        inside = at < dim
        token = load(x, (b, n, 0, at), inside).astype(jnp.float32)
        token -= load(arrays["mean"], (n, at), inside)
        mask = (channel < s.coded)[:, None] & inside[None, :]
        rows = load(arrays["analysis"], (n, channel[:, None], at[None, :]), mask)
        return total + rows * token[None, :]

    zero = jnp.zeros((channel.shape[0], block), jnp.float32)
    return jnp.sum(jax.lax.fori_loop(0, -(-dim // block), step, zero), axis=1)


def _write(columns, entries, room, words, slot, s: Search) -> None:
    """The vector's bits into its lanes; the token's are still zero."""
    (_, b, n), count = room, columns.plane.shape[1]
    t = jnp.arange(pl.next_power_of_2(count), dtype=jnp.int32)
    plane = jnp.where(t < count, load(columns.plane, (n, t), t < count), NONE)
    there = plane != NONE
    lane, entry = (load(of, (n, t), there) for of in (columns.lane, columns.entry))
    bit = load(entries, (*room, entry), there) >> jnp.maximum(plane, 0) & 1
    j = slot % PAGE // ROWS
    new = bit.astype(jnp.uint32) << (j % 4 * 8 + j // 4).astype(jnp.uint32)
    at = (b, slot // PAGE, slot % ROWS, lane)
    store(words, at, load(words, at, there) | new, there, interpret=s.interpret)


def _barrier(s: Search) -> None:
    if not s.interpret:
        plgpu.debug_barrier()  # of this program, which reads what it wrote
