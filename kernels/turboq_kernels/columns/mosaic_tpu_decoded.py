"""Columns on TPU by decoding keys, once for all query rows of a group: keys before RoPE, any block.

    k = R(p0) (mean + sum_u gain_u matrix_u (bits_u - 1/2)),   p0 the start of the key's block

What `queries.fold` moves to the queries, one row of weights per block, is here made of the bits in
the kernel, 128 tokens at a time, with the float32 rotations of `turboq.cache.key_form` as a table.
Matrices are integers of two signed bytes, in units of 1/32639 of the largest entry of a unit of
codes: a key is off by at most a quarter of that, times its gain, for every bit of it. Keys and
queries are pairs of bfloat16, each off by 2^-16 of itself. `mosaic_tpu_decoded_kernel` is the loop.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Int8, UInt32

from turboq.cache.columns import pages_of
from turboq.numbers import rope as rotary
from turboq.numbers.packing import PAGE, ROWS
from turboq.numbers.rope import Rope
from turboq_kernels.columns import mosaic_tpu_decoded_kernel as inner
from turboq_kernels.columns.linear import (
    GAIN_BITS,
    LANES,
    NONE,
    LinearLayer,
    group_count,
    units_of,
)
from turboq_kernels.columns.mosaic_tpu import (
    MAX_VMEM,
    SUBLANES,
    across,
    by_table,
    page_order,
    pages_seen,
    up,
)
from turboq_kernels.columns.mosaic_tpu_decoded_kernel import Spec
from turboq_kernels.columns.mosaic_tpu_kernel import LOG2_E, PIECE
from turboq_kernels.columns.types import Sums

INT8_ROWS = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Operands:
    """A layer as the kernel reads it, p units of each of J groups."""

    matrix: Any  # int8 [J, 2 G D, lanes of keys], high bytes of all channels, then low ones
    means: Any  # float32 [J, G D, 256], of keys at every place in a page
    gains: Any  # float32 [2, J, p, 128], of keys times what an integer is worth, and of values
    gain_weights: Any  # int8 [J, 32, lanes]
    places: Any  # int32: tiles read first of each unit, tiles of all, edges and the gains' tile
    values: Any  # float32 [J, G, E, lanes of values], for `queries.values`


class Ready(NamedTuple):
    """Queries of a step, R rows of a group, zeros behind a head's own, and what they see."""

    plan: Any  # int32 [2 B], see `mosaic_tpu.pages_seen`
    query: Any  # bfloat16 [B, J, G, 2 each, D], two of every number, channels `ordered`
    starts: Any  # int32 [B, J, R, 128], slots, the same in all lanes
    ends: Any


def reads_blocks(block: int) -> bool:
    """Whether keys in blocks of so many positions are read."""
    return PAGE % block == 0


def unsupported(spec: Spec, block: int | None) -> str | None:
    """Why this kernel cannot run a case, or None. `block` None: keys after RoPE."""
    if block is not None and not reads_blocks(block):
        return f"keys of blocks of {block} positions, which do not fill a page of {PAGE}"
    used = vmem_bytes(spec)
    if used > MAX_VMEM:
        return f"{spec.rows} query rows of {spec.width()} lanes need {used} bytes of VMEM"
    return None


