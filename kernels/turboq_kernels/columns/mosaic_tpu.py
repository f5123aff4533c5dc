"""Columns on TPU (Pallas, Mosaic): a layer's heads in one pass over a page, whatever their bits.

A page [8, W] of words is masked to bytes of value 2^j, 32 tokens each, which the matrix unit takes
as int8. A tile of 128 lanes has codes of a few units (`columns.linear`: a head's keys or values, or
a part of joined heads), whose group's query rows (a signed high and low byte) stand on the other
side; which units is data. Probabilities times gains are 12 bits or more of the largest of their
page. `mosaic_tpu_kernel` is the loop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Int8, Shaped, UInt32

from turboq.cache.columns import pages_of
from turboq.numbers.packing import PAGE, ROWS
from turboq_kernels.columns import mosaic_tpu_kernel as inner
from turboq_kernels.columns.linear import GAIN_BITS, LANES, LinearLayer, LinearSide, group_count
from turboq_kernels.columns.mosaic_tpu_kernel import HALF, PIECE, Spec
from turboq_kernels.columns.queries import Folded, as_integers
from turboq_kernels.columns.types import Sums
from turboq_kernels.target import tpu_generation

BLOCKS = (HALF, PAGE)  # positions of a block of keys
MAX_VMEM = 14 * 2**20
SUBLANES = 8


def unsupported(
    rows: int, groups: tuple[int, ...], fewest: int, widths: tuple[int, int], block: int | None
) -> str | None:
    """Why this kernel cannot run a case, or None.

    `groups` of every unit; `block` None: keys after RoPE.
    """
    if block is not None and block not in BLOCKS:
        return f"keys of blocks of {block} positions; it reads blocks of {BLOCKS} positions"
    slots = min((LANES - 2) // fewest + 2, len(groups))
    used = vmem_bytes(rows, groups, slots, widths)
    if used > MAX_VMEM:
        return f"{rows} query rows of {widths} lanes need {used} bytes of VMEM"
    return None


def unsupported_chip() -> str | None:
    """Why no column kernel can run on the TPU that is traced for, or None."""
    generation = tpu_generation()
    if generation is not None and generation < 5:
        return f"TPU v{generation} multiplies no int8, which stored bits are read as; TPU v5 does"
    return None


def vmem_bytes(rows: int, groups: tuple[int, ...], slots: int, widths: tuple[int, int]) -> int:
    """Bytes of VMEM of operands and scratch."""
    each, units = up(rows // group_count(groups), SUBLANES), len(groups)
    left = up(2 * slots * each, 32)
    words = 2 * ROWS * 4 * sum(widths)
    operands = 2 * (2 * left * widths[0] + 4 * slots * each * widths[1])
    weights = 2 * units * left * LANES
    return words + operands + weights + 24 * (units + slots) * each * LANES * 4


def up(n: int, tile: int) -> int:
    return -(-n // tile) * tile


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
) -> Sums:
    """Softmax over slots starts[b, m] <= s < ends[b, m] of every row (`columns.queries`).

    `table`: as of `LayerState`.
    """
    rows, groups = starts.shape[1], layer.groups
    pages = pages_of(words, table)
    spec = Spec(
        each=up(rows // groups, SUBLANES), unit_groups=layer.unit_groups, joined=layer.joined,
        slots=layer.k.slots, widths=(layer.k.matrix.shape[-1], layer.v.matrix.shape[-1]),
        blocks=folded.left.shape[1], pages=pages, per_token=folded.bias.shape[-1] > 1,
        softcap=softcap, gained=layer.gained, gain_lanes=layer.gain_weights.shape[1],
    )  # fmt: skip
    factor = scale / softcap if softcap else scale * inner.LOG2_E

    def padded(x, axis: int):
        """Rows [.., M, ..] with whole sublanes for each group."""
        shape = (*x.shape[:axis], groups, rows // groups, *x.shape[axis + 1 :])
        room = [(0, 0)] * (x.ndim + 1)
        room[axis + 1] = (0, spec.each - rows // groups)
        whole = jnp.pad(x.reshape(shape), room)
        return whole.reshape(*x.shape[:axis], spec.rows, *x.shape[axis + 1 :])

    whole, unit = as_integers(folded, PIECE)
    query = _by_tile(spec, layer.k, padded(whole, 2))
    half = padded(_half(spec, layer.k, whole) * (-0.5 * unit * factor)[:, None, None], 3)
    half = jnp.stack(
        [half[:, :, n, g * spec.each : (g + 1) * spec.each]
         for n, g in enumerate(spec.unit_groups)], axis=2,
    ).reshape(*half.shape[:2], -1)  # fmt: skip
    constants = jnp.broadcast_to(half[..., None], (*half.shape, LANES))
    starts, ends = padded(starts, 1), padded(jnp.minimum(ends, pages * PAGE), 1)
    wide = [across(x) for x in (padded(unit * factor, 1), starts, ends)]
    bias = padded(folded.bias * factor, 1)
    if spec.per_token:
        bias = page_order(jnp.pad(bias, ((0, 0), (0, 0), (0, pages * PAGE - bias.shape[-1]))))
    else:
        bias = across(bias[..., 0])
    of_row = jnp.repeat(jnp.arange(spec.units, dtype=jnp.int32), spec.each)
    gains = [jnp.pad(s.gains, ((0, 0), (0, LANES - (1 << GAIN_BITS)))) for s in (layer.k, layer.v)]
    gains = jnp.stack([x[of_row] for x in gains])
    weights = layer.gain_weights[of_row]
    weights = jnp.where(weights >= 128, weights - 256, weights).astype(jnp.int8)
    weights = jnp.pad(weights, ((0, up(len(of_row), 32) - len(of_row)), (0, 0)))
    words = jnp.pad(words, ((0, 0), (0, 0), (0, 0), (0, -words.shape[-1] % LANES)))
    plan = pages_seen(starts, ends, pages)
    places = jnp.append(layer.first, layer.gain_lane) // LANES
    acc, stats = _call(
        spec, interpret, table, (plan, places, layer.k.tile_unit, layer.v.tile_unit), wide,
        gains, weights, query, constants, bias, words,
    )  # fmt: skip
    own = (jnp.arange(groups, dtype=jnp.int32)[:, None] * spec.each
           + jnp.arange(rows // groups, dtype=jnp.int32)[None]).reshape(-1)  # fmt: skip
    total, top = (stats[:, i, : spec.rows][:, own] for i in (1, 0))
    return Sums(
        acc=_by_row(spec, layer.v, acc, jnp.sum(stats[:, 2], axis=-1))[:, own],
        total=jnp.sum(total, axis=-1), top=top[:, :, 0] / inner.LOG2_E,
    )  # fmt: skip


def _half(spec: Spec, side: LinearSide, whole: Int[Array, "B Q M W"]) -> Float[Array, "B Q U M"]:
    """Sums of a row's integers over the lanes of each unit."""
    units = jnp.arange(spec.units, dtype=jnp.int32)
    there = (side.unit[None] == units[:, None]).astype(jnp.int32)
    return jnp.einsum("bqmw,uw->bqum", whole, there).astype(jnp.float32)


