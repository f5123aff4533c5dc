"""One token of every sequence into a pool on TPU: codes and exact ones by one launch a head group.

A grid step takes one head of up to 16 sequences, K and V: it encodes their tokens
(`mosaic_tpu_codes`) and puts the bits into their pages. The first step of a group of sequences also
puts the tokens themselves among the sinks and the recent ones, and counts those that found no room.
All is in place if the pool is donated. Numbers go into their pages where a kernel sees those as
they lie (`decode.mosaic_tpu_layout.lies_by_heads`), float16 as bits; others are left to XLA, as is
float16 in a pool that holds no bits (`turboq.cache.paged.init`): no kernel takes it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from turboq.cache import paged as paged_cache
from turboq.cache.contiguous import GroupBuffers
from turboq.cache.layer import HeadGroup, KVLayer
from turboq.cache.paged import PagedCache, Where
from turboq.cache.simulate import take_heads
from turboq.codecs.base import Arrays, Codec, Stored
from turboq.numbers import packing
from turboq_kernels.decode.mosaic_tpu_layout import lies_by_heads
from turboq_kernels.encode import mosaic_tpu
from turboq_kernels.encode import mosaic_tpu_codes as codes
from turboq_kernels.encode.mosaic_tpu import SEQUENCES, Spec
from turboq_kernels.encode.mosaic_tpu_codes import LANES
from turboq_kernels.encode.mosaic_tpu_exact import Token, finish, put_exact, span, transfer
from turboq_kernels.encode.mosaic_tpu_kernel import code_words, encoded, put_page, sublanes
from turboq_kernels.encode.mosaic_tpu_pages import SUBLANES, fold
from turboq_kernels.encode.store import tables_of, writing_of
from turboq_kernels.encode.types import word_fields

MAX_VMEM = 12 * 2**20  # of the 16 MiB that one kernel may use by default


def unsupported(layer: KVLayer, tokens: int) -> str | None:
    """Why a step is not written so, or None."""
    if tokens != 1:
        return f"{tokens} tokens of a sequence; one is appended"
    if layer.block != 1:
        return f"blocks of {layer.block} tokens, which are encoded together"
    if layer.policy.exact_dtype == "float16":
        return "exact tokens in float16, which kernels do not take"
    for group in layer.groups:
        if len(group.heads) > LANES:
            return f"{len(group.heads)} heads of a group; it numbers {LANES}"
        used = _vmem_bytes(layer, group)
        if used > MAX_VMEM:
            return f"{used} bytes of VMEM for {len(group.heads)} heads"
    return None


def _vmem_bytes(layer: KVLayer, group: HeadGroup) -> int:
    """Of scratch and (twice) operands, for as many sequences as a step takes."""
    heads, total = len(group.heads), 0
    exact = span(layer.ring) + layer.policy.sinks
    for codec in (group.k, group.v):
        spec = mosaic_tpu.specify(writing_of(codec), codec.dim, packing.PAGE, 1)
        words = sum(math.prod(f.block) for f in spec.fields)
        tokens = heads * (codec.dim * (exact + 3) + packing.PAGE)  # as they came, and float32
        total += SEQUENCES * 4 * (words + tokens + 3 * spec.codes.lanes)
        total += 8 * (codec.dim + 2 * 2**spec.codes.bits) * spec.codes.lanes
        total += 8 * spec.codes.lanes**2 * (spec.codes.writing.signs is not None)
    return total


def append(
    layer: KVLayer,
    cache: PagedCache,
    where: Where,
    k: Float[Array, "B 1 K D"],
    v: Float[Array, "B 1 K E"],
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> PagedCache:
    """`turboq.cache.paged.write` of one token."""
    groups, lost = [], cache.overflow
    for i, (group, buffers) in enumerate(zip(layer.groups, cache.groups, strict=True)):
        new, counted = _group(
            group, buffers, cache, where, (k, v), lost if i == 0 else None, interpret
        )
        groups.append(new)
        lost = counted if i == 0 else lost
    return dataclasses.replace(cache, groups=tuple(groups), overflow=lost)


def _group(
    group: HeadGroup, buffers: GroupBuffers, cache: PagedCache, where: Where, x, lost, interpret
) -> tuple[GroupBuffers, Any]:
    heads, table = len(group.heads), where.tables[cache.pool]
    # Those added have no token: their counts are zero.
    extra = -len(where.rows) % SEQUENCES if len(where.rows) > SEQUENCES else 0

    def padded(x):
        return jnp.pad(x, ((0, extra), *((0, 0),) * (x.ndim - 1))) if extra else x

    scalars = {
        name: padded(x) for name, x in {
            "table": table, "rows": where.rows, "starts": where.starts, "counts": where.counts,
            "room": where.room,
        }.items()
    }  # fmt: skip
    sides, held, kept = {}, {}, {"lost": lost}
    for name, codec, arrays, tokens in (
        ("k", group.k, group.k_arrays, x[0]), ("v", group.v, group.v_arrays, x[1]),
    ):  # fmt: skip
        stored = getattr(buffers, name)
        exact = {kind: getattr(buffers, f"{name}_{kind}") for kind in ("sinks", "recent")}
        spec = mosaic_tpu.specify(writing_of(codec), codec.dim, cache.page, 1)
        sides[name] = spec = _centered(spec, codec, arrays)
        held[name] = {
            "x": padded(take_heads(tokens, group.heads)),
            "held": _operands(codec, arrays, spec),
        }
        names = word_fields(spec.codes.writing)
        kept[name] = {
            "words": [
                fold(_rows_of(stored[n]), f) for n, f in zip(names, spec.fields, strict=True)
            ],
            "numbers": {
                n: stored[n].reshape(-1, heads, cache.page) for n in _in_place(codec, stored)
            },
            "exact": {kind: x for kind, x in exact.items() if x.shape[2]},
        }
    new, numbers = _call(sides, heads, len(where.rows), scalars, held, kept, interpret)
    out: dict[str, Any] = {}
    for name, codec in (("k", group.k), ("v", group.v)):
        old = getattr(buffers, name)
        words = zip(word_fields(sides[name].codes.writing), new[name]["words"], strict=True)
        out[name] = {n: w.reshape(old[n].shape) for n, w in words}
        out[name] |= {n: x.reshape(old[n].shape) for n, x in new[name]["numbers"].items()}
        out[name] |= _numbers(codec, old, numbers[name], cache.page, table, where)
        for kind in ("sinks", "recent"):
            whole = getattr(buffers, f"{name}_{kind}")
            out[f"{name}_{kind}"] = new[name]["exact"].get(kind, whole)
    return GroupBuffers(**out), new["lost"]


def _in_place(codec: Codec, stored: Stored) -> list[str]:
    """Row numbers that the kernel puts into their pages."""
    raw = [f.name for f in codec.fields if not f.packed]
    return [
        n for n in writing_of(codec).rows
        if n in raw and stored[n].dtype in (jnp.bfloat16, jnp.uint16)
        and lies_by_heads(stored[n].dtype, *stored[n].shape[1:3])
    ]  # fmt: skip


def _rows_of(words: Array) -> Array:
    return words.reshape(-1, *words.shape[2:])


def _centered(spec: Spec, codec: Codec, arrays: Arrays) -> Spec:
    """Without a mean where that is zero for certain."""
    if arrays:
        return spec
    with jax.ensure_compile_time_eval():
        some = bool(tables_of(codec, arrays, 1).mean.any())
    return dataclasses.replace(spec, codes=dataclasses.replace(spec.codes, centered=some))


def _operands(codec: Codec, arrays: Arrays, spec: Spec) -> list[Array]:
    """Of every head, or constants that all share."""
    if arrays:
        return codes.operands(spec.codes, tables_of(codec, arrays, 1))
    with jax.ensure_compile_time_eval():
        return codes.operands(spec.codes, tables_of(codec, arrays, 1))


def _numbers(codec: Codec, old: Stored, numbers, page: int, table, where: Where) -> Stored:
    """The fields of the other row numbers [B, lanes], put by XLA."""
    fields = {f.name: f for f in codec.fields}
    if not numbers:
        return {}
    batch, heads = len(where.rows), next(iter(old.values())).shape[1]
    entries = {}
    for name, x in numbers.items():
        x = x[:batch, :heads]
        kind = "uint8" if fields[name].packed else fields[name].dtype
        entries[name] = x.astype(kind)[:, :, None, None]
    starts = jnp.minimum(where.starts, where.room)[:, None]
    valid = (where.counts > 0)[:, None] & (starts < where.room[:, None])
    return paged_cache.put(page, table, codec, entries, old, starts, valid)


def _call(
    sides: dict[str, Spec], heads: int, real: int, scalars, held, kept, interpret
) -> tuple[Any, dict[str, Any]]:
    """(what is kept, by side the other numbers [B, lanes]) after the tokens."""
    batch = len(scalars["rows"])
    s = min(batch, SEQUENCES)
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    small = pl.BlockSpec(memory_space=pltpu.SMEM)

    def x_spec(x):
        return pl.BlockSpec((s, None, *x.shape[2:]), lambda g, n, *_: (g, 0, 0, 0))

    def held_spec(a):
        own = a.shape[0] > 1
        return pl.BlockSpec((None, *a.shape[1:]), lambda g, n, *_: (n if own else 0, 0, 0))

    in_specs = {
        name: {"x": x_spec(side["x"]), "held": [held_spec(a) for a in side["held"]]}
        for name, side in held.items()
    }
    kept_specs: dict[str, Any] = jax.tree.map(lambda _: hbm, kept)
    kept_specs["lost"] = None if kept["lost"] is None else small
    numbers, scratch = {}, {}
    for name, spec in sides.items():
        inside = kept[name]["numbers"]
        numbers[name] = {
            n: jax.ShapeDtypeStruct((batch, LANES), jnp.float32)
            for n in spec.codes.writing.rows if n not in inside
        }  # fmt: skip
        dim, exact = held[name]["x"].shape[-1], kept[name]["exact"]
        height = -(-s // SUBLANES) * SUBLANES
        scratch[name] = {
            "pages": [pltpu.VMEM((s, *f.block), jnp.uint32) for f in spec.fields],
            "gathered": mosaic_tpu.registers(spec, 1),
            "code": pltpu.VMEM((height, spec.codes.lanes), jnp.uint32),
            "tokens": pltpu.VMEM((s, heads, dim), jnp.float32),
            "number": pltpu.VMEM((height, spec.page), jnp.float32),
            "numbers": {n: pltpu.VMEM((s, *x.shape[1:]), x.dtype) for n, x in inside.items()},
            "exact": {
                kind: pltpu.VMEM(
                    (s, heads, span(x.shape[2]) if kind == "recent" else x.shape[2], dim), x.dtype
                )
                for kind, x in exact.items()
            },
        }
    scratch["in"], scratch["out"] = (pltpu.SemaphoreType.DMA((s,)), pltpu.SemaphoreType.DMA)
    number_specs = jax.tree.map(
        lambda _: pl.BlockSpec((s, LANES), lambda g, n, *_: (g, 0)), numbers
    )
    if not interpret:  # the compiler would move small buffers into VMEM, and copies become loops
        kept = {
            name: x if name == "lost" else jax.tree.map(
                lambda w: pltpu.with_memory_space_constraint(w, pltpu.HBM), x
            )
            for name, x in kept.items()
        }  # fmt: skip
    first, first_tree = jax.tree.flatten(scalars)
    inputs, tree = jax.tree.flatten((held, kept))
    olds, _ = jax.tree.flatten(kept)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), kept)
    out_shape, out_tree = jax.tree.flatten((shapes, numbers))
    rooms, scratch_tree = jax.tree.flatten(scratch)
    aliased = len(first) + len(inputs) - len(olds)
    outs = pl.pallas_call(
        functools.partial(
            _kernel, sides=sides, real=real, trees=(first_tree, tree, out_tree, scratch_tree)
        ),
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(first),
            grid=(batch // s, heads),
            in_specs=jax.tree.leaves((in_specs, kept_specs)),
            out_specs=jax.tree.leaves((kept_specs, number_specs)),
            scratch_shapes=rooms,
        ),
        input_output_aliases={aliased + i: i for i in range(len(olds))},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"),
            # The table holds pages of the buffer by contract; tests run with detection instead.
            disable_bounds_checks=True,
        ),
        interpret=interpret,
        name="turboq_append",
    )(*first, *inputs)  # fmt: skip
    return jax.tree.unflatten(out_tree, outs)


def _kernel(*refs, sides: dict[str, Spec], real: int, trees) -> None:
    refs = list(refs)

    def take(tree):
        out, refs[: tree.num_leaves] = refs[: tree.num_leaves], []
        return jax.tree.unflatten(tree, out)

    scalars = take(trees[0])
    held, before = take(trees[1])
    kept, numbers = take(trees[2])
    scratch = take(trees[3])
    group, n, heads = pl.program_id(0), pl.program_id(1), pl.num_programs(1)
    spec = next(iter(sides.values()))
    count = next(iter(held.values()))["x"].shape[0]

    def token(s) -> Token:
        b, shift = group * count + s, spec.page.bit_length() - 1
        room = scalars["room"][b]
        start = jnp.minimum(scalars["starts"][b], room)
        fits = (scalars["counts"][b] > 0) & (start < room)
        page = jnp.minimum(start >> shift, scalars["table"].shape[1] - 1)
        return Token(
            row=scalars["rows"][b], start=start, fits=fits,
            page=scalars["table"][b, page], slot=start & (spec.page - 1),
        )  # fmt: skip

    def each(do):
        def one(s, _):
            do(s, token(s))
            return 0

        jax.lax.fori_loop(0, count, one, 0)

    if kept["lost"] is not None:

        @pl.when((group == 0) & (n == 0))
        def _():
            _count_lost(scalars, real, before["lost"], kept["lost"])

    @pl.when(n == 0)
    def _():
        for name in sides:
            scratch[name]["tokens"][...] = held[name]["x"][...].astype(jnp.float32)
        put_exact({name: kept[name]["exact"] for name in sides}, scratch, each)
        _move_numbers(kept, scratch, each, False)

    def copies(s, at: Token, out: bool):
        for name in sides:
            for words, buffer in zip(kept[name]["words"], scratch[name]["pages"], strict=True):
                yield transfer(words.at[at.page * heads + n], buffer.at[s], scratch, s, out)

    def read(s, at: Token, wait: bool):
        @pl.when(at.fits & (at.slot > 0))  # of a page that holds earlier tokens
        def _():
            for copy in copies(s, at, False):
                copy.wait() if wait else copy.start()

    each(lambda s, at: read(s, at, False))
    sublane = {name: sublanes(side) for name, side in sides.items()}
    for name, side in sides.items():
        room = scratch[name]
        planes, found = encoded(side, held[name]["held"], _rows(room["tokens"], n, count))
        room["code"][...] = code_words(planes)
        for number, row in zip(found, side.codes.writing.rows, strict=True):
            if row not in numbers[name]:
                _put_number(room["numbers"][row], room["number"], number, n, each)
                continue
            out = numbers[name][row]
            lane = jax.lax.broadcasted_iota(jnp.int32, out.shape, 1)
            out[...] = jnp.where(lane == n, number[:count], out[...])

    def put(s, at: Token):
        read(s, at, True)

        @pl.when(at.fits)
        def _():
            for name, side in sides.items():
                room = scratch[name]
                pages = [buffer.at[s] for buffer in room["pages"]]
                slots = at.slot, at.slot + 1
                put_page(side, room["code"], room["gathered"], pages, s, 1, *slots, sublane[name])
            for copy in copies(s, at, True):
                copy.start()

    each(put)
    each(lambda s, at: pl.when(at.fits)(lambda: finish(copies(s, at, True))))

    @pl.when(n == heads - 1)
    def _():
        _move_numbers(kept, scratch, each, True)


def _move_numbers(kept, scratch, each, out: bool) -> None:
    """Pages of numbers of all heads."""
    for wait in (False, True):

        def one(s, at: Token, wait=wait):
            @pl.when(at.fits)
            def _():
                for name, held in kept.items():
                    if name == "lost":
                        continue
                    for row, ref in held["numbers"].items():
                        here = scratch[name]["numbers"][row].at[s]
                        copy = transfer(ref.at[at.page], here, scratch, s, out)
                        copy.wait() if wait else copy.start()

        each(one)


def _put_number(pages, room, number, n, each) -> None:
    """Those [S, 1] of head n, to the slots of their tokens; float16 as its bits."""
    half = pages.dtype == jnp.uint16
    room[...] = jnp.broadcast_to(number, room.shape)

    def one(s, at: Token):
        shape = pages.shape[1:]
        head, slot = (jax.lax.broadcasted_iota(jnp.int32, shape, i) for i in (0, 1))
        row = room[pl.ds(s, 1), :]
        new = jnp.broadcast_to(codes.half_bits(row) if half else row, shape)
        old = pages[s].astype(new.dtype)
        pages[s] = jnp.where((head == n) & (slot == at.slot), new, old).astype(pages.dtype)

    each(one)


def _rows(tokens, n, count: int) -> Float[Array, "S D"]:
    """Head n of every sequence, and zeros that fill registers."""
    rows = [tokens[s, pl.ds(n, 1), :] for s in range(count)]
    rows += [jnp.zeros_like(rows[0])] * (-count % SUBLANES)
    return jnp.concatenate(rows, axis=0)


def _count_lost(scalars, real: int, before, after) -> None:
    """Tokens without room; a row begins anew with its sequence."""

    def same(r, _):
        after[r] = before[r]
        return 0

    jax.lax.fori_loop(0, before.shape[0], same, 0)

    def count(b, _):
        room, counts = scalars["room"][b], scalars["counts"][b]
        start = jnp.minimum(scalars["starts"][b], room)
        lost = counts - jnp.minimum(counts, jnp.maximum(room - start, 0))
        row = scalars["rows"][b]
        after[row] = jnp.where(start > 0, before[row], 0) + lost
        return 0

    jax.lax.fori_loop(0, real, count, 0)