def specify(
    rows: int, dim: int, unit_groups: tuple[int, ...], widest: tuple[int, ...], joined: bool,
    pool_lanes: int, rope: Rope | None, *, gain_lanes: int, softcap: float | None, tables: int = 1,
) -> Spec:  # fmt: skip
    """What is static of a call with so many query rows of all heads; `gain_lanes` 0: no gains."""
    heads = len(widest) // 2
    every = tuple(range(len(widest)))
    groups = group_count(unit_groups)
    return Spec(
        heads=heads, each=up(rows // (groups * heads), SUBLANES), dim=len(_channels(rope, dim)),
        half=up(rope.dim // 2, SUBLANES) if rope is not None else 0,
        tiles=_tiles(widest),
        places=(every, every) if joined else ((0,), (1,)), pool=up(pool_lanes, LANES) // LANES,
        gain_tiles=gain_lanes // LANES, tables=tables, softcap=softcap,
    )  # fmt: skip


def spec_of(
    layer: LinearLayer, rows: int, dim: int, pool_lanes: int, rope: Rope | None, *,
    softcap: float | None = None, tables: int = 1,
) -> Spec:  # fmt: skip
    """`specify` of a layer."""
    return specify(
        rows, dim, layer.unit_groups, layer.widest, layer.joined, pool_lanes, rope,
        gain_lanes=layer.gain_weights.shape[1] if layer.gained else 0, softcap=softcap,
        tables=tables,
    )  # fmt: skip


def vmem_bytes(spec: Spec) -> int:
    """Bytes of VMEM of operands and scratch."""
    units, keys = len(spec.tiles), spec.heads * spec.dim
    operands = 2 * (
        2 * keys * spec.width(0) + 4 * keys * PAGE + 4 * spec.rows * spec.dim
        + (2 * LANES + spec.width(1) + 2 * LANES) * spec.rows * 4
    )  # fmt: skip
    raw = 2 * ROWS * 4 * LANES * (sum(spec.read) + spec.gain_tiles)
    table = 2 * 2 * spec.half * PAGE * 4
    values = units * (spec.left * PAGE + spec.rows * LANES * 4)
    return operands + raw + 2 * PAGE * spec.width() + table + values + 4 * keys * PAGE


def _channels(rope: Rope | None, dim: int) -> np.ndarray:
    """Channels of a key as the kernel has them, -1 where it has zeros.

    First ones of all pairs, their second ones, the rest; each part whole sublanes, all whole tiles.
    """
    half = rope.dim // 2 if rope is not None else 0
    pairs = np.arange(2 * half).reshape(2, half)
    if rope is not None and rope.layout == "interleaved":
        pairs = np.arange(2 * half).reshape(half, 2).T
    parts = [np.pad(x, (0, -half % SUBLANES), constant_values=-1) for x in pairs]
    out = np.concatenate([*parts, np.arange(2 * half, dim)])
    return np.pad(out, (0, -len(out) % INT8_ROWS), constant_values=-1)


def ordered(x: Float[Array, "*n D"], rope: Rope | None) -> Float[Array, "*n _"]:
    """Channels as the kernel has them."""
    order = _channels(rope, x.shape[-1])
    if np.array_equal(order, np.arange(x.shape[-1])):
        return x
    there = (order >= 0).reshape((1,) * (x.ndim - 1) + (-1,))
    return jnp.where(there, x[..., np.maximum(order, 0)], 0.0)


@jax.jit(static_argnames=("pool_lanes", "rope"))
def prepare(layer: LinearLayer, pool_lanes: int, rope: Rope | None) -> Operands:
    """The operands of a layer in a pool of so many lanes; once per plan."""
    groups, (heads, _, dim) = layer.groups, layer.means.shape
    spec = spec_of(layer, heads, dim, pool_lanes, rope)
    matrix, unit = _matrix(spec, layer, rope)
    offsets = np.arange(PAGE) % layer.means.shape[1]
    means = page_order(ordered(layer.means[:, offsets], rope).swapaxes(1, 2))
    lanes = _starts(layer) + layer.first[np.array(_sides(layer))][None]  # [J, p] of the pool
    tile = jnp.minimum(lanes // LANES, spec.pool - jnp.asarray(spec.read, jnp.int32)[None])
    gain_lane = layer.first[0] + layer.gain_lane
    edges = jnp.append(LANES - lanes % LANES, gain_lane // LANES)
    places = (tile, _parts(spec, lanes // LANES - tile), edges)
    return Operands(
        matrix=matrix, means=means.reshape(groups, -1, PAGE), gains=_gains(layer, unit),
        gain_weights=_gain_weights(spec, layer, gain_lane),
        places=tuple(x.reshape(-1) for x in places), values=_local(spec, layer, 1),
    )  # fmt: skip


def attend(
    rows: Float[Array, "B M D"],
    words: UInt32[Array, "N P R C"],
    layer: LinearLayer,
    starts: Int[Array, "B M"],
    ends: Int[Array, "B M"],
    first: Int[Array, "#B 1"],
    *,
    rope: Rope | None,
    block: int,
    scale: float,
    softcap: float | None,
    operands: Operands | None = None,
    table: Int[Array, "B p"] | None = None,
    interpret: bool = False,
) -> Sums:
    """Softmax over slots starts[b, m] <= s < ends[b, m] of every row, slot 0 at position `first`.

    Sums are over the lanes of `Operands.values`. `table`: as of `LayerState`.
    """
    made = operands or prepare(layer, words.shape[-1], rope)
    (batch, m, dim), groups = rows.shape, layer.groups
    pages = pages_of(words, table)
    spec = spec_of(layer, m, dim, words.shape[-1], rope, softcap=softcap, tables=len(first))
    own = m // (groups * spec.heads)

    def padded(x):
        """[B, J, G, each, ..] of rows, zeros behind a head's own."""
        x = x.reshape(batch, groups, spec.heads, own, *x.shape[2:])
        return jnp.pad(x, ((0, 0),) * 3 + ((0, spec.each - own),) + ((0, 0),) * (x.ndim - 4))

    factor = scale / softcap if softcap else scale * LOG2_E
    query = padded(ordered(rows * factor, rope))
    query = jnp.concatenate(inner.pair(query), axis=3)
    ends = jnp.minimum(ends, pages * PAGE)
    plan = pages_seen(starts, ends, pages)
    starts, ends = (across(padded(x).reshape(batch, groups, spec.rows)) for x in (starts, ends))
    ready = Ready(plan, query, starts, ends)
    acc, stats = launch(
        spec, ready, words, made, rope=rope, block=block, first=first, table=table,
        interpret=interpret,
    )  # fmt: skip

    def by_row(x):
        """[B, M, ..] of [J, B, R, ..]."""
        x = x.reshape(groups, batch, spec.heads, spec.each, *x.shape[3:])[:, :, :, :own]
        return jnp.moveaxis(x, 0, 1).reshape(batch, m, *x.shape[4:])

    return Sums(
        acc=by_row(acc), total=jnp.sum(by_row(stats[:, :, 1]), axis=-1),
        top=by_row(stats[:, :, 0])[..., 0] / LOG2_E,
    )  # fmt: skip


def launch(
    spec: Spec, ready: Ready, words: UInt32[Array, "N P R C"], made: Operands, *,
    rope: Rope | None, block: int, first: Int[Array, "#B 1"], table: Int[Array, "B p"] | None,
    interpret: bool,
) -> tuple[Float[Array, "J B r W"], Float[Array, "J B 2 r 128"]]:  # fmt: skip
    """Sums over the lanes of `Operands.values`; top in powers of two, and total over lanes."""
    words = jnp.pad(words, ((0, 0), (0, 0), (0, 0), (0, -words.shape[-1] % LANES)))
    pages = pages_of(words, table)
    turns = _table(spec, rope, block, first, pages)
    acc, stats = _call(
        spec, interpret, table, (ready.plan, *made.places), ready.query, ready.starts, ready.ends,
        made.matrix, made.means, made.gains, made.gain_weights, turns, words,
    )  # fmt: skip
    return acc, stats


def _sides(layer: LinearLayer) -> tuple[int, ...]:
    """Whose lanes the unit at each place has: of joined heads all are found in K's."""
    return (0,) * len(layer.widest) if layer.joined else (0, 1)


def _units(layer: LinearLayer) -> np.ndarray:
    """The unit at each place of every group [J, p]; of a head alone those of K and of V."""
    units = units_of(layer.unit_groups)
    return units if layer.joined else np.repeat(units, 2, axis=1)


def _starts(layer: LinearLayer) -> Int[Array, "J p"]:
    """The first lane of every unit among its side's; 0 where it has none."""
    return jnp.where(_of_units(layer, "count") > 0, _of_units(layer, "start"), 0)


def _parts(spec: Spec, offset: Int[Array, "J p"]) -> Int[Array, "J _"]:
    """Tiles among those read in which the lanes of all units begin, and for each unit one more."""
    out, base = [], 0
    for place, n in enumerate(spec.tiles):
        at = offset[:, place, None] + jnp.arange(n + 1, dtype=jnp.int32)[None]
        out.append(base + jnp.minimum(at, spec.read[place] - 1))  # no lane of its own lies behind
        base += spec.read[place]
    return jnp.concatenate(out, axis=1)


def _of_units(layer: LinearLayer, name: str) -> Array:
    """An array by unit, [J, p, ..]."""
    sides, units = (layer.k, layer.v), _units(layer)
    each = [getattr(sides[i], name)[units[:, p]] for p, i in enumerate(_sides(layer))]
    return jnp.stack(each, axis=1)


def _tiles(widest: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(max(1, up(n, LANES) // LANES) for n in widest)


def _local(spec: Spec, layer: LinearLayer, i: int) -> Float[Array, "J G D W"]:
    """The matrix of K (0) or V (1) over the lanes of its own units, each from a tile's first on."""
    starts, counts, parts = _starts(layer), _of_units(layer, "count"), []
    by_lane = jnp.moveaxis(
        (layer.k, layer.v)[i].matrix, 2, 0
    )  # whole rows of numbers are taken, not lanes
    for place in spec.places[i]:
        at = np.arange(spec.tiles[place] * LANES, dtype=np.int32)[None]
        lane = jnp.minimum(starts[:, place, None] + at, len(by_lane) - 1)
        there = at < counts[:, place, None]
        parts.append(jnp.where(there[..., None, None], by_lane[lane], 0.0))
    return jnp.concatenate(parts, axis=1).transpose(0, 2, 3, 1)


def _matrix(
    spec: Spec, layer: LinearLayer, rope: Rope | None
) -> tuple[Int8[Array, "J _ W"], Float[Array, "J p"]]:
    """High bytes of all channels of a group and then their low bytes; what an integer is worth."""
    whole = ordered(jnp.moveaxis(_local(spec, layer, 0), 2, 3), rope)  # [J, G, W, D]
    whole = jnp.moveaxis(whole, 3, 2).reshape(layer.groups, -1, whole.shape[2])
    parts, units = [], []
    for place in spec.places[0]:
        own = whole[:, :, spec.lanes(place, 0)]
        largest = jnp.max(jnp.abs(own), axis=(1, 2))
        units.append(jnp.where(largest > 0, largest / PIECE, 1.0))
        parts.append(jnp.round(own / units[-1][:, None, None]).astype(jnp.int32))
    integers = jnp.concatenate(parts, axis=-1)
    high = (integers + 128) >> 8
    both = jnp.concatenate([high, integers - (high << 8)], axis=1).astype(jnp.int8)
    if not layer.joined:  # a unit of V is none of keys
        units.append(jnp.ones_like(units[0]))
    return both, jnp.stack(units, axis=-1)


def _gains(layer: LinearLayer, unit: Float[Array, "J p"]) -> Float[Array, "2 J U 128"]:
    """By its gain, what a bit of a unit is worth in keys, times integers, and the gain itself."""
    table = _of_units(layer, "gains")  # [J, p, 16]
    room = ((0, 0), (0, -table.shape[1] % SUBLANES), (0, LANES - (1 << GAIN_BITS)))
    both = [table * (0.5 * unit)[..., None], table]  # +-1 stand for +-1/2
    return jnp.stack([jnp.pad(x, room, mode="edge") for x in both])


def _gain_weights(spec: Spec, layer: LinearLayer, first: Array) -> Int8[Array, "J 32 w"]:
    """2^p at the lanes of bit p of each unit's gain, lanes from `first` on."""
    units, sides = _units(layer), _sides(layer)
    lanes = jnp.stack([layer.gain_lanes[i, units[:, p]] for p, i in enumerate(sides)], axis=1)
    at = jnp.arange(max(spec.gain_tiles, 1) * LANES, dtype=jnp.int32)[None, None, None]
    here = (lanes[..., None] - first == at) & (lanes != NONE)[..., None]  # [J, p, 4, w]
    worth = (1 << np.arange(GAIN_BITS, dtype=np.int32))[None, None, :, None]
    weights = jnp.sum(jnp.where(here, worth, 0), axis=2).astype(jnp.int8)
    return jnp.pad(weights, ((0, 0), (0, -weights.shape[1] % INT8_ROWS), (0, 0)))


def _table(
    spec: Spec, rope: Rope | None, block: int, first: Int[Array, "#B 1"], pages: int
) -> Float[Array, "_ P 2 h 256"]:
    """cos and sin at the start of every slot's block, page by page."""
    if rope is None:
        return jnp.zeros((1, 1, 2, SUBLANES, PAGE), jnp.float32)
    # Constants in the order of words: iotas would be as many launches as all else.
    slots = page_order(np.arange(pages * PAGE, dtype=np.int32)[None, None])[0, :, 0]
    at = first[:, :, None] + slots[None]
    both = rotary.tables(rope, at - at % block)
    out = jnp.stack([x.swapaxes(2, 3) for x in both], axis=2)
    return jnp.pad(out, ((0, 0),) * 3 + ((0, spec.half - out.shape[3]), (0, 0)))


def _call(
    spec: Spec, interpret, table, scalars, query, starts, ends, matrix, means, gains, weights,
    rotations, words,
):  # fmt: skip
    groups, batch = len(matrix), len(query)

    def of_group(x, axis: int = 0):
        shape = (*x.shape[:axis], 1, *x.shape[axis + 1 :])
        return pl.BlockSpec(shape, lambda j, b, *_: (*(0,) * axis, j, *(0,) * (x.ndim - axis - 1)))

    def of_both(x):
        return pl.BlockSpec((1, 1, *x.shape[2:]), lambda j, b, *_: (b, j, *(0,) * (x.ndim - 2)))

    def out(*shape):
        return pl.BlockSpec((1, 1, *shape), lambda j, b, *_: (j, b, *(0,) * len(shape)))

    kernel, tables = by_table(functools.partial(inner.kernel, spec), table)
    scalars = (*tables, *scalars)
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    sums, stats = (spec.rows, spec.width(1)), (2, spec.rows, LANES)
    values = len(spec.places[1])
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(scalars),
        grid=(groups, batch),
        in_specs=[
            *(of_both(x) for x in (query, starts, ends)), of_group(matrix), of_group(means),
            of_group(gains, 1), of_group(weights), hbm, hbm,
        ],
        out_specs=[out(*sums), out(*stats)],
        scratch_shapes=[
            pltpu.VMEM((2, ROWS, sum(spec.read) * LANES), jnp.uint32),
            pltpu.VMEM((2, ROWS, max(spec.gain_tiles, 1) * LANES), jnp.uint32),
            pltpu.VMEM((2, PAGE, spec.width()), jnp.int8),  # bits
            pltpu.VMEM((2, *rotations.shape[2:]), jnp.float32),
            pltpu.VMEM((2, spec.heads, spec.dim, PAGE), jnp.bfloat16),  # keys of a page
            pltpu.VMEM((2, *gains.shape[2:]), jnp.float32),  # gains of its values
            pltpu.VMEM((values, spec.left, PAGE), jnp.int8),  # weights of V
            pltpu.VMEM((1 + values, spec.rows, LANES), jnp.float32),  # of sums, old and new
            pltpu.SemaphoreType.DMA((2,)),
        ],
    )  # fmt: skip
    if not interpret:
        words, rotations = (
            pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in (words, rotations)
        )
    return pl.pallas_call(
        kernel,
        out_shape=[
            jax.ShapeDtypeStruct((groups, batch, *sums), jnp.float32),
            jax.ShapeDtypeStruct((groups, batch, *stats), jnp.float32),
        ],
        grid_spec=grid_spec,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), disable_bounds_checks=True
        ),
        interpret=interpret,
        name="turboq_columns_decoded",
    )(*scalars, query, starts, ends, matrix, means, gains, weights, rotations, words)