def pages_seen(starts: Int[Array, "B M"], ends: Int[Array, "B M"], pages: int) -> Int[Array, "_"]:
    """The first page that a row of a sequence sees, and how many follow, sequence by sequence."""
    any_row = ends > starts
    low = jnp.min(jnp.where(any_row, starts, jnp.iinfo(jnp.int32).max), axis=1)
    first = jnp.minimum(low // PAGE, pages - 1)
    last = -(-jnp.max(jnp.where(any_row, ends, 0), axis=1) // PAGE)
    return jnp.stack([first, jnp.maximum(last - first, 0)], axis=-1).astype(jnp.int32).reshape(-1)


def by_table(
    kernel: Callable[..., None], table: Array | None
) -> tuple[Callable, tuple[Array, ...]]:
    """A kernel whose first scalar operand is the table, or which gets None for it; the operand."""
    if table is None:
        return functools.partial(kernel, None), ()
    return kernel, (table,)


def across(
    x: Float[Array, "*n M"] | Int[Array, "*n M"],
) -> Float[Array, "*n M 128"] | Int[Array, "*n M 128"]:
    """The same number in all lanes."""
    return jnp.broadcast_to(x[..., None], (*x.shape, LANES))


def _by_tile(
    spec: Spec, side: LinearSide, whole: Int[Array, "B Q M W"]
) -> Int8[Array, "B Q n L 128"]:
    """High and low bytes of the rows of those units that have lanes in a tile, tile by tile."""
    batch, blocks, _, width = whole.shape
    tiles = whole.reshape(batch, blocks, spec.groups, spec.each, width // LANES, LANES)
    unit = side.tile_unit[:, None] + jnp.arange(spec.slots, dtype=jnp.int32)[None]  # [n, S]
    group = jnp.asarray(spec.unit_groups, jnp.int32)[jnp.minimum(unit, spec.units - 1)]
    every = jnp.moveaxis(tiles, 4, 0)  # [n, B, Q, J, rows, 128]
    own = jax.vmap(lambda x, g: x[:, :, g])(every, group)
    # A row is zero outside its unit's lanes; slots behind the last unit are no unit's.
    there = side.unit.reshape(-1, 1, LANES) == unit[:, :, None]  # [n, S, 128]
    own = jnp.where(there[:, None, None, :, None], own, 0)
    own = jnp.moveaxis(own, 0, 2).reshape(batch, blocks, len(unit), -1, LANES)
    high = (own + 128) >> 8
    both = jnp.concatenate([high, own - (high << 8)], axis=3).astype(jnp.int8)
    return jnp.pad(both, ((0, 0),) * 3 + ((0, spec.left - both.shape[3]), (0, 0)))


def _by_row(
    spec: Spec, side: LinearSide, acc: Float[Array, "B n SR 128"], mass: Float[Array, "B UR"]
) -> Float[Array, "B M W"]:
    """Sums of every row over the lanes of its group's units, half of each unit's mass taken off."""
    batch, tiles = acc.shape[:2]
    parts = acc.reshape(batch, tiles, spec.slots, spec.each, LANES)
    unit = side.tile_unit[:, None] + jnp.arange(spec.slots, dtype=jnp.int32)[None]
    out = jnp.zeros((spec.units, tiles, batch, spec.each, LANES), jnp.float32)
    tile = jnp.arange(tiles, dtype=jnp.int32)[:, None]
    out = out.at[unit, tile].set(jnp.moveaxis(parts, 0, 2), mode="drop")
    out = out.transpose(2, 0, 3, 1, 4).reshape(batch, spec.units, spec.each, tiles * LANES)
    centred = out - 0.5 * mass.reshape(batch, spec.units, spec.each, 1)
    units = jnp.arange(spec.units, dtype=jnp.int32)
    own = jnp.where((side.unit[None] == units[:, None])[None, :, None], centred, 0.0)
    groups = jnp.asarray(spec.unit_groups, jnp.int32)
    rows = jnp.zeros((batch, spec.groups, *own.shape[2:]), jnp.float32).at[:, groups].add(own)
    return rows.reshape(batch, spec.rows, -1)


def page_order(
    x: Shaped[Array | np.ndarray, "B M S"],
) -> Shaped[Array | np.ndarray, "B P M 256"]:
    """Page by page, tokens in the order in which masks take them: byte of the word last."""
    batch, m, slots = x.shape
    parts = x.reshape(batch, m, slots // PAGE, PAGE // 32, 4, ROWS).swapaxes(-1, -2)
    return parts.reshape(batch, m, slots // PAGE, PAGE).swapaxes(1, 2)


def _call(
    spec: Spec, interpret, table, scalars, wide, gains, weights, query, constants, bias, words
):
    batch, m, (k_width, v_width) = len(query), spec.rows, spec.widths
    sums = (v_width // LANES, spec.slots * spec.each, LANES)

    def block(x):
        return pl.BlockSpec((1, *x.shape[1:]), lambda b, *_: (b, *(0,) * (x.ndim - 1)))

    def whole(x):
        return pl.BlockSpec(x.shape, lambda b, *_: (0,) * x.ndim)

    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    kernel, tables = by_table(functools.partial(inner.kernel, spec), table)
    scalars = (*tables, *scalars)
    of_units = spec.units * spec.each
    rows = of_units + spec.slots * spec.each  # a tile's last slots may lie behind the units
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(scalars),
        grid=(batch,),
        in_specs=[
            *(block(x) for x in wide), whole(gains), whole(weights),
            *(hbm if spec.turned else block(x) for x in (query, constants)),
            hbm if spec.per_token else block(bias),
            hbm,
        ],
        out_specs=[
            pl.BlockSpec((1, *sums), lambda b, *_: (b, 0, 0, 0)),
            pl.BlockSpec((1, 3, of_units, LANES), lambda b, *_: (b, 0, 0, 0)),
        ],
        scratch_shapes=[
            pltpu.VMEM((2, ROWS, LANES if spec.joined else k_width), jnp.uint32),
            pltpu.VMEM((3, ROWS, v_width), jnp.uint32),
            pltpu.VMEM((2, spec.per_page, *query.shape[2:]), jnp.int8),
            pltpu.VMEM((2, spec.per_page, of_units, LANES), jnp.float32),
            pltpu.VMEM((2, m, PAGE), jnp.float32),
            pltpu.VMEM((2, rows, LANES), jnp.int32),  # products of K
            pltpu.VMEM((2, spec.units, spec.left, LANES), jnp.int8),  # weights of V
            pltpu.VMEM((2, rows, LANES), jnp.float32),  # what sums are multiplied by, old and new
            pltpu.SemaphoreType.DMA((2,)),
        ],
    )  # fmt: skip
    if not interpret:
        words = pltpu.with_memory_space_constraint(words, pltpu.HBM)
    return pl.pallas_call(
        kernel,
        out_shape=[
            jax.ShapeDtypeStruct((batch, *sums), jnp.float32),
            jax.ShapeDtypeStruct((batch, 3, of_units, LANES), jnp.float32),
        ],
        grid_spec=grid_spec,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), disable_bounds_checks=True
        ),
        interpret=interpret,
        name="turboq_columns",
    )(*scalars, *wide, gains, weights, query, constants, bias, words)
